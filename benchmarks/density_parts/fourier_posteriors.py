"""Fourier densities as posteriors per coordinate: bounds of diffusions of columns with modes."""

import math

import pyro
import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal
from torch import Tensor

from pyro_diffusion.denoisers import FourierDenoiser, GaussianDenoiser, LearnedVariance
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

DEGREE = 14
# Two columns, both near one of eight values: the value of one tells of that of the other.
VALUES = torch.linspace(-1.4, 1.4, 8)
MODES = torch.stack([VALUES, VALUES[[3, 0, 6, 1, 7, 4, 2, 5]]], -1)


def table() -> MixtureSameFamily:
    """The data's density."""
    weights = torch.tensor([0.2, 0.05, 0.15, 0.1, 0.15, 0.1, 0.05, 0.2])
    return MixtureSameFamily(Categorical(weights), Normal(MODES, 0.05).to_event(1))


def gap(kind: str, log_snr_max: float, steps: int, updates: int) -> tuple[float, float]:
    """log p less the bound, nats a row, and its standard error."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    process = GaussianProcess(Cosine(log_snr_max=log_snr_max))
    outputs = 2 if kind == "normal" else 2 * (DEGREE + 1)
    network = MLP(2, (64, 64), outputs=outputs, frequencies=(1, 2, 4, 8))
    denoiser = (
        GaussianDenoiser(network, process, variance=LearnedVariance())
        if kind == "normal"
        else FourierDenoiser(network, process, DEGREE)
    )
    chain = Diffusion(denoiser, (2,), steps=steps)

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", Diffusion(denoiser, (2,), steps=steps), obs=x)

    rate = {"lr": 3e-3, "lrd": 0.03 ** (1 / updates), "clip_norm": 10.0}
    svi = pyro.infer.SVI(
        model, lambda x: None, pyro.optim.ClippedAdam(rate), pyro.infer.Trace_ELBO()
    )
    for _ in range(updates):
        svi.step(table().sample((256,)))
    x = table().sample((2000,))
    gaps = table().log_prob(x) - log_likelihood(chain.replace(), x, num_terms=10).value
    return float(gaps.mean()), float(gaps.std() / math.sqrt(len(x)))


def bounds(scale: float) -> bool:
    """Print the bounds; whether a Fourier posterior's is the tighter one where the chain ends in noise."""
    print(
        "\nlog p less the bound, nats a row (s.e.), by steps and the log-SNR at which the chain ends"
    )
    print(f"{'steps, log-SNR':>16} {'normal posterior':>24} {'Fourier posterior':>24}")
    fine = True
    for steps, end in ((2, 0.0), (2, 2.0), (4, 4.0), (10, 9.0)):
        pair = [gap(kind, end, steps, max(int(800 * scale), 2)) for kind in ("normal", "Fourier")]
        print(
            f"{steps:>9}, {end:>5}" + "".join(f" {m:>15.3f} ({e:.3f})" for m, e in pair), flush=True
        )
        fine &= pair[1][0] < pair[0][0] or end > 2
    return fine
