"""What a schedule is: a log-SNR curve over t in [0, 1] and a rule that splits it into two scales."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.precision import at_least_single
from pyro_diffusion.schedules.cached import CachedModule
from pyro_diffusion.validation import check_tensor, check_times

__all__ = ["Grid", "Level", "Schedule", "table_row"]


class Level(NamedTuple):
    r"""A time, and everything that a formula of the forward process needs there.

    Attributes:
        t: time in [0, 1].
        clock: the log-SNR of the schedule, one number per time: the input of networks.
        log_snr: :math:`\lambda = \log(\alpha^2/\sigma^2)`.
        alpha: signal scale.
        sigma: noise scale.

    A schedule's levels have the shape of the times in all five, and its clock is its log-SNR. The levels of a
    process (:meth:`~pyro_diffusion.processes.scaled.ScaledProcess.levels`) broadcast to times + event: ``t``
    and ``clock`` have singletons for events, the scales singletons or, where noise differs by coordinate,
    the event shape. (Levels of a single time may be plain numbers.) Loops evaluate a whole grid at once and
    index it.
    """

    t: Tensor
    clock: Tensor
    log_snr: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def noise_to_signal(self) -> Tensor:
        r""":math:`\sigma/\alpha`, the standard deviation of the noise on the scale of the data."""
        return self.sigma / self.alpha

    @property
    def tweedie(self) -> Tensor:
        r""":math:`\sigma^2/\alpha`: a gradient in x_t of a log-density times this is a shift of the data.

        Tweedie's formula under Gaussian noise, :math:`\hat x_0 = x_t/\alpha + (\sigma^2/\alpha)
        \nabla\log q(x_t)`.
        """
        return self.sigma.square() / self.alpha

    def map(self, function: Callable[[Tensor], Tensor]) -> "Level":
        """The level whose tensors are those of ``function``."""
        log_snr = function(self.log_snr)
        clock = log_snr if self.clock is self.log_snr else function(self.clock)
        return Level(function(self.t), clock, log_snr, function(self.alpha), function(self.sigma))

    def at(self, index: int | slice | Tensor) -> "Level":
        """The same level at an index of its leading dimension."""
        return self.map(lambda x: x[index])

    def unsqueeze(self, event_dim: int) -> "Level":
        """Append ``event_dim`` singleton dimensions, so that times of batch shape meet events.

        A single time stays a number, which broadcasts with everything.
        """
        if self.t.dim() == 0 or event_dim == 0:
            return self
        return self.map(lambda x: x.reshape(x.shape + (1,) * event_dim))

    def tabulate(self, function: Callable[["Level"], Any]) -> Any:
        """``function(self)``, a tuple of tensors; a row of a grid computes it once for all rows."""
        return function(self)


class Grid(Level):
    """The levels of many steps, one after another. Its rows are levels that share their tables."""

    def row(self, index: int) -> "Row":
        """The level of one step."""
        row = Row(*self.at(index))
        row.grid, row.place = self, index
        return row

    def table(self, function: Callable[[Level], Any]) -> Any:
        """``function`` of all levels at once, computed when first asked for."""
        tables = self.__dict__.setdefault("_tables", {})
        if function not in tables:
            tables[function] = function(self)
        return tables[function]


class Row(Level):
    """A level of a grid."""

    grid: Grid
    place: int

    def tabulate(self, function: Callable[[Level], Any]) -> Any:
        """This step's row of the grid's table."""
        return table_row(self.grid.table(function), self.place)


def table_row(table: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """One row of a (named) tuple of tensors, or of such tuples."""
    parts = (table_row(v, index) if isinstance(v, tuple) else v[index] for v in table)
    row: tuple[Any, ...] = table._make(parts) if hasattr(table, "_make") else tuple(parts)
    return row


class Schedule(CachedModule):
    r"""Signal and noise scales :math:`\alpha(t), \sigma(t)` over t in [0, 1] (0 = data, 1 = noise).

    A schedule is two independent choices. The *curve* :math:`\lambda(t) = \log(\alpha^2/\sigma^2)` is
    strictly decreasing; the *scaling* splits a log-SNR into :math:`\alpha(\lambda)` and
    :math:`\sigma(\lambda)`. The SDE :math:`dx = f(t) x\,dt + g(t)\,dw` with the same marginals follows from
    both,

    .. math::
        f = \frac{d\log\alpha}{d\lambda}\,\lambda'(t), \qquad g^2 = -\sigma^2\,\lambda'(t).

    The curve is given on a time u of its own and may reach infinity at its ends. ``log_snr_max`` and
    ``log_snr_min`` cut it there: t in [0, 1] is stretched over the part of the curve between them. Gaussian
    models refuse ends that their dtype cannot hold: in float32 a log-SNR above 26, where the noise is lost
    in the rounding of data of unit scale, or below -80.

    Args:
        log_snr_max: log-SNR at t = 0.
        log_snr_min: log-SNR at t = 1.

    Raises:
        ValueError: if the two ends are not finite (where the curve cannot reach infinity) or not in
            decreasing order.

    **Implementing a schedule.** A subclass gives the curve, ``_curve(u)``, and its inverse,
    ``_inverse_curve(log_snr)``; optionally ``_curve_slope(u)``, the derivative of the curve (by automatic
    differentiation otherwise). It takes its scaling from
    :class:`~pyro_diffusion.schedules.VariancePreserving` or gives another by three functions of the log-SNR:
    ``_signal`` is :math:`\alpha`, ``_noise`` is :math:`\sigma`, ``_signal_slope`` is
    :math:`d\log\alpha/d\lambda`. All take and return tensors of any shape. A curve that reaches infinity sets
    ``reaches_infinity = True`` to allow infinite ends.

    Example:
        A curve that is flat around log-SNR 0 and steep at both ends, :math:`\lambda(u) = -\sinh u`.

        >>> from pyro_diffusion.schedules import VariancePreserving
        >>> class Sinh(VariancePreserving):
        ...     def _curve(self, u):
        ...         return -torch.sinh(u)
        ...     def _inverse_curve(self, log_snr):
        ...         return -torch.asinh(log_snr)
        >>> schedule = Sinh(log_snr_max=10.0, log_snr_min=-10.0)
        >>> [round(float(v), 3) for v in schedule.log_snr(torch.tensor([0.0, 0.25, 0.75, 1.0]))]
        [10.0, 2.127, -2.127, -10.0]

    References:
        Kingma et al., Variational Diffusion Models, arXiv 2107.00630.
        Song et al., Score-based generative modeling through SDEs, arXiv 2011.13456.
    """

    reaches_infinity = False

    def __init__(self, log_snr_max: float, log_snr_min: float) -> None:
        super().__init__()
        finite = math.isfinite(log_snr_max) and math.isfinite(log_snr_min)
        if not (finite or self.reaches_infinity):
            raise ValueError(
                f"log_snr_max, log_snr_min: got {log_snr_max}, {log_snr_min}, expected finite ends "
                f"for {type(self).__name__}"
            )
        if not log_snr_max > log_snr_min:
            raise ValueError(
                f"log_snr_max, log_snr_min: got {log_snr_max}, {log_snr_min}, expected a decreasing "
                "log-SNR: log_snr_max > log_snr_min"
            )
        self.log_snr_max, self.log_snr_min = float(log_snr_max), float(log_snr_min)
        ends = torch.tensor([log_snr_max, log_snr_min], dtype=torch.float64)
        self._start, self._stop = (float(u) for u in self._inverse_curve(ends))

    # The curve, on a time u of its own.
    def _curve(self, u: Tensor) -> Tensor:
        """Log-SNR at u."""
        raise NotImplementedError

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        """The u at which the curve has a log-SNR."""
        raise NotImplementedError

    def _curve_slope(self, u: Tensor) -> Tensor:
        """Derivative of the curve, any shape."""
        with torch.enable_grad():
            u = u if u.requires_grad else u.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._curve(u).sum(), u, create_graph=True)
        return slope

    # The scaling.
    def _signal(self, log_snr: Tensor) -> Tensor:
        """Signal scale alpha."""
        raise NotImplementedError

    def _noise(self, log_snr: Tensor) -> Tensor:
        """Noise scale sigma, alpha exp(-log-SNR / 2)."""
        raise NotImplementedError

    def _signal_slope(self, log_snr: Tensor) -> Tensor:
        """d log alpha / d log-SNR."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        r"""Log signal-to-noise ratio :math:`\lambda(t)`, any shape.

        This and the other curves below are checked: they raise ``ValueError`` for times outside [0, 1].
        """
        return self._log_snr(inside(t))

    def _log_snr(self, t: Tensor) -> Tensor:
        return self._curve(self._start + (self._stop - self._start) * t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        r"""The time t with :math:`\lambda(t)` = ``log_snr``, the inverse of :meth:`log_snr`."""
        check_tensor("log_snr", log_snr)
        u = self._inverse_curve(log_snr)
        return ((u - self._start) / (self._stop - self._start)).clamp(0, 1)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at t."""
        return self._signal(self.log_snr(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at t."""
        return self._noise(self.log_snr(t))

    def log_snr_slope(self, t: Tensor) -> Tensor:
        r"""Derivative :math:`\lambda'(t)`, exact."""
        return self._slope(inside(t))

    def _slope(self, t: Tensor) -> Tensor:
        width = self._stop - self._start
        return width * self._curve_slope(self._start + width * t)

    def f(self, t: Tensor) -> Tensor:
        """Drift coefficient of the forward SDE, per unit of t."""
        return self._f(inside(t))

    def g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient of the forward SDE, per unit of t."""
        return self._g2(inside(t))

    # The same without a check of the times, for loops.
    def _f(self, t: Tensor) -> Tensor:
        return self._drift(t, self._log_snr(t), self._slope(t))

    def _drift(self, t: Tensor, log_snr: Tensor, slope: Tensor) -> Tensor:
        """d log alpha / dt, given the log-SNR at t and its slope."""
        return self._signal_slope(log_snr) * slope

    def _g2(self, t: Tensor) -> Tensor:
        return -self._noise(self._log_snr(t)).square() * self._slope(t)

    def level(self, t: Tensor | float, check: bool = True) -> Level:
        """Time, log-SNR, alpha and sigma together.

        Args:
            t: times of any shape; those in less than float32 are raised to it.
            check: whether to check the values (a host round trip on GPU).

        Raises:
            ValueError: for times outside [0, 1].
        """
        t = torch.as_tensor(t)
        t = t.to(at_least_single(t.dtype if t.is_floating_point() else torch.get_default_dtype()))
        if check:
            check_times("t", t)
        log_snr = self._log_snr(t)
        return self._level_of(t, log_snr)

    def level_of_log_snr(self, log_snr: Tensor) -> Level:
        """The level at a log-SNR, or at the schedule's end where it lies beyond, any shape."""
        check_tensor("log_snr", log_snr)
        log_snr = log_snr.clamp(self.log_snr_min, self.log_snr_max)
        return self._level_of(self.time_of_log_snr(log_snr), log_snr)

    def _level_of(self, t: Tensor, log_snr: Tensor) -> Level:
        return Level(t, log_snr, log_snr, self._signal(log_snr), self._noise(log_snr))

    def extra_repr(self) -> str:
        """Ends of the curve, for ``repr``."""
        return f"log_snr_max={self.log_snr_max:g}, log_snr_min={self.log_snr_min:g}"


