"""Forward processes q: how data is destroyed, and the bridges back."""

from pyro_diffusion.processes.base import ForwardProcess, coordinates
from pyro_diffusion.processes.categorical import (
    Absorbing,
    CategoricalCoefficients,
    CategoricalProcess,
    Uniform,
)
from pyro_diffusion.processes.gaussian import GaussianCoefficients, GaussianProcess
from pyro_diffusion.processes.noise import (
    NoiseSource,
    RowNoise,
    SeededNoise,
    draw,
    drawing_from,
    fresh_seed,
)

__all__ = [
    "Absorbing",
    "CategoricalCoefficients",
    "CategoricalProcess",
    "ForwardProcess",
    "GaussianCoefficients",
    "GaussianProcess",
    "NoiseSource",
    "RowNoise",
    "SeededNoise",
    "Uniform",
    "coordinates",
    "draw",
    "drawing_from",
    "fresh_seed",
]
