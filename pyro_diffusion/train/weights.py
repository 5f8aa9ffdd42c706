"""The weights of a program: as trained, averaged, and the best of the averaged ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_diffusion.checkpoint.saving import restore_module
from pyro_diffusion.optim import EMA

__all__ = ["Weights"]


class Weights:
    """Switches modules between their weights in training and those to use.

    Args:
        module: holds all weights.
        decay: of their average; None for none, the weights to use are then those of the last step.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self.module = module
        self.average = None if decay is None else EMA(module, decay)
        self.best: dict[str, Tensor] | None = None
        self._trained: dict[str, Tensor] | None = None  # while others are in the module

    @property
    def dtype(self) -> str:
        """Of all numbers, by name."""
        return ", ".join(sorted({str(value.dtype) for value in _tensors(self.module).values()}))

    def update(self) -> None:
        """After a step."""
        if self.average is not None:
            self.average.update()

    def keep(self) -> None:
        """Those to use now are the best."""
        self.best = {name: value.clone() for name, value in self._usable().items()}

    @contextmanager
    def usable(self) -> Iterator[None]:
        """Averaged weights, modules in evaluation mode; as they were at the end."""
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            if self.average is None or self._trained is not None:
                yield
            else:
                with self.average.average_parameters():
                    yield
        finally:
            for module, training in modes:
                module.training = training

    def finish(self) -> None:
        """Leave the best weights, or else the averaged ones, in the modules."""
        if self._trained is None:
            self._trained = {name: value.clone() for name, value in _tensors(self.module).items()}
        _copy(self._usable() if self.best is None else self.best, self.module)
        self.module.eval()

    def resume(self) -> None:
        """Training mode, and the weights that :meth:`finish` replaced."""
        if self._trained is not None:
            left = self._usable() if self.best is None else self.best
            changed = [n for n, v in _tensors(self.module).items() if not v.equal(left[n])]
            if changed:
                raise ValueError(
                    f"model: got weights that were changed since the last call of fit ({changed[0]}), which "
                    "would go on from those it trained; expected them as they were, or a new Trainer"
                )
            _copy(self._trained, self.module)
            self._trained = None
        _train(self.module)

    def state_dict(self) -> dict[str, Any]:
        """All three."""
        return {
            "trained": self.module.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            CheckpointError, ValueError: for the weights of another program.
        """
        restore_module(self.module, state["trained"], name="weights")
        self._trained = self.best = None  # what an earlier `finish` put aside is older
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["best"] is not None:
            own = _tensors(self.module)
            self.best = {name: v.to(own[name].device) for name, v in state["best"].items()}

    def _usable(self) -> dict[str, Tensor]:
        return _tensors(self.module) if self.average is None else self.average.average


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {n: value for n, value in module.state_dict().items() if isinstance(value, Tensor)}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], module: nn.Module) -> None:
    for name, value in _tensors(module).items():
        value.copy_(source[name])


def _train(module: nn.Module) -> None:
    """Training mode, but for frozen parts: those all of whose parameters want no gradient."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return
    module.training = True
    for child in module.children():
        _train(child)
