"""Signal and noise scales over time, and the time grids of a chain."""

from pyro_diffusion.schedules.base import Level, Schedule
from pyro_diffusion.schedules.focused_grid import focused_log_snr
from pyro_diffusion.schedules.grids import karras, quadratic, uniform, uniform_log_snr
from pyro_diffusion.schedules.learned import LearnedSchedule
from pyro_diffusion.schedules.linear_beta import LinearBeta, SubVP
from pyro_diffusion.schedules.optimal_grid import optimal_grid
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
    "LearnedSchedule",
    "Level",
    "LinearBeta",
    "LogLinear",
    "Rectified",
    "Schedule",
    "SubVP",
    "TabulatedBetas",
    "VarianceExploding",
    "VariancePreserving",
    "focused_log_snr",
    "karras",
    "optimal_grid",
    "quadratic",
    "uniform",
    "uniform_log_snr",
]
