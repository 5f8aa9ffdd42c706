"""Independent normals that were told of linear readings: a normal with a covariance of its own."""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.precision import matmul
from pyro_diffusion.processes.noise import NoiseSource
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape

__all__ = ["ConditionedNormal", "normal_from", "normal_tensors"]


class ConditionedNormal(TorchDistribution):
    r"""A normal of mean m whose precision is diagonal plus low rank (exact).

    .. math:: \mathcal N\big(m,\; D (I + F F^T)^{-1} D\big), \qquad D = \text{diag}(s),

    as independent normals of scale s have after m more readings of unit noise, :math:`F^T D^{-1}` times the
    vector. Draws and densities take one Cholesky factorization of :math:`K = I + F^T F`:
    :math:`x = m + D (z - F K^{-1} (F^T z + e))` of standard normal z and e, and

    .. math:: \log p(x) = -\tfrac12 \big(|u|^2 + |F^T u|^2 + n \log 2\pi - \log\det K\big) - \sum_i \log s_i,
              \qquad u = D^{-1}(x - m).

    K is formed and factorized in double precision: readings that are sharp and say nearly the same leave it
    singular in single precision.

    Args:
        loc: m, batch + event.
        scale: s, which broadcasts to it.
        factor: F, batch + event + (m,).
        event_dim: how many rightmost dimensions of ``loc`` make one datum.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor, event_dim: int) -> None:
        self.loc, self.scale, self.factor = loc, scale.expand(loc.shape), factor
        split = loc.dim() - event_dim
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """m."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        r"""Of every coordinate, :math:`s_i^2 (1 - |K^{-1/2} F^T e_i|^2)`."""
        half = torch.linalg.solve_triangular(self._root, self._matrix.mT, upper=False)
        share = (1 - half.square().sum(-2)).clamp(min=torch.finfo(half.dtype).eps)
        return self.scale.square() * share.reshape(self.loc.shape).to(self.scale)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution at a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        loc, scale = self.loc.expand(shape), self.scale.expand(shape)
        factor = self.factor.expand(*shape, self.factor.shape[-1])
        return type(self)(loc, scale, factor, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, sample + batch."""
        u = self._flat((value.double() - self.loc.double()) / self.scale.double())
        told = matmul(u.unsqueeze(-2), self._matrix).squeeze(-2)
        log_det = 2 * self._root.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        squares = u.square().sum(-1) + told.square().sum(-1)
        constant = self.event_shape.numel() * math.log(2 * math.pi)
        log_scale = self._flat(self.scale).log().sum(-1)
        return (-0.5 * (squares + constant - log_det) - log_scale).to(self.loc)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Reparameterized draws, sample + batch + event."""
        shape = self._extended_shape(torch.Size(sample_shape))
        z = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        lead = shape[: len(shape) - len(self.event_shape)]
        e = torch.randn(*lead, self.factor.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return self._of(z, e)

    def draw_from(self, noise: NoiseSource, sample_shape: Shape, event_dim: int) -> Tensor:
        """Draws by a source's numbers, whose rows have ``event_dim`` dimensions."""
        shape = self._extended_shape(torch.Size(sample_shape))
        z, k = noise.normal(shape, self.loc, event_dim), len(self.event_shape)
        own = (*shape[: len(shape) - k], *(1,) * (k - 1), self.factor.shape[-1])
        return self._of(z, noise.normal(own, self.loc, event_dim).reshape(*shape[:-k], -1))

    @property
    def _matrix(self) -> Tensor:
        """F with one dimension for a datum, batch + (n, m), in double precision."""
        return self.factor.reshape(*self.batch_shape, -1, self.factor.shape[-1]).double()

    @functools.cached_property
    def _root(self) -> Tensor:
        """The Cholesky factor of K."""
        f = self._matrix
        eye = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        return torch.linalg.cholesky(eye + matmul(f.mT, f))

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(self.event_shape)], -1)

    def _of(self, z: Tensor, e: Tensor) -> Tensor:
        f, flat = self._matrix, self._flat(z).double().unsqueeze(-1)
        told = matmul(f.mT, flat) + e.double().unsqueeze(-1)
        away = matmul(f, torch.cholesky_solve(told, self._root))
        return self.loc + self.scale * (flat - away).reshape(z.shape).to(z)


def normal_tensors(kernel: TorchDistribution) -> dict[str, Tensor]:
    """The tensors of independent normals, or of a :class:`ConditionedNormal`."""
    base = per_coordinate(kernel)
    own = {"loc": base.loc, "scale": base.scale}
    return {**own, "factor": base.factor} if isinstance(base, ConditionedNormal) else own


def normal_from(tensors: Mapping[str, Tensor], event_dim: int) -> TorchDistribution:
    """The distribution of such tensors."""
    if "factor" in tensors:
        return ConditionedNormal(**tensors, event_dim=event_dim)
    return Normal(tensors["loc"], tensors["scale"], validate_args=False).to_event(event_dim)
