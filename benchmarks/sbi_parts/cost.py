"""What simulating costs beside torch alone, and how long draws take."""

import argparse
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from sbi_parts import VARIANCE, bernoulli_prior
from sbi_parts.cells import simulated, trained

REPEATS = 7
SIZES = (10_000, 100_000)
RATIO, SECONDS = 1.5, 1.0
MANY = 100

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


def seconds(functions: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each, in turn, so that a busy machine slows all of them."""
    took: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for each, function in zip(took, functions, strict=True):
            start = time.perf_counter()
            function()
            each.append(time.perf_counter() - start)
    return [statistics.median(each) for each in took]


def simulating(name: str, args: argparse.Namespace) -> bool:
    """A task's simulations by the guide and by torch."""
    guide, _, data = simulated(name, 1000, args.seeds[0], args.data)
    bare: Simulator
    if name == "bernoulli_glm":
        bare = bare_bernoulli_glm(data["design_matrix"])
    else:
        bare = {"two_moons": bare_two_moons, "gaussian_linear": bare_gaussian_linear}[name]
    fine = []
    for count in SIZES:
        by_guide, by_torch = (
            functools.partial(guide.simulate, count),
            functools.partial(bare, count),
        )
        own, torchs = seconds([by_guide, by_torch])
        fine.append(own <= RATIO * torchs)
        print(
            f"{name:<16} {count:>7} {1e3 * own:>8.1f} {1e3 * torchs:>8.1f} {own / torchs:>6.2f}   "
            f"as wanted: {fine[-1]}",
            flush=True,
        )
    return all(fine)


def drawing(name: str, args: argparse.Namespace) -> bool:
    """Draws at one observation and at many."""
    guide, data, _ = trained(name, args.simulations[-1], args.seeds[0], args)
    many = guide.simulate(MANY)["x"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (one,) = seconds([functools.partial(guide.draw, 1000, {"x": data["observations"][0]})])
        start = time.perf_counter()
        shape = tuple(guide.draw(1000, {"x": many})["theta"].shape)
    fine = one < SECONDS and shape[:2] == (1000, MANY)
    print(
        f"{name:<16} {one:>15.2f} {time.perf_counter() - start:>10.1f}  {shape}   as wanted: {fine}",
        flush=True,
    )
    return fine


def main(args: argparse.Namespace) -> bool:
    """Both of every task."""
    print(
        f"\nsimulations, ms (the median of {REPEATS})\n{'task':<16} {'n':>7} {'guide':>8} {'torch':>8} "
        f"{'ratio':>6}   wanted: <= {RATIO}"
    )
    fine = [simulating(name, args) for name in args.tasks]
    print(
        f"\n1000 draws, s\n{'task':<16} {'one observation':>15} {f'{MANY} at once':>10}   "
        f"wanted: < {SECONDS} of one"
    )
    return all([*fine, *(drawing(name, args) for name in args.tasks)])
