"""Programs of sbibm, and the parts of `benchmarks/sbi.py`."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from sbi_parts.programs import HELD_OUT, base, in_program, observation
from sbi_parts.references import reference

__all__ = ["TASKS", "bernoulli_design", "gaussian_linear", "task", "two_moons"]

TASKS = ["two_moons", "gaussian_linear", "bernoulli_glm"]
VARIANCE = 0.1
FIRST = 1000  # seed of the first observation of our own


def two_moons(x: Tensor | None = None) -> None:
    """A crescent whose place only tells |theta_1 + theta_2|."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    angle = pyro.sample("angle", dist.Uniform(-math.pi / 2, math.pi / 2))
    radius = pyro.sample("radius", dist.Normal(0.1, 0.01))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    place = torch.stack([-theta.sum(-1).abs(), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)
    pyro.sample("x", dist.Delta(crescent + place, event_dim=1), obs=x)


def gaussian_linear(x: Tensor | None = None, noise: float = 1.0) -> None:
    """Ten numbers, each seen through noise as wide as its prior (times ``noise``)."""
    sd = math.sqrt(VARIANCE)
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), sd).to_event(1))
    pyro.sample("x", dist.Normal(theta, noise * sd).to_event(1), obs=x)


def bernoulli_prior() -> dist.MultivariateNormal:
    """An offset, and a filter that is smooth."""
    steps = torch.eye(9) - torch.ones(8).diag(-1)
    factor = steps @ steps + (torch.arange(9) / 9).sqrt().diag()
    precision = torch.block_diag(torch.tensor([[0.5]]), factor.mT @ factor)
    return dist.MultivariateNormal(torch.zeros(10), precision_matrix=precision)


def bernoulli_glm(design: Tensor) -> Callable[..., None]:
    """A generalized linear model, seen through its sufficient statistic."""

    def model(x: Tensor | None = None) -> None:
        theta = pyro.sample("theta", bernoulli_prior())
        spikes = pyro.sample("spikes", dist.Bernoulli(logits=theta @ design.mT).to_event(1))
        pyro.sample("x", dist.Delta(spikes @ design, event_dim=1), obs=x)

    return model


def bernoulli_likelihood(design: Tensor) -> Callable[..., None]:
    """The same latents and data by their density, up to the number of trains of one statistic."""

    def model(x: Tensor) -> None:
        theta = pyro.sample("theta", bernoulli_prior())
        softplus = torch.nn.functional.softplus(theta @ design.mT)
        pyro.factor("likelihood", (theta * x).sum(-1) - softplus.sum(-1))

    return model


def bernoulli_design(folder: Path) -> Tensor:
    """The 100 rows of the design."""
    return load("bernoulli_glm", folder)["design_matrix"]


def load(name: str, folder: Path) -> dict[str, Tensor]:
    """A task's observations and reference posteriors."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(file[k]) for k in file}


@functools.cache
def _reference(name: str, i: int) -> tuple[Tensor, Tensor]:
    x = observation(name, FIRST + i)
    return x, reference(name, x, i)


def own_references(name: str) -> dict[str, Tensor]:
    """Observations that the program returns for ten seeds, and draws of their posteriors."""
    pairs = [_reference(name, i) for i in range(10)]
    x, draws = (torch.stack(each) for each in zip(*pairs, strict=True))
    return {"observations": x, "reference_posterior_samples": draws}


def task(name: str, folder: Path | None) -> tuple[Callable[..., None], dict[str, Tensor]]:
    """A program and its reference posteriors: those of a folder, or of observations of our own."""
    if name in HELD_OUT:
        data = load(base(name), folder) if folder else own_references(base(name))
        data["observations"] = in_program(name, data["observations"])
        return HELD_OUT[name], data
    assert folder is not None
    data = load(name, folder)
    if name == "bernoulli_glm":
        return bernoulli_glm(data["design_matrix"]), data
    return {"two_moons": two_moons, "gaussian_linear": gaussian_linear}[name], data
