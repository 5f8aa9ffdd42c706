"""What stands around a distribution: ``to_event``, masks, expansion and transforms, in any order."""

from typing import Any, NamedTuple

import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

from pyro_diffusion.distributions.base import DenoisedDistribution

__all__ = ["Unwrapped", "unwrap", "unwrap_diffusion"]

WRAPPERS = (
    torch.distributions.Independent,
    MaskedDistribution,
    ExpandedDistribution,
    torch.distributions.TransformedDistribution,
)


class Unwrapped(NamedTuple):
    """A distribution taken apart.

    Attributes:
        base: the innermost distribution, at its full batch shape if it can be expanded to it.
        wrappers: what stood around it, outermost first.
    """

    base: Any
    wrappers: tuple[Any, ...]

    @property
    def transforms(self) -> tuple[Any, ...]:
        """From the base's value to that of the whole, first to last."""
        inside_out = (getattr(w, "transforms", ()) for w in reversed(self.wrappers))
        return tuple(transform for some in inside_out for transform in some)

    @property
    def masks(self) -> tuple[tuple[Tensor | bool, int], ...]:
        """Each mask, outermost first, and the number of event dimensions where it stands."""
        masked = (w for w in self.wrappers if isinstance(w, MaskedDistribution))
        return tuple((w._mask, w.event_dim) for w in masked)

    def around(self, law: Any) -> Any:
        """The same wrappers around another law of the base's batch and event shape."""
        for wrapper in reversed(self.wrappers):
            if isinstance(wrapper, torch.distributions.Independent):
                law = law.to_event(wrapper.reinterpreted_batch_ndims)
            elif isinstance(wrapper, MaskedDistribution):
                law = law.mask(wrapper._mask)
            elif isinstance(wrapper, torch.distributions.TransformedDistribution):
                law = TransformedDistribution(law, wrapper.transforms)
            # Nothing for an expansion: the base has its full batch shape.
        return law


def unwrap(fn: Any, until: type | tuple[type, ...] = ()) -> Unwrapped:
    """Take a distribution apart, down to the first of some types or to what is no wrapper.

    Wrappers are taken off one by one and none is ever built, so it ends whatever ``expand`` returns.

    Args:
        fn: any distribution.
        until: types that are not looked into.
    """
    batch, wrappers = fn.batch_shape, []
    while isinstance(fn, WRAPPERS) and not (until and isinstance(fn, until)):
        wrappers.append(fn)
        if isinstance(fn, torch.distributions.Independent):
            inner = fn.base_dist.batch_shape
            batch = batch + inner[len(inner) - fn.reinterpreted_batch_ndims :]
        fn = fn.base_dist
    return Unwrapped(_expanded(fn, batch), tuple(wrappers))


def unwrap_diffusion(fn: Any) -> Unwrapped | None:
    """The view of a denoiser inside a distribution with what stands around it, or None.

    A mixture of diffusions is none: what is inside has to be the whole law.
    """
    if not isinstance(fn, torch.distributions.Distribution):
        return None
    found = unwrap(fn, DenoisedDistribution)
    return found if isinstance(found.base, DenoisedDistribution) else None


def _expanded(fn: Any, batch: torch.Size) -> Any:
    """A distribution at a batch shape; as it is if it can only be wrapped for that."""
    if fn.batch_shape == batch:
        return fn
    try:
        new = fn.expand(batch)
    except NotImplementedError:
        return fn
    return new if type(new) is type(fn) else fn
