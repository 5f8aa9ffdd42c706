"""Missing entries of a table: a diffusion trained on complete rows as the prior of a row.

    x ~ Diffusion(...)                 ten measurements of a tumour, in their own units
    y ~ Normal(x, sd)                  readings of six of them

Four entries of every held-out row are hidden. One program states what is missing in each of Pyro's three
ways, and guides draw the entries; a Gaussian mixture, whose conditional is known exactly, stands beside.
missing_covariates.py goes on to a regression on such rows.

Run: python examples/missing_data.py
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.distributions.transforms import AffineTransform
from pyro.infer import SVI, Predictive, Trace_ELBO
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from torch import Tensor
from tqdm import trange

from pyro_diffusion import (
    EMA,
    MLP,
    AutoGuidance,
    AutoTwistedSMC,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LearnedVariance,
    LogLinear,
    ProgramLikelihood,
    checkpoint,
    optim,
)

COLUMNS = 10
TRAIN, VALIDATION = 349, 120  # of 569 rows; the other 100 are for testing
Model = Callable[..., None]
Prior = dist.TransformedDistribution


class Table(NamedTuple):
    """Rows in units of the columns' own, (rows, 10), and the moments of the training rows."""

    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    scale: Tensor

    def standardized(self, rows: Tensor) -> Tensor:
        """In standard deviations of the columns."""
        return (rows - self.mean) / self.scale


