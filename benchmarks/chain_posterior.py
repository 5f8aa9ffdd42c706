"""Right posteriors, not right pictures: images drawn from a trained chain itself, then inferred.

A truth and draws of its posterior are exchangeable, so its rank among them is uniform if, and only if,
inference is right: for the chain's own draws that needs no other reference. The network is that of
``trained_posterior.py``. Printed per problem and method, over images that the chain drew:

    coverage    share of pixels whose rank among 99 draws lies in 5 .. 94, nominal .90; error by image
    SBC         p-value of the statistic sum_b (n_b - n/10)^2 over ten bins of ranks, of linear functionals
                drawn once (and the image's brightness): one rank an image, chi^2 of 9 degrees
    CRPS        a pixel, from 99 draws; the difference to the same guidance alone, paired by image
    log Z       standard deviation over --repeats runs, the printed error beside it (root mean squares over
                images), and the share of runs that print an error
    ancestors   least and median number of distinct ancestors among the first generation
    s           seconds an image

    python benchmarks/chain_posterior.py --problems "half missing, 0.05" --images 20 --particles 64 512
"""

import argparse
import math
import time
import warnings
from pathlib import Path

import pyro
import torch
from torch import Tensor
from trained_posteriors.images import digits
from trained_posteriors.methods import guided
from trained_posteriors.prior import OBJECTIVES, chain, trained
from trained_posteriors.problems import Problem, problems

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import GuidedDenoiser
from pyro_diffusion.guidance.chain_moments import ChainMoments
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import Likelihood, ProgramLikelihood
from pyro_diffusion.unreliable import UnreliableWarning

DRAWS, BINS, PROJECTIONS = 99, 10, 8


def alone(denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
    """The guidance of the particles."""
    return ChainMoments(
        denoiser,
        likelihood.with_residuals("deviance"),
        times=chain(denoiser, likelihood.event_shape).times,
    )


def crps(draws: Tensor, truth: Tensor) -> Tensor:
    """Per image, unbiased in the number of draws."""
    flat, x, count = draws.flatten(2), truth.flatten(1), len(draws)
    ordered = flat.sort(0).values
    weights = 2 * torch.arange(1, count + 1) - count - 1.0
    spread = (weights[:, None, None] * ordered).sum(0) / (count * (count - 1))
    return ((flat - x).abs().mean(0) - spread).mean(-1)


def calibration(draws: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Coverage with its error by image, and the p-value of ranks of linear functionals."""
    flat, x = draws.flatten(2), truth.flatten(1)
    # Ties have a random place.
    noise = torch.rand(flat.shape)
    rank = ((flat < x) | ((flat == x) & (noise < 0.5))).sum(0)
    inside = ((rank >= 5) & (rank <= 94)).float().mean(-1)
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(PROJECTIONS, x.shape[1], generator=generator)
    directions[0] = 1.0
    ranks = (flat @ directions.T < x @ directions.T).sum(0)  # (images, projections)
    p_values = []
    for column in ranks.T:
        counts = torch.histc(column.float(), BINS, 0, DRAWS + 1)
        expected = len(column) / BINS
        statistic = (counts - expected).square().sum() / expected
        p_values.append(float(torch.special.gammaincc(torch.tensor((BINS - 1) / 2), statistic / 2)))
    # Of eight tests, the least, corrected.
    least = min(1.0, PROJECTIONS * min(p_values))
    return float(inside.mean()), float(inside.std()) / math.sqrt(len(inside)), least


def particles(
    problem: Problem, denoiser: Denoiser, y: Tensor, count: int, repeats: int
) -> tuple[Tensor, dict[str, float]]:
    """Weighted draws of independent runs, taken in turn, and what the runs say of their evidence."""
    prior = chain(denoiser, problem.images.shape)
    smc = TwistedSMC(prior, ProgramLikelihood(problem.program(prior, y)), num_particles=count)
    values, errors, ancestors, draws = [], [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        for _ in range(repeats):
            run = smc.run()
            values.append(run.log_evidence_terms)
            errors.append(run.log_evidence_errors)
            ancestors.append(run.ancestors[-1])
            draws.append(run.sample((DRAWS,)))
    z, error = torch.stack(values), torch.stack(errors)
    known = error.isfinite()
    roots = torch.stack(ancestors).double()
    said = {
        "sd": float(z.var(0).mean().sqrt()) if repeats > 1 else math.nan,
        "error": float(error[known].square().mean().sqrt()),
        "known": float(known.double().mean()),
        "least": float(roots.min()),
        "median": float(roots.median()),
    }
    return draws[0], said


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    data = digits()
    known = problems(data)
    linear = [name for name, problem in known.items() if problem.matrix is not None]
    parser.add_argument("--problems", nargs="*", default=linear, choices=known)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--particles", nargs="*", type=int, default=[64, 512])
    parser.add_argument("--repeats", type=int, default=10, help="runs, for the evidence")
    parser.add_argument(
        "--at-once", type=int, default=4096, help="particles of all images together"
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="bound", help="of the training")
    parser.add_argument("--updates", type=int, default=2000, help="of the training")
    parser.add_argument("--cache", type=Path, default=Path("results/trained_posterior"))
    args = parser.parse_args()
    args.data = data
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    denoiser = trained(args.data, args.cache, args.objective, args.updates)
    pyro.set_rng_seed(1)
    truth = chain(denoiser, args.data.shape).sample((args.images,))
    print(f"{args.images} images of the chain, {args.repeats} runs each")
    for key in args.problems:
        problem = problems(args.data)[key]
        y, reference = problem.observe(truth), None
        print(key)
        for count in (0, *args.particles):
            start, said, parts, notes = time.perf_counter(), "", [], []
            size = max(args.at_once // max(count, DRAWS), 1)
            for some in y.split(size):
                pyro.set_rng_seed(len(parts))
                if count == 0:
                    with torch.no_grad():
                        parts.append(guided(alone, problem, denoiser, some, DRAWS))
                    continue
                draws, note = particles(problem, denoiser, some, count, args.repeats)
                parts.append(draws)
                notes.append((len(some), note))
            seconds = (time.perf_counter() - start) / args.images
            draws = torch.cat(parts, 1)
            score, (inside, error, p) = crps(draws, truth), calibration(draws, truth)
            gap = score - (score if reference is None else reference)
            reference = score if reference is None else reference
            if notes:
                root = {
                    name: math.sqrt(sum(n * note[name] ** 2 for n, note in notes) / args.images)
                    for name in ("sd", "error")
                }
                known = sum(n * note["known"] for n, note in notes) / args.images
                least = min(note["least"] for _, note in notes)
                median = sorted(note["median"] for _, note in notes)[len(notes) // 2]
                said = (
                    f"log Z sd {root['sd']:5.2f} printed {root['error']:5.2f} ({100 * known:3.0f} %) "
                    f"ancestors {least:3.0f} {median:4.0f}"
                )
            print(
                f"  {'guidance alone' if count == 0 else f'{count} particles':15} coverage {inside:.3f} +- "
                f"{error:.3f}  SBC p {p:.3f}  CRPS {float(score.mean()):.4f} "
                f"({float(gap.mean()):+.4f} +- {float(gap.std()) / math.sqrt(len(gap)):.4f})  {said}"
                f"  {seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
