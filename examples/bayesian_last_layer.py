"""A Bayesian last layer: which parts of a density few data leave open.

The last layer of a denoiser's network has a prior (`PyroSample`), the others have parameters. Plain SVI fits
a normal posterior of the last layer beside them, on few points of two moons and on many. Weights drawn from
it give one density each, by the probability-flow ODE; their spread is what the data have not settled.

Run: python examples/bayesian_last_layer.py
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from sklearn.datasets import make_moons
from torch import Tensor
from tqdm import trange

from pyro_diffusion import (
    MLP,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LogLinear,
    ProbabilityFlow,
    denoisers,
)
from pyro_diffusion.dynamics import ODESolver

# Two views of one denoiser: what is trained, and its densities.
chain = partial(Diffusion, event_shape=(2,), steps=100)
flow = partial(ProbabilityFlow, event_shape=(2,), solver=ODESolver("rk4", steps=16))
CENTRE, SCALE = torch.tensor([0.5, 0.25]), torch.tensor([0.87, 0.5])


def moons(count: int, seed: int) -> Tensor:
    """Standardized points, (count, 2)."""
    points, _ = make_moons(count, noise=0.08, random_state=seed)
    return (torch.tensor(points, dtype=torch.float32) - CENTRE) / SCALE


def denoiser(width: int) -> denoisers.Denoiser:
    """A network whose last weight is normal a priori, with the scale of a layer's first values."""
    network = MLP(2, hidden=(width, width))
    to_pyro_module_(network)
    prior = dist.Normal(0.0, width**-0.5).expand(network.last.weight.shape).to_event(2)
    network.last.weight = PyroSample(prior)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(6, -6)))


class Model(PyroModule):
    """Points under one view of the denoiser; the weights are one for all points."""

    def __init__(self, denoiser: denoisers.Denoiser, batch: int) -> None:
        super().__init__()
        to_pyro_module_(denoiser)  # so that weights are named by their place in the model
        self.denoiser, self.batch = denoiser, batch

    def forward(
        self, x: Tensor, view: Callable[[denoisers.Denoiser], Diffusion | ProbabilityFlow]
    ) -> Tensor:
        """The program."""
        site = view(self.denoiser)  # here the weights are drawn: before the plate
        with pyro.plate("data", len(x), subsample_size=min(self.batch, len(x))) as index:
            return pyro.sample("x", site, obs=x[index])


def train(data: Tensor, args: argparse.Namespace) -> tuple[Model, AutoNormal]:
    """Fit parameters and the posterior of the last layer."""
    pyro.clear_param_store()
    model = Model(denoiser(args.width), args.batch)
    guide = AutoNormal(model, init_scale=0.01)
    scaled = poutine.scale(model, 1 / len(data)), poutine.scale(guide, 1 / len(data))
    guide(data, chain)
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.05 ** (1 / args.steps)})
    svi = SVI(*scaled, optimizer, Trace_ELBO())
    for _ in trange(args.steps, desc="training", disable=not args.progress):
        svi.step(data, chain)
    return model, guide


def log_densities(model: Model, guide: AutoNormal, points: Tensor, draws: int) -> Tensor:
    """log p(x | weights) of every point under weights from the posterior, (draws, points)."""
    rows = []
    model.batch = len(points)
    with torch.no_grad():
        for _ in range(draws):
            drawn = poutine.replay(model, poutine.trace(guide).get_trace(points, flow))
            site = poutine.trace(drawn).get_trace(points, flow).nodes["x"]
            rows.append(site["fn"].log_prob(points))
    return torch.stack(rows)


def draw(results: dict[str, dict[str, Tensor]], axis: Tensor) -> Figure:
    """Spread of the log-density over the plane, with the points that it was learned from."""
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (name, result) in zip(panels, results.items(), strict=True):
        spread = result["map"].std(0).reshape(len(axis), len(axis)).T.numpy()
        image = ax.pcolormesh(
            axis.numpy(), axis.numpy(), spread, vmin=0, vmax=2, cmap="viridis", rasterized=True
        )
        ax.scatter(
            *result["data"][:500].T.numpy(), s=4, color="white", edgecolors="tab:blue", lw=0.3
        )
        ax.set(title=name, aspect="equal", xlabel="first coordinate")
    panels[0].set_ylabel("second coordinate")
    figure.colorbar(image, ax=panels, label="sd of the log-density (nats)", extend="max")
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/bayesian_last_layer"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, nargs="+", default=[100, 5000], help="to learn from")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--draws", type=int, default=16, help="of weights")
    parser.add_argument("--cells", type=int, default=40, help="of the picture's side")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    test, axis = moons(500, 1000 + args.seed), torch.linspace(-2.5, 2.5, args.cells)
    metrics, results = {}, {}
    for count in args.points:
        pyro.set_rng_seed(args.seed)
        data = moons(count, args.seed)
        model, guide = train(data, args)
        held_out = log_densities(model, guide, test, args.draws)
        spread = log_densities(model, guide, torch.cartesian_prod(axis, axis), args.draws)
        results[f"{count} points"] = {"map": spread, "data": data}
        metrics[f"{count} points"] = row = {
            "held_out": float(held_out.logsumexp(0).mean() - torch.tensor(args.draws).log()),
            "one_draw": float(held_out.mean()),
            "spread": float(held_out.std(0).median()),
        }
        print(f"{count} points:", ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    draw(results, axis).savefig(args.out / "spread.png", dpi=120, bbox_inches="tight")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
