"""Samplers: one class each, with a single step, taken by one loop."""

from pyro_diffusion.samplers.ancestral import DDIM, Ancestral
from pyro_diffusion.samplers.base import Sampler, State, simulate
from pyro_diffusion.samplers.daps import DAPS
from pyro_diffusion.samplers.discrete import FirstHitting, Remasking
from pyro_diffusion.samplers.heun import Heun
from pyro_diffusion.samplers.langevin import AnnealedLangevin, Langevin, PredictorCorrector
from pyro_diffusion.samplers.multistep import AdamsBashforth, AdamsMoulton, DPMSolverPP, UniPC
from pyro_diffusion.samplers.repaint import RePaint

__all__ = [
    "DAPS",
    "DDIM",
    "AdamsBashforth",
    "AdamsMoulton",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolverPP",
    "FirstHitting",
    "Heun",
    "Langevin",
    "PredictorCorrector",
    "RePaint",
    "Remasking",
    "Sampler",
    "State",
    "UniPC",
    "simulate",
]
