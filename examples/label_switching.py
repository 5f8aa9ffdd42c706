"""How many clusters? Mixtures whose labels may be swapped, and their evidence.

    mu_k ~ Normal(0, 5), k = 1 ... K,   y_i ~ 1/K sum_k Normal(mu_k, 1)

The posterior of K means has K! modes, which are one another with the labels swapped. A stock guide finds one,
and its ELBO is short of the evidence by log K! where they are well apart.

1. A normal guide, fitted by SVI, for each K.
2. Particles from it, with bases ever wider until they find no more: all modes, and the log evidence, beside
   that by quadrature where K <= 3 allows one.
3. The guide's bounds of the evidence for K = 3, the upper one from draws with their labels permuted: the gap.

Run: python examples/label_switching.py
"""

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import trange

from pyro_diffusion.evaluate import bracket_evidence
from pyro_diffusion.infer import AnnealedSMC, UnreliableWarning

WIDTH, TRUE = 5.0, (-3.0, 0.0, 4.0)


def model(count: int, y: Tensor) -> None:
    """A mixture of so many normals of variance 1 with even weights, summed over the labels."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(count), WIDTH).to_event(1))
    parts = dist.Normal(mu, 1.0).log_prob(y.unsqueeze(-1))
    pyro.factor("y", (parts.logsumexp(-1) - math.log(count)).sum())


def fit(program: Callable[[], None], count: int, steps: int, progress: bool) -> AutoGuide:
    """A normal guide, started at the quantiles of nothing: small numbers in order."""
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(
        program,
        init_loc_fn=lambda site: torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1),
    )
    decay = 0.1 ** (1 / steps)
    svi = SVI(program, guide, ClippedAdam({"lr": 0.05, "lrd": decay}), Trace_ELBO())
    for _ in trange(steps, desc=f"{count} clusters", disable=not progress):
        svi.step()
    return guide


def quadrature(count: int, y: Tensor, points: int = 120) -> float:
    """Log evidence on a grid of the means: exact to all digits shown, for three of them at most."""
    line = torch.linspace(-12, 12, points, dtype=torch.float64)
    prior = dist.Normal(0.0, WIDTH).log_prob(line) + math.log(float(line[1] - line[0]))
    each = dist.Normal(line[:, None], 1.0).log_prob(y.double()).exp()
    total = []
    for rest in itertools.product(range(points), repeat=count - 1):
        density = (each + each[list(rest)].sum(0)) / count
        total.append((density.log().sum(-1) + prior).logsumexp(0) + prior[list(rest)].sum())
    return float(torch.stack(total).logsumexp(0))


def modes(mu: Tensor, weights: Tensor) -> Tensor:
    """Weight of each order of the means, (K!,)."""
    orders = list(itertools.permutations(range(mu.shape[-1])))
    order = mu.argsort(-1)
    here = torch.stack([(order == torch.tensor(o)).all(-1) for o in orders], -1)
    return weights @ here.double()


def permuted(mu: Tensor) -> Tensor:
    """Draws with their labels in random order: of the whole posterior if they are of one mode."""
    return mu.gather(-1, torch.rand_like(mu).argsort(-1))


def draw(guided: Tensor, found: Tensor, rows: dict[int, dict[str, Any]]) -> Figure:
    """Two of three means as guide and particles have them, and the evidence by number of clusters."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    *clouds, right = figure.subplots(1, 3)
    for axes, x, name in zip(clouds, (guided, found), ("guide", "particles"), strict=True):
        axes.plot(x[:, 0], x[:, 1], ".", ms=2, alpha=0.4)
        axes.set(title=name, xlabel="mean 1", ylabel="mean 2", xlim=(-6, 7), ylim=(-6, 7))
    counts = list(rows)
    right.plot(counts, [rows[k]["elbo"] for k in counts], "s--", label="guide's ELBO")
    errors = [2 * rows[k]["error"] for k in counts]
    right.errorbar(
        counts, [rows[k]["log_evidence"] for k in counts], errors, fmt="o-", label="particles"
    )
    best = max(row["log_evidence"] for row in rows.values())
    right.set(xlabel="clusters", ylabel="log evidence", xticks=counts, ylim=(best - 18, best + 3))
    right.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clusters", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", type=int, default=30, help="how many")
    parser.add_argument("--steps", type=int, default=1000, help="of SVI")
    parser.add_argument("--particles", type=int, default=128, help="of each of eight repeats")
    parser.add_argument("--widen", type=int, default=2)
    parser.add_argument("--points", type=int, default=120, help="of the quadrature, each dimension")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("out/label_switching"))
    args = parser.parse_args()
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    # What speaks against a run is printed with it.
    warnings.simplefilter("ignore", UnreliableWarning)
    y = torch.randn(args.data) + torch.tensor(TRUE)[torch.arange(args.data) % 3]

    rows: dict[int, dict[str, Any]] = {}
    clouds: tuple[Tensor, Tensor] | None = None
    print("clusters    ELBO   log evidence      exact    modes found (least, largest weight)")
    for count in args.clusters:
        program = partial(model, count, y)
        guide = fit(program, count, args.steps, args.progress)
        found = AnnealedSMC(program, guide, args.particles, widen=args.widen).run()
        evidence = found.log_evidence
        weights = modes(found.draws["mu"], found.log_weights.exp())
        exact = quadrature(count, y, args.points) if count <= 3 else math.nan
        with torch.no_grad():
            guided = torch.stack([guide()["mu"] for _ in range(args.samples)])
        mu = found.sample(args.samples)["mu"]
        bounds = bracket_evidence(program, guide, {"mu": permuted(mu)})
        print(
            f"{count:>8} {bounds.elbo.value:>8.2f}   {evidence.value:.2f} +- {evidence.standard_error:.2f} "
            f"{exact:>8.2f}    {int((weights > 0).sum())} of {len(weights)} ({float(weights.min()):.3f}, "
            f"{float(weights.max()):.3f})"
        )
        rows[count] = {
            "elbo": bounds.elbo.value,
            "eubo": bounds.eubo.value,
            "log_evidence": evidence.value,
            "error": evidence.standard_error,
            "exact": exact if count <= 3 else None,
            "weights": weights.tolist(),
            "believable": found.verdict.believable,
        }
        if count == 3:
            print(f"the guide of three clusters (log 3! = {math.log(6):.2f}):\n{bounds}")
            clouds = guided, mu
    if clouds is not None:
        draw(*clouds, rows).savefig(args.out / "label_switching.png", dpi=150)
    (args.out / "metrics.json").write_text(json.dumps(rows, indent=2))
    print(f"figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
