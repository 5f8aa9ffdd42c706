"""Draws of a posterior that are the ends of independent chains of conditional sweeps, and their verdict."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_diffusion.estimate import UNBIASED, Estimate
from pyro_diffusion.infer.filtering.independent_runs import independent_variance
from pyro_diffusion.infer.filtering.small_runs import SmallRuns, no_run_left
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
# A share of runs that die from which the verdict speaks against draws, which are those of runs that survive.
MANY_DIE = 0.25


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
        died: share of first runs that no particle survived, and that were made again.
        copied: share of draws that are another's, as their run died each time.
        dead: filters all of whose runs died: no draws.
        effective_runs: :math:`(\sum_m \hat Z_m)^2 / \sum_m \hat Z_m^2` of M, how many runs the evidence and
            weighted draws rest on; draws of equal weight do not.
        log_evidence: of all filters.
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
    died: Tensor
    copied: Tensor
    dead: Tensor
    effective_runs: Tensor
    log_evidence: Estimate
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
            ("runs that died", number(self.died.max(), 2)),
            ("effective runs of evidence", number(self.effective_runs.min())),
            ("log evidence", str(self.log_evidence)),
            ("verdict", "nothing speaks against it" if self.believable else "not to be believed"),
        ]
        lines = [title, *(f"  {name:<28} {value}" for name, value in rows)]
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Swept:
    r"""Independent draws of a posterior, one of each chain, with the evidence of the chains' first runs.

    Evenly weighted, the draws are spread as those of a chain are, with a bias of order 1/N that sweeps take
    away. By ``log_weights`` they have none of it: :math:`E[\hat Z_m f(x_m)] = Z\, E[f(x) | y]` for any N, S
    so that weighted averages are exact in the limit of many draws. They rest on
    ``verdict.effective_runs``, which few particles under a network make very few.

    Attributes:
        history: (S, M) + batch + event, the draw of every chain after each sweep.
        log_evidence_runs: (M,), or (M,) + batch where every datum of a plate has a filter of its own: log of
            the unbiased :math:`\hat Z_m` of each chain's first run, -inf where no particle survived it.
        verdict: how far sweeps still change them: ``print(swept.verdict)``.
    """

    history: Tensor
    log_evidence_runs: Tensor
    verdict: SweptVerdict

    @property
    def value(self) -> Tensor:
        """The draws, (M,) + batch + event; NaN for a datum that no particle of any run explains."""
        return self.history[-1]

    @property
    def log_weights(self) -> Tensor:
        """The runs' shares of the evidence, normalized, of the shape of ``log_evidence_runs``.

        NaN for a datum none of whose first runs survived, which the verdict tells.
        """
        return self.log_evidence_runs.log_softmax(0)

    @property
    def log_evidence(self) -> Estimate:
        """Log of the mean of the runs' unbiased estimates of p(y), summed over the plate."""
        return self.verdict.log_evidence

    @property
    def log_evidence_terms(self) -> Tensor:
        """Batch (or ()), what each filter contributes."""
        return _log_mean(self.log_evidence_runs)

    @property
    def log_evidence_errors(self) -> Tensor:
        """Standard error of each filter's log-evidence by the spread of its runs, batch; infinite where it is
        not estimated, of fewer than 16 runs that survive."""
        return independent_variance(self.log_evidence_runs).sqrt()

    def __len__(self) -> int:
        return self.history.shape[1]


def judged(
    history: Tensor,
    x0: Tensor,
    ends: tuple[list[Tensor], list[Tensor]] | None,
    runs: SmallRuns,
    likelihood: Likelihood,
    num_particles: int,
) -> Swept:
    """Draws with their verdict.

    Args:
        history: (S, M) + batch + event, values of the site.
        x0: the last, as the likelihood takes them.
        ends: the last two paths of all chains; None where there is one.
        runs: the first sweep.
        likelihood: of the program.
        num_particles: N.
    """
    log_z, dead = runs.log_evidence, runs.dead
    chains = len(log_z)
    unknown = torch.full_like(log_z[0], math.nan)
    renewed = moved = change = by_chance = unknown
    if ends is not None:
        renewed, moved = (
            (old != new).reshape(*log_z.shape, -1).any(-1).double().mean(0)
            for old, new in ((ends[0][0], ends[1][0]), (ends[0][-1], ends[1][-1]))
        )
        last = history[-1].double().reshape(*log_z.shape, -1)
        step = last - history[-2].double().reshape(last.shape)
        scale, noise = (v.var(0, correction=min(chains - 1, 1)).mean(-1) for v in (last, step))
        scale = scale.where(scale > 0, math.nan)  # of one chain it is not known
        change = (step.mean(0).square().mean(-1) / scale).sqrt()
        by_chance = (noise / chains / scale).sqrt()
    chi2, p_value = misfit(likelihood, x0, torch.full_like(log_z, -math.log(chains)))
    none = (log_z == -math.inf).all(0)  # some may have survived when made again
    shares = log_z.where(~none, 0.0).softmax(0)
    verdict = SweptVerdict(
        num_particles,
        chains,
        len(history),
        renewed,
        moved,
        change,
        by_chance,
        chi2.masked_fill(dead, math.nan),
        p_value.masked_fill(dead, math.nan),
        died=(log_z == -math.inf).double().mean(0),
        copied=runs.copied.double().mean(0).where(~dead, 0.0),
        dead=dead,
        effective_runs=shares.square().sum(0).reciprocal().where(~none, 0.0),
        log_evidence=Estimate(
            float(_log_mean(log_z).sum()),
            float(independent_variance(log_z).sum().sqrt()),
            UNBIASED,
            "nats",
            chains * num_particles * (len(runs.path) - 1),
        ),
    )
    return Swept(history, log_z, dataclasses.replace(verdict, problems=_problems(verdict)))


def _log_mean(log_z: Tensor) -> Tensor:
    return log_z.logsumexp(0) - math.log(len(log_z))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _problems(verdict: SweptVerdict) -> tuple[str, ...]:
    """What speaks against draws, one sentence each."""
    problems = []
    if bool(verdict.dead.any()):
        problems.append(
            f"{no_run_left(verdict.num_chains, verdict.num_particles, verdict.dead)}; there the evidence "
            "is 0, and draws are NaN"
        )
    many = ~verdict.dead & ((verdict.died > MANY_DIE) | (verdict.copied > 0))
    if bool(many.any()):
        copied, weighted = verdict.copied[many].max(), bool((verdict.died[many] < 1).all())
        problems.append(
            f"{number(100 * verdict.died[many].max(), 0)} % of {verdict.num_chains} runs were left without a "
            f"particle{which_rows(many)} and made again"
            + (f" (in vain {number(100 * copied, 0)} %, which copy others)" if copied > 0 else "")
            + ": draws are biased towards where runs survive; use more particles a run, another guidance"
            + (
                ", or log_weights, which are not"
                if weighted
                else " (where all died, log_weights are NaN)"
            )
        )
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
