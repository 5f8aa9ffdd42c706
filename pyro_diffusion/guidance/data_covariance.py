"""Gaussian conditioning with the covariance of the data in place of the network's derivative."""

from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.gaussian_conditioning import GaussianConditioning
from pyro_diffusion.guidance.linear_estimate import LinearEstimate
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_finite

__all__ = ["DataCovariance"]


class DataCovariance(GaussianConditioning):
    r"""The covariance that x_0 had given x_t if data were normal: no backward pass through the network.

    .. math:: V = \Big(C^{-1} + \text{diag}\frac{\alpha_t^2}{\sigma_t^2}\Big)^{-1}, \qquad
              \text{shift} = V B^T S^{-1} r .

    MMPS and PiGDM multiply the network's derivative by :math:`\sigma^2/\alpha`, near a hundred where x_t is
    noise, and with it what a trained network gets wrong. C is estimated once, from data. Exact for normal
    data of covariance C and linear observations, else approximate; the guidance of choice for trained
    networks inside twisted SMC. One noise level for all coordinates costs a product with the eigenvectors of
    C; where it differs by coordinate, one Cholesky factorization a level. Other arguments, errors and
    log-twist: :class:`~pyro_diffusion.guidance.gaussian_conditioning.GaussianConditioning`.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula; it needs no
            gradient.
        likelihood: as there.
        covariance: C, (n, n) for n numbers in a datum, on the scale of x_0. Positive definite; add a little
            to the diagonal of an estimate.
        options: ``solver`` and ``iterations``.

    Raises:
        ValueError: if the covariance has another shape or is not positive definite, and as there.

    Example:
        >>> import functools
        >>> data = torch.randn(500, 2)
        >>> guidance = functools.partial(DataCovariance, covariance=data.mT.cov())

    References:
        The normal model of a linear denoiser, as in Rozet et al., arXiv 2405.13712, section 4.2, for a
        covariance known beforehand.
    """

    through = False

    def __init__(
        self, denoiser: Denoiser, likelihood: Likelihood, *, covariance: Tensor, **options: Any
    ) -> None:
        super().__init__(denoiser, likelihood, **options)
        n = likelihood.event_shape.numel()
        if not isinstance(covariance, Tensor) or covariance.shape != (n, n):
            got = tuple(covariance.shape) if isinstance(covariance, Tensor) else covariance
            raise ValueError(f"covariance: got shape {got}, expected {(n, n)}")
        check_finite("covariance", covariance)
        covariance = covariance.to(torch.promote_types(covariance.dtype, torch.float32))
        values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.mT))
        if not bool((values > 0).all()):
            raise ValueError(
                f"covariance: got a least eigenvalue of {float(values[0]):g}, expected a positive definite "
                "matrix (add a little to its diagonal)"
            )
        self.estimate = LinearEstimate(values, vectors)

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """V v, diagonal in the principal components of the data under one noise level."""
        return self.estimate.times(v, level, self.process.event_dim, at)

    def variances(self, at: LinearizedDenoiser, level: Level) -> Tensor:
        """The diagonal of V."""
        return self.estimate.diagonal(level, self.likelihood.event_shape, at)
