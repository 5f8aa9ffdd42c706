"""Diagnostics where the truth is known: Wasserstein bound beside distance, and continuity residual.

Run: python benchmarks/diagnostics.py

A denoiser that is exact for the wrong normal stands for a trained one. Its own samples (probability flow, 100
steps of the few-step default) are set against data by exact assignment; the floor is two samples of the data.
"""

import sys

import torch

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.evaluate import continuity_residual, wasserstein, wasserstein_bound
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import AdamsMoulton
from pyro_diffusion.schedules import LogLinear, uniform_log_snr

DIMENSIONS, COUNT = 2, 1000
# Mean and variance that the model believes; data are N(0, I).
MODELS = [(0.0, 1.0), (0.1, 1.0), (0.3, 1.0), (0.0, 0.8), (0.0, 1.3), (0.3, 0.8)]


def normal(mean: float, variance: float) -> MixtureDenoiser:
    """The exact denoiser of an isotropic normal."""
    process = GaussianProcess(LogLinear(9, -9))
    return MixtureDenoiser(
        process, torch.ones(1), torch.full((1, DIMENSIONS), mean), variance, True
    )


def distances() -> bool:
    """Bound, measured and exact distance of data and model."""
    truth = normal(0.0, 1.0)
    data, others = truth.data().sample((2, COUNT))
    print(
        f"\nWasserstein-2 distance, data N(0, I) in {DIMENSIONS}-d, {COUNT} samples; eta = 0 (ODE)"
    )
    print(
        f"{'model':<22}{'exact':>9}{'measured':>10}{'floor':>9}{'bound':>9}{'from loss':>11}  bound >= exact"
    )
    floor, fine = wasserstein(data, others), True
    for mean, variance in MODELS:
        model = normal(mean, variance)
        times = uniform_log_snr(model.process.schedule, 100)
        law = Diffusion(model, (DIMENSIONS,), times=times, sampler=AdamsMoulton())
        exact = (DIMENSIONS * (mean**2 + (variance**0.5 - 1) ** 2)) ** 0.5
        measured = wasserstein(data, law.sample((COUNT,)))
        known = wasserstein_bound(model, data, reference=truth, eta=0.0).value
        blind = wasserstein_bound(model, data, eta=0.0).value
        fine &= known >= exact and blind >= known
        print(
            f"{f'N({mean:g}, {variance:g} I)':<22}{exact:>9.3f}{measured:>10.3f}{floor:>9.3f}{known:>9.3f}"
            f"{blind:>11.3f}  {known >= exact}"
        )
    print(f"as wanted: {fine}")
    return fine


def residuals() -> bool:
    """Continuity residuals of an exact and of wrong denoisers, on mixture data."""
    process = GaussianProcess(LogLinear(9, -9))
    means = torch.randn(25, DIMENSIONS, generator=torch.Generator().manual_seed(DIMENSIONS))
    exact = MixtureDenoiser(process, torch.ones(25), means, 0.05)
    data = exact.data().sample((20_000,))
    print(
        "\nContinuity residual, 10 levels x 32 test functions, 20 000 data of a 25-component mixture"
    )
    print(f"{'denoiser':<34}{'rms z':>8}{'largest rms residual':>22}  wanted")
    fine = True
    for variance in (0.05, 0.06, 0.1, 0.2):
        model = MixtureDenoiser(process, torch.ones(25), means, variance)
        found = continuity_residual(model, data)
        z = float(found.z.square().mean().sqrt())
        # 320 squares, correlated within a level: 0.5 to 1.5 is wide.
        # An error of a fifth in the variance is below what smooth test functions see in this much data.
        wanted = {0.05: "0.5 to 1.5", 0.06: ""}.get(variance, "> 2")
        fine &= not wanted or (z > 2 if wanted == "> 2" else 0.5 < z < 1.5)
        name = "exact" if variance == 0.05 else f"component variance {variance:g}"
        print(f"{name:<34}{z:>8.2f}{float(found.rms.max()):>22.4f}  {wanted}")
    print(f"as wanted: {fine}")
    return fine


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    fine = [distances(), residuals()]
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
