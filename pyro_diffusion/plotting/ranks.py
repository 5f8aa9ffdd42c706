"""Ranks of simulation-based calibration."""

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import binom  # type: ignore[import-untyped]

from pyro_diffusion.plotting.canvas import (
    BLUE,
    GREY,
    ORANGE,
    Array,
    as_numpy,
    hide_spines,
    new_axes,
)
from pyro_diffusion.validation import check_positive_int

__all__ = ["rank_histogram"]


def rank_histogram(
    ranks: Array, num_samples: int, bins: int = 20, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Draws ranks of true values among posterior draws, which an exact posterior makes uniform.

    The grey band holds every bar of an exact posterior at once with probability ``level`` or more (binomial
    limits, Bonferroni over the bars). Hollows at both ends show a posterior that is too wide, heaps one that
    is too narrow, a slope one that is biased.

    Args:
        ranks: shape ``(simulations,)``, integers in 0 ... ``num_samples``.
        num_samples: number of posterior draws that each true value was ranked among.
        bins: number of bars, at most ``num_samples + 1``.
        level: coverage of the band.
        ax: where to draw; a new figure if not given.

    Returns:
        The Axes.

    Raises:
        ValueError: if there are no ranks, a rank is out of range, or bins are too many.
    """
    values = as_numpy(ranks)
    check_positive_int("num_samples", num_samples)
    check_positive_int("bins", bins)
    inside = (values >= 0) & (values <= num_samples)
    if values.ndim != 1 or not len(values) or not inside.all():
        raise ValueError(
            f"ranks: got shape {values.shape}, expected (simulations,) with values in 0 ... {num_samples}"
        )
    if bins > num_samples + 1:
        raise ValueError(f"bins: got {bins}, expected 1 to {num_samples + 1}")
    ax = ax or new_axes((4.5, 2.6))
    bar = np.arange(num_samples + 1) * bins // (num_samples + 1)
    share = np.bincount(bar, minlength=bins) / (num_samples + 1)
    heights = np.bincount(bar[values.astype(int)], minlength=bins)
    tail, at = (1 - level) / (2 * bins), np.arange(bins)
    low, high = (binom.ppf(q, len(values), share) for q in (tail, 1 - tail))
    ax.bar(at, high - low, bottom=low, width=1, color=GREY, alpha=0.35, linewidth=0)
    ax.bar(at, heights, width=0.8, color=BLUE, alpha=0.8)
    ax.plot(at, share * len(values), color=ORANGE, linewidth=1)
    ax.set_xticks([-0.5, bins - 0.5], ["0", str(num_samples)])
    ax.set_xlabel("rank of the true value")
    ax.set_ylabel("simulations")
    return hide_spines(ax)
