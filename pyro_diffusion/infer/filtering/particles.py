"""Weighted draws of a posterior, with the evidence and the history of the filter that made them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_diffusion.estimate import Estimate
from pyro_diffusion.infer.filtering.resampling import (
    evidence_variance,
    genealogical_variance,
    resampled,
)
from pyro_diffusion.infer.filtering.verdict import Verdict
from pyro_diffusion.validation import Shape, check_sizes

__all__ = ["Particles"]


@dataclass(frozen=True)
class Particles:
    r"""Weighted draws of a posterior.

    Attributes:
        value: (N,) + batch + event, values of the site; NaN for a datum that no particle explains.
        log_weights: (N,), normalized; (N,) + batch where every datum of a plate has a filter of its own.
        log_evidence: estimate of log p(y) in nats, summed over the plate. Its exponential is unbiased. Its
            error is infinite, "not estimated", where a filter has fewer than four effective ancestors.
        log_evidence_terms: batch (or ()), what each filter contributes.
        ess: (K + 2,) + batch, effective sample size at the start, after each step and at the data.
        ancestors: (K + 2,) + batch, how many particles of the first generation have descendants then.
        resamplings: batch, how often each filter resampled.
        root: (N,) + batch, the ancestor of each particle in the first generation.
        correction: batch, N / (N - 1), to the power of resamplings + 1 where these are multinomial, for
            particles that share an ancestor by chance.
        weight_variance: batch, what the weights alone say of the variance of ``log_evidence_terms``: relative
            variances of the mean weight, summed over resamplings.
        verdict: whether the run may be believed: ``print(particles.verdict)``.
    """

    value: Tensor
    log_weights: Tensor
    log_evidence: Estimate
    log_evidence_terms: Tensor
    ess: Tensor
    ancestors: Tensor
    resamplings: Tensor
    root: Tensor
    correction: Tensor
    weight_variance: Tensor
    verdict: Verdict

    def __len__(self) -> int:
        return len(self.value)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draws by weight, sample + batch + event, spread evenly over the particles."""
        shape = check_sizes("sample_shape", sample_shape)
        index = resampled(self.log_weights.exp(), shape.numel())
        drawn = self.value.take_along_dim(index.reshape(index.shape + self._extra), 0)
        return drawn.reshape(shape + self.value.shape[1:])

    @property
    def log_evidence_errors(self) -> Tensor:
        """Standard error of each filter's log-evidence, batch; infinite where it is not estimated."""
        variance = evidence_variance(
            self.log_weights, self.root, self.correction, self.weight_variance
        )
        return variance.sqrt().where(self.log_evidence_terms > -math.inf, math.inf)

    @property
    def mean(self) -> Tensor:
        """Weighted mean, batch + event, float64."""
        return self._average(self.value)

    @property
    def variance(self) -> Tensor:
        """Weighted variance of every coordinate, batch + event, float64."""
        return self._average((self.value - self.mean).square())

    @property
    def mean_error(self) -> Tensor:
        """Monte-Carlo standard error of the mean; infinite where it is not estimated."""
        return self._error(self.value - self.mean)

    @property
    def variance_error(self) -> Tensor:
        """Monte-Carlo standard error of the variance; infinite where it is not estimated."""
        return self._error((self.value - self.mean).square() - self.variance)

    @property
    def _extra(self) -> tuple[int, ...]:
        return (1,) * (self.value.dim() - self.log_weights.dim())

    def _average(self, value: Tensor) -> Tensor:
        weights = self.log_weights.exp()
        return (weights.reshape(weights.shape + self._extra) * value).sum(0)

    def _error(self, deviation: Tensor) -> Tensor:
        return genealogical_variance(self.log_weights, self.root, self.correction, deviation).sqrt()
