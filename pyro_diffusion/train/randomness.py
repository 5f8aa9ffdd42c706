"""States of the generators that a training run draws from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch

__all__ = ["common_noise", "rng_state", "set_rng_state"]


def rng_state() -> dict[str, Any]:
    """Of torch's global generators on every device in use, numpy's and Python's."""
    state = dict(pyro.util.get_rng_state())
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set what :func:`rng_state` returned."""
    pyro.util.set_rng_state({name: value for name, value in state.items() if name != "cuda"})
    if "cuda" in state:  # of this machine's devices, there may be fewer
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)


@contextmanager
def common_noise(seed: int) -> Iterator[None]:
    """The same noise each time that the block runs, and none of it outside."""
    before = rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        set_rng_state(before)
