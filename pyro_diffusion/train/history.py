"""What happened in a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["History"]


@dataclass
class History:
    """What happened in a training run.

    Attributes:
        unit: of all losses, such as "bits/dim".
        losses: minus the ELBO on the batch of each step, a noisy estimate.
        validations: what validation found, by step; lower is better.
        best_step: the step of the lowest of them, None without validation.
        seconds: spent on steps, validation and checkpoints not counted.
        stopped: why training ended before its last step: "patience" or "callback", else None.
    """

    unit: str
    losses: list[float] = field(default_factory=list)
    validations: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None
    seconds: float = 0.0
    stopped: str | None = None

    def note(self, step: int, value: float) -> bool:
        """Take in a validation; returns whether it is the best so far."""
        self.validations[step] = value
        if self.best_step is None or value < self.validations[self.best_step]:
            self.best_step = step
        return self.best_step == step

    def since_best(self) -> int:
        """How many validations there were after the best."""
        best = -1 if self.best_step is None else self.best_step
        return sum(step > best for step in self.validations)

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {**vars(self), "losses": torch.tensor(self.losses, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        vars(self).update(state)
        self.losses = state["losses"].tolist()
        self.validations = dict(state["validations"])
