r"""One read of a program, and of a denoiser before it, with products of their Jacobians."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, Quantized
from pyro_diffusion.guidance.base import moved
from pyro_diffusion.processes import coordinates
from pyro_diffusion.schedules import Level

__all__ = ["LinearizedChain", "LinearizedProgram", "detached", "solve"]


class LinearizedProgram:
    r"""The whitened residual :math:`r(x_0)` of a Normal program, and :math:`B = -\partial r/\partial x_0`.

    The program is run once; every product is a walk back through it. *Data space* has the shape of x_0,
    *residual space* that of r, rows + (m,): its rows are the data, or whole plates of them if the program
    does not factorize over data. Rows never mix.

    Args:
        likelihood: what has ``whitened(x_0)``.
        x0: where, batch + event.

    Attributes:
        mean: x_0, detached.
        residual: r there, detached.
        log_normalizer: :math:`\log p(y|x_0) + |r|^2/2` there, rows, detached.

    Raises:
        ValueError: if the residual has no gradient.
    """

    def __init__(self, likelihood: Any, x0: Tensor) -> None:
        with torch.enable_grad():
            self._x0 = x0.detach().requires_grad_()
            self._residual, log_normalizer = likelihood.whitened(self._x0)
        if not self._residual.requires_grad:
            raise ValueError(
                "likelihood: got a residual without a gradient in x_0, expected a program that can be "
                "differentiated in the site's value (twisted SMC on the bare denoiser needs no gradient)"
            )
        self.mean, self.residual = self._x0.detach(), self._residual.detach()
        self.log_normalizer = log_normalizer.detach()
        self._dual: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """Number m of residuals in a row."""
        return self.residual.shape[-1]

    def pull(self, u: Tensor) -> Tensor:
        """B^T u: from residual space to data space."""
        (product,) = torch.autograd.grad(self._residual, self._x0, -u, retain_graph=True)
        return product

    def push(self, v: Tensor) -> Tensor:
        """B v: from data space to residual space."""
        if self._dual is None:
            # B^T u is linear in u; its derivative in the direction of u is the product with B.
            with torch.enable_grad():
                u = torch.zeros_like(self.residual).requires_grad_()
                (pulled,) = torch.autograd.grad(self._residual, self._x0, -u, create_graph=True)
            self._dual = (u, pulled)
        u, pulled = self._dual
        (product,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
        return product

    def rows(self) -> Tensor:
        """The rows of B, (m,) + data space (m walks)."""
        basis = torch.eye(self.size, dtype=self.residual.dtype, device=self.residual.device)
        return torch.stack([self.pull(e.expand_as(self.residual)) for e in basis])

    def flat(self, rows: Tensor) -> Tensor:
        """(m,) + data space as matrices of m rows, rows + (m, n)."""
        lead = self.residual.shape[:-1]
        return rows.reshape(self.size, *lead, -1).movedim(0, -2)

    def combined(self, rows: Tensor, u: Tensor) -> Tensor:
        """Sum of (m,) + data space under weights of residual space."""
        return (u.unsqueeze(-2) @ self.flat(rows)).reshape(self.mean.shape)


class LinearizedChain(LinearizedProgram):
    r"""The same at :math:`\hat x_0(x_t)`, with :math:`J = \partial\hat x_0/\partial x_t` of the denoiser.

    Denoiser and program are read once each.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior.
        likelihood: what has ``whitened(x_0)``.
        xt: state, batch + event.
        level: where it is.
        context: the denoiser's.
        through: whether products with J will be asked for; if not, the denoiser is read without a graph.

    Attributes:
        prior: the denoiser's posterior, detached.

    Raises:
        ValueError: if the residual or the posterior mean has no gradient.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Any,
        xt: Tensor,
        level: Level,
        context: dict[str, Tensor],
        through: bool = True,
    ) -> None:
        with torch.set_grad_enabled(through):
            self._xt = xt.detach().requires_grad_(through)
            prior = denoiser(self._xt, level, **context)
            self._mean = prior.mean
        if through and not self._mean.requires_grad:
            raise ValueError(
                f"denoiser: got a {type(denoiser).__name__} whose mean has no gradient in x_t, expected a "
                "differentiable one (DiffPIR asks for none)"
            )
        self.prior = detached(prior)
        super().__init__(likelihood, self._mean)

    def back(self, v: Tensor) -> Tensor:
        """J^T v: data space to itself, through the denoiser."""
        (product,) = torch.autograd.grad(self._mean, self._xt, v, retain_graph=True)
        return product


def solve(gap: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Solve S u = r by the eigenvectors of S - I, whose eigenvalues are kept at 0 or more.

    So a bad Jacobian cannot enlarge the residual. Rows that are not finite become NaN, and those alone.

    Args:
        gap: S - I, rows + (m, m); its symmetric part is taken.
        r: right-hand sides, rows + (m,).

    Returns:
        u, of r's shape, and -(r^T u + log det S) / 2, of the rows' shape.
    """
    broken = ~torch.isfinite(gap).all(-1).all(-1)
    symmetric = torch.where(broken[..., None, None], 0.0, 0.5 * (gap + gap.mT))
    values, vectors = torch.linalg.eigh(symmetric)
    values = 1 + torch.where(broken.unsqueeze(-1), torch.nan, values.clamp(min=0))
    turned = (r.unsqueeze(-2) @ vectors).squeeze(-2)
    u = (vectors @ (turned / values).unsqueeze(-1)).squeeze(-1)
    return u, -0.5 * (turned.square() / values + values.log()).sum(-1)


def detached(posterior: TorchDistribution) -> TorchDistribution:
    """The same posterior without a graph: a point mass, values with probabilities, or else a normal."""
    base = coordinates(posterior)
    if isinstance(base, Quantized):
        quantized = Quantized(base.logits.detach(), base.values.detach(), validate_args=False)
        return quantized.to_event(posterior.event_dim)
    return moved(posterior, torch.zeros_like(posterior.mean))
