"""Posteriors without a network: of normal data, and of the training images themselves."""

import torch
from torch import Tensor

from trained_posteriors.problems import Problem


def linear_gaussian(problem: Problem, y: Tensor, count: int) -> Tensor:
    """Draws under a normal prior of the training images' mean and covariance, (count, n) + SHAPE."""
    assert problem.matrix is not None and problem.sd is not None
    mean, covariance = problem.images.mean, problem.images.covariance
    a, y = problem.matrix.double(), y.double()
    gain = torch.linalg.solve(
        a @ covariance @ a.T + problem.sd**2 * torch.eye(len(a)).to(a),
        a @ covariance,
    ).T
    mean = mean + (y - mean @ a.T) @ gain.T
    values, vectors = torch.linalg.eigh(covariance - gain @ a @ covariance)
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(count, *mean.shape).to(mean)
    return (mean + noise @ root.T).float().reshape(count, len(y), *problem.images.shape)


def kernel(problem: Problem, y: Tensor, count: int, width: float = 0.15) -> Tensor:
    """Draws under a mixture of normals around the training images, exact: near what can be known."""
    assert problem.matrix is not None and problem.sd is not None
    images = problem.images.train.flatten(1).double()
    a, y = problem.matrix.double(), y.double()
    total = width**2 * a @ a.T + problem.sd**2 * torch.eye(len(a)).to(a)
    gain = width**2 * torch.linalg.solve(total, a).T
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(total), a, upper=False)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(total), y.T, upper=False).T
    energy = torch.cdist(white, images @ half.T).square()
    which = torch.multinomial((-0.5 * energy).softmax(-1), count, replacement=True)
    gap = y.unsqueeze(1) - images[which] @ a.T
    mean = images[which] + gap @ gain.T
    values, vectors = torch.linalg.eigh(width**2 * (torch.eye(len(gain)).to(a) - gain @ a))
    root = vectors * values.clamp(min=0).sqrt()
    draws = mean + torch.randn_like(mean) @ root.T
    return draws.float().reshape(len(y), count, *problem.images.shape).movedim(0, 1)
