"""Right posteriors, not right pictures: images drawn from a trained chain itself, then inferred.

A truth and draws of its posterior are exchangeable, so its rank among them is uniform if, and only if,
inference is right: for the chain's own draws that needs no other reference. The network is that of
``trained_posterior.py``. Printed per problem and method, over images that the chain drew:

    coverage    share of pixels whose rank among --draws lies in the central 90 % (5 .. 94 of 99 draws, 1 ..
                18 of 19); error by image
    SBC         p-value of the statistic sum_b (n_b - n/10)^2 over ten bins of ranks, of linear functionals
                drawn once (and the image's brightness): one rank an image, chi^2 of 9 degrees
    CRPS        a pixel, from all draws; the difference to the same guidance alone, paired by image
    ancestors   least and median number of distinct ancestors among the first generation
    log Z       standard deviation over --repeats further runs on the first --repeat-images, the printed
                error beside it (root mean squares over images), and the share of runs that print an error;
                of --swept by all small runs of an image
    chi^2       of a draw, a reading: 1 for the truth
    s           seconds an image, without these further runs

With --swept N draws that have N particles each, after each of --sweeps; "first states" is the share of those
at t_K that the last one replaced, "effective runs" the median number that evidence rests on. D draws and S
sweeps cost as much as one run of D N S particles.

With --twist N STEPS the same with an ``AmortizedTwist``, trained for each problem on N of its simulations.

With --reference N in their place, over all images: how far two runs of N particles are from one another,
which go by different guidance, and how far --repeats runs of --particles are from the first of them: means
in posterior standard deviations and logarithms of standard deviations, root mean squares over pixels. With
--of-draws M the reference is M independent draws with N particles each; beside it stand M others with each
number of --swept, and M of guidance alone. Chance alone puts the means of two such sets sqrt(2 / M) and
the logarithms of their standard deviations sqrt(1 / M) apart, if draws are normal; a set's distance beyond
that, the root of the difference of squares, is printed after it.

    python benchmarks/chain_posterior.py --problems "half missing, 0.05" --images 20 --particles 64 512
    python benchmarks/chain_posterior.py --repeat-images 20 --at-once 65536 --device cuda
    python benchmarks/chain_posterior.py --problems "half missing, 0.05" --images 3 --reference 20000
    python benchmarks/chain_posterior.py --images 3 --reference 16 --of-draws 400 --swept 8
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import pyro
import torch
from torch import Tensor
from trained_posteriors.images import digits
from trained_posteriors.long_runs import alone, refer, refer_to_draws, unweighted
from trained_posteriors.prior import OBJECTIVES, chain, trained
from trained_posteriors.problems import Problem, problems
from trained_posteriors.runs import Runner
from trained_posteriors.twists import learned

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import Guidance

BINS, PROJECTIONS = 10, 8
Row = tuple[str, Tensor, str]  # name, draws, what the method says of them


def crps(draws: Tensor, truth: Tensor) -> Tensor:
    """Per image, unbiased in the number of draws."""
    flat, x, count = draws.flatten(2), truth.flatten(1), len(draws)
    ordered = flat.sort(0).values
    weights = 2 * torch.arange(1, count + 1, device=flat.device) - count - 1.0
    spread = (weights[:, None, None] * ordered).sum(0) / (count * (count - 1))
    return ((flat - x).abs().mean(0) - spread).mean(-1)


def calibration(draws: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Coverage with its error by image, and the p-value of ranks of linear functionals."""
    flat, x = draws.flatten(2).cpu(), truth.flatten(1).cpu()
    count = len(flat)
    tail = (count + 1) // 20
    # Ties have a random place.
    noise = torch.rand(flat.shape)
    rank = ((flat < x) | ((flat == x) & (noise < 0.5))).sum(0)
    inside = ((rank >= tail) & (rank <= count - tail)).float().mean(-1)
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(PROJECTIONS, x.shape[1], generator=generator)
    directions[0] = 1.0
    ranks = (flat @ directions.T < x @ directions.T).sum(0)  # (images, projections)
    p_values = []
    for column in ranks.T:
        counts = torch.histc(column.float(), BINS, 0, count + 1)
        expected = len(column) / BINS
        statistic = (counts - expected).square().sum() / expected
        p_values.append(float(torch.special.gammaincc(torch.tensor((BINS - 1) / 2), statistic / 2)))
    # Of eight tests, the least, corrected.
    least = min(1.0, PROJECTIONS * min(p_values))
    return float(inside.mean()), float(inside.std()) / math.sqrt(len(inside)), least


