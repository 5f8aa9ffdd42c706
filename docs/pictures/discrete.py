"""The picture of docs/discrete.md.

Run: python docs/pictures/discrete.py [--out FILE]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC
from pyro_diffusion.processes import Absorbing, CategoricalProcess, DiscretizedGaussian, Uniform
from pyro_diffusion.samplers import Ancestral, FirstHitting, Remasking
from pyro_diffusion.schedules import Rectified
from pyro_diffusion.unwrapping import per_coordinate

STATES, SYMBOL, DRAWS = 9, 3, 10_000


def marginals(ax: Axes, title: str, process: CategoricalProcess) -> None:
    """q(x_t | x_0) of one symbol over time."""
    t = torch.linspace(0, 1, 101)
    probs = per_coordinate(process.marginal(torch.full((101, 1), SYMBOL), t)).probs[:, 0]
    ax.imshow(
        probs.T.sqrt(), aspect="auto", origin="lower", extent=(0, 1, -0.5, probs.shape[1] - 0.5)
    )
    ax.set(title=title, xlabel="t")
    ax.set_yticks([0, SYMBOL, STATES - 1])
    if isinstance(process, Absorbing):
        ax.set_yticks([0, SYMBOL, STATES - 1, STATES], ["0", "3", "8", "mask"])


def pairs(ax: Axes) -> None:
    """How often two symbols that are always equal come out unequal."""
    process = Absorbing(Rectified.full(), STATES)
    denoiser = TableDenoiser(process, torch.eye(STATES, dtype=torch.float64) / STATES)
    steps = (2, 4, 8, 16, 32, 64)
    for sampler in (Ancestral(), Remasking(0.05), Remasking(0.2)):
        draws = (Diffusion(denoiser, (2,), k, sampler=sampler).sample((DRAWS,)) for k in steps)
        ax.plot(
            steps,
            [float((x[:, 0] != x[:, 1]).double().mean()) for x in draws],
            "o-",
            label=repr(sampler),
        )
    exact = DiffusionCTMC(denoiser, (2,), 2, sampler=FirstHitting()).sample((DRAWS,))
    wrong = float((exact[:, 0] != exact[:, 1]).double().mean())
    ax.annotate(
        f"FirstHitting(), 2 steps: {wrong:g}",
        (0.97, 0.92),
        xycoords="axes fraction",
        fontsize=8,
        ha="right",
    )
    ax.set(xscale="log", yscale="log", xlabel="steps", title="unequal among equal pairs")
    ax.set_xticks(steps, [str(k) for k in steps])
    ax.minorticks_off()
    ax.legend(fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent.parent / "examples" / "figures" / "discrete.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    torch.manual_seed(0)
    schedule = Rectified.full()
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.9), layout="constrained")
    marginals(axes[0], "Absorbing", Absorbing(schedule, STATES))
    marginals(axes[1], "Uniform", Uniform(schedule, STATES))
    marginals(axes[2], "DiscretizedGaussian", DiscretizedGaussian(schedule, STATES, 1.0))
    axes[0].set_ylabel("symbol")
    pairs(axes[3])
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
