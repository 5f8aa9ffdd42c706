"""Two moons: a diffusion model of points in the plane, trained in seconds by plain SVI.

A `Diffusion` at an observed site inside a plate, an empty guide, and held-out log-likelihoods with their standard
errors: the bound, the importance-weighted bound, full-covariance Gaussian mixtures, and the density that the
data were drawn from, which is known here.

Run: python examples/moons.py
"""

import argparse
import json
import math
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import make_moons
from sklearn.mixture import GaussianMixture
from torch import Tensor
from tqdm import trange

from pyro_diffusion import evaluate, plotting
from pyro_diffusion.denoisers import GaussianDenoiser, LearnedVariance
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.evaluate import Likelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.optim import EMA
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import recorder, simulate
from pyro_diffusion.schedules import Cosine

NOISE = 0.08
# Constants, not statistics of the sample: every density below is that of (x - CENTRE) / SCALE.
CENTRE, SCALE = torch.tensor([0.5, 0.25]), torch.tensor([0.87, 0.5])


def moons(count: int, seed: int) -> Tensor:
    """Standardized points, (count, 2)."""
    points, _ = make_moons(count, noise=NOISE, random_state=seed)
    return (torch.tensor(points, dtype=torch.float32) - CENTRE) / SCALE


def true_likelihood(data: Tensor, points: int = 2000) -> Likelihood:
    """The density behind the data: normal noise around a uniform law on two half circles."""
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


def mixture_likelihood(train: Tensor, validation: Tensor, data: Tensor, seed: int) -> Likelihood:
    """The Gaussian mixture whose number of components is best on validation."""
    fits = [GaussianMixture(k, random_state=seed).fit(train) for k in (4, 8, 12, 16, 24, 32)]
    best = max(fits, key=lambda fit: fit.score(validation))
    print(f"Gaussian mixture: {best.n_components} components, chosen on validation")
    return exact(torch.from_numpy(best.score_samples(data)))


def exact(log_p: Tensor) -> Likelihood:
    """Log-densities known without error."""
    return Likelihood(log_p.double(), torch.zeros(len(log_p)), "exact", 0, 2)


def train(data: Tensor, args: argparse.Namespace) -> tuple[Diffusion, list[float]]:
    """Fit by SVI; returns the model with averaged weights, and the loss of each step."""
    network = MLP(2, hidden=(args.width,) * 3, outputs=2)  # mean and variance of each coordinate
    denoiser = GaussianDenoiser(network, GaussianProcess(Cosine()), variance=LearnedVariance())

    def model() -> None:
        pyro.module("denoiser", denoiser)
        with (
            pyro.poutine.scale(scale=1 / len(data)),  # the loss in nats per datum
            pyro.plate("data", len(data), subsample_size=args.batch) as index,
        ):
            pyro.sample("x", Diffusion(denoiser, (2,), steps=args.chain), obs=data[index])

    def guide() -> None:
        """Nothing: the chain's latent variables are inside the site."""

    optimizer = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": 0.02 ** (1 / args.steps)})
    svi, ema = SVI(model, guide, optimizer, Trace_ELBO()), EMA(denoiser, 0.99)
    losses = []
    for _ in trange(args.steps, desc="training", disable=not args.progress):
        losses.append(svi.step())
        ema.update()
    denoiser.load_state_dict(ema.average)
    denoiser.eval()
    return Diffusion(denoiser, (2,), steps=args.chain, progress=args.progress), losses


def likelihoods(law: Diffusion, data: Tensor, args: argparse.Namespace) -> dict[str, Likelihood]:
    """Two figures of one network: a bound on its long chain, a tighter one on a short chain."""
    options = {"progress": args.progress}
    short = law.replace(steps=args.short_chain)
    weighted = evaluate.importance_weighted(
        short, data, samples=args.samples, batch_size=len(data), **options
    )
    return {
        f"diffusion, {law.steps} steps": evaluate.log_likelihood(law, data, draws=50, **options),
        f"diffusion, {short.steps} steps": evaluate.log_likelihood(short, data, **options),
        f"diffusion, {short.steps} steps, {args.samples} samples": weighted,
    }


def report(rows: dict[str, Likelihood]) -> dict[str, dict[str, float | str]]:
    """Print all models on the same points, and return the figures."""
    print(f"\n{'mean log-likelihood, nats':<34} {'value':>8} {'s.e.':>7}   kind")
    for name, row in rows.items():
        mean = row.mean
        print(f"{name:<34} {mean.value:>8.4f} {mean.standard_error:>7.4f}   {mean.kind}")
    table, n = evaluate.compare(rows), len(next(iter(rows.values())))
    columns = ["elpd", "se", "elpd_diff", "dse", "weight", "kind"]
    print(f"\nPaired, summed over {n} points:")
    print(table[columns].round(2).to_string())
    return {
        name: {
            "log_likelihood": row.mean.value,
            "standard_error": row.mean.standard_error,
            "kind": row.kind,
            "evaluations": row.evaluations,
        }
        for name, row in rows.items()
    }


def points_figure(data: Tensor, samples: Tensor) -> Figure:
    """Data and samples side by side, on one scale."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, title, points in zip(panels, ("data", "samples"), (data, samples), strict=True):
        ax.scatter(*points.T.numpy(), s=3, alpha=0.5, linewidths=0, color=plotting.BLUE)
        ax.set(title=title, aspect="equal", xlabel="first coordinate")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="second coordinate", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
    return figure


def draw(
    law: Diffusion, bound: Likelihood, losses: list[float], data: Tensor, args: argparse.Namespace
) -> None:
    """Every figure, into the output folder."""
    noise = law.denoiser.process.prior((2,)).expand((len(data),)).sample()
    states, record = recorder()
    with torch.no_grad():
        simulate(
            law.denoiser, law.times, noise, law.sampler, progress=args.progress, callback=record
        )
        samples = law.decode(states[-1]).sample()
    shown = torch.linspace(0, law.steps, 7).long()
    figures = {
        "samples": points_figure(data, samples),
        "trajectory": plotting.reverse_trajectory(
            torch.stack([states[j] for j in shown]), law.times.flip(0)[shown]
        ),
        "bound_per_step": plotting.bound_per_step(
            bound.terms.log_snr,
            bound.terms.steps,
            bound.terms.steps_standard_error,
            axis="log_snr",
        ).figure,
        "loss": plotting.loss_curve(losses).figure,
        "schedule": plotting.schedule(law.denoiser.process.schedule),
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
    parser.add_argument("--held-out", type=int, default=2000, help="points of each held-out set")
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=96, help="hidden units of each layer")
    parser.add_argument("--chain", type=int, default=200, help="steps of the chain")
    parser.add_argument("--short-chain", type=int, default=40, help="steps to weight chains on")
    parser.add_argument("--samples", type=int, default=32, help="chains weighted for each point")
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
    law, losses = train(data, args)
    rows = likelihoods(law, test, args)
    rows["Gaussian mixture"] = mixture_likelihood(data, validation, test, args.seed)
    rows["the data's own density"] = true_likelihood(test)
    metrics = report(rows)
    draw(law, next(iter(rows.values())), losses, test, args)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"figures and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
