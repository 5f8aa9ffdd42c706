r"""Schedules whose signal decays at a rate :math:`\beta(u)` that grows linearly."""

import torch
from torch import Tensor

from pyro_diffusion.schedules.base import Schedule, log_expm1
from pyro_diffusion.schedules.variance_preserving import VariancePreserving

__all__ = ["LinearBeta", "SubVP"]


# Beyond it the log-SNR leaves the range of single precision.
LARGEST_RATE = 1e6


class _LinearRate(Schedule):
    r""":math:`-\log\alpha^2(u) = B(u) = \tfrac12 u^2 (\beta_{max} - \beta_{min}) + u\,\beta_{min}`.

    A subclass says what log-SNR a decay B is, and back: the noise that comes with it.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, log_snr_max: float = 10.0
    ) -> None:
        if not 0 < beta_min < beta_max <= LARGEST_RATE:
            raise ValueError(
                f"beta_min, beta_max: got {beta_min}, {beta_max}, expected 0 < beta_min < beta_max <= 1e6"
            )
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        end = self._curve(torch.ones((), dtype=torch.float64))
        super().__init__(log_snr_max, float(end))

    def _curve(self, u: Tensor) -> Tensor:
        return self._log_snr_of_decay(self._decay(u))

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        decay, slope = self._decay_of_log_snr(log_snr), self.beta_max - self.beta_min
        return 2 * decay / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * decay))

    def _decay(self, u: Tensor) -> Tensor:
        return 0.5 * u.square() * (self.beta_max - self.beta_min) + u * self.beta_min

    def _rate(self, u: Tensor) -> Tensor:
        return self.beta_min + u * (self.beta_max - self.beta_min)

    def _log_snr_of_decay(self, decay: Tensor) -> Tensor:
        raise NotImplementedError

    def _decay_of_log_snr(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError


class LinearBeta(_LinearRate, VariancePreserving):
    r"""VP-SDE with :math:`\beta(u) = \beta_{min} + u(\beta_{max} - \beta_{min})`.

    .. math:: B(u) = -\log\alpha^2(u) = \tfrac12 u^2 (\beta_{max} - \beta_{min}) + u\,\beta_{min}, \qquad
              \lambda(u) = -\log\big(e^{B(u)} - 1\big),

    with the scaling of :class:`~pyro_diffusion.schedules.VariancePreserving`. The curve starts where the
    log-SNR is ``log_snr_max`` (u > 0) and ends at u = 1.

    Args:
        beta_min: rate at u = 0, per unit time, > 0.
        beta_max: rate at u = 1, > ``beta_min``.
        log_snr_max: log-SNR at t = 0.

    Raises:
        ValueError: if not ``0 < beta_min < beta_max <= 1e6``, or ``log_snr_max`` lies below the curve.

    References:
        Ho et al., arXiv 2006.11239; Song et al., arXiv 2011.13456, appendix C.
    """

    def _curve_slope(self, u: Tensor) -> Tensor:
        return self._rate(u) / torch.expm1(-self._decay(u))

    def _log_snr_of_decay(self, decay: Tensor) -> Tensor:
        return -log_expm1(decay)

    def _decay_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-log_snr)


class SubVP(_LinearRate):
    r"""Sub-VP-SDE: the signal of :class:`LinearBeta` under less noise, :math:`\sigma = 1 - \alpha^2`.

    .. math:: dx = -\tfrac12\beta x\,dt + \sqrt{\beta (1 - e^{-2B})}\,dw, \qquad
              \alpha = e^{-B/2} = \big(z + \sqrt{1 + z^2}\big)^{-1},\quad z = \tfrac12 e^{-\lambda/2},

    with B the integral of :math:`\beta`. Its log-SNR :math:`\lambda = -B - 2\log(1 - e^{-B})` decreases
    strictly, :math:`\lambda' = -\beta\coth(B/2)`, so it has a bridge as every other schedule has.

    Args:
        beta_min: rate at u = 0, per unit time, > 0.
        beta_max: rate at u = 1, > ``beta_min``.
        log_snr_max: log-SNR at t = 0.

    Raises:
        ValueError: if not ``0 < beta_min < beta_max <= 1e6``, or ``log_snr_max`` lies below the curve.

    References:
        Song et al., arXiv 2011.13456, equation 12 and appendix C.
    """

    def _curve_slope(self, u: Tensor) -> Tensor:
        return -self._rate(u) / torch.tanh(self._decay(u) / 2)

    def _log_snr_of_decay(self, decay: Tensor) -> Tensor:
        return -decay - 2 * torch.log(-torch.expm1(-decay))

    def _decay_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return 2 * torch.asinh(0.5 * torch.exp(-log_snr / 2))

    def _signal(self, log_snr: Tensor) -> Tensor:
        z = 0.5 * torch.exp(-log_snr / 2)
        return 1 / (z + torch.sqrt(1 + z.square()))

    def _noise(self, log_snr: Tensor) -> Tensor:
        return self._signal(log_snr) * torch.exp(-log_snr / 2)

    def _signal_slope(self, log_snr: Tensor) -> Tensor:
        z = 0.5 * torch.exp(-log_snr / 2)
        return 0.5 * z / torch.sqrt(1 + z.square())
