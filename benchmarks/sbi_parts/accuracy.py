"""C2ST against reference posteriors, of guides trained by their defaults and of sbi's methods beside."""

import argparse
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_diffusion import evaluate
from sbi_parts import load, peer
from sbi_parts.cells import DRAWS, OURS, cell

WANTED = {
    ("two_moons", 1000): 0.60,
    ("two_moons", 10_000): 0.53,
    ("gaussian_linear", 10_000): 0.58,
    ("bernoulli_glm", 10_000): 0.66,
}
HEADER = (
    f"{'task':<16} {'n':>6} {'method':<8} {'seed':>4} {'C2ST':>6} {'error':>6} {'min':>6} {'max':>6} "
    f"{'weights':>8} {'steps':>7} {'train s':>7} {'cpu s':>7} {'draw s':>7}"
)
MINUTES = 5.0  # two_moons at 10,000 simulations

Found = dict[
    tuple[str, int], dict[str, list[list[float]]]
]  # by cell, method, seed: every observation


def accuracies(draws: list[Tensor], references: Tensor) -> list[float]:
    """C2ST at every observation."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for own, reference in zip(draws, references, strict=True):
        chosen = reference[torch.randperm(len(reference))[:DRAWS]]
        found.append(evaluate.c2st(own.to(where), chosen.to(where)).accuracy)
    return found


def show(
    name: str, count: int, method: str, seed: int, found: list[float], took: dict[str, Any]
) -> bool:
    """One row of the table; whether it is as wanted."""
    mean, error = float(np.mean(found)), float(np.std(found, ddof=1)) / len(found) ** 0.5
    limit = WANTED.get((name, count)) if method == OURS else None
    fine = limit is None or mean <= limit
    note = "" if limit is None else f"  <= {limit} as wanted: {fine}"
    if method == OURS and (name, count) == ("two_moons", 10_000):
        quick = took["seconds"] <= 60 * MINUTES
        note += f"; <= {60 * MINUTES:.0f} s: {quick}"
        fine = fine and quick
    print(
        f"{name:<16} {count:>6} {method:<8} {seed:>4} {mean:>6.3f} {error:>6.3f} {min(found):>6.3f} "
        f"{max(found):>6.3f} {took['parameters']:>8} {took['steps']:>7} {took['seconds']:>7.1f} "
        f"{took['cpu']:>7.1f} {took['drawing']:>7.1f}{note}",
        flush=True,
    )
    return fine


def compare(results: Found, methods: list[str]) -> bool:
    """Ours less sbi's at the same observations: no worse beyond the error in any cell, better in the mean."""
    print(
        "\nours, mean of the seeds, less sbi's, with the error over the observations; below 0 is better"
    )
    fine = []
    for method in methods:
        means = []
        for (name, count), cells in results.items():
            if method not in cells or OURS not in cells:
                continue
            ours, theirs = np.mean(cells[OURS], axis=0), np.mean(cells[method], axis=0)
            less = ours - theirs
            mean, error = less.mean(), less.std(ddof=1) / len(less) ** 0.5
            means.append(mean)
            fine.append(mean <= error)
            print(
                f"{name:<16} {count:>6} {method:<8} {ours.mean():>6.3f} {theirs.mean():>6.3f} "
                f"{mean:>+7.3f} {error:>6.3f}  no worse beyond the error: {fine[-1]}"
            )
        if means:
            fine.append(np.mean(means) < 0)
            print(
                f"{'mean':<23} {method:<8} {'':>13} {np.mean(means):>+7.3f}  better: {fine[-1]}",
                flush=True,
            )
    return all(fine)


def main(args: argparse.Namespace) -> bool:
    """Every task, number of simulations, method and seed."""
    print(HEADER)
    methods = [each for each in args.methods if each != OURS]
    if methods and args.keep is None and peer.toolbox() is None:
        methods = []
    fine, results = [], {}
    for name in args.tasks:
        references = load(name, args.data)["reference_posterior_samples"][: args.observations]
        for count in args.simulations:
            rows = [(OURS, seed) for seed in args.seeds if OURS in args.methods]
            rows += [(method, args.seeds[0]) for method in methods]
            cells: dict[str, list[list[float]]] = {}
            for method, seed in rows:
                draws, took = cell(name, count, seed, method, args)
                pyro.set_rng_seed(seed)  # the classifier's, whether draws are new or kept
                found = accuracies(draws, references)
                cells.setdefault(method, []).append(found)
                fine.append(show(name, count, method, seed, found, took))
            results[name, count] = cells
    if methods and OURS in args.methods:
        fine.append(compare(results, methods))
    return all(fine)
