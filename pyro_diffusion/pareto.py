"""The Pareto tail of importance weights."""

import math

import torch
from torch import Tensor

__all__ = ["pareto_khat"]


def pareto_khat(log_weights: Tensor) -> Tensor:
    r"""Pareto tail index of every column of (num_samples, n) log weights, (n,) on the CPU.

    A generalized Pareto distribution is fitted to the excess of the :math:`\min(S/5, 3\sqrt S)` largest of S
    weights over the next one; above 0.7 their mean is unreliable. Infinite where fewer than five weights
    exceed that one: there is no tail to fit. The numbers are those of ArviZ 0.23's ``psislw`` (ArviZ 1.x
    rounds the size of the tail down, takes the negative log weights, and raises where there is no tail).

    References:
        Vehtari et al., Pareto smoothed importance sampling, JMLR 25(72), 2024; Zhang and Stephens,
        Technometrics 51, 2009 (the fit).
    """
    columns = log_weights.detach().cpu().double().reshape(len(log_weights), -1).T
    return torch.stack([_khat(column) for column in columns]).to(log_weights.dtype)


def _khat(log_weights: Tensor) -> Tensor:
    count = len(log_weights)
    tail = math.ceil(min(count / 5, 3 * count**0.5))
    weights = (log_weights - log_weights.max()).exp().sort().values
    cutoff = weights[max(count - tail - 1, 0)].clamp(min=torch.finfo(weights.dtype).tiny)
    excess = weights[weights > cutoff] - cutoff
    if len(excess) < 5:
        return weights.new_tensor(math.inf)
    k = _fit(excess)
    return torch.where(k.isnan(), math.inf, k)


def _fit(x: Tensor) -> Tensor:
    """Posterior mean of k for sorted excesses, under a weak prior around 0.5."""
    count, points = len(x), 30 + math.isqrt(len(x))
    steps = torch.arange(1, points + 1, dtype=x.dtype, device=x.device)
    quartile = x[int(count / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - (points / (steps - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-b.unsqueeze(1) * x).mean(1)
    weights = (count * ((-b / k).log() - k - 1)).softmax(0)
    # An average over the profile likelihood of b; the prior counts as ten excesses.
    k = torch.log1p(-(weights * b).sum() * x).mean()
    return (count * k + 10 * 0.5) / (count + 10)
