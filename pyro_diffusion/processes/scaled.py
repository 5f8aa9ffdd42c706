"""What a process knows of signal and noise: its levels, their rates, and checks of grids."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from pyro_diffusion.precision import at_least_single
from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.levels import Rates, check_falling, check_level, rates_through
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.schedules.cached import CachedModule, Sources
from pyro_diffusion.schedules.grids import check_grid
from pyro_diffusion.validation import (
    check_broadcast,
    check_positive_int,
    check_tensor,
    check_times,
    kind_of,
)

__all__ = ["ScaledProcess"]


class ScaledProcess(CachedModule):
    """The part of a forward process that knows its scales: it owns a schedule, and nobody else asks that.

    Base of :class:`~pyro_diffusion.processes.ForwardProcess`.

    Args:
        schedule: signal and noise scales as functions of time.
        event_dim: number of rightmost dimensions that make one datum.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset()

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Scales of a subclass's own may differ by coordinate, unless it says otherwise."""
        super().__init_subclass__(**keywords)
        # Abilities are those of the class that states them, whose scales they are about.
        stated = next(base for base in cls.__mro__ if "abilities" in vars(base))
        if cls.scales is not stated.scales:  # type: ignore[attr-defined]
            cls.abilities = cls.abilities - {Ability.ISOTROPIC}

    def __init__(self, schedule: Schedule, event_dim: int = 1) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"schedule: got {kind_of(schedule)}, expected a Schedule such as Cosine()"
            )
        self.schedule = schedule
        self.event_dim = check_positive_int("event_dim", event_dim, at_least=0)

    def scales(self, level: Level) -> Level:
        r"""The process's level, given its schedule's with singleton dimensions where events are.

        By default the same. Override it for scales of your own: return ``level._replace(log_snr=...,
        alpha=..., sigma=...)`` with tensors that broadcast to times + event, elementwise differentiable
        functions of the level, in its dtype and on its device; ``t`` and ``clock`` stay. The log-SNR must be
        that of the scales, :math:`\log(\alpha^2/\sigma^2)`, and fall with t in every coordinate. Beside a
        schedule that is learned they should depend on the clock alone: by ``t`` the bound would depend on the
        schedule. What they are computed from are attributes, buffers and submodules with a schedule: an
        attribute that is changed in place (a list, a plain tensor) is not noticed.
        """
        return level

    def check_scales(self) -> torch.Size:
        """Refuse scales of a process's own that are no scales; asked where it meets a denoiser or grid.

        Once for what they are computed from; a process with parameters is checked once.

        Returns:
            What the scales broadcast with in an event; of singletons where they are the schedule's.

        Raises:
            ValueError: for scales of another shape or dtype, not finite or negative, that contradict their
                log-SNR, or whose log-SNR does not fall with time.
        """
        if not self._scales_differ:
            return torch.Size([1] * self.event_dim)
        times = self.__dict__.setdefault(
            "_check_times", torch.linspace(0, 1, 33, dtype=torch.float64)
        )
        sources = self._sources(times)
        kept = self._cached("scales")
        if kept is not None and (sources is None or kept[0] == sources):
            event: torch.Size = kept[1]
            return event
        device = next((x.device for x in (*self.buffers(), *self.parameters())), times.device)
        with torch.no_grad():
            for dtype in (torch.float32, torch.float64):
                at = times.to(device=device, dtype=dtype)
                given = self.schedule.level(at, check=False).unsqueeze(self.event_dim)
                level = check_level(self.scales(given), given, type(self).__name__)
                self._check_falling(level)
        event = torch.broadcast_shapes(*(v.shape[1:] for v in level))
        self._cache("scales", (sources, event))
        return event

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; scales are a method of a class, whose abilities they are about.

        Raises:
            ValueError: for ``scales``.
        """
        if name == "scales":
            raise ValueError(
                "scales: got an attribute of one process, expected a subclass's method"
            )
        super().__setattr__(name, value)

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

    @property
    def clock_ends(self) -> tuple[float, float]:
        """The clock at t = 0 and t = 1, decreasing; perhaps infinite."""
        return self.schedule.log_snr_max, self.schedule.log_snr_min

    def finite_clock_ends(self) -> tuple[float, float]:
        """The clock at t = 0 and t = 1.

        Raises:
            ValueError: if one of them is infinite.
        """
        self.check_scales()
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
                and for a ``like`` that is not a state. With a Level both are taken as checked.
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
        drift = self.schedule._drift(t, base.log_snr, slope)
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
        self.check_scales()
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
            self._check_falling(self._level_at(times))

    def _check_falling(self, level: Level) -> None:
        """Refuse levels at increasing times at which less is not left of some coordinate."""
        check_falling(level, type(self).__name__)

    @property
    def _scales_differ(self) -> bool:
        """Whether the process has scales of its own: what follows from them is then computed, not known."""
        return type(self).scales is not ScaledProcess.scales

    def _level_at(self, t: Tensor) -> Level:
        """The levels at times of any shape, unchecked and not kept."""
        return self._scaled(self.schedule.level(t, check=False))

    def _scaled(self, level: Level) -> Level:
        return self.scales(level.unsqueeze(self.event_dim))

    def _sources(self, *times: Tensor) -> Sources | None:
        parts = (module for module in self.modules() if isinstance(module, CachedModule))
        return self.sources(*times, stamps=tuple(module.stamp for module in parts))
