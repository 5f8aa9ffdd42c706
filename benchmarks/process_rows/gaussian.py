"""Isotropic noise, and the identity as a basis."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from process_rows import Row
from process_rows._rotated import exact, mixture, rotated_row
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.processes import Basis, GaussianProcess, SpectralGaussian
from pyro_diffusion.samplers import AdamsMoulton, Ancestral
from pyro_diffusion.schedules import LogLinear


def row_gaussian(draws: int) -> Row:
    schedule = LogLinear(12.0, -12.0)
    process = GaussianProcess(schedule)
    row = rotated_row("GaussianProcess", process, draws)
    other = SpectralGaussian(schedule, Basis.identity((2,)))
    x = mixture().sample((200,))
    for what, first in numbers(process, x).items():
        difference = (first - numbers(other, x)[what]).abs().max()
        row.claims[f"identity as a basis: {what}"] = (float(difference), 1e-10)
    return row


def numbers(process: GaussianProcess, x: Tensor) -> dict[str, Tensor]:
    """What two processes that are the same agree on, in float64."""
    denoiser = exact(process)
    chain = Diffusion(denoiser, (2,), 50)
    flow = ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4", steps=50))

    def drawn(view: TorchDistribution) -> Tensor:
        torch.manual_seed(1)
        return view.sample((200,))

    return {
        "bounds": log_likelihood(chain, x, seed=0).value,
        "log-density of the ODE": flow.log_prob(x),
        "ancestral samples": drawn(chain.replace(sampler=Ancestral())),
        "deterministic samples": drawn(chain.replace(sampler=AdamsMoulton())),
    }
