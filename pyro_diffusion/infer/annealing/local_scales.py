"""Where particles lie and how wide they are there: a mixture of normals fitted to them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LocalScales", "fitted"]

DENSE = 200  # dimensions up to which scales are covariances
MOST_PARTS = 16
PATIENCE = 1  # doublings of the parts that bring nothing
ROUNDS = 12  # of expectation maximization
DRAWS_PER_PART = 4  # times D, at the least


class LocalScales(NamedTuple):
    r"""Parts of a cloud, each a normal :math:`N(m_c, S_c S_c^T)` with a weight.

    Attributes:
        log_weights: (C,), normalized.
        locs: m, (C, D).
        roots: S, (C, D, D) lower triangular, or their diagonals (1, D).
        inverses: of S, the same shape.
        shifts: inverses times m, (C, D).
        constants: log weights and normalizing constants, (C,).
    """

    log_weights: Tensor
    locs: Tensor
    roots: Tensor
    inverses: Tensor
    shifts: Tensor
    constants: Tensor

    @property
    def size(self) -> int:
        """C."""
        return len(self.log_weights)

    def log_joint(self, z: Tensor) -> Tensor:
        """Log of each part's weight and density at (..., D), (..., C)."""
        return self._log_joint(self._white(z))

    def draw_part(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A part for each z (..., D), by its share there, and what :meth:`log_share` has of it."""
        if self.size == 1:
            part = torch.zeros(z.shape[:-1], dtype=torch.long, device=z.device)
            return part, *self.log_share(z, part)
        white = self._white(z)
        logits = self._log_joint(white)
        part = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
        return part, *self._share(white, logits, part)

    def log_share(self, z: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        r"""Log of the share :math:`r(c | z)` of a part at z (..., D), and its gradient."""
        if self.size == 1:
            return z.new_zeros(part.shape), torch.zeros_like(z)
        white = self._white(z)
        return self._share(white, self._log_joint(white), part)

    def times(self, x: Tensor, counts: Sequence[int], transpose: bool) -> Tensor:
        """S x, or its transpose times x, of rows (n, D) in the order of their parts, so many of each."""
        if self.roots.dim() == 2:
            return x * self.roots
        maps = self.roots if transpose else self.roots.mT
        if self.size == 1:
            return x @ maps[0]
        return torch.cat([part @ by for part, by in zip(x.split(list(counts)), maps, strict=True)])

    def _share(self, white: Tensor, logits: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        log_shares = logits.log_softmax(-1)
        own = torch.nn.functional.one_hot(part, self.size)
        found = log_shares.gather(-1, part.unsqueeze(-1)).squeeze(-1)
        return found, self._pull(white, log_shares.exp() - own)

    def _pull(self, white: Tensor, by: Tensor) -> Tensor:
        """The transposes of all inverses times what is white, summed with factors (..., C)."""
        pulled = by.unsqueeze(-1) * white
        if self.roots.dim() == 2:
            return (pulled * self.inverses).sum(-2)
        return pulled.flatten(-2) @ self.inverses.flatten(0, 1)

    def _white(self, z: Tensor) -> Tensor:
        """The inverses times z - m, (..., C, D)."""
        if self.roots.dim() == 2:
            return z.unsqueeze(-2) * self.inverses - self.shifts
        white = torch.nn.functional.linear(z, self.inverses.flatten(0, 1), -self.shifts.flatten())
        return white.unflatten(-1, (self.size, -1))

    def _log_joint(self, white: Tensor) -> Tensor:
        return self.constants - white.square().sum(-1) / 2


def local_scales(log_weights: Tensor, locs: Tensor, roots: Tensor) -> LocalScales:
    """Of these parts."""
    if roots.dim() == 2:
        inverses = diagonal = 1 / roots
        shifts = inverses * locs
    else:
        eye = torch.eye(roots.shape[-1], dtype=roots.dtype, device=roots.device)
        inverses = torch.linalg.solve_triangular(roots, eye, upper=False)
        shifts, diagonal = (inverses @ locs.unsqueeze(-1)).squeeze(-1), inverses.diagonal(0, -2, -1)
    constants = log_weights + diagonal.log().sum(-1) - math.log(2 * math.pi) / 2 * locs.shape[-1]
    return LocalScales(log_weights, locs, roots, inverses, shifts, constants)


def fitted(
    z: Tensor, log_weights: Tensor, near: int | None = None, most: int = MOST_PARTS
) -> LocalScales:
    r"""The mixture of normals of weighted particles, with about as many parts as the BIC takes.

    Args:
        z: (n, D).
        log_weights: (n,), normalized.
        near: parts that were right for particles like these, about which alone to look.
        most: parts; 1 is the normal of their moments.
    """
    rows, weights = z.double(), log_weights.double().exp()
    dim, count = rows.shape[1], float(weights.square().sum().reciprocal())
    centre = weights @ rows
    rows = rows - centre
    best = one = _one(rows, weights, count)
    least, worse = _bic(one, rows, weights, count), 0
    parts = 2 if near is None else max(2 ** int(math.log2(near)), 2)
    largest = min(most, count / (DRAWS_PER_PART * dim))
    while one.roots.dim() == 3 and parts <= largest and worse < PATIENCE:
        found = _mixture(rows, weights, count, one, parts)
        cost = _bic(found, rows, weights, count)
        worse = worse + 1 if cost >= least else 0
        if cost < least:
            best, least = found, cost
        parts *= 2
    best = local_scales(best.log_weights, best.locs + centre, best.roots)
    return LocalScales(*(part.to(z) for part in best))


def _one(rows: Tensor, weights: Tensor, count: float) -> LocalScales:
    dim = rows.shape[1]
    loc = weights @ rows
    centred = rows - loc
    variance = (count * (weights @ centred.square()) + 1) / (count + 1)
    zero = rows.new_zeros(1)
    if dim > DENSE or count < 5 * dim:
        return local_scales(zero, loc[None], variance.sqrt()[None])
    covariance = _shrunk((centred.mT * weights) @ centred, count)
    covariance.diagonal().add_(1e-9 * variance)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        return local_scales(zero, loc[None], variance.sqrt()[None])
    return local_scales(zero, loc[None], factor[None])


def _shrunk(covariance: Tensor, count: Tensor | float) -> Tensor:
    """Shrunk to its diagonal by the share of noise in it."""
    keep = torch.as_tensor(count / (count + covariance.shape[-1]), device=covariance.device)
    keep = keep[..., None, None]
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return keep * covariance + (1 - keep) * diagonal


def _mixture(
    rows: Tensor, weights: Tensor, count: float, one: LocalScales, parts: int
) -> LocalScales:
    dim = rows.shape[1]
    index = torch.multinomial(weights, parts, replacement=True)
    floor = 1e-6 * one.roots.square().sum(-1).amax(0)
    root = one.roots[:1] * parts ** (-1 / dim)
    found = local_scales(
        rows.new_full((parts,), -math.log(parts)), rows[index], root.expand(parts, -1, -1)
    )
    products = (rows[:, :, None] * rows[:, None, :]).flatten(1)
    for _ in range(ROUNDS):
        share = found.log_joint(rows).softmax(-1) * weights[:, None]
        mass = share.sum(0)
        keep = mass * count >= 2 * dim
        share, mass = share[:, keep], mass[keep]
        locs = share.mT @ rows / mass[:, None]
        second = (share.mT @ products).unflatten(-1, (dim, dim)) / mass[:, None, None]
        covariance = second - locs[:, :, None] * locs[:, None, :]
        covariance = _shrunk(covariance, count * mass)
        covariance.diagonal(dim1=-2, dim2=-1).add_(floor)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        good = failed == 0
        mass, locs, factor = mass[good], locs[good], factor[good]
        found = local_scales((mass / mass.sum()).log(), locs, factor)
    return found


def _bic(scales: LocalScales, rows: Tensor, weights: Tensor, count: float) -> float:
    dim = rows.shape[1]
    fit = weights @ scales.log_joint(rows).logsumexp(-1)
    free = scales.size * (dim + 1) * (dim + 2) / 2 - 1
    return float(-2 * count * fit) + free * math.log(count)
