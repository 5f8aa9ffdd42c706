"""Classes found without labels: a mixture of diffusions whose class is a latent variable.

p(x) = sum_k p(k) p(x | k), one network for all classes, and q(k | x), a small classifier. The class is
enumerated in the guide, so stock SVI with TraceEnum_ELBO evaluates the network once a class and the ELBO is
linear in the diffusion's estimate. The network is told the class only where noise is above a floor, which
training lowers: the class decides what is coarse, what is fine must follow. Labels score, they never train.

Run: python examples/unsupervised_classes.py
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from sklearn.datasets import make_moons
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from tqdm import trange

from pyro_diffusion import MLP, Diffusion, GaussianDenoiser, GaussianProcess, LogLinear
from pyro_diffusion.nn import TensorContext


class Setting(NamedTuple):
    """What to choose; the defaults are for moons."""

    classes: int = 2
    floor: tuple[float, float] = (0.5, 3.2)  # log-SNR up to which the class is told, first and last
    width: int = 64
    batch: int = 256
    steps: int = 2000
    rates: tuple[float, float] = (3e-3, 1e-2)  # learning rates of network and classifier


def load(count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Two moons, standardized by constants, and their labels."""
    points, labels = make_moons(count, noise=0.05, random_state=seed)
    return torch.tensor((points - [0.5, 0.25]) / [0.87, 0.5], dtype=torch.float32), labels


class CoarseClasses(nn.Module):
    """A network that is told the class where the log-SNR is below ``floor``, and not above it."""

    floor: Tensor

    def __init__(self, size: int, width: int, classes: int) -> None:
        super().__init__()
        context = {"told": TensorContext(32, 32, dropout=0.0)}
        self.network = MLP(size, (width,) * 3, context=context)
        self.classes = nn.Embedding(classes, 32)
        nn.init.normal_(self.classes.weight, std=10.0)  # classes differ from the start
        self.register_buffer("floor", torch.tensor(0.0))

    def forward(self, x: Tensor, log_snr: Tensor, k: Tensor) -> Tensor:
        """x (N, d), log_snr (N,), k (N,)."""
        told = torch.sigmoid(4 * (self.floor - log_snr)).unsqueeze(-1) * self.classes(k)
        return self.network(x, log_snr, told=told)


class Mixture:
    """The program: a model, a guide, and one number that training changes, the guide's temperature."""

    def __init__(self, size: int, setting: Setting, chain: int) -> None:
        self.event_shape, self.chain, self.setting = (size,), chain, setting
        self.network = CoarseClasses(size, setting.width, setting.classes)
        process = GaussianProcess(LogLinear(setting.floor[1] + 1, -5))
        self.denoiser = GaussianDenoiser(self.network, process)
        self.classifier = nn.Sequential(
            *(nn.Linear(size, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()),
            nn.Linear(64, setting.classes),
        )
        self.reach(setting.floor[1])
        self.temperature = 1.0

    def reach(self, floor: float) -> None:
        """Tell the class up to this log-SNR; the chain starts a little above, the decoder does the rest."""
        self.network.floor.fill_(floor)
        start = self.denoiser.process.schedule.time_of_log_snr(torch.tensor(floor + 1.0))
        self.times = torch.linspace(float(start), 1, self.chain + 1)

    def diffusion(self, k: Tensor) -> Diffusion:
        """p(x | k)."""
        return Diffusion(self.denoiser, self.event_shape, times=self.times, context={"k": k})

    def model(self, x: Tensor) -> None:
        """k ~ uniform, x ~ p(x | k); the loss is in nats per datum."""
        pyro.module("denoiser", self.denoiser)
        with pyro.plate("data", len(x)), poutine.scale(scale=1 / len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(self.setting.classes)))
            pyro.sample("x", self.diffusion(k), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(k | x), enumerated. Its entropy counts ``temperature`` times: once, and the loss is the ELBO."""
        pyro.module("classifier", self.classifier)
        q = dist.Categorical(logits=self.classifier(x))
        with pyro.plate("data", len(x)), poutine.scale(scale=self.temperature / len(x)):
            pyro.sample("k", q, infer={"enumerate": "parallel"})

    def train(self, x: Tensor, progress: bool = False) -> float:
        """Coarse to fine, decided to open; returns the mean loss of the last tenth of the steps."""
        (slow, fast), steps = self.setting.rates, self.setting.steps
        with torch.no_grad():  # decided from the start, at random, and no class forgotten
            self.classifier[-1].weight.mul_(10)
            self.classifier[-1].bias.sub_(self.classifier(x).mean(0))
        optim = pyro.optim.Adam(lambda name: {"lr": slow if "denoiser" in name else fast})
        svi = SVI(self.model, self.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
        (low, high), losses = self.setting.floor, []
        for step in trange(steps, desc="training", disable=not progress):
            way = min(max(step / steps - 0.05, 0) / 0.65, 1)
            self.reach(low + way * (high - low))
            self.temperature = 0.3 + 0.5 * way
            losses.append(svi.step(x[torch.randint(len(x), (self.setting.batch,))]))
        self.temperature = 1.0
        self.denoiser.eval().requires_grad_(False)
        self.classifier.eval().requires_grad_(False)
        return float(np.mean(losses[-max(steps // 10, 1) :]))

    def bound(self, x: Tensor, repeats: int = 50) -> tuple[float, float]:
        """The ELBO of held-out rows, nats per datum, and its Monte-Carlo error."""
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        values = -torch.tensor([elbo.loss(self.model, self.guide, x) for _ in range(repeats)])
        return float(values.mean()), float(values.std() / math.sqrt(repeats))


def score(mixture: Mixture, x: Tensor, labels: np.ndarray) -> dict[str, float | list[float]]:
    """Agreement with the labels, share of each class, and the bound."""
    q = mixture.classifier(x).softmax(-1)
    bound, error = mixture.bound(x)
    return {
        "adjusted_rand": float(adjusted_rand_score(labels, q.argmax(-1))),
        "shares": q.mean(0).tolist(),
        "bound": bound,
        "bound_error": error,
    }


def draw(mixture: Mixture, x: Tensor) -> Figure:
    """Held-out rows by the class found for them, and draws of each class."""
    classes = torch.arange(2).repeat_interleave(len(x) // 2)
    panels = {
        "held-out rows by class": (x, mixture.classifier(x).argmax(-1)),
        "draws of each class": (mixture.diffusion(classes).sample(), classes),
    }
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, (title, (rows, k)) in zip(axes, panels.items(), strict=True):
        colours = np.array(["tab:blue", "tab:orange"])[k]
        ax.scatter(*rows.T.numpy(), s=4, alpha=0.6, linewidths=0, c=colours)
        ax.set(title=title, aspect="equal", xlim=(-2.4, 2.4), ylim=(-2, 2))
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/unsupervised_classes")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Setting().steps, help="training steps")
    parser.add_argument("--chain", type=int, default=100, help="steps of the chain")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    (x, _), (held_out, labels) = load(2000, 2 * args.seed), load(1000, 2 * args.seed + 1)
    mixture = Mixture(2, Setting(steps=args.steps), args.chain)
    loss = mixture.train(x, args.progress)
    metrics = {**score(mixture, held_out, labels), "loss": loss}
    print(f"adjusted Rand index, {len(held_out)} held-out rows: {metrics['adjusted_rand']:.3f}")
    print("share of each class:", *(f"{share:.3f}" for share in metrics["shares"]))
    print(f"ELBO: {metrics['bound']:.3f} +- {metrics['bound_error']:.3f} nats per datum")
    draw(mixture, held_out).savefig(args.out / "classes.png", dpi=120)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"the figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