class TwoEndedSchedule(Schedule):
    """A curve on u in (0, 1) that is steep at both ends, written in u and its rest v = 1 - u.

    Each of the two is computed for itself: near u = 1 the difference would have few digits left, or none.
    A subclass gives the curve in both, its slope, and ``_inverse_rest``, the v of a log-SNR.
    """

    def __init__(self, log_snr_max: float, log_snr_min: float) -> None:
        super().__init__(log_snr_max, log_snr_min)
        self._rest = float(self._inverse_rest(torch.tensor(log_snr_min, dtype=torch.float64)))

    def _curve_of(self, u: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _slope_of(self, u: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _inverse_rest(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def _width(self) -> float:
        return 1 - self._rest - self._start

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """u and v at a time."""
        return self._start + self._width * t, self._rest + self._width * (1 - t)

    def _log_snr(self, t: Tensor) -> Tensor:
        r"""Log signal-to-noise ratio :math:`\lambda(t)`, any shape."""
        return self._curve_of(*self._place(t))

    def _slope(self, t: Tensor) -> Tensor:
        r"""Derivative :math:`\lambda'(t)`, exact."""
        return self._width * self._slope_of(*self._place(t))


def inside(t: Tensor) -> Tensor:
    """Times, if they are real numbers in [0, 1]."""
    check_times("t", t)
    return t


def log_expm1(x: Tensor) -> Tensor:
    """log(exp(x) - 1) for x > 0 without overflow."""
    return x + torch.log(-torch.expm1(-x))
