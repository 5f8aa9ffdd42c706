"""Signal and noise scales over time, and the time grids of a chain."""

from pyro_diffusion.schedules.base import Grid, Level, Row, Schedule, table_row
from pyro_diffusion.schedules.focused_grid import focused_log_snr
from pyro_diffusion.schedules.grids import (
    check_grid,
    karras,
    quadratic,
    uniform,
    uniform_log_snr,
)
from pyro_diffusion.schedules.learned import LearnedSchedule
from pyro_diffusion.schedules.linear_beta import LinearBeta, SubVP
from pyro_diffusion.schedules.optimal_grid import optimal_grid, optimal_grids, step_costs
from pyro_diffusion.schedules.rectified import Rectified
from pyro_diffusion.schedules.variance_exploding import EDM, VarianceExploding
from pyro_diffusion.schedules.variance_preserving import (
    Cosine,
    LogLinear,
    TabulatedBetas,
    VariancePreserving,
)

__all__ = [
    "EDM",
    "Cosine",
    "Grid",
    "LearnedSchedule",
    "Level",
    "LinearBeta",
    "LogLinear",
    "Rectified",
    "Row",
    "Schedule",
    "SubVP",
    "TabulatedBetas",
    "VarianceExploding",
    "VariancePreserving",
    "check_grid",
    "focused_log_snr",
    "karras",
    "optimal_grid",
    "optimal_grids",
    "quadratic",
    "step_costs",
    "table_row",
    "uniform",
    "uniform_log_snr",
]
