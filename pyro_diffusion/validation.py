"""Checks of arguments: each error names the argument, what it was and what was expected."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Shape",
    "check_broadcast",
    "check_event_shape",
    "check_expands",
    "check_finite",
    "check_integers",
    "check_number",
    "check_operand",
    "check_positive_int",
    "check_seed",
    "check_sizes",
    "check_tensor",
    "check_times",
    "kind_of",
]

Shape = torch.Size | list[int] | tuple[int, ...]

# Counts and sizes beyond it are slips of the keyboard: what they ask for would never end, or fit.
LARGEST_COUNT = 2**31 - 1


def kind_of(value: object) -> str:
    """What an argument is, for errors: the name of its type, or that it is a class itself."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_tensor(name: str, x: object, boolean: bool = False, meta: bool = False) -> Tensor:
    """Refuse anything but a dense tensor of real numbers or integers that has values.

    Checks the tensor's kind, not its values, so it does not wait for the device. With ``boolean``, truth
    values pass, with ``meta``, tensors that have a shape alone.

    Raises:
        ValueError: for another object, a sparse tensor, one on the device ``meta``, and for booleans and
            complex numbers.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: got a sparse tensor ({x.layout}), expected a dense one")
    if x.is_meta and not meta:
        raise ValueError(f"{name}: got a tensor on the device 'meta', expected one with values")
    if x.is_complex() or (x.dtype == torch.bool and not boolean):
        raise ValueError(f"{name}: got dtype {x.dtype}, expected real numbers or integers")
    return x


def check_operand(name: str, x: object, weight: Tensor, boolean: bool = False) -> Tensor:
    """Refuse what a layer cannot take: as :func:`check_tensor`, and a tensor on another device than it.

    Raises:
        ValueError: naming what was found.
    """
    tensor = check_tensor(name, x, boolean=boolean, meta=True)
    if tensor.device != weight.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, expected one on {weight.device}, the network's device"
        )
    return tensor


def check_broadcast(name: str, shape: Sequence[int], batch: Sequence[int]) -> None:
    """Refuse a shape that does not broadcast with another.

    Raises:
        ValueError: naming both.
    """
    pairs = zip(reversed(tuple(shape)), reversed(tuple(batch)), strict=False)
    if not all(m == n or 1 in (m, n) for m, n in pairs):
        raise ValueError(
            f"{name}: got shape {tuple(shape)}, expected one that broadcasts with {tuple(batch)}"
        )


def check_expands(name: str, x: Tensor, batch: Sequence[int]) -> None:
    """Refuse a tensor that does not expand to a shape.

    Raises:
        ValueError: naming both.
    """
    if x.dim() > len(batch) or any(
        m not in (1, n) for m, n in zip(reversed(x.shape), reversed(tuple(batch)), strict=False)
    ):
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected one that expands to {tuple(batch)}"
        )


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> float:
    """Refuse anything but a finite number within limits.

    Raises:
        ValueError: for another object, NaN, infinity, and numbers outside.
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    number = float(value) if real else math.nan  # type: ignore[arg-type]
    inside = above < number < below and at_least <= number <= at_most
    if not (math.isfinite(number) and inside):
        limits = [
            *([f"> {above:g}"] if above > -math.inf else []),
            *([f">= {at_least:g}"] if at_least > -math.inf else []),
            *([f"<= {at_most:g}"] if at_most < math.inf else []),
            *([f"< {below:g}"] if below < math.inf else []),
        ]
        wanted = " and ".join(limits)
        raise ValueError(f"{name}: got {value!r}, expected a finite number {wanted}".rstrip())
    return number


def check_each_size(name: str, sizes: object) -> tuple[int, ...]:
    """Refuse anything but a tuple or list of whole numbers >= 1, each on its own.

    Raises:
        ValueError: for other objects and sizes below 1.
    """
    if isinstance(sizes, tuple | list):
        return tuple(size for n in sizes for size in check_sizes(name, (n,)))
    raise ValueError(f"{name}: got {sizes!r}, expected a tuple of sizes >= 1")


def check_sizes(name: str, shape: object) -> torch.Size:
    """Refuse anything but the sizes of a tensor that has elements.

    Where ``torch.jit`` traces, sizes are tensors themselves, and taken as they are.

    Raises:
        ValueError: for other objects, sizes below 1, and more elements than a tensor can have.
    """
    if isinstance(shape, tuple | list):
        if torch.jit.is_tracing() and any(isinstance(n, Tensor) for n in shape):  # type: ignore[attr-defined]
            return torch.Size(shape)
        positive = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
        if positive and math.prod(shape) <= LARGEST_COUNT:
            return torch.Size(shape)
    raise ValueError(
        f"{name}: got {shape!r}, expected a tuple of sizes >= 1, at most {LARGEST_COUNT} together"
    )


def check_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        ValueError: if any entry of ``x`` is NaN or infinite; and as :func:`check_tensor`.
    """
    finite = torch.isfinite(check_tensor(name, x))
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(
            f"{name}: got {bad} NaN or infinite value(s) in a tensor of shape {tuple(x.shape)}, "
            "expected finite numbers"
        )


def check_positive_int(name: str, value: object, at_least: int = 1) -> int:
    """Refuse anything but an integer of at least ``at_least``.

    Raises:
        ValueError: if ``value`` is not an ``int``, is too small, or no count of anything (2**31 and more).
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < at_least:  # type: ignore[call-overload]
        raise ValueError(f"{name}: got {value!r}, expected an integer >= {at_least}")
    if int(value) > LARGEST_COUNT:  # type: ignore[call-overload]
        raise ValueError(f"{name}: got {value!r}, expected an integer <= {LARGEST_COUNT}")
    return int(value)  # type: ignore[call-overload]


def check_seed(name: str, value: object) -> int:
    """Refuse anything but an integer from 0 to below 2**63.

    Raises:
        ValueError: naming what was found.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 0 <= int(value) < 2**63:  # type: ignore[call-overload]
        raise ValueError(f"{name}: got {value!r}, expected an integer >= 0 of at most 63 bits")
    return int(value)  # type: ignore[call-overload]


def check_times(name: str, t: Tensor) -> None:
    """Refuse times outside [0, 1] (NaN included).

    Raises:
        ValueError: if any time is outside [0, 1].
    """
    check_tensor(name, t)
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return  # the check would be part of the trace
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"{name}: got times from {float(t.min()):g} to {float(t.max()):g}, "
            "expected times in [0, 1] (0 = data, 1 = noise)"
        )


def check_event_shape(name: str, x: Tensor, event_shape: Sequence[int]) -> None:
    """Refuse a tensor whose rightmost dimensions are not ``event_shape``, or that is empty.

    Raises:
        ValueError: on a wrong event shape or a tensor without elements; and as :func:`check_tensor`.
    """
    check_tensor(name, x)
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


def check_integers(name: str, value: Tensor, levels: int) -> None:
    """Refuse anything but integers 0 ... levels - 1 (floats holding integers are fine).

    Raises:
        ValueError: naming what was found.
    """
    if value.is_floating_point():
        check_finite(name, value)
        if not bool((value == value.round()).all()):
            raise ValueError(f"{name}: got fractional numbers, expected integers")
    low, high = (int(end) for end in torch.stack(value.aminmax()).tolist())  # one wait for a device
    if low < 0 or high >= levels:
        raise ValueError(
            f"{name}: got integers from {low} to {high}, expected integers in [0, {levels - 1}]"
        )
