"""What was measured of a denoiser, kept as long as it lives and does not change."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.schedules.cached import Sources

__all__ = ["Kept", "weight_sums"]

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by denoiser and key, made anew after the denoiser's parameters have changed."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Denoiser, tuple[Sources, dict[Any, Value]]] = (
            weakref.WeakKeyDictionary()
        )

    def get(
        self,
        denoiser: Denoiser,
        sums: tuple[float, ...],
        key: Hashable,
        make: Callable[[], Value],
    ) -> Value:
        """The value of a key, made if there is none of the denoiser as it is now.

        Args:
            denoiser: it may hold inference tensors, which are told apart by identity.
            sums: its :func:`weight_sums`.
            key: what else the value depends on.
            make: makes it.
        """
        tensors = (*denoiser.parameters(), *denoiser.buffers())
        # Torch does not count the changes of inference tensors.
        counted = tuple(v for v in tensors if not v.is_inference())
        others = tuple(id(v) for v in tensors if v.is_inference())
        now = Sources(counted, (denoiser.training, sums, *others))
        sources, found = self._known.get(denoiser, (None, {}))
        if sources != now:
            found = {}
            self._known[denoiser] = now, found
        if key not in found:
            found[key] = make()
        return found[key]


def weight_sums(denoiser: Denoiser) -> tuple[float, ...]:
    """Sums that change with a denoiser's parameters, also where an optimizer writes to their ``data``.

    Torch counts no such change, and Pyro's ``ClippedAdam`` makes them. One wait for the device.
    """
    with torch.no_grad():
        sums = [v.detach().double().square().sum() for v in denoiser.parameters()]
        return tuple(torch.stack(sums).tolist()) if sums else ()
