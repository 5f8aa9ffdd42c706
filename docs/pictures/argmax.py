"""The picture of docs/argmax.md.

Run: python docs/pictures/argmax.py [--out FILE]
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes

from pyro_diffusion.distributions import ArgmaxCategorical, RelaxedArgmaxCategorical

# All of standard deviation one.
NOISES = {
    "Gumbel": dist.Gumbel(0.0, math.sqrt(6) / math.pi),
    "exponential": dist.Exponential(1.0),
    "uniform": dist.Uniform(0.0, math.sqrt(12)),
    "normal": dist.Normal(0.0, 1.0),
}
UTILITIES = torch.tensor([0.0, 0.6, 1.2])


def chances(ax: Axes) -> None:
    """The chance of the second of two categories by how far it is behind."""
    gap = torch.linspace(0, 5, 501)
    pair = torch.stack([torch.zeros_like(gap), -gap], -1)
    for name, noise in NOISES.items():
        ax.plot(gap, ArgmaxCategorical(pair, noise).probs[:, 1], label=name)
    ax.set(yscale="log", ylim=(1e-4, 1), xlabel="gap in utility", title="chance of the one behind")
    ax.legend(fontsize=8, frameon=False)


def triangle(ax: Axes, name: str) -> None:
    """Relaxed draws of three categories, and what they tend to."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    draws = RelaxedArgmaxCategorical(torch.tensor(0.7), UTILITIES, NOISES[name]).sample((3000,))
    ax.plot(*corners[[0, 1, 2, 0]].T, color="0.6", linewidth=1)
    ax.scatter(*(draws @ corners).T, s=2, linewidths=0, alpha=0.5)
    probs = ArgmaxCategorical(UTILITIES, NOISES[name]).probs
    places = (
        (-0.04, -0.03, "right", "top"),
        (1.04, -0.03, "left", "top"),
        (0.5, 0.9, "center", "bottom"),
    )
    for p, (x, y, ha, va) in zip(probs.tolist(), places, strict=True):
        ax.text(x, y, f"{p:.3f}", ha=ha, va=va, fontsize=8)
    ax.set(title=name, aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.15, 1.0))
    ax.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent.parent / "examples" / "figures" / "argmax.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    torch.manual_seed(0)
    figure, axes = plt.subplots(1, 5, figsize=(14, 2.9), layout="constrained")
    chances(axes[0])
    for ax, name in zip(axes[1:], NOISES, strict=True):
        triangle(ax, name)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
