"""Posteriors p(x_0 | x_t): networks, their parameterizations and their variances."""

from pyro_diffusion.denoisers.base import Denoiser, NetworkDenoiser
from pyro_diffusion.denoisers.discrete import (
    CategoricalDenoiser,
    LevelsDenoiser,
    Quantized,
    uniform_levels,
)
from pyro_diffusion.denoisers.exact import MixtureDenoiser, TableDenoiser
from pyro_diffusion.denoisers.gaussian import GaussianDenoiser
from pyro_diffusion.denoisers.parameterizations import (
    Coefficients,
    Data,
    EDMPreconditioning,
    Noise,
    Parameterization,
    Score,
    V,
    Velocity,
)
from pyro_diffusion.denoisers.variances import (
    LearnedVariance,
    TimeVariance,
    Variance,
    unit_variance,
)

__all__ = [
    "CategoricalDenoiser",
    "Coefficients",
    "Data",
    "Denoiser",
    "EDMPreconditioning",
    "GaussianDenoiser",
    "LearnedVariance",
    "LevelsDenoiser",
    "MixtureDenoiser",
    "NetworkDenoiser",
    "Noise",
    "Parameterization",
    "Quantized",
    "Score",
    "TableDenoiser",
    "TimeVariance",
    "V",
    "Variance",
    "Velocity",
    "uniform_levels",
    "unit_variance",
]
