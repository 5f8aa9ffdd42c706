"""A density of a table's rows: fitted, scored in the columns' own units, compared and looked at.

    x ~ Diffusion(...), of zero mean and unit variance, perhaps whitened
    row = mean + L x, a TransformedDistribution whose Jacobian is in every score

The flow's density of held-out rows stands beside the bound of the same network and a Gaussian mixture, paired
row by row. What `build` and `fit` do is a recipe for any table: benchmarks/tabular.py takes them from here.

Run: python examples/table.py
     python examples/table.py --data FILE.csv
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_diffusion import (
    MLP,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LogLinear,
    ProbabilityFlow,
    evaluate,
    plotting,
    schedules,
)
from pyro_diffusion.train import Trainer
from pyro_diffusion.train.history import History

Noise = Callable[[Tensor], Tensor]


class Table(NamedTuple):
    """Rows in the columns' own units, and the moments of the training rows."""

    names: list[str]
    train: Tensor
    validation: Tensor
    test: Tensor
    scale: Tensor  # standard deviations of the columns
    units: LowerCholeskyAffine  # from what a model sees to the columns' own units

    def standardized(self, rows: Tensor) -> Tensor:
        """Of zero mean and unit variance on the training rows, whitened if that was asked for."""
        return self.units.inv(rows)

    def noise(self, size: float) -> Noise:
        """Adds fresh noise of that many standard deviations of every column to standardized rows."""
        factor = torch.linalg.solve_triangular(
            self.units.scale_tril, size * self.scale.diag(), upper=False
        )
        return lambda rows: rows + torch.randn_like(rows) @ factor.mT.to(rows)


def split(
    rows: Tensor, names: list[str], test: Tensor | None = None, whiten: bool = False
) -> Table:
    """Shuffled rows, a tenth of them for choices; a fifth to report, if those are not given."""
    rows = rows[torch.as_tensor(np.random.default_rng(0).permutation(len(rows)))]
    if test is None:
        test, rows = rows.tensor_split([len(rows) // 5])
    validation, train = rows.tensor_split([len(rows) // 10])
    # a column that is constant has no scale; nor has it a density
    scale = train.std(0)
    if not bool((scale > 0).all()):
        constant = [name for name, each in zip(names, scale, strict=True) if not each > 0]
        raise ValueError(f"data: got constant columns {constant}, expected columns that vary")
    factor, failed = torch.linalg.cholesky_ex(train.mT.cov()) if whiten else (scale.diag(), 0)
    if failed:
        raise ValueError(
            f"data: got a column that those before it determine ({names[int(failed) - 1]}), or fewer rows "
            "than columns, expected a covariance that can be inverted, or --no-whiten"
        )
    return Table(names, train, validation, test, scale, LowerCholeskyAffine(train.mean(0), factor))


def load(path: Path | None, whiten: bool) -> Table:
    """The numeric columns of a CSV file, or ten measurements of scikit-learn's breast cancer data."""
    if path is None:
        data = load_breast_cancer()
        frame = pd.DataFrame(data.data[:, :10], columns=data.feature_names[:10])
    else:
        whole = pd.read_csv(path)
        columns = whole.select_dtypes("number")
        frame = columns.dropna()
        if left := [str(name) for name in whole.columns if name not in columns]:
            print(f"{path}: without the columns {', '.join(left)}, which are no numbers")
        if len(frame) < len(whole):
            print(
                f"{path}: without {len(whole) - len(frame)} of {len(whole)} rows, which miss a number"
            )
        if len(frame) < 20 or frame.shape[1] == 0:
            raise ValueError(
                f"{path}: got {len(frame)} rows of {frame.shape[1]} numeric columns without missing numbers, "
                "expected 20 rows or more"
            )
    names = [str(name).removeprefix("mean ") for name in frame.columns]
    return split(torch.tensor(frame.to_numpy(np.float64)), names, whiten=whiten)


def build(columns: int, width: int = 256, dropout: float = 0.0) -> GaussianDenoiser:
    """A perceptron that sees sines and cosines of every standardized column."""
    network = MLP(columns, (width,) * 3, dropout=dropout, frequencies=(1, 2, 4, 8, 16), norm=True)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(12.0, -8.0)))


def chain(denoiser: GaussianDenoiser) -> Diffusion:
    """A thousand steps, short where the score of a table is hard and long where it is nearly linear."""
    schedule = denoiser.process.schedule
    times = schedules.focused_log_snr(schedule, 1000, centre=5.0, width=4.0)
    return Diffusion(denoiser, (denoiser.network.event_size,), times=times)


def bound(
    denoiser: GaussianDenoiser, rows: Tensor, terms: int = 32
) -> evaluate.LogLikelihoodEstimate:
    """The bound of standardized rows; by one seed, so that two networks are scored by the same noise."""
    return evaluate.log_likelihood(chain(denoiser), rows, num_terms=terms, seed=0)


def fit(
    denoiser: GaussianDenoiser,
    train: Tensor,
    validation: Tensor,
    noise: Noise,
    steps: int,
    done: Callable[[int], float] | None = None,
    validate_every: int | None = None,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    batch: int = 512,
    progress: bool = False,
) -> History:
    """Fit to standardized rows; the denoiser keeps the averaged weights that were best on validation.

    Args:
        denoiser: fresh.
        train: rows to train on, standardized, as the others.
        validation: rows to stop by: after five checks without a better one.
        noise: puts fresh noise on the rows of every step. Numbers that were rounded have a density only with
            noise, and it keeps a small table from being learned by heart.
        steps: at most.
        done: the part of the run, 0 to 1, that is over after so many steps; that of ``steps`` by default.
        validate_every: steps between checks.
        lr: learning rate at its height, from which it falls to 0 along a cosine.
        weight_decay: of AdamW.
        batch: rows of a step.
        progress: whether to show a bar.
    """
    over = done or (lambda step: step / steps)
    held = noise(validation[:1000])

    def model(rows: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("rows", len(rows)):
            pyro.sample("x", chain(denoiser), obs=noise(rows))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(over(step), 1.0)))

    adam = partial(
        torch.optim.AdamW, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )
    cosine = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=rate)
    trainer = Trainer(model, optimizer=adam, schedule=cosine, clip_norm=1.0)
    history = trainer.fit(
        train,
        steps=steps,
        batch_size=min(batch, len(train)),
        validation=lambda: -bound(denoiser, held).mean.value,
        validate_every=validate_every,
        patience=5,
        callback=lambda trainer: over(trainer.step) >= 1,
        progress=progress,
    )
    denoiser.requires_grad_(False)
    return history


