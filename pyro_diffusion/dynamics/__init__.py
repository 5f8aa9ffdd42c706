"""Drifts and their integration: the SDEs, the probability-flow ODE and the traces its density needs."""

from pyro_diffusion.dynamics.brownian import IndependentIncrements, brownian_interval
from pyro_diffusion.dynamics.ode import Solver, transport
from pyro_diffusion.dynamics.sde import ForwardSDE, KnownData, ReverseSDE
from pyro_diffusion.dynamics.sde_solver import SDESolver
from pyro_diffusion.dynamics.trace import ExactTrace, Hutchinson, HutchPlusPlus, Trace

__all__ = [
    "ExactTrace",
    "ForwardSDE",
    "HutchPlusPlus",
    "Hutchinson",
    "IndependentIncrements",
    "KnownData",
    "ReverseSDE",
    "SDESolver",
    "Solver",
    "Trace",
    "brownian_interval",
    "transport",
]
