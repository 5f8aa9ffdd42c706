"""A posterior as the prior for the next data: a diffusion trained on draws of the first.

    x ~ Normal(0, 3 I)                      where I am, in the plane
    y_j ~ Normal(|x - A|, .3)               readings of the distance to a beacon A, then to another, B

One beacon leaves a ring, two beacons the two places where rings meet. The readings of A are put away before
those of B come:

1. Particles of the first posterior, from a stock guide.
2. A diffusion trained on them, and its probability flow, which has a density.
3. The flow as the prior of the second readings: particles again, and the evidence log p(second | first).
4. The same with one normal for the ring, and quadrature over the plane, which is exact.

Run: python examples/sequential_bayes.py
"""

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.reparam import TransformReparam
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

from pyro_diffusion import (
    MLP,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LogLinear,
    ProbabilityFlow,
    Trainer,
)
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import AnnealedSMC, UnreliableWarning

NOISE, WIDTH, READINGS = 0.3, 3.0, 4
BEACONS = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
TRUTH = torch.tensor([1.5, 2.0])


def distance(x: Tensor, beacon: int) -> Tensor:
    """(..., 1), of places (..., 2)."""
    return (x - BEACONS[beacon].to(x)).square().sum(-1, keepdim=True).sqrt()


def first(y: Tensor) -> None:
    """Readings of the first beacon, from anywhere."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), WIDTH).to_event(1))
    pyro.sample("y", dist.Normal(distance(x, 0), NOISE).to_event(1), obs=y)


def following(prior: Any, centre: Tensor, scale: Tensor, y: Tensor) -> None:
    """Readings of the second beacon, under a prior of standardized places."""
    x = centre + scale * pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(distance(x, 1), NOISE).to_event(1), obs=y)


def particles(model: Callable[[], None], steps: int, count: int, widen: int) -> Any:
    """From a normal guide after some steps of SVI: after none it is the prior, where that is N(0, I)."""
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_zero, init_scale=1.0)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.1 ** (1 / max(steps, 1))})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for _ in range(steps):
        svi.step()
    return AnnealedSMC(model, guide, count, widen=widen).run()


def init_to_zero(site: Any) -> Tensor:
    """The mean of all priors here."""
    return torch.zeros(site["fn"].batch_shape + site["fn"].event_shape)


def train(x: Tensor, args: argparse.Namespace) -> GaussianDenoiser:
    """A diffusion of draws, (n, 2)."""
    denoiser = GaussianDenoiser(
        MLP(2, hidden=(args.width,) * 3), GaussianProcess(LogLinear(10, -10))
    )

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("draws", len(x)):
            pyro.sample("x", Diffusion(denoiser, (2,), steps=100), obs=x)

    optimizer = partial(ClippedAdam, lr=2e-3, lrd=0.02 ** (1 / args.steps))
    trainer = Trainer(model, optimizer=optimizer, ema=0.99)
    trainer.fit(x, steps=args.steps, batch_size=args.batch, progress=args.progress)
    return denoiser.eval().requires_grad_(False)


def quadrature(y: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Both posteriors on a grid of the plane, the grid, and log p(second | first)."""
    line = torch.linspace(-8, 8, points, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    log_p = dist.Normal(0.0, WIDTH).log_prob(grid).sum(-1)
    steps = []
    for beacon in (0, 1):
        log_p = log_p + dist.Normal(distance(grid, beacon), NOISE).log_prob(y[beacon]).sum(-1)
        steps.append(log_p)
    evidence = float(steps[1].logsumexp(0) - steps[0].logsumexp(0))
    return steps[0].softmax(0), steps[1].softmax(0), grid, evidence


def moments(u: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of both coordinates, by weight."""
    mean = weights.double() @ u.double()
    return mean, (weights.double() @ (u.double() - mean).square()).sqrt()


def report(
    weights: list[Tensor],
    grid: Tensor,
    clouds: dict[str, tuple[int, Tensor]],
    after: dict[str, Any],
    exact: float,
) -> dict[str, Any]:
    """Print errors of moments and evidence, and return them."""
    metrics: dict[str, Any] = {"exact": exact}
    print(f"{'draws':<20} {'mean: errors / sd':>20} {'sd: ratio':>16}")
    for name, (which, values) in clouds.items():
        right = moments(grid, weights[which])
        mean, sd = moments(values, torch.full((len(values),), 1 / len(values)))
        errors, ratios = (mean - right[0]) / right[1], sd / right[1]
        shown = [" ".join(f"{float(v):7.3f}" for v in row) for row in (errors, ratios)]
        print(f"{name:<20} {shown[0]:>20} {shown[1]:>16}")
        metrics[name] = {"mean": errors.tolist(), "sd": ratios.tolist()}
    print(f"\nlog p(second | first): {exact:.3f} (quadrature)")
    for name, found in after.items():
        evidence = found.log_evidence
        print(f"  prior {name:<10} {evidence.value:.3f} +- {evidence.standard_error:.3f}")
        metrics[f"evidence, {name}"] = {
            "log_evidence": evidence.value,
            "error": evidence.standard_error,
        }
        for problem in found.verdict.problems:
            print(f"    {problem}")
    return metrics


def draw(weights: list[Tensor], grid: Tensor, clouds: dict[str, tuple[int, Tensor]]) -> Figure:
    """Clouds of draws over the exact density of the posterior that each is to be of."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    points = round(len(grid) ** 0.5)
    x, y = (grid[:, k].reshape(points, points) for k in (0, 1))
    for axes, (name, (which, u)) in zip(
        figure.subplots(1, len(clouds), sharey=True), clouds.items(), strict=True
    ):
        density = weights[which].reshape(points, points)
        levels = [float(density.max()) * f for f in (0.01, 0.1, 0.5)]
        axes.plot(u[:, 0], u[:, 1], ".", ms=1.5, alpha=0.4)
        axes.contour(x, y, density, levels=levels, colors="k", linewidths=0.8)
        axes.set(title=name, xlim=(-4, 4.4), ylim=(-4, 4), aspect="equal")
        axes.plot(*BEACONS.T, "r^", ms=5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of the diffusion's training")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--guide-steps", type=int, default=400, help="of SVI, each guide")
    parser.add_argument("--first-particles", type=int, default=384, help="of each of eight repeats")
    parser.add_argument("--particles", type=int, default=64, help="of each, under the new prior")
    parser.add_argument("--widen", type=int, default=1)
    parser.add_argument("--solver-steps", type=int, default=5, help="of the flow, of rk4")
    parser.add_argument("--points", type=int, default=400, help="of the quadrature, each dimension")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("out/sequential_bayes"))
    args = parser.parse_args()
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    # What speaks against a run would be in its verdict, which is printed.
    warnings.simplefilter("ignore", UnreliableWarning)
    y = torch.stack([distance(TRUTH, k) + NOISE * torch.randn(READINGS) for k in (0, 1)])

    before = particles(partial(first, y[0]), args.guide_steps, args.first_particles, args.widen)
    u = before.sample(args.first_particles * 8)["x"]
    centre, scale = u.mean(0), u.std(0)
    x = (u - centre) / scale
    solver = ODESolver("rk4", steps=args.solver_steps)
    flow = ProbabilityFlow(train(x, args), (2,), solver=solver, validate_args=False)
    root = torch.linalg.cholesky(x.mT.cov())
    priors = {
        "diffusion": poutine.reparam(following, config={"x": TransformReparam()}),
        "normal": following,
    }
    laws = {"diffusion": flow, "normal": dist.MultivariateNormal(torch.zeros(2), scale_tril=root)}
    after = {
        name: particles(partial(model, laws[name], centre, scale, y[1]), 0, args.particles, 0)
        for name, model in priors.items()
    }

    *weights, grid, exact = quadrature(y, args.points)
    with torch.no_grad():
        again = centre + scale * flow.sample((len(u),))
    clouds = {"particles, first": (0, u), "diffusion of these": (0, again)}
    for name, found in after.items():
        drawn = found.sample(len(u))
        if name == "diffusion":
            with torch.no_grad():
                drawn["x"] = flow.decode(drawn["x_base"])
        clouds[f"prior: {name}"] = 1, centre + scale * drawn["x"]

    metrics = report(weights, grid, clouds, after, exact)
    draw(weights, grid, clouds).savefig(args.out / "sequential_bayes.png", dpi=150)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
