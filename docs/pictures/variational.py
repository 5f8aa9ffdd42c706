"""The picture of docs/variational.md.

Run: python docs/pictures/variational.py [--out FILE]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_diffusion.infer import DensityRatio, Responsibilities

ROWS, STEPS = 500, 40
START = {"weights": [0.5, 0.5], "means": [-0.5, 1.0], "scales": [1.0, 1.5]}
POSITIVE = {"weights": dist.constraints.simplex, "scales": dist.constraints.positive}


def model(x: Tensor) -> None:
    """Two normals."""
    values = {
        name: pyro.param(name, torch.tensor(v), POSITIVE.get(name, dist.constraints.real))
        for name, v in START.items()
    }
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(values["weights"]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(values["means"][k], values["scales"][k]), obs=x)


def em(x: Tensor, closed: bool) -> list[float]:
    """log p(x) a row before every step, of the M-step in closed form or of one gradient step."""
    pyro.clear_param_store()
    guide, values = Responsibilities(model), []
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), guide.elbo)
    for _ in range(STEPS):
        values.append(-guide.elbo.loss(model, guide, x) / len(x))
        if not closed:
            svi.step(x)
            continue
        r = guide.probs(x)["k"]
        total = r.sum(0)
        means = (r * x.unsqueeze(-1)).sum(0) / total
        spread = (r * (x.unsqueeze(-1) - means).square()).sum(0) / total
        found = {"weights": total / len(x), "means": means, "scales": spread.sqrt()}
        for name, value in found.items():
            pyro.get_param_store()[name] = value.detach().clone()
    return values


class Quadratic(nn.Module):
    """Log-odds of normals."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 2) to (n, 1)."""
        return self.layer(torch.cat([x, x.square()], -1))


def divergences(ax: Axes) -> None:
    """KL(N(m, I) || N(0, I)) by a classifier, its bound, and exactly."""
    shifts, mean, bound = torch.linspace(0, 1.6, 9), [], []
    for m in shifts.tolist():
        ratio = DensityRatio(Quadratic())
        optimizer = torch.optim.Adam(ratio.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            ratio.loss(torch.randn(1000, 2) + m, torch.randn(1000, 2)).backward()
            optimizer.step()
        q, p = torch.randn(2, 20_000, 2)
        mean.append(float(ratio(q + m).mean().detach()))
        bound.append(ratio.lower_bound(q + m, p))
    ax.plot(shifts, shifts.square(), color="0.6", label="exact")
    ax.plot(shifts, mean, "o", markersize=4, label="mean log-odds")
    ax.errorbar(
        shifts,
        [b.value for b in bound],
        [2 * b.standard_error for b in bound],
        fmt="x",
        label="lower bound, 2 s.e.",
    )
    ax.set(xlabel="shift of both coordinates", ylabel="nats", title="KL of two normals from draws")
    ax.legend(fontsize=8, frameon=False)
    off = max(abs(a - b) for a, b in zip(mean, shifts.square().tolist(), strict=True))
    print(f"largest error of the mean log-odds {off:.3f} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent.parent / "examples" / "figures" / "variational.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    pyro.set_rng_seed(0)
    x = torch.where(torch.rand(ROWS) < 0.3, -2.0, 1.0) + 0.6 * torch.randn(ROWS)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for closed, name in ((True, "M-step in closed form"), (False, "one step of Adam")):
        values = em(x, closed)
        axes[0].plot(values, label=name)
        print(f"{name}: {values[0]:.4f} to {values[-1]:.4f} nats a row in {STEPS} steps")
    axes[0].set(xlabel="steps", ylabel="log p(x) a row, nats", title="the same guide, two M-steps")
    axes[0].legend(fontsize=8, frameon=False)
    divergences(axes[1])
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
