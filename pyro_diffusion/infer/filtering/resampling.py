"""Resampling of particles, and the variance that their genealogy estimates."""

import math

import torch
from torch import Tensor

__all__ = [
    "LEAST_ANCESTORS",
    "effective_ancestors",
    "evidence_variance",
    "genealogical_variance",
    "multinomial_ancestors",
    "resampled",
    "systematic_ancestors",
]

# A variance estimated from n ancestors has n - 1 degrees of freedom; from three, its root is within a factor
# of 1.5 two times in three. With fewer no error is given.
LEAST_ANCESTORS = 4.0


def systematic_ancestors(
    probs: Tensor, count: int | None = None, uniform: Tensor | None = None
) -> Tensor:
    r"""Indices of parents, one uniform draw for all: particle i has :math:`N w_i` children, rounded.

    Args:
        probs: (n, ...), normalized weights; every trailing dimension is a filter of its own.
        count: number N of children, n by default.
        uniform: (1, ...), in [0, 1); drawn from torch's global generator if None.

    Returns:
        (N, ...) indices, sorted along the first dimension.

    References:
        Douc, Cappe & Moulines, arXiv cs/0507025.
    """
    n = count or len(probs)
    places = torch.arange(n, dtype=probs.dtype, device=probs.device)
    uniform = torch.rand_like(probs[:1]) if uniform is None else uniform
    return _invert(probs, (places.reshape(n, *(1,) * (probs.dim() - 1)) + uniform) / n)


