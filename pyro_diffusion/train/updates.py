"""One step of the optimizers on the gradients of a program's parameters."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_diffusion.checkpoint.saving import differences
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
        self._check_parameters()
        self.schedules = [schedule(each) for each in self.optimizers] if schedule else []
        for scheduler in self.schedules:
            if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
                raise ValueError(
                    f"schedule: got {kind_of(scheduler)} from it, expected a torch scheduler that is stepped "
                    "without a figure"
                )
        # As made: what a checkpoint is compared with, so that no other rate is gone on with unseen
        self.settings = {
            "optimizers": {str(i): _settings(each) for i, each in enumerate(self.optimizers)},
            "schedules": {str(i): _plain(s.state_dict()) for i, s in enumerate(self.schedules)},
        }

    def _check_parameters(self) -> None:
        """Refuse optimizers that leave a parameter out, share one, or have one of something else.

        Raises:
            ValueError: naming them.
        """
        for each in self.optimizers:
            if isinstance(each, torch.optim.LBFGS):
                raise ValueError(
                    "optimizer: got LBFGS, which evaluates the loss itself, expected one of gradients"
                )
        groups = [group for each in self.optimizers for group in each.param_groups]
        counts = Counter(id(p) for group in groups for p in group["params"])
        known = {id(p) for _, p in self.trained}
        if unknown := len(counts.keys() - known):
            raise ValueError(
                f"optimizer: got {unknown} tensors that the program does not train, expected those that it "
                "was called with"
            )
        for what, count in (("without", 0), ("with more than once", 2)):
            found = [n for n, p in self.trained if min(counts[id(p)], 2) == count]
            if found and not (count == 0 and self.allow_unused):
                raise ValueError(
                    f"optimizer: got optimizers {what} {_shown(found)}, expected every parameter in one; "
                    "requires_grad_(False) freezes what is not to be trained"
                )

    def check(self) -> None:
        """Refuse parameters without a gradient.

        Raises:
            ValueError: naming them.
        """
        unused = [name for name, p in self.trained if p.grad is None]
        if unused and not self.allow_unused:
            raise ValueError(
                f"model: got no gradient for {_shown(unused)}, expected every parameter to have one; call "
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
            "settings": self.settings,
            "optimizers": [each.state_dict() for each in self.optimizers],
            "schedules": [each.state_dict() for each in self.schedules],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for each, saved in zip(self.optimizers, state["optimizers"], strict=True):
            each.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)

    def compare(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of others.

        Raises:
            ValueError: naming what differs.
        """
        if state["classes"] != self._classes():
            raise ValueError(
                f"checkpoint: got classes {state['classes']}, expected {self._classes()}"
            )
        own, saved = [name for name, _ in self.trained], list(state["names"])
        if saved != own:
            more, fewer = sorted({*saved} - {*own}), sorted({*own} - {*saved})
            raise ValueError(
                f"checkpoint: got trained parameters with {_shown(more)} and without {_shown(fewer)}, "
                "expected those of this program, in its order; were some frozen since?"
            )
        found = differences(state["settings"], self.settings)
        if found:
            raise ValueError(f"checkpoint: of other updates: {'; '.join(found)}")

    def _classes(self) -> list[str]:
        return [type(part).__name__ for part in (*self.optimizers, *self.schedules)]


def _shown(names: list[str]) -> list[str]:
    return names[:8] + ["..."] * (len(names) > 8)


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """Of each group of parameters, how many there are and what they are updated with."""
    return {
        str(i): {"parameters": len(group["params"])} | _plain(group)
        for i, group in enumerate(optimizer.param_groups)
    }


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state are numbers, words, and sequences and mappings of them."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        if isinstance(value, Mapping):
            found[str(key)] = _plain(value)
        elif isinstance(value, list | tuple) and key not in ("params", "param_names"):
            found[str(key)] = _plain({str(i): each for i, each in enumerate(value)})
        elif isinstance(value, bool | int | float | str):
            found[str(key)] = value
    return found


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