def load() -> Table:
    """The ten mean measurements of scikit-learn's breast cancer data, split at random."""
    rows = torch.tensor(load_breast_cancer().data[:, :COLUMNS], dtype=torch.float32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    train, validation, test = rows.tensor_split([TRAIN, TRAIN + VALIDATION])
    return Table(train, validation, test, train.mean(0), train.std(0))


def build(args: argparse.Namespace) -> GaussianDenoiser:
    """A perceptron that gives mean and variance of every standardized column."""
    network = MLP(COLUMNS, (args.width,) * 3, outputs=2, dropout=args.dropout)
    process = GaussianProcess(LogLinear(9.0, -8.0))
    return GaussianDenoiser(network, process, variance=LearnedVariance())


def row_prior(denoiser: GaussianDenoiser, table: Table, steps: int) -> Prior:
    """A diffusion of standardized columns, in the columns' own units."""
    units = AffineTransform(table.mean, table.scale, event_dim=1)
    return dist.TransformedDistribution(Diffusion(denoiser, (COLUMNS,), steps), [units])


def train(denoiser: GaussianDenoiser, table: Table, args: argparse.Namespace) -> None:
    """Fit to complete rows by SVI; the denoiser keeps the averaged weights."""

    def model(rows: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        prior = row_prior(denoiser, table, 1000)  # built anew, for fresh noise at every step
        with pyro.plate("rows", len(rows)), poutine.scale(scale=1 / len(rows)):
            pyro.sample("x", prior, obs=rows)

    settings = {"lr": args.lr, "weight_decay": args.weight_decay}
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = optim.JointOptim(torch.optim.AdamW, settings, scheduler, {"T_max": args.steps})
    svi, ema = SVI(model, lambda rows: None, optimizer, Trace_ELBO()), EMA(denoiser, 0.998)
    for _ in trange(args.steps, desc="training", disable=not args.progress):
        svi.step(table.train[torch.randint(TRAIN, (args.batch,))])
        optimizer.step()
        ema.update()
    denoiser.load_state_dict(ema.average)


def trained(table: Table, args: argparse.Namespace) -> Prior:
    """The prior, its network from the checkpoint of these settings or trained now."""
    path = args.out / "checkpoint.safetensors"
    names = ("seed", "steps", "batch", "lr", "weight_decay", "dropout", "width")
    description = {name: vars(args)[name] for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    denoiser = build(args)
    if path.exists():
        denoiser.load_state_dict(checkpoint.load(path, description))
    else:
        train(denoiser, table, args)
        checkpoint.save(path, denoiser.state_dict(), description)
    denoiser.eval().requires_grad_(False)
    return row_prior(denoiser, table, args.chain)


# What is missing, in three ways; `y` is NaN there.


def by_mask(prior: Prior, sd: Tensor) -> Model:
    """A mask on the distribution."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, sd).mask(y.isfinite()).to_event(1), obs=y)

    return model


def by_obs_mask(prior: Prior, sd: Tensor) -> Model:
    """A site for each column, observed in some of the rows."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", prior)
            for j in range(COLUMNS):
                column, seen = y[:, j], y[:, j].isfinite()
                pyro.sample(f"y{j}", dist.Normal(x[..., j], sd[j]), obs=column, obs_mask=seen)

    return model


def by_nan(prior: Prior, sd: Tensor) -> Model:
    """NaN in the data, under the distribution that Pyro has for it."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.NanMaskedNormal(x, sd).to_event(1), obs=y)

    return model


WAYS = {".mask": by_mask, "obs_mask": by_obs_mask, "NaN": by_nan}


def readings(rows: Tensor, table: Table, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Noisy rows with ``args.hidden`` entries of each NaN, and the readings' sd by column."""
    sd = args.sd * table.scale
    hidden = torch.rand(rows.shape).argsort(1) < args.hidden
    return (rows + sd * torch.randn_like(rows)).masked_fill(hidden, math.nan), sd


class Mixture:
    """A Gaussian mixture of standardized rows, its size chosen on validation, and its exact conditionals."""

    def __init__(self, table: Table, sizes: list[int]) -> None:
        train, validation = (
            table.standardized(rows).double().numpy() for rows in (table.train, table.validation)
        )
        fits = [
            GaussianMixture(k, reg_covar=1e-4, n_init=3, random_state=0).fit(train) for k in sizes
        ]
        self.fit = max(fits, key=lambda fit: fit.score(validation))

    def conditional(self, y: Tensor, sd: float, draws: int) -> tuple[Tensor, Tensor]:
        """Mean (rows, 10), exact, and draws (draws, rows, 10) of x given standardized readings."""
        found = [self._row(row[row.isfinite()], row.isfinite(), sd, draws) for row in y.double()]
        means, drawn = zip(*found, strict=True)
        return torch.stack(means), torch.stack(drawn, 1)

    def _row(self, y: Tensor, seen: Tensor, sd: float, draws: int) -> tuple[Tensor, Tensor]:
        """Each component conditioned as a normal is, weighted by its density of the readings."""
        weights, means, covariances = (
            torch.as_tensor(getattr(self.fit, name))
            for name in ("weights_", "means_", "covariances_")
        )
        marginal = covariances[:, seen][:, :, seen] + sd**2 * torch.eye(len(y)).double()
        gain = torch.linalg.solve(marginal, covariances[:, seen]).mT
        evidence = dist.MultivariateNormal(means[:, seen], marginal).log_prob(y)
        means = means + (gain @ (y - means[:, seen]).unsqueeze(-1)).squeeze(-1)
        covariances = covariances - gain @ covariances[:, seen]
        shares = (weights.log() + evidence).softmax(0)
        values, vectors = torch.linalg.eigh(covariances)
        factors = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        which = torch.multinomial(shares, draws, replacement=True)
        noise = torch.randn(draws, COLUMNS, 1, dtype=means.dtype)
        return shares @ means, means[which] + (factors[which] @ noise).squeeze(-1)


def impute(guide: Any, model: Model, y: Tensor, args: argparse.Namespace) -> Tensor:
    """Draws of the rows, (draws, rows, 10); the same seed for all guides and programs."""
    pyro.set_rng_seed(args.seed + 1)
    predictive = Predictive(
        model, guide=guide, num_samples=args.draws, parallel=True, return_sites=["x"]
    )
    drawn: Tensor = predictive(y)["x"]
    return drawn


def score(draws: Tensor, mean: Tensor, truth: Tensor, hidden: Tensor) -> dict[str, Any]:
    """Coverage of central 80 % intervals and squared error of hidden entries, by row and over all."""
    low, high = draws.quantile(torch.tensor([0.1, 0.9], dtype=draws.dtype), dim=0)
    count = hidden.sum(1)
    inside = ((truth >= low) & (truth <= high) & hidden).sum(1) / count
    square = ((mean - truth).square() * hidden).sum(1) / count
    error = float(inside.std()) / math.sqrt(len(inside))
    return {
        "coverage": float(inside.mean()),
        "coverage_error": error,
        "rmse": float(square.mean().sqrt()),
        "square": square,
    }


def report(rows: dict[str, dict[str, Any]], against: str) -> None:
    """Print the table, each method paired with one; the verdict."""
    print(f"\n{'':<28} {'coverage':>8} {'s.e.':>6} {'RMSE':>7} {'MSE - mixture':>14} {'s.e.':>7}")
    for name, row in rows.items():
        gap = row["square"] - rows[against]["square"]
        row["gap"], row["gap_error"] = float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))
        figures = (row["coverage"], row["coverage_error"], row["rmse"], row["gap"])
        print("{:<28} {:>8.3f} {:>6.3f} {:>7.3f} {:>14.4f}".format(name, *figures), end="")
        print(f" {row['gap_error']:>7.4f}")
    for name, row in rows.items():
        if name != against:
            covers = 0.75 <= row["coverage"] <= 0.85
            worse = row["gap"] > 2 * row["gap_error"]
            print(
                f"{name}: coverage {'within' if covers else 'NOT within'} [.75, .85], squared error "
                f"{'WORSE than' if worse else 'no worse than'} the mixture's"
            )


