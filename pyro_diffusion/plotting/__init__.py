"""Figures: samples, tables, trajectories, bounds, schedules, losses.

Functions with one panel take an optional ``ax`` and return the Axes (``ax.figure`` is the figure to
save); functions with several panels return a Figure. Figures are made without pyplot, so they need
no display, are never shown, and are freed like any other object.
"""

from pyro_diffusion.plotting.coverage import coverage_curve, null_histogram
from pyro_diffusion.plotting.curves import bound_per_step, loss_curve, schedule
from pyro_diffusion.plotting.images import reverse_trajectory, sample_grid
from pyro_diffusion.plotting.pairs import pair_plot
from pyro_diffusion.plotting.ranks import rank_histogram

__all__ = [
    "bound_per_step",
    "coverage_curve",
    "loss_curve",
    "null_histogram",
    "pair_plot",
    "rank_histogram",
    "reverse_trajectory",
    "sample_grid",
    "schedule",
]
