"""Photon counts of digits: Poisson observations under a trained diffusion prior.

    x ~ Diffusion(...)                            the model of digits.py, integers 0 ... 16
    y ~ Poisson(background + peak * x / 16)       a few photons for the brightest pixel

Guidance linearizes the signed deviance residuals of the counts; twisted SMC weighs the exact Poisson
likelihood, so it corrects that. Beside it stand the same counts under a prior of independent pixels, whose
posterior and evidence are exact sums over 17 grey levels.

Run: python examples/counts.py
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import pyro
import pyro.distributions as dist
import torch
from restoration import HIGH, coverage, panels, prior, rmse
from torch import Tensor

from pyro_diffusion import Diffusion, ProgramLikelihood, TwistedSMC
from pyro_diffusion.infer import Particles

ALL = torch.ones(digits.EVENT_SHAPE, dtype=torch.bool)


def rate(x: Tensor, args: argparse.Namespace) -> Tensor:
    """Expected photons of every pixel."""
    return args.background + args.peak * x.float().clamp(min=0) / HIGH


def program(diffusion: Diffusion, args: argparse.Namespace) -> Callable[[Tensor], None]:
    """The generative model of counts y, (n, 1, 8, 8)."""

    def model(y: Tensor) -> None:
        with pyro.plate("images", len(y)):
            x = pyro.sample("x", diffusion)
            pyro.sample("y", dist.Poisson(rate(x, args)).to_event(3), obs=y)

    return model


def infer(diffusion: Diffusion, y: Tensor, args: argparse.Namespace) -> Particles:
    """Particles of the posterior, guided by deviance residuals and weighed by the Poisson likelihood."""
    likelihood = ProgramLikelihood(program(diffusion, args), (y,))
    smc = TwistedSMC(diffusion, likelihood, num_particles=args.particles, progress=args.progress)
    return smc.run()


def independent(train: Tensor, y: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-evidence per image under smoothed histograms of every pixel: exact."""
    grey = torch.arange(digits.LEVELS)
    counts = torch.nn.functional.one_hot(train, digits.LEVELS).double().sum(0) + 0.05
    log_prior = counts.log() - counts.sum(-1, keepdim=True).log()
    joint = log_prior + dist.Poisson(rate(grey, args).double()).log_prob(y.double().unsqueeze(-1))
    return joint.softmax(-1) @ grey.double(), joint.logsumexp(-1).flatten(1).sum(1)


def report(
    particles: Particles, x: Tensor, y: Tensor, train: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Print the figures and return them."""
    alone, exact = independent(train, y, args)
    errors = {
        "counts / peak": rmse((y - args.background) * HIGH / args.peak, x, ALL),
        "independent pixels": rmse(alone, x, ALL),
        "diffusion": rmse(particles.mean, x, ALL),
    }
    print(
        f"\n{len(x)} test images, {float(y.flatten(1).sum(1).mean()):.0f} photons each on average"
    )
    print("  root mean squared error, grey levels")
    for method, (value, error) in errors.items():
        print(f"    {method:<20} {value:6.3f} +- {error:.3f}")
    inside = coverage(particles, x).flatten(1).double().mean(1)
    share = float(inside.mean()), float(inside.std()) / math.sqrt(len(inside))
    print(f"  pixels within 90 % intervals {share[0]:6.3f} +- {share[1]:.3f}")
    terms = particles.log_evidence_terms.double()
    noise = particles.log_evidence_errors
    least = particles.ess.amin(0)
    print("\n  log p(y), nats  diffusion (Monte-Carlo s.e.)  independent pixels  least ESS")
    for i in range(len(x)):
        print(
            f"    image {i:<8} {terms[i]:>9.2f} {noise[i]:>12.2f} {exact[i]:>22.2f} {least[i]:>13.1f}"
        )
    gap = terms - exact
    error = float(gap.std()) / math.sqrt(len(gap))
    print(f"    difference, mean over images {float(gap.mean()):.2f} +- {error:.2f} (paired)")
    return {
        "rmse": {method: list(pair) for method, pair in errors.items()},
        "coverage_90": list(share),
        "log_evidence": {"diffusion": terms.tolist(), "independent": exact.tolist()},
        "log_evidence_error": noise.tolist(),
        "least_ess": least.tolist(),
        "difference": [float(gap.mean()), error],
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/counts"), help="output folder")
    folder = Path("results/digits")
    parser.add_argument("--prior", type=Path, default=folder, help="folder of the digits model")
    parser.add_argument("--prior-settings", default="", help="arguments of digits.py it has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4, help="test images")
    parser.add_argument("--peak", type=float, default=4.0, help="photons of the brightest grey")
    parser.add_argument("--background", type=float, default=0.3, help="photons of a black pixel")
    parser.add_argument("--steps", type=int, default=40, help="steps of the chain")
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--shown", type=int, default=6, help="posterior draws in the picture")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    diffusion = digits.diffusion(prior(args), args.steps)
    pyro.set_rng_seed(args.seed)
    data = digits.load()
    x = data["test"][: args.images]
    y = torch.poisson(rate(x, args))
    particles = infer(diffusion, y, args)
    metrics = report(particles, x, y, data["train"], args)
    draws = particles.sample((args.shown,)).transpose(0, 1).flatten(0, 1)
    figure = panels(
        {
            "truth": (x, 1, HIGH),
            "counts": (y, 1, 1.5 * args.peak),
            "indep. pixels": (independent(data["train"], y, args)[0], 1, HIGH),
            "diffusion": (particles.mean, 1, HIGH),
            "sd (white: 8)": (particles.variance.sqrt(), 1, 8.0),
            "draws of the posterior": (draws, args.shown, HIGH),
        }
    )
    figure.savefig(args.out / "counts.png", dpi=150, bbox_inches="tight")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"\nthe figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
