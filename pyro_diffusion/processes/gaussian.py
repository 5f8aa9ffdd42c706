"""Linear Gaussian destruction: all of the Gaussian algebra of the package."""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.base import ForwardProcess
from pyro_diffusion.processes.levels import Rates, check_order
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape, check_finite, check_tensor

__all__ = ["GaussianCoefficients", "GaussianProcess"]


# Of a state of unit scale: how many of them the least noise has to be worth.
ROUNDINGS = 16
# Nats of log-SNR that the largest number stays away from overflow.
HEADROOM = 8


class GaussianCoefficients(NamedTuple):
    r"""Bridge :math:`\mathcal N(a\,x_t + k\,x_0,\; v)`.

    Attributes:
        xt: a, the weight of the state.
        x0: k, the weight of the data.
        variance: v.
    """

    xt: Tensor
    x0: Tensor
    variance: Tensor


class GaussianProcess(ForwardProcess):
    r""":math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` with independent standard normal noise.

    With :math:`c = 1 - e^{\lambda_t - \lambda_s}` for s < t,

    .. math::
        q(x_t | x_0) &= \mathcal N(\alpha_t x_0, \sigma_t^2), \qquad
        q(x_t | x_s) = \mathcal N(\tfrac{\alpha_t}{\alpha_s} x_s, \sigma_t^2 c), \\
        q_\eta(x_s | x_t, x_0) &= \mathcal N(r\,x_t + k\,x_0,\; \eta^2 \sigma_s^2 c), \quad
        r = \tfrac{\sigma_s}{\sigma_t}\sqrt{1 - \eta^2 c}, \quad k = \alpha_s - r\,\alpha_t .

    Reverse kernel of a posterior with mean m and variance w:
    :math:`\mathcal N(r\,x_t + k\,m,\; \eta^2\sigma_s^2 c + k^2 w)`, exact for point masses and normals,
    the moment-matched normal otherwise (still a valid reverse model, hence a valid bound). A point mass
    gives DDPM's small variance, the exact posterior variance gives Analytic-DPM's.

    The prior is :math:`\mathcal N(0, \alpha_1^2 + \sigma_1^2)`, that of unit-variance data.

    Args:
        schedule: signal and noise scales; chains need finite log-SNR at their ends.
        event_dim: number of rightmost dimensions that make one datum.

    Example:
        >>> from pyro_diffusion.schedules import Cosine
        >>> process = GaussianProcess(Cosine(), event_dim=1)
        >>> process.marginal(torch.zeros(5, 2), torch.rand(5)).event_shape
        torch.Size([2])

    References:
        Ho et al., arXiv 2006.11239; Song et al. (DDIM), arXiv 2010.02502, equation 7;
        Bao et al. (Analytic-DPM), arXiv 2201.06503; Kingma et al., arXiv 2107.00630, appendix A.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(Ability) - {
        *(Ability.SYMBOLS, Ability.JUMPS, Ability.MASK, Ability.REDRAWS)
    }

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.real

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

    def check_state(self, name: str, x: Tensor, values: bool = True) -> None:
        """Refuse what cannot be a state: as the base does, and numbers that are not finite.

        Raises:
            ValueError: naming the argument.
        """
        super().check_state(name, x, values)
        if values:
            check_finite(name, x)

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0 (exact)."""
        level = self.level(t, x0, state="x0")
        return self._normal(level.alpha * x0, level.sigma)

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_s (exact)."""
        early, late = self.level(s, xs, "s", "xs"), self.level(t, xs)
        if not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        fresh = -torch.expm1(late.log_snr - early.log_snr)
        return self._normal(late.alpha / early.alpha * xs, late.sigma * fresh.sqrt())

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """Normal of the variance that unit-variance data has at t = 1."""
        zeros = torch.zeros(self.check_event(event_shape), dtype=dtype, device=device)
        end = self._level_at(zeros.new_ones(()))
        return self._normal(zeros, torch.hypot(end.alpha, end.sigma))

    def base_distribution(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """Standard normal."""
        zero = torch.zeros((), dtype=dtype, device=device)
        noise = Normal(zero, zero + 1, validate_args=False)
        base: TorchDistribution = noise.expand(self.check_event(event_shape))
        return base.to_event(self.event_dim)

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """Delta at x_0."""
        self.check_state("x0", x0, values=False)
        return Delta(x0, event_dim=self.event_dim, validate_args=False)

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> GaussianCoefficients:
        """Weights and variance of the bridge; differences of nearby times do not cancel.

        Raises:
            ValueError: if eta lies outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
        gap = t.log_snr - s.log_snr
        fresh = -torch.expm1(gap)
        log_kept = 0.5 * (gap if eta == 1 else torch.log1p(-(eta**2) * fresh))
        return GaussianCoefficients(
            xt=s.sigma / t.sigma * torch.exp(log_kept),
            x0=-s.alpha * torch.expm1(0.5 * gap + log_kept),
            variance=eta**2 * s.sigma.square() * fresh,
        )

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: GaussianCoefficients
    ) -> TorchDistribution:
        """Bridge integrated over the posterior's first two moments."""
        c, base = coefficients, per_coordinate(posterior)
        variance = c.variance
        if not isinstance(base, Delta):
            variance = variance + c.x0.square() * base.variance
        return self._normal(c.xt * xt + c.x0 * base.mean, variance.sqrt())

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Mean and standard deviation of every coordinate."""
        base = per_coordinate(kernel)
        return {"loc": base.loc, "scale": base.scale}

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The normal of such moments."""
        return self._normal(tensors["loc"], tensors["scale"])

    def divergence_rate(
        self, x0: Tensor, xt: Tensor, posterior: TorchDistribution, rates: Rates
    ) -> Tensor:
        r""":math:`\tfrac12 \sum_i (-\lambda_i')\, e^{\lambda_i} (x_0 - \hat x_0)_i^2`, batch shape."""
        del xt
        error = (x0 - posterior.mean).square()
        weight = -0.5 * rates.log_snr * rates.level.log_snr.exp()
        return sum_rightmost(weight * error, self.event_dim)

    def coordinate_log_likelihood(self, xt: Tensor, values: Tensor, t: Tensor | Level) -> Tensor:
        """log q(x_t | x_0) of every coordinate, for x_0 equal to each of the values, up to a constant."""
        if check_tensor("values", values).dim() != 1:
            raise ValueError(f"values: got shape {tuple(values.shape)}, expected a vector")
        level = self.level(t, xt, state="xt")
        z = (xt.unsqueeze(-1) - level.alpha.unsqueeze(-1) * values) / level.sigma.unsqueeze(-1)
        return -0.5 * z.square()

    def _check_grid_levels(self, times: Tensor) -> None:
        """Refuse grids with infinite log-SNR at an end, too."""
        super()._check_grid_levels(times)
        log_snr = self._level_at(times[[0, -1]]).log_snr
        if not bool(torch.isfinite(log_snr).all()):
            ends = [float(log_snr[0].max()), float(log_snr[-1].min())]
            raise ValueError(
                f"schedule: got log-SNR {ends} at the ends of the grid, expected finite values (cut the "
                "schedule with log_snr_max and log_snr_min)"
            )

    def _normal(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        return Normal(loc, scale, validate_args=False).to_event(self.event_dim)
