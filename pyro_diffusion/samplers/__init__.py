"""Samplers: one class each, with a single step, walked by one loop."""

from pyro_diffusion.samplers.ancestral import DDIM, Ancestral
from pyro_diffusion.samplers.base import Sampler, State, check_sampler, recorder, simulate
from pyro_diffusion.samplers.heun import Heun, HeunCoefficients
from pyro_diffusion.samplers.langevin import (
    AnnealedLangevin,
    Langevin,
    PredictorCorrector,
    PredictorCorrectorCoefficients,
)
from pyro_diffusion.samplers.multistep import (
    AdamsBashforth,
    AdamsMoulton,
    DPMSolverPP,
    MultistepCoefficients,
    UniPC,
)
from pyro_diffusion.samplers.repaint import RePaint

__all__ = [
    "DDIM",
    "AdamsBashforth",
    "AdamsMoulton",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolverPP",
    "Heun",
    "HeunCoefficients",
    "Langevin",
    "MultistepCoefficients",
    "PredictorCorrector",
    "PredictorCorrectorCoefficients",
    "RePaint",
    "Sampler",
    "State",
    "UniPC",
    "check_sampler",
    "recorder",
    "simulate",
]
