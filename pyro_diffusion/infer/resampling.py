"""Resampling of particles, and the variance that their genealogy estimates."""

import math

import torch
from torch import Tensor

__all__ = ["genealogical_variance", "multinomial_ancestors", "resampled", "systematic_ancestors"]


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
            the variance is the relative one of the evidence.

    Returns:
        Batch (+ anything), never negative; infinite for a mean whose particles all descend from one root.
    """
    weights = log_weights.exp()
    shares = torch.zeros_like(weights).scatter_add_(0, root, weights)
    overlap = shares.square().sum(0)
    if deviation is None:
        return (1 - correction * (1 - overlap)).clamp(min=0)
    extra = (1,) * (deviation.dim() - weights.dim())
    parts = weights.reshape(weights.shape + extra) * deviation.to(weights.dtype)
    index = root.reshape(root.shape + extra).expand(parts.shape)
    sums = torch.zeros_like(parts).scatter_add_(0, index, parts)
    # The roots' own mean was subtracted: as many of them as matter less one. With one root nothing is known.
    factor = torch.where(overlap < 1 - 1e-9, correction / (1 - overlap), math.inf)
    return (factor.reshape(factor.shape + extra) * sums.square().sum(0)).nan_to_num(
        math.inf, posinf=math.inf
    )
