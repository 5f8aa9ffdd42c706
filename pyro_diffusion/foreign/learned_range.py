"""The variance of improved DDPM: an interpolation between the two fixed ones, on a logarithmic scale."""

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Variance, unit_variance
from pyro_diffusion.foreign.timesteps import TableTime
from pyro_diffusion.schedules import Level

__all__ = ["LearnedRange"]


class LearnedRange(Variance):
    r"""Variance of x_0 whose reverse step is that of a head w in [-1, 1] ("learned_range").

    The reverse variance of a step of the table is :math:`\beta^f \tilde\beta^{1-f}` with
    :math:`f = (1 + w)/2`. The bridge has :math:`\tilde\beta` of it, so the rest is

    .. math:: v = (1 - \bar\alpha_i)\,\frac{\rho^f - 1}{\rho - 1}, \qquad
              \rho = \frac{\beta_i}{\tilde\beta_i} = \frac{1 - \bar\alpha_i}{1 - \bar\alpha_{i-1}} .

    At the first level, from which data are decoded, :math:`v = \beta_1^f \tilde\beta_2^{1-f}`, as in the
    paper. Where the head leaves its range below, f is 0: no posterior has less than no variance.

    Args:
        knots: the log-SNR of the table's levels, decreasing.

    References:
        Nichol & Dhariwal, arXiv 2102.09672, equation 15.
    """

    outputs = 1
    log_ratio: Tensor
    ends: Tensor

    def __init__(self, knots: Tensor) -> None:
        super().__init__()
        self.time = TableTime(knots)
        noise = torch.sigmoid(-knots)
        ratio = noise[1:] / noise[:-1]
        self.register_buffer("log_ratio", torch.cat([ratio[:1], ratio]).log())
        beta = 1 - torch.sigmoid(knots[1]) / torch.sigmoid(knots[0])
        self.register_buffer("ends", torch.stack([noise[0], beta / ratio[0]]).log())

    def forward(self, head: Tensor | None, level: Level) -> Tensor:
        """Variance per coordinate."""
        if head is None:
            raise ValueError("network: got no variance head, expected twice the channels")
        share = ((1 + head) / 2).clamp(min=0)
        step = self.time.timestep(level.clock)
        table = self.log_ratio.to(step)
        left = step.long().clamp(0, len(table) - 2)
        log_ratio = torch.lerp(table[left], table[left + 1], step - left)
        later = unit_variance(level) * torch.expm1(share * log_ratio) / torch.expm1(log_ratio)
        upper, lower = self.ends.to(step)
        first = torch.exp(lower + share * (upper - lower))
        return torch.where(step < 0.5, first, later)
