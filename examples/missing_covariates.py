"""A regression by group on covariates with holes, whose prior is a diffusion trained on complete rows.

    x ~ Diffusion(...)                          ten measurements, the prior of missing_data.py
    y ~ Normal(x, sd)                           readings of six of them
    centre, spread ~ ...                        of the slopes over groups
    slope_g ~ Normal(centre, spread)
    outcome ~ Normal(x[regressors] @ slope_g, noise)

Particle Gibbs draws all latents jointly, by plain MCMC. Beside it stands a long chain of NUTS on the slopes
alone, for which every row is summed over draws of its readings' posterior by many particles.

Run: python examples/missing_covariates.py
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import missing_data
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from missing_data import Table
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_diffusion import ProgramLikelihood, TwistedSMC, infer

REGRESSORS = [1, 4, 6]  # texture, smoothness, concavity
GROUPS = 4
CENTRE, SPREAD, NOISE = (0.5, -0.5, 1.0), 0.4, 0.3  # that outcomes are simulated with
Draws = dict[str, Tensor]


class Problem(NamedTuple):
    """Readings (rows, 10) with NaN, their sd by column, and the outcome and group of every row."""

    prior: Any
    table: Table
    y: Tensor
    sd: Tensor
    outcome: Tensor
    group: Tensor


def slopes() -> tuple[Tensor, Tensor]:
    """Latents of the regression: slopes by group (groups, regressors), and the noise scale."""
    size = len(REGRESSORS)
    centre = pyro.sample("centre", dist.Normal(torch.zeros(size), 1.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.5))
    beta = pyro.sample("beta", dist.Normal(centre, spread).expand([GROUPS, size]).to_event(2))
    return beta, pyro.sample("noise", dist.LogNormal(-1.0, 0.5))


def program(at: Problem) -> Callable[[], None]:
    """The whole model: covariates, their readings, and outcomes."""

    def model() -> None:
        beta, noise = slopes()
        with pyro.plate("rows", len(at.y)):
            x = pyro.sample("x", at.prior)
            pyro.sample("y", dist.NanMaskedNormal(x, at.sd).to_event(1), obs=at.y)
            mean = (at.table.standardized(x)[..., REGRESSORS] * beta[..., at.group, :]).sum(-1)
            pyro.sample("outcome", dist.Normal(mean, noise), obs=at.outcome)

    return model


def simulate(prior: Any, table: Table, args: argparse.Namespace) -> tuple[Problem, Tensor]:
    """Outcomes of real rows under known slopes, and those (columns of :func:`latents`)."""
    rows = table.test[: args.rows]
    y, sd = missing_data.readings(rows, table, args)
    group = torch.arange(len(rows)) % GROUPS
    beta = torch.tensor(CENTRE) + SPREAD * torch.randn(GROUPS, len(REGRESSORS))
    mean = (table.standardized(rows)[:, REGRESSORS] * beta[group]).sum(-1)
    outcome = mean + NOISE * torch.randn_like(mean)
    logs = torch.tensor([SPREAD, NOISE]).log()
    truth = torch.cat([torch.tensor(CENTRE), beta.flatten(), logs])
    return Problem(prior, table, y, sd, outcome, group), truth


def by_gibbs(at: Problem, args: argparse.Namespace) -> Draws:
    """Draws of all latents of the program by particle Gibbs."""
    kernel = infer.ParticleGibbs(
        program(at),
        num_particles=args.gibbs_particles,
        others=functools.partial(NUTS, max_tree_depth=5),
        others_steps=2,
    )
    mcmc = MCMC(kernel, args.sweeps, args.warmup, disable_progbar=not args.progress)
    mcmc.run()
    draws: Draws = mcmc.get_samples()
    moved = (draws.pop("x").diff(dim=0) != 0).any(-1).double().mean()
    print(f"particle Gibbs: a row moved in {100 * float(moved):.0f} % of sweeps")
    return draws


def by_particles(at: Problem, args: argparse.Namespace) -> Draws:
    """The reference: NUTS on the slopes, every row summed over particles of its readings' posterior.

    p(outcome | slopes, y) is the mean of p(outcome | x, slopes) over x given y.
    """
    likelihood = ProgramLikelihood(missing_data.by_nan(at.prior, at.sd), (at.y,))
    smc = TwistedSMC(likelihood.prior, likelihood, num_particles=args.reference_particles)
    x = at.table.standardized(smc.run().sample((args.reference_draws,)))[..., REGRESSORS]

    def model() -> None:
        beta, noise = slopes()
        log_p = dist.Normal((x * beta[at.group]).sum(-1), noise).log_prob(at.outcome)
        pyro.factor("outcome", (log_p.logsumexp(0) - math.log(len(x))).sum())

    kernel = NUTS(model, max_tree_depth=5)
    warmup = args.reference_sweeps // 4
    mcmc = MCMC(kernel, args.reference_sweeps, warmup, disable_progbar=not args.progress)
    mcmc.run()
    draws: Draws = mcmc.get_samples()
    return draws


def latents(draws: Draws) -> Tensor:
    """Draws of all latents but the rows side by side, scales by their logs."""
    logs = [draws[name].log().unsqueeze(-1) for name in ("spread", "noise")]
    return torch.cat([draws["centre"], draws["beta"].flatten(1), *logs], -1).double()


def names() -> list[str]:
    """Of the columns of :func:`latents`."""
    size = len(REGRESSORS)
    of_slopes = [f"slope {g}.{j}" for g in range(GROUPS) for j in range(size)]
    return [*(f"centre {j}" for j in range(size)), *of_slopes, "log spread", "log noise"]


def size(draws: Tensor) -> Tensor:
    """Effective sample size of every column, at least 1."""
    if len(draws) < 4:
        return torch.ones(draws.shape[1], dtype=draws.dtype)
    return effective_sample_size(draws.unsqueeze(0)).nan_to_num(1.0).clamp(1, len(draws))


def compare(gibbs: Tensor, long: Tensor, truth: Tensor) -> dict[str, Any]:
    """Print means and sds of both chains, with errors of their differences, and return them."""
    mean, other = gibbs.mean(0), long.mean(0)
    sd, scale = (draws.std(0).clamp(min=1e-6) for draws in (gibbs, long))  # one may not have moved
    gap, ratio = (mean - other) / scale, sd / scale
    error = (sd.square() / size(gibbs) + scale.square() / size(long)).sqrt() / scale
    print(f"\n{'':<12} {'truth':>7} {'Gibbs':>8} {'sd':>6} {'long':>8} {'sd':>6} ", end="")
    print(f"{'gap/sd':>7} {'s.e.':>6} {'ESS':>6}")
    for name, *row in zip(
        names(), truth, mean, sd, other, scale, gap, error, size(gibbs), strict=True
    ):
        figures = [float(v) for v in row]
        line = "{:<12} {:>7.2f} {:>8.3f} {:>6.3f} {:>8.3f} {:>6.3f} {:>7.2f} {:>6.2f} {:>6.0f}"
        print(line.format(name, *figures))
    found = {
        "rms_gap": float(gap.square().mean().sqrt()),
        "rms_gap_error": float(error.square().mean().sqrt()),
        "sd_ratio": float(ratio.log().mean().exp()),
        "truths_within_2_sd": float(((mean - truth).abs() < 2 * sd).double().mean()),
    }
    print(
        f"\nmeans differ by {found['rms_gap']:.3f} posterior sds (root mean square), where Monte Carlo "
        f"errors alone give {found['rms_gap_error']:.3f};\nsds of Gibbs are {found['sd_ratio']:.3f} of the "
        f"long chain's (geometric mean); truths within 2 sds: {100 * found['truths_within_2_sd']:.0f} %"
    )
    columns = {"gap": gap, "gap_error": error, "ess": size(gibbs), "mean": mean, "sd": sd}
    return {**found, **{name: value.tolist() for name, value in columns.items()}}


def draw(gibbs: Tensor, long: Tensor, truth: Tensor) -> Figure:
    """Means and 95 % intervals of both chains, and the truths."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    ax, places = figure.subplots(), torch.arange(len(truth))
    chains = {"particle Gibbs": (gibbs, -0.12), "long chain": (long, 0.12)}
    for name, (draws, shift) in chains.items():
        bars = 2 * draws.std(0)
        ax.errorbar(places + shift, draws.mean(0), bars, fmt="o", ms=3.5, lw=1, label=name)
    ax.plot(places, truth, "_", color="black", ms=16, label="truth")
    ax.set_xticks(places, names(), rotation=60, ha="right", fontsize=8)
    ax.set_ylabel("mean and 2 sds")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/missing_covariates")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    folder = Path("results/missing_data")
    parser.add_argument("--prior", type=Path, default=folder, help="folder of missing_data.py")
    parser.add_argument("--prior-settings", default="", help="arguments of missing_data.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", type=int, default=24, help="steps of the chain")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4, help="missing entries of a row")
    parser.add_argument("--sd", type=float, default=0.05, help="of the readings, column sds")
    parser.add_argument("--sweeps", type=int, default=160, help="of particle Gibbs")
    parser.add_argument("--warmup", type=int, default=80, help="sweeps; the step size freezes then")
    parser.add_argument("--gibbs-particles", type=int, default=12, help="in a sweep")
    parser.add_argument("--reference-particles", type=int, default=512, help="of every row")
    parser.add_argument(
        "--reference-draws", type=int, default=500, help="that rows are summed over"
    )
    parser.add_argument("--reference-sweeps", type=int, default=500, help="of NUTS")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    table = missing_data.load()
    settings = ["--no-progress", "--out", str(args.prior), "--chain", str(args.chain)]
    settings += args.prior_settings.split()
    prior = missing_data.trained(table, missing_data.parse(settings))
    pyro.set_rng_seed(args.seed + 2)
    at, truth = simulate(prior, table, args)
    long = latents(by_particles(at, args))
    gibbs = latents(by_gibbs(at, args))
    metrics = compare(gibbs, long, truth)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    draw(gibbs, long, truth).savefig(args.out / "slopes.png", dpi=150)
    print(f"the figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
