"""What a forward process is: a way to destroy data whose bridge is known."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_diffusion.precision import at_least_single
from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.levels import Rates, check_falling, check_order, rates_through
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.schedules.cached import CachedModule, Sources
from pyro_diffusion.schedules.grids import check_grid
from pyro_diffusion.validation import (
    Shape,
    check_broadcast,
    check_positive_int,
    check_sizes,
    check_tensor,
    check_times,
)

__all__ = ["ForwardProcess"]


class ForwardProcess(CachedModule):
    r"""A Markov process :math:`q` that destroys data, t = 0 (data) to t = 1 (noise).

    Five conditionals define it; each method returns a Pyro distribution whose batch shape is that of the
    state and whose event dimension is ``event_dim``. Times are floats or tensors of the state's batch
    shape, or :class:`~pyro_diffusion.schedules.Level` objects that a loop evaluated beforehand.

    ============================  =============================================================
    ``marginal(x0, t)``           :math:`q(x_t | x_0)`
    ``transition(xs, s, t)``      :math:`q(x_t | x_s)`, s < t
    ``bridge(xt, x0, s, t)``      :math:`q(x_s | x_t, x_0)`, s < t
    ``reverse(xt, p, s, t)``      :math:`\int q(x_s | x_t, x_0)\, p(x_0 | x_t)\, dx_0`
    ``prior(event_shape)``        a distribution close to :math:`q(x_1)`
    ============================  =============================================================

    Args:
        schedule: signal and noise scales as functions of time. Code outside the process takes levels from
            :meth:`level`, :meth:`levels`, :meth:`level_of_clock` and :meth:`rates` instead.
        event_dim: number of rightmost dimensions that make one datum.

    Attributes:
        abilities: what methods may ask of the process, see :class:`Ability`.
        support: constraint on one coordinate of the data.

    **Implementing a process.** Scales of its own, say by coordinate, take one method, :meth:`scales`, of a
    subclass of a process that has the rest: levels, rates and everything above the process follow, and it
    loses ``Ability.ISOTROPIC``, so that what needs one noise level refuses it. A new way to destroy data
    writes its algebra once, as the bridge is the reverse kernel of a point mass: :meth:`coefficients` (all
    that depends on times alone; loops call it once for all steps) and :meth:`combine`, beside
    :meth:`marginal`, :meth:`transition`, :meth:`prior` and :meth:`point_mass`. It says what data are
    (``support``) and what methods may ask of it (``abilities``, see :class:`Ability`); for particle filters,
    which tensors define a kernel (:meth:`kernel_tensors`, :meth:`kernel_from`).

    Example:
        A Gaussian process whose coordinates have their log-SNRs shifted against the schedule's.

        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> class Shifted(GaussianProcess):
        ...     def __init__(self, schedule, shift):
        ...         super().__init__(schedule)
        ...         self.register_buffer("shift", shift)
        ...     def scales(self, level):
        ...         log_snr = level.clock + self.shift.to(level.clock)
        ...         alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        ...         return level._replace(log_snr=log_snr, alpha=alpha, sigma=sigma)
        >>> process = Shifted(Cosine(), torch.tensor([0.0, -2.0]))
        >>> process.level(torch.tensor([0.2, 0.4])).log_snr.shape
        torch.Size([2, 2])
        >>> Ability.ISOTROPIC in process.abilities
        False

    References:
        Sohl-Dickstein et al., arXiv 1503.03585; Ho et al., arXiv 2006.11239.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset()

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Scales of a subclass's own may differ by coordinate, unless it says otherwise."""
        super().__init_subclass__(**keywords)
        if "scales" in vars(cls) and "abilities" not in vars(cls):
            cls.abilities = cls.abilities - {Ability.ISOTROPIC}

    def __init__(self, schedule: Schedule, event_dim: int = 1) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule: got {type(schedule).__name__}, expected a Schedule")
        self.schedule = schedule
        self.event_dim = check_positive_int("event_dim", event_dim, at_least=0)

    @property
    def support(self) -> constraints.Constraint:
        """Constraint on one coordinate of the data."""
        raise NotImplementedError

    def scales(self, level: Level) -> Level:
        r"""The process's level, given its schedule's with singleton dimensions where events are.

        By default the same. Override it for scales of your own: return ``level._replace(log_snr=...,
        alpha=..., sigma=...)`` with tensors that broadcast to times + event, elementwise differentiable
        functions of the level, in its dtype and on its device; ``t`` and ``clock`` stay. The log-SNR must be
        that of the scales, :math:`\log(\alpha^2/\sigma^2)`, and fall with t in every coordinate.
        """
        return level

    def check_state(self, name: str, x: Tensor, values: bool = True) -> None:
        """Refuse what cannot be a state: fewer dimensions than a datum has, or the wrong kind of numbers.

        Args:
            name: of the argument, for errors.
            x: the state, batch + event.
            values: whether to check the numbers, too (a host round trip on GPU).

        Raises:
            ValueError: naming the argument.
        """
        if check_tensor(name, x).dim() < self.event_dim:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected batch dimensions followed by "
                f"{self.event_dim} event dimension(s)"
            )

    def check_event(self, event_shape: Shape) -> torch.Size:
        """The shape of one datum, or a refusal.

        Raises:
            ValueError: for sizes below 1, or another number of dimensions than ``event_dim``.
        """
        sizes = check_sizes("event_shape", event_shape)
        if len(sizes) != self.event_dim:
            raise ValueError(
                f"event_shape: got {tuple(event_shape)}, expected {self.event_dim} "
                "dimension(s), the event_dim of the denoiser's process"
            )
        return sizes

    def check_precision(self, dtype: torch.dtype, times: Tensor) -> None:
        """Refuse a dtype in which the levels at a grid's ends are indistinguishable from data or noise.

        Asked by every model when it computes. It costs nothing unless the schedule reaches that far.

        Args:
            dtype: of the states.
            times: the grid.

        Raises:
            ValueError: naming the schedule, its ends and the range that works.
        """

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0."""
        raise NotImplementedError

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given an earlier x_s, s < t."""
        raise NotImplementedError

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The distribution that generation starts from, batch shape ()."""
        raise NotImplementedError

    def base_distribution(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        r"""What the probability flow starts from: :math:`x_1/\sqrt{\alpha_1^2+\sigma_1^2}` in distribution.

        Of the noise alone, as if none of the data were left at t = 1. Batch shape (); needs
        ``Ability.ODE``.
        """
        raise NotImplementedError

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """A posterior that is certain of x_0."""
        raise NotImplementedError

    def trial_data(self, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """Data to try a program on, the same at every call; the global generators are left alone.

        Standard normal numbers, taken to the ``support`` if that is smaller, or symbols, all equally likely.

        Args:
            shape: of the data, batch + event.
            dtype: of real data.

        Raises:
            NotImplementedError: for a support to which torch knows no transform.
        """
        support, generator = self.support, torch.Generator().manual_seed(0)
        if isinstance(support, constraints.integer_interval):
            low, high = int(support.lower_bound), int(support.upper_bound)
            return torch.randint(low, high + 1, shape, generator=generator)
        data: Tensor = transform_to(support)(torch.randn(shape, generator=generator, dtype=dtype))
        return data

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> Any:
        """Everything the bridge from t to s needs that depends on times alone (a named tuple of tensors)."""
        raise NotImplementedError

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: Any
    ) -> TorchDistribution:
        """The reverse kernel, given its coefficients broadcast against events."""
        raise NotImplementedError

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """The tensors that define a kernel which :meth:`combine` returned, each of batch + event (+ own).

        A particle filter keeps a kernel by its tensors, so as to resample it; :meth:`kernel_from` is the way
        back.
        """
        raise NotImplementedError

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The kernel of such tensors, whose batch shape may be another by now."""
        raise NotImplementedError

    def coordinate_log_likelihood(self, xt: Tensor, values: Tensor, t: Tensor | Level) -> Tensor:
        """log q(x_t,i | x_0,i = values_k) up to a constant in k, per coordinate; k is a new last dim."""
        raise NotImplementedError

    def reverse(
        self,
        xt: Tensor,
        posterior: TorchDistribution,
        s: Tensor | Level,
        t: Tensor | Level,
        eta: float = 1.0,
    ) -> TorchDistribution:
        """The bridge from t to s integrated over a posterior p(x_0 | x_t), s < t.

        Args:
            xt: state at t, batch + event.
            posterior: a distribution over x_0 of the same batch and event shape.
            s: earlier time(s), scalar or of the batch shape.
            t: later time(s).
            eta: the bridge's free variance, 1 for the Markov process, 0 for the deterministic one (DDIM),
                which may also go from s to a later time.

        Raises:
            ValueError: for times outside [0, 1], s after t, or eta outside [0, 1].
        """
        early, late = self.level(s, xt, "s", "xt"), self.level(t, xt)
        if not isinstance(t, Level):
            check_broadcast("posterior", posterior.batch_shape + posterior.event_shape, xt.shape)
        if eta != 0 and not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        return self.combine(xt, posterior, self.coefficients(early, late, eta))

    def bridge(
        self, xt: Tensor, x0: Tensor, s: Tensor | Level, t: Tensor | Level, eta: float = 1.0
    ) -> TorchDistribution:
        """The distribution of x_s given x_t and x_0, s < t: the reverse kernel of a point mass at x_0."""
        check_broadcast("x0", x0.shape, xt.shape)
        return self.reverse(xt, self.point_mass(x0), s, t, eta)

    @property
    def clock_ends(self) -> tuple[float, float]:
        """The clock at t = 0 and t = 1, decreasing; perhaps infinite."""
        return self.schedule.log_snr_max, self.schedule.log_snr_min

    def finite_clock_ends(self) -> tuple[float, float]:
        """The clock at t = 0 and t = 1.

        Raises:
            ValueError: if one of them is infinite.
        """
        ends = self.clock_ends
        if not all(map(math.isfinite, ends)):
            raise ValueError(
                f"schedule: got log-SNR ends {list(ends)}, expected finite ends (cut the schedule with "
                "log_snr_max and log_snr_min)"
            )
        return ends

    @final
    def level(
        self,
        t: Tensor | Level | float,
        like: Tensor | None = None,
        name: str = "t",
        state: str | None = None,
    ) -> Level:
        """The level at times of a state's batch shape, with dimensions for events.

        Args:
            t: time(s); a Level is handed back as it is, so one of batch shape must come from here.
            like: a state whose device, and dtype if it is real, the level takes.
            name: of the argument t, for errors.
            state: name of the argument ``like`` if it is to be checked as a state.

        Raises:
            ValueError: for times outside [0, 1] or of a shape that does not broadcast with the state's batch,
                and for what is no state. With a Level both are taken as checked.
        """
        if isinstance(t, Level):
            return t
        if isinstance(t, Tensor):
            check_tensor(name, t)
        if like is not None:
            if state is not None:
                self.check_state(state, like)
            batch = like.shape[: like.dim() - self.event_dim]
            if isinstance(t, Tensor):
                check_broadcast(name, t.shape, batch)
            dtype = at_least_single(like.dtype) if like.is_floating_point() else None
            t = torch.as_tensor(t, dtype=dtype, device=like.device)
        t = torch.as_tensor(t)
        check_times(name, t)
        return self._level_at(t)

    @final
    def levels(
        self, times: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Level:
        """The levels at many times, of shape times + event; those of the last times are kept.

        A model goes along one grid again and again. A process with parameters is evaluated every time, and so
        is any on times that require a gradient; a grid changed in place is another grid.

        Args:
            times: of any shape.
            dtype: of the result, that of the times by default; float32 in place of shorter ones.
            device: of the result, that of the times by default.

        Raises:
            ValueError: for times outside [0, 1], where a check does not cost a wait (on the CPU).
        """
        check_tensor("times", times)
        place = (at_least_single(dtype or times.dtype), device or times.device)
        sources = self._sources(times)
        kept = self._cached("levels")
        if kept is not None and kept[:2] == (sources, place):
            level: Level = kept[2]
            return level
        if times.device.type == "cpu":  # elsewhere a check would cost a wait
            check_times("times", times)
        if times.is_inference() and not torch.is_inference_mode_enabled():
            times = times.clone()  # autograd can save a copy
        times = times.to(dtype=place[0], device=place[1])
        level = self._level_at(times)
        if sources is not None and not torch.is_inference_mode_enabled():
            self._cache("levels", (sources, place, level))
        return level

    @final
    def level_of_clock(self, clock: Tensor) -> Level:
        """The level at a clock of any shape; beyond the process's ends that of the end.

        The inverse of ``level(t).clock``; shape as :meth:`levels`.
        """
        check_tensor("clock", clock)
        return self._scaled(self.schedule.level_of_log_snr(clock))

    @final
    def rates(self, t: Tensor, schedule_rates: Callable[[Rates], Rates] | None = None) -> Rates:
        r"""Levels at times of any shape and their exact derivatives per unit of t, times + event.

        By the chain rule through :meth:`scales`, from the derivatives of the schedule.

        Args:
            t: times.
            schedule_rates: applied to the schedule's own rates before :meth:`scales`, for instance to give
                its parameters another gradient.

        Raises:
            ValueError: for times outside [0, 1], where a check does not cost a wait (on the CPU).
        """
        check_tensor("t", t)
        if t.device.type == "cpu":
            check_times("t", t)
        base, slope = self.schedule.level(t, check=False), self.schedule._slope(t)
        drift = self.schedule._signal_slope(base.log_snr) * slope
        base = base.unsqueeze(self.event_dim)
        slope, drift = (v.reshape(base.t.shape) for v in (slope, drift))
        own = Rates(base, slope, slope, drift)
        if schedule_rates is not None:
            own = schedule_rates(own)
        return rates_through(self.scales, own) if self._scales_differ else own

    def check_grid(self, times: Tensor) -> None:
        """Refuse a grid that is not increasing in time and decreasing in every coordinate's log-SNR.

        Raises:
            ValueError: naming the times or the schedule.
        """
        if not isinstance(times, Tensor):
            raise ValueError(f"times: got {type(times).__name__}, expected a tensor of times")
        sources = self._sources(times)
        if sources is not None and self._cached("checked") == sources:
            return  # the grid of the run before
        # Beside the schedule's own tensors if it has any, else where they are: no wait for a device.
        own = times.to([*self.buffers(), *self.parameters(), times][0].device)
        check_grid(own, self.schedule)
        self._check_grid_levels(own)
        self._cache("checked", sources)

    def _check_grid_levels(self, times: Tensor) -> None:
        """Refuse levels along a grid that the process cannot use."""
        if self._scales_differ:
            check_falling(self._level_at(times), type(self).__name__)

    @property
    def _scales_differ(self) -> bool:
        """Whether the process has scales of its own: what follows from them is then computed, not known."""
        return type(self).scales is not ForwardProcess.scales

    def _level_at(self, t: Tensor) -> Level:
        """The levels at times of any shape, unchecked and not kept."""
        return self._scaled(self.schedule.level(t, check=False))

    def _scaled(self, level: Level) -> Level:
        return self.scales(level.unsqueeze(self.event_dim))

    def _sources(self, times: Tensor) -> Sources | None:
        return self.sources(times, stamps=(self.schedule.stamp,))
