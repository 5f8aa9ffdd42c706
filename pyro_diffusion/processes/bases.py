"""Orthonormal coordinates of data: cosines, wavelets, eigenvectors."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.precision import PreciseModule, matmul
from pyro_diffusion.validation import (
    Shape,
    check_event_shape,
    check_finite,
    check_positive_int,
    check_sizes,
    check_tensor,
)

__all__ = ["Basis", "BasisTransform"]


class Basis(DefinedModule, PreciseModule):
    r"""Coordinates :math:`u = V^T x` of data x in an orthonormal basis, the columns of V.

    Calling it takes data to coordinates, :meth:`inverse` takes them back; both have the event shape of the
    data, so coordinates of an image are laid out like an image. ``transform`` is the way back as a transform
    of distributions, with log-determinant 0.

    ===================================  ===================================================================
    ``Basis.identity(event_shape)``      the coordinates of the data
    ``Basis.dct(event_shape)``           cosines, over the last two dimensions of an image; blur damps them
    ``Basis.haar(event_shape, levels)``  Haar wavelets: averages of blocks and differences
    ``Basis.principal(data)``            principal components
    ``Basis.eigenvectors(covariance)``   likewise, of a known covariance
    ``Basis.laplacian(adjacency)``       eigenvectors of a graph's Laplacian; diffusion on it damps them
    ===================================  ===================================================================

    Args:
        vectors: (n, n), the basis vectors of flattened data as its columns; or, by negative dimension of the
            event, (size, size) for that dimension alone: the basis is then their Kronecker product.
        event_shape: of the data.
        frequencies: eigenvalue >= 0 of (minus) the Laplacian for every coordinate, if the basis diagonalizes
            one: what heat does to a coordinate is :math:`u\,e^{-\text{frequency}\,\tau}`.
        variances: of every coordinate of the data, if known.

    Raises:
        ValueError: for matrices of other sizes or whose columns are not orthonormal, negative frequencies
            or variances, and shapes that do not fit.

    Example:
        >>> basis = Basis.dct((1, 8, 8))
        >>> x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
        >>> bool(torch.allclose(basis.inverse(basis(x)), x))
        True
    """

    frequencies: Tensor | None
    variances: Tensor | None

    def __init__(
        self,
        vectors: Tensor | Mapping[int, Tensor],
        event_shape: Shape,
        frequencies: Tensor | None = None,
        variances: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = check_sizes("event_shape", event_shape)
        if not isinstance(vectors, Mapping):
            vectors = {0: vectors}
        self._dims = tuple(vectors)  # 0 stands for all dimensions together
        for dim, matrix in vectors.items():
            self.register_buffer(f"vectors{-dim}", self._checked(dim, matrix))
        for name, numbers in (("frequencies", frequencies), ("variances", variances)):
            if numbers is not None:
                check_finite(name, numbers)
                if numbers.shape != self.event_shape or bool((numbers < 0).any()):
                    least = (
                        f" and a least value of {float(numbers.min()):g}" if numbers.numel() else ""
                    )
                    raise ValueError(
                        f"{name}: got shape {tuple(numbers.shape)}{least}, expected numbers >= 0 of shape "
                        f"{tuple(self.event_shape)}"
                    )
                numbers = numbers.clone()
            self.register_buffer(name, numbers)

    @classmethod
    def identity(cls, event_shape: Shape) -> Self:
        """The coordinates of the data themselves."""
        return cls({}, event_shape)

    @classmethod
    def dct(cls, event_shape: Shape, dims: int = 2) -> Self:
        r"""Orthonormal cosines (DCT-II) over the last ``dims`` dimensions.

        Coordinate k of n has the vector :math:`\propto \cos(\pi k (j + 1/2) / n)` and the frequency
        :math:`(\pi k / n)^2`, summed over dimensions: the eigenvectors of diffusion between walls (of
        blurring without a border effect).

        Args:
            event_shape: (..., height, width).
            dims: how many of the last dimensions, 1 for a series.

        Raises:
            ValueError: if there are fewer dimensions.
        """
        shape = _at_least(event_shape, dims)
        vectors, frequencies = {}, torch.zeros(shape, dtype=torch.float64)
        for dim in range(-dims, 0):
            n = shape[dim]
            k = torch.arange(n, dtype=torch.float64)
            waves = torch.cos(math.pi * (k.unsqueeze(-1) + 0.5) * k / n) * math.sqrt(2 / n)
            waves[:, 0] /= math.sqrt(2)
            vectors[dim] = waves
            frequencies += (math.pi * k / n).square().reshape(-1, *(1,) * (-dim - 1))
        return cls(vectors, shape, frequencies)

    @classmethod
    def haar(cls, event_shape: Shape, levels: int, dims: int = 2) -> Self:
        """Haar wavelets over the last ``dims`` dimensions: a tensor product of one-dimensional ones.

        Along each dimension, pairs become sums and differences over the square root of 2, sums first, and the
        sums are treated likewise again, ``levels`` times: the first coordinates are averages of blocks.

        Args:
            event_shape: (..., height, width); sizes that are multiples of ``2**levels``.
            levels: how often.
            dims: how many of the last dimensions.

        Raises:
            ValueError: if a size is no such multiple.
        """
        shape = _at_least(event_shape, dims)
        check_positive_int("levels", levels)
        vectors = {}
        for dim in range(-dims, 0):
            n = shape[dim]
            if n % 2**levels:
                raise ValueError(
                    f"levels: got {levels} for a dimension of size {n}, expected sizes that are multiples "
                    f"of 2**levels = {2**levels}"
                )
            matrix = torch.eye(n, dtype=torch.float64)
            for level in range(levels):
                size = n >> level
                even, odd = matrix[0:size:2], matrix[1:size:2]
                matrix = torch.cat([even + odd, even - odd, matrix[size:] * 2**0.5]) / 2**0.5
            vectors[dim] = matrix.mT
        return cls(vectors, shape)

    @classmethod
    def eigenvectors(cls, covariance: Tensor, event_shape: Shape | None = None) -> Self:
        """Eigenvectors of a covariance, by decreasing variance; the eigenvalues are ``variances``.

        Args:
            covariance: (n, n), of flattened data.
            event_shape: of the data, (n,) by default.
        """
        values, vectors = torch.linalg.eigh(_symmetric("covariance", covariance))
        shape = covariance.shape[:1] if event_shape is None else event_shape
        variances = values.flip(0).clamp(min=0)
        return cls(vectors.flip(1), shape, variances=_reshaped(variances, shape))

    @classmethod
    def principal(cls, data: Tensor) -> Self:
        """Principal components of data, by decreasing variance: eigenvectors of the sample covariance.

        Args:
            data: of shape count + event, at least two.
        """
        check_finite("data", data)
        if data.dim() < 2 or len(data) < 2:
            raise ValueError(
                f"data: got shape {tuple(data.shape)}, expected count + event of at least 2 data"
            )
        flat = data.flatten(1).double()
        return cls.eigenvectors(flat.mT.cov().reshape(flat.shape[1], -1), data.shape[1:])

    @classmethod
    def laplacian(cls, adjacency: Tensor) -> Self:
        """Eigenvectors of a graph's Laplacian D - A, by increasing frequency (its eigenvalues).

        Args:
            adjacency: (n, n), symmetric weights >= 0 of the edges; data are one number per node.
        """
        weights = _symmetric("adjacency", adjacency)
        if bool((weights < 0).any()):
            raise ValueError(f"adjacency: got {float(weights.min()):g}, expected weights >= 0")
        values, vectors = torch.linalg.eigh(weights.sum(-1).diag() - weights)
        return cls(vectors, adjacency.shape[:1], values.clamp(min=0))

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates :math:`V^T x` of data, batch + event.

        Raises:
            ValueError: for another event shape.
        """
        return self._times("x", x, lambda vectors: vectors)

    def inverse(self, u: Tensor) -> Tensor:
        """Data :math:`V u` of coordinates, batch + event.

        Raises:
            ValueError: for another event shape.
        """
        return self._times("u", u, lambda vectors: vectors.mT)

    def marginal_variances(self, variances: Tensor) -> Tensor:
        r"""Variances of data whose coordinates are independent, :math:`\text{diag}(V\,\text{diag}(v)\,V^T)`.

        Args:
            variances: v of the coordinates, batch + event.
        """
        return self._times("variances", variances, lambda vectors: vectors.mT.square())

    @property
    def transform(self) -> Transform:
        """From coordinates to data, for :class:`pyro.distributions.TransformedDistribution`."""
        return BasisTransform(self)

    def extra_repr(self) -> str:
        """Shape of the data, for ``repr``."""
        return f"event_shape={tuple(self.event_shape)}"

    def _times(self, name: str, x: Tensor, matrix: Any) -> Tensor:
        """Row vectors times a matrix of each factor."""
        check_event_shape(name, x, self.event_shape)
        for dim in self._dims:
            vectors = matrix(getattr(self, f"vectors{-dim}").to(x))
            if dim == 0:
                flat = x.reshape(*x.shape[: x.dim() - len(self.event_shape)], len(vectors))
                x = matmul(flat, vectors).reshape(x.shape)
            elif dim == -1:
                x = matmul(x, vectors)
            else:
                x = matmul(x.movedim(dim, -1), vectors).movedim(-1, dim)
        return x

    def _checked(self, dim: int, matrix: Tensor) -> Tensor:
        check_finite("vectors", matrix)
        fits = isinstance(dim, int) and -len(self.event_shape) <= dim <= 0
        size = (self.event_shape[dim] if dim else self.event_shape.numel()) if fits else 0
        if matrix.shape != (size, size):
            raise ValueError(
                f"vectors: got shape {tuple(matrix.shape)} for dimension {dim or 'all'}, expected "
                f"{(size, size)}, that of data of shape {tuple(self.event_shape)}"
            )
        error = float((matrix.mT @ matrix - torch.eye(size).to(matrix)).abs().max())
        if error > 1e-4 or (matrix.dtype == torch.float64 and error > 1e-8):
            raise ValueError(
                f"vectors: got columns whose products differ from those of orthonormal ones by {error:g}, "
                "expected an orthogonal matrix"
            )
        return matrix.clone()


