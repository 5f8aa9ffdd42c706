"""The picture of docs/degradations.md: the page's program, its samples, and bounds by number of steps.

Run: python docs/pictures/degradations.py [--steps N] [--out FILE]
"""

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from pyro_diffusion.processes import DegradedGaussian, draw
from pyro_diffusion.samplers import DDIM
from pyro_diffusion.schedules import Cosine

ROOT = Path(__file__).parent.parent


def program(steps: int) -> dict[str, Any]:
    """What the page's first program leaves behind, after so many steps of training."""
    source = re.findall(r"```python\n(.*?)```", (ROOT / "degradations.md").read_text(), re.DOTALL)[
        0
    ]
    names: dict[str, Any] = {}
    exec(source.replace("range(1500)", f"range({steps})"), names)
    return names


def points(ax: Axes, x: torch.Tensor, title: str) -> None:
    """Points of the plane."""
    ax.scatter(*x.T, s=2, alpha=0.5, linewidths=0, rasterized=True)
    ax.set(title=title, xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal", xticks=[], yticks=[])


def bounds(ax: Axes, page: dict[str, Any]) -> None:
    """The bound of one trained network under three renewals, by number of steps."""
    counts = (5, 10, 20, 50, 100, 200, 500, 1000)
    denoiser, data = page["denoiser"], page["data"]
    for renewal, label in ((None, "default"), (0.1, "0.1"), (1.0, "1")):
        denoiser.process = DegradedGaussian(
            Cosine(log_snr_max=6.0, log_snr_min=-6.0), page["swirl"], renewal=renewal
        )
        with torch.no_grad():
            views = (page["diffusion"].replace(steps=k) for k in counts)
            ax.plot(
                counts, [float(v.log_prob(data).mean()) for v in views], "o-", ms=3, label=label
            )
    ax.set(xscale="log", xlabel="steps", title="bound (nats)", ylim=(-60, 0))
    ax.legend(title="renewal", fontsize=8, title_fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    default = ROOT / "examples" / "figures" / "degradations.png"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    page = program(arguments.steps)
    figure, axes = plt.subplots(1, 7, figsize=(15, 2.5), layout="constrained")
    for ax, t in zip(axes, (0.0, 0.25, 0.5, 1.0), strict=False):
        noisy = draw(page["process"].marginal(page["data"], t))
        ax.scatter(*noisy.T, s=2, alpha=0.4, linewidths=0, color="0.7", rasterized=True)
        points(ax, page["swirl"](page["data"], torch.tensor(t)), f"t = {t:g}")
    points(axes[4], page["diffusion"].sample((2000,)), "Ancestral()")
    points(axes[5], page["diffusion"].replace(sampler=DDIM()).sample((2000,)), "DDIM()")
    bounds(axes[6], page)
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
