"""Data on a common scale, and how far from what was simulated they are."""

import math

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import Shape

__all__ = ["LOG", "LOG_OF_COUNTS", "PLAIN", "Familiar", "Standardized", "shuffled"]

PLAIN, LOG, LOG_OF_COUNTS = 0, 1, 2
RATE = 1e-3
# Of variables of unit variance: what varies less than this is taken to vary so much.
RIDGE = 1e-4
ROUNDING = 1e-4  # of distances
MOST = 1000  # coordinates up to which correlations are looked at


def shuffled(count: int) -> Tensor:
    """Rows in an order that is always the same: a table may be sorted, or repeat itself in steps."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")


class Standardized(nn.Module):
    r"""Values, or their logarithms, at zero mean and unit variance, each coordinate: :math:`(u - m) / s`.

    Args:
        shape: of one value.
        log: 0 if u is the value, 1 if its logarithm, 2 if that of the value and one, as for counts.
    """

    loc: Tensor
    scale: Tensor
    log: Tensor

    def __init__(self, shape: Shape, log: int = PLAIN) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("log", torch.tensor(int(log)))

    def fit(self, x: Tensor) -> None:
        """Take the moments of values, (n,) + shape; a constant coordinate keeps a scale of 1."""
        u = self._real(x).double()
        scale = u.std(0)
        self.loc.copy_(u.mean(0))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def loses(self, x: Tensor) -> Tensor:
        """Which coordinates of values vary by less than the buffers' precision, and would be lost."""
        exact, kept = (self._seen(each.double()) for each in (x, x.to(self.loc)))
        scale = exact.std(0)
        # what varies by no more than the rounding of doubles is constant
        varies = scale > 1e-12 * exact.abs().amax(0)
        return varies & ((exact - kept).abs().amax(0) > 0.01 * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Standardized values."""
        return (self._real(x) - self.loc) / self.scale

    def _real(self, x: Tensor) -> Tensor:
        return self._seen(x.to(self.loc))

    def _seen(self, x: Tensor) -> Tensor:
        log = int(self.log)
        return x if log == PLAIN else x.log() if log == LOG else x.log1p()


class Familiar(nn.Module):
    r"""Whether data look like simulated ones, by their Mahalanobis distance.

    Mean and covariance are those of a random half of the simulations; the limit is an order statistic of the
    distances of the others. So a new simulation is beyond it with a probability of at most ``rate``, whatever
    the data's distribution (conformal prediction). Beyond :data:`MOST` coordinates correlations are left out.

    Args:
        size: number of coordinates.
    """

    loc: Tensor
    whitening: Tensor
    limit: Tensor
    rate: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        shape = (size, size) if size <= MOST else (size,)
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("whitening", torch.zeros(shape))
        self.register_buffer("limit", torch.tensor(math.inf))
        self.register_buffer("rate", torch.tensor(0.0))

    def fit(self, rows: Tensor) -> None:
        """Take moments and limit of standardized simulations, (n, size)."""
        first, second = rows.double()[shuffled(len(rows))].tensor_split(2)
        centred = first - first.mean(0)
        if self.whitening.dim() == 1:
            whitening = (centred.square().mean(0) + RIDGE).rsqrt()
        else:
            covariance = centred.mT @ centred / len(first)
            covariance.diagonal().add_(RIDGE)
            factor = torch.linalg.cholesky(covariance)
            whitening = torch.linalg.solve_triangular(
                factor, torch.eye(len(factor)).to(factor), upper=False
            )
        self.loc.copy_(first.mean(0))
        self.whitening.copy_(whitening)
        distances = self.distance(second.to(self.loc)).sort().values
        rank = min(math.ceil((1 - RATE) * (len(second) + 1)), len(second))
        # A datum at the limit, as discrete ones often are, is not beyond it by rounding.
        self.limit.copy_(distances[rank - 1] * (1 + ROUNDING) + ROUNDING)
        self.rate.fill_((len(second) + 1 - rank) / (len(second) + 1))

    def expected(self, count: int) -> float:
        """How many of so many simulations are beyond the limit, at most."""
        return count * float(self.rate)

    def distance(self, rows: Tensor) -> Tensor:
        """Mahalanobis distances of standardized data, (..., size) -> (...)."""
        centred = rows - self.loc
        if self.whitening.dim() == 1:
            return (centred * self.whitening).norm(dim=-1)
        return (centred @ self.whitening.mT).norm(dim=-1)
