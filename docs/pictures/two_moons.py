"""The picture of the page on simulators: its first program is run, then drawn over exact posteriors.

Run: python docs/pictures/two_moons.py [--out FILE]
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

DOCS = Path(__file__).parent.parent
OBSERVATIONS = torch.tensor([[-0.2, 0.1], [-0.6, -0.4], [0.15, 0.5]])
DRAWS = 1500
BLUE, GREY = "#1f6f9f", "#b8b8b8"


def exact_posterior(x: Tensor, num_samples: int) -> Tensor:
    """Draws of theta: the place of x in the crescent leaves two values of it, each as likely."""
    angle = (torch.rand(20 * num_samples) - 0.5) * math.pi
    radius = 0.1 + 0.01 * torch.randn(20 * num_samples)
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    gap = math.sqrt(2) * (x - crescent)
    total = gap[:, 0].neg() * torch.randint(2, angle.shape).mul(2).sub(1)
    theta = torch.stack([total - gap[:, 1], total + gap[:, 1]], -1) / 2
    inside = (gap[:, 0] <= 0) & (theta.abs() <= 1).all(-1)
    return theta[inside][:num_samples]


def run_page() -> dict[str, Any]:
    """The names that the first program of the page leaves."""
    (program, *_) = re.findall(r"```python\n(.*?)```", (DOCS / "simulators.md").read_text(), re.S)
    namespace: dict[str, Any] = {}
    exec(program, namespace)
    return namespace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS / "examples/figures/two_moons.png")
    out = parser.parse_args().out
    guide = run_page()["guide"]
    draws = guide(OBSERVATIONS.expand(DRAWS, 3, 2))["theta"]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
    for ax, x, theta in zip(axes, OBSERVATIONS, draws.unbind(1), strict=True):
        ax.scatter(*exact_posterior(x, DRAWS).T, s=14, color=GREY, label="exact")
        ax.scatter(*theta.T, s=1, color=BLUE, label="guide")
        ax.set(title=f"x = ({x[0]:.2f}, {x[1]:.2f})", xlabel=r"$\theta_1$", aspect="equal")
        ax.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
    axes[0].set_ylabel(r"$\theta_2$")
    axes[0].legend(loc="lower left", fontsize=8, frameon=False, markerscale=4)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