def imputation(prior: Prior, table: Table, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Figures of all methods, and what they draw."""
    y, sd = readings(table.test[: args.rows], table, args)
    mixture = Mixture(table, args.components)
    mean, draws = mixture.conditional(table.standardized(y), args.sd, args.draws)
    print(f"Gaussian mixture: {mixture.fit.n_components} components, chosen on validation")
    truth, hidden = table.standardized(table.test[: args.rows]).double(), y.isnan()
    rows, drawn = {"Gaussian mixture, exact": score(draws, mean, truth, hidden)}, {}
    for name, way in WAYS.items():
        model = way(prior, sd)
        drawn[name] = table.standardized(impute(AutoGuidance(model), model, y, args)).double()
        rows[f"AutoGuidance, {name}"] = score(drawn[name], drawn[name].mean(0), truth, hidden)
    model = by_nan(prior, sd)
    guide = AutoTwistedSMC(model, num_particles=args.particles)
    found = table.standardized(impute(guide, model, y, args)).double()
    mean = table.standardized(guide.particles.mean)
    rows[f"AutoTwistedSMC, {args.particles}"] = score(found, mean, truth, hidden)
    report(rows, "Gaussian mixture, exact")
    seen = [
        ProgramLikelihood(way(prior, sd), (y,)).log_prob(truth.float()) for way in WAYS.values()
    ]
    gap = max(float((each - seen[0]).abs().max()) for each in seen)
    print(f"the three programs' log-likelihoods of a row differ by {gap:.0e} nats at most")
    figures = {k: {n: v for n, v in row.items() if n != "square"} for k, row in rows.items()}
    return figures, (truth, hidden, draws, drawn["NaN"], found)


def draw(truth: Tensor, hidden: Tensor, *draws: Tensor) -> Figure:
    """Hidden entries against their posterior means and 80 % intervals, and coverage at every level."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = torch.linspace(0.05, 0.95, 19).double()
    names = ("Gaussian mixture", "AutoGuidance", "AutoTwistedSMC")
    for name, drawn in zip(names, draws, strict=True):
        ends = [drawn.quantile((1 + s * levels) / 2, dim=0) for s in (-1, 1)]
        inside = ((truth >= ends[0]) & (truth <= ends[1]))[:, hidden].double().mean(1)
        right.plot(levels, inside, "o-", ms=3, label=name)
    right.plot([0, 1], [0, 1], color="black", lw=0.8)
    right.set(xlabel="nominal coverage", ylabel="share of hidden entries covered")
    right.legend(frameon=False)
    shown, x = draws[1][:, hidden], truth[hidden]
    low, high = shown.quantile(torch.tensor([0.1, 0.9]).double(), dim=0)
    mean = shown.mean(0)
    bars = torch.stack([mean - low, high - mean]).clamp(min=0)
    left.errorbar(x, mean, bars, fmt="o", ms=2.5, lw=0.6, color="tab:orange", alpha=0.6)
    left.axline((0, 0), slope=1, color="black", lw=0.8)
    left.set(xlabel="hidden entry, column sds", ylabel="mean and 80 % interval, AutoGuidance")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/missing_data")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--width", type=int, default=128, help="hidden units of each layer")
    parser.add_argument("--chain", type=int, default=64, help="steps of the chain")
    parser.add_argument("--rows", type=int, default=100, help="test rows with missing entries")
    parser.add_argument("--hidden", type=int, default=4, help="missing entries of a row")
    parser.add_argument("--sd", type=float, default=0.05, help="of the readings, column sds")
    parser.add_argument("--draws", type=int, default=100, help="of every row")
    parser.add_argument("--particles", type=int, default=256, help="of AutoTwistedSMC")
    sizes = [1, 2, 3, 4, 6, 8]
    parser.add_argument("--components", type=int, nargs="+", default=sizes, help="of the mixture")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    table = load()
    prior = trained(table, args)
    pyro.set_rng_seed(args.seed)
    metrics, drawn = imputation(prior, table, args)
    draw(*drawn).savefig(args.out / "missing_data.png", dpi=150)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"the figure, metrics.json and the checkpoint are in {args.out}")


if __name__ == "__main__":
    main()
