"""Curves: terms of the bound, schedules, losses."""

from typing import Literal, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_diffusion.plotting.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Array,
    as_numpy,
    finite_or_nan,
    hide_spines,
    new_axes,
)
from pyro_diffusion.validation import check_positive_int

__all__ = ["bound_per_step", "loss_curve", "schedule"]


class LevelsLike(Protocol):
    """Signal and noise scales at some times."""

    @property
    def alpha(self) -> Tensor:
        """Signal scale, times + event."""

    @property
    def sigma(self) -> Tensor:
        """Noise scale, times + event."""

    @property
    def log_snr(self) -> Tensor:
        """Log signal-to-noise ratio in nats, times + event."""


class ScheduleLike(Protocol):
    """What :func:`schedule` needs of a schedule or a forward process."""

    def level(self, t: Tensor) -> LevelsLike:
        """The scales at times in [0, 1]."""


def bound_per_step(
    steps: Array,
    terms: Array,
    standard_error: Array | None = None,
    unit: str = "nats",
    axis: Literal["time", "log_snr"] = "time",
    ax: Axes | None = None,
) -> Axes:
    """Draws what each step of a chain adds to the bound.

    Args:
        steps: time, or log-SNR in nats, of each step, shape ``(K,)``.
        terms: term of each step, shape ``(K,)``.
        standard_error: their standard errors, shape ``(K,)``; drawn as a band of two either side.
        unit: unit of the terms.
        axis: whether ``steps`` are times or log-SNRs.
        ax: where to draw; a new figure if not given.

    Returns:
        The Axes.

    Raises:
        ValueError: if the shapes do not agree, or for another ``axis``.
    """
    labels = {"time": "time t (0: data, 1: noise)", "log_snr": "log-SNR (nats)"}
    if axis not in labels:
        raise ValueError(f"axis: got {axis!r}, expected one of {', '.join(labels)}")
    x, y = as_numpy(steps), as_numpy(terms)
    error = None if standard_error is None else as_numpy(standard_error)
    for name, values in (("steps", x), ("terms", y), ("standard_error", error)):
        if values is not None and (values.ndim != 1 or values.shape != y.shape):
            raise ValueError(f"{name}: got shape {values.shape}, expected {y.shape[:1] or '(K,)'}")
    ax = ax or new_axes((5.5, 3.5))
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.plot(x, y, color=BLUE, linewidth=1.5, marker="o" if len(x) <= 60 else None, markersize=3)
    if error is not None:
        spread = 2 * error[order]
        label = "± 2 standard errors"
        ax.fill_between(x, y - spread, y + spread, color=BLUE, alpha=0.25, linewidth=0, label=label)
        ax.legend(frameon=False)
    ax.set_xlabel(labels[axis])
    ax.set_ylabel(f"term of the bound ({unit})")
    ax.set_title(f"{len(y)} steps, sum {y.sum():.4g} {unit}", fontsize="medium")
    return hide_spines(ax)


