r"""Schedules with :math:`\alpha^2 + \sigma^2 = 1`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_diffusion.schedules.base import Schedule, log_expm1
from pyro_diffusion.validation import check_finite

__all__ = ["Cosine", "LinearBeta", "LogLinear", "TabulatedBetas", "VariancePreserving"]


class VariancePreserving(Schedule):
    r"""Gauge :math:`\alpha^2 = \mathrm{sigmoid}(\lambda), \sigma^2 = \mathrm{sigmoid}(-\lambda)`."""

    def _signal(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr).sqrt()

    def _noise(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr).sqrt()

    def _signal_slope(self, log_snr: Tensor) -> Tensor:
        return 0.5 * torch.sigmoid(-log_snr)


class Cosine(VariancePreserving):
    r"""Cosine schedule :math:`\lambda(u) = -2\log\tan(\pi u/2) + 2\,\text{shift}`.

    Args:
        log_snr_max: log-SNR at t = 0.
        log_snr_min: log-SNR at t = 1.
        shift: moves the whole curve, for high-resolution images (log of base over actual resolution).

    Raises:
        ValueError: if ``log_snr_max <= log_snr_min``.

    Example:
        >>> schedule = Cosine()
        >>> torch.round(schedule.log_snr(torch.tensor([0.0, 1.0])))
        tensor([ 10., -10.])

    References:
        Nichol & Dhariwal, arXiv 2102.09672; Hoogeboom et al., simple diffusion, arXiv 2301.11093.
    """

    def __init__(
        self, log_snr_max: float = 10.0, log_snr_min: float = -10.0, shift: float = 0.0
    ) -> None:
        self.shift = float(shift)
        super().__init__(log_snr_max, log_snr_min)

    def _curve(self, u: Tensor) -> Tensor:
        return 2 * self.shift - 2 * torch.log(torch.tan(math.pi / 2 * u))

    def _curve_slope(self, u: Tensor) -> Tensor:
        return -2 * math.pi / torch.sin(math.pi * u)

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(self.shift - log_snr / 2))


class LogLinear(VariancePreserving):
    r"""Log-SNR linear in time, :math:`\lambda(t) = \lambda_{max} + t\,(\lambda_{min} - \lambda_{max})`.

    Args:
        log_snr_max: log-SNR at t = 0.
        log_snr_min: log-SNR at t = 1.

    Raises:
        ValueError: if ``log_snr_max <= log_snr_min``.

    References:
        Kingma et al., Variational Diffusion Models, arXiv 2107.00630 (its 'VDM fixed schedule').
    """

    def __init__(self, log_snr_max: float = 10.0, log_snr_min: float = -10.0) -> None:
        super().__init__(log_snr_max, log_snr_min)

    def _curve(self, u: Tensor) -> Tensor:
        return -u

    def _curve_slope(self, u: Tensor) -> Tensor:
        return -torch.ones_like(u)

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        return -log_snr


class LinearBeta(VariancePreserving):
    r"""VP-SDE with :math:`\beta(u) = \beta_{min} + u(\beta_{max} - \beta_{min})`.

    .. math:: -\log\alpha^2(u) = \tfrac12 u^2 (\beta_{max} - \beta_{min}) + u\,\beta_{min}

    The curve starts where the log-SNR is ``log_snr_max`` (u > 0) and ends at u = 1.

    Args:
        beta_min: rate at u = 0, per unit time, > 0.
        beta_max: rate at u = 1, > ``beta_min``.
        log_snr_max: log-SNR at t = 0.

    Raises:
        ValueError: if not ``0 < beta_min < beta_max``, or ``log_snr_max`` lies below the curve.

    References:
        Ho et al., arXiv 2006.11239; Song et al., arXiv 2011.13456, appendix C.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, log_snr_max: float = 10.0
    ) -> None:
        if not 0 < beta_min < beta_max:
            raise ValueError(
                f"beta_min, beta_max: got {beta_min}, {beta_max}, expected 0 < beta_min < beta_max"
            )
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        end = self._curve(torch.ones((), dtype=torch.float64))
        super().__init__(log_snr_max, float(end))

    def _curve(self, u: Tensor) -> Tensor:
        decay = 0.5 * u.square() * (self.beta_max - self.beta_min) + u * self.beta_min
        return -log_expm1(decay)

    def _curve_slope(self, u: Tensor) -> Tensor:
        beta = self.beta_min + u * (self.beta_max - self.beta_min)
        decay = 0.5 * u.square() * (self.beta_max - self.beta_min) + u * self.beta_min
        return beta / torch.expm1(-decay)

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        decay = torch.nn.functional.softplus(-log_snr)
        slope = self.beta_max - self.beta_min
        return 2 * decay / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * decay))


class TabulatedBetas(VariancePreserving):
    r"""Any table :math:`\beta_1 \dots \beta_T`, with :math:`\alpha^2_i = \prod_{j \le i} (1 - \beta_j)`.

    The T noise levels sit at the uniform times :math:`t_i = (i - 1)/(T - 1)`; between them the log-SNR is
    interpolated linearly. A uniform grid of T - 1 steps therefore *is* the table: the chain has the
    latents x_1 ... x_T of DDPM, and the decoder reads the first of them.

    Args:
        betas: at least two numbers in (0, 1).

    Raises:
        ValueError: if a beta lies outside (0, 1) or there are fewer than two.

    References:
        Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    """

    knots: Tensor

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        table = torch.as_tensor(betas, dtype=torch.float64)
        if table.dim() != 1 or len(table) < 2:
            raise ValueError(
                f"betas: got shape {tuple(table.shape)}, expected at least two numbers"
            )
        check_finite("betas", table)
        if not bool(((table > 0) & (table < 1)).all()):
            raise ValueError(
                f"betas: got values from {float(table.min()):g} to {float(table.max()):g}, expected "
                "numbers strictly between 0 and 1 (the log-SNR must decrease at every step)"
            )
        log_snr = -log_expm1(-torch.log1p(-table).cumsum(0))
        super().__init__(float(log_snr[0]), float(log_snr[-1]))
        self.register_buffer("knots", log_snr)
        self.register_load_state_dict_post_hook(_read_ends)

    def _curve_slope(self, u: Tensor) -> Tensor:
        knots = self.knots.to(dtype=u.dtype, device=u.device)
        left = (u.detach() * (len(knots) - 1)).long().clamp(0, len(knots) - 2)
        return (knots[left + 1] - knots[left]) * (len(knots) - 1)

    def _curve(self, u: Tensor) -> Tensor:
        knots = self.knots.to(dtype=u.dtype, device=u.device)
        position = u * (len(knots) - 1)
        left = position.detach().long().clamp(0, len(knots) - 2)
        return torch.lerp(knots[left], knots[left + 1], position - left)

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        if "knots" not in self._buffers:  # the base class asks for the two ends
            return (log_snr - self.log_snr_max) / (self.log_snr_min - self.log_snr_max)
        knots = self.knots.to(dtype=log_snr.dtype, device=log_snr.device)
        right = torch.searchsorted(-knots, -log_snr.contiguous()).clamp(1, len(knots) - 1)
        low, high = knots[right], knots[right - 1]
        return (right - (log_snr - low) / (high - low)) / (len(knots) - 1)


def _read_ends(table: TabulatedBetas, _: object) -> None:
    """The ends of a table that was just loaded."""
    table.log_snr_max, table.log_snr_min = float(table.knots[0]), float(table.knots[-1])
    table.__dict__.pop("_kept", None)
