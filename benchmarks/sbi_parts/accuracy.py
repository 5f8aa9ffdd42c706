"""C2ST against reference posteriors, of a guide trained by its defaults."""

import argparse
import time
import warnings
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Predictive
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.train import fit_amortized
from sbi_parts import task

DRAWS = 2000
WANTED = {
    ("two_moons", 1000): 0.60,
    ("two_moons", 10_000): 0.53,
    ("gaussian_linear", 10_000): 0.58,
    ("bernoulli_glm", 10_000): 0.66,
}


Trained = tuple[AutoAmortized, dict[str, Tensor], dict[str, Any]]
_TRAINED: dict[tuple[str, int, int], Trained] = {}  # parts of one run share guides


def trained(name: str, count: int, seed: int, args: argparse.Namespace) -> Trained:
    """A guide, the references, and what its training took."""
    if (name, count, seed) in _TRAINED:
        return _TRAINED[name, count, seed]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data = task(name, args.data)
    start, cpu = time.perf_counter(), time.process_time()
    guide = AutoAmortized(model, observed=["x"], latents=["theta"])
    simulations = guide.simulate(count)
    options: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    history = fit_amortized(guide, simulations, progress=args.progress, **options)
    took = {
        "steps": len(history.losses),
        "minutes": (time.perf_counter() - start) / 60,
        "cpu": (time.process_time() - cpu) / 60,
    }
    _TRAINED[name, count, seed] = guide, data, took
    return guide, data, took


def accuracies(draws: list[Tensor], references: Tensor) -> list[float]:
    """C2ST at every observation."""
    found = []
    for own, reference in zip(draws, references, strict=True):
        chosen = reference[torch.randperm(len(reference))[:DRAWS]]
        found.append(evaluate.c2st(own, chosen).accuracy)
    return found


def show(name: str, count: int, seed: int, found: list[float], took: dict[str, Any]) -> bool:
    """One row of the table; whether it is as wanted."""
    mean, error = float(np.mean(found)), float(np.std(found, ddof=1)) / len(found) ** 0.5
    limit = WANTED.get((name, count))
    fine = limit is None or mean <= limit
    print(
        f"{name:<16} {count:>7} {seed:>4} {mean:>7.3f} {error:>6.3f} {min(found):>6.3f} "
        f"{max(found):>6.3f} {took['steps']:>7} {took['minutes']:>7.1f} {took['cpu']:>7.1f} "
        + ("" if limit is None else f"  <= {limit} as wanted: {fine}"),
        flush=True,
    )
    return fine


def main(args: argparse.Namespace) -> bool:
    """One guide for every task, number of simulations and seed."""
    print(
        f"{'task':<16} {'n':>7} {'seed':>4} {'C2ST':>7} {'error':>6} {'min':>6} {'max':>6} "
        f"{'steps':>7} {'min':>7} {'cpu min':>7}   (training; error over the observations)"
    )
    fine = []
    for name in args.tasks:
        for count in args.simulations:
            for seed in args.seeds:
                guide, data, took = trained(name, count, seed, args)
                predictive = Predictive(guide, num_samples=DRAWS, parallel=True)
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore"
                    )  # of observations at the edge: one in a thousand
                    draws = [predictive(x)["theta"] for x in data["observations"]]
                references = data["reference_posterior_samples"]
                found = accuracies(draws, references)
                fine.append(show(name, count, seed, found, took))
    return all(fine)
