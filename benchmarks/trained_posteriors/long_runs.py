"""How far posteriors are from a long run's, or from many independent draws."""

import argparse
import math
import time

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance import CalibratedCovariance
from pyro_diffusion.guidance.base import Guidance, GuidedDenoiser
from pyro_diffusion.guidance.chain_moments import ChainMoments
from pyro_diffusion.likelihoods import Likelihood
from trained_posteriors.methods import by_residuals, guided
from trained_posteriors.prior import chain
from trained_posteriors.problems import Problem
from trained_posteriors.runs import Found, Runner

__all__ = ["alone", "refer", "refer_to_draws", "unweighted"]


def alone(denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
    """The guidance of the particles."""
    return ChainMoments(
        denoiser,
        likelihood.with_residuals("deviance"),
        times=chain(denoiser, likelihood.event_shape).times,
    )


def unweighted(guidance: Guidance, runner: Runner, y: Tensor, count: int) -> Tensor:
    """Draws of the guidance alone."""
    problem, denoiser = runner.problem, runner.denoiser
    with torch.no_grad():
        parts = y.split(max(runner.at_once // count, 1))
        return torch.cat([guided(guidance, problem, denoiser, some, count) for some in parts], 1)


def distances(name: str, found: Found, reference: Found) -> str:
    """A row, of means and standard deviations from those of the reference (1, n) + SHAPE."""
    away, ratio = (found.mean - reference.mean) / reference.sd, (found.sd / reference.sd).log()
    rows = [f"{float(part.square().mean().sqrt()):.3f}" for part in away.unbind(1)]
    return (
        f"  {name:40} means {float(away.square().mean().sqrt()):.3f} sd (by image {', '.join(rows)}), "
        f"log of sds {float(ratio.square().mean().sqrt()):.3f}, on average {float(ratio.mean()):+.3f}, "
        f"least effective ancestors {float(found.effective_ancestors.min()):.1f}"
    )


def refer(problem: Problem, denoiser: Denoiser, truth: Tensor, args: argparse.Namespace) -> None:
    """The rows of a problem beside a long run."""
    y = problem.observe(truth)
    runner = Runner(problem, denoiser, args.at_once, seed=1000)
    reference = runner.moments(y, args.reference)
    other = Runner(problem, denoiser, args.at_once, 2000, by_residuals(CalibratedCovariance))
    least = float(reference.effective_ancestors.min())
    print(
        f"  {args.reference} particles, least effective ancestors {least:.1f}; from these",
        flush=True,
    )
    for name, by in (("once more", runner), ("under other guidance", other)):
        found = by.moments(y, args.reference)
        print(distances(f"{args.reference} {name}", found, reference), flush=True)
    for count in args.particles:
        found = runner.moments(y, count, args.repeats)
        print(distances(f"{count} particles", found, reference), flush=True)


def beyond(distance: float, chance: float) -> str:
    """A root mean square distance, and what of it is not chance."""
    return f"{distance:.3f} ({math.sqrt(max(distance**2 - chance**2, 0.0)):.3f})"


def refer_to_draws(
    problem: Problem, denoiser: Denoiser, truth: Tensor, args: argparse.Namespace
) -> None:
    """The rows of a problem beside independent draws."""
    y, count = problem.observe(truth), args.of_draws
    runner = Runner(problem, denoiser, args.at_once, seed=1000)

    def drawn(particles: int) -> Tensor:
        """Independent draws, with so many particles each or by guidance alone."""
        if not particles:
            return unweighted(alone, runner, y, count)
        return torch.cat([some.history[-1] for some in runner.draws(y, particles, count)], 1)

    reference = drawn(args.reference)
    sd = reference.std(0)
    rows = [(f"{number} particles a draw", number) for number in args.swept]
    rows += [("guidance alone", 0)]
    for name, number in rows:
        start = time.perf_counter()
        draws = drawn(number)
        away, ratio = (draws.mean(0) - reference.mean(0)) / sd, (draws.std(0) / sd).log()
        by_image = [
            beyond(float(part.square().mean().sqrt()), math.sqrt(2 / count)) for part in away
        ]
        print(
            f"  {name:34} means {beyond(float(away.square().mean().sqrt()), math.sqrt(2 / count))} sd (by "
            f"image {', '.join(by_image)}), log of sds "
            f"{beyond(float(ratio.square().mean().sqrt()), math.sqrt(1 / count))}, on average "
            f"{float(ratio.mean()):+.3f}, {(time.perf_counter() - start) / len(y):.0f} s an image",
            flush=True,
        )
