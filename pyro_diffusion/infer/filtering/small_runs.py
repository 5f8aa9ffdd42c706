"""Small runs of particles side by side, one path of each; those that die are made again."""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pyro.infer.smcfilter import SMCFailed
from torch import Tensor

from pyro_diffusion.infer.filtering.resampling import multinomial_ancestors
from pyro_diffusion.infer.filtering.verdict import which_rows

if TYPE_CHECKING:
    from pyro_diffusion.infer.filtering.twisted_smc import TwistedSMC

__all__ = ["REPEATS", "SmallRuns", "no_run_left", "small_runs", "swept_again"]

# How often runs that died are made again. Of runs half of which die, 1 in 32 is left without a draw.
REPEATS = 4


@dataclass
class SmallRuns:
    """M runs side by side, (M,) + filters each.

    Attributes:
        path: a state at every time, (M,) + batch + event, from noise to data.
        log_evidence: log of the unbiased estimate that each run makes at its first try, -inf where it died.
        copied: runs that died at every try; their path is that of another run of the same datum.
        dead: filters all of whose runs died at every try; their paths mean nothing.
    """

    path: list[Tensor]
    log_evidence: Tensor
    copied: Tensor
    dead: Tensor


def small_runs(smc: "TwistedSMC", count: int, most: int) -> SmallRuns:
    """Run as many filters of every datum, ``most`` at once, and those that die again with fresh particles.

    Tries are independent, and a datum's runs take those that survived in order, so every path is drawn as one
    of a run that survives. The program is that of all data: a repeat runs as many of each as died of one.

    Raises:
        SMCFailed: (a ``ValueError``) if no run of any datum survives.
    """
    path, log_evidence, reason = _side_by_side(smc, count, most)
    left = log_evidence == -math.inf
    for _ in range(REPEATS):
        lost = int(left.sum(0).max())
        if not lost:
            break
        again, found, why = _side_by_side(smc, lost, most)
        reason = why or reason
        if again is not None:
            alive = found > -math.inf
            path, left = (again, ~alive) if path is None else _filled(path, left, again, alive)
    dead = left.all(0)
    if path is None or bool(dead.all()):
        raise SMCFailed(no_run_left(count, smc.num_particles, torch.ones_like(dead), reason))
    # Who is left without a run shares that of another, any with the same chance.
    shares = (~left).double() / (~left).sum(0).clamp(min=1)
    path = _taken(path, path, multinomial_ancestors(shares), left)
    return SmallRuns(path, log_evidence, left, dead)


def no_run_left(count: int, num_particles: int, dead: Tensor, reason: str = "") -> str:
    """That data have no draw, in words."""
    return (
        f"observations: got none of {count} runs of {num_particles} particles that explains them"
        f"{which_rows(dead)}, neither at first nor in {REPEATS} repeats, expected some: use more particles a "
        f"run, give these observations more noise, or take another guidance{f' ({reason})' if reason else ''}"
    )


def swept_again(
    smc: "TwistedSMC", path: list[Tensor], most: int, keep_others: bool
) -> tuple[list[Tensor], Tensor]:
    """Paths after one more conditional sweep of each, ``most`` at once, and which filters died in it."""
    paths, dead = [], []
    for first in range(0, len(path[0]), most):
        part = [x[first : first + most] for x in path]
        done = _repeated(smc, len(part[0]))._swept(part, keep_others=keep_others)
        paths.append(done.path())
        dead.append(done.dead)
    return _joined(paths), torch.cat(dead)


def _side_by_side(
    smc: "TwistedSMC", count: int, most: int
) -> tuple[list[Tensor] | None, Tensor, str]:
    """Paths, None if all died, with every run's log-evidence, and why all died."""
    sizes = [min(most, count - first) for first in range(0, count, most)]
    paths: list[list[Tensor] | None] = []
    evidence, reason = [], ""
    for size in sizes:
        try:
            runs = _repeated(smc, size)._swept(None, keep_others=True)
            paths.append(runs.path())
            evidence.append(runs.log_evidence)
        except SMCFailed as error:
            paths.append(None)
            shape = (size, *smc.chain.filters)
            nothing = torch.full(shape, -math.inf, dtype=torch.float64, device=smc.chain.device)
            evidence.append(nothing)
            reason = str(error)
    log_evidence, some = torch.cat(evidence), next((p for p in paths if p is not None), None)
    if some is None:
        return None, log_evidence, reason
    # states of runs that died mean nothing: any fill their places
    return (
        _joined(
            [
                [x[:1].expand(size, *x.shape[1:]) for x in some] if path is None else path
                for path, size in zip(paths, sizes, strict=True)
            ]
        ),
        log_evidence,
        "",
    )


def _repeated(smc: "TwistedSMC", count: int) -> "TwistedSMC":
    """The same with as many filters of every datum."""
    several = copy.copy(smc)
    several.chain = smc.chain.repeated(count)
    return several


def _joined(paths: list[list[Tensor]]) -> list[Tensor]:
    """Paths of parts as those of all."""
    if len(paths) == 1:
        return paths[0]
    return [torch.cat(states) for states in zip(*paths, strict=True)]


def _filled(
    path: list[Tensor], left: Tensor, again: list[Tensor], alive: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The k-th run that is left without a path takes the k-th of the new ones that survived."""
    place = left.cumsum(0) - 1
    order = alive.to(torch.uint8).argsort(dim=0, descending=True, stable=True)
    filled = left & (place < alive.sum(0))
    index = order.gather(0, place.clamp(0, len(order) - 1))
    return _taken(path, again, index, filled), left & ~filled


def _taken(path: list[Tensor], source: list[Tensor], index: Tensor, where: Tensor) -> list[Tensor]:
    """A path with states of another's runs in some places, (M,) + filters."""
    if not bool(where.any()):
        return path

    def one(x: Tensor, y: Tensor) -> Tensor:
        extra = (1,) * (x.dim() - index.dim())
        taken = y.take_along_dim(index.reshape(index.shape + extra), 0)
        return taken.where(where.reshape(where.shape + extra), x)

    return [one(x, y) for x, y in zip(path, source, strict=True)]
