"""Modules that keep what they computed from their tensors, and forget it when these change."""

from typing import Any

from torch import Tensor

from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.precision import PreciseModule

__all__ = ["CachedModule", "Sources"]


class Sources:
    """What a cached value came from; equal to later sources if nothing in them was changed since."""

    def __init__(self, tensors: tuple[Tensor, ...], stamps: tuple[object, ...]) -> None:
        self.tensors = tensors
        self.stamps = (*stamps, *(v._version for v in tensors))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sources) or self.stamps != other.stamps:
            return False
        return all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))

    __hash__ = None  # type: ignore[assignment]


class CachedModule(DefinedModule, PreciseModule):
    """A module whose attributes are counted, so that a value computed from them can be kept.

    What is cached holds the :class:`Sources` it came from. Copies and pickles start without.
    """

    @property
    def stamp(self) -> object:
        """Another object after every change of an attribute."""
        return self.__dict__.get("_stamp")

    def sources(self, *tensors: Tensor, stamps: tuple[object, ...] = ()) -> Sources | None:
        """Where a value comes from that is computed from this module and further tensors.

        None if it must be computed every time: where it needs a gradient, or where torch does not count
        changes (inference tensors).
        """
        if next(self.parameters(), None) is not None:
            return None
        tensors = (*tensors, *self.buffers())
        if any(v.is_inference() or v.requires_grad for v in tensors):
            return None
        return Sources(tensors, (self.stamp, *stamps))

    def _cached(self, name: str) -> Any:
        """What was cached last under a name, or None."""
        return self.__dict__.get("_kept", {}).get(name)

    def _cache(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("_kept", {})[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and note that it changed."""
        self.__dict__["_stamp"] = object()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but what is cached."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_stamp")}
