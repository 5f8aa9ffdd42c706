"""What follows from the levels of a process: rates of change, and checks that noise grows with time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.schedules import Level

__all__ = ["Rates", "check_falling", "check_order", "rates_through"]


class Rates(NamedTuple):
    r"""A level and how fast it changes, per unit of t; shapes as in the level.

    Attributes:
        level: where.
        clock: slope of the clock, negative.
        log_snr: :math:`\lambda'(t)`, negative.
        log_alpha: :math:`d\log\alpha/dt`, the drift coefficient f of the forward SDE.
    """

    level: Level
    clock: Tensor
    log_snr: Tensor
    log_alpha: Tensor

    @property
    def diffusion(self) -> Tensor:
        r"""Squared diffusion coefficient of the forward SDE, :math:`g^2 = -\sigma^2 \lambda'`."""
        return (-self.level.sigma.square() * self.log_snr).clamp(min=0)


def rates_through(scales: Callable[[Level], Level], base: Rates) -> Rates:
    r"""Rates of a process whose scales are a function of its schedule's, by the chain rule.

    Args:
        scales: of a process.
        base: levels of its schedule and their rates.
    """
    level, slope, drift = base.level, base.clock, base.log_alpha
    tangent = Level(
        torch.ones_like(level.t),
        slope,
        slope,
        level.alpha * drift,
        level.sigma * (drift - 0.5 * slope),  # sigma = alpha exp(-log_snr / 2)
    )
    level, change, *_ = torch.func.jvp(scales, (level,), (tangent,))
    return Rates(level, slope, change.log_snr, change.alpha / level.alpha)


def check_order(s: Level, t: Level) -> None:
    """Refuse an earlier time that is not earlier.

    Raises:
        ValueError: if the log-SNR at s is not above that at t.
    """
    if not bool((s.log_snr > t.log_snr).all()):
        raise ValueError("s, t: got s at or after t, expected s < t")


def check_falling(level: Level, name: str) -> None:
    """Refuse the levels of a grid whose log-SNR does not fall with time in every coordinate.

    Args:
        level: at all times of the grid, on the leading dimension.
        name: of the process.

    Raises:
        ValueError: naming the process.
    """
    if not bool((level.log_snr[1:] < level.log_snr[:-1]).all()):
        raise ValueError(
            f"process: got a log-SNR of {name} that does not decrease along the grid, expected it to "
            "decrease strictly with time in every coordinate"
        )
