r"""Straight paths: :math:`\alpha + \sigma = 1`."""

import math

import torch
from torch import Tensor

from pyro_diffusion.schedules.base import TwoEndedSchedule

__all__ = ["Rectified"]


class Rectified(TwoEndedSchedule):
    r"""Linear interpolation :math:`x_t = (1 - u)\,x_0 + u\,\epsilon` of flow matching and rectified flow.

    .. math:: \lambda(u) = 2\log\frac{1 - u}{u}, \qquad \alpha = \mathrm{sigmoid}(\lambda/2) = 1 - u, \qquad
              \sigma = \mathrm{sigmoid}(-\lambda/2) = u

    With the default ends the curve is cut where the log-SNR is finite. Infinite ends give u = t exactly:
    signal 1 at t = 0 and 0 at t = 1, which Gaussian chains refuse and categorical processes want (there
    ``alpha(t)`` is the probability that a symbol survives).

    Args:
        log_snr_max: log-SNR at t = 0, may be ``inf``.
        log_snr_min: log-SNR at t = 1, may be ``-inf``.

    Raises:
        ValueError: if ``log_snr_max <= log_snr_min``.

    References:
        Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747.
    """

    reaches_infinity = True

    def __init__(self, log_snr_max: float = 10.0, log_snr_min: float = -10.0) -> None:
        super().__init__(log_snr_max, log_snr_min)

    @classmethod
    def full(cls) -> "Rectified":
        """The uncut schedule, ``alpha(t) = 1 - t``."""
        return cls(math.inf, -math.inf)

    def _curve_of(self, u: Tensor, v: Tensor) -> Tensor:
        return 2 * (torch.log(v) - torch.log(u))

    def _slope_of(self, u: Tensor, v: Tensor) -> Tensor:
        return -2 / (u * v)

    def _drift(self, t: Tensor, log_snr: Tensor, slope: Tensor) -> Tensor:
        """Drift coefficient, -1 / (1 - u) per unit of u: finite at t = 0 even where the log-SNR is not."""
        del log_snr, slope
        return -self._width / self._place(t)[1]

    def _g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient, 2u / (1 - u) per unit of u."""
        u, v = self._place(t)
        return 2 * self._width * u / v

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

    def _inverse_rest(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)

    def _signal(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)

    def _noise(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

    def _signal_slope(self, log_snr: Tensor) -> Tensor:
        return 0.5 * torch.sigmoid(-log_snr / 2)
