"""The picture of docs/autoregressive.md: one masked diffusion of nltcs in many orders.

Run: python docs/pictures/autoregressive.py --data DIR [--out FILE]     (a folder with debd_nltcs.npz)
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_diffusion.distributions import Autoregressive, OrderAgnostic

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from density_parts.bits import Settings, build, fit, read, score  # noqa: E402

ORDERS, ROWS, SECONDS, DRAWS = 60, 1000, 25, 4096


def orders(ax: Axes, each: Tensor, bound: Tensor) -> None:
    """Mean log-probability of rows under every order, their mixture and the diffusion's bound."""
    counts = ax.hist(each.mean(-1), bins=20, color="0.75")[0]
    ax.set_ylim(0, 1.6 * max(counts))  # room for the legend
    mixture = each.logsumexp(0) - torch.tensor(len(each)).log()
    marks = {
        "mean of the orders": each.mean(),
        "diffusion's bound": bound.mean(),
        "mixture of the orders": mixture.mean(),
    }
    for (name, value), style in zip(marks.items(), ("-", ":", "--"), strict=True):
        ax.axvline(float(value), linestyle=style, color="C0", label=f"{name} {float(value):.3f}")
        print(f"{name}: {float(value):.4f}")
    spread = float(each.mean(-1).std() / len(each) ** 0.5)
    print(f"standard error of the mean over orders {spread:.4f}")
    ax.set(xlabel="log-probability of test rows, nats", ylabel="orders", title=f"{ORDERS} orders")
    ax.legend(fontsize=8, frameon=False, loc="upper left")


def positions(ax: Axes, network: OrderAgnostic, rows: Tensor) -> None:
    """Nats of the symbol at every position."""
    cost = torch.zeros(network.size)
    for m, order in enumerate(network.orders):
        log_probs = network(rows, m).log_softmax(-1).gather(-1, rows.unsqueeze(-1)).squeeze(-1)
        cost -= log_probs[:, order].mean(0) / len(network.orders)
    ax.plot(range(network.size), cost, "o-", markersize=3)
    ax.set(
        xlabel="symbols known",
        ylabel="nats of the next",
        title="what the rest tells",
        ylim=(0, None),
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "docs" / "examples" / "figures" / "autoregressive.png"
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    data = read(args.data / "debd_nltcs.npz")
    denoiser = build("masked diffusion", 16)
    with torch.enable_grad():
        fit(denoiser, data, Settings(SECONDS))
    rows = data["test"][:ROWS]
    every = torch.stack([torch.randperm(16) for _ in range(ORDERS)])
    network = OrderAgnostic(denoiser.eval(), 16, every)
    each = torch.stack([Autoregressive(network, m).log_prob(rows) for m in range(ORDERS)])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    orders(axes[0], each, score(denoiser, rows, DRAWS))
    positions(axes[1], network, rows)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
