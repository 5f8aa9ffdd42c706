"""Forward processes q: how data is destroyed, and the bridges back."""

from pyro_diffusion.processes.base import ForwardProcess, coordinates, draw
from pyro_diffusion.processes.categorical import (
    Absorbing,
    CategoricalCoefficients,
    CategoricalProcess,
    Uniform,
)
from pyro_diffusion.processes.gaussian import GaussianCoefficients, GaussianProcess

__all__ = [
    "Absorbing",
    "CategoricalCoefficients",
    "CategoricalProcess",
    "ForwardProcess",
    "GaussianCoefficients",
    "GaussianProcess",
    "Uniform",
    "coordinates",
    "draw",
]