class BasisTransform(Transform):
    """From coordinates in an orthonormal basis to data: volumes stay, nothing is cached.

    Args:
        basis: the basis.
    """

    bijective = True

    def __init__(self, basis: Basis) -> None:
        super().__init__(cache_size=0)
        self.basis = basis

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Real numbers."""
        return constraints.independent(constraints.real, len(self.basis.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Real numbers."""
        return self.domain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BasisTransform) and other.basis is self.basis

    __hash__ = None  # type: ignore[assignment]

    def with_cache(self, cache_size: int = 1) -> Self:
        """Itself: what is not cached is computed again."""
        return self

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """0 for every datum."""
        return x.new_zeros(x.shape[: x.dim() - len(self.basis.event_shape)])

    def _call(self, x: Tensor) -> Tensor:
        return self.basis.inverse(x)

    def _inverse(self, y: Tensor) -> Tensor:
        out: Tensor = self.basis(y)
        return out


def _at_least(event_shape: Shape, dims: int) -> torch.Size:
    shape = check_sizes("event_shape", event_shape)
    if len(shape) < check_positive_int("dims", dims):
        raise ValueError(
            f"event_shape: got {tuple(shape)}, expected at least {dims} dimension(s), as dims has it"
        )
    return shape


def _symmetric(name: str, matrix: Tensor) -> Tensor:
    check_finite(name, check_tensor(name, matrix))
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: got shape {tuple(matrix.shape)}, expected (n, n)")
    matrix = matrix.double()
    if not torch.allclose(matrix, matrix.mT, rtol=1e-4, atol=1e-6 * float(matrix.abs().max())):
        raise ValueError(f"{name}: got a matrix that is not symmetric, expected a symmetric one")
    return 0.5 * (matrix + matrix.mT)


def _reshaped(values: Tensor, event_shape: Shape) -> Tensor:
    shape = check_sizes("event_shape", event_shape)
    if shape.numel() != len(values):
        raise ValueError(
            f"event_shape: got {tuple(shape)}, expected a shape of {len(values)} numbers, as the covariance "
            "has"
        )
    return values.reshape(shape)
