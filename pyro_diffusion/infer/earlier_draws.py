"""What guides of a list drew before this one, for guides whose draws depend on them."""

from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from torch import Tensor, nn

from pyro_diffusion.distributions.base import plates_entered
from pyro_diffusion.validation import kind_of

__all__ = ["EarlierDraws", "outer_nesting"]


class EarlierDraws(AutoGuide):
    """A guide that, in an ``AutoGuideList``, sees the draws of the guides appended before it.

    Attributes:
        prototype_trace: as Pyro has it.
    """

    prototype_trace: Any

    def _hook_earlier(self) -> None:
        """Called by the constructor, after Pyro's."""
        self._other_draws: dict[str, Tensor] = {}
        self._hooked: set[int] = set()

    def _update_master(self, master_ref: Any) -> None:
        super()._update_master(master_ref)
        # Not in the list yet: what is there comes before.
        for part in _before(master_ref(), self):
            if not getattr(part, "_pathwise", True):
                # Its learning signal in Pyro's ELBOs has no densities of auxiliary draws, such as this one's.
                raise ValueError(
                    f"pathwise: got False in a {kind_of(part)} that a {kind_of(self)} after it depends on, "
                    "expected True: scores would leave out the density of later draws"
                )
            if id(part) not in self._hooked:
                self._hooked.add(id(part))
                part.register_forward_hook(self._keep_draws)

    def _keep_draws(self, part: nn.Module, inputs: Any, drawn: Any) -> None:
        """Keep what an earlier guide of the list drew."""
        if isinstance(drawn, dict):
            self._other_draws.update(drawn)

    def _draws_of_others(
        self, num_samples: int, names: list[str], args: Any, kwargs: Any
    ) -> dict[str, Tensor]:
        """Joint draws of the guides before this one in its list, (num_samples,) + the shape of each site."""
        if self.master is None:
            return {}
        master = self.master()
        drawn: list[dict[str, Tensor]] = []
        for _ in range(num_samples):
            master._create_plates(*args, **kwargs)
            self._other_draws = {}
            for part in _before(master, self):
                part(*args, **kwargs)
            drawn.append(self._other_draws)
        found = [name for name in names if all(name in one for one in drawn)]
        return {name: torch.stack([one[name] for one in drawn]) for name in found}

    def _single(self, fn: Any, value: Tensor, nesting: int) -> Tensor:
        """A draw of a site as sample + its own shape, without singleton dimensions in between."""
        batch_dims = len(fn.batch_shape)
        dims = batch_dims + len(fn.event_shape)
        lead = max(value.dim() - (dims - batch_dims) - max(nesting, batch_dims), 0)
        return value.reshape(value.shape[:lead] + value.shape[max(value.dim() - dims, 0) :])


def _before(owner: nn.Module, guide: AutoGuide) -> Iterator[AutoGuide]:
    """The guides of a list, and of lists in it, that come before one of them."""
    for part in owner.children():
        if part is guide:
            return
        if isinstance(part, AutoGuideList):
            yield from _before(part, guide)
        elif isinstance(part, AutoGuide):
            yield part
        if guide in part.modules():
            return


def outer_nesting() -> int:
    """How many dimensions lie right of all plates that are entered now; 0 outside of plates."""
    return -max(plates_entered(), default=-1) - 1
