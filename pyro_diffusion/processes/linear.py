"""What processes x_t = alpha x_0 + sigma z share, whatever the distribution of z."""

import math
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.processes.levels import check_finite_ends
from pyro_diffusion.processes.real import RealProcess
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import Shape

__all__ = ["BridgeCoefficients", "LinearProcess"]


# Of a state of unit scale: how many of them the least noise has to be worth.
ROUNDINGS = 16
# Nats of log-SNR that the largest number stays away from overflow.
HEADROOM = 8


class BridgeCoefficients(NamedTuple):
    r"""Bridge of location :math:`a\,x_t + k\,x_0` and variance v, for noise of unit variance.

    Attributes:
        xt: a, the weight of the state.
        x0: k, the weight of the data.
        variance: v.
    """

    xt: Tensor
    x0: Tensor
    variance: Tensor


class LinearProcess(RealProcess):
    r""":math:`x_t = \alpha_t x_0 + \sigma_t z` with noise z of one distribution, that of ``noised(0, 1)``.

    The noise makes marginal and prior; the mean of the bridge is :math:`r\,x_t + k\,x_0` whatever it is.

    Args:
        schedule: signal and noise scales; chains need finite log-SNR at their ends.
        event_dim: number of rightmost dimensions that make one datum.
    """

    def check_precision(self, dtype: torch.dtype, times: Tensor) -> None:
        """Refuse states that have no room for the least noise beside data of unit scale, or for the most.

        Raises:
            ValueError: naming the schedule, its ends and the range that works.
        """
        info = torch.finfo(dtype)
        high, low = -2 * math.log(ROUNDINGS * info.eps), HEADROOM - math.log(info.max)
        first, last = self.clock_ends
        if not self._scales_differ and first <= high and last >= low:
            return
        # A grid may use the middle of the curve alone.
        key = (self._sources(times), dtype)
        if key[0] is not None and self._cached("precise") == key:
            return
        with torch.no_grad():
            log_snr = self._level_at(times[[0, -1]].double()).log_snr
        start, end = float(log_snr.max()), float(log_snr.min())
        if not (start <= high and end >= low):
            finer = "" if dtype == torch.float64 else ", or float64"
            raise ValueError(
                f"schedule: got {type(self.schedule).__name__} with log-SNR {start:g} to {end:g} and "
                f"states in {dtype}, expected {math.floor(high)} at most and {math.ceil(low)} at least "
                "(beyond, rounding hides the noise or its scale overflows): cut it with log_snr_max and "
                f"log_snr_min{finer}"
            )
        self._cache("precise", key)

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0 (exact)."""
        level = self.level(t, x0, state="x0")
        return self.noised(level.alpha * x0, level.sigma)

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The start at the scale that data of the noise's own scale have at t = 1."""
        zeros = torch.zeros(self.check_event(event_shape), dtype=dtype, device=device)
        end = self._level_at(zeros.new_ones(()))
        return self.started(zeros, torch.hypot(end.alpha, end.sigma))

    def started(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The distribution of loc + scale z of a start z of generation, by default the noise."""
        return self.noised(loc, scale)

    def base_distribution(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The start itself, by default the noise."""
        zeros = torch.zeros(self.check_event(event_shape), dtype=dtype, device=device)
        return self.started(zeros, torch.ones_like(zeros))

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> BridgeCoefficients:
        """Weights and variance of the bridge; differences of nearby times do not cancel.

        Raises:
            ValueError: if eta lies outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
        gap = t.log_snr - s.log_snr
        fresh = -torch.expm1(gap)
        log_kept = 0.5 * (gap if eta == 1 else torch.log1p(-(eta**2) * fresh))
        return BridgeCoefficients(
            xt=s.sigma / t.sigma * torch.exp(log_kept),
            x0=-s.alpha * torch.expm1(0.5 * gap + log_kept),
            variance=eta**2 * s.sigma.square() * fresh,
        )

    def _check_grid_levels(self, times: Tensor) -> None:
        """Refuse grids with infinite log-SNR at an end, too."""
        super()._check_grid_levels(times)
        check_finite_ends(self._level_at(times[[0, -1]]).log_snr)
