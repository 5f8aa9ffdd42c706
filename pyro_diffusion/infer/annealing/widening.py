"""A wider base from the particles that a narrower one led to."""

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_diffusion.infer.annealing.guide_chart import GuideChart, normal_chart

__all__ = ["WIDER", "has_grown", "moments", "widened"]

WIDER = 3.0
GROWTH = 1.5  # of the variance in some direction: less is noise


def moments(u: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and root of the covariance (D, D) of weighted draws, (n, D) and (n,)."""
    weights, rows = log_weights.exp(), u.double()
    mean = weights @ rows
    centred = rows - mean
    covariance = (centred.mT * weights) @ centred
    # Fewer draws than dimensions have a covariance without an inverse.
    covariance.diagonal().mul_(1 + 1e-6).add_(1e-12)
    return mean.to(u), torch.linalg.cholesky(covariance).to(u)


def has_grown(root: Tensor, last: Tensor) -> bool:
    """Whether a covariance exceeds the last one by far in some direction."""
    ratio = torch.linalg.solve_triangular(last, root, upper=False)
    return float(torch.linalg.matrix_norm(ratio, 2)) ** 2 > GROWTH


def widened(mean: Tensor, root: Tensor, power: int) -> GuideChart:
    """A normal of these moments, but wider."""
    return normal_chart(MultivariateNormal(mean, scale_tril=WIDER**power * root))
