"""Which numbers of a model may be rounded: what a network computes with, never what defines the model."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["PreciseModule", "at_least_single", "full_precision", "matmul"]


class PreciseModule(nn.Module):
    """A module whose own buffers and parameters define a model, and so are never rounded to half precision.

    Levels, knots, noise distributions, means: in bfloat16 (three digits) they would be another model.
    ``.to(torch.bfloat16)``, ``.half()`` and every other cast to less than 32 bits leave them as they are, so
    nothing is lost when the module is cast back; they follow devices, and casts to float32 and float64. Child
    modules, networks above all, follow every cast.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def precise(x: Tensor) -> Tensor:
            out = fn(x)
            rounds = x.is_floating_point() and out.dtype.itemsize < min(x.dtype.itemsize, 4)
            return x.to(out.device) if rounds else out

        super()._apply(precise, recurse=False)
        return self


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of shorter floating types: for levels, states and bounds."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(x: Tensor) -> Any:
    """A context in which autocast does not round matrix products on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` that autocast leaves alone."""
    with full_precision(a):
        return a @ b
