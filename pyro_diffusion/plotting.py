"""Figures: samples, trajectories, bounds, schedules, losses.

Functions with one panel take an optional ``ax`` and return the Axes (``ax.figure`` is the figure to
save); functions with several panels return a Figure. Figures are made without pyplot, so they need
no display, are never shown, and are freed like any other object.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import binom  # type: ignore[import-untyped]
from torch import Tensor

from pyro_diffusion.validation import check_positive_int, check_tensor

# Okabe and Ito's colours, told apart by colour-blind readers
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8c8c8c"

Array = Tensor | np.ndarray | Sequence[float]


class ScheduleLike(Protocol):
    """What :func:`schedule` needs of a schedule."""

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at times in [0, 1]."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at times in [0, 1]."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Log signal-to-noise ratio at times in [0, 1], in nats."""


def sample_grid(
    images: Tensor | np.ndarray,
    columns: int | None = None,
    low: float | None = None,
    high: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws images side by side, row after row.

    Args:
        images: shape ``(N, H, W)`` or ``(N, C, H, W)``, with C of 1 (grey) or 3 (red, green, blue).
        columns: images in a row; about a square if not given.
        low: value drawn black; the least value found if not given.
        high: value drawn white; the greatest value found if not given.
        ax: where to draw; a new figure if not given.

    Returns:
        The Axes.

    Raises:
        ValueError: if the shape is another or there are no images.
    """
    tiles = _colours(_images("images", images), low, high)
    count = tiles.shape[0]
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    columns = min(check_positive_int("columns", columns), count)
    rows = math.ceil(count / columns)
    blank = np.ones((rows * columns - count, *tiles.shape[1:]))
    tiles = np.concatenate([tiles, blank]).reshape(rows, columns, *tiles.shape[1:])
    ax = ax or _axes(_montage_size(tiles))
    _montage(ax, tiles)
    ax.set_axis_off()
    return ax


def reverse_trajectory(
    states: Tensor | np.ndarray,
    times: Array,
    columns: int = 8,
    rows: int = 6,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Draws how samples emerge from noise, from left (noise) to right (data).

    Args:
        states: states on the way, shape ``(T, N, C, H, W)`` or ``(T, N, H, W)`` for images, one
            sample a row; ``(T, N, 2)`` for points in the plane, one scatter panel a time.
        times: their times in [0, 1], shape ``(T,)``, in either direction.
        columns: times drawn, spread evenly over those given.
        rows: images drawn.
        low: value drawn black; for images, the least value of the states nearest to the data if not
            given.
        high: value drawn white, likewise.

    Returns:
        The Figure.

    Raises:
        ValueError: if the shapes are others or do not agree.
    """
    check_positive_int("columns", columns)
    check_positive_int("rows", rows)
    values, at = _numpy(states), _numpy(times)
    if at.ndim != 1 or not len(at) or values.shape[:1] != at.shape:
        raise ValueError(
            f"times: got shape {at.shape}, expected {values.shape[:1]}, as many as states"
        )
    order = np.argsort(-at, kind="stable")
    chosen = order[
        np.unique(np.linspace(0, len(at) - 1, min(columns, len(at))).round().astype(int))
    ]
    values, at = values[chosen], at[chosen]
    if values.ndim == 3 and values.shape[2] == 2:
        if not np.isfinite(values).all():
            raise ValueError("states: got NaN or infinite points, expected finite ones")
        return _point_panels(values, at)
    if values.ndim not in (4, 5):
        raise ValueError(
            f"states: got shape {values.shape}, expected (T, N, 2), (T, N, H, W) or (T, N, C, H, W)"
        )
    values = values[:, :rows]
    # the range of the data, since noise may be many times wider
    low = float(values[-1].min()) if low is None else low
    high = float(values[-1].max()) if high is None else high
    images = [_colours(_images("states", each), low, high) for each in values]
    tiles = np.stack(images, axis=1)
    width, height = _montage_size(tiles)
    ax = _axes((max(width, 0.55 * len(at), 2.8), height + 0.5))
    _montage(ax, tiles)
    ax.set_xticks([(i + 0.5) / len(at) for i in range(len(at))], [_short(t) for t in at])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("time t (1: noise, 0: data)")
    return _figure(ax)


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
    x, y = _numpy(steps), _numpy(terms)
    error = None if standard_error is None else _numpy(standard_error)
    for name, values in (("steps", x), ("terms", y), ("standard_error", error)):
        if values is not None and (values.ndim != 1 or values.shape != y.shape):
            raise ValueError(f"{name}: got shape {values.shape}, expected {y.shape[:1] or '(K,)'}")
    ax = ax or _axes((5.5, 3.5))
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
    return _clean(ax)


def schedule(schedule: ScheduleLike, points: int = 201) -> Figure:
    """Draws the signal and noise scales of a schedule, and its log-SNR, over time.

    Args:
        schedule: any object with ``alpha(t)``, ``sigma(t)`` and ``log_snr(t)``.
        points: number of times, evenly spread over [0, 1]. Infinite values are left out, and a
            log-SNR that runs away within a hundredth of an end runs out of the panel.

    Returns:
        The Figure, with two panels.
    """
    device = None
    if isinstance(schedule, torch.nn.Module):
        tensors = [*schedule.parameters(), *schedule.buffers()]
        device = tensors[0].device if tensors else None
    check_positive_int("points", points, at_least=2)
    t = torch.linspace(0, 1, points, dtype=torch.float64, device=device)
    alpha, sigma, log_snr = (
        _numpy(torch.as_tensor(each).expand_as(t))
        for each in (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t))
    )
    x = _numpy(t)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    scales, ratio = figure.subplots(1, 2)
    scales.plot(x, _finite(alpha), color=BLUE, label="signal, alpha")
    scales.plot(x, _finite(sigma), color=ORANGE, linestyle="--", label="noise, sigma")
    if np.nanmax(_finite(sigma)) > 10:  # variance exploding
        scales.set_yscale("log")
    scales.set_ylabel("scale (units of the data)")
    # above the panel: the two curves leave no corner free for every schedule
    scales.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    ratio.axhline(0, color=GREY, linewidth=0.8)
    ratio.plot(x, _finite(log_snr), color=GREEN)
    ratio.set_ylabel("log-SNR (nats)")
    _hide_divergence(ratio, _finite(log_snr))
    for ax in (scales, ratio):
        ax.set_xlim(0, 1)
        ax.set_xlabel("time t (0: data, 1: noise)")
        _clean(ax)
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
    y = _numpy(losses)
    if y.ndim != 1 or not len(y):
        raise ValueError(f"losses: got shape {y.shape}, expected (S,) with S at least 1")
    smooth = max(1, len(y) // 50) if smooth is None else smooth
    if smooth < 1:
        raise ValueError(f"smooth: got {smooth}, expected at least 1")
    y, x = _finite(y), np.arange(1, len(y) + 1)
    ax = ax or _axes((5.5, 3.5))
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
    return _clean(ax)


def rank_histogram(
    ranks: Array, draws: int, bins: int = 20, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Draws ranks of true values among posterior draws, which an exact posterior makes uniform.

    The grey band holds every bar of an exact posterior at once with probability ``level`` or more (binomial
    limits, Bonferroni over the bars). Hollows at both ends show a posterior that is too wide, heaps one that
    is too narrow, a slope one that is biased.

    Args:
        ranks: shape ``(simulations,)``, integers in 0 ... ``draws``.
        draws: number of posterior draws that each true value was ranked among.
        bins: number of bars, at most ``draws + 1``.
        level: coverage of the band.
        ax: where to draw; a new figure if not given.

    Returns:
        The Axes.

    Raises:
        ValueError: if there are no ranks, a rank is out of range, or bins are too many.
    """
    values = _numpy(ranks)
    check_positive_int("draws", draws)
    check_positive_int("bins", bins)
    inside = (values >= 0) & (values <= draws)
    if values.ndim != 1 or not len(values) or not inside.all():
        raise ValueError(
            f"ranks: got shape {values.shape}, expected (simulations,) with values in 0 ... {draws}"
        )
    if bins > draws + 1:
        raise ValueError(f"bins: got {bins}, expected 1 to {draws + 1}")
    ax = ax or _axes((4.5, 2.6))
    home = np.arange(draws + 1) * bins // (draws + 1)
    share = np.bincount(home, minlength=bins) / (draws + 1)
    heights = np.bincount(home[values.astype(int)], minlength=bins)
    tail, at = (1 - level) / (2 * bins), np.arange(bins)
    low, high = (binom.ppf(q, len(values), share) for q in (tail, 1 - tail))
    ax.bar(at, high - low, bottom=low, width=1, color=GREY, alpha=0.35, linewidth=0)
    ax.bar(at, heights, width=0.8, color=BLUE, alpha=0.8)
    ax.plot(at, share * len(values), color=ORANGE, linewidth=1)
    ax.set_xticks([-0.5, bins - 0.5], ["0", str(draws)])
    ax.set_xlabel("rank of the true value")
    ax.set_ylabel("simulations")
    return _clean(ax)


def _hide_divergence(ax: Axes, values: np.ndarray) -> None:
    """Limits a panel to what a curve does between its ends, if the ends dwarf it."""
    trim = max(1, len(values) // 100)
    inner, whole = (each[np.isfinite(each)] for each in (values[trim:-trim], values))
    if len(inner) and np.ptp(whole) > 1.5 * np.ptp(inner) > 0:
        margin = 0.1 * np.ptp(inner)
        ax.set_ylim(inner.min() - margin, inner.max() + margin)


def _point_panels(values: np.ndarray, at: np.ndarray) -> Figure:
    count = len(at)
    figure = Figure(figsize=(1.7 * count + 0.6, 2.5), layout="constrained")
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    reach = 1.05 * float(np.quantile(np.abs(values), 0.999, axis=(1, 2)).max())
    size = float(np.clip(4000 / max(values.shape[1], 1), 1, 12))
    for ax, points, t in zip(panels, values, at, strict=True):
        ax.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, alpha=0.5, linewidths=0)
        ax.set_title(f"t = {_short(t)}", fontsize="medium")
        ax.set_aspect("equal")
        ax.set_xlim(-reach, reach)
        ax.set_ylim(-reach, reach)
    panels[0].set_ylabel("second coordinate")
    figure.supxlabel("first coordinate", fontsize="medium")
    return figure


def _numpy(values: Array) -> np.ndarray:
    if isinstance(values, Tensor):
        check_tensor("values", values, boolean=True)
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _images(name: str, images: Tensor | np.ndarray) -> np.ndarray:
    """Images as (N, H, W, C)."""
    values = _numpy(images)
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim != 4 or values.shape[1] not in (1, 3) or 0 in values.shape:
        raise ValueError(
            f"{name}: got shape {tuple(images.shape)}, expected at least one image, "
            "as (N, H, W) or (N, C, H, W) with C of 1 or 3"
        )
    return np.moveaxis(values, 1, -1)


def _colours(images: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Images as red, green and blue in [0, 1]."""
    low = float(images.min()) if low is None else low
    high = float(images.max()) if high is None else high
    scaled = (images - low) / (high - low if high > low else 1)
    return np.broadcast_to(scaled.clip(0, 1), (*images.shape[:-1], 3))


def _montage_size(tiles: np.ndarray) -> tuple[float, float]:
    """Width and height, in inches, of a figure of tiles (rows, columns, H, W, 3)."""
    rows, columns, height, width = tiles.shape[:4]
    inch = min(0.75, 8 / columns)
    return max(1.0, inch * columns), max(1.0, inch * rows * height / width)


def _montage(ax: Axes, tiles: np.ndarray) -> None:
    """Draws tiles with white gaps; the axes run over [0, 1] both ways."""
    rows, columns, height, width = tiles.shape[:4]
    gap = max(1, round(min(height, width) / 8))
    padded = np.pad(tiles, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=1.0)
    sheet = padded.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), 3)
    shape = sheet.shape[0] / sheet.shape[1]
    ax.imshow(sheet, interpolation="nearest", extent=(0, 1, 1, 0), aspect=shape)


def _axes(size: tuple[float, float]) -> Axes:
    return Figure(figsize=size, layout="constrained").subplots()


def _figure(ax: Axes) -> Figure:
    figure = ax.figure
    return figure if isinstance(figure, Figure) else figure.get_figure(root=True)


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the last ``window``."""
    held = np.isfinite(y)
    total, count = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.nan_to_num(y), held))
    start = np.maximum(np.arange(len(y)) + 1 - window, 0)
    number = count[1:] - count[start]
    return np.divide(
        total[1:] - total[start], number, out=np.full(len(y), np.nan), where=number > 0
    )


def _short(t: float) -> str:
    return f"{t:.2f}" if t == 0 or t >= 0.01 else f"{t:.0e}"


def _clean(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
