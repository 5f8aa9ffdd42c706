"""What simulating costs beside torch alone, and how long draws take.

Times are of the processor, so that what else a machine does counts little. Between the guide and torch is the
least that Pyro takes: one trace of the program in a plate, with nothing looked at.
"""

import argparse
import functools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from torch import Tensor

from sbi_parts import VARIANCE, bernoulli_prior, task
from sbi_parts.cells import simulated, trained

REPEATS = {10_000: 101, 100_000: 15}
RATIO, SECONDS = 1.5, 1.0
MANY, DRAWINGS = 100, 7

Simulator = Callable[[int], dict[str, Tensor]]


def bare_two_moons(count: int) -> dict[str, Tensor]:
    """The program of two moons as a function of torch."""
    theta = 2 * torch.rand(count, 2) - 1
    angle = math.pi * (torch.rand(count) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(count)
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    place = torch.stack([-theta.sum(-1).abs(), theta[:, 1] - theta[:, 0]], -1) / math.sqrt(2)
    return {"theta": theta, "x": crescent + place}


def bare_gaussian_linear(count: int) -> dict[str, Tensor]:
    """The linear program as a function of torch."""
    theta = VARIANCE**0.5 * torch.randn(count, 10)
    return {"theta": theta, "x": theta + VARIANCE**0.5 * torch.randn(count, 10)}


def bare_bernoulli_glm(design: Tensor) -> Simulator:
    """The generalized linear program as a function of torch."""
    factor = torch.linalg.cholesky(bernoulli_prior().covariance_matrix)

    def simulate(count: int) -> dict[str, Tensor]:
        theta = torch.randn(count, 10) @ factor.mT
        spikes = torch.bernoulli(torch.sigmoid(theta @ design.mT))
        return {"theta": theta, "x": spikes @ design}

    return simulate


def traced(model: Callable[..., None], count: int) -> Callable[[], object]:
    """One trace of a program in a plate of so many simulations."""

    @torch.no_grad()
    def run() -> object:
        with pyro.plate("simulations", count):
            return poutine.trace(model).get_trace()

    return run


def seconds(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of the processor of each, in turn, so that a busy machine slows all of them.

    In a random order: one that follows another takes memory that is mapped already.
    """
    took: list[list[float]] = [[] for _ in functions]
    shuffle = random.Random(0)
    for _ in range(repeats):
        for i in shuffle.sample(range(len(functions)), len(functions)):
            start = time.process_time()
            functions[i]()
            took[i].append(time.process_time() - start)
    return [statistics.median(each) for each in took]


def simulating(name: str, args: argparse.Namespace) -> bool:
    """A task's simulations by the guide, by Pyro and by torch."""
    guide, _, data = simulated(name, 1000, args.seeds[0], args.data)
    bare: Simulator
    if name == "bernoulli_glm":
        bare = bare_bernoulli_glm(data["design_matrix"])
    else:
        bare = {"two_moons": bare_two_moons, "gaussian_linear": bare_gaussian_linear}[name]
    model, _ = task(name, args.data)
    fine = []
    for count, repeats in REPEATS.items():
        functions = [functools.partial(each, count) for each in (guide.simulate, bare)]
        own, torchs, least = seconds([*functions, traced(model, count)], repeats)
        fine.append(own <= RATIO * torchs)
        print(
            f"{name:<16} {count:>7} {1e3 * own:>8.2f} {1e3 * least:>8.2f} {1e3 * torchs:>8.2f} "
            f"{own / torchs:>6.2f} {least / torchs:>6.2f}   as wanted: {fine[-1]}",
            flush=True,
        )
    return all(fine)


def drawing(name: str, args: argparse.Namespace) -> bool:
    """Draws at one observation and at many."""
    guide, data, _ = trained(name, args.simulations[-1], args.seeds[0], args)
    many = guide.simulate(MANY)["x"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observation = {"x": data["observations"][0]}
        (one,) = seconds([functools.partial(guide.draw, 1000, observation)], DRAWINGS)
        start = time.process_time()
        shape = tuple(guide.draw(1000, {"x": many})["theta"].shape)
    fine = one < SECONDS and shape[:2] == (1000, MANY)
    print(
        f"{name:<16} {one:>15.2f} {time.process_time() - start:>10.1f}  {shape}   as wanted: {fine}",
        flush=True,
    )
    return fine


def main(args: argparse.Namespace) -> bool:
    """Both of every task."""
    print(
        f"\nsimulations, ms of the processor, medians; over torch's\n{'task':<16} {'n':>7} {'guide':>8} "
        f"{'trace':>8} {'torch':>8} {'guide':>6} {'trace':>6}   wanted: guide <= {RATIO}"
    )
    fine = [simulating(name, args) for name in args.tasks]
    print(
        f"\n1000 draws, s of the processor\n{'task':<16} {'one observation':>15} {f'{MANY} at once':>10}   "
        f"wanted: < {SECONDS} of one"
    )
    return all([*fine, *(drawing(name, args) for name in args.tasks)])
