"""The part of a joint distribution's denoisers that is linear: known from the covariance of simulations."""

import torch
from torch import Tensor, nn

from pyro_diffusion.schedules import Level

__all__ = ["LinearPart"]

MOST = 64  # coordinates up to which every evaluation may solve a system of them
RIDGE = 1e-4  # of unit variances: some coordinates may be functions of others
SWEEPS, TOLERANCE = 500, 1e-10


class LinearPart(nn.Module):
    r"""What correlation adds to the denoiser of independent standard normals, for any given coordinates.

    For :math:`x_0 \sim \mathcal N(0, \Sigma)` of unit variances, seen as :math:`y_i = a_i x_{0,i} + s_i
    \epsilon_i`, where :math:`a_i = \alpha, s_i = \sigma` for noisy coordinates and 1, 0 for given ones,

    .. math:: E[x_0 | y] = \Sigma A (A \Sigma A + S^2)^{-1} y, \qquad
              \text{and } \frac{\alpha}{\alpha^2 + \sigma^2} x_t \text{ if } \Sigma = I .

    This module returns their difference. Added to a network's mean it leaves to the network what is not
    linear; whatever the network, that changes how fast it learns and not what it can learn. Jointly normal
    sites are right without training. 0 above :data:`MOST` coordinates.

    Args:
        size: number of coordinates.
    """

    covariance: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("covariance", torch.eye(size))

    def fit(self, rows: Tensor, graph: Tensor | None) -> None:
        """Take the covariance from standardized values (n, size): one that is Markov on the graph."""
        size = rows.shape[1]
        if size > MOST:
            return
        own = rows.double()
        own = own - own.mean(0)
        found = own.mT @ own / len(own)
        found.diagonal().add_(RIDGE)
        if graph is not None:
            found = markov_covariance(found, graph)
        scale = found.diagonal().rsqrt()
        self.covariance.copy_(found * scale * scale.unsqueeze(1))

    def forward(self, xt: Tensor, level: Level, given: Tensor, conditioned: Tensor) -> Tensor:
        """The difference at states, batch + (size,)."""
        size = xt.shape[-1]
        if size > MOST:
            return torch.zeros_like(xt)
        gain = torch.where(conditioned, 1.0, level.alpha)
        noise = torch.where(conditioned, RIDGE, level.sigma.square())
        seen = torch.where(conditioned, given, xt)
        covariance = self.covariance.to(xt)
        total = gain.unsqueeze(-1) * covariance * gain.unsqueeze(-2) + torch.diag_embed(noise)
        weights = gain * torch.linalg.solve(total, seen.unsqueeze(-1)).squeeze(-1)
        alone = level.alpha / (level.alpha.square() + level.sigma.square()) * xt
        return weights @ covariance - alone


def markov_covariance(covariance: Tensor, graph: Tensor) -> Tensor:
    """The likeliest normal's covariance whose inverse is 0 where a graph has no edge.

    Each coordinate in turn is regressed on its neighbours under the present covariance, until none changes.

    References:
        Hastie, Tibshirani & Friedman, The Elements of Statistical Learning, algorithm 17.1.
    """
    found, size = covariance.clone(), len(covariance)
    others = [[i for i in range(size) if i != j] for j in range(size)]
    near = [[i for i in rest if graph[i, j]] for j, rest in enumerate(others)]
    for _ in range(SWEEPS):
        before = found.clone()
        for j, (rest, own) in enumerate(zip(others, near, strict=True)):
            slopes = torch.linalg.solve(found[own][:, own], covariance[own, j])
            found[rest, j] = found[rest][:, own] @ slopes
            found[j, rest] = found[rest, j]
        if float((found - before).abs().amax()) < TOLERANCE:
            break
    return found
