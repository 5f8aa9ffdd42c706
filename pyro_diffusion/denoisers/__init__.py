"""Posteriors p(x_0 | x_t): networks, their parameterizations and their variances."""

from pyro_diffusion.denoisers.analytic import (
    EstimatedVariance,
    analytic_variance,
    residual_variance,
)
from pyro_diffusion.denoisers.base import Denoiser, NetworkDenoiser
from pyro_diffusion.denoisers.composed import ComposedDenoiser, NormalDenoiser
from pyro_diffusion.denoisers.discrete import CategoricalDenoiser, LevelsDenoiser, uniform_levels
from pyro_diffusion.denoisers.exact import MixtureDenoiser, TableDenoiser
from pyro_diffusion.denoisers.fourier import FourierDenoiser
from pyro_diffusion.denoisers.gaussian import GaussianDenoiser
from pyro_diffusion.denoisers.insertions import InsertionDenoiser, StringTableDenoiser
from pyro_diffusion.denoisers.parameterizations import (
    Data,
    EDMPreconditioning,
    Noise,
    Parameterization,
    Score,
    V,
    Velocity,
)
from pyro_diffusion.denoisers.spectral import SpectralDenoiser
from pyro_diffusion.denoisers.variance_denoiser import VarianceDenoiser
from pyro_diffusion.denoisers.variance_heads import NPR, SN
from pyro_diffusion.denoisers.variances import (
    LearnedVariance,
    TimeVariance,
    Variance,
    unit_variance,
)

__all__ = [
    "NPR",
    "SN",
    "CategoricalDenoiser",
    "ComposedDenoiser",
    "Data",
    "Denoiser",
    "EDMPreconditioning",
    "EstimatedVariance",
    "FourierDenoiser",
    "GaussianDenoiser",
    "InsertionDenoiser",
    "LearnedVariance",
    "LevelsDenoiser",
    "MixtureDenoiser",
    "NetworkDenoiser",
    "Noise",
    "NormalDenoiser",
    "Parameterization",
    "Score",
    "SpectralDenoiser",
    "StringTableDenoiser",
    "TableDenoiser",
    "TimeVariance",
    "V",
    "Variance",
    "VarianceDenoiser",
    "Velocity",
    "analytic_variance",
    "residual_variance",
    "uniform_levels",
    "unit_variance",
]
