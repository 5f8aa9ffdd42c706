"""Truncated rounds for one observation beside one round of as many simulations, or more."""

import argparse
import math
import time
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.train import fit_amortized, fit_truncated
from sbi_parts import task

DRAWS = 2000
EACH, ROUNDS = 250, 4
NOISE = 0.01
GAIN = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])


def narrow(x: Tensor | None = None) -> None:
    """Two numbers, of which a linear map is seen through noise of 1% of their prior."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(theta @ GAIN.mT, NOISE).to_event(1), obs=x)


def fitted(
    model: Any, x: Tensor | None, count: int, rounds: int, args: argparse.Namespace
) -> tuple[AutoAmortized, Any, float]:
    """A guide by one round, or by several for one observation, and the minutes of processor it took."""
    pyro.clear_param_store()
    start = time.process_time()
    guide = AutoAmortized(model, observed=["x"], latents=["theta"])
    options: dict[str, Any] = {"progress": args.progress}
    if args.steps is not None:
        options["steps"] = args.steps
    found = None
    if rounds > 1:
        assert x is not None
        found = fit_truncated(guide, {"x": x}, count, rounds=rounds, options=options)
    else:
        fit_amortized(guide, guide.simulate(count), **options)
    return guide, found, (time.process_time() - start) / 60


def closed_form(args: argparse.Namespace) -> None:
    """Errors of means (in posterior sds) and of sds, over seeds and observations."""
    precision = torch.eye(2) + GAIN.mT @ GAIN / NOISE**2
    covariance = precision.inverse()
    sds = covariance.diagonal().sqrt()
    print(
        f"\nlinear normal, noise {NOISE}: posterior sd {float(sds[0]):.4f} of prior 1\n"
        f"{'seed':>4} {'simulations':>14} {'mean: error/sd':>15} {'sd: error':>10} {'cpu min':>8}"
    )
    for seed in args.seeds:
        generator = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(2, generator=generator)
        mean = covariance @ (GAIN.mT @ x) / NOISE**2
        for count, rounds in ((EACH, ROUNDS), (EACH * ROUNDS, 1), (4 * EACH * ROUNDS, 1)):
            pyro.set_rng_seed(seed)
            guide, found, took = fitted(narrow, x, count, rounds, args)
            theta = guide.draw(DRAWS, {"x": x})["theta"]
            off, wide = (theta.mean(0) - mean).abs() / sds, (theta.std(0) / sds - 1).abs()
            name = f"{rounds} x {count}" if rounds > 1 else str(count)
            print(
                f"{seed:>4} {name:>14} {float(off.mean()):>15.3f} {float(wide.mean()):>10.3f} {took:>8.2f}",
                flush=True,
            )
            if found is not None:
                print(found)


def accuracy(args: argparse.Namespace) -> None:
    """C2ST at each observation of two_moons, of a guide for it by rounds and of one for all."""
    model, data = task("two_moons", args.data)
    references = data["reference_posterior_samples"]
    print(
        f"\ntwo_moons, C2ST: {ROUNDS} rounds of {EACH} simulations for each observation, and one round of "
        f"{EACH * ROUNDS} and {4 * EACH * ROUNDS}\n{'seed':>4} {'obs':>3} {'rounds':>7} "
        f"{'one':>7} {'one of 4 times':>15}  {'prior inside':>13} {'in margin':>10}"
    )
    for seed in args.seeds:
        one = []
        for count in (EACH * ROUNDS, 4 * EACH * ROUNDS):
            pyro.set_rng_seed(seed)
            one.append(fitted(model, None, count, 1, args)[0])
        table = []
        for i, x in enumerate(data["observations"][: args.observations]):
            pyro.set_rng_seed(seed)
            guide, found, _ = fitted(model, x, EACH, ROUNDS, args)
            chosen = references[i][torch.randperm(len(references[i]))[:DRAWS]]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of observations at the edge
                row = [
                    evaluate.c2st(each.draw(DRAWS, {"x": x})["theta"], chosen).accuracy
                    for each in (guide, *one)
                ]
            table.append(row)
            last = found.rounds[-1]
            print(
                f"{seed:>4} {i:>3} {row[0]:>7.3f} {row[1]:>7.3f} {row[2]:>15.3f}  {last.acceptance:>13.3g} "
                f"{last.margin:>10.3f}",
                flush=True,
            )
        for name, values in zip(("rounds", "one", "4 times"), np.array(table).T, strict=True):
            error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
            print(f"seed {seed}, {name}: {float(np.mean(values)):.3f} ({error:.3f})", flush=True)


def main(args: argparse.Namespace) -> None:
    """Closed forms, or two_moons where there are data."""
    if args.data is None:
        closed_form(args)
    else:
        accuracy(args)
