"""Two moons: a diffusion model of points in the plane, trained in seconds by SVI.

A `Diffusion` at an observed site inside a plate, an empty guide, and held-out log-likelihoods with their
standard errors: the bound, the importance-weighted bound, a full-covariance Gaussian mixture, and the density
that the data were drawn from, which is known here.

Run: python examples/moons.py
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pyro.optim.clipped_adam import ClippedAdam
from sklearn.datasets import make_moons
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_diffusion import (
    MLP,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LearnedVariance,
    LogLinear,
    Trainer,
    evaluate,
    plotting,
    samplers,
)

NOISE = 0.08
# Constants, not statistics of the sample: every density below is that of (x - CENTRE) / SCALE.
CENTRE, SCALE = torch.tensor([0.5, 0.25]), torch.tensor([0.87, 0.5])


def moons(count: int, seed: int) -> Tensor:
    """Standardized points, (count, 2)."""
    points, _ = make_moons(count, noise=NOISE, random_state=seed)
    return (torch.tensor(points, dtype=torch.float32) - CENTRE) / SCALE


def true_likelihood(data: Tensor, points: int = 2000) -> evaluate.LogLikelihoodEstimate:
    """The density behind the data: normal noise around a uniform distribution on two half circles."""
    angle = torch.linspace(0, math.pi, points, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    curve = (torch.cat([upper, lower]) - CENTRE) / SCALE
    at_points = torch.distributions.Normal(curve, NOISE / SCALE.double())
    log_p = [
        at_points.log_prob(rows.double().unsqueeze(1)).sum(-1).logsumexp(1) - math.log(len(curve))
        for rows in data.split(256)
    ]
    return exact(torch.cat(log_p))


def mixture_likelihood(
    train: Tensor, validation: Tensor, data: Tensor, args: argparse.Namespace
) -> evaluate.LogLikelihoodEstimate:
    """The Gaussian mixture whose number of components is best on validation."""
    fits = [GaussianMixture(k, random_state=args.seed).fit(train) for k in args.components]
    best = max(fits, key=lambda fit: fit.score(validation))
    print(f"Gaussian mixture: {best.n_components} components, chosen on validation")
    return exact(torch.from_numpy(best.score_samples(data)))


def exact(log_p: Tensor) -> evaluate.LogLikelihoodEstimate:
    """Log-densities known without error."""
    return evaluate.LogLikelihoodEstimate(log_p.double(), torch.zeros(len(log_p)), "exact", 0, 2)


def train(data: Tensor, args: argparse.Namespace) -> tuple[Diffusion, list[float]]:
    """Fit by SVI; returns the model with averaged weights, and the loss of each step."""
    network = MLP(2, hidden=(args.width,) * 3, outputs=2)  # mean and variance of each coordinate
    denoiser = GaussianDenoiser(
        network, GaussianProcess(LogLinear(7, -7)), variance=LearnedVariance()
    )

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Diffusion(denoiser, (2,), steps=args.chain), obs=x)

    # The guide is empty: the chain's latent variables are inside the site.
    optimizer = partial(ClippedAdam, lr=args.lr, lrd=0.02 ** (1 / args.steps))
    history = Trainer(model, optimizer=optimizer, ema=0.99).fit(
        data, steps=args.steps, batch_size=args.batch, progress=args.progress
    )
    return Diffusion(denoiser, (2,), steps=args.chain, progress=args.progress), history.losses


def likelihoods(
    diffusion: Diffusion, data: Tensor, args: argparse.Namespace
) -> dict[str, evaluate.LogLikelihoodEstimate]:
    """Bounds of the chain and of a shorter one, and importance weighting on the shorter."""
    options = {"batch_size": len(data), "progress": args.progress}
    short = diffusion.replace(steps=args.short_chain)
    return {
        f"diffusion, {diffusion.steps} steps": evaluate.log_likelihood(
            diffusion, data, num_samples=8, **options
        ),
        f"diffusion, {short.steps} steps": evaluate.log_likelihood(
            short, data, num_samples=8, **options
        ),
        f"diffusion, {short.steps} steps, weighted": evaluate.importance_weighted(
            short, data, num_samples=args.samples, **options
        ),
    }


def report(
    rows: dict[str, evaluate.LogLikelihoodEstimate], truth: str
) -> dict[str, dict[str, float | str]]:
    """Print all models on the same points, paired with the truth, and return the figures."""
    print(
        f"\n{'held-out log-likelihood':<30} {'nats':>8} {'s.e.':>7} {'to truth':>9} {'s.e.':>7}   kind"
    )
    metrics = {}
    for name, row in rows.items():
        mean, gap = row.mean, row.value - rows[truth].value
        gap_error = float(gap.std()) / math.sqrt(len(gap))
        figures = (mean.value, mean.standard_error, float(gap.mean()), gap_error)
        print("{:<30} {:>8.4f} {:>7.4f} {:>9.4f} {:>7.4f}   {}".format(name, *figures, mean.kind))
        metrics[name] = {**vars(mean), "difference": figures[2], "difference_error": gap_error}
    weighted = next(row for row in rows.values() if row.ess is not None)
    unreliable = float((weighted.khat > 0.7).double().mean())
    print(f"weighted chains: median effective sample size {weighted.ess.median():.1f}, ", end="")
    print(f"k-hat above 0.7 for {unreliable:.1%} of the points")
    print(f"\nPaired table, summed over {len(weighted)} points:")
    table = evaluate.compare(rows)
    print(table[["elpd", "se", "elpd_diff", "dse", "kind"]].round(1).to_string())
    return metrics


def points_figure(data: Tensor, samples: Tensor) -> Figure:
    """Data and samples side by side, on one scale."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, title, points in zip(panels, ("data", "samples"), (data, samples), strict=True):
        ax.scatter(*points.T.numpy(), s=3, alpha=0.5, linewidths=0, color="tab:blue")
        ax.set(title=title, aspect="equal", xlabel="first coordinate")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="second coordinate", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
    return figure


