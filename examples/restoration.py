"""Digits restored from a hidden half and from a blur: a trained diffusion as the prior of a Pyro program.

    x ~ Diffusion(...)                 the model of digits.py, integers 0 ... 16
    y ~ Normal(A x, sd)                A hides pixels, or blurs

The program is all that is written down. Its likelihood is extracted from it, particles are guided by it, and
what comes out is a posterior: means, standard deviations, draws and the evidence, over test images that the
prior has never seen. Beside twisted SMC stands guidance alone, which nothing corrects.

Run: python examples/restoration.py
Others: --prior results/glyphs --prior-settings="--images glyphs" --sd 30, what digits.py was trained with
"""

import argparse
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import Predictive
from torch import Tensor

from pyro_diffusion import (
    AutoGuidance,
    Diffusion,
    LevelsDenoiser,
    ProgramLikelihood,
    TwistedSMC,
    infer,
    plotting,
)

HIGH = digits.LEVELS - 1
Operator = Callable[[Tensor], Tensor]


def settings(args: argparse.Namespace) -> argparse.Namespace:
    """Those of digits.py that the prior has."""
    return digits.parse(
        ["--no-progress", "--out", str(args.prior), *shlex.split(args.prior_settings)]
    )


def prior(args: argparse.Namespace) -> LevelsDenoiser:
    """The averaged network of digits.py: from its checkpoint, or trained now."""
    given = settings(args)
    pyro.set_rng_seed(given.seed)
    return digits.train(given)[0].requires_grad_(False)


