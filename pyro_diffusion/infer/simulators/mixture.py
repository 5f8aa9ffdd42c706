"""The mixture of several posteriors with equal weights."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor

__all__ = ["EqualMixture"]


class EqualMixture(TorchDistribution):
    r""":math:`\frac1M \sum_m q_m`, exact as far as the parts' densities are.

    Draws are shared out evenly among the parts, at random: each draw is one of the mixture, and any M n draws
    of one call have n of every part.

    Args:
        parts: distributions of one batch shape and event shape.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self, parts: Sequence[TorchDistribution], validate_args: bool | None = None
    ) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        super().__init__(first.batch_shape, first.event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """That of the parts."""
        return self.parts[0].support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EqualMixture":
        """The same for another batch shape; what is new on the left has draws of its own."""
        new = self._get_checked_instance(EqualMixture, _instance)
        batch, own = Size(batch_shape), self.parts[0].batch_shape
        alike = len(batch) >= len(own) and batch[len(batch) - len(own) :] == own
        new.parts = self.parts if alike else [part.expand(batch) for part in self.parts]
        super(EqualMixture, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, constants for autograd, sample shape + batch + event."""
        own = self.parts[0].batch_shape
        lead = Size(sample_shape) + self.batch_shape[: len(self.batch_shape) - len(own)]
        count, many = lead.numel(), len(self.parts)
        # a random part begins, so that a single draw is of any
        start = int(torch.randint(many, ()))
        shares = [len(range((m - start) % many, count, many)) for m in range(many)]
        drawn = [
            part.sample(Size([share]))
            for part, share in zip(self.parts, shares, strict=True)
            if share
        ]
        out = torch.cat(drawn)[torch.randperm(count)]
        return out.reshape(lead + out.shape[1:])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        each = torch.stack([part.log_prob(value) for part in self.parts])
        out = each.logsumexp(0) - math.log(len(self.parts))
        return out.expand(torch.broadcast_shapes(out.shape, self.batch_shape))