def particles(runner: Runner, y: Tensor, count: int, draws: int) -> tuple[Tensor, str]:
    """Weighted draws, and how many ancestors they have."""
    parts = runner.parts(y, count)
    roots = torch.cat([part.ancestors[-1] for part in parts]).double()
    said = f"ancestors {float(roots.min()):3.0f} {float(roots.median()):4.0f}"
    return torch.cat([part.sample((draws,)) for part in parts], 1), said


def swept(runner: Runner, y: Tensor, count: int, args: argparse.Namespace) -> list[Row]:
    """Draws with particles of their own, after each sweep."""
    found = runner.draws(y, count, args.draws, args.sweeps)
    history = torch.cat([swept.history for swept in found], 2)
    rows = [(f"{count} a draw, sweep {i + 1}", draws, "") for i, draws in enumerate(history)]
    runs = torch.cat([swept.verdict.effective_runs for swept in found])
    said = f"effective runs {float(runs.median()):.1f}"
    if args.sweeps > 1:
        renewed = torch.cat([swept.verdict.renewed for swept in found])
        said += f"  first states {float(renewed.mean()):.2f}"
    rows[-1] = (*rows[-1][:2], said)
    return rows


def of_method(
    runner: Runner, y: Tensor, method: tuple[str, int], guidance: Guidance, args: argparse.Namespace
) -> list[Row]:
    """What a method draws, and what it says of itself."""
    kind, count = method
    if kind == "swept":
        return swept(runner, y, count, args)
    if kind == "particles":
        return [(f"{count} particles", *particles(runner, y, count, args.draws))]
    pyro.set_rng_seed(0)
    return [("guidance alone", unweighted(guidance, runner, y, args.draws), "")]


def report(problem: Problem, denoiser: Denoiser, truth: Tensor, args: argparse.Namespace) -> None:
    """The rows of a problem, each when it is known."""
    y, reference = problem.observe(truth), None
    choices: dict[str, tuple[Guidance, Guidance | None]] = {"": (alone, None)}
    if args.twist:
        twist = learned(problem, denoiser, y, *args.twist)
        choices["learned twist, "] = (twist, twist)
    methods = [("alone", 0)]
    methods += [("particles", n) for n in args.particles] + [("swept", n) for n in args.swept]
    for (name, (guidance, of_particles)), method in itertools.product(choices.items(), methods):
        runner = Runner(problem, denoiser, args.at_once, guidance=of_particles)
        start = time.perf_counter()
        for label, draws, said in of_method(runner, y, method, guidance, args):
            inside, error, p = calibration(draws, truth)  # waits for the device
            seconds = (time.perf_counter() - start) / len(truth)
            score, misfit = crps(draws, truth), float(problem.misfit(draws, y).mean())
            reference = score if reference is None else reference
            gap = score - reference
            if said and args.repeats > 1:
                small = args.draws if method[0] == "swept" else 0
                some = y[: args.repeat_images]
                said += "  " + runner.evidence(some, method[1], args.repeats, small)
            print(
                f"  {name + label:30} coverage {inside:.3f} +- {error:.3f}  SBC p {p:.3f}  "
                f"CRPS {float(score.mean()):.4f} ({float(gap.mean()):+.4f} +- "
                f"{float(gap.std()) / math.sqrt(len(gap)):.4f})  chi^2 {misfit:.2f}  {seconds:.2f} s  {said}",
                flush=True,
            )


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
    parser.add_argument("--swept", nargs="*", type=int, default=[], help="particles of every draw")
    parser.add_argument("--sweeps", type=int, default=1, help="of each of them")
    parser.add_argument("--draws", type=int, default=99, help="of all methods")
    parser.add_argument("--repeats", type=int, default=10, help="further runs")
    parser.add_argument("--repeat-images", type=int, default=200, help="that they are made on")
    parser.add_argument("--twist", nargs=2, type=int, help="simulations and steps of its training")
    parser.add_argument("--reference", type=int, help="particles of the long runs")
    parser.add_argument("--of-draws", type=int, help="independent draws that are the reference")
    parser.add_argument(
        "--at-once", type=int, default=4096, help="particles of all images together"
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="bound", help="of the training")
    parser.add_argument("--updates", type=int, default=2000, help="of the training")
    parser.add_argument("--cache", type=Path, default=Path("results/trained_posterior"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    args.data = data.to(args.device)
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    denoiser = trained(args.data, args.cache, args.objective, args.updates)
    pyro.set_rng_seed(1)
    truth = chain(denoiser, args.data.shape).sample((args.images,))
    print(f"{args.images} images of the chain")
    for key in args.problems:
        print(key, flush=True)
        rows = report if args.reference is None else refer_to_draws if args.of_draws else refer
        rows(problems(args.data)[key], denoiser, truth, args)


if __name__ == "__main__":
    main()
