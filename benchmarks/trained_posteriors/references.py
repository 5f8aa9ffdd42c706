"""Posteriors without a network: of normal data, and of the training images themselves."""

import torch
from torch import Tensor

from trained_posteriors.prior import SHAPE, digits
from trained_posteriors.problems import Problem


def linear_gaussian(problem: Problem, y: Tensor, count: int) -> Tensor:
    """Draws under a normal prior of the training images' mean and covariance, (count, n) + SHAPE."""
    assert problem.matrix is not None and problem.sd is not None
    images = digits()["train"].flatten(1).double()
    a, y = problem.matrix.double(), y.double()
    covariance = images.T.cov() + 1e-4 * torch.eye(images.shape[1], dtype=torch.float64)
    gain = torch.linalg.solve(
        a @ covariance @ a.T + problem.sd**2 * torch.eye(len(a), dtype=torch.float64),
        a @ covariance,
    ).T
    mean = images.mean(0) + (y - images.mean(0) @ a.T) @ gain.T
    values, vectors = torch.linalg.eigh(covariance - gain @ a @ covariance)
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(count, *mean.shape, dtype=torch.float64)
    return (mean + noise @ root.T).float().reshape(count, len(y), *SHAPE)


def kernel(problem: Problem, y: Tensor, count: int, width: float = 0.15) -> Tensor:
    """Draws under a mixture of normals around the training images, exact: near what can be known."""
    assert problem.matrix is not None and problem.sd is not None
    images = digits()["train"].flatten(1).double()
    a, y = problem.matrix.double(), y.double()
    total = width**2 * a @ a.T + problem.sd**2 * torch.eye(len(a), dtype=torch.float64)
    gain = width**2 * torch.linalg.solve(total, a).T
    gap = y.unsqueeze(1) - images @ a.T
    energy = (gap * torch.linalg.solve(total, gap.mT).mT).sum(-1)
    which = torch.multinomial((-0.5 * energy).softmax(-1), count, replacement=True)
    chosen = torch.take_along_dim(gap, which.unsqueeze(-1), 1)
    mean = images[which] + chosen @ gain.T
    values, vectors = torch.linalg.eigh(torch.eye(len(gain)) * width**2 - width**2 * gain @ a)
    root = vectors * values.clamp(min=0).sqrt()
    draws = mean + torch.randn_like(mean) @ root.T
    return draws.float().reshape(len(y), count, *SHAPE).movedim(0, 1)
