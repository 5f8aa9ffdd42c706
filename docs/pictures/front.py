"""The picture of the README: its own programs are run, then drawn.

Run: python docs/pictures/front.py [--out FILE]
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_diffusion import Diffusion, evaluate

DOCS = Path(__file__).parent.parent
NOISE = 0.1  # of the points about the circle
STEPS = (5, 10, 20, 50, 100)
BLUE, ORANGE, GREY = "#1f6f9f", "#d1731e", "#8a8a8a"


def run_readme() -> dict[str, Any]:
    """The names that the programs of the README leave."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec("\n".join(blocks), namespace)
    return namespace


def log_density(x: Tensor) -> Tensor:
    r"""Points of the unit circle with normal noise: log I_0(r / s^2) - (r^2 + 1) / 2 s^2 - log 2 pi s^2."""
    r = x.double().norm(dim=-1)
    bessel = torch.special.i0e(r / NOISE**2).log() + r / NOISE**2
    return bessel - (r.square() + 1) / (2 * NOISE**2) - math.log(2 * math.pi * NOISE**2)


def draw_samples(ax: Axes, names: dict[str, Any]) -> None:
    ax.scatter(*names["data"][:500].T, s=4, color=GREY, label="data")
    ax.scatter(*names["samples"].T, s=4, color=BLUE, label="samples")
    ax.set(title="samples", xlim=(-1.6, 1.6), ylim=(-1.4, 1.8), aspect="equal")
    ax.legend(loc="upper center", ncol=2, fontsize=8, frameon=False, markerscale=2)


def draw_bound(ax: Axes, names: dict[str, Any]) -> None:
    held_out = names["held_out"]
    chains = [Diffusion(names["denoiser"], (2,), k) for k in STEPS]
    estimates = [evaluate.log_likelihood(chain, held_out, num_samples=8) for chain in chains]
    bounds = [estimate.mean for estimate in estimates]
    exact = log_density(held_out).mean()
    ax.axhline(exact, color=ORANGE, label="truth")
    ax.errorbar(
        STEPS,
        [b.value for b in bounds],
        [b.standard_error for b in bounds],
        fmt="o",
        capsize=3,
        color=BLUE,
        label="bound, ± standard error",
    )
    ax.set(title="log-likelihood of held-out data", xlabel="steps", xscale="log")
    ax.set_xticks(STEPS, [str(k) for k in STEPS])
    ax.minorticks_off()
    ax.set_ylabel("nats")
    ax.legend(loc="lower right", fontsize=8, frameon=False)


def draw_posterior(ax: Axes, names: dict[str, Any]) -> None:
    """Draws, and contours of the exact posterior."""
    line = torch.linspace(-1.6, 1.6, 401)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    misfit = (grid.double().sum(-1) - 1) / 0.1
    posterior = (log_density(grid) - misfit.square() / 2).exp()
    ax.scatter(*names["posterior"].T, s=4, color=BLUE, alpha=0.6, label="draws")
    levels = posterior.max() * torch.tensor([0.03, 0.1, 0.3, 0.7])
    ax.contour(*grid.unbind(-1), posterior, levels, colors=ORANGE, linewidths=1)
    ax.plot([], [], color=ORANGE, label="truth")
    ax.set(title=r"posterior of $x_1 + x_2 \approx 1$", aspect="equal")
    ax.set(xlim=(-0.6, 1.6), ylim=(-0.6, 1.6))
    ax.legend(loc="lower left", fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = DOCS / "examples" / "figures" / "front.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    pyro.set_rng_seed(0)
    names = run_readme()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained")
    for draw, ax in zip((draw_samples, draw_bound, draw_posterior), axes, strict=True):
        draw(ax, names)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
