r"""The best linear prediction of readings y from a noisy state x_t, by moments of (x_0, y)."""

import torch
from torch import Tensor

from pyro_diffusion.precision import PreciseModule, matmul

__all__ = ["LinearPrediction"]

# Least variance of a residual, of readings of unit variance: that of readings without noise is 0.
RIDGE = 1e-6


class LinearPrediction(PreciseModule):
    r"""Mean and covariance of y given x_t, were (x_0, y) normal.

    .. math:: m = E y + \alpha K (\alpha^2 C + \sigma^2 I)^{-1} (x_t - \alpha E x_0), \qquad
              S = \text{Cov}(y) - \alpha^2 K (\alpha^2 C + \sigma^2 I)^{-1} K^T,

    C the covariance of x_0 and K that of y with it. Readings have zero mean and unit variance here,
    coordinate by coordinate; see ``centre`` and ``unit``. Moments are kept in double precision.

    Args:
        size: n, numbers of a datum.
        readings: m, of its readings.

    Attributes:
        centre: mean of the readings, (m,).
        unit: their standard deviation, (m,); 1 for a constant.
        spread: root mean variance of x_0.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor
    cross: Tensor
    covariance: Tensor
    centre: Tensor
    unit: Tensor
    spread: Tensor

    def __init__(self, size: int, readings: int) -> None:
        super().__init__()
        shapes = {
            "mean": (size,),
            "values": (size,),
            "vectors": (size, size),
            "cross": (readings, size),
            "covariance": (readings, readings),
            "centre": (readings,),
            "unit": (readings,),
            "spread": (),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def fit(self, x0: Tensor, y: Tensor) -> None:
        """Take the moments of draws, (N, n) and (N, m)."""
        x, u = x0.double(), y.double()
        scale = u.std(0)
        unit = torch.where(scale > 0, scale, 1.0)
        centred, readings = x - x.mean(0), (u - u.mean(0)) / unit
        values, vectors = torch.linalg.eigh(centred.mT @ centred / len(x))
        found = {
            "mean": x.mean(0),
            "values": values.clamp(min=0),
            "vectors": vectors,
            "cross": readings.mT @ centred @ vectors / len(x),
            "covariance": readings.mT @ readings / len(x),
            "centre": u.mean(0),
            "unit": unit,
            "spread": values.clamp(min=0).mean().sqrt(),
        }
        for name, value in found.items():
            getattr(self, name).copy_(value)

    def standardized(self, y: Tensor) -> Tensor:
        """Readings at zero mean and unit variance, in their own dtype."""
        return ((y - self.centre) / self.unit).to(y.dtype)

    def scaled(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """States at about zero mean and unit variance, (N, n), for a network."""
        total = torch.hypot(alpha * self.spread, sigma)
        return ((x - alpha * self.mean) / total).to(x.dtype)

    def share(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Share of signal in a state's standard deviation: what it can tell, in [0, 1]."""
        return alpha * self.spread / torch.hypot(alpha * self.spread, sigma)

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """m and the Cholesky factor of S, (N, m) and (N or 1, m, m), in the dtype of x.

        Args:
            x: states, (N, n).
            alpha: signal scale, (N, 1) or (1, 1).
            sigma: noise scale, likewise.
        """
        gains = alpha / (alpha.square() * self.values + sigma.square())  # (N or 1, n)
        parts = matmul(x.double() - alpha * self.mean, self.vectors)
        mean = matmul(parts * gains, self.cross.mT)
        told = matmul(self.cross * (alpha * gains).unsqueeze(-2), self.cross.mT)
        eye = torch.eye(len(self.covariance), dtype=told.dtype, device=told.device)
        root = torch.linalg.cholesky(self.covariance - told + RIDGE * eye)
        return mean.to(x.dtype), root.to(x.dtype)
