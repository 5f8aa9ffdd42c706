"""The residual of a likelihood at one x_0, products of its Jacobian, and their Gaussian system."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_diffusion.dynamics.attention import twice_differentiable_attention
from pyro_diffusion.likelihoods.whitening import Whitened
from pyro_diffusion.precision import matmul
from pyro_diffusion.processes.noise import normal_like

__all__ = ["LinearizedLikelihood", "solve"]

SLACK = 0.1  # how far below 1 an eigenvalue of S may fall before it is raised


class LinearizedLikelihood:
    r"""The whitened residual :math:`r(x_0)` of a likelihood, and :math:`B = -\partial r/\partial x_0`.

    The likelihood is evaluated once; every product is a backward pass through it. *Data space* has the shape
    of x_0, *residual space* that of r, rows + (m,): its rows are the data, or whole plates of them if the
    likelihood does not factorize over data. Rows never mix.

    Args:
        whitened: residual and log-normalizer as a function of x_0.
        x0: where, batch + event.
        graph: whether all of it stays differentiable in what x_0 came from; detached otherwise.

    Attributes:
        mean: x_0.
        residual: r there.
        log_normalizer: :math:`\log p(y|x_0) + |r|^2/2` there, rows.

    Raises:
        ValueError: if the residual has no gradient.
    """

    def __init__(
        self, whitened: Callable[[Tensor], Whitened], x0: Tensor, graph: bool = False
    ) -> None:
        self.graph = graph
        # `push` differentiates the likelihood twice.
        with torch.enable_grad(), twice_differentiable_attention():
            self._x0 = x0 if graph else x0.detach().requires_grad_()
            self._residual, log_normalizer = whitened(self._x0)
        if not self._residual.requires_grad:
            raise ValueError(
                "likelihood: got a residual without a gradient in x_0, expected a program that can be "
                "differentiated in the site's value (twisted SMC on the bare denoiser needs no gradient)"
            )
        keep: Callable[[Tensor], Tensor] = (lambda v: v) if graph else Tensor.detach
        self.mean, self.residual = keep(self._x0), keep(self._residual)
        self.log_normalizer = keep(log_normalizer)
        self._dual: tuple[Tensor, Tensor] | None = None
        self._rows: Tensor | None = None

    @property
    def size(self) -> int:
        """Number m of residuals in a row."""
        return self.residual.shape[-1]

    def pull(self, u: Tensor) -> Tensor:
        """B^T u: from residual space to data space."""
        return self._vjp(self._residual, self._x0, -u)

    def push(self, v: Tensor) -> Tensor:
        """B v: from data space to residual space."""
        if self._dual is None:
            # B^T u is linear in u; its derivative in the direction of u is the product with B.
            with torch.enable_grad():
                u = torch.zeros_like(self.residual).requires_grad_()
                (pulled,) = torch.autograd.grad(self._residual, self._x0, -u, create_graph=True)
            self._dual = (u, pulled)
        u, pulled = self._dual
        return self._vjp(pulled, u, v)

    def _vjp(self, end: Tensor, start: Tensor, weights: Tensor) -> Tensor:
        """The Jacobian of ``end`` in ``start``, transposed, times weights."""
        (product,) = torch.autograd.grad(
            end, start, weights, retain_graph=True, create_graph=self.graph
        )
        return product

    def rows(self) -> Tensor:
        """The rows of B, (m,) + data space (m backward passes, made once)."""
        if self._rows is None:
            basis = torch.eye(self.size, dtype=self.residual.dtype, device=self.residual.device)
            self._rows = torch.stack([self.pull(e.expand_as(self.residual)) for e in basis])
        return self._rows

    def flat(self, rows: Tensor) -> Tensor:
        """(m,) + data space as matrices of m rows, rows + (m, n)."""
        lead = self.residual.shape[:-1]
        return rows.reshape(self.size, *lead, -1).movedim(0, -2)

    def per_row(self, v: Tensor) -> Tensor:
        """Data space as one vector for each row, rows + (n,)."""
        return v.reshape(*self.residual.shape[:-1], -1)

    def combined(self, rows: Tensor, u: Tensor) -> Tensor:
        """Sum of (m,) + data space under weights of residual space."""
        return matmul(u.unsqueeze(-2), self.flat(rows)).reshape(self.mean.shape)

    def sample(self, variance: Tensor) -> Tensor:
        r"""A draw of x_0 from :math:`p(y | x_0)\,\mathcal N(x_0; \text{mean}, v)`, linearized at the mean.

        Of :math:`z \sim \mathcal N(0, v)` and :math:`e \sim \mathcal N(0, I)` in residual space it is

        .. math:: \text{mean} + z + v B^T (I + B v B^T)^{-1} (r - B z + e),

        exact where the residual is an affine function of x_0.

        Args:
            variance: v, one number or one for each coordinate of x_0.

        References:
            Hoffman & Ribak, 1991 (a draw conditioned by its own residual).
        """
        event_dim = self.mean.dim() - self.residual.dim() + 1
        z = variance.sqrt() * normal_like(self.mean, event_dim)
        rows = self.rows()
        b = self.flat(rows)
        product = matmul(b, self.per_row(z).unsqueeze(-1)).squeeze(-1)
        gap = self.residual - product + normal_like(self.residual, 1)
        scaled = b * self.per_row(variance.expand_as(self.mean)).unsqueeze(-2)
        u = solve(matmul(scaled, b.mT), gap)[0]
        return self.mean + z + variance * self.combined(rows, u)


def solve(gap: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Solve S u = r for S = I + gap; where an eigenvalue falls below 1, all are raised to 1 or more.

    The gap is a covariance. Along a direction where it is negative nothing is uncertain, so the observations
    say nothing of x_0 there and u has no part in it: r is neither enlarged nor multiplied by a bad gap. Rows
    that are not finite become NaN, and those alone. In double precision, whatever that of the gap.

    Args:
        gap: S - I, rows + (m, m); its symmetric part is taken.
        r: right-hand sides, rows + (m,).

    Returns:
        u, of r's shape, and -(r^T u + log det S) / 2, of the rows' shape; differentiable but where
        eigenvalues were changed.
    """
    eye = torch.eye(gap.shape[-1], dtype=torch.float64, device=gap.device)
    system = eye + 0.5 * (gap + gap.mT).double()
    # Rounding leaves the least eigenvalue of a large gap uncertain by about this much.
    slack = SLACK + gap.shape[-1] * torch.finfo(gap.dtype).eps * gap.detach().abs().amax((-1, -2))
    raised = system.detach() - (1 - slack)[..., None, None] * eye
    bad = (torch.linalg.cholesky_ex(raised).info != 0) | ~torch.isfinite(slack)
    factor, info = torch.linalg.cholesky_ex(system)
    # More readings than are uncertain, and sharp ones: by rounding S may not even be positive.
    bad = bad | (info != 0)
    some_bad = bool(bad.any())
    if some_bad:
        raised, certain = (torch.zeros_like(raised) for _ in range(2))
        raised[bad], certain[bad] = _clamped(system.detach()[bad])
        factor = torch.linalg.cholesky_ex(torch.where(bad[..., None, None], raised, system)).L
    half = torch.linalg.solve_triangular(factor, r.unsqueeze(-1).double(), upper=False)
    u = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)
    if some_bad:
        # S is 1 there.
        u = u - matmul(certain, r.unsqueeze(-1).double()).squeeze(-1)
    log_root = factor.diagonal(dim1=-1, dim2=-2).log().sum(-1)
    return u.to(r), (-0.5 * half.square().sum((-1, -2)) - log_root).to(r)


def _clamped(system: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric matrices with eigenvalues below 1 raised to 1, and the projectors on their eigenvectors.

    Those that are not finite become NaN.
    """
    broken = ~torch.isfinite(system).all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(broken, 0.0, system))
    raised = matmul(vectors * values.clamp(min=1).unsqueeze(-2), vectors.mT)
    certain = matmul(vectors * (values < 1).to(values).unsqueeze(-2), vectors.mT)
    return torch.where(broken, torch.nan, raised), certain
