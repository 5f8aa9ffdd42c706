"""Whether a run of annealed particles may be believed, and if not, why and what to change."""

import dataclasses
import math
from dataclasses import dataclass

from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from pyro_diffusion.estimate import Estimate
from pyro_diffusion.infer.filtering.resampling import LEAST_ANCESTORS

__all__ = ["AGREE", "AnnealedVerdict", "judge"]

HIGHEST_KHAT = 0.7
HIGHEST_RHAT = 1.1
LARGEST_ERROR = 0.5  # nats
LEAST_ACCEPTANCE = 0.15
FALSE_ALARM = 1e-3  # of a drift, for particles that are there
AGREE = 2.5  # Student's t between two rounds: another one is no error, but time
DRIFTS = ("density", "variance")


@dataclass(frozen=True)
class AnnealedVerdict:
    r"""Whether annealed particles may be believed: figures, and what they say in words.

    No figure can know of a mode that no particle visited: an empty list of problems is no all-clear.

    Attributes:
        num_particles: N, of each repeat.
        num_repeats: R.
        least_ess: least effective sample size of any repeat at any temperature, before resampling.
        least_ess_beta: the temperature where that was.
        effective_repeats: :math:`1 / \sum_r s_r^2` of the repeats' shares of the evidence.
        least_roots: distinct draws of the guide that the particles of one repeat descend from, at the least.
        khat: Pareto tail index of the final weights; NaN where they are too even to have a tail.
        guide_khat: that of the guide's own importance weights; above .7 the guide alone is not to be
            believed, and no verdict on the particles.
        acceptance: the least mean probability of acceptance of all moves.
        rhat: the largest ratio of a coordinate's scale over all repeats to that within them.
        drift: the largest of Student's t of what the last moves changed in the mean log density and in the
            mean log variance of the coordinates, with R - 1 degrees of freedom; NaN
            without moves there.
        log_evidence: the estimate.
        dead: repeats of which no particle has a density.
        rounds: log evidence of the rounds before this run, each from another base or other temperatures.
        disagreement: the largest of Student's t between the last two of them, of the log evidence and of what
            drift looks at; NaN without two.
        problems: one sentence each; empty if nothing speaks against the run.

    References:
        Vehtari et al., JMLR 25(72), 2024 (k-hat); Gelman & Rubin, Statistical Science 7 (1992).
    """

    num_particles: int
    num_repeats: int
    least_ess: Tensor
    least_ess_beta: float
    effective_repeats: Tensor
    least_roots: Tensor
    khat: Tensor
    guide_khat: Tensor
    acceptance: Tensor
    rhat: Tensor
    drift: Tensor
    log_evidence: Estimate
    dead: int = 0
    rounds: tuple[Estimate, ...] = ()
    disagreement: float = math.nan
    problems: tuple[str, ...] = ()

    @property
    def believable(self) -> bool:
        """Whether nothing speaks against the run; what no particle visited, no figure can know."""
        return not self.problems

    def __str__(self) -> str:
        fine = "nothing speaks against it; modes that no particle visited are not seen"
        if bool(self.drift.isnan()):
            fine = "not known: without final_moves nothing tells whether particles arrived"
        rows = [
            (
                "least effective size",
                f"{float(self.least_ess):.1f} at b = {self.least_ess_beta:.3g}",
            ),
            ("draws descended from", f"{int(self.least_roots)} of the guide's at least"),
            ("effective repeats", f"{float(self.effective_repeats):.1f}"),
            ("R-hat over repeats", f"{float(self.rhat):.3f}"),
            ("drift, Student's t", _shown(self.drift, "no final moves", 1)),
            ("least acceptance", _shown(self.acceptance, "no moves")),
            ("Pareto k-hat, final weights", _shown(self.khat, "no tail, weights are even")),
            ("Pareto k-hat, guide alone", f"{float(self.guide_khat):.2f}"),
            ("rounds before", _history(self.rounds)),
            ("log evidence", str(self.log_evidence)),
            ("verdict", fine if self.believable else "not to be believed"),
        ]
        title = f"{self.num_repeats} repeats of {self.num_particles} particles"
        lines = [title, *(f"  {name:<28} {value}" for name, value in rows)]
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


def _history(rounds: tuple[Estimate, ...]) -> str:
    if not rounds:
        return "none to compare with"
    shown = (f"{x.value:.2f} ({x.standard_error:.2f})" for x in rounds)
    return ", ".join(shown)


def _shown(number: Tensor, otherwise: str, digits: int = 2) -> str:
    return otherwise if bool(number.isnan()) else f"{float(number):.{digits}f}"


def judge(verdict: AnnealedVerdict) -> AnnealedVerdict:
    """The verdict with what speaks against the run, one sentence each."""
    problems = []
    if verdict.dead:
        problems.append(
            f"{verdict.dead} of {verdict.num_repeats} repeats lost all their particles, and count as "
            "evidence 0; use more particles, or a wider guide"
        )
    if verdict.least_ess < LEAST_ANCESTORS < verdict.num_particles:
        problems.append(
            f"weights collapsed to an effective size of {float(verdict.least_ess):.1f} at "
            f"b = {verdict.least_ess_beta:.3g}; use more steps or particles (conditional_ess nearer 1), or a "
            "wider guide"
        )
    error = verdict.log_evidence.standard_error
    if verdict.effective_repeats < LEAST_ANCESTORS:
        problems.append(
            f"{float(verdict.effective_repeats):.1f} of {verdict.num_repeats} repeats carry the evidence, "
            "and no error is estimated; use more particles, steps or moves"
        )
    elif error > LARGEST_ERROR:
        problems.append(
            f"the log evidence is uncertain by {error:.2f} nats; use more particles, steps or moves"
        )
    if verdict.disagreement > AGREE:
        problems.append(
            f"after {len(verdict.rounds)} rounds, each from the particles of the last, they still change, "
            f"a t of {verdict.disagreement:.1f} in the log evidence or the spread of the latents; use more "
            "rounds, particles or moves"
        )
    if verdict.khat > HIGHEST_KHAT:
        problems.append(
            f"the final weights have a Pareto k-hat of {float(verdict.khat):.2f}: averages rest on a few "
            "draws; use more steps or particles"
        )
    if verdict.rhat > HIGHEST_RHAT:
        problems.append(
            f"repeats disagree about the latents, R-hat {float(verdict.rhat):.2f}: particles do not mix, as "
            "between modes; use more particles or moves, or a wider guide"
        )
    chance = 2 * len(DRIFTS) * float(stats.t.sf(float(verdict.drift), verdict.num_repeats - 1))
    if chance < FALSE_ALARM:
        problems.append(
            f"particles still change under moves that keep the posterior, a t of {float(verdict.drift):.1f}: "
            "they have not reached all of it, as where it narrows to a funnel; use a richer guide, or more "
            "steps or moves"
        )
    if verdict.acceptance < LEAST_ACCEPTANCE:
        problems.append(
            f"a move was accepted with a probability of {float(verdict.acceptance):.2f}: particles stay "
            "where they are; use a larger pilot, or double precision"
        )
    if not math.isfinite(verdict.log_evidence.value):
        problems.append("the evidence is 0 or not a number")
    return dataclasses.replace(verdict, problems=tuple(problems))
