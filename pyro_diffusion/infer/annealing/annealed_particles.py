"""What a run of annealed particles found: weighted draws, evidence, figures, and a verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_diffusion.estimate import LOWER_BOUND, UNBIASED, Estimate
from pyro_diffusion.infer.annealing.annealed_chain import AnnealedChain, Stage
from pyro_diffusion.infer.annealing.annealed_verdict import AnnealedVerdict, judge
from pyro_diffusion.infer.annealing.guide_chart import GuideChart
from pyro_diffusion.infer.filtering.particle_filter import ParticleFilter
from pyro_diffusion.infer.filtering.resampling import (
    effective_ancestors,
    evidence_variance,
    resampled,
)
from pyro_diffusion.pareto import pareto_khat
from pyro_diffusion.validation import check_positive_int

__all__ = [
    "BLIND",
    "AnnealedParticles",
    "annealed_particles",
    "disagreement",
    "mean_gap",
    "summary",
]

BLIND = "estimate blind to modes never visited"


@dataclass(frozen=True)
class AnnealedParticles:
    r"""Weighted posterior draws of a model, from R independent systems of N particles.

    Attributes:
        draws: values of the latents in their supports, (N R,) + the shape of each.
        unconstrained: (N R, D), the same as the guide has them.
        log_weights: (N R,), normalized.
        repeat: (N R,), which system each draw is of.
        log_evidence: estimate of log p(x) in nats. Its exponential is unbiased. The error is a jackknife over
            repeats; infinite, "not estimated", where fewer than four of them carry the weight.
        log_evidence_terms: (R,), of each repeat.
        elbo: the guide's own lower bound, from the draws that the particles started at: E log p - log q
            (of the widened guide, where it was).
        eubo: mean of log p - log q over the final draws, an estimate of the guide's upper bound that is
            *blind to modes that no particle visited*: high, it shows that the guide misses what particles
            found; low, it shows nothing.
        betas: (K + 1,), temperatures.
        ess: (K + 1, R), effective sample size at each of them, before resampling.
        acceptance: (moves,), mean probability of acceptance of each move.
        summaries: (R, 2), mean of log p(x, u) and mean log variance of the unconstrained latents u, of each
            repeat.
        evaluations: gradients of the model that the run took, each of all N R particles; the pilot's apart.
        verdict: whether the run may be believed: ``print(particles.verdict)``.
    """

    draws: dict[str, Tensor]
    unconstrained: Tensor
    log_weights: Tensor
    repeat: Tensor
    log_evidence: Estimate
    log_evidence_terms: Tensor
    elbo: Estimate
    eubo: Estimate
    betas: Tensor
    ess: Tensor
    acceptance: Tensor
    summaries: Tensor
    evaluations: int
    verdict: AnnealedVerdict

    def __len__(self) -> int:
        return len(self.log_weights)

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws by weight, {site: (num_samples,) + its shape}, in random order and spread evenly.

        They are what ``Predictive(model, posterior_samples)`` and
        :func:`~pyro_diffusion.evaluate.posterior_to_arviz` take. More than N R repeat themselves.
        """
        check_positive_int("num_samples", num_samples)
        index = resampled(self.log_weights.exp(), num_samples)
        return {name: value[index] for name, value in self.draws.items()}

    @property
    def mean(self) -> dict[str, Tensor]:
        """Weighted mean of every latent, float64."""
        return {name: self._average(value) for name, value in self.draws.items()}

    @property
    def std(self) -> dict[str, Tensor]:
        """Weighted standard deviation of every coordinate of every latent, float64."""
        centre = self.mean
        return {
            name: self._average((value - centre[name]).square()).sqrt()
            for name, value in self.draws.items()
        }

    def _average(self, value: Tensor) -> Tensor:
        return torch.tensordot(self.log_weights.exp(), value.double(), 1)

    def __str__(self) -> str:
        return str(self.verdict)


def disagreement(a: AnnealedParticles, b: AnnealedParticles) -> float:
    r"""The largest of Student's t between two runs: of log evidence, and of :func:`summary` over repeats.

    Infinite where an error is not estimated.
    """
    error = math.hypot(a.log_evidence.standard_error, b.log_evidence.standard_error)
    if not math.isfinite(error):
        return math.inf
    evidence = abs(a.log_evidence.value - b.log_evidence.value) / max(error, 1e-12)
    means = a.summaries.mean(0) - b.summaries.mean(0)
    variance = (a.summaries.var(0) + b.summaries.var(0)) / len(a.summaries)
    others = (means.abs() / variance.sqrt()).nan_to_num(0.0, math.inf)
    return max(evidence, float(others.max()))


