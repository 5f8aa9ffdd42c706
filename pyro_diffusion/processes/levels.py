"""What follows from the levels of a process: rates of change, and checks that noise grows with time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.schedules import Level

__all__ = [
    "Rates",
    "check_falling",
    "check_finite_ends",
    "check_level",
    "check_order",
    "rates_through",
]


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
        ValueError: if the clock at s is not above that at t.
    """
    if not bool((s.clock > t.clock).all()):
        raise ValueError("s, t: got s at or after t, expected s < t")


def check_level(level: object, given: Level, name: str) -> Level:
    """Refuse scales of a process's own that are no scales.

    Args:
        level: what ``scales`` made of the schedule's.
        given: the schedule's levels at increasing times, on the leading dimension.
        name: of the process.

    Raises:
        ValueError: naming the process, what was found and what was expected.
    """
    if not isinstance(level, Level) or not all(isinstance(v, Tensor) for v in level):
        raise ValueError(
            f"scales: got {type(level).__name__} of {name}, expected a Level of tensors"
        )
    for key, value in level._asdict().items():
        if value.dim() != given.t.dim() or value.shape[0] != given.t.shape[0]:
            raise ValueError(
                f"scales: got {key} of shape {tuple(value.shape)} of {name} at times of shape "
                f"{tuple(given.t.shape)}, expected times and {given.t.dim() - 1} event dimension(s)"
            )
        if value.dtype != given.t.dtype:
            raise ValueError(
                f"scales: got {key} in {value.dtype} of {name} for a level in {given.t.dtype}, expected the "
                "level's (numbers and buffers `.to(level.clock)`)"
            )
        if (
            key != "clock"
            and key != "log_snr"
            and not bool((value.isfinite() & (value >= 0)).all())
        ):
            raise ValueError(
                f"scales: got {key} from {float(value.min()):g} to {float(value.max()):g} of {name}, "
                "expected finite numbers >= 0"
            )
    expected = 2 * (level.alpha.log() - level.sigma.log())
    gap = (level.log_snr - expected).abs().nan_to_num(nan=0.0)  # infinite ends
    if bool(level.log_snr.isnan().any()) or bool((gap > 1e-2 * (1 + expected.abs())).any()):
        raise ValueError(
            f"scales: got a log-SNR of {name} that is {float(gap.max()):g} off that of its alpha and sigma, "
            "expected log(alpha^2 / sigma^2)"
        )
    return level


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


def check_finite_ends(log_snr: Tensor) -> None:
    """Refuse infinite log-SNR at the ends of a grid.

    Args:
        log_snr: at the first time of the grid and at its last, on the leading dimension.

    Raises:
        ValueError: naming the schedule.
    """
    if not bool(torch.isfinite(log_snr).all()):
        ends = [float(log_snr[0].max()), float(log_snr[-1].min())]
        raise ValueError(
            f"schedule: got log-SNR {ends} at the ends of the grid, expected finite values (cut the "
            "schedule with log_snr_max and log_snr_min)"
        )
