"""Checks at the door: each error names the argument, what it was and what was expected."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Shape", "check_event_shape", "check_finite", "check_positive_int", "check_times"]

Shape = torch.Size | list[int] | tuple[int, ...]


def check_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        ValueError: if any entry of ``x`` is NaN or infinite.
    """
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(
            f"{name}: got {bad} NaN or infinite value(s) in a tensor of shape {tuple(x.shape)}, "
            "expected finite numbers"
        )


def check_positive_int(name: str, value: object, at_least: int = 1) -> int:
    """Refuse anything but an integer of at least ``at_least``.

    Raises:
        ValueError: if ``value`` is not an ``int`` or is too small.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < at_least:  # type: ignore[call-overload]
        raise ValueError(f"{name}: got {value!r}, expected an integer >= {at_least}")
    return int(value)  # type: ignore[call-overload]


def check_times(name: str, t: Tensor) -> None:
    """Refuse times outside [0, 1] (NaN included).

    Raises:
        ValueError: if any time is outside [0, 1].
    """
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"{name}: got times from {float(t.min()):g} to {float(t.max()):g}, "
            "expected times in [0, 1] (0 = data, 1 = noise)"
        )


def check_event_shape(name: str, x: Tensor, event_shape: Sequence[int]) -> None:
    """Refuse a tensor whose rightmost dimensions are not ``event_shape``, or that is empty.

    Raises:
        ValueError: on a wrong event shape or a tensor without elements.
    """
    n, shape = len(event_shape), tuple(x.shape)
    if len(shape) < n or shape[len(shape) - n :] != tuple(event_shape):
        raise ValueError(
            f"{name}: got shape {shape}, expected batch dimensions followed by the event shape "
            f"{tuple(event_shape)}"
        )
    if x.numel() == 0:
        raise ValueError(
            f"{name}: got an empty batch of shape {shape}, expected at least one datum"
        )
