"""A figure by which the best weights are chosen, under the same noise each time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_diffusion.train.batches import check_data, in_order, rows_of, to_device
from pyro_diffusion.train.randomness import common_noise
from pyro_diffusion.train.sharing import Sharing
from pyro_diffusion.validation import kind_of

__all__ = ["Validation"]

# Passes over the data: one draw of a bound is of one term for each datum.
PASSES = 8
SEED = 0


class Validation:
    """Minus the ELBO of held-out data, or a function of the user's; lower is better.

    Args:
        data: tensors, a loader, or a function without arguments that returns a number.
        loss: of a batch's arguments, per datum or coordinate.
        batch_size: rows evaluated together.
        device: where.
        sharing: the processes, each of which takes some of the batches; a function is called on all of them,
            and what the first rank gets counts.

    Raises:
        ValueError: for data without rows.
    """

    def __init__(
        self,
        data: object,
        loss: Callable[..., Tensor],
        batch_size: int,
        device: torch.device,
        sharing: Sharing,
    ) -> None:
        self.data, self.loss, self.batch_size, self.device = data, loss, batch_size, device
        self.sharing = sharing
        if not callable(data) and not isinstance(data, DataLoader):
            check_data("validation", data)

    @torch.no_grad()
    def __call__(self) -> float:
        """The figure.

        Raises:
            ValueError: if it is not a finite number.
        """
        with common_noise(SEED):
            found = self.data() if callable(self.data) else self._of_data()
        number = isinstance(found, int | float) or (
            isinstance(found, Tensor) and found.numel() == 1
        )
        if not number or not math.isfinite(float(found)):
            shown = found if number else kind_of(found)
            raise ValueError(f"validation: got {shown} from it, expected a finite number")
        return self.sharing.of_first(float(found))

    def _of_data(self) -> float:
        """The mean over data and passes."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # of losses and of rows
        for _ in range(PASSES):
            for number, batch in enumerate(in_order(self.data, self.batch_size)):
                if number % self.sharing.size == self.sharing.rank:
                    args, kwargs = to_device(batch, self.device)
                    loss = self.loss(*args, **kwargs).double()
                    total += rows_of(args, kwargs) * torch.stack([loss, torch.ones_like(loss)])
        loss, rows = self.sharing.total(total)
        if rows == 0:
            raise ValueError("validation: got no rows, expected at least one")
        return float(loss / rows)
