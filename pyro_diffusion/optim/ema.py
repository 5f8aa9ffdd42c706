"""Exponential moving average of a module's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_diffusion.nn.definition import definition_differences
from pyro_diffusion.validation import check_positive_int, check_tensor


class EMA:
    r"""Exponential moving average of the weights of a module.

    After update number :math:`n = 0, 1, \dots` of weights :math:`\theta`

    .. math::

        \bar\theta \leftarrow \bar\theta + (1 - d_n)(\theta - \bar\theta), \qquad
        d_n = \min\Big(d, \frac{1 + n}{10 + n}\Big)

    with :math:`d_n = d` if ``warmup`` is off. The warm-up keeps the average from remembering the
    initial weights, which it starts from: :math:`d_0 = 0.1`, and :math:`d_n` reaches 0.999 after
    about 9000 updates.

    The average is a copy of the module's *state dict*; the module itself is never copied, since
    copying a Pyro guide destroys it. Floating-point entries are averaged (half precision ones in
    float32), others, such as counters, are copied. A ``PyroParam`` is averaged in its unconstrained
    space. Updates and swaps work in place, so optimizers and Pyro's parameter store keep seeing the
    same tensors, and nothing waits for the device.

    Args:
        module: the module to follow. Lazily created parameters, such as those of a Pyro autoguide,
            must exist already: call the module once before.
        decay: :math:`d`, in [0, 1).
        warmup: whether to use the smaller :math:`d_n` at the start.

    Raises:
        ValueError: if ``decay`` is out of range; on ``update`` if the module's entries are no
            longer those of the average.

    References:
        Polyak and Juditsky 1992, Acceleration of Stochastic Approximation by Averaging; Ho et al.
        2020, Denoising Diffusion Probabilistic Models, appendix B.

    Example:
        >>> network = torch.nn.Linear(2, 2)
        >>> ema = EMA(network, decay=0.99)
        >>> ema.update()  # after each optimizer step
        >>> with ema.average_parameters():
        ...     y = network(torch.zeros(1, 2))
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")
        self.module = module
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._swapped = False
        self.average: dict[str, Tensor] = {
            name: value.detach().to(_dtype_of_average(value), copy=True)
            for name, value in _tensors(module).items()
        }

    def current_decay(self) -> float:
        """Returns the decay that the next update will use."""
        n = self.updates
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the module's present weights.

        Raises:
            RuntimeError: within :meth:`average_parameters`, where the weights are the average.
        """
        if self._swapped:
            raise RuntimeError("EMA.update: called within average_parameters()")
        averages, values = [], []
        for name, value in self._current().items():
            average = self.average[name]
            if average.device != value.device:
                average = self.average[name] = average.to(value.device)
            if _is_averaged(value):
                averages.append(average)
                values.append(value.to(average.dtype))
            else:
                average.copy_(value)
        if averages:
            torch._foreach_lerp_(averages, values, 1 - self.current_decay())
        self.updates += 1

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Gives the module its averaged weights for the duration of a ``with`` block.

        The trained weights come back at its end, also after an exception.

        Raises:
            RuntimeError: if entered twice.
        """
        if self._swapped:
            raise RuntimeError("EMA.average_parameters: entered twice")
        current = self._current()
        backup = {name: value.clone() for name, value in current.items()}
        self._swapped = True
        try:
            _copy(self.average, current)
            yield
        finally:
            _copy(backup, current)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates and the average (its own tensors, as torch does).

        The average is a state dict of the module, metadata included, and loads into it.
        """
        average = self.module.state_dict()
        average.update(self.average)
        for name in average.keys() - self.average.keys():
            del average[name]
        return {"updates": self.updates, "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: if entries are missing, unexpected, of another shape or of a dtype that does not
                convert, or ``updates`` is no number of updates; nothing is changed.
        """
        _check_entries("state", state, {"updates", "average"})
        average = state["average"]
        updates = check_positive_int("state['updates']", state["updates"], at_least=0)
        _check_entries("state['average']", average, set(self.average))
        differences = definition_differences(self.module, average)
        if differences:
            raise ValueError(f"state['average']: of another model: {'; '.join(differences)}")
        for name, own in self.average.items():
            _check_like(f"state['average'][{name!r}]", average[name], own)
        # converted before the first is copied, so that whatever fails fails before
        new = {name: average[name].detach().to(own) for name, own in self.average.items()}
        _copy(new, self.average)
        self.updates = updates

    def _current(self) -> dict[str, Tensor]:
        current = _tensors(self.module)
        _check_entries("module", current, set(self.average))
        return current


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _is_averaged(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _dtype_of_average(value: Tensor) -> torch.dtype:
    # steps of 1 - decay are lost in the rounding of half precision
    return torch.promote_types(value.dtype, torch.float32) if _is_averaged(value) else value.dtype


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])


def _check_entries(name: str, found: object, expected: set[str]) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: got {type(found).__name__}, expected a mapping")
    missing, extra = sorted(expected - set(found)), sorted(set(found) - expected, key=str)
    if missing or extra:
        raise ValueError(f"{name}: got unexpected entries {extra}, and misses {missing}")


def _check_like(name: str, found: Tensor, own: Tensor) -> None:
    if check_tensor(name, found, boolean=True).shape != own.shape:
        raise ValueError(f"{name}: got shape {tuple(found.shape)}, expected {tuple(own.shape)}")
    if not torch.can_cast(found.dtype, own.dtype):
        raise ValueError(f"{name}: got {found.dtype}, expected {own.dtype}")
