"""Signal and noise scales over time, and the grids a chain walks on."""

from pyro_diffusion.schedules.base import Level, Schedule
from pyro_diffusion.schedules.grids import (
    check_grid,
    karras,
    quadratic,
    uniform,
    uniform_log_snr,
)
from pyro_diffusion.schedules.rectified import Rectified
from pyro_diffusion.schedules.variance_exploding import EDM, VarianceExploding
from pyro_diffusion.schedules.variance_preserving import (
    Cosine,
    LinearBeta,
    LogLinear,
    TabulatedBetas,
    VariancePreserving,
)

__all__ = [
    "EDM",
    "Cosine",
    "Level",
    "LinearBeta",
    "LogLinear",
    "Rectified",
    "Schedule",
    "TabulatedBetas",
    "VarianceExploding",
    "VariancePreserving",
    "check_grid",
    "karras",
    "quadratic",
    "uniform",
    "uniform_log_snr",
]
