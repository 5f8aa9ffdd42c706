"""Conjugate programs of `benchmarks/guides.py`: plates, constrained supports, evidence in closed form."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

X = torch.tensor([1.0, -0.5, 2.0], dtype=torch.double)
COUNTS = torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=torch.double)
HEADS = torch.tensor([7.0, 2.0, 5.0], dtype=torch.double)


def groups() -> None:
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean, 1.0), obs=X)


def counts() -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("n", dist.Poisson(rate), obs=COUNTS)


def coins() -> None:
    with pyro.plate("coins", 3):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("heads", dist.Binomial(10, p), obs=HEADS)


def dice() -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.factor("n", (torch.tensor([1.0, 2.0, 3.0]) * p.log()).sum())


def _log_beta(a: Tensor) -> Tensor:
    return a.lgamma().sum(-1) - a.sum(-1).lgamma()


def _coins() -> float:
    after = torch.stack([2 + HEADS, 3 + 10 - HEADS], -1)
    before = torch.tensor([2.0, 3.0], dtype=torch.double)
    ways = [math.log(math.comb(10, int(n))) for n in HEADS]
    return float((_log_beta(after) - _log_beta(before)).sum()) + sum(ways)


def _dice() -> float:
    alpha = torch.tensor([1.0, 2.0, 3.0], dtype=torch.double)
    return float(_log_beta(2 * alpha) - _log_beta(alpha))


def _draw(name: str, posterior: dist.TorchDistribution) -> Callable[[int], dict[str, Tensor]]:
    return lambda count: {name: posterior.sample((count,)).double()}


CASES = {
    "normal, plate": (
        groups,
        float(dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum()),
        _draw("mean", dist.Normal(X / 2, math.sqrt(0.5))),
    ),
    "gamma": (
        counts,
        math.lgamma(8) - math.lgamma(2) - 8 * math.log(5) - math.log(12),
        _draw("rate", dist.Gamma(torch.tensor(8.0, dtype=torch.double), 5.0)),
    ),
    "beta, plate": (coins, _coins(), _draw("p", dist.Beta(2 + HEADS, 13 - HEADS))),
    "dirichlet": (
        dice,
        _dice(),
        _draw("p", dist.Dirichlet(torch.tensor([2.0, 4.0, 6.0], dtype=torch.double))),
    ),
}
