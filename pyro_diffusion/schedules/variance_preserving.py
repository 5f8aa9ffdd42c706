r"""Schedules with :math:`\alpha^2 + \sigma^2 = 1`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_diffusion.schedules.base import Schedule, TwoEndedSchedule, log_expm1
from pyro_diffusion.validation import check_finite, check_number, check_tensor

__all__ = ["Cosine", "LogLinear", "TabulatedBetas", "VariancePreserving"]


class VariancePreserving(Schedule):
    r"""The scaling :math:`\alpha^2 + \sigma^2 = 1`, which keeps data of unit variance at unit variance.

    .. math:: \alpha^2 = \mathrm{sigmoid}(\lambda), \qquad \sigma^2 = \mathrm{sigmoid}(-\lambda), \qquad
              \frac{d\log\alpha}{d\lambda} = \tfrac12\,\mathrm{sigmoid}(-\lambda)

    A base class: a subclass gives the curve (see :class:`~pyro_diffusion.schedules.Schedule`).
    """

    def _signal(self, log_snr: Tensor) -> Tensor:
        return torch.exp(0.5 * nn.functional.logsigmoid(log_snr))  # half of it does not underflow

    def _noise(self, log_snr: Tensor) -> Tensor:
        return torch.exp(0.5 * nn.functional.logsigmoid(-log_snr))

    def _signal_slope(self, log_snr: Tensor) -> Tensor:
        return 0.5 * torch.sigmoid(-log_snr)


class Cosine(TwoEndedSchedule, VariancePreserving):
    r"""Cosine schedule: without a shift :math:`\alpha = \cos(\pi u/2), \sigma = \sin(\pi u/2)`.

    .. math:: \lambda(u) = -2\log\tan(\pi u/2) + 2\,\text{shift}, \qquad
              u = \tfrac2\pi \arctan e^{\text{shift} - \lambda/2},

    with the scaling of :class:`VariancePreserving`.

    Args:
        log_snr_max: log-SNR at t = 0.
        log_snr_min: log-SNR at t = 1.
        shift: shifts the curve by twice its value, for high-resolution images (log of base over actual
            resolution); within 40 of zero.

    Raises:
        ValueError: if ``log_snr_max <= log_snr_min``, or the shift is not within 40 of zero.

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
        self.shift = check_number("shift", shift, at_least=-40, at_most=40)
        super().__init__(log_snr_max, log_snr_min)

    def _curve_of(self, u: Tensor, v: Tensor) -> Tensor:
        # The cosine of an angle is the sine of the rest of a right one, exact where the cosine vanishes.
        sine, cosine = (torch.sin(math.pi / 2 * w) for w in (u, v))
        return 2 * self.shift - 2 * (sine.log() - cosine.log())

    def _slope_of(self, u: Tensor, v: Tensor) -> Tensor:
        return -math.pi / (torch.sin(math.pi / 2 * u) * torch.sin(math.pi / 2 * v))

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(self.shift - log_snr / 2))

    def _inverse_rest(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(log_snr / 2 - self.shift))


class LogLinear(VariancePreserving):
    r"""Log-SNR linear in time, :math:`\lambda(t) = \lambda_{max} + t\,(\lambda_{min} - \lambda_{max})`.

    The scaling is that of :class:`VariancePreserving`.

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


class TabulatedBetas(VariancePreserving):
    r"""Any table :math:`\beta_1 \dots \beta_T`, with :math:`\alpha^2_i = \prod_{j \le i} (1 - \beta_j)`.

    .. math:: \lambda_i = \log\frac{\alpha_i^2}{1 - \alpha_i^2}
              = -\log\Big(e^{-\sum_{j \le i} \log(1 - \beta_j)} - 1\Big),

    with the scaling of :class:`VariancePreserving`. The T noise levels are those at the uniform times
    :math:`t_i = (i - 1)/(T - 1)`; between them the log-SNR is interpolated linearly. A uniform grid of T - 1
    steps therefore *is* the table: the chain has the latents x_1 ... x_T of DDPM, and the decoder starts from
    the first of them.

    Args:
        betas: at least two numbers in (0, 1).

    Raises:
        ValueError: if a beta lies outside (0, 1) or there are fewer than two.

    References:
        Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    """

    knots: Tensor

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        if isinstance(betas, Tensor):
            check_tensor("betas", betas)
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

    def definition(self) -> dict[str, Any]:
        """The class alone: the table, ends included, is a buffer."""
        ends = ("log_snr_max", "log_snr_min")
        return {k: v for k, v in super().definition().items() if k not in ends}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        knots = state_dict.get(f"{prefix}knots")
        valid = isinstance(knots, Tensor) and knots.shape == self.knots.shape
        if valid and not bool(knots.isfinite().all() & (knots.diff() < 0).all()):
            args[-1].append(f"{prefix}knots: expected a finite log-SNR that decreases")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.log_snr_max, self.log_snr_min = float(self.knots[0]), float(self.knots[-1])

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
