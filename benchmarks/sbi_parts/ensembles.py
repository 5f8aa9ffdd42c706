"""Whether the mixture of guides of several seeds is better than one of them: C2ST."""

import argparse
import math
import time
import warnings
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.infer import AutoAmortized, AutoEnsemble
from pyro_diffusion.train import fit_amortized
from sbi_parts import task

DRAWS = 2000
MEMBERS = 5


def accuracies(guide: AutoAmortized, data: dict[str, Tensor], count: int) -> list[float]:
    """C2ST at the first observations."""
    found = []
    references = data["reference_posterior_samples"][:count]
    for x, reference in zip(data["observations"][:count], references, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of observations at the edge
            drawn = guide.draw(DRAWS, {"x": x})["theta"]
        chosen = reference[torch.randperm(len(reference))[:DRAWS]]
        found.append(evaluate.c2st(drawn, chosen).accuracy)
    return found


def main(args: argparse.Namespace) -> None:
    """One table of simulations for each seed, five guides on it, and their mixture."""
    options: dict[str, Any] = {"progress": args.progress}
    if args.steps is not None:
        options["steps"] = args.steps
    count = args.simulations[0]
    print(
        f"\nensembles of {MEMBERS} on {count} simulations: C2ST over the observations", flush=True
    )
    for name in args.tasks:
        model, data = task(name, args.data)
        for seed in args.seeds:
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            start = time.process_time()
            members = [
                AutoAmortized(model, observed=["x"], latents=["theta"]) for _ in range(MEMBERS)
            ]
            guide = AutoEnsemble(members)
            simulations = guide.simulate(count)
            for member in members:
                fit_amortized(member, simulations, **options)
            took = (time.process_time() - start) / 60
            print(f"{name}, seed {seed}: trained in {took:.1f} cpu min", flush=True)
            whole = np.array(accuracies(guide, data, args.observations))
            show("mixture", whole)
            each = []
            for i, member in enumerate(members):
                each.append(accuracies(member, data, args.observations))
                show(f"member {i}", np.array(each[-1]))
            show("mixture less members' mean", whole - np.array(each).mean(0))


def show(name: str, values: Any) -> None:
    """A mean with its error over observations."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    print(f"  {name:<28} {float(np.mean(values)):>7.3f} ({error:.3f})", flush=True)
