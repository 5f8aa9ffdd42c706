"""Posteriors of simulators: AutoAmortized and sbi beside reference posteriors.

Run: python benchmarks/sbi.py --data DIR     (NAME.npz with `observations`, `reference_posterior_samples`)

The tasks are those of sbibm (Lueckmann et al., arXiv 2101.04653), each a Pyro program of `sbi_parts`. Parts,
of which `--task` chooses:

    accuracy      C2ST, the mean over ten observations of `evaluate.c2st` between 2000 draws of the guide and
                  2000 of the reference: 0.5 is right, 1 is told apart always. Every task is trained with the
                  defaults of `train.fit_amortized`, for each of the `--seeds`; beside it NPSE, FMPE and NPE
                  of the toolbox sbi, if it is installed (`pip install sbi`; 0.27 was), on the first seed's
                  simulations, with as many weights and seconds (`sbi_parts/peer.py` has the settings)
    correction    draws corrected by the likelihood, log evidence, effective sample size
    cost          simulating, beside torch alone, and seconds of draws
    calibration   SBC and expected coverage of a right guide and of two that are broken on purpose
    hierarchical  groups and sets of any size, beside closed forms; by itself, and without data
    subsets       any-subset conditioning by AutoJoint; likewise
    rounds        truncated rounds for one observation beside one round; by itself, on
                  two_moons with data and against closed forms without
    ensembles     the mixture of five guides of 1000 simulations beside each; by itself
    held_out      C2ST on four tasks that no recipe was tuned to, at the guide's defaults; by itself, without
                  data (of our own seeds) or with them (sbibm's observations)
    composed      i.i.d. data by composed scores, and by a guide of sets; by itself, and without data

Published C2ST at 1000 / 10,000 simulations (sbibm's NPE; NPSE and Simformer as read from the papers' plots,
within 0.003), by another classifier:

    two_moons        NPE .725/.606   NPSE .570/.513   Simformer .611/.525
    gaussian_linear  NPE .694/.552   NPSE .705/.572   Simformer .732/.635
    bernoulli_glm    NPE .863/.678

The task `subsets` has no data and its own table: any sites of two programs given any others (sbi_subsets.py).
"""

import argparse
import importlib
import sys
from pathlib import Path

import sbi_hierarchical
import sbi_subsets
import torch
from sbi_parts import TASKS, composed, ensembles, held_out, rounds
from sbi_parts.cells import OURS
from sbi_parts.peer import METHODS
from sbi_parts.programs import HELD_OUT

PARTS = ["accuracy", "correction", "calibration", "cost"]
ALONE = {
    "hierarchical": sbi_hierarchical.main,
    "subsets": sbi_subsets.main,
    "rounds": rounds.main,
    "ensembles": ensembles.main,
    "composed": composed.main,
    "held_out": held_out.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder, for accuracy and correction")
    parser.add_argument("--task", nargs="+", default=PARTS, choices=[*PARTS, *ALONE])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=[*TASKS, *HELD_OUT, *ALONE])
    parser.add_argument(
        "--programs",
        nargs="+",
        default=["gaussian", "tree", "grouped", "single"],
        choices=[*sbi_subsets.PROGRAMS, "grouped", "single"],
        help="of `subsets` and `hierarchical`",
    )
    parser.add_argument("--simulations", nargs="+", type=int, default=[1000, 10_000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--methods", nargs="+", default=[OURS, "NPSE", "FMPE", "NPE"], choices=[OURS, *METHODS]
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="of a processor, for sbi's training; what ours took by default",
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for draws, taken from there if they are there"
    )
    parser.add_argument("--steps", type=int, default=None, help="those of the recipe by default")
    parser.add_argument(
        "--lr", type=float, default=None, help="of `subsets`; the recipe's by default"
    )
    parser.add_argument("--observations", type=int, default=10, help="the first of each task")
    parser.add_argument(
        "--device", default="cpu", help="of draws in `accuracy`; training is on the processor"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="1000 simulations and two observations in `accuracy`, one observation in `correction`",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = [name for name in (*args.task, *args.tasks) if name in ALONE]
    if chosen:
        if chosen not in (args.task, args.tasks):
            parser.error(f"--task: got {chosen} among others, expected it by itself")
        ALONE[chosen[0]](args)
        return
    if args.data is None and args.task != ["calibration"]:
        parser.error("--data: expected a folder for tasks of sbibm")
    if args.quick:
        args.observations, args.simulations = min(args.observations, 2), args.simulations[:1]
    fine = [importlib.import_module(f"sbi_parts.{name}").main(args) for name in args.task]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
