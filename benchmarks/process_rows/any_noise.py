"""Laplace noise: samplers without noise, and the flow."""

import torch
from pyro.distributions import Laplace

from process_rows import Row
from process_rows._atoms import F64, density, sampled
from pyro_diffusion.processes import AnyNoise
from pyro_diffusion.samplers import AdamsMoulton, Heun
from pyro_diffusion.schedules import LogLinear


def row_any_noise(draws: int) -> Row:
    noise = Laplace(torch.zeros((), dtype=F64), torch.tensor(0.5**0.5, dtype=F64))
    process = AnyNoise(LogLinear(7.0, -16.0), noise)
    samples = sampled(process, {"deterministic": AdamsMoulton(), "Heun": Heun()}, draws)
    # Its kinks, which rows cross, limit the solver's order.
    error = density(AnyNoise(LogLinear(3.0, -18.0), noise), steps=1600)
    return Row("any noise (Laplace)", False, {}, samples, error)
