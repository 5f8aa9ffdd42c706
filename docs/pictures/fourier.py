"""The picture of docs/fourier.md.

Run: python docs/pictures/fourier.py [--out FILE]
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from pyro.distributions import Categorical, MixtureSameFamily, Normal

from pyro_diffusion.denoisers import FourierDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import FourierDensity
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from density_parts import fourier  # noqa: E402

fourier.STARTS = 5


def fits(ax: Axes, name: str) -> None:
    """The fit of the median start of either kind, over the truth."""
    weights, means, scales = fourier.TARGETS[name]
    truth = fourier.mixture(torch.tensor(weights).log(), torch.tensor(means), torch.tensor(scales))
    torch.manual_seed(0)
    data, grid = truth.sample((fourier.ROWS,)), torch.linspace(-9, 9, 4001)
    ax.fill_between(grid, truth.log_prob(grid).exp(), color="0.85", label="truth")
    for kind in ("Fourier", "mixture"):
        log_probs = fourier.by_gradient(kind, data, grid, 600)
        order = fourier.divergences(truth, log_probs, grid).argsort()
        ax.plot(grid, log_probs[order[len(order) // 2]].exp(), linewidth=1, label=kind)
    ax.set(title=name, xlim=(-6, 6), ylim=(0, 0.36))
    ax.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")


def circle(ax: Axes) -> None:
    """Draws around a circle, and their density."""
    torch.manual_seed(5)
    density = FourierDensity(torch.randn(8, 2), 0.0, math.pi, "circle")
    angle = torch.linspace(-math.pi, math.pi, 400)
    ax.hist(density.sample((5000,)).numpy(), bins=60, density=True, color="0.85")
    ax.plot(angle, density.log_prob(angle).exp(), linewidth=1)
    ax.set(theta_zero_location="E", yticks=[])
    ax.set_xticks([0, math.pi / 2, math.pi, 1.5 * math.pi], ["0", "π/2", "π", "-π/2"])
    ax.set_title("angles")


def posterior(ax: Axes) -> None:
    """p(x_0 | x_t) of a number near one of four values: exact, learned and normal."""
    process, values = GaussianProcess(Cosine()), torch.tensor([-1.3, -0.5, 0.4, 1.2])
    data = MixtureSameFamily(Categorical(torch.ones(4)), Normal(values, 0.12))
    t, reading = process.level_of_clock(torch.tensor(0.0)).t, torch.tensor([[0.0]])
    denoiser = FourierDenoiser(MLP(1, (64, 64), outputs=30), process)
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(600):
        x0 = data.sample((512, 1))
        loss = -denoiser(process.marginal(x0, t).sample(), t).log_prob(x0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.linspace(-2.2, 2.2, 400)
    level = process.level(t)
    evidence = Normal(level.alpha * x, level.sigma).log_prob(reading[0])
    exact = (data.log_prob(x) + evidence).exp()
    ax.fill_between(x, exact / (exact.sum() * (x[1] - x[0])), color="0.85", label="exact")
    with torch.no_grad():
        learned = denoiser(reading, t).log_prob(x[:, None]).exp()
    ax.plot(x, learned, linewidth=1, label="Fourier")
    moments = MixtureDenoiser(process, torch.ones(4), values[:, None], 0.12**2)(reading, t)
    normal = Normal(moments.mean[0], moments.variance[0].sqrt())
    ax.plot(x, normal.log_prob(x).exp(), linewidth=1, label="normal")
    ax.set(title="posteriors", xlabel="$x_0$", ylim=(0, 1.5))
    ax.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "docs" / "examples" / "figures" / "fourier.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    torch.manual_seed(0)
    figure = plt.figure(figsize=(14, 3.2), layout="constrained")
    axes = [
        figure.add_subplot(1, 4, i + 1, projection="polar" if i == 2 else None) for i in range(4)
    ]
    fits(axes[0], "comb")
    fits(axes[1], "broad and sharp")
    circle(axes[2])
    posterior(axes[3])
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
