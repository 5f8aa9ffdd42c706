"""Rows of the table of processes, one module each; see ``benchmarks/processes.py``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

STEPS = (1, 10, 100, 1000)


@dataclass
class Row:
    """What the table prints of a process.

    Attributes:
        name: of the process.
        markov: whether the bound tends to log p as steps grow.
        gaps: log p less the bound and the standard error of that, by number of steps ("1", ..., "inf").
        samples: largest deviation of a sampler's moments, or that of its frequencies, in standard errors.
        ode: largest error of the ODE's log-density, nats a dimension.
        notes: printed below the table.
    """

    name: str
    markov: bool
    gaps: dict[str, tuple[float, float]]
    samples: dict[str, float]
    ode: float | None = None
    notes: list[str] = field(default_factory=list)


def gap(
    log_prob: Callable[[Tensor], Tensor], data: Tensor, truth: Tensor, batch: int = 50_000
) -> tuple[float, float]:
    """Mean of ``truth - log_prob(data)`` over draws, and its standard error."""
    with torch.no_grad():
        parts = [
            t - log_prob(x) for x, t in zip(data.split(batch), truth.split(batch), strict=True)
        ]
    values = torch.cat(parts).double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def frequencies(draws: Tensor, probs: Tensor) -> float:
    """How far integer draws, (n, d), are from a table: chi-square, as standard deviations of a normal.

    By Wilson and Hilferty's cube root; a table that is right gives a standard normal number.
    """
    index = torch.zeros(len(draws), dtype=torch.int64)
    for column, size in zip(draws.T, probs.shape, strict=True):
        index = index * size + column
    want = probs.flatten() * len(draws)
    found = torch.bincount(index, minlength=len(want))
    freedom = len(want) - 1
    spread = 2 / (9 * freedom)
    root = (float(((found - want).square() / want).sum()) / freedom) ** (1 / 3)
    return (root - (1 - spread)) / math.sqrt(spread)
