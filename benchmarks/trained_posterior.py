"""Posteriors under a trained network: images from what was observed of them, beside azula on that network.

A small U-Net is trained on scikit-learn's 8x8 digits in the script (and kept in --cache), by the bound or
the ``Hybrid`` objective. Problems: pixels missing, down-sampling, blur, clipping, abs(Ax), counts. Printed
per problem and method, over test images that the network has not seen:

    PSNR       of the mean of the draws, per image, then averaged (dB)
    CRPS       a pixel; beside it the difference to --reference, paired by image, and its standard error
    coverage   share of pixels within the central ranks of the draws; nominal in the head line
    chi^2      squared standardized residual of a draw, per observation; 1 at the truth
    diverged   share of draws that are not finite or leave the grey levels by far
    s          seconds a draw, draws of all images together

Below stand posteriors without a network: "linear-Gaussian" of normal data, and "kernel", the exact posterior
of normals around the training images, near what can be known. azula runs if it is installed.

    python benchmarks/trained_posterior.py                                # every cell (hours)
    python benchmarks/trained_posterior.py --quick                        # 5 images, 8 draws, few methods
    python benchmarks/trained_posterior.py --problems "blur, 0.05" --methods default MMPS --images 5 --draws 8
"""

import argparse
import time
from pathlib import Path

import pyro
import torch
from trained_posteriors.methods import methods
from trained_posteriors.prior import OBJECTIVES, digits, trained
from trained_posteriors.problems import problems
from trained_posteriors.scores import Scores, central_ranks, paired, score

QUICK = (
    "default",
    "DataCovariance",
    "PiGDM",
    "azula MMPS",
    "azula PGDM",
    "linear-Gaussian",
    "kernel",
)
LINEAR_ONLY = ("linear-Gaussian", "kernel", "azula PGDM")


def line(name: str, scores: Scores, reference: Scores | None, seconds: float) -> str:
    """A row of the table."""
    m = scores.means()
    gap = ""
    if reference is not None and reference is not scores:
        gap = "{:+.4f} +- {:.4f}".format(*paired(scores.crps, reference.crps))
    return (
        f"  {name:16}{m['psnr']:7.2f}{m['crps']:9.4f}  {gap:19}{m['coverage']:6.3f}"
        f"{m['misfit']:9.2f}{100 * m['diverged']:8.0f} %{seconds:8.3f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problems", nargs="*", default=list(problems()), choices=problems())
    parser.add_argument("--methods", nargs="*", default=list(methods()), choices=methods())
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--objective", choices=OBJECTIVES, default="bound", help="of the training")
    parser.add_argument("--updates", type=int, default=2000, help="of the training")
    parser.add_argument("--reference", default="DataCovariance", help="of paired differences")
    parser.add_argument("--quick", action="store_true", help="5 images, 8 draws, few methods")
    parser.add_argument("--cache", type=Path, default=Path("results/trained_posterior"))
    args = parser.parse_args()
    if args.quick:
        args.images, args.draws = 5, 8
        args.methods = [name for name in args.methods if name in QUICK]
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    denoiser = trained(args.cache, args.objective, args.updates)
    truth, available = digits()["test"][: args.images], methods()
    order = sorted(args.methods, key=lambda name: name != args.reference)  # it comes first
    print(
        f"{args.images} images, {args.draws} draws, nominal coverage {central_ranks(args.draws)[1]:.3f}\n"
        f"{'':18}{'PSNR':>7}{'CRPS':>9}  {'(paired)':19}{'cover':>6}{'chi^2':>9}{'diverged':>10}{'s':>8}"
    )
    for key in args.problems:
        problem = problems()[key]
        y, reference = problem.observe(truth), None
        print(key)
        for name in order:
            if problem.matrix is None and name in LINEAR_ONLY:
                continue
            if problem.sd is None and name.startswith("azula MMPS"):
                continue
            pyro.set_rng_seed(0)
            start = time.perf_counter()
            with torch.no_grad():
                draws = available[name](problem, denoiser, y, args.draws)
            seconds = (time.perf_counter() - start) / (args.draws * args.images)
            scores = score(problem, draws, truth, y)
            reference = scores if name == args.reference else reference
            print(line(name, scores, reference, seconds), flush=True)


if __name__ == "__main__":
    main()
