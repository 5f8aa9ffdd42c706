"""Posteriors of models without any diffusion: a stock guide, corrected by particles, with evidence.

    eight schools   y_j ~ Normal(theta_j, sigma_j), theta_j ~ Normal(mu, tau): do the schools differ?
    funnel          x_0 ~ Normal(0, 3), x_1 ... x_9 ~ Normal(0, exp(x_0 / 2)): known, and hard

1. AutoMultivariateNormal is fitted by plain SVI; AnnealedSMC takes particles from it to the posterior.
2. The evidence of eight schools against that of one effect for all, which is known in closed form.
3. Both bounds of the funnel's evidence (ln 1): the gap shows what the ELBO hides.

Run: python examples/any_guide.py
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import trange

from pyro_diffusion.evaluate import bracket_evidence
from pyro_diffusion.infer import AnnealedSMC, UnreliableWarning

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools() -> None:
    """Effects of coaching in eight schools (Rubin, 1981), around a mean of their own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * raw, SIGMA), obs=Y)


def pooled() -> float:
    """Log evidence of one effect for all: mu ~ Normal(0, 5), y_j ~ Normal(mu, sigma_j)."""
    covariance = torch.full((8, 8), 25.0) + SIGMA.square().diag()
    return float(dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(Y))


def funnel() -> None:
    """A flat site times the target's density: no data, evidence 1."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (10,)))
    wide = dist.Normal(0.0, (x[0] / 2).exp()).log_prob(x[1:]).sum()
    pyro.factor("target", dist.Normal(0.0, 3.0).log_prob(x[0]) + wide)


def funnel_draws(count: int) -> Tensor:
    first = 3 * torch.randn(count, 1)
    return torch.cat([first, (first / 2).exp() * torch.randn(count, 9)], -1)


def fit(model: Callable[[], None], steps: int, progress: bool) -> AutoGuide:
    """A stock guide; a flat prior has no draws to start from, and is given a value."""
    pyro.clear_param_store()

    def start(site: Any) -> Tensor:
        transform = torch.distributions.biject_to(site["fn"].support)
        return transform(torch.zeros(site["fn"].batch_shape + site["fn"].event_shape))

    guide = AutoMultivariateNormal(model, init_loc_fn=start)
    decay = 0.1 ** (1 / steps)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.02, "lrd": decay}), Trace_ELBO())
    for _ in trange(steps, desc=model.__name__, disable=not progress):
        svi.step()
    return guide


def draw(theta: Tensor, tau: Tensor, x: dict[str, Tensor]) -> Figure:
    """Effects against tau, and the funnel of the guide, of particles, and of exact draws."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    for j in (0, 2, 6):
        left.plot(tau, theta[:, j], ".", ms=2, alpha=0.5, label=f"school {j + 1}: {int(Y[j])} read")
    left.set(xlabel="tau", ylabel="effect", xlim=(0, 20), ylim=(-20, 40))
    left.legend(markerscale=5, fontsize=8)
    shifts = dict(zip(x, (-30, 0, 30), strict=True))
    for name, values in x.items():
        inside = values[:, 1].abs() < 14
        right.plot(values[inside, 1] + shifts[name], values[inside, 0], ".", ms=2, alpha=0.5)
        right.text(shifts[name], 10, name, ha="center", fontsize=9)
    right.set(xticks=[], xlabel="x_1", ylabel="x_0", ylim=(-10, 12))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="of SVI, each model")
    parser.add_argument("--particles", type=int, default=256, help="of each of eight repeats")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("out/any_guide"))
    args = parser.parse_args()
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    # What speaks against a run is printed with it below.
    warnings.simplefilter("ignore", UnreliableWarning)

    found = AnnealedSMC(schools, fit(schools, args.steps, args.progress), args.particles).run()
    evidence, apart = found.log_evidence, pooled()
    print(f"eight schools: {found}\n  guide's ELBO {found.elbo}")
    print(f"  log evidence of one effect for all {apart:.3f} (exact)\n")
    drawn = found.sample(args.samples)
    theta = drawn["mu"][:, None] + drawn["tau"][:, None] * drawn["raw"]

    guide = fit(funnel, args.steps, args.progress)
    narrow = AnnealedSMC(funnel, guide, args.particles).run()
    exact = funnel_draws(args.samples)
    bracket = bracket_evidence(funnel, guide, {"x": exact})
    print(f"funnel: {narrow}\n\nbounds of ln 1 = 0, from exact draws:\n{bracket}")
    with torch.no_grad():
        guided = torch.stack([guide()["x"] for _ in range(args.samples)])
    clouds = {"guide": guided, "particles": narrow.sample(args.samples)["x"], "exact": exact}
    for name, x in clouds.items():
        print(f"  sd(x_0) of {name:<10} {float(x[:, 0].std()):.2f}")

    draw(theta, drawn["tau"], clouds).savefig(args.out / "any_guide.png", dpi=150)
    metrics = {
        "schools": {"log_evidence": evidence.value, "error": evidence.standard_error},
        "pooled": apart,
        "elbo": found.elbo.value,
        "mean": {"mu": float(drawn["mu"].mean()), "tau": float(drawn["tau"].mean())},
        "funnel": {
            "elbo": bracket.elbo.value,
            "log_evidence": narrow.log_evidence.value,
            "sd": {name: float(x[:, 0].std()) for name, x in clouds.items()},
        },
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
