"""Pictures of samples, and of how they emerge from noise."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_diffusion.plotting.canvas import BLUE, Array, as_numpy, new_axes, short, whole_figure
from pyro_diffusion.validation import check_positive_int

__all__ = ["reverse_trajectory", "sample_grid"]


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
    ax = ax or new_axes(_montage_size(tiles))
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
    values, at = as_numpy(states), as_numpy(times)
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
    ax = new_axes((max(width, 0.55 * len(at), 2.8), height + 0.5))
    _montage(ax, tiles)
    ax.set_xticks([(i + 0.5) / len(at) for i in range(len(at))], [short(t) for t in at])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("time t (1: noise, 0: data)")
    return whole_figure(ax)


def _point_panels(values: np.ndarray, at: np.ndarray) -> Figure:
    count = len(at)
    figure = Figure(figsize=(1.7 * count + 0.6, 2.5), layout="constrained")
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    reach = 1.05 * float(np.quantile(np.abs(values), 0.999, axis=(1, 2)).max())
    size = float(np.clip(4000 / max(values.shape[1], 1), 1, 12))
    for ax, points, t in zip(panels, values, at, strict=True):
        ax.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, alpha=0.5, linewidths=0)
        ax.set_title(f"t = {short(t)}", fontsize="medium")
        ax.set_aspect("equal")
        ax.set_xlim(-reach, reach)
        ax.set_ylim(-reach, reach)
    panels[0].set_ylabel("second coordinate")
    figure.supxlabel("first coordinate", fontsize="medium")
    return figure


def _images(name: str, images: Tensor | np.ndarray) -> np.ndarray:
    """Images as (N, H, W, C)."""
    values = as_numpy(images)
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
