"""Diagnostics of trained networks: residuals of their equations and the Wasserstein bound, by steps."""

from collections.abc import Iterator

import pyro
import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import CategoricalDenoiser, Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC
from pyro_diffusion.evaluate import (
    continuity_residual,
    jump_residual,
    wasserstein,
    wasserstein_bound,
)
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, ForwardProcess, GaussianProcess, Uniform
from pyro_diffusion.samplers import AdamsMoulton
from pyro_diffusion.schedules import LogLinear, Rectified, uniform_log_snr

CHECKS = (20, 200, 1000)
SYMBOLS = 6


def bent(count: int) -> Tensor:
    """One mode, and no normal."""
    x = torch.randn(count, 2)
    return torch.stack([x[:, 0], 0.6 * x[:, 1] + 0.4 * (x[:, 0].square() - 1)], -1)


class Logits(nn.Module):
    """Logits of two symbols from both. Time-free."""

    def __init__(self) -> None:
        super().__init__()
        width = SYMBOLS + 1
        self.layers = nn.Sequential(nn.Linear(2 * width, 64), nn.SiLU(), nn.Linear(64, 2 * SYMBOLS))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """(n, 2) to (n, 2, symbols)."""
        seen = nn.functional.one_hot(x, SYMBOLS + 1).flatten(-2).float()
        return self.layers(seen).unflatten(-1, (2, SYMBOLS))


def symbols(count: int) -> Tensor:
    """Two symbols, the second most often the first's next."""
    first = torch.randint(SYMBOLS, (count,)).minimum(torch.randint(SYMBOLS, (count,)))
    step = torch.tensor([0.1, 0.7, 0.2]).multinomial(count, replacement=True)
    return torch.stack([first, (first + step) % SYMBOLS], -1)


def trained(denoiser: Denoiser, draw: object, law: object, checks: tuple[int, ...]) -> object:
    """Yield after so many steps of SVI, on fresh rows each."""
    pyro.clear_param_store()

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law(), obs=x)

    svi = pyro.infer.SVI(
        model, lambda x: None, pyro.optim.Adam({"lr": 2e-3}), pyro.infer.Trace_ELBO()
    )
    for step in range(1, checks[-1] + 1):
        svi.step(draw(256))
        if step in checks:
            yield step


def flow_rows(checks: tuple[int, ...]) -> Iterator[tuple[int, float, float, float, float]]:
    """By steps: rms z and rms of the continuity equation's residual, distance measured, its bound."""
    process = GaussianProcess(LogLinear(9, -9))
    denoiser = GaussianDenoiser(MLP(2, (64, 64)), process)
    times, held, others = uniform_log_snr(process.schedule, 100), bent(10_000), bent(1000)
    yield 0, 0.0, 0.0, wasserstein(held[:1000], others), 0.0
    view = lambda: Diffusion(denoiser, (2,), times=times)  # noqa: E731
    for step in trained(denoiser, bent, view, checks):
        denoiser.eval()
        torch.manual_seed(1)
        found = continuity_residual(denoiser, held)
        draws = Diffusion(denoiser, (2,), times=times, sampler=AdamsMoulton()).sample((1000,))
        measured = wasserstein(others, draws)
        bound = wasserstein_bound(denoiser, held[:2000], eta=0.0, num_points=100).value
        rms = [float(part.square().mean().sqrt()) for part in (found.z, found.rms)]
        yield step, *rms, measured, float(bound)
        denoiser.train()


def flows(checks: tuple[int, ...]) -> bool:
    """Print the residual of the continuity equation, and distances beside their bound."""
    (_, _, _, floor, _), *rows = flow_rows(checks)
    print(f"Wasserstein-2 distance of two samples of 1000 data: {floor:.3f}")
    print(
        f"{'steps':>6} {'continuity: rms z':>18} {'rms residual':>13} {'W2 measured':>12} {'bound, ODE':>11}"
    )
    for step, z, rms, measured, bound in rows:
        print(f"{step:>6} {z:>18.2f} {rms:>13.4f} {measured:>12.3f} {bound:>11.3f}", flush=True)
    fine = all(bound >= measured - floor for *_, measured, bound in rows)
    return fine and rows[-1][2] < 0.3 * rows[0][2]


def jump_rows(process: ForwardProcess, checks: tuple[int, ...]) -> list[tuple[float, float]]:
    """By steps: rms z and rms of the master equation's residual."""
    torch.manual_seed(0)
    denoiser, held, rows = CategoricalDenoiser(Logits(), process), symbols(10_000), []
    view = lambda: DiffusionCTMC(denoiser, (2,), steps=2)  # noqa: E731
    for _ in trained(denoiser, symbols, view, checks):
        torch.manual_seed(1)
        found = jump_residual(denoiser, held, times=torch.linspace(0.1, 0.9, 9))
        z, rms = (float(part.square().mean().sqrt()) for part in (found.z, found.rms))
        rows.append((z, rms))
    return rows


def jump_processes() -> tuple[ForwardProcess, ForwardProcess]:
    """Of masks, and of uniform noise."""
    return Absorbing(Rectified.full(), SYMBOLS), Uniform(Rectified.full(), SYMBOLS)


def jumps(checks: tuple[int, ...]) -> bool:
    """Print the residual of the master equation under two processes."""
    print(
        f"{'steps':>6} {'master equation, masks: rms z':>30} {'rms residual':>13} {'uniform: rms z':>16}"
    )
    columns = [jump_rows(process, checks) for process in jump_processes()]
    for step, *row in zip(checks, *columns, strict=True):
        (z, rms), (other, size) = row
        print(f"{step:>6} {z:>30.2f} {rms:>13.4f} {other:>16.2f} {size:>13.4f}")
    return all(rows[-1][1] < 0.3 * rows[0][1] for rows in columns)


def main(scale: float) -> bool:
    """Print both; whether residuals fall to less than a third, and the bound is one."""
    checks = tuple(max(int(n * scale), i + 1) for i, n in enumerate(CHECKS))
    return all([flows(checks), jumps(checks)])
