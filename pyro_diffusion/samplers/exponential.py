r"""The exponential integrator's algebra: which average of past outputs a step's bridge should go to.

In half log-SNR :math:`u = \lambda/2` the probability flow in every scale is
:math:`d(x/\sigma) = \hat x_0\,e^u du`, so the bridge to the average of :math:`\hat x_0` under the weight
:math:`e^u` is exact. A parameterization splits :math:`\hat x_0 = c_{skip}\,x + c_{out}\,F`; the part with x
is integrated exactly and F is replaced by the polynomial through its past values. All integrals are by
Gauss-Legendre quadrature in float64: exact to 1e-12 for steps of up to 20 in log-SNR.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_diffusion.denoisers import Parameterization
from pyro_diffusion.precision import matmul

__all__ = ["StepRule", "average_weights", "by_coordinate", "canonical", "step_rule"]

NODES = 48


class StepRule(NamedTuple):
    r"""The average over a step as :math:`\bar x_0 = \text{state}\,x_t/\sigma_t + \int_0^1 p\,d\kappa`.

    Attributes:
        state: weight of :math:`x_t/\sigma_t`, rows.
        moments: of the weight :math:`\kappa` of F on [0, 1], rows + (count,).
    """

    state: Tensor
    moments: Tensor


@cache
def _quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return (
        torch.tensor((nodes + 1) / 2, dtype=torch.float64, device=device),
        torch.tensor(weights / 2, dtype=torch.float64, device=device),
    )


def canonical(parameterization: Parameterization, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signal scale, c_skip and c_out at half log-SNR u in the variance-preserving scale."""
    alpha, sigma = torch.sigmoid(2 * u).sqrt(), torch.sigmoid(-2 * u).sqrt()
    return alpha, *parameterization.skip_out(alpha, sigma)


def step_rule(
    parameterization: Parameterization, late: Tensor, h: Tensor, z: Tensor, count: int
) -> StepRule:
    r"""Integrals over the steps from half log-SNR ``late`` to ``late + h``.

    Args:
        parameterization: what F is.
        late: where the steps start, rows, float64.
        h: their length, of either sign.
        z: exponent of the bridge, whose weight of :math:`x_0` is :math:`\alpha_s(1 - e^{-z})`; h without
            noise.
        count: number of moments.

    Example:
        >>> from pyro_diffusion.denoisers import Data
        >>> zero, h = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e-9, dtype=torch.float64)
        >>> step_rule(Data(), zero, h, h, 3).moments
        tensor([[1.0000, 0.5000, 0.3333]], dtype=torch.float64)

    References:
        Hochbruck & Ostermann, Exponential integrators, Acta Numerica 2010, section 2.
    """
    theta, weight = _quadrature(h.device)

    def growth(part: Tensor) -> Tensor:
        """Integral of alpha c_skip over the first part of every step, rows + part's shape."""
        shape = h.shape + (1,) * (part.dim() + 1)
        u = late.reshape(shape) + h.reshape(shape) * part.unsqueeze(-1) * theta
        alpha, skip, _ = canonical(parameterization, u)
        return h.reshape(shape[:-1]) * part * (alpha * skip * weight).sum(-1)

    whole = growth(torch.ones_like(theta[:1]))
    out = canonical(parameterization, late[:, None] + h[:, None] * theta)[2]
    decay = torch.exp(whole - growth(theta) - z[:, None] * (1 - theta))
    kappa = weight * out * decay * (z / -torch.expm1(-z)).unsqueeze(-1)
    powers = theta ** torch.arange(count, device=h.device).unsqueeze(-1)
    state = torch.expm1(whole[:, 0]) * torch.exp(-late - h) / -torch.expm1(-h)
    return StepRule(state, matmul(kappa, powers.mT))


def by_coordinate(
    tables: Callable[[Tensor, Tensor], tuple[Tensor, ...]], late: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    """Tables of the steps, rows + (columns,), for every coordinate that has levels of its own.

    Args:
        tables: of steps in a row, from their starts and lengths of shape rows.
        late: where the steps start, rows + event (singletons where all coordinates are alike).
        h: their length, likewise.

    Returns:
        The tables, rows + (columns,) + event.
    """
    steps = torch.stack([late, h]).reshape(2, len(h), -1)
    distinct, index = steps.unique(dim=-1, return_inverse=True)
    each = [tables(*column) for column in distinct.unbind(-1)]
    whole = (torch.stack(parts, -1)[..., index] for parts in zip(*each, strict=True))
    return tuple(table.reshape(*table.shape[:-1], *late.shape[1:]) for table in whole)


def average_weights(nodes: Tensor, moments: Tensor) -> Tensor:
    r"""Weights with :math:`\sum_i v_i\,p(\theta_i) = \int p\,d\kappa` for every polynomial of degree < n.

    Args:
        nodes: :math:`\theta_i`, rows + (n,), distinct within a row.
        moments: :math:`\int \theta^k d\kappa` for k < n, rows + (n,).
    """
    powers = torch.arange(nodes.shape[-1], device=nodes.device).unsqueeze(-1)
    return torch.linalg.solve(nodes.unsqueeze(-2) ** powers, moments.unsqueeze(-1)).squeeze(-1)
