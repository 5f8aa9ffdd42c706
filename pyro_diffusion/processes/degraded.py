"""Any degradation of real data, linear or not, with noise: cold diffusion, inverse heat dissipation."""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.levels import check_finite_ends
from pyro_diffusion.processes.linear import ROUNDINGS
from pyro_diffusion.processes.real import RealProcess
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape, check_finite, check_number, kind_of

__all__ = ["DegradedCoefficients", "DegradedGaussian"]

Operator = Callable[[Tensor, Tensor], Tensor]


class DegradedCoefficients(NamedTuple):
    r"""Bridge :math:`\mathcal N(D_s(x_0) + r\,(x_t - D_t(x_0)),\; v)`.

    Attributes:
        early: the time s.
        late: the time t.
        noise: r, the weight of the noise :math:`x_t - D_t(x_0)`.
        variance: v.
        reverse_variance: of the reverse kernel of a point mass; v unless the process says otherwise.
    """

    early: Tensor
    late: Tensor
    noise: Tensor
    variance: Tensor
    reverse_variance: Tensor


class DegradedGaussian(RealProcess):
    r""":math:`x_t = D_t(x_0) + \sigma_t \epsilon` for any operator D, linear or not, with :math:`D_0 = id`.

    .. math::
        q(x_t | x_0) &= \mathcal N(D_t(x_0),\; \sigma_t^2), \\
        q_\eta(x_s | x_t, x_0) &= \mathcal N\big(D_s(x_0) + r\,(x_t - D_t(x_0)),\; v\big), \qquad
        r = \tfrac{\sigma_s}{\sigma_t} \sqrt{1 - \eta^2 \kappa}, \quad v = \eta^2 \kappa\,\sigma_s^2 .

    As :math:`v = \sigma_s^2 - r^2 \sigma_t^2`, these bridges have the marginals above whatever D is:
    :math:`x_s - D_s(x_0)` has mean 0 and variance :math:`r^2 \sigma_t^2 + v`. The ``renewal``
    :math:`\kappa \in [0, 1]` is the share of the noise's variance that is drawn afresh in a step:

    - None: :math:`\kappa = 1 - e^{\lambda_t - \lambda_s}` of the schedule's log-SNR, the bridges of
      :class:`GaussianProcess`, which this process is for :math:`D_t(x) = \alpha_t x`.
    - 0: the noise is kept. At constant sigma the reverse step is
      :math:`x_s = x_t - D_t(\hat x_0) + D_s(\hat x_0)`, the improved sampler of *cold diffusion*
      (for any renewal ``DDIM(eta=0)`` takes this step, and without noise the default is 0).
    - 1: noise is drawn afresh, r = 0. With a ``reverse_scale`` this is *inverse heat dissipation* (IHDM).

    The reverse kernel of a point mass at :math:`\hat x_0` is the bridge at :math:`\hat x_0`, with variance
    ``reverse_scale``\ :sup:`2` if that is given. Other posteriors are refused: the spread of
    :math:`D_s(x_0) - r D_t(x_0)` under them has no closed form. A gradient flows
    through D.

    **What the bound is worth.** It holds wherever v > 0, for every reverse scale. It is tight in the limit of
    many steps only where the process is Markov, as for :math:`D_t(x) = \alpha_t x`. Elsewhere each step
    tells something new of x_0: with the default renewal the loss grows to a limit as the steps grow, with a
    constant one it grows without limit. Too few steps cost as well, as a point mass has no spread: compare
    several numbers of steps. Bridges without variance (renewal or sigma 0) have no
    density: they sample, and likelihoods are refused.

    For a linear D the deterministic step is a first-order step of the flow
    :math:`\dot x = \dot D_t \hat x_0 + (\dot\sigma_t/\sigma_t)(x - D_t \hat x_0)`, which has the
    marginals :math:`q(x_t)` if :math:`\hat x_0` is the posterior mean.

    Args:
        schedule: its log-SNR is the clock that networks are told, its sigma the noise (its alpha only scales
            what networks see).
        operator: ``operator(x0, t)``, :math:`D_t(x_0)` in the shape and dtype of x0: batch + event; t is one
            number, or has x0's batch shape and singleton event dimensions. A function or a module.
        event_dim: number of rightmost dimensions that make one datum.
        sigma: the noise scale if it is constant, from 0 to 1e6; that of the schedule by default.
        renewal: :math:`\kappa`, see above.
        reverse_scale: standard deviation of the reverse kernel, > 0 (1.25 sigma in IHDM).
        prior: distribution of x_1, of the event shape; its dtype and device are its own. By default
            :math:`\mathcal N(0, \alpha_1^2 + \sigma_1^2)`, which suits a D that leaves nothing of the data.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        Numbers whose large values saturate.

        >>> from pyro_diffusion.schedules import Cosine
        >>> process = DegradedGaussian(Cosine(), lambda x0, t: (1 - t) * x0 + t * torch.tanh(x0))
        >>> process.marginal(torch.zeros(5, 2), torch.rand(5)).event_shape
        torch.Size([2])

    References:
        Bansal et al., Cold diffusion, arXiv 2208.09392, algorithm 2; Rissanen et al., Generative modelling
        with inverse heat dissipation, arXiv 2206.13397, section 3; Song et al. (DDIM), arXiv 2010.02502.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        {Ability.NUMBERS, Ability.INDEPENDENT, Ability.FREE_VARIANCE}
    )

    def __init__(
        self,
        schedule: Schedule,
        operator: Operator,
        event_dim: int = 1,
        *,
        sigma: float | None = None,
        renewal: float | None = None,
        reverse_scale: float | None = None,
        prior: TorchDistribution | None = None,
    ) -> None:
        super().__init__(schedule, event_dim)
        if isinstance(operator, type) or not callable(operator):
            raise ValueError(f"operator: got {kind_of(operator)}, expected a function D(x0, t)")
        self.operator = operator
        self.sigma = (
            None if sigma is None else check_number("sigma", sigma, at_least=0, at_most=1e6)
        )
        if renewal is None and self.sigma == 0:
            renewal = 0.0
        self.renewal = (
            None if renewal is None else check_number("renewal", renewal, at_least=0, at_most=1)
        )
        self.reverse_scale = (
            None
            if reverse_scale is None
            else check_number("reverse_scale", reverse_scale, above=0, at_most=1e6)
        )
        if prior is not None:
            _check_prior(prior, event_dim)
        self._prior = prior

    def scales(self, level: Level) -> Level:
        """The schedule's, or constant noise beside a signal of scale 1."""
        if self.sigma is None:
            return level
        log_snr = -2 * math.log(self.sigma) if self.sigma > 0 else math.inf
        alpha, sigma = torch.ones_like(level.alpha), torch.full_like(level.sigma, self.sigma)
        return level._replace(
            log_snr=torch.full_like(level.log_snr, log_snr), alpha=alpha, sigma=sigma
        )

    def degraded(self, x0: Tensor, t: Tensor) -> Tensor:
        """D_t(x_0), checked.

        Args:
            x0: data, batch + event.
            t: times that broadcast with x0.

        Raises:
            ValueError: for what is no tensor of the shape and dtype of x0, a change of x0 itself, and (on the
                CPU, where a check costs no wait) numbers that are not finite of an x0 that is.
        """
        x0 = x0.expand(torch.broadcast_shapes(x0.shape, t.shape))
        version = None if x0.is_inference() else x0._version
        out = self.operator(x0, t)
        if version is not None and x0._version != version:
            raise ValueError(
                "operator: got one that changes x0 in place, expected one that leaves it"
            )
        if not isinstance(out, Tensor):
            raise ValueError(f"operator: got {kind_of(out)} from it, expected a tensor")
        if out.shape != x0.shape or out.dtype != x0.dtype:
            raise ValueError(
                f"operator: got {tuple(out.shape)} in {out.dtype} from it, expected {tuple(x0.shape)} in "
                f"{x0.dtype}, those of x0"
            )
        here = out.device.type == "cpu" and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        if here and bool(x0.isfinite().all()):
            check_finite("operator", out)
        return out

    def check_density(self) -> None:
        """Refuse bridges without variance.

        Raises:
            ValueError: naming ``sigma`` or ``renewal``.
        """
        for name, value in (("sigma", self.sigma), ("renewal", self.renewal)):
            if value == 0:
                raise ValueError(
                    f"{name}: got 0 of a {type(self).__name__}, whose bridges have no density, expected "
                    f"{name} > 0 for a bound or for weights of particles (without it sample, and train by a "
                    "Regression)"
                )

    def check_precision(self, dtype: torch.dtype, times: Tensor) -> None:
        """Refuse noise that rounding hides beside data of unit scale.

        Raises:
            ValueError: naming ``sigma`` or the schedule.
        """
        key, least = (self._sources(times), dtype), self.sigma
        if key[0] is not None and self._cached("precise") == key:
            return
        if least is None:
            with torch.no_grad():
                least = float(self._level_at(times[:1].double()).sigma.min())
        limit = ROUNDINGS * torch.finfo(dtype).eps
        if least < limit and self.sigma != 0:
            name = "schedule" if self.sigma is None else "sigma"
            raise ValueError(
                f"{name}: got noise of scale {least:g} and states in {dtype}, expected {limit:.2g} at least "
                "(less is lost in the rounding of data of unit scale), or sigma=0"
            )
        self._cache("precise", key)

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0 (exact), a point without noise."""
        level = self.level(t, x0, state="x0")
        mean = self.degraded(x0, level.t)
        return self.point_mass(mean) if self.sigma == 0 else self.noised(mean, level.sigma)

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The distribution of x_1 that was given, or a normal of the schedule's variance at t = 1.

        Raises:
            ValueError: for another event shape than that of a given one.
        """
        sizes = self.check_event(event_shape)
        if self._prior is not None:
            if self._prior.event_shape != sizes:
                raise ValueError(
                    f"event_shape: got {tuple(sizes)}, expected {tuple(self._prior.event_shape)}, that of "
                    "the process's prior"
                )
            return self._prior
        zeros = torch.zeros(sizes, dtype=dtype, device=device)
        end = self._level_at(zeros.new_ones(()))
        return self.noised(zeros, torch.hypot(end.alpha, end.sigma))

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> DegradedCoefficients:
        """Weight of the noise and variances of the bridge.

        Raises:
            ValueError: if eta lies outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
        gap = t.clock - s.clock
        if self.renewal is None:
            renewed = -torch.expm1(gap)
            kept = torch.exp(0.5 * gap) if eta == 1 else (1 - eta**2 * renewed).sqrt()
        else:
            renewed = torch.full_like(gap, self.renewal)
            kept = (1 - eta**2 * renewed).sqrt()
        # At constant noise the ratio is 1, also where there is none.
        ratio = s.sigma / t.sigma if self.sigma is None else torch.ones_like(t.sigma)
        variance = eta**2 * renewed * s.sigma.square()
        reverse = variance
        if self.reverse_scale is not None:
            reverse = torch.full_like(variance, (eta * self.reverse_scale) ** 2)
        return DegradedCoefficients(s.t, t.t, ratio * kept, variance, reverse)

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: DegradedCoefficients
    ) -> TorchDistribution:
        """The bridge at a point mass, with the reverse kernel's variance.

        Raises:
            ValueError: for a posterior that is no point mass.
        """
        c, base = coefficients, per_coordinate(posterior)
        if not isinstance(base, Delta):
            raise ValueError(
                f"posterior: got {type(base).__name__} under {type(self).__name__}, expected a point "
                "mass, as of a GaussianDenoiser without a variance (reverse_scale widens the reverse kernel)"
            )
        x0 = base.mean
        mean = self.degraded(x0, c.early) + c.noise * (xt - self.degraded(x0, c.late))
        return self.noised(mean, c.reverse_variance.sqrt())

    def bridge(
        self, xt: Tensor, x0: Tensor, s: Tensor | Level, t: Tensor | Level, eta: float = 1.0
    ) -> TorchDistribution:
        """The distribution of x_s given x_t and x_0 (exact), of the bridge's own variance."""
        kernel = super().bridge(xt, x0, s, t, eta)
        if self.reverse_scale is None:
            return kernel
        early, late = self.level(s, xt), self.level(t, xt)
        variance = self.coefficients(early, late, eta).variance
        return self.noised(per_coordinate(kernel).loc, variance.sqrt())

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Mean and standard deviation of every coordinate."""
        base = per_coordinate(kernel)
        return {"loc": base.loc, "scale": base.scale}

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The normal of such moments."""
        return self.noised(tensors["loc"], tensors["scale"])

    def _check_falling(self, level: Level) -> None:
        """Noise may be constant: what falls with time is the clock."""

    def _check_grid_levels(self, times: Tensor) -> None:
        """Refuse grids with an infinite clock at an end, too."""
        super()._check_grid_levels(times)
        check_finite_ends(self._level_at(times[[0, -1]]).clock)


def _check_prior(prior: object, event_dim: int) -> None:
    if not isinstance(prior, TorchDistributionMixin):
        raise ValueError(
            f"prior: got {kind_of(prior)}, expected a Pyro distribution of x_1 or None"
        )
    if prior.batch_shape or len(prior.event_shape) != event_dim:
        raise ValueError(
            f"prior: got batch shape {tuple(prior.batch_shape)} and event shape "
            f"{tuple(prior.event_shape)}, expected no batch and {event_dim} event dimension(s)"
        )
