"""Expected coverage, and what a permutation test found."""

import numpy as np
import torch
from matplotlib.axes import Axes

from pyro_diffusion.plotting.canvas import (
    BLUE,
    GREY,
    ORANGE,
    Array,
    as_numpy,
    hide_spines,
    new_axes,
)
from pyro_diffusion.validation import check_finite, check_number, check_positive_int

__all__ = ["coverage_curve", "null_histogram"]


def coverage_curve(
    ranks: Array, num_samples: int, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Draws the share of true values inside the regions of each credibility: a diagonal if all is right.

    The ranks are those of distances (:func:`~pyro_diffusion.evaluate.tarp`): the credibility at which a true
    value is just reached. The grey band holds the whole curve of an exact posterior with probability
    ``level``. Above the diagonal at high credibility the posterior is too wide, below it too narrow.

    Args:
        ranks: shape ``(simulations,)``, integers in 0 ... ``num_samples``.
        num_samples: number of posterior draws that each true value was ranked among.
        level: simultaneous coverage of the band.
        ax: where to draw; a new figure if not given.

    Returns:
        The Axes.

    Raises:
        ValueError: if there are no ranks or one is out of range, or for a level outside (0, 1).
    """
    # ArviZ comes with it, and takes seconds that other figures need not wait for
    from pyro_diffusion.evaluate.calibration import RankStatistics

    values = as_numpy(ranks)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        raise ValueError("ranks: got values that are not whole, expected integers")
    table = RankStatistics({"ranks": torch.as_tensor(values).long()}, num_samples)
    low, high = (as_numpy(limit) for limit in table.envelope(level))
    ax = ax or new_axes((3.6, 3.4))
    at = np.arange(1, num_samples + 1) / (num_samples + 1)
    ax.fill_between(at, low, high, color=GREY, alpha=0.35, linewidth=0)
    ax.plot([0, 1], [0, 1], color=ORANGE, linewidth=1)
    ax.plot(at, as_numpy(table.ecdf("ranks")), color=BLUE, drawstyle="steps-post")
    ax.set_xlabel("credibility")
    ax.set_ylabel("expected coverage")
    ax.set_aspect("equal")
    return hide_spines(ax)


def null_histogram(statistic: float, null: Array, bins: int = 20, ax: Axes | None = None) -> Axes:
    """Draws a test's statistic beside those that chance gives (:func:`~pyro_diffusion.evaluate.local_c2st`).

    Args:
        statistic: of the test.
        null: statistics of permuted labels, a vector.
        bins: number of bars.
        ax: where to draw; a new figure if not given.

    Returns:
        The Axes.

    Raises:
        ValueError: for values that are not finite, or none.
    """
    check_number("statistic", statistic)
    check_positive_int("bins", bins)
    values = as_numpy(null)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"null: got shape {values.shape}, expected a vector")
    check_finite("null", torch.as_tensor(values))
    ax = ax or new_axes((4.5, 2.6))
    ax.hist(values, bins=bins, color=GREY, alpha=0.6, label="by chance")
    ax.axvline(statistic, color=BLUE, label="observed")
    ax.set_xlabel("statistic")
    ax.set_ylabel("permutations")
    ax.legend(frameon=False)
    return hide_spines(ax)