def draw(
    diffusion: Diffusion,
    bound: evaluate.LogLikelihoodEstimate,
    losses: list[float],
    data: Tensor,
    args: argparse.Namespace,
) -> None:
    """Every figure, into the output folder."""
    noise = diffusion.denoiser.process.prior((2,)).expand((len(data),)).sample()
    states, record = samplers.base.recorder()
    with torch.no_grad():
        samplers.simulate(
            diffusion.denoiser,
            diffusion.times,
            noise,
            diffusion.sampler,
            progress=args.progress,
            callback=record,
        )
        samples = diffusion.decode(states[-1]).sample()
    shown = torch.linspace(0, diffusion.steps, 7).long()
    figures = {
        "samples": points_figure(data, samples),
        "trajectory": plotting.reverse_trajectory(
            torch.stack([states[j] for j in shown]), diffusion.times.flip(0)[shown]
        ),
        "bound_per_step": plotting.bound_per_step(
            bound.terms.log_snr,
            bound.terms.steps,
            bound.terms.steps_standard_error,
            axis="log_snr",
        ).figure,
        "loss": plotting.loss_curve(losses).figure,
        "schedule": plotting.schedule(diffusion.denoiser.process),
    }
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=120)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/moons"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=4000, help="points to train on")
    parser.add_argument("--held-out", type=int, default=1000, help="points of each held-out set")
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=96, help="hidden units of each layer")
    parser.add_argument("--chain", type=int, default=100, help="steps of the chain")
    parser.add_argument("--short-chain", type=int, default=30, help="steps to weight chains on")
    parser.add_argument("--samples", type=int, default=64, help="chains weighted for each point")
    components = [4, 8, 12, 16, 24, 32]
    parser.add_argument(
        "--components", type=int, nargs="+", default=components, help="sizes of Gaussian mixture"
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    # Three seeds of the generator of points: train, validation, test.
    data, validation, test = (
        moons(count, 3 * args.seed + part)
        for part, count in enumerate((args.points, args.held_out, args.held_out))
    )
    diffusion, losses = train(data, args)
    rows = likelihoods(diffusion, test, args)
    rows["Gaussian mixture"] = mixture_likelihood(data, validation, test, args)
    rows["the data's own density"] = true_likelihood(test)
    metrics = report(rows, truth="the data's own density")
    draw(diffusion, next(iter(rows.values())), losses, test, args)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"figures and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
