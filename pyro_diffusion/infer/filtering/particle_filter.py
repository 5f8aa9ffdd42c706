"""Pyro's particle filter with what it throws away: evidence, its error, and who descends from whom."""

import math
from typing import Any

import torch
from pyro.infer import SMCFilter
from pyro.infer.smcfilter import SMCFailed
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_diffusion.infer.filtering.resampling import multinomial_ancestors, systematic_ancestors
from pyro_diffusion.processes.noise import fresh_seed
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.validation import Shape, check_positive_int

__all__ = ["ParticleFilter"]


class ParticleFilter(SMCFilter):
    r"""Sequential Monte Carlo with evidence, its standard error and a small genealogy.

    It is Pyro's filter: ``model`` and ``guide`` are objects with ``init(state, ...)`` and
    ``step(state, ...)``, and weights are those of their traces. Beyond it

    * weights and resampling are in double precision on the state's device;
    * the evidence is kept: :math:`\hat Z` is unbiased for Z, so its log is biased down by about half its
      variance;
    * every particle knows its root among the first generation (``state["root"]``, one integer), from which
      the variance of :math:`\hat Z` follows without a second run;
    * filters stand side by side where ``batch_shape`` is given: each has its own weights, resamples when its
      own effective size is low, by numbers of its own, and all share one call of the model. What one of them
      finds does not depend on the data of the others.

    Relative variance of the evidence (of its log: ``infer.filtering.resampling.evidence_variance``). With
    final weights :math:`W_i` (normalized) and roots :math:`r_i`,

    .. math:: \widehat{Var}(\hat Z / Z) = 1 - \Big(\frac{N}{N-1}\Big)^{m}
              \Big(1 - \sum_r \big(\textstyle\sum_{i: r_i = r} W_i\big)^2\Big) .

    Multinomial resampling, R times: m = R + 1, and the estimate is unbiased after multiplication by
    :math:`\hat Z^2` (before it is cut at 0, and asymptotically when resampling is adaptive). Systematic
    resampling: two children of one parent are no accident there, so m = 1. That is the sample variance of
    the roots' shares; it takes them as independent, where the scheme makes them vary against each other, and
    so errs on the safe side (a little: by the rounding of the number of children).

    Args:
        model: object with ``init`` and ``step``.
        guide: likewise.
        num_particles: N >= 2.
        batch_shape: of filters side by side; state tensors have shape (N,) + batch_shape + anything.
        max_plate_nesting: batch dimensions of the sites beside the particles'.
        ess_threshold: resample when the effective sample size falls below this share of N, in (0, 1].
        systematic: whether to resample systematically; multinomially otherwise.
        device: of the weights.
        keep_others: whether filters go on beside one none of whose particles has a weight; otherwise the
            first such filter ends all.

    Attributes:
        log_evidence: (batch_shape), log of the estimate so far, nats.
        ess: effective sample size after each step, before resampling, a list of (batch_shape).
        roots: number of distinct roots after each step, a list of (batch_shape).
        resamplings: (batch_shape), how often each filter has resampled.
        weight_variance: (batch_shape), relative variances of the mean weight, summed over resamplings and the
            last step: :math:`\sum_k (1/\text{ESS}_k - 1/N)`.
        dead: (batch_shape), filters none of whose particles has a weight any more. Their evidence is 0, and
            their states mean nothing.

    Raises:
        ValueError: for fewer than two particles or a threshold outside (0, 1].
        SMCFailed: (a ``ValueError``) at a step after which no particle has a weight, in any filter or, with
            ``keep_others``, in all of them.

    References:
        Lee & Whiteley, Variance estimation in the particle filter, arXiv 1509.00394;
        Chan & Lai, Annals of Statistics 41 (2013).
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        num_particles: int,
        *,
        batch_shape: Shape = (),
        max_plate_nesting: int = 0,
        ess_threshold: float = 0.5,
        systematic: bool = True,
        device: torch.device | None = None,
        keep_others: bool = False,
    ) -> None:
        check_positive_int("num_particles", num_particles, at_least=2)
        if not 0 < ess_threshold <= 1:
            raise ValueError(f"ess_threshold: got {ess_threshold}, expected a number in (0, 1]")
        super().__init__(
            model, guide, num_particles, max_plate_nesting, ess_threshold=ess_threshold
        )
        self.batch_shape, self.systematic = torch.Size(batch_shape), systematic
        self.keep_others = keep_others
        shape = (num_particles, *self.batch_shape)
        self.state._log_weights = torch.zeros(shape, dtype=torch.float64, device=device)
        index = torch.arange(num_particles, device=device)
        self._identity = index.reshape(-1, *(1,) * len(self.batch_shape)).expand(shape)
        self.state["root"] = self._identity.clone()
        self.log_evidence = torch.zeros(self.batch_shape, dtype=torch.float64, device=device)
        self.resamplings = torch.zeros(self.batch_shape, dtype=torch.long, device=device)
        self.weight_variance = torch.zeros_like(self.log_evidence)
        self.dead = torch.zeros(self.batch_shape, dtype=torch.bool, device=device)
        self.ess: list[Tensor] = []
        self.roots: list[Tensor] = []
        self._keep_weights = False
        filters = torch.arange(self.batch_shape.numel(), device=device)
        self._noise = RowNoise(fresh_seed(), filters)

    @property
    def log_weights(self) -> Tensor:
        """(N,) + batch_shape, normalized."""
        weights: Tensor = self.state._log_weights
        return weights.log_softmax(0)

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """A last step, after which weights are kept: resampling would only add noise."""
        self._keep_weights = True
        self.step(*args, **kwargs)

    @property
    def correction(self) -> Tensor:
        """(batch_shape), the factor of accidental descent in ``genealogical_variance``."""
        factor = torch.full_like(self.log_evidence, self.num_particles / (self.num_particles - 1))
        return factor if self.systematic else factor ** (self.resamplings + 1)

    @torch.no_grad()
    def _update_weights(self, model_trace: Any, guide_trace: Any) -> None:
        """Add log p - log q of every site, as the base does, and keep what it normalizes away."""
        before: Tensor = self.state._log_weights
        model_trace, guide_trace = map(prune_subsample_sites, (model_trace, guide_trace))
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        terms = {}
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample" and name in guide_trace.nodes:
                log_q = guide_trace.nodes[name]["log_prob"]
                terms[name] = self._sum(site["log_prob"]) - self._sum(log_q)
            elif site["type"] == "sample" and site["is_observed"]:
                terms[name] = self._sum(site["log_prob"])
        # A particle without weight stays without, whatever is said of it.
        dead = before == -math.inf
        weights = torch.where(dead, before, before + sum(terms.values()))
        lost = self.dead | ~_positive(weights)
        if bool(lost.any()):
            bad = [k for k, v in terms.items() if not _positive(torch.where(dead, before, v)).all()]
            self._bury(lost, (bad or [*terms])[0])
            weights = weights.masked_fill(self.dead, 0.0)
        total = self.log_evidence + weights.logsumexp(0) - before.logsumexp(0)
        self.log_evidence = total.masked_fill(self.dead, -math.inf)
        self.state._log_weights = weights

    def _bury(self, lost: Tensor, site: str) -> None:
        """Leave filters without a weight behind, with finite states that mean nothing.

        Raises:
            SMCFailed: if none is left, or one is enough.
        """
        if not self.keep_others or bool(lost.all()):
            rows = lost.nonzero().squeeze(-1).tolist()
            where = (
                f" in row {', '.join(map(str, rows[:5]))} of {lost.numel()}" if lost.dim() else ""
            )
            raise SMCFailed(f"no particle has a weight after site {site!r}{where}")
        self.dead = lost
        for key, value in self.state.items():
            if value.is_floating_point():
                self.state[key] = value.nan_to_num(0.0, 0.0, 0.0)

    def _sum(self, log_prob: Tensor) -> Tensor:
        """Log-probabilities of one site, summed over all that is no filter of its own."""
        shape = self.state._log_weights.shape
        log_prob = log_prob.to(torch.float64)
        if log_prob.shape[: len(shape)] != shape:
            return log_prob.expand(shape)
        return log_prob.reshape(*shape, -1).sum(-1)

    def _maybe_importance_resample(self) -> None:
        """Resample the filters whose effective sample size is low."""
        log_weights = self.log_weights
        self.state._log_weights = log_weights
        probs = log_weights.exp()
        ess = probs.square().sum(0).reciprocal()
        self.ess.append(ess)
        low = ess < self.ess_threshold * self.num_particles
        variance = (1 / ess - 1 / self.num_particles).clamp(min=0)
        counts = torch.ones_like(low) if self._keep_weights else low
        self.weight_variance = self.weight_variance + torch.where(counts, variance, 0.0)
        self._parents = self._identity
        # Drawn at every step: a filter's numbers do not depend on when the others resample.
        uniform = self._uniform()
        if not self._keep_weights and bool(low.any()):
            self._resample(probs, low, uniform)
        present = torch.zeros_like(self._identity).scatter_(0, self.state["root"], 1)
        self.roots.append(present.sum(0))

    def _resample(self, probs: Tensor, low: Tensor, uniform: Tensor) -> None:
        self._parents = index = torch.where(low, self._ancestors(probs, uniform), self._identity)
        for key, value in self.state.items():
            at = index.reshape(index.shape + (1,) * (value.dim() - index.dim()))
            self.state[key] = value.take_along_dim(at, 0) if self.batch_shape else value[index]
        even = torch.full_like(probs, -math.log(self.num_particles))
        self.state._log_weights = torch.where(low, even, self.state._log_weights)
        self.resamplings = self.resamplings + low

    @property
    def _draws(self) -> int:
        """How many numbers a filter resamples by."""
        return 1 if self.systematic else self.num_particles

    def _uniform(self) -> Tensor:
        """Numbers in (0, 1) from each filter's own stream, (draws,) + batch_shape."""
        shape = self._draws, len(self._noise.rows)
        return self._noise.uniform(shape, self.log_evidence).reshape(-1, *self.batch_shape)

    def _ancestors(self, probs: Tensor, uniform: Tensor) -> Tensor:
        if self.systematic:
            return systematic_ancestors(probs, uniform=uniform)
        return multinomial_ancestors(probs, uniform)


def _positive(log_weights: Tensor) -> Tensor:
    """Filters that have a particle with a weight, and none of NaN."""
    return log_weights.max(0).values > -math.inf
