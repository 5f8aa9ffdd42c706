"""What several test files of samplers share: one table of them, and normal data."""

import torch

from pyro_diffusion.denoisers import (
    Data,
    EDMPreconditioning,
    MixtureDenoiser,
    Noise,
    V,
    Velocity,
)
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    Ancestral,
    DPMSolverPP,
    Heun,
    UniPC,
)
from pyro_diffusion.schedules import uniform_log_snr

F64 = torch.float64
READINGS = {
    "data": Data(),
    "noise": Noise(),
    "v": V(),
    "line": Velocity(),
    "s": EDMPreconditioning(0.7),
}
DETERMINISTIC = [
    DDIM(),
    *(AdamsBashforth(order) for order in (1, 2, 3, 4)),
    *(AdamsBashforth(3, extrapolate=reading) for reading in READINGS.values()),
    *(AdamsMoulton(order) for order in (2, 3, 4)),
    *(AdamsMoulton(4, extrapolate=reading) for reading in READINGS.values()),
    DPMSolverPP(),
    *(UniPC(p) for p in (1, 2, 3)),
    Heun(),
]
STOCHASTIC = [
    Ancestral(),
    *(DDIM(eta) for eta in (0.5, 1.0)),
    *(AdamsBashforth(order, eta) for order in (1, 2, 3) for eta in (0.5, 1.0)),
    AdamsMoulton(4, 1.0),
    AdamsMoulton(2, 0.5, Data()),
    DPMSolverPP(1.0),
    DPMSolverPP(0.5),
    Heun(churn=4.0),
]


def grid(schedule, steps):
    return uniform_log_snr(schedule, steps, F64)


def normal_data(schedule, mean=0.6, variance=0.3):
    """One normal component in one dimension, its posterior a point mass at the exact mean."""
    return MixtureDenoiser(
        GaussianProcess(schedule),
        torch.ones(1, dtype=F64),
        torch.full((1, 1), mean, dtype=F64),
        variance,
        point_mass=True,
    )


def start(denoiser, *batch):
    return denoiser.marginal(torch.ones((), dtype=F64)).sample(batch)
