"""Posterior of an epidemic's parameters from reported cases: a stochastic program without a likelihood.

    R0, days, start ~ LogNormal, share ~ Beta      infections per case, days of illness, first ill, reported
    new_t ~ Binomial(S_t, 1 - exp(-R0 I_t / (days N))),  well_t ~ Binomial(I_t, 1 - exp(-1 / days))
    cases_t ~ Poisson(share new_t + 0.1)           each day, of which some weeks are not reported

The guide is trained on runs of the program. Then it is asked about one epidemic with a missing week, beside a
particle filter's weights, and about 200 others: how often do its intervals hold the truth?

Run: python examples/epidemic.py
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import Predictive
from torch import Tensor, nn

from pyro_diffusion import evaluate
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.nn import SeriesEncoder
from pyro_diffusion.train import fit_amortized

PEOPLE, WEEKS = 10_000, 10
PRIOR = {
    "R0": dist.LogNormal(math.log(2.0), 0.3),
    "days": dist.LogNormal(math.log(6.0), 0.3),
    "start": dist.LogNormal(math.log(20.0), 0.5),
    "share": dist.Beta(2.0, 4.0),
}
LABELS = {
    "R0": "infections per case",
    "days": "days of illness",
    "start": "ill on the first day",
    "share": "share reported",
}
SPURIOUS = 0.1  # reports a day that are none
MISSING = 4  # the week without reports


def step(well: Tensor, ill: Tensor, R0: Tensor, days: Tensor) -> tuple[Any, Any]:
    """How many fall ill and how many recover in a day."""
    infection = -torch.expm1(-R0 * ill / (days * PEOPLE))
    recovery = -torch.expm1(-1 / days).expand_as(infection)
    return dist.Binomial(well, infection), dist.Binomial(ill, recovery)


def model(log_reports: Tensor | None = None, seen: Tensor | None = None) -> None:
    """Cases of ten weeks, as logarithms of one more than they are, 0 in weeks that are not seen."""
    R0, days, start, share = (pyro.sample(name, law) for name, law in PRIOR.items())
    ill = start.round().clamp(1, PEOPLE)
    well = PEOPLE - ill
    daily = []
    for day in range(7 * WEEKS):
        falling, recovering = step(well, ill, R0, days)
        new = pyro.sample(f"new_{day}", falling)
        ill = ill + new - pyro.sample(f"well_{day}", recovering)
        well = well - new
        daily.append(new)
    rate = share.unsqueeze(-1) * torch.stack(daily, -1) + SPURIOUS
    cases = pyro.sample("cases", dist.Poisson(rate).to_event(1))
    seen = pyro.sample("seen", dist.Bernoulli(torch.full((WEEKS,), 0.9)).to_event(1), obs=seen)
    there = seen.repeat_interleave(7, -1)
    pyro.sample("log_reports", dist.Delta(cases.log1p() * there, event_dim=1), obs=log_reports)


class Summary(nn.Module):
    """A summary of the reports and of which of them there are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SeriesEncoder(2, features=16, width=32)

    def forward(self, seen: Tensor, log_reports: Tensor) -> Tensor:
        """Of standardized values in the program's order, (N, weeks) and (N, days) -> (N, features)."""
        return self.encoder(torch.stack([log_reports, seen.repeat_interleave(7, -1)], -1))