def mixture(table: Table, rows: Tensor, noise: float, sizes: list[int]) -> tuple[str, Tensor]:
    """Log-densities of rows by the Gaussian mixture whose number of components is best on validation."""
    held = table.validation + noise * table.scale * torch.randn_like(table.validation)
    train, validation, test = (
        (each.double() / table.scale).numpy() for each in (table.train, held, rows)
    )
    fits = [
        GaussianMixture(k, reg_covar=noise**2, n_init=3, random_state=0).fit(train) for k in sizes
    ]
    best = max(fits, key=lambda each: each.score(validation))
    log_p = torch.from_numpy(best.score_samples(test)) - table.scale.log().sum()
    return f"Gaussian mixture of {best.n_components}", log_p


def likelihoods(
    denoiser: GaussianDenoiser, table: Table, args: argparse.Namespace
) -> dict[str, evaluate.LogLikelihoodEstimate]:
    """Of the test rows, with the same noise for every model, in the columns' own units."""
    rows = table.test + args.noise * table.scale * torch.randn_like(table.test)
    units = [
        LowerCholeskyAffine(*(each.float() for each in (table.units.loc, table.units.scale_tril)))
    ]
    rows = rows.float()
    columns = len(table.names)
    flow = dist.TransformedDistribution(ProbabilityFlow(denoiser, (columns,)), units)
    steps = dist.TransformedDistribution(chain(denoiser), units)
    name, log_p = mixture(table, rows, args.noise, args.components)
    zero = torch.zeros(len(rows))
    return {
        "diffusion, flow": evaluate.flow_log_likelihood(flow, rows),
        "diffusion, bound": evaluate.log_likelihood(steps, rows, num_terms=args.terms, seed=1),
        name: evaluate.LogLikelihoodEstimate(log_p, zero, "exact", 0, columns),
    }


def report(rows: dict[str, evaluate.LogLikelihoodEstimate]) -> dict[str, dict[str, float | str]]:
    """Print every model on the same rows, paired with the flow, and ArviZ's comparison."""
    print(
        f"\n{'log-likelihood of a test row':<30} {'nats':>8} {'s.e.':>7} {'to flow':>9} {'s.e.':>7}   kind"
    )
    metrics = {}
    first = next(iter(rows.values()))
    for name, row in rows.items():
        gap = row.value - first.value
        value, spread = float(row.value.mean()), float(row.value.std())
        figures = [value, spread, float(gap.mean()), float(gap.std())]
        figures[1::2] = [each / math.sqrt(len(gap)) for each in figures[1::2]]
        print("{:<30} {:>8.3f} {:>7.3f} {:>9.3f} {:>7.3f}   {}".format(name, *figures, row.kind))
        keys = ("value", "standard_error", "difference", "difference_error")
        metrics[name] = {**dict(zip(keys, figures, strict=True)), "kind": row.kind}
    exact = {name: evaluate.to_elpd(row) for name, row in rows.items() if row.kind == "exact"}
    print("\naz.compare of the two densities, summed over the rows:")
    print(az.compare(exact)[["elpd_diff", "dse", "weight"]].round(2).to_string())
    return metrics


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/table"), help="output folder")
    parser.add_argument("--data", type=Path, help="a CSV file; its numeric columns are taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whiten", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--noise", type=float, default=0.01, help="of every row, in column sds")
    parser.add_argument("--steps", type=int, default=2000, help="training steps, if not stopped")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--width", type=int, default=256, help="hidden units of each layer")
    parser.add_argument("--terms", type=int, default=256, help="of the bound, evaluated for a row")
    sizes = [1, 2, 3, 4, 6, 8, 12]
    parser.add_argument("--components", type=int, nargs="+", default=sizes, help="of the mixture")
    parser.add_argument("--shown", type=int, default=5, help="columns of the figure")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    table = load(args.data, args.whiten)
    pyro.set_rng_seed(args.seed)
    denoiser = build(len(table.names), args.width, args.dropout)
    train, validation = (table.standardized(r).float() for r in (table.train, table.validation))
    history = fit(
        denoiser,
        train,
        validation,
        table.noise(args.noise),
        args.steps,
        lr=args.lr,
        weight_decay=args.weight_decay,
        batch=args.batch,
        progress=args.progress,
    )
    best = history.validations[history.best_step]
    print(f"best on validation: step {history.best_step}, {best:.3f} nats a standardized row")
    metrics = report(likelihoods(denoiser, table, args))
    samples = table.units(chain(denoiser).sample((len(table.train),)).double())
    shown = slice(0, args.shown)
    figure = plotting.pair_plot(table.train[:, shown], samples[:, shown], table.names[shown])
    figure.savefig(args.out / "pairs.png", dpi=120)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"pairs.png and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
