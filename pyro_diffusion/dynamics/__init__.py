"""Drifts and their integration: the SDEs, the probability-flow ODE and the traces its density needs."""

from pyro_diffusion.dynamics.ode_solver import ODESolver
from pyro_diffusion.dynamics.sde import ForwardSDE, ReverseSDE
from pyro_diffusion.dynamics.sde_solver import SDESolver
from pyro_diffusion.dynamics.trace_estimators import (
    ExactTrace,
    Hutchinson,
    HutchPlusPlus,
    TraceEstimator,
)

__all__ = [
    "ExactTrace",
    "ForwardSDE",
    "HutchPlusPlus",
    "Hutchinson",
    "ODESolver",
    "ReverseSDE",
    "SDESolver",
    "TraceEstimator",
]
