"""The residual of a likelihood at a denoiser's mean, with products of both Jacobians."""

import contextlib
import copy
from collections.abc import Callable
from typing import Self

import torch
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.dynamics.attention import twice_differentiable_attention
from pyro_diffusion.guidance.base import shift_mean
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.linearization import LinearizedLikelihood
from pyro_diffusion.likelihoods.whitening import Whitened
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["LinearizedDenoiser", "detached"]


class LinearizedDenoiser(LinearizedLikelihood):
    r"""A linearized likelihood at :math:`\hat x_0(x_t)`, with :math:`J = \partial\hat x_0/\partial x_t`.

    Denoiser and likelihood are evaluated once each.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior.
        likelihood: one with residuals.
        xt: state, batch + event.
        level: where it is.
        context: the denoiser's.
        through: whether products with J will be asked for; if not, the denoiser is evaluated without a graph.
        graph: whether all of it stays differentiable in x_t.

    Attributes:
        through: whether products with J can be asked for.
        prior: the denoiser's posterior, detached.
        variance: its variance, or None for a point mass.
        matrix: a covariance of x_0 that a method computed once for all of its products here, or None.

    Raises:
        ValueError: if the residual or the posterior mean has no gradient.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        xt: Tensor,
        level: Level,
        context: dict[str, Tensor],
        through: bool = True,
        graph: bool = False,
    ) -> None:
        twice = twice_differentiable_attention() if graph else contextlib.nullcontext()
        with torch.set_grad_enabled(through), twice:
            self._xt = xt.detach().requires_grad_(through)
            prior = denoiser(self._xt, level, **context)
            self.prior = detached(prior)
            point_mass = isinstance(per_coordinate(prior), Delta)
            self.variance = None if point_mass else (prior if graph else self.prior).variance
            self._mean = self._centre(prior.mean)
        self.through = through
        if through and not self._mean.requires_grad:
            raise ValueError(
                f"denoiser: got a {type(denoiser).__name__} whose mean has no gradient in x_t, expected a "
                "differentiable one (DiffPIR asks for none)"
            )
        self.matrix: Tensor | None = None
        super().__init__(likelihood.whitened, self._mean, graph)

    def _centre(self, mean: Tensor) -> Tensor:
        """Where the likelihood is linearized, given the denoiser's mean: there."""
        return mean

    def back(self, v: Tensor) -> Tensor:
        """J^T v: data space to itself, through the denoiser."""
        return self._vjp(self._mean, self._xt, v)

    def linearized_at(self, whitened: Callable[[Tensor], Whitened], x0: Tensor) -> Self:
        r"""The same denoiser with a likelihood linearized at x_0, detached.

        The residual is that of the tangent at :math:`\hat x_0`, :math:`r(x_0) + B (x_0 - \hat x_0)`.

        Args:
            whitened: residual and log-normalizer of x_0.
            x0: where, batch + event.
        """
        new = copy.copy(self)
        LinearizedLikelihood.__init__(new, whitened, x0)
        new.residual = new.residual + new.push(x0 - self.mean)
        new.mean = self.mean
        return new

    def score(self, log_twist: Tensor) -> Tensor:
        """The gradient in x_t of a log-twist that was computed with the graph, detached."""
        ones = torch.ones_like(log_twist)
        (gradient,) = torch.autograd.grad(log_twist, self._xt, ones, retain_graph=True)
        return gradient


def detached(posterior: TorchDistribution) -> TorchDistribution:
    """The same posterior without a graph: a point mass, values with probabilities, or else a normal."""
    base = per_coordinate(posterior)
    if isinstance(base, Quantized):
        quantized = Quantized(base.logits.detach(), base.values.detach(), validate_args=False)
        return quantized.to_event(posterior.event_dim)
    return shift_mean(posterior, torch.zeros_like(posterior.mean))