def schedule(schedule: ScheduleLike, num_points: int = 201) -> Figure:
    """Draws the signal and noise scales of a schedule or a forward process, and the log-SNR, over time.

    Args:
        schedule: a schedule or a forward process: any object whose ``level(t)`` has ``alpha``, ``sigma`` and
            ``log_snr``. Scales by coordinate give a curve for each coordinate.
        num_points: number of times, evenly spread over [0, 1]. Infinite values are left out, and a
            log-SNR that runs away within a hundredth of an end runs out of the panel.

    Returns:
        The Figure, with two panels.
    """
    device = None
    if isinstance(schedule, torch.nn.Module):
        tensors = [*schedule.parameters(), *schedule.buffers()]
        device = tensors[0].device if tensors else None
    check_positive_int("num_points", num_points, at_least=2)
    t = torch.linspace(0, 1, num_points, dtype=torch.float64, device=device)
    level = schedule.level(t)
    alpha, sigma, log_snr = (
        as_numpy(each.reshape(num_points, -1)) for each in (level.alpha, level.sigma, level.log_snr)
    )
    x = as_numpy(t)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    scales, ratio = figure.subplots(1, 2)
    signal = scales.plot(x, finite_or_nan(alpha), color=BLUE)[0]
    noise = scales.plot(x, finite_or_nan(sigma), color=ORANGE, linestyle="--")[0]
    if np.nanmax(finite_or_nan(sigma)) > 10:  # variance exploding
        scales.set_yscale("log")
    scales.set_ylabel("scale (units of the data)")
    # above the panel: the two curves leave no corner free for every schedule
    labels = ["signal, alpha", "noise, sigma"]
    scales.legend(
        [signal, noise],
        labels,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=2,
    )
    ratio.axhline(0, color=GREY, linewidth=0.8)
    ratio.plot(x, finite_or_nan(log_snr), color=GREEN)
    ratio.set_ylabel("log-SNR (nats)")
    _hide_divergence(ratio, finite_or_nan(log_snr))
    for ax in (scales, ratio):
        ax.set_xlim(0, 1)
        ax.set_xlabel("time t (0: data, 1: noise)")
        hide_spines(ax)
    return figure


def loss_curve(
    losses: Array, smooth: int | None = None, unit: str = "nats", ax: Axes | None = None
) -> Axes:
    """Draws the loss of each training step and its running mean.

    Args:
        losses: shape ``(S,)``. Values that are not finite are left out.
        smooth: number of past steps in a running mean; a fiftieth of all if not given, 1 for none.
        unit: unit of the losses.
        ax: where to draw; a new figure if not given.

    Returns:
        The Axes. Its limits show the bulk of the losses; the very first may lie outside.

    Raises:
        ValueError: if the shape is another, or ``smooth`` is below 1.
    """
    y = as_numpy(losses)
    if y.ndim != 1 or not len(y):
        raise ValueError(f"losses: got shape {y.shape}, expected (S,) with S at least 1")
    smooth = max(1, len(y) // 50) if smooth is None else smooth
    if smooth < 1:
        raise ValueError(f"smooth: got {smooth}, expected at least 1")
    y, x = finite_or_nan(y), np.arange(1, len(y) + 1)
    ax = ax or new_axes((5.5, 3.5))
    if smooth > 1:
        mean = _running_mean(y, smooth)
        label = f"mean of {smooth} steps"
        ax.plot(x, y, color=GREY, alpha=0.5, linewidth=0.6, label="each step")
        ax.plot(x, mean, color=BLUE, linewidth=1.8, label=label)
        ax.legend(frameon=False)
    else:
        ax.plot(x, y, color=BLUE, linewidth=1.2)
    finite = y[np.isfinite(y)]
    if len(finite) >= 50:
        low, high = np.quantile(finite, [0.002, 0.98])
        if high > low:
            ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    ax.set_xlabel("training step")
    ax.set_ylabel(f"loss ({unit})")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    return hide_spines(ax)


def _hide_divergence(ax: Axes, values: np.ndarray) -> None:
    """Limits a panel to what a curve does between its ends, if the ends dwarf it."""
    trim = max(1, len(values) // 100)
    inner, whole = (each[np.isfinite(each)] for each in (values[trim:-trim], values))
    if len(inner) and np.ptp(whole) > 1.5 * np.ptp(inner) > 0:
        margin = 0.1 * np.ptp(inner)
        ax.set_ylim(inner.min() - margin, inner.max() + margin)


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the last ``window``."""
    held = np.isfinite(y)
    total, count = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.nan_to_num(y), held))
    start = np.maximum(np.arange(len(y)) + 1 - window, 0)
    number = count[1:] - count[start]
    return np.divide(
        total[1:] - total[start], number, out=np.full(len(y), np.nan), where=number > 0
    )
