"""Columns of a table against each other: data, and samples that should look like them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_diffusion.plotting.canvas import BLUE, ORANGE, Array, as_numpy, hide_spines
from pyro_diffusion.validation import check_positive_int

__all__ = ["pair_plot"]


def pair_plot(
    data: Array,
    samples: Array | None = None,
    names: Sequence[str] | None = None,
    num_points: int = 1000,
    bins: int = 40,
) -> Figure:
    """Draws every pair of columns: data below the diagonal, samples of a model above it.

    A panel above the diagonal has the axes of its mirror image below, exchanged: a model that is right shows
    the same cloud, reflected. On the diagonal are the columns' densities, both on one scale. Ranges are
    those of the data, a little widened; samples outside are cut off in the panels, not in the densities.

    Args:
        data: shape ``(rows, columns)``, at least one of each.
        samples: likewise, of the same columns; without them the upper panels stay empty.
        names: of the columns; their numbers if not given.
        num_points: rows drawn in a panel, the first of those given.
        bins: of a density, over the range of the data.

    Returns:
        The Figure.

    Raises:
        ValueError: for another shape, values that are not finite, or names of another number.
    """
    rows = _table("data", data)
    drawn = None if samples is None else _table("samples", samples)
    columns = rows.shape[1]
    if drawn is not None and drawn.shape[1] != columns:
        raise ValueError(
            f"samples: got {drawn.shape[1]} columns, expected those of data, {columns}"
        )
    labels = [str(j) for j in range(columns)] if names is None else [str(name) for name in names]
    if len(labels) != columns:
        raise ValueError(f"names: got {len(labels)}, expected one for each of {columns} columns")
    check_positive_int("num_points", num_points)
    check_positive_int("bins", bins)
    low, high = rows.min(0), rows.max(0)
    margin = np.where(high > low, 0.05 * (high - low), 0.5)
    low, high = low - margin, high + margin
    side = 1.0 + 1.35 * columns
    figure = Figure(figsize=(side, side), layout="constrained")
    panels = figure.subplots(columns, columns, squeeze=False)
    for (i, j), ax in np.ndenumerate(panels):
        table, colour = (rows, BLUE) if i > j else (drawn, ORANGE)
        if i == j:
            _densities(
                ax, rows[:, i], None if drawn is None else drawn[:, i], low[i], high[i], bins
            )
        elif table is None:
            ax.set_axis_off()
            continue
        else:
            points = table[:num_points]
            size = 90.0 / len(points) ** 0.5
            ax.scatter(points[:, j], points[:, i], s=size, color=colour, alpha=0.4, linewidths=0)
            ax.set_ylim(low[i], high[i])
        ax.set_xlim(low[j], high[j])
        _label(ax, labels, i, j)
    if drawn is not None:
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(),
            loc="outside upper right",
            ncols=2,
            frameon=False,
        )
    return figure


def _table(name: str, values: Array) -> np.ndarray:
    table = as_numpy(values)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"{name}: got shape {table.shape}, expected (rows, columns)")
    if not np.isfinite(table).all():
        raise ValueError(f"{name}: got NaN or infinite values, expected finite ones")
    return table


def _densities(
    ax: Axes, data: np.ndarray, samples: np.ndarray | None, low: float, high: float, bins: int
) -> None:
    edges = np.linspace(low, high, bins + 1)
    for values, colour, name in ((data, BLUE, "data"), (samples, ORANGE, "samples")):
        if values is not None:
            # over all values, so that what lies outside takes its share
            heights = np.histogram(values, edges)[0] / (len(values) * np.diff(edges))
            if name == "data":
                ax.stairs(heights, edges, color=colour, fill=True, alpha=0.4)
            ax.stairs(heights, edges, color=colour, linewidth=1.4, label=name)
    ax.set_ylim(bottom=0)


def _label(ax: Axes, labels: Sequence[str], i: int, j: int) -> None:
    """Names at the left and below, numbers only there."""
    hide_spines(ax)
    ax.tick_params(labelsize=7)
    ax.locator_params(nbins=3)
    if i == j:
        ax.set_yticks([])
    elif j:
        ax.tick_params(labelleft=False)
    if i < len(labels) - 1:
        ax.tick_params(labelbottom=False)
    else:
        ax.set_xlabel(labels[j], fontsize=8)
    if j == 0:
        ax.set_ylabel(labels[i], fontsize=8)
