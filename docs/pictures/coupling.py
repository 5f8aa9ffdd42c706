"""Independent and coupled noise in flow matching: the table and the picture of docs/probability_flow.md.

Run: python docs/pictures/coupling.py [--steps N] [--out FILE]

Two networks of one start are trained alike, on eight normals in a ring, one under ``GaussianProcess`` and the
other under ``CoupledGaussian``. Errors are standard errors over repeated draws from the trained networks.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.axes import Axes
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_diffusion.denoisers import GaussianDenoiser, Velocity
from pyro_diffusion.distributions import Diffusion, FlowMatching, ProbabilityFlow
from pyro_diffusion.evaluate import wasserstein
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import CoupledGaussian, ForwardProcess, GaussianProcess
from pyro_diffusion.samplers import DDIM, simulate
from pyro_diffusion.samplers.base import recorder
from pyro_diffusion.schedules import Rectified, uniform

EULER, REPEATS, DRAWS, BATCH = (1, 2, 4, 8), 6, 500, 256


def ring(count: int) -> Tensor:
    """Eight normals on a circle, of about unit variance in each coordinate."""
    angle = torch.randint(8, (count, 1)) * math.pi / 4
    return 1.4 * torch.cat([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(count, 2)


def train(process: ForwardProcess, data: Tensor, steps: int) -> GaussianDenoiser:
    """The velocity by regression, from one start."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    denoiser = GaussianDenoiser(MLP(2, hidden=(64, 64, 64)), process, Velocity())

    def model() -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(data), subsample_size=BATCH) as rows:
            pyro.sample(
                "x", Diffusion(denoiser, (2,), 100, objective=FlowMatching()), obs=data[rows]
            )

    def guide() -> None:
        """Nothing: the path is inside the site."""

    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for _ in range(steps):
        svi.step()
    return denoiser.eval()


def paths(denoiser: GaussianDenoiser, count: int, steps: int) -> Tensor:
    """States of Euler's method, (steps + 1, count, 2), from noise to data: DDIM under this schedule."""
    states, record = recorder()
    noise = denoiser.process.prior((2,)).expand((count,)).sample()
    with torch.no_grad():
        simulate(denoiser, uniform(steps), noise, DDIM(), callback=record)
    return torch.stack(states)


def report(values: list[float]) -> str:
    """Mean and standard error."""
    v = torch.tensor(values)
    return f"{float(v.mean()):.4f} ({float(v.std()) / math.sqrt(len(v)):.4f})"


def bent(path: Tensor) -> float:
    """Energy of paths over that of straight lines between their ends, 1 at least."""
    energy = path.diff(dim=0).square().sum(-1).mean() * (len(path) - 1) ** 2
    return float(energy / (path[-1] - path[0]).square().sum(-1).mean())


def show(ax: Axes, title: str, path: Tensor) -> None:
    """Paths from noise to data."""
    ax.plot(*path.permute(2, 0, 1), color="tab:blue", alpha=0.5, lw=0.7)
    ax.scatter(*path[0].T, s=3, color="tab:orange", label="noise", zorder=2)
    ax.scatter(*path[-1].T, s=3, color="black", label="data", zorder=3)
    ax.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    ax.legend(fontsize=8, loc="upper right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent.parent / "examples" / "figures" / "coupling.png"
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data, held_out = ring(20_000), ring(200)
    pairs = [(ring(DRAWS), ring(DRAWS)) for _ in range(REPEATS)]
    print(f"{'noise':14}{'bent':>17}" + "".join(f"{f'W2, {k} steps':>17}" for k in EULER), end="")
    print(f"{'ODE log p':>18}")
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
    kinds: dict[str, ForwardProcess] = {
        "independent": GaussianProcess(Rectified()),
        "coupled": CoupledGaussian(Rectified()),
    }
    for ax, (name, process) in zip(axes, kinds.items(), strict=False):
        denoiser = train(process, data, arguments.steps)
        curved = [bent(paths(denoiser, DRAWS, 50)) for _ in range(REPEATS)]
        distances = [
            [wasserstein(paths(denoiser, DRAWS, k)[-1], fresh) for fresh, _ in pairs] for k in EULER
        ]
        log_p = ProbabilityFlow(denoiser, (2,)).log_prob(held_out).detach()
        error = float(log_p.std()) / math.sqrt(len(log_p))
        print(f"{name:14}" + "".join(f"{report(v):>17}" for v in (curved, *distances)), end="")
        print(f"{f'{float(log_p.mean()):.3f} ({error:.3f})':>18}", flush=True)
        show(ax, f"{name} noise", paths(denoiser, 150, 50))
        mean = torch.tensor(distances).mean(1)
        errors = torch.tensor(distances).std(1) / math.sqrt(REPEATS)
        axes[2].errorbar(EULER, mean, errors, marker="o", label=name)
    floor = [wasserstein(*pair) for pair in pairs]
    print(f"{'data and data':31}{report(floor):>17}")
    axes[2].axhline(sum(floor) / REPEATS, color="gray", ls=":", label="data and data")
    axes[2].set(
        xscale="log", ylim=0, xlabel="Euler steps", title="Wasserstein distance to the data"
    )
    axes[2].set_xticks(EULER, [str(k) for k in EULER])
    axes[2].minorticks_off()
    axes[2].legend(fontsize=8)
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
