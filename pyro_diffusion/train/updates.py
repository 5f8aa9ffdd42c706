"""One step of the optimizers on the gradients of a program's parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_diffusion.validation import check_number, kind_of

__all__ = ["Updates"]

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer | Sequence[Optimizer]]
MakeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]


class Updates:
    """Optimizers, schedules of their learning rates, and the clipping of gradients.

    Args:
        trained: names and parameters.
        optimizer: makes a torch optimizer of the parameters, or several.
        schedule: makes a scheduler of an optimizer, stepped once a step.
        clip_norm: largest norm of all gradients together.
        allow_unused: whether parameters may have no gradient; they then stay.

    Raises:
        ValueError: naming what was found.
    """

    def __init__(
        self,
        trained: list[tuple[str, Tensor]],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None,
        clip_norm: float | None,
        allow_unused: bool,
    ) -> None:
        self.trained, self.clip_norm, self.allow_unused = trained, clip_norm, allow_unused
        made = optimizer([p for _, p in trained])
        several: Any = made if isinstance(made, list | tuple) else [made]
        self.optimizers: list[Optimizer] = list(several)
        for each in self.optimizers:
            if not isinstance(each, Optimizer):
                raise ValueError(
                    f"optimizer: got {kind_of(each)} from it, expected torch optimizers"
                )
        self.schedules = [schedule(each) for each in self.optimizers] if schedule else []

    def check(self) -> None:
        """Refuse parameters without a gradient.

        Raises:
            ValueError: naming them.
        """
        unused = [name for name, p in self.trained if p.grad is None]
        if unused and not self.allow_unused:
            shown = unused[:8] + ["..."] * (len(unused) > 8)
            raise ValueError(
                f"model: got no gradient for {shown}, expected every parameter to have one; call "
                "requires_grad_(False) of what is not to be trained, or pass allow_unused=True"
            )

    def step(self) -> None:
        """Clip, update, advance the learning rates; gradients are then None."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in self.trained], self.clip_norm)
        for each in self.optimizers:
            each.step()
        for _, p in self.trained:
            p.grad = None  # not zeros: the next backward pass then writes instead of adding
        for schedule in self.schedules:
            schedule.step()

    @property
    def learning_rate(self) -> float:
        """Of the first group of parameters."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Of optimizers and schedules, with their classes and the names of the parameters."""
        return {
            "classes": self._classes(),
            "names": [name for name, _ in self.trained],
            "optimizers": [each.state_dict() for each in self.optimizers],
            "schedules": [each.state_dict() for each in self.schedules],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: for the state of others.
        """
        own = {"classes": self._classes(), "names": [name for name, _ in self.trained]}
        for key, value in own.items():
            if state[key] != value:
                raise ValueError(f"checkpoint: got {key} {state[key]}, expected {value}")
        for each, saved in zip(self.optimizers, state["optimizers"], strict=True):
            each.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)

    def _classes(self) -> list[str]:
        return [type(part).__name__ for part in (*self.optimizers, *self.schedules)]


def check_updates(optimizer: object, schedule: object, clip_norm: float | None) -> None:
    """Refuse what makes no torch optimizer.

    Raises:
        ValueError: naming what was found.
    """
    example = "functools.partial(torch.optim.Adam, lr=1e-3)"
    if isinstance(optimizer, PyroOptim | Optimizer) or not callable(optimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise ValueError(
            f"optimizer: got {kind}, expected what makes a torch optimizer, e.g. {example}"
        )
    if schedule is not None and (isinstance(schedule, LRScheduler) or not callable(schedule)):
        raise ValueError(
            f"schedule: got {kind_of(schedule)}, expected what makes a torch scheduler of an optimizer, e.g. "
            "functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1000)"
        )
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, above=0)
