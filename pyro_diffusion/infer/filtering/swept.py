"""Draws of a posterior that are the ends of independent chains of conditional sweeps, and their verdict."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_diffusion.infer.filtering.verdict import (
    FALSE_ALARM,
    largest,
    misfit,
    misses,
    number,
    which_rows,
)
from pyro_diffusion.likelihoods import Likelihood

__all__ = ["Swept", "SweptVerdict", "judged"]

# A last sweep that moves means by this many times the variance that chance gives them is said to go on: about
# 1 in 2500 filters of 10 chains do so where the distribution no longer changes, 1 in 30 000 of 20 (Student's
# t, for coordinates that are all one; fewer for others).
STILL_CHANGING = 30.0
LEAST_CHAINS = 10


@dataclass(frozen=True)
class SweptVerdict:
    r"""How far sweeps still change their chains, and what speaks against the draws.

    Tensors have the batch shape of the filters, () for one. What compares the last sweep with the one before
    is NaN where there is one sweep.

    Attributes:
        num_particles: N of every sweep.
        num_chains: M.
        sweeps: S.
        renewed: share of chains whose first state, at t_K, the last sweep replaced.
        moved: share of chains whose draw it replaced.
        change: how far it moved the means over chains, in standard deviations of the draws, root mean square
            over coordinates. Chance alone gives ``change_by_chance``.
        change_by_chance: that of as many chains whose distribution does not change.
        misfit: mean of :math:`|r(x)|^2 / m` over draws, near 1; NaN without residuals.
        misfit_p_value: as of :class:`~pyro_diffusion.infer.filtering.verdict.Verdict`.
        problems: one sentence each; empty if nothing speaks against the draws.
    """

    num_particles: int
    num_chains: int
    sweeps: int
    renewed: Tensor
    moved: Tensor
    change: Tensor
    change_by_chance: Tensor
    misfit: Tensor
    misfit_p_value: Tensor
    problems: tuple[str, ...] = ()

    @property
    def believable(self) -> bool:
        """Whether nothing speaks against the draws; what no path found, no figure can know."""
        return not self.problems

    def __str__(self) -> str:
        chains, sweeps = _counted(self.num_chains, "chain"), _counted(self.sweeps, "sweep")
        title = f"{chains}, {sweeps} of {self.num_particles} particles"
        count = self.renewed.numel()
        title += f", the worst of {count} filters" if count > 1 else ""
        by_chance = number(largest(self.change_by_chance), 2)
        rows = [
            ("draws replaced by the last", number(self.moved.min(), 2)),
            ("first states replaced", number(self.renewed.min(), 2)),
            ("means moved, in sds", f"{number(largest(self.change), 2)} (by chance {by_chance})"),
            ("misfit chi^2 a residual", number(largest(self.misfit), 2)),
            ("verdict", "nothing speaks against it" if self.believable else "not to be believed"),
        ]
        lines = [title, *(f"  {name:<28} {value}" for name, value in rows)]
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Swept:
    """Unweighted, independent draws of a posterior, one of each chain.

    Attributes:
        history: (S, M) + batch + event, the draw of every chain after each sweep.
        verdict: how far sweeps still change them: ``print(swept.verdict)``.
    """

    history: Tensor
    verdict: SweptVerdict

    @property
    def value(self) -> Tensor:
        """The draws, (M,) + batch + event."""
        return self.history[-1]

    def __len__(self) -> int:
        return self.history.shape[1]


def judged(
    history: Tensor,
    x0: Tensor,
    ends: tuple[list[Tensor], list[Tensor]] | None,
    likelihood: Likelihood,
    filters: torch.Size,
    num_particles: int,
) -> Swept:
    """Draws with their verdict.

    Args:
        history: (S, M) + batch + event, values of the site.
        x0: the last, as the likelihood takes them.
        ends: the last two paths of all chains; None where there is one.
        likelihood: of the program.
        filters: of every chain.
        num_particles: N.
    """
    sweeps, chains = history.shape[:2]
    unknown = torch.full(filters, math.nan, dtype=torch.float64, device=x0.device)
    renewed = moved = change = by_chance = unknown
    if ends is not None:
        renewed, moved = (
            (old != new).reshape(chains, *filters, -1).any(-1).double().mean(0)
            for old, new in ((ends[0][0], ends[1][0]), (ends[0][-1], ends[1][-1]))
        )
        last = history[-1].double().reshape(chains, *filters, -1)
        step = last - history[-2].double().reshape(last.shape)
        scale, noise = (v.var(0, correction=min(chains - 1, 1)).mean(-1) for v in (last, step))
        scale = scale.where(scale > 0, math.nan)  # of one chain it is not known
        change = (step.mean(0).square().mean(-1) / scale).sqrt()
        by_chance = (noise / chains / scale).sqrt()
    even = torch.full((chains, *filters), -math.log(chains), dtype=torch.float64, device=x0.device)
    chi2, p_value = misfit(likelihood, x0, even)
    figures = (renewed, moved, change, by_chance, chi2, p_value)
    verdict = SweptVerdict(num_particles, chains, sweeps, *figures)
    return Swept(history, dataclasses.replace(verdict, problems=_problems(verdict)))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _problems(verdict: SweptVerdict) -> tuple[str, ...]:
    """What speaks against draws, one sentence each."""
    problems = []
    going = verdict.change.square() > STILL_CHANGING * verdict.change_by_chance.square()
    if verdict.num_chains >= LEAST_CHAINS and bool(going.any()):
        problems.append(
            f"the last sweep still moved means by {number(largest(verdict.change[going]), 2)} posterior "
            f"standard deviations{which_rows(going)}: use more sweeps or more particles"
        )
    missed = verdict.misfit_p_value < FALSE_ALARM / max(verdict.misfit_p_value.numel(), 1)
    if bool(missed.any()):
        problems.append(misses(verdict.misfit, missed))
    return tuple(problems)
