"""Samplers: one class each, with a single step, walked by one loop."""

from pyro_diffusion.samplers.ancestral import DDIM, Ancestral
from pyro_diffusion.samplers.base import Sampler, State, check_sampler, recorder, simulate

__all__ = ["DDIM", "Ancestral", "Sampler", "State", "check_sampler", "recorder", "simulate"]