@torch.no_grad()
def log_likelihood(theta: dict[str, Tensor], cases: Tensor, seen: Tensor, particles: int) -> Tensor:
    """A particle filter's estimate of log p(cases | theta), (n,); its exponential is unbiased."""
    R0, days, start, share = (theta[name].double().unsqueeze(-1) for name in PRIOR)
    shape = (len(start), particles)
    ill = start.round().clamp(1, PEOPLE).expand(shape)
    well = PEOPLE - ill
    total = torch.zeros(len(start), dtype=torch.float64)
    for day, count in enumerate(cases):
        falling, recovering = step(well, ill, R0, days)
        new = falling.sample()
        ill, well = ill + new - recovering.sample(), well - new
        if not seen[day // 7]:
            continue
        weights = dist.Poisson(share * new + SPURIOUS).log_prob(count)
        total += weights.logsumexp(-1) - math.log(particles)
        index = torch.multinomial(weights.softmax(-1), particles, replacement=True)
        ill, well = ill.gather(1, index), well.gather(1, index)
    return total


def by_particles(
    guide: AutoAmortized, data: dict[str, Tensor], cases: Tensor, args: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of the guide, and weights of a filter's likelihoods: right as their number grows."""
    theta = guide.draw(args.weighted, data)
    with torch.no_grad():
        proposed = guide.log_prob(theta, **data)
    prior = sum(law.log_prob(theta[name]) for name, law in PRIOR.items())
    likelihood = log_likelihood(theta, cases, data["seen"], args.particles)
    return theta, (likelihood + prior - proposed).softmax(0)


def moments(theta: dict[str, Tensor], weights: Tensor) -> dict[str, tuple[float, float]]:
    """Mean and sd of every logarithm."""
    found = {}
    for name, value in theta.items():
        u = value.double().log()
        mean = (weights * u).sum()
        found[name] = float(mean), float((weights * (u - mean).square()).sum().sqrt())
    return found


def compare(guide: AutoAmortized, drawn: Any, args: Any) -> tuple[dict[str, Any], Any]:
    """Both posteriors of one epidemic."""
    data = {"log_reports": drawn["log_reports"], "seen": drawn["seen"]}
    start = time.perf_counter()
    theta = guide.draw(args.draws, data)
    seconds = time.perf_counter() - start
    own = moments(theta, torch.full((args.draws,), 1 / args.draws, dtype=torch.float64))
    weighted, weights = by_particles(guide, data, drawn["cases"], args)
    exact = moments(weighted, weights)
    ess = float(1 / weights.square().sum())
    print(
        f"\none epidemic: {args.draws} draws in {seconds:.1f} s; a filter of {args.particles} particles"
    )
    print(f"weighs {args.weighted} of them, effective sample size {ess:.0f}")
    print(
        f"{'logarithm of':<12} {'truth':>6} {'guide':>14} {'particles':>14} {'off':>5} {'sd ratio':>8}"
    )
    rows = {}
    for name in PRIOR:
        (mean, sd), (at, wide) = own[name], exact[name]
        off = abs(mean - at) / wide
        print(
            f"{name:<12} {float(drawn[name].log()):>6.2f} {mean:>7.2f} +-{sd:>5.2f} {at:>7.2f} "
            f"+-{wide:>5.2f} {off:>5.2f} {sd / wide:>8.2f}"
        )
        rows[name] = {"off": off, "sd_ratio": sd / wide}
    found = {"posterior": rows, "ess": ess, "seconds": seconds}
    return found, (theta, (weighted, weights), drawn)


def coverage(guide: AutoAmortized, args: Any) -> dict[str, Any]:
    """How often central intervals hold the truth, of simulated epidemics with missing weeks at random."""
    found = evaluate.sbc(model, guide, num_simulations=args.datasets, num_samples=99)
    print(f"\n{args.datasets} epidemics: intervals that hold the truth, and p of uniform ranks")
    rows = {}
    for name in PRIOR:
        place = (found.ranks[name].double() + 0.5) / 100
        row = {"p": found.p_value(name)}
        text = f"{name:<6}"
        for level in (0.5, 0.9):
            share = float(((place - 0.5).abs() <= level / 2).double().mean())
            row[f"{level:.0%}"] = share
            text += (
                f"  {level:.0%}: {share:.3f} ({math.sqrt(level * (1 - level) / args.datasets):.3f})"
            )
        rows[name] = row
        print(f"{text}  p {row['p']:.2g}")
    return rows


def draw(parts: Any) -> Figure:
    """Posteriors beside the truth, and the band of cases that they predict."""
    theta, (weighted, weights), drawn = parts
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=[1, 1.5])
    for place, name in enumerate(PRIOR):
        ax = figure.add_subplot(grid[0, place])
        low, high = theta[name].quantile(0.002), theta[name].quantile(0.998)
        edges = torch.linspace(float(low), float(high), 30).numpy()
        own = ax.hist(theta[name].numpy(), edges, density=True, alpha=0.4, label="guide")
        exact = ax.hist(
            weighted[name].numpy(), edges, density=True, weights=weights.numpy(), histtype="step",
            color="black", label="particle filter",
        )  # fmt: skip
        truth = ax.axvline(float(drawn[name]), color="tab:red", lw=1.5, label="truth")
        ax.set_xlabel(LABELS[name])
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
    handles = [own[2][0], exact[2][0], truth]
    figure.legend(
        handles,
        ["guide", "particle filter", "truth"],
        loc="outside upper right",
        ncols=3,
        frameon=False,
    )
    ax = figure.add_subplot(grid[1, :])
    chosen = {name: value[:500] for name, value in theta.items()}
    with torch.no_grad():
        cases = Predictive(model, chosen, return_sites=["cases"], parallel=True)()["cases"]
    days = torch.arange(7 * WEEKS)
    for inner, shade in ((0.9, 0.2), (0.5, 0.4)):
        band = cases.quantile(torch.tensor([0.5 - inner / 2, 0.5 + inner / 2]), 0)
        ax.fill_between(
            days, *band, color="tab:blue", alpha=shade, lw=0, label=f"{inner:.0%} of predictions"
        )
    seen = drawn["seen"].repeat_interleave(7) > 0
    ax.plot(days[seen], drawn["cases"][seen], "k.", ms=4, label="reported")
    ax.plot(
        days[~seen], drawn["cases"][~seen], "o", mfc="none", mec="tab:red", ms=4, label="not given"
    )
    ax.set_xlabel("day")
    ax.set_ylabel("reported cases")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/epidemic"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=2000, help="of the posterior")
    parser.add_argument("--weighted", type=int, default=1000, help="of them by the filter")
    parser.add_argument("--particles", type=int, default=200)
    parser.add_argument("--datasets", type=int, default=200, help="whose coverage is told")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    truth = {"R0": 2.2, "days": 5.0, "start": 15.0, "share": 0.3}
    seen = torch.ones(WEEKS)
    seen[MISSING] = 0
    given = {name: torch.tensor(value) for name, value in truth.items()}
    trace = pyro.poutine.trace(pyro.poutine.condition(model, {**given, "seen": seen})).get_trace()
    drawn = {n: trace.nodes[n]["value"] for n in (*PRIOR, "cases", "seen", "log_reports")}
    start = time.perf_counter()
    guide = AutoAmortized(model, Summary(), observed=["log_reports", "seen"], latents=[*PRIOR])
    table = guide.simulate(args.simulations)
    simulated = time.perf_counter() - start
    size = min(128, args.simulations)
    fit_amortized(guide, table, steps=args.steps, batch_size=size, progress=args.progress)
    print(
        f"simulated in {simulated:.1f} s, trained in {time.perf_counter() - start - simulated:.0f} s"
    )
    metrics, parts = compare(guide, drawn, args)
    metrics["coverage"] = coverage(guide, args)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    draw(parts).savefig(args.out / "epidemic.png", dpi=150)
    print(f"figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
