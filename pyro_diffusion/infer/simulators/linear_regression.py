"""The part of a conditional denoiser that is linear: known from a regression of latents on data."""

from typing import Any

import torch
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.schedules import Level

__all__ = ["LinearlyRegressed"]

MOST = 64  # latents and data up to which there is a regression
FEWEST = 10  # simulations for each coefficient of a latent
RIDGE = 1e-4  # of unit variances: data, and latents given data, may be functions of others


class LinearlyRegressed(Denoiser):
    r"""A denoiser whose network adds to that of jointly normal latents and data.

    For :math:`x_0 | y \sim \mathcal N(B y, U \Lambda U^\top)`, seen as :math:`x_t = \alpha x_0 + \sigma
    \epsilon`,

    .. math:: E[x_0 | x_t, y] = U (\sigma^2 U^\top B y + \alpha \Lambda U^\top x_t)
              / (\alpha^2 \Lambda + \sigma^2) .

    What this has beyond :math:`\alpha x_t / (\alpha^2 + \sigma^2)`, that of independent standard normals, is
    added to the mean of the denoiser it is made of. So the network learns what is not linear; whatever it
    is, that changes how fast it learns and not what it can learn. Jointly normal latents and data are right
    without training. Before :meth:`fit` it adds 0.

    Args:
        denoiser: one whose posterior is a point mass, with the data as context ``y``.
        latents: number of coordinates of x_0.
        features: of y.
    """

    point_mass = True
    basis: Tensor
    variances: Tensor
    slopes: Tensor

    def __init__(self, denoiser: Denoiser, latents: int, features: int) -> None:
        super().__init__(denoiser.process)
        self.denoiser = denoiser
        self.register_buffer("basis", torch.eye(latents))
        self.register_buffer("variances", torch.ones(latents))
        self.register_buffer("slopes", torch.zeros(features, latents))  # U^T B y is y times these

    @staticmethod
    def fits(denoiser: Any, latents: int, features: int) -> bool:
        """Whether a denoiser of so many coordinates can have a linear part."""
        return bool(denoiser.point_mass) and max(latents, features) <= MOST

    def fit(self, latents: Tensor, data: Tensor) -> None:
        """Regress standardized latents (n, latents) on standardized data (n, features), if n is large."""
        count, features = data.shape
        if count < FEWEST * (features + 1):
            return
        x0, y = latents.double(), data.double()
        ridge = RIDGE * torch.eye(features).to(y)
        slopes = torch.linalg.solve(y.mT @ y / count + ridge, y.mT @ x0 / count)
        left = x0 - y @ slopes
        variances, basis = torch.linalg.eigh(left.mT @ left / (count - features))
        self.variances.copy_(variances.clamp(min=RIDGE))
        self.basis.copy_(basis)
        self.slopes.copy_(slopes @ basis)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The point mass at the sum."""
        level = self.process.level(t, xt, state="xt")
        alpha, noise = level.alpha, level.sigma.square()
        own = self.denoiser(xt, level, **context).mean
        basis, variances, slopes = (
            each.to(xt) for each in (self.basis, self.variances, self.slopes)
        )
        expected = noise * (context["y"].to(xt) @ slopes) + alpha * variances * (xt @ basis)
        linear = (expected / (alpha.square() * variances + noise)) @ basis.mT
        alone = alpha / (alpha.square() + noise) * xt
        return Delta(own + linear - alone, event_dim=1, validate_args=False)

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """That of the denoiser it is made of."""
        return self.denoiser.context_event_dim(name, value)