def visible_half(shape: tuple[int, ...] = digits.EVENT_SHAPE) -> Tensor:
    """Which pixels are seen: the upper half."""
    keep = torch.zeros(shape, dtype=torch.bool)
    keep[:, : shape[1] // 2] = True
    return keep


def inpainting(shape: tuple[int, ...] = digits.EVENT_SHAPE) -> Operator:
    """A leaves the seen pixels."""
    keep = visible_half(shape)
    return lambda x: x[..., keep]


def blurring(width: float = 1.0, shape: tuple[int, ...] = digits.EVENT_SHAPE) -> Operator:
    """A convolves with a Gaussian of so many pixels."""

    def matrix(side: int) -> Tensor:
        at = torch.arange(float(side))
        rows = (-0.5 * ((at - at.unsqueeze(-1)) / width).square()).exp()
        return rows / rows.sum(-1, keepdim=True)

    down, across = matrix(shape[1]), matrix(shape[2])
    return lambda x: (down @ x @ across.mT).flatten(-3)


def program(diffusion: Diffusion, operator: Operator, sd: float) -> Callable[[Tensor], None]:
    """The generative model of noisy readings y, (n, m)."""

    def model(y: Tensor) -> None:
        with pyro.plate("images", len(y)):
            x = pyro.sample("x", diffusion)
            pyro.sample("y", dist.Normal(operator(x.float()), sd).to_event(1), obs=y)

    return model


def restore(
    diffusion: Diffusion, operator: Operator, y: Tensor, args: argparse.Namespace
) -> tuple[infer.Particles, Tensor]:
    """Particles of the posterior, and draws of guidance alone."""
    model = program(diffusion, operator, args.sd)
    likelihood = ProgramLikelihood(model, (y,))
    smc = TwistedSMC(diffusion, likelihood, num_particles=args.particles, progress=args.progress)
    guide = AutoGuidance(model)
    guided = Predictive(model, guide=guide, num_samples=args.draws, parallel=True)(y)["x"]
    return smc.run(), guided


def coverage(particles: infer.Particles, x: Tensor, level: float = 0.9) -> Tensor:
    """Which true pixels lie within the central interval of the posterior."""
    draws = particles.sample((1000,)).float()
    low, high = draws.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    return (x >= low) & (x <= high)


def rmse(estimate: Tensor, x: Tensor, rows: Tensor) -> tuple[float, float]:
    """Root of the mean squared error over pixels (grey levels), and its standard error over images."""
    each = (estimate - x).square().flatten(1)[:, rows.flatten()].mean(1).double()
    root = float(each.mean().sqrt())
    return root, float(each.std()) / math.sqrt(len(each)) / (2 * root)


def report(
    name: str, particles: infer.Particles, guided: Tensor, x: Tensor, rows: Tensor, mean: Tensor
) -> dict[str, Any]:
    """Print one task's figures and return them; errors are over the pixels marked in ``rows``."""
    inside = coverage(particles, x)[:, rows].double().mean(1)
    errors = {
        "training mean": rmse(mean.expand(x.shape), x, rows),
        "guidance alone": rmse(guided.double().mean(0), x, rows),
        "twisted SMC": rmse(particles.mean, x, rows),
    }
    print(f"\n{name}, {len(x)} test images\n  root mean squared error, grey levels")
    for method, (value, error) in errors.items():
        print(f"    {method:<16} {value:6.3f} +- {error:.3f}")
    spread = float(particles.variance[:, rows].mean().sqrt())
    share = float(inside.mean()), float(inside.std()) / math.sqrt(len(inside))
    least = particles.ess.amin(0)
    print(
        f"  posterior standard deviation {spread:6.3f}\n"
        f"  pixels within 90 % intervals {share[0]:6.3f} +- {share[1]:.3f}\n"
        f"  effective sample size of {len(particles)}: at the data "
        f"{particles.ess[-1].median():.0f}, least on the way {least.median():.0f} (medians over images)\n"
        f"  log p(y) {particles.log_evidence}"
    )
    return {
        "rmse": {method: list(pair) for method, pair in errors.items()},
        "posterior_sd": spread,
        "coverage_90": list(share),
        "ess": particles.ess[-1].tolist(),
        "least_ess": least.tolist(),
        "log_evidence": vars(particles.log_evidence),
    }


def panels(columns: dict[str, tuple[Tensor, int, float]]) -> Figure:
    """Images in titled columns: (images, images in a row, value drawn white)."""
    widths = [each[1] for each in columns.values()]
    rows = max(len(images) // wide for images, wide, _ in columns.values())
    figure = Figure(figsize=(0.95 * sum(widths) + 0.3, 0.95 * rows + 0.5), layout="constrained")
    axes = figure.subplots(1, len(columns), width_ratios=widths, squeeze=False)[0]
    for ax, (title, (images, wide, high)) in zip(axes, columns.items(), strict=True):
        plotting.sample_grid(images, columns=wide, low=0, high=high, ax=ax)
        ax.set_title(title, fontsize=9)
    return figure


def reading(
    y: Tensor,
    keep: Tensor | None,
    shape: tuple[int, ...] = digits.EVENT_SHAPE,
    high: float = HIGH,
) -> Tensor:
    """Readings as pictures (n, 3, height, width), what is hidden in blue."""
    if keep is None:
        return y.view(-1, *shape).expand(-1, 3, -1, -1)
    image = high * torch.tensor([0.3, 0.45, 0.7]).view(3, 1, 1).repeat(len(y), 1, *shape[1:])
    image[:, :, keep[0]] = y.view(len(y), shape[0], -1)
    return image


def draw(
    particles: infer.Particles, y: Tensor, x: Tensor, keep: Tensor | None, high: int, shown: int
) -> Figure:
    """Truth, readings, posterior mean and standard deviation, and draws."""
    draws = particles.sample((shown,)).transpose(0, 1).flatten(0, 1)
    return panels(
        {
            "truth": (x, 1, high),
            "reading": (reading(y, keep, x.shape[1:], high), 1, high),
            "mean": (particles.mean, 1, high),
            f"sd (white: {high / 2:g})": (particles.variance.sqrt(), 1, high / 2),
            "draws of the posterior": (draws, shown, high),
        }
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/restoration"), help="output")
    folder = Path("results/digits")
    parser.add_argument("--prior", type=Path, default=folder, help="folder of the digits model")
    parser.add_argument("--prior-settings", default="", help="arguments of digits.py it has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4, help="test images in each task")
    parser.add_argument("--sd", type=float, default=3.0, help="of the noise, in grey levels")
    parser.add_argument("--steps", type=int, default=40, help="steps of the chain")
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--draws", type=int, default=32, help="draws of guidance alone")
    parser.add_argument("--shown", type=int, default=6, help="posterior draws in the pictures")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    given, denoiser = settings(args), prior(args)
    data, high = digits.load(given.images, given.side), len(denoiser.values) - 1
    shape = data["test"].shape[1:]
    diffusion, keep = digits.diffusion(denoiser, args.steps, shape), visible_half(shape)
    pyro.set_rng_seed(args.seed)
    x, mean = data["test"][: args.images], data["train"].double().mean(0)
    tasks = {
        "inpainting": (inpainting(shape), keep, ~keep),
        "deblurring": (blurring(shape=shape), None, torch.ones_like(keep)),
    }
    readings = {name: operator(x.float()) for name, (operator, _, _) in tasks.items()}
    readings = {name: y + args.sd * torch.randn_like(y) for name, y in readings.items()}
    metrics = {}
    for name, (operator, seen, rows) in tasks.items():
        y = readings[name]
        particles, guided = restore(diffusion, operator, y, args)
        metrics[name] = report(name, particles, guided, x, rows, mean)
        figure = draw(particles, y, x, seen, high, args.shown)
        figure.savefig(args.out / f"{name}.png", dpi=150, bbox_inches="tight")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"\nfigures and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
