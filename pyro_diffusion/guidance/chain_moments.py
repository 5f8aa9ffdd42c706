"""Gaussian conditioning with mean and covariance that draws of the chain confirm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.calibration import weight_sums
from pyro_diffusion.guidance.gaussian_conditioning import GaussianConditioning
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.guidance.moments import Knot, Moments, measured
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.schedules import Level
from pyro_diffusion.schedules.grids import uniform

__all__ = ["ChainMoments"]

STEPS = 64


class ChainMoments(GaussianConditioning):
    r"""Moments of x_0 given x_t that were measured on the chain itself: the twist for particles.

    .. math:: \log p(y | x_t) \approx \log \mathcal N(r;\; 0,\; I + B V B^T), \qquad
              \text{shift} = V B^T S^{-1} r,

    r being the residual at the mean m. Mean m and covariance V are those of 512 draws of the denoiser's own
    chain, at 33 noise levels: m is the linear estimate of x_0 where the network's mean is noise, direction
    by direction, and V the errors' correlation with the denoiser's own variances at x_t (with a variance head
    a state says how much is unknown), see :class:`~pyro_diffusion.guidance.moments.Moments`. So V is what the
    error of m is, on average, at every level and for every denoiser: a twist that claims more than it knows
    is what leaves one particle of thousands. No backward pass through the network.

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
        ValueError: if the denoiser is given a context, and as there.

    References:
        The covariance's shrinkage: Ledoit & Wolf, 2004; twists: Wu et al., arXiv 2306.17775.
    """

    through = False

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        *,
        times: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(denoiser, likelihood, **options)
        self.times = uniform(STEPS) if times is None else times
        self._sums = weight_sums(denoiser)

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """V v."""
        assert isinstance(at, Measured)
        k = self.process.event_dim

        def product(knot: Knot) -> Tensor:
            scale = knot.scale.to(v) * at.spread
            return scale * knot.correlation.times(scale * v, k)

        return at.by_knot(product)

    def _linearized(
        self, xt: Tensor, t: Tensor | Level, context: dict[str, Tensor]
    ) -> tuple[LinearizedDenoiser, Level]:
        if any(value is not None for value in context.values()):
            raise ValueError(
                f"context: got {', '.join(context)}, expected none (CalibratedCovariance takes some)"
            )
        level = self.process.level(t, xt)
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
        super().__init__(denoiser, likelihood, xt, level, {}, through=False)

    @property
    def spread(self) -> Tensor:
        """The denoiser's standard deviations, or what stands in for them."""
        return self.moments.spread(self.variance, self.level)

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
