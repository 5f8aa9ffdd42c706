"""Linear regressions among the numbers of the rows of sets, in closed form."""

import torch
from torch import Tensor

__all__ = ["MOMENTS", "between", "regression_size", "regressions", "residual_means", "scatter"]

MOMENTS = 8  # numbers of a row up to which these are of use
PRIOR = 0.01  # of a regression, in rows of unit variance


def scatter(rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sums of products about the mean of each set, and their degrees of freedom.

    Args:
        rows: (..., n, d), zero where absent.
        present: which are of the set, (..., n, 1).

    Returns:
        :math:`\sum_i (x_i - m)(x_i - m)^T`, (..., d, d), and n - 1, at least zero, (...).
    """
    count = present.sum(-2, dtype=rows.dtype)
    centred = (
        rows - (rows * present).sum(-2, keepdim=True) / count.clamp(min=1).unsqueeze(-1)
    ) * present
    return centred.mT @ centred, (count.squeeze(-1) - 1).clamp(min=0)


def regressions(scatter: Tensor, freedom: Tensor) -> Tensor:
    r"""Coefficients and logarithms of residual sds of each number's regression on those before it.

    .. math::

        \frac{S + \kappa I}{\nu + \kappa} = L \,\mathrm{diag}(v)\, L^T, \qquad \beta = L_{ij},\; i > j,

    with L of unit diagonal: a normal program's regression coefficients and noise, where their quotients and
    cancelling differences would have to be learned from means of products. A prior of
    :math:`\kappa` = .01 rows of unit variance keeps them finite for sets of few rows.

    Args:
        scatter: S, (..., d, d).
        freedom: :math:`\nu`, (...).

    Returns:
        (..., d (d + 1) / 2): :math:`\beta` by columns, within 10, then :math:`\tfrac12 \log v`.
    """
    size = scatter.shape[-1]
    prior = PRIOR * torch.eye(size, dtype=scatter.dtype, device=scatter.device)
    total = (freedom + PRIOR).unsqueeze(-1)
    left = (scatter + prior) / total.unsqueeze(-1)
    coefficients, variances = [], []
    for _ in range(size):
        # above the rounding of sums of large numbers
        variance = torch.maximum(left[..., :1, 0], PRIOR / total)
        slopes = left[..., 1:, 0] / variance
        left = left[..., 1:, 1:] - slopes.unsqueeze(-1) * left[..., :1, 1:]
        coefficients.append(slopes.clamp(-10, 10))
        variances.append(0.5 * variance.log())
    return torch.cat([*coefficients, *variances], -1)


def regression_size(event_size: int) -> int:
    """How many numbers :func:`regressions` returns, none for rows of more than :data:`MOMENTS`."""
    return event_size * (event_size + 1) // 2 if event_size <= MOMENTS else 0


def residual_means(means: Tensor, scatter: Tensor, freedom: Tensor) -> Tensor:
    r"""Means of sets less what regressions within sets say of them, :math:`L^{-1} m_s`.

    Args:
        means: of every set, (..., sets, d).
        scatter: summed over sets, (..., d, d).
        freedom: likewise, (...).

    Returns:
        (..., sets, d): the first number's mean, the second's less its regression on the first, and so on.
    """
    size = means.shape[-1]
    columns = regressions(scatter, freedom)[..., : size * (size - 1) // 2].unsqueeze(-2)
    left = list(means.unbind(-1))
    place = 0
    for i in range(size):
        for j in range(i + 1, size):
            left[j] = left[j] - columns[..., place] * left[i]
            place += 1
    return torch.stack(left, -1)


def between(means: Tensor, count: Tensor) -> Tensor:
    """How means of sets vary from set to set, each set counting alike, and each by its rows; their number.

    Args:
        means: of every set, (..., sets, d).
        count: rows of every set, (..., sets).

    Returns:
        (..., 4 d + 3): mean and logarithm of the sd by either weight; of the sets that have rows, the mean of
        1 / rows, and log(1 + n) and 1 / (1 + n) of their number n.
    """
    there = (count > 0).to(means.dtype)
    found = []
    for weight in (there, count / count.amax(-1, keepdim=True).clamp(min=1)):
        total = weight.sum(-1, keepdim=True)
        share = (weight / total.clamp(min=PRIOR)).unsqueeze(-1)
        centre = (share * means).sum(-2)
        squares = (weight.unsqueeze(-1) * (means - centre.unsqueeze(-2)).square()).sum(-2)
        freedom = total - (weight.square().sum(-1, keepdim=True) / total.clamp(min=PRIOR))
        found += [centre, 0.5 * ((squares + PRIOR) / (freedom + PRIOR)).log()]
    number = there.sum(-1)
    inverse = (there / count.clamp(min=1)).sum(-1) / number.clamp(min=1)
    return torch.cat([*found, torch.stack([inverse, number.log1p(), 1 / (1 + number)], -1)], -1)
