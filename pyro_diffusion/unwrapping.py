"""Wrappers around a distribution: ``to_event``, masks, expansion and transforms, in any order."""

from typing import Any, NamedTuple

import torch
from pyro.distributions import ImproperUniform, TorchDistribution, TransformedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Unwrapped", "check_wrappers", "per_coordinate", "unwrap", "unwrap_to"]

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
        wrappers: those around it, outermost first.
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
        """Each mask, outermost first, and the number of event dimensions at its place."""
        masked = (w for w in self.wrappers if isinstance(w, MaskedDistribution))
        return tuple((w._mask, w.event_dim) for w in masked)

    def inverse(self, value: Tensor) -> Tensor:
        """The base's value behind a value of the whole."""
        for transform in reversed(self.transforms):
            value = transform.inv(value)
        return value

    def log_det(self, value: Tensor) -> Tensor:
        r""":math:`\log |\partial x / \partial y|` of the base's x by a value y of the whole."""
        flat = ImproperUniform(constraints.real, self.base.batch_shape, self.base.event_shape)
        out: Tensor = self.around(flat).log_prob(value)
        return out

    def around(self, distribution: Any) -> Any:
        """The same wrappers around another distribution of the base's batch and event shape."""
        for wrapper in reversed(self.wrappers):
            if isinstance(wrapper, torch.distributions.Independent):
                distribution = distribution.to_event(wrapper.reinterpreted_batch_ndims)
            elif isinstance(wrapper, MaskedDistribution):
                distribution = distribution.mask(wrapper._mask)
            elif isinstance(wrapper, torch.distributions.TransformedDistribution):
                distribution = TransformedDistribution(distribution, wrapper.transforms)
            # Nothing for an expansion: the base has its full batch shape.
        return distribution


def check_wrappers(name: str, found: Unwrapped) -> None:
    """Refuse what has no density of its own: masks, transforms of discrete data or not bijective.

    Raises:
        ValueError: naming what was found and what to do instead.
    """
    if found.masks:
        raise ValueError(
            f"{name}: got a MaskedDistribution around {type(found.base).__name__}, expected none "
            "(poutine.mask masks a site, and rows to be left out are left out of the data)"
        )
    if found.transforms and found.base.support.is_discrete:
        raise ValueError(
            f"{name}: got a {type(found.base).__name__} of discrete data under transforms, expected real "
            "data: probabilities have no Jacobian (QuantizedDecoder spreads integers over a range itself)"
        )
    for transform in found.transforms:
        if not transform.bijective:
            # Dequantization: its noise is an instance's own, which neither a guide nor another batch shares.
            raise ValueError(
                f"{name}: got the transform {type(transform).__name__}, expected bijective ones (add uniform "
                "noise to integers yourself, and leave out Dequantization)"
            )


def unwrap(fn: Any, until: type | tuple[type, ...] = ()) -> Unwrapped:
    """Take a distribution apart, down to the first of some types or to what is no wrapper.

    Wrappers are taken off one by one and none is ever built, so it ends whatever ``expand`` returns.

    Args:
        fn: any distribution.
        until: types that are not taken apart.
    """
    batch, wrappers = fn.batch_shape, []
    while isinstance(fn, WRAPPERS) and not (until and isinstance(fn, until)):
        wrappers.append(fn)
        if isinstance(fn, torch.distributions.Independent):
            inner = fn.base_dist.batch_shape
            batch = batch + inner[len(inner) - fn.reinterpreted_batch_ndims :]
        fn = fn.base_dist
    return Unwrapped(_expanded(fn, batch), tuple(wrappers))


def unwrap_to(fn: Any, kind: type | tuple[type, ...]) -> Unwrapped | None:
    """The distribution of some type inside another with the wrappers around it, or None.

    A mixture of such is none: what is inside has to be the whole distribution.

    Args:
        fn: any object.
        kind: type of what is to be found, or several.
    """
    if not isinstance(fn, torch.distributions.Distribution):
        return None
    found = unwrap(fn, kind)
    return found if isinstance(found.base, kind) else None


def per_coordinate(distribution: TorchDistribution) -> TorchDistribution:
    """The distribution inside any number of ``to_event`` wrappers, whose batch has event dimensions too."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def _expanded(fn: Any, batch: torch.Size) -> Any:
    """A distribution at a batch shape; as it is if it can only be wrapped for that."""
    if fn.batch_shape == batch:
        return fn
    try:
        new = fn.expand(batch)
    except NotImplementedError:
        return fn
    return new if type(new) is type(fn) else fn
