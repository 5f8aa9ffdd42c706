"""Drifts and their integration: the SDEs, the probability-flow ODE and the traces its density needs."""

from pyro_diffusion.dynamics.attention import twice_differentiable_attention
from pyro_diffusion.dynamics.brownian import IndependentIncrements, brownian_interval
from pyro_diffusion.dynamics.ode import Passage, Solver, end_angles, level_at, transport
from pyro_diffusion.dynamics.sde import (
    ForwardSDE,
    GaussianSDE,
    KnownData,
    Node,
    ReverseSDE,
    check_eta,
)
from pyro_diffusion.dynamics.sde_solver import METHODS, Method, SDESolver
from pyro_diffusion.dynamics.trace import (
    ExactTrace,
    Hutchinson,
    HutchPlusPlus,
    Trace,
    check_trace,
    gaussian,
    rademacher,
    sphere,
)

__all__ = [
    "METHODS",
    "ExactTrace",
    "ForwardSDE",
    "GaussianSDE",
    "HutchPlusPlus",
    "Hutchinson",
    "IndependentIncrements",
    "KnownData",
    "Method",
    "Node",
    "Passage",
    "ReverseSDE",
    "SDESolver",
    "Solver",
    "Trace",
    "brownian_interval",
    "check_eta",
    "check_trace",
    "end_angles",
    "gaussian",
    "level_at",
    "rademacher",
    "sphere",
    "transport",
    "twice_differentiable_attention",
]
