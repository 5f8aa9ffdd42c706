"""Forward processes q: how data is destroyed, and the bridges back."""

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.base import ForwardProcess
from pyro_diffusion.processes.categorical import Absorbing, CategoricalProcess, Uniform
from pyro_diffusion.processes.gaussian import GaussianProcess
from pyro_diffusion.processes.noise import SeededNoise, draw, drawing_from

__all__ = [
    "Ability",
    "Absorbing",
    "CategoricalProcess",
    "ForwardProcess",
    "GaussianProcess",
    "SeededNoise",
    "Uniform",
    "draw",
    "drawing_from",
]
