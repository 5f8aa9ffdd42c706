"""Rows of the table of processes, one module each; see ``benchmarks/processes.py``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.evaluate import log_likelihood

STEPS = (1, 10, 100, 1000)
TERMS = 50
DECODED = 2
BATCH = 5_000


@dataclass
class Row:
    """What the table prints of a process.

    Attributes:
        name: of the process.
        markov: whether the bound tends to log p as steps grow.
        gaps: log p less the bound and the standard error of that, by number of steps ("1", ..., "inf");
            empty where there is no bound.
        samples: largest deviation of a sampler's moments, or that of its frequencies, in standard errors.
        ode: largest error of the ODE's log-density, nats a dimension.
        notes: printed below the table.
        claims: further numbers and what they may be at most, by what they are.
    """

    name: str
    markov: bool
    gaps: dict[str, tuple[float, float]]
    samples: dict[str, float]
    ode: float | None = None
    notes: list[str] = field(default_factory=list)
    claims: dict[str, tuple[float, float]] = field(default_factory=dict)


def bound_gaps(
    view: Callable[[Denoiser, int | None], TorchDistribution],
    exact: tuple[Denoiser, Tensor],
    data: Tensor,
    control: tuple[Denoiser, Tensor] | None = None,
    steps: tuple[int | None, ...] = (*STEPS, None),
    terms: int = TERMS,
) -> dict[str, tuple[float, float]]:
    """Mean of log p less the bound over data and its standard error, by number of steps.

    Up to ``terms`` evenly spaced terms of the bound are drawn for every datum.

    Args:
        view: the distribution of a denoiser and a number of steps; without a number, that in continuous time.
        exact: the exact denoiser of the data, and log p of ``data``.
        data: (n,) + event.
        control: a denoiser whose bound is tight for *every datum* at any number of steps, and its log p of
            ``data``; scored with the same noise, what it errs by is subtracted. Such is the exact denoiser of
            independent data (a normal, symbols that do not depend on each other): its reverse kernels are
            exact.
        steps: the numbers of steps; None is "inf".
        terms: drawn for every datum, beside those of the decoder.
    """

    def error(steps: int | None, denoiser: Denoiser, truth: Tensor) -> Tensor:
        bound = log_likelihood(
            view(denoiser, steps),
            data,
            num_terms=terms if steps is None else max(2, min(terms, steps)),
            num_samples=DECODED,
            batch_size=BATCH,
            seed=0,
        )
        return (truth - bound.value).double()

    out = {}
    for count in steps:
        gap = error(count, *exact)
        if control is not None:
            gap = gap - error(count, *control)
        name = "inf" if count is None else str(count)
        out[name] = (float(gap.mean()), float(gap.std()) / math.sqrt(len(gap)))
    return out


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
