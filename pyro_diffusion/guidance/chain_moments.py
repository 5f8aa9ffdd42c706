"""Gaussian conditioning with mean and covariance that draws of the chain confirm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import Twisted
from pyro_diffusion.guidance.gaussian_conditioning import GaussianConditioning
from pyro_diffusion.guidance.kept import weight_sums
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.guidance.moments import Knot, Moments, measured
from pyro_diffusion.guidance.proposal import Readings
from pyro_diffusion.guidance.relinearization import Solved, relinearized
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.precision import matmul
from pyro_diffusion.schedules import Level
from pyro_diffusion.schedules.grids import uniform

__all__ = ["ChainMoments"]

STEPS = 64


class ChainMoments(GaussianConditioning):
    r"""Moments of x_0 given x_t that were measured on the chain itself: the twist for particles.

    .. math::
        \log \psi_t(x_t) = \log \mathcal N(r;\; 0,\; I + B V B^T), \qquad
        \text{shift} = \tfrac12 V B^T S^{-1} r + \tfrac12 \tfrac{\sigma^2}{\alpha} \nabla_{x_t} \log \psi_t,

    r being the residual at the mean m. Both halves estimate what Tweedie's formula asks for, with errors
    of their own: the measured covariance misses how the network reacts at this state, its derivative is
    noisy. Weights of particles vary least between the two. What the gradient adds is cut, datum by datum,
    at the length of the first. A Krylov solver, and more than 64 residuals outside particles, do without
    it. Mean m and covariance V are those of 512 draws of the denoiser's own chain, at 33 noise levels: m
    is the linear estimate of x_0 where the network's mean is noise, direction by direction, and V the
    errors' correlation with the denoiser's own variances at x_t (with a variance head a state says how
    much is unknown), see ``guidance.moments.Moments``. So V is what the error of m
    is, on average, at every level and for every denoiser: a twist that claims more than it knows is what
    leaves one particle of thousands. One backward pass through the network.

    Exact for normal data in the limit of many draws, else approximate. The first evaluation measures, with
    512 (steps + 33) evaluations of the denoiser for a datum, and keeps the outcome until parameters
    change; it leaves the seeds of the run alone.

    Other arguments, errors and log-twist: ``GaussianConditioning``; without ``full_gradient``.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula; without
            context.
        likelihood: as there.
        times: of the chain, increasing; 65 from 0 to 1 by default.
        options: ``solver`` and ``iterations``.

    Raises:
        ValueError: for ``full_gradient``, if the denoiser is given a context, and as there.

    References:
        The covariance's shrinkage: Ledoit & Wolf, 2004; twists: Wu et al., arXiv 2306.17775.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        *,
        times: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(denoiser, likelihood, **options)
        if self.full_gradient:
            raise ValueError("full_gradient: got True for ChainMoments, expected False (half is)")
        # Numbers, as what was measured is looked up by them at every evaluation.
        self.times = tuple((uniform(STEPS) if times is None else times).tolist())
        self._sums = weight_sums(denoiser)

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and log-twist at x_t, detached (one network evaluation; S is formed)."""
        at, level = self._linearized(xt, t, context)
        solved = self._by_gradient(at, level)
        assert solved.log_evidence is not None and solved.readings is not None
        with torch.no_grad():
            posterior = self.posterior(at, level, solved)
            # The chain goes on from the denoiser's mean, whatever was measured.
            gap = at.per_row(at.mean - at.prior.mean).unsqueeze(-2)
            moved = matmul(gap, solved.readings.rows.mT).squeeze(-2)
            readings = solved.readings._replace(residual=solved.readings.residual + moved)
            return Twisted(at.prior, posterior, solved.log_evidence, readings)

    def _solved(self, at: LinearizedDenoiser, level: Level, solver: str) -> Solved:
        if solver == "direct":
            return self._by_gradient(at, level)
        with torch.no_grad():
            return super()._solved(at, level, solver)

    def _by_gradient(self, at: LinearizedDenoiser, level: Level) -> Solved:
        """The system solved, half of its shift by the log-twist's gradient; detached.

        Rows that are not linear, and so were linearized again, are left without.
        """
        with torch.enable_grad():
            first = self._direct(at, level)
            assert first.log_evidence is not None and first.readings is not None
            gradient = level.tweedie * at.score(first.log_evidence)
        first = Solved(
            first.pulled.detach(),
            first.image.detach(),
            Readings(*(v.detach() for v in first.readings)),
            first.log_evidence.detach(),
        )
        solved = relinearized(
            at,
            self.likelihood.whitened,
            lambda now: first if now is at else self._direct(now, level),
            self.variances(at, level),
            self.relinearizations,
            self.process.event_dim,
        )
        with torch.no_grad():
            kept = at.per_row(first.image)
            added, limit = 0.5 * (at.per_row(gradient) - kept), kept.norm(dim=-1)
            length = added.norm(dim=-1).clamp(min=torch.finfo(added.dtype).tiny)
            added = added * (limit / length).clamp(max=1).unsqueeze(-1)
            image = at.per_row(solved.image)
            linear = (image == kept).all(-1, keepdim=True)
            image = torch.where(linear, image + added, image).reshape(solved.image.shape)
            return solved._replace(image=image)

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """V v."""
        assert isinstance(at, Measured)
        k = self.process.event_dim

        def product(knot: Knot) -> Tensor:
            scale = knot.scale.to(v) * at.spread
            return scale * knot.correlation.times(scale * v, k)

        return at.by_knot(product)

    def multiplies_by_jacobian(self, at: LinearizedDenoiser) -> bool:
        """They are not."""
        return False

    def variances(self, at: LinearizedDenoiser, level: Level) -> Tensor:
        """The squares of the measured scales."""
        assert isinstance(at, Measured)
        with torch.no_grad():
            return at.by_knot(lambda knot: (knot.scale.to(at.spread) * at.spread).square())

    def _linearized(
        self, xt: Tensor, t: Tensor | Level, context: dict[str, Tensor]
    ) -> tuple[LinearizedDenoiser, Level]:
        if any(value is not None for value in context.values()):
            raise ValueError(
                f"context: got {', '.join(context)}, expected none (CalibratedCovariance takes some)"
            )
        level = self.process.level(t, xt, state="xt")
        event = xt.shape[xt.dim() - self.process.event_dim :]
        moments = measured(self.denoiser, self.times, xt.new_zeros(event), self._sums)
        return Measured(self.denoiser, self.likelihood, xt, level, moments), level


class Measured(LinearizedDenoiser):
    """A denoiser whose likelihood is linearized at the measured mean."""

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        xt: Tensor,
        level: Level,
        moments: Moments,
    ) -> None:
        self.moments, self.level = moments, level
        self.event_dim = denoiser.process.event_dim
        self.places = moments.nearest(level)
        super().__init__(denoiser, likelihood, xt, level, {}, through=True, graph=True)

    @property
    def spread(self) -> Tensor:
        """The denoiser's standard deviations, or what stands in for them."""
        floor = self.by_knot(lambda knot: knot.floor.to(self._xt))
        return self.moments.spread(self.variance, self.level, floor)

    def by_knot(self, function: Callable[[Knot], Tensor]) -> Tensor:
        """A function of each datum's own knot."""
        knots = self.moments.knots
        if isinstance(self.places, int):
            return function(knots[self.places])
        first, *others = self.places.unique().tolist()
        result = function(knots[first])
        for place in others:
            result = torch.where(self.places == place, function(knots[place]), result)
        return result

    def _centre(self, mean: Tensor) -> Tensor:
        """m, given the denoiser's mean."""
        k = self.event_dim
        linear = self.moments.linear(self._xt, self.level, k)

        def corrected(knot: Knot) -> Tensor:
            bias = knot.bias.to(mean) * self.spread
            return linear + knot.trust.times(mean - linear, k) + bias

        return self.by_knot(corrected)