def multinomial_ancestors(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Indices of parents, drawn independently (noisier; what proofs on particle filters assume).

    Args:
        probs: (n, ...), normalized weights.
        uniform: (N, ...), in [0, 1), N = n for one child a particle; drawn from torch's global generator if
            None.

    Returns:
        (N, ...) indices.
    """
    return _invert(probs, torch.rand_like(probs) if uniform is None else uniform)


def resampled(probs: Tensor, count: int) -> Tensor:
    """Indices of ``count`` particles in random order, each drawn by weight, spread systematically.

    Args:
        probs: (n, ...), normalized weights.
        count: how many.

    Returns:
        (count, ...) indices.
    """
    index = systematic_ancestors(probs, count)
    order = torch.rand(index.shape, device=index.device).argsort(0)
    return index.gather(0, order)


def _invert(probs: Tensor, places: Tensor) -> Tensor:
    """The particle whose slice of [0, 1) each place lies in."""
    edges = probs.cumsum(0).movedim(0, -1).contiguous()
    # The last edge is 1 but for rounding: scaled, no place lies beyond a particle that has a weight.
    places = places.movedim(0, -1).contiguous() * edges[..., -1:]
    return torch.searchsorted(edges, places, right=True).clamp(max=len(probs) - 1).movedim(-1, 0)


def effective_ancestors(log_weights: Tensor, root: Tensor) -> Tensor:
    r"""Effective number of ancestors, :math:`1 / \sum_r s_r^2` of the shares of weight of their descendants.

    Args:
        log_weights: (n,) + batch, normalized.
        root: (n,) + batch, each particle's root.

    Returns:
        Batch, 1 to n.
    """
    return _shares(log_weights, root).square().sum(0).reciprocal()


def _shares(log_weights: Tensor, root: Tensor) -> Tensor:
    """The weight of every root's descendants, (n,) + batch."""
    weights = log_weights.exp()
    return torch.zeros_like(weights).scatter_add_(0, root, weights)


def genealogical_variance(
    log_weights: Tensor, root: Tensor, correction: Tensor, deviation: Tensor | None = None
) -> Tensor:
    r"""Variance of a particle filter's answers, from one run: roots are what varies independently.

    Args:
        log_weights: (n,) + batch, normalized.
        root: (n,) + batch, each particle's root.
        correction: batch, N / (N - 1), to the power of resamplings + 1 where these are multinomial, for
            particles that share an ancestor by chance.
        deviation: (n,) + batch + anything, a statistic of each particle minus its weighted mean. Without it
            the variance is that of :math:`\hat Z`, divided by :math:`\hat Z^2`. That cannot exceed 1,
            however bad the run: for an error see :func:`evidence_variance`.

    Returns:
        Batch (+ anything), never negative; infinite for a mean of fewer than ``LEAST_ANCESTORS`` effective
        ancestors, whose variance is not estimated.
    """
    weights = log_weights.exp()
    overlap = _shares(log_weights, root).square().sum(0)
    if deviation is None:
        return (1 - correction * (1 - overlap)).clamp(min=0)
    extra = (1,) * (deviation.dim() - weights.dim())
    parts = weights.reshape(weights.shape + extra) * deviation.to(weights.dtype)
    index = root.reshape(root.shape + extra).expand(parts.shape)
    sums = torch.zeros_like(parts).scatter_add_(0, index, parts)
    # The roots' own mean was subtracted: as many of them as matter less one.
    factor = correction / (1 - overlap).clamp(min=torch.finfo(overlap.dtype).eps)
    variance = factor.reshape(factor.shape + extra) * sums.square().sum(0)
    enough = (overlap * LEAST_ANCESTORS <= 1).reshape(overlap.shape + extra)
    return torch.where(enough, variance, math.inf)


def evidence_variance(
    log_weights: Tensor, root: Tensor, correction: Tensor, weight_variance: Tensor | None = None
) -> Tensor:
    r"""Variance of :math:`\log \hat Z` from one run, by a jackknife over the first generation.

    :math:`\hat Z` is a mean over N roots, of which root r gives the share :math:`s_r`. Without it the log
    changes by :math:`\ell_r = \log(1 - s_r)` and a constant, so

    .. math:: \widehat{Var}(\log \hat Z) = \frac{N - 1}{N} \sum_r (\ell_r - \bar\ell)^2 .

    For small shares it is the genealogical variance of Lee & Whiteley, which ends at 1; this one has no
    ceiling, and grows beyond all bounds as one root takes all. Under multinomial resampling it is multiplied
    by what the correction for accidental descent makes of the genealogical variance.

    Runs that keep ``LEAST_ANCESTORS`` where most lose them did so by luck, and their jackknife is small:
    four roots of equal shares make a standard error of .58 at most. So the variance is never below that of
    the weights from one resampling to the next,

    .. math:: \sum_k \Big(\frac{1}{\text{ESS}_k} - \frac{1}{N}\Big),

    which is all of it where weights say nothing about those to come, as under a good twist. Where high
    weights are followed by high ones it is too small, and the jackknife larger; where they undo one another,
    as under a twist that overshoots, it is too large, and the error with it (twice in one case of symbols).

    Args:
        log_weights: (n,) + batch, normalized.
        root: (n,) + batch, each particle's root.
        correction: batch, as in :func:`genealogical_variance`.
        weight_variance: batch, that sum; None for the jackknife alone.

    Returns:
        Batch; infinite, for "not estimated", below ``LEAST_ANCESTORS`` effective ancestors.

    References:
        Efron & Stein, The jackknife estimate of variance, Annals of Statistics 9 (1981);
        Lee & Whiteley, arXiv 1509.00394;
        the sum: Chopin & Papaspiliopoulos, An introduction to sequential Monte Carlo (2020), chapter 11.
    """
    shares = _shares(log_weights, root)
    n, overlap = len(shares), shares.square().sum(0)
    enough = overlap * LEAST_ANCESTORS <= 1
    # Those with one share of nearly 1 are left out below: no logarithm of 0 on the way.
    left_out = torch.log1p(-torch.where(enough, shares, 0.0))
    jackknife = (left_out - left_out.mean(0)).square().sum(0) * (n - 1) / n
    plain = 1 - (1 - overlap) * n / (n - 1)
    ratio = (1 - correction * (1 - overlap)).clamp(min=0) / plain.clamp(min=1e-12)
    variance = jackknife * ratio.where(plain > 1e-12, 1.0)
    if weight_variance is not None:
        variance = torch.maximum(variance, weight_variance)
    return torch.where(enough, variance, math.inf)
