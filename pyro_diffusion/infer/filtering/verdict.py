"""Whether a run of particles may be believed, and if not, why and what to change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_diffusion.estimate import Estimate
from pyro_diffusion.infer.filtering.resampling import LEAST_ANCESTORS
from pyro_diffusion.likelihoods import Likelihood

__all__ = [
    "FALSE_ALARM",
    "OWN_PARTICLES",
    "Verdict",
    "judge",
    "largest",
    "misfit",
    "misses",
    "number",
    "which_rows",
]

# Chance of a warning that draws miss the observations, a run, if model and posterior are right.
FALSE_ALARM = 1e-4
OWN_PARTICLES = (
    "draws with few particles of their own share no ancestors and are weighed (TwistedSMC.draws, "
    "AutoTwistedSMC(model, sweeps=1))"
)


@dataclass(frozen=True)
class Verdict:
    r"""Whether a run of particles may be believed: figures, and what they say in words.

    Every tensor has the batch shape of the filters, () for one filter.

    Attributes:
        num_particles: N.
        least_ess: least effective sample size of all steps, before resampling. The size *after* it, and that
            at the data, hide a collapse on the way.
        least_ess_log_snr: log-SNR (the schedule's clock) where that was; infinite at the data.
        ancestors: distinct ancestors among the first generation.
        effective_ancestors: :math:`1 / \sum_r s_r^2` of the shares of weight of their descendants: how many
            independent draws all averages rest on.
        khat: Pareto tail index of the final weights; NaN where there is no tail to fit, as for even weights.
        misfit: mean of :math:`|r(x)|^2 / m` over draws, r the m whitened residuals, near 1 if draws miss the
            observations by as much as the program's own noise does; NaN if the likelihood has no residuals.
        misfit_p_value: twice the median over draws of :math:`P(\chi^2_m > |r|^2)`. A posterior draw and its
            observations are a draw of the program, so that every term is uniform, and twice a median of
            p-values is a p-value however they depend. Small if inference failed or the program is wrong; a
            few draws that fit, whose mean would not be small, do not hide the others.
        dead: filters none of whose particles explained the observations.
        log_evidence: the estimate, summed over filters.
        problems: one sentence each; empty if nothing speaks against the run.

    References:
        Vehtari et al., JMLR 25(72), 2024 (k-hat); Rüger, Das maximale Signifikanzniveau des Tests "Lehne H0
        ab, wenn k unter n gegebenen Tests zur Ablehnung führen", Metrika 25 (1978).
    """

    num_particles: int
    least_ess: Tensor
    least_ess_log_snr: Tensor
    ancestors: Tensor
    effective_ancestors: Tensor
    khat: Tensor
    misfit: Tensor
    misfit_p_value: Tensor
    dead: Tensor
    log_evidence: Estimate
    problems: tuple[str, ...] = ()

    @property
    def believable(self) -> bool:
        """Whether nothing speaks against the run; what no particle found, no figure can know."""
        return not self.problems

    def __str__(self) -> str:
        filters = self.least_ess.numel()
        worst = int(self.least_ess.argmin()) if filters else 0
        where = _place(self.least_ess_log_snr.flatten()[worst])
        rows = [
            ("least effective size", f"{number(self.least_ess.min())} {where}"),
            ("distinct ancestors", f"{int(self.ancestors.min())}"),
            ("effective ancestors", number(self.effective_ancestors.min())),
            ("Pareto k-hat of the weights", number(largest(self.khat), 2)),
            ("misfit chi^2 a residual", number(largest(self.misfit), 2)),
            ("log evidence", str(self.log_evidence)),
            ("verdict", "nothing speaks against it" if self.believable else "not to be believed"),
        ]
        title = f"{self.num_particles} particles"
        title += f", the worst of {filters} filters" if filters > 1 else ""
        lines = [title, *(f"  {name:<28} {value}" for name, value in rows)]
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


def judge(verdict: Verdict) -> tuple[str, ...]:
    """What speaks against a run, one sentence each."""
    alive = ~verdict.dead
    short = alive & (verdict.effective_ancestors < LEAST_ANCESTORS)
    few = verdict.num_particles <= LEAST_ANCESTORS  # then any weights, however even, look lost
    sudden = short & (verdict.least_ess < LEAST_ANCESTORS)
    problems = []
    if bool(verdict.dead.any()):
        problems.append(
            f"no particle explains the observations{which_rows(verdict.dead)}: evidence 0, no draws (NaN); "
            "give these observations more noise, use more particles, or another guidance"
        )
    if few and bool(short.any()):
        problems.append(
            f"{verdict.num_particles} particles are too few to judge a run by{which_rows(short)}: errors are "
            f"estimated from {LEAST_ANCESTORS:g} effective ancestors at least; use more particles"
        )
    elif bool(sudden.any()):
        problems.append(_collapse(verdict, sudden))
    if not few and bool((short & ~sudden).any()):
        left = verdict.effective_ancestors[short & ~sudden].min()
        problems.append(
            f"{number(left)} effective ancestors of {verdict.num_particles} are left"
            f"{which_rows(short & ~sudden)}, lost a few at a time: errors are not estimated; use more "
            f"particles; {OWN_PARTICLES}"
        )
    sigmas = math.sqrt(2 * math.log(max(verdict.khat.numel(), 1) / FALSE_ALARM))
    heavy = alive & ~short & (verdict.khat - sigmas * _khat_error(verdict) > 0.7)
    if bool(heavy.any()):
        problems.append(
            f"the final weights have a Pareto k-hat of {number(largest(verdict.khat[heavy]), 2)}"
            f"{which_rows(heavy)}: averages rest on a few draws, and a larger weight may be missing; use "
            "more steps near the data, or more particles"
        )
    missed = alive & (verdict.misfit_p_value < FALSE_ALARM / max(alive.sum().item(), 1))
    if bool(missed.any()):
        problems.append(misses(verdict.misfit, missed))
    return tuple(problems)


def _collapse(verdict: Verdict, which: Tensor) -> str:
    """Where weights collapsed, and what helps there."""
    worst = int(torch.where(which, verdict.least_ess, math.inf).flatten().argmin())
    place = verdict.least_ess_log_snr.flatten()[worst]
    if float(place) == math.inf:
        remedy = "more steps near the data, or another guidance"
    elif float(place) < 0:
        remedy = (
            "a guidance that says less where x_t is noise (the default one is checked for networks)"
        )
    else:
        remedy = "more steps there, or another guidance (the default one is checked for networks)"
    return (
        f"weights collapsed to an effective size of {number(verdict.least_ess.flatten()[worst])} "
        f"{_place(place)}{which_rows(which)}: neither draws nor evidence can be believed, and no error is "
        f"estimated; use more particles, {remedy}; {OWN_PARTICLES}"
    )


def _khat_error(verdict: Verdict) -> Tensor:
    """Asymptotic standard error of a fitted k, (1 + k) / root of the tail's size."""
    count = verdict.num_particles
    tail = math.ceil(min(count / 5, 3 * count**0.5))
    return (1 + verdict.khat.abs()) / math.sqrt(tail)


def misfit(likelihood: Likelihood, x0: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean chi-squared a residual over weighted draws, and its p-value, each of the filters' batch shape.

    Residuals that are 0 for every draw are masked observations and do not count.

    Args:
        likelihood: of the program; NaN if it has no residuals.
        x0: draws, (N,) + batch + event.
        log_weights: (N,) + filters, normalized.
    """
    missing = torch.full_like(log_weights[0], math.nan)
    try:
        with torch.no_grad():
            residual = likelihood.residual(x0).to(log_weights.dtype)
    except ValueError:
        return missing, missing
    count = (residual != 0).any(0).sum(-1).to(log_weights.dtype)
    chi2 = residual.square().sum(-1)
    if chi2.shape[1:].numel() != log_weights.shape[1:].numel():
        return missing, missing
    chi2, count = chi2.reshape(log_weights.shape), count.reshape(missing.shape)
    weights = log_weights.exp()
    tail = torch.special.gammaincc(count.clamp(min=1) / 2, chi2 / 2)
    mean = (weights * chi2).sum(0) / count
    ordered, order = tail.sort(0)
    below = weights.gather(0, order).cumsum(0) < 0.5 - 1e-9  # the lower of two medians
    median = ordered.gather(0, below.sum(0, keepdim=True).clamp(max=len(tail) - 1))[0]
    return mean, (2 * median).clamp(max=1).where(count > 0, math.nan)


def misses(chi2: Tensor, missed: Tensor) -> str:
    """That draws of these filters miss the observations, in words."""
    return (
        f"draws miss the observations, chi^2 {number(largest(chi2[missed]), 2)} a residual"
        f"{which_rows(missed)} where the program's own noise gives 1: inference failed, or the program "
        "states too little noise"
    )


def largest(values: Tensor) -> Tensor:
    """The largest that is a number, NaN if none is."""
    numbers = values[~values.isnan()]
    return numbers.max() if numbers.numel() else values.new_tensor(math.nan)


def number(value: Tensor, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return f"{float(value):.{digits}f}" if math.isfinite(float(value)) else "-"


def _place(log_snr: Tensor) -> str:
    return "at the data" if float(log_snr) == math.inf else f"at log-SNR {float(log_snr):.3g}"


def which_rows(rows: Tensor) -> str:
    """Which filters, in words; nothing if there is one only."""
    if not rows.dim():
        return ""
    found: Sequence[Sequence[int]] = rows.nonzero().tolist()
    named = ", ".join(str(i[0] if len(i) == 1 else tuple(i)) for i in found[:5])
    more = ", ..." if len(found) > 5 else ""
    return f" in {len(found)} of {rows.numel()} rows ({named}{more})"
