"""Latents between two ends, predicted from data by a regression in their own space."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_diffusion.infer.simulators.standardized import Standardized

__all__ = ["BoundedPrediction"]

FEWEST = 10  # simulations for each coefficient of a latent
RIDGE = 1e-4  # of unit variances
END = 1e-3  # of an interval: predictions nearer to an end, or beyond, are taken there


class BoundedPrediction(nn.Module):
    r"""What a linear regression of bounded latents on data says of their unconstrained values.

    Data are often linear in a latent that lies in an interval, as readings of a place are, and then not in
    its normal quantile u (see ``intervals``). So the regression is of its place :math:`p = \Phi(u)` between
    the ends, and what it predicts goes the way of the latent:

    .. math:: \Phi^{-1}(\operatorname{clip}(b + B v,\ \epsilon,\ 1 - \epsilon)),

    standardized. A feature for the network and for its linear part; 0 before :meth:`fit`.

    Args:
        bounded: which coordinates of the packed latents lie in an interval.
        values: number of standardized data v.
    """

    bounded: Tensor
    slopes: Tensor

    def __init__(self, bounded: Sequence[int], values: int) -> None:
        super().__init__()
        slopes = torch.zeros(values + 1, len(bounded))
        slopes[-1] = 0.5
        # states of programs without intervals have nothing of it
        kept, at = len(bounded) > 0, torch.tensor(bounded, dtype=torch.long)
        self.register_buffer("bounded", at, persistent=kept)
        self.register_buffer("slopes", slopes, persistent=kept)

    @property
    def size(self) -> int:
        """How many features it adds."""
        return len(self.bounded)

    def fit(self, latents: Tensor, values: Tensor) -> None:
        """Regress unconstrained latents (n, size) on standardized data (n, values), if n is large."""
        if not self.size or len(values) < FEWEST * len(self.slopes):
            return
        place = torch.special.ndtr(latents[:, self.bounded].double())
        v = values.double()
        # data have no mean, and so the constant is that of the places
        ridge = RIDGE * torch.eye(v.shape[1]).to(v)
        centred = place - place.mean(0)
        slopes = torch.linalg.solve(v.mT @ v / len(v) + ridge, v.mT @ centred / len(v))
        self.slopes.copy_(torch.cat([slopes, place.mean(0, keepdim=True)]))

    def forward(self, values: Tensor, scale: Standardized) -> Tensor:
        """Standardized predictions, batch + (size,), from standardized data, batch + (values,)."""
        slopes = self.slopes.to(values)
        place = values @ slopes[:-1] + slopes[-1]
        u = torch.special.ndtri(place.clamp(END, 1 - END))
        at = self.bounded
        return (u - scale.loc[at].to(u)) / scale.scale[at].to(u)
