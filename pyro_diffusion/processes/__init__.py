"""Forward processes q: how data is destroyed, and the bridges back."""

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.absorbing import Absorbing
from pyro_diffusion.processes.any_noise import AnyNoise
from pyro_diffusion.processes.base import ForwardProcess
from pyro_diffusion.processes.bases import Basis
from pyro_diffusion.processes.categorical import CategoricalProcess, Uniform
from pyro_diffusion.processes.coupled import CoupledGaussian
from pyro_diffusion.processes.degraded import DegradedGaussian
from pyro_diffusion.processes.deletion import Deletion
from pyro_diffusion.processes.gaussian import GaussianProcess
from pyro_diffusion.processes.global_batch import global_batch
from pyro_diffusion.processes.noise import SeededNoise, draw, drawing_from
from pyro_diffusion.processes.spectral import (
    Blurring,
    LearnedSpectralGaussian,
    SpectralGaussian,
)
from pyro_diffusion.processes.student_t import StudentTProcess
from pyro_diffusion.processes.transition_matrices import DiscretizedGaussian, TransitionMatrix
from pyro_diffusion.processes.varying_noise import VaryingNoise

__all__ = [
    "Ability",
    "Absorbing",
    "AnyNoise",
    "Basis",
    "Blurring",
    "CategoricalProcess",
    "CoupledGaussian",
    "DegradedGaussian",
    "Deletion",
    "DiscretizedGaussian",
    "ForwardProcess",
    "GaussianProcess",
    "LearnedSpectralGaussian",
    "SeededNoise",
    "SpectralGaussian",
    "StudentTProcess",
    "TransitionMatrix",
    "Uniform",
    "VaryingNoise",
    "draw",
    "drawing_from",
    "global_batch",
]
