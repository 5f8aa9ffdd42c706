"""Posteriors under a trained network: images from what was observed of them, beside azula on that network.

A small U-Net is trained in the script (and kept in --cache), by the bound or the ``Hybrid`` objective: on
scikit-learn's 8x8 digits, on 28x28 glyphs of fonts, or on MNIST's files. Problems: pixels missing,
down-sampling, blur, clipping, abs(Ax), counts. Printed
per problem and method, over test images that the network has not seen:

    PSNR       of the mean of the draws, per image, then averaged (dB)
    CRPS       a pixel; beside it the difference to --reference, paired by image, and its standard error
    coverage   share of pixels within the central ranks of the draws; nominal in the head line
    chi^2      squared standardized residual of a draw, per observation; 1 at the truth
    diverged   share of draws that are not finite or leave the grey levels by far
    s          processor seconds a draw, one thread, draws of all images together; on a GPU by the clock
    MiB        most memory that the process held; on a GPU, that tensors held there

"calibration" is what the default makes once for a network: it is not in the seconds below it.
Below stand posteriors without a network: "linear-Gaussian" of normal data, and "kernel", the exact posterior
of normals around the training images, near what can be known. azula runs if it is installed.

    python benchmarks/trained_posterior.py                                # every cell (hours)
    python benchmarks/trained_posterior.py --quick                        # 5 images, 8 draws, few methods
    python benchmarks/trained_posterior.py --problems "blur, 0.05" --methods default MMPS --images 5 --draws 8
    python benchmarks/trained_posterior.py --images-of glyphs --objective hybrid --quick
    python benchmarks/trained_posterior.py --data DIR --objective hybrid --quick  # MNIST's idx files in DIR
    python benchmarks/trained_posterior.py --data DIR --objective hybrid --device cuda
"""

import argparse
from pathlib import Path

import pyro
import torch
from trained_posteriors.images import images
from trained_posteriors.methods import calibration, methods
from trained_posteriors.pictures import Pictures
from trained_posteriors.prior import OBJECTIVES, trained
from trained_posteriors.problems import problems
from trained_posteriors.resources import Used, used
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


def line(name: str, scores: Scores, reference: Scores | None, cost: Used, draws: int) -> str:
    """A row of the table."""
    m = scores.means()
    gap = ""
    if reference is not None and reference is not scores:
        gap = "{:+.4f} +- {:.4f}".format(*paired(scores.crps, reference.crps))
    return (
        f"  {name:16}{m['psnr']:7.2f}{m['crps']:9.4f}  {gap:19}{m['coverage']:6.3f}"
        f"{m['misfit']:9.2f}{100 * m['diverged']:8.0f} %{cost.seconds / draws:8.3f}{cost.memory:7.0f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images-of", choices=("digits", "glyphs"), default="digits")
    parser.add_argument("--data", type=Path, help="folder of MNIST's idx files, instead")
    parser.add_argument("--problems", nargs="*", help='such as "blur, 0.05"; all by default')
    parser.add_argument("--methods", nargs="*", help='such as default "azula MMPS"; all by default')
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--objective", choices=OBJECTIVES, default="bound", help="of the training")
    parser.add_argument("--updates", type=int, default=2000, help="of the training")
    parser.add_argument("--reference", default="DataCovariance", help="of paired differences")
    parser.add_argument("--quick", action="store_true", help="5 images, 8 draws, few methods")
    parser.add_argument("--cache", type=Path, default=Path("results/trained_posterior"))
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the draws")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    kind = args.images_of if args.data is None else "idx"
    args.data = images(kind, args.data).to(args.device)
    for name, known in (("problems", problems(args.data)), ("methods", methods(args.data))):
        chosen = getattr(args, name) or list(known)
        if not set(chosen) <= set(known):
            parser.error(f"--{name}: got {chosen}, expected some of {list(known)}")
        setattr(args, name, chosen)
    if args.quick:
        args.images, args.draws = 5, 8
        args.methods = [name for name in args.methods if name in QUICK]
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    with used(args.device) as cost:
        denoiser = trained(args.data, args.cache, args.objective, args.updates)
    print(f"network, trained or loaded: {cost.seconds:.1f} s, {cost.memory:.0f} MiB")
    truth, available = args.data.test[: args.images], methods(args.data)
    order = sorted(args.methods, key=lambda name: name != args.reference)  # it comes first
    print(
        f"{args.data.name}: {args.images} images, {args.draws} draws, "
        f"nominal coverage {central_ranks(args.draws)[1]:.3f}"
    )
    if "default" in order:
        with used(args.device) as cost:
            calibration(denoiser, args.data)
        print(f"calibration {cost.seconds:.1f} s, {cost.memory:.0f} MiB")
    print(
        f"{'':18}{'PSNR':>7}{'CRPS':>9}  {'(paired)':19}{'cover':>6}{'chi^2':>9}{'diverged':>10}"
        f"{'s':>8}{'MiB':>7}"
    )
    for key in args.problems:
        problem = problems(args.data)[key]
        y, reference = problem.observe(truth), None
        pictures = Pictures(problem, truth, y)
        print(key)
        for name in order:
            if problem.matrix is None and name in LINEAR_ONLY:
                continue
            if problem.sd is None and name.startswith("azula MMPS"):
                continue
            pyro.set_rng_seed(0)
            with torch.no_grad(), used(args.device) as cost:
                draws = available[name](problem, denoiser, y, args.draws)
            scores = score(problem, draws, truth, y)
            reference = scores if name == args.reference else reference
            print(line(name, scores, reference, cost, args.draws * args.images), flush=True)
            pictures.add(name, draws)
        if args.pictures is not None:
            args.pictures.mkdir(parents=True, exist_ok=True)
            pictures.save(args.pictures / f"{args.data.name}, {key}.png")


if __name__ == "__main__":
    main()
