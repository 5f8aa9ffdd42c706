"""A posterior of latents in plates: that of the outer ones, and of every row's given the outer ones."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

__all__ = ["HierarchicalFlow"]

# The latents of one level given the context of its rows.
Conditional = Callable[[Tensor], Any]


class HierarchicalFlow(TorchDistribution):
    r"""Latents of all levels in one vector, every level given latents and data around it and its rows' data.

    .. math::

        q(\theta, \theta_{1 \dots R} | x) = q(\theta | x) \prod_r q(\theta_r | \theta, x_0, x_r)

    with one conditional for all rows of a plate. Exact for the flows up to their solver's tolerance.

    Args:
        conditionals: of every level, None where it has no latents.
        contexts: of every level, batch + rows of its plates + (features,).
        places: of every level, where its latents are in the vector, rows + (latents,).
        above: of every level, the levels of latents around it, each with its scale.

    Shapes:
        batch + (number of latents,).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        conditionals: Sequence[Conditional | None],
        contexts: Sequence[Tensor],
        places: Sequence[Tensor],
        above: Sequence[Sequence[tuple[int, Callable[[Tensor], Tensor]]]],
        validate_args: bool | None = None,
    ) -> None:
        self.conditionals, self.contexts = list(conditionals), list(contexts)
        self.places, self.above = list(places), list(above)
        size = sum(place.numel() for place in self.places)
        super().__init__(self.contexts[0].shape[:-1], Size([size]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "HierarchicalFlow":
        """The same for another batch shape."""
        new = self._get_checked_instance(HierarchicalFlow, _instance)
        batch, own = Size(batch_shape), len(self.batch_shape)
        new.contexts = [c.expand(batch + c.shape[own:]) for c in self.contexts]
        new.conditionals, new.places, new.above = self.conditionals, self.places, self.above
        super(HierarchicalFlow, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _given(self, level: int, known: dict[int, Tensor], batch: Size) -> Tensor:
        """The context of a level's rows: latents around them, standardized, and their data."""
        own = self.contexts[level]
        own = own.expand(batch + own.shape[len(self.batch_shape) :])
        rows = own.shape[len(batch) : -1]
        parts = []
        for outer, scale in self.above[level]:
            value = scale(known[outer])
            inner = len(rows) - (value.dim() - 1 - len(batch))
            value = value.reshape(*value.shape[:-1], *(1,) * inner, value.shape[-1])
            parts.append(value.expand(*batch, *rows, value.shape[-1]))
        return torch.cat([*parts, own], -1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, constants for autograd."""
        batch = Size(sample_shape) + self.batch_shape
        out = self.contexts[0].new_empty(batch + self.event_shape)
        known: dict[int, Tensor] = {}
        for level, conditional in enumerate(self.conditionals):
            if conditional is not None:
                known[level] = conditional(self._given(level, known, batch)).sample()
                out[..., self.places[level]] = known[level]
        return out

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats: of the outer latents and of every row's, summed."""
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(batch + self.event_shape)
        known: dict[int, Tensor] = {}
        out = value.new_zeros(batch)
        for level, conditional in enumerate(self.conditionals):
            if conditional is not None:
                known[level] = value[..., self.places[level]]
                score = conditional(self._given(level, known, batch)).log_prob(known[level])
                rows = tuple(range(len(batch), score.dim()))
                out = out + (score.sum(rows) if rows else score)
        return out
