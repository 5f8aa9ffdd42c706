r"""The covariance of x_0 given x_t that normal data would have."""

from typing import Any, Self

import torch
from torch import Tensor

from pyro_diffusion.precision import PreciseModule, matmul
from pyro_diffusion.schedules import Level

__all__ = ["LinearEstimate"]

LEAST = 1e-4  # least variance along a direction, of the average over directions


class LinearEstimate(PreciseModule):
    r"""Products with :math:`V = (C^{-1} + \text{diag}(\alpha_t^2/\sigma_t^2))^{-1}`.

    V is the covariance of the error of the best *linear* estimate of x_0. :math:`C = U\,\text{diag}(c)\,U^T +
    c_\perp (I - U U^T)`, with fewer columns in U than numbers in a datum where there are many.

    Args:
        values: c, (r,), positive.
        vectors: U, (n, r), orthonormal columns.
        rest: :math:`c_\perp`, without effect if r = n.
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor

    def __init__(self, values: Tensor, vectors: Tensor, rest: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)
        self.register_buffer("rest", values.mean() if rest is None else rest)

    @classmethod
    def of_draws(cls, draws: Tensor) -> Self:
        r"""C estimated from draws, (N, n): their covariance shrunk towards a multiple of the identity.

        .. math:: C = (1 - \rho) S + \rho\,\tfrac{\text{tr} S}{n} I

        with the share :math:`\rho` of Ledoit and Wolf, A well-conditioned estimator for large-dimensional
        covariance matrices, 2004. At most N - 1 vectors, whatever n.
        """
        count, n = draws.shape
        x = draws.double() - draws.double().mean(0)
        squares = x.square().sum(1)
        mean = squares.mean() / n
        gram = matmul(x, x.mT) if count < n else matmul(x.mT, x)
        size = gram.square().sum() / count**2  # |S|^2
        away = size - n * mean**2
        error = squares.square().sum() / count**2 - size / count
        share = torch.where(away > 0, (error / away).clamp(0, 1), 1.0)
        tiny = torch.finfo(torch.float32).tiny
        _, roots, vectors = torch.linalg.svd(x, full_matrices=False)
        kept = min(count - 1, n)
        values = (1 - share) * roots[:kept].square() / count + share * mean
        least = (LEAST * mean).clamp(min=tiny)
        return cls(
            values.clamp(min=least), vectors[:kept].mT.contiguous(), (share * mean).clamp(min=least)
        )

    @property
    def complete(self) -> bool:
        """Whether U spans all directions."""
        return self.vectors.shape[0] == self.vectors.shape[1]

    def times(self, v: Tensor, level: Level, event_dim: int, kept: Any = None) -> Tensor:
        """V v in data space, rows + event.

        One noise level for all coordinates costs a product with U; where it differs by coordinate, one
        factorization a level.

        Args:
            v: any leading dimensions + event.
            level: where.
            event_dim: of the process.
            kept: an object whose attribute ``matrix`` is V where that was computed, or None.
        """
        event = v.shape[v.dim() - event_dim :]
        flat = v.reshape(*v.shape[: v.dim() - event_dim], -1)
        snr, times, alike = self._precisions(level, event_dim)
        if alike:
            return self._alike(flat, snr).reshape(v.shape)
        matrix = self._kept(snr, times, event, kept)
        if matrix.dim() == 2:
            return matmul(flat, matrix).reshape(v.shape)
        return matmul(flat.unsqueeze(-2), matrix).reshape(v.shape)

    def diagonal(self, level: Level, event: torch.Size, kept: Any = None) -> Tensor:
        """The diagonal of V, times + event.

        Args:
            level: where.
            event: shape of a datum.
            kept: as in :meth:`times`.
        """
        snr, times, alike = self._precisions(level, len(event))
        if not alike:
            matrix = self._kept(snr, times, event, kept)
            return matrix.diagonal(dim1=-2, dim2=-1).reshape(*times, *event)
        squares, values = self.vectors.to(snr).square(), self.values.to(snr)
        found = matmul(1 / (1 / values + snr), squares.mT)
        if not self.complete:
            found = found + (1 - squares.sum(1)) / (1 / self.rest.to(snr) + snr)
        return found.reshape((*times, *event))

    def _precisions(self, level: Level, event_dim: int) -> tuple[Tensor, torch.Size, bool]:
        """alpha^2/sigma^2, the shape of the times, and whether coordinates are alike: then times + (1,)."""
        snr = level.noise_to_signal.square().reciprocal()
        # Levels of one time have the event's dimensions alone, or fewer.
        times = snr.shape[: max(snr.dim() - event_dim, 0)]
        alike = snr.numel() == times.numel()
        return (snr.reshape(*times, 1) if alike else snr), times, alike

    def _kept(self, snr: Tensor, times: torch.Size, event: torch.Size, kept: Any) -> Tensor:
        """V as a matrix, computed once for an object that keeps it."""
        matrix: Tensor | None = None if kept is None else kept.matrix
        if matrix is None:
            matrix = self._matrix(snr.expand(*times, *event).reshape(*times, -1))
            if kept is not None:
                kept.matrix = matrix
        return matrix

    def _alike(self, v: Tensor, snr: Tensor) -> Tensor:
        """V v under one noise level, diagonal in the principal components."""
        vectors, values = self.vectors.to(v), self.values.to(v)
        parts, gains = matmul(v, vectors), 1 / (1 / values + snr)
        if self.complete:
            return matmul(parts * gains, vectors.mT)
        outside = 1 / (1 / self.rest.to(v) + snr)
        return outside * v + matmul(parts * (gains - outside), vectors.mT)

    def _matrix(self, snr: Tensor) -> Tensor:
        r"""V where noise differs by coordinate, :math:`R (I + R^T \text{diag(snr)} R)^{-1} R^T, C = R R^T`.

        Args:
            snr: levels + (n,).
        """
        vectors, values = self.vectors.to(snr), self.values.to(snr)
        root = vectors * values.sqrt()
        eye = torch.eye(len(root), dtype=snr.dtype, device=snr.device)
        if not self.complete:
            # The symmetric root, whose rank is full.
            outer = self.rest.to(snr).sqrt()
            root = outer * eye + matmul(vectors * (values.sqrt() - outer), vectors.mT)
        factor = torch.linalg.cholesky(eye + matmul(root.mT * snr.unsqueeze(-2), root))
        half = torch.linalg.solve_triangular(factor, root.mT.expand_as(factor), upper=False)
        return matmul(half.mT, half)
