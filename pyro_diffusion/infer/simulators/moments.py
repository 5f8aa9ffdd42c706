"""First and second moments of the rows of sets."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.nn.regressions import regressions, scatter

__all__ = ["Moments"]


class Moments(NamedTuple):
    """Of the sets in some rows, or of several sets together.

    Attributes:
        scatter: sums of products about the mean of each set, rows + (d, d).
        freedom: their degrees of freedom, rows.
        mean: of each set, rows + (d,); None of several together.
        number: of rows in each set, likewise.
    """

    scatter: Tensor
    freedom: Tensor
    mean: Tensor | None = None
    number: Tensor | None = None

    @staticmethod
    def of(x: Tensor, present: Tensor) -> "Moments":
        """Of sets of rows, (..., n, d), zero where absent."""
        count = present.sum(-1, dtype=x.dtype)
        mean = x.sum(-2) / count.clamp(min=1).unsqueeze(-1)
        return Moments(*scatter(x, present.unsqueeze(-1)), mean, count)

    def pooled(self) -> "Moments":
        """Of the sets of all rows together, each about its own mean."""
        return Moments(self.scatter.sum(-3), self.freedom.sum(-1))

    def features(self) -> Tensor:
        """Mean, regressions and number of rows of each set."""
        assert self.mean is not None and self.number is not None
        count = self.number.unsqueeze(-1)
        parts = [self.mean, regressions(self.scatter, self.freedom), count.log1p(), 1 / (1 + count)]
        return torch.cat(parts, -1)
