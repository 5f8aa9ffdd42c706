r"""Schedules with :math:`\alpha = 1`: data is never scaled, noise grows."""

import math

import torch
from torch import Tensor

from pyro_diffusion.schedules.base import Schedule
from pyro_diffusion.validation import check_number

__all__ = ["EDM", "VarianceExploding"]


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, expected 0 < sigma_min < sigma_max"
        )


class VarianceExploding(Schedule):
    r"""Geometric noise :math:`\sigma(t) = \sigma_{min} (\sigma_{max}/\sigma_{min})^t`, signal scale 1.

    .. math:: \lambda(t) = -2\log\sigma_{min} - 2 t \log(\sigma_{max}/\sigma_{min}), \qquad
              \alpha = 1, \qquad \sigma = e^{-\lambda/2}

    Args:
        sigma_min: noise scale at t = 0, > 0.
        sigma_max: noise scale at t = 1, above the diameter of the data.

    Raises:
        ValueError: if not ``0 < sigma_min < sigma_max``.

    References:
        Song & Ermon, arXiv 1907.05600; Song et al., arXiv 2011.13456.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        _check_sigmas(sigma_min, sigma_max)
        super().__init__(-2 * math.log(sigma_min), -2 * math.log(sigma_max))

    def _curve(self, u: Tensor) -> Tensor:
        return -u

    def _curve_slope(self, u: Tensor) -> Tensor:
        return -torch.ones_like(u)

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        return -log_snr

    def _signal(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)

    def _noise(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2)

    def _signal_slope(self, log_snr: Tensor) -> Tensor:
        return torch.zeros_like(log_snr)


class EDM(VarianceExploding):
    r"""Karras schedule: :math:`\sigma(t)^{1/\rho}` linear in t, signal scale 1.

    .. math:: \sigma(t) = (\sigma_{min}^{1/\rho} + t\,(\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho}))^\rho,
              \qquad \lambda = -2\log\sigma, \qquad \alpha = 1

    On the time :math:`u = \sigma^{1/\rho}` the curve is :math:`\lambda(u) = -2\rho\log u`. A uniform grid in
    t is the rho grid of the paper.

    Args:
        sigma_min: noise scale at t = 0, > 0.
        sigma_max: noise scale at t = 1.
        rho: exponent, >= 0.1; larger spends more steps near the data.

    Raises:
        ValueError: if not ``0 < sigma_min < sigma_max`` or ``rho < 0.1``.

    References:
        Karras et al., Elucidating the design space, arXiv 2206.00364, equation 5.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.rho = check_number("rho", rho, at_least=0.1)
        super().__init__(sigma_min, sigma_max)

    def _curve(self, u: Tensor) -> Tensor:
        return -2 * self.rho * torch.log(u)

    def _curve_slope(self, u: Tensor) -> Tensor:
        return -2 * self.rho / u

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / (2 * self.rho))