@torch.no_grad()
def annealed_particles(
    chain: AnnealedChain,
    done: ParticleFilter,
    stages: list[Stage],
    start: Tensor,
    change: Tensor,
    rounds: Sequence[AnnealedParticles] = (),
) -> AnnealedParticles:
    """The result of a filter that has gone through all stages.

    Args:
        chain: its model.
        done: the filter, (N, R).
        stages: K weightings, and the posterior.
        start: (N, R), log p - log q at the guide's draws.
        change: (R, 2), what the last moves changed in :func:`summary`, in the filter's coordinates.
        rounds: before this run.
    """
    terms = done.log_evidence
    repeats = len(terms)
    shares = terms.log_softmax(0)
    root = torch.arange(repeats, device=terms.device)
    evidence = _log_evidence(done, shares, root, chain.evaluations)
    log_weights = (done.log_weights + shares).masked_fill(done.dead, -math.inf)
    u = chain.chart(done.state["z"])[0].detach()
    gap = done.state["gap"].double()
    rows = log_weights.T.reshape(-1), u.transpose(0, 1).reshape(-1, u.shape[-1])
    ess, acceptance = (
        torch.stack(done.ess[1:]),
        torch.stack([terms.new_zeros(()), *chain.acceptance])[1:],
    )
    verdict = AnnealedVerdict(
        num_particles=done.num_particles,
        num_repeats=repeats,
        least_ess=ess.min(1).values.min(),
        least_ess_beta=stages[int(ess.min(1).values.argmin())].next_beta,
        effective_repeats=effective_ancestors(shares, root),
        least_roots=done.roots[-1].min(),
        khat=_khat(log_weights),
        guide_khat=pareto_khat(start.reshape(-1, 1)).squeeze(),
        acceptance=acceptance.min() if len(acceptance) else acceptance.new_tensor(math.nan),
        rhat=_rhat(u.double(), done.log_weights),
        drift=_largest_t(change),
        log_evidence=evidence,
        dead=int(done.dead.sum()),
        rounds=tuple(found.log_evidence for found in rounds),
        disagreement=disagreement(*rounds[-2:]) if len(rounds) > 1 else math.nan,
    )
    return AnnealedParticles(
        draws=chain.model.constrain(rows[1]),
        unconstrained=rows[1],
        log_weights=rows[0],
        repeat=root.repeat_interleave(done.num_particles),
        log_evidence=evidence,
        log_evidence_terms=terms,
        elbo=mean_gap(start, None, LOWER_BOUND),
        eubo=mean_gap(gap, log_weights, BLIND, root.expand_as(gap)),
        betas=torch.tensor([stage.beta for stage in stages]),
        ess=ess,
        acceptance=acceptance,
        summaries=summary(done, chain.chart),
        evaluations=chain.evaluations,
        verdict=judge(verdict),
    )


def _log_evidence(done: ParticleFilter, shares: Tensor, root: Tensor, evaluations: int) -> Estimate:
    """Of the mean over repeats, with the error that their scatter shows."""
    terms, repeats = done.log_evidence, len(shares)
    # What weights say of themselves, at the least: repeats may agree by luck.
    weights = (shares.exp().square() * done.weight_variance).sum()
    variance = evidence_variance(shares, root, terms.new_tensor(repeats / (repeats - 1)), weights)
    value = float(terms.logsumexp(0) - math.log(repeats))
    return Estimate(value, float(variance.sqrt()), UNBIASED, "nats", evaluations)


def mean_gap(
    gap: Tensor, log_weights: Tensor | None, kind: str, group: Tensor | None = None
) -> Estimate:
    r"""Mean of log p - log q over draws, by weight, with its standard error.

    With weights W, mean m and the sums :math:`s_r = \sum_{i \in r} W_i (g_i - m)` over n independent groups
    that is :math:`(\frac{n}{n - 1} \sum_r s_r^2)^{1/2}`, infinite for one group.

    Args:
        gap: log p - log q, any shape.
        log_weights: normalized, the same shape; None for even ones.
        kind: of number.
        group: of each draw, 0 to n - 1; None where all draws are independent.
    """
    weights = torch.full_like(gap, 1 / gap.numel()) if log_weights is None else log_weights.exp()
    present = weights > 0
    mean = torch.where(present, weights * gap, 0.0).sum()
    parts = torch.where(present, weights * (gap - mean), 0.0).flatten()
    if group is not None:
        sums = parts.new_zeros(int(group.max()) + 1)
        parts = sums.scatter_add(0, group.flatten(), parts)
    count = len(parts)
    # One says nothing of the error, and densities of 0 make it infinite.
    error = (
        parts.square().sum() * parts.new_tensor(count / (count - 1) if count > 1 else math.nan)
    ).sqrt()
    error = error.nan_to_num(nan=math.inf)
    return Estimate(float(mean), float(error), kind, "nats", 1)


def summary(done: ParticleFilter, chart: GuideChart | None = None) -> Tensor:
    """Mean log density, and mean log variance of the coordinates, of each repeat, (R, 2).

    They are those of the filter's own coordinates, or of the latents where its chart is given: rounds with
    other charts are comparable in these alone.
    """
    weights, z = done.log_weights.exp(), done.state["z"]
    log_p = (done.state["log_q"] + done.state["gap"]).double()
    if chart is not None:
        z, log_det = chart(z)
        log_p = log_p - log_det
    z = z.double()
    density = torch.where(weights > 0, weights * log_p, 0.0).sum(0)
    means = (weights.unsqueeze(-1) * z).sum(0)
    variance = (weights.unsqueeze(-1) * (z - means).square()).sum(0)
    return torch.stack([density, variance.log().mean(-1)], -1)


def _largest_t(change: Tensor) -> Tensor:
    """The largest of Student's t of means over repeats, (R, n), against 0; NaN where nothing changed."""
    if not bool(change.any()):
        return change.new_tensor(math.nan)
    error = change.std(0) / math.sqrt(len(change))
    return (change.mean(0).abs() / error).nan_to_num(0.0, math.inf).max()


def _khat(log_weights: Tensor) -> Tensor:
    """Tail index of the final weights; NaN where they are too even to have a tail."""
    rows = log_weights.reshape(-1, 1)
    if 2 * float(rows.exp().square().sum().reciprocal()) > len(rows):
        return rows.new_tensor(math.nan)
    return pareto_khat(rows).squeeze()


def _rhat(u: Tensor, log_weights: Tensor) -> Tensor:
    r"""The largest potential scale reduction :math:`\hat R` of the coordinates over the repeats."""
    weights = log_weights.exp().unsqueeze(-1)
    means = (weights * u).sum(0)
    within = (weights * (u - means).square()).sum(0).mean(0)
    return (1 + means.var(0) / within.clamp(min=torch.finfo(u.dtype).tiny)).sqrt().max()
