"""What a program's trial runs found, and whether those of another program hold for it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.likelihoods.batches import BatchedProgram
from pyro_diffusion.likelihoods.first_run import FirstRun
from pyro_diffusion.likelihoods.trials import (
    Dependence,
    agree,
    choose_vectorization,
    find_dependence,
    trials,
)

__all__ = ["Analysis", "analyse"]

Latents = Mapping[str, Tensor]


class Analysis(NamedTuple):
    """What trial runs found, and the structure that it holds for.

    Attributes:
        signature: of the program, its arguments and latents.
        dependence: how observed sites depend on x_0.
        vectorized: whether a batch is put left of the plates, with one set of latents (False) and with one
            for each x_0 (True).
    """

    signature: Any
    dependence: Dependence
    vectorized: dict[bool, bool]


def analyse(
    program: BatchedProgram,
    first: FirstRun,
    signature: Any,
    latents: Latents,
    precedent: Analysis | None,
) -> Analysis:
    """What depends on x_0, and how a batch of them, or of latents too, is to be run.

    By trial runs; or by precedent, if the structure is the same and a batch has the numbers it should.

    Raises:
        ValueError: if a log-density is NaN, or the program cannot be run on a batch in either way.
    """
    draws, latents = trials(program.prior), program.single(latents)
    same = precedent is not None and precedent.signature == signature
    if precedent and same and _confirmed(program, precedent, draws, latents, first):
        return precedent
    dependence = find_dependence(lambda x0: program.run(x0, latents), draws)
    index = torch.arange(dependence.batch_size) % len(draws)
    single = [program.log_prob(program.run(x0, latents), 0)[0] for x0 in draws]
    expected = torch.stack(single).detach()[index]
    vectorized = {}
    for many in (False, True)[: 1 + bool(latents)]:
        copies = _copies(latents, len(index) if many else 0)

        def log_prob(way: bool, many: bool = many, copies: Latents = copies) -> Tensor:
            return program.run_batch(draws[index], copies, program.log_prob, {many: way})[0]

        vectorized[many] = choose_vectorization(log_prob, expected, dependence.silent)
    return Analysis(signature, dependence, vectorized)


def _confirmed(
    program: BatchedProgram, known: Analysis, draws: Tensor, latents: Latents, first: FirstRun
) -> bool:
    """Whether a batch of the trial draws has the first one's number, and differs where it did."""
    # The first draw is not the first row, which an index from the left would find.
    index = (torch.arange(known.dependence.batch_size) + 1) % len(draws)
    expected = program.log_prob(first.observed, 0)[0].detach()
    for many in known.vectorized:
        copies = _copies(latents, len(index) if many else 0)
        try:
            with torch.no_grad():
                parts = program.run_batch(draws[index], copies, program.log_probs, known.vectorized)
        except Exception:  # whatever it is, the whole analysis will meet and report it
            return False
        total = sum(parts[1:], parts[0])[index == 0]
        if not agree(total, expected.expand_as(total)):
            return False
        names = [site["name"] for site in first.observed]
        varying = {n for n, v in zip(names, parts, strict=True) if not _alike(v[:3])}
        if varying != known.dependence.varying:
            return False
    return True


def _copies(latents: Latents, count: int) -> dict[str, Tensor]:
    """So many copies of single latents; 0 for themselves."""
    shape = (count,) if count else ()
    return {k: v.expand((*shape, *v.shape)) for k, v in latents.items()}


def _alike(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())
