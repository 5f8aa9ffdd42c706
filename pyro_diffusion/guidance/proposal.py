"""Kernels of a chain that were told of linear readings of x_0: what particles are drawn from."""

from typing import NamedTuple, Self

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.likelihoods.linearization import SLACK
from pyro_diffusion.precision import matmul
from pyro_diffusion.processes.conditioned_normal import ConditionedNormal
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["Readings", "conditioned", "told", "told_at_last"]


class Readings(NamedTuple):
    r"""The observations as a method linearized them at one state, in units of their noise.

    Attributes:
        residual: r at the mean of the denoiser's own posterior, rows + (m,).
        rows: B, rows + (m, n).
        images: V B^T transposed, rows + (m, n).
        gap: B V B^T, rows + (m, m).
    """

    residual: Tensor
    rows: Tensor
    images: Tensor
    gap: Tensor

    @classmethod
    def of(cls, residual: Tensor, rows: Tensor, images: Tensor) -> Self:
        """With the product of rows and images."""
        return cls(residual, rows, images, matmul(images, rows.mT))

    def fit(self, kernel: TorchDistribution) -> bool:
        """Whether every datum has readings of its own, and the kernel is one of independent normals."""
        alone = self.residual.shape[:-1].numel() == kernel.batch_shape.numel()
        return alone and isinstance(per_coordinate(kernel), Normal)


def told(kernel: TorchDistribution, readings: Readings, weight: Tensor) -> TorchDistribution:
    r"""The kernel to x_s, of a guided mean and covariance Q, with the covariance that the readings leave.

    If x_0 given x_t is normal of covariance V and x_s has the weight k of x_0, then
    :math:`U = k V B^T` is the covariance of x_s and the readings, whose own is :math:`S = I + B V B^T`. So
    given x_s they are normal about a linear function of it, of covariance
    :math:`S_s = S - U^T Q^{-1} U`, and

    .. math:: q(x_s | x_t, y) = \mathcal N\big(m,\; (Q^{-1} + Q^{-1} U S_s^{-1} U^T Q^{-1})^{-1}\big)

    is proportional to the kernel times the twist at x_s: weights do not depend on what is drawn. V and Q
    approximate, and :math:`S_s` keeps eigenvalues of 1 or more, the readings' own noise. Computed in double
    precision; readings that are not finite say nothing.

    Args:
        kernel: independent normals, batch + event.
        readings: one row a datum.
        weight: k, which broadcasts to the event.
    """
    base, shape = per_coordinate(kernel), kernel.batch_shape
    scaled = (weight / base.scale).expand(base.loc.shape).reshape(*shape, 1, -1)
    cross = readings.images.reshape(*shape, -1, scaled.shape[-1]).double() * scaled
    gap = readings.gap.reshape(*shape, *readings.gap.shape[-2:])
    left = _finite(gap.double() - matmul(cross, cross.mT))
    half = torch.linalg.solve_triangular(_root(left), cross, upper=False)
    return conditioned(kernel, base.loc, half)


def told_at_last(kernel: TorchDistribution, readings: Readings) -> TorchDistribution:
    r"""The chain's own distribution of the data, :math:`\mathcal N(\hat x_0, Q)`, times their likelihood.

    Exact where the readings are linear: :math:`\mathcal N(\hat x_0 + Q B^T (I + B Q B^T)^{-1} r, (Q^{-1} +
    B^T B)^{-1})`.

    Args:
        kernel: independent normals around :math:`\hat x_0`, batch + event.
        readings: one row a datum.
    """
    base, shape = per_coordinate(kernel), kernel.batch_shape
    scale = base.scale.expand(base.loc.shape).reshape(*shape, 1, -1)
    half = _finite(readings.rows.reshape(*shape, -1, scale.shape[-1]).double() * scale)
    eye = torch.eye(half.shape[-2], dtype=half.dtype, device=half.device)
    root = torch.linalg.cholesky(eye + matmul(half, half.mT))
    r = readings.residual.reshape(*shape, -1, 1).double()
    shift = scale * matmul(half.mT, torch.cholesky_solve(r, root)).mT
    return conditioned(kernel, base.loc + shift.reshape(base.loc.shape).to(base.loc), half)


def conditioned(kernel: TorchDistribution, loc: Tensor, half: Tensor) -> TorchDistribution:
    """A normal with the precision of the kernel and that of readings, (m, n) of unit scales."""
    factor = _finite(half).mT.reshape(*loc.shape, -1).to(loc)
    return ConditionedNormal(loc, per_coordinate(kernel).scale, factor, kernel.event_dim)


def _finite(matrix: Tensor) -> Tensor:
    """The matrices, zero where one has a number that is not finite."""
    known = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(known, matrix, 0.0)


def _root(gap: Tensor) -> Tensor:
    """The Cholesky factor of I + gap, whose eigenvalues are raised to 1 where they are below."""
    eye = torch.eye(gap.shape[-1], dtype=gap.dtype, device=gap.device)
    bad = torch.linalg.cholesky_ex(gap + SLACK * eye).info != 0
    if bool(bad.any()):
        values, vectors = torch.linalg.eigh(gap[bad])
        gap = gap.clone()
        gap[bad] = matmul(vectors * values.clamp(min=0).unsqueeze(-2), vectors.mT)
    return torch.linalg.cholesky(eye + gap)
