"""Runs of a program of which only the shapes are used: no chain is sampled for them."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine import runtime
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.callers import called_from

__all__ = ["kept_example", "shapes_only"]


def shapes_only() -> bool:
    """Whether Pyro runs a program now for the shapes of its sites, and drops the values.

    Two such runs precede every draw of ``Predictive``, for model and guide each; and an ``AutoGuideList`` has
    one of its model. Where initial values are made of the draws, as in ``AutoNormal``, it is not one.
    """
    stack: list[Any] = runtime._PYRO_STACK
    for place in reversed(range(len(stack))):
        if _is_prototype(stack[place]):
            return True
        if isinstance(stack[place], InitMessenger):
            return (
                stack[place].init_fn is init_to_sample
                and not any(map(_is_prototype, stack[:place]))
                and called_from("pyro.infer.predictive")
            )
    return False


def kept_example(denoiser: Denoiser, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """A value that is made once for a denoiser and a key, and leaves the global generators alone."""
    kept = _EXAMPLES.get(denoiser)
    if kept is None or kept[0] != key:
        accelerators = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.no_grad(), torch.random.fork_rng(devices=accelerators):
            _EXAMPLES[denoiser] = kept = key, make()
    return kept[1].clone()


# The last one of each denoiser: a model that builds its distribution anew at each run finds it again.
_EXAMPLES: weakref.WeakKeyDictionary[Denoiser, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


def _is_prototype(messenger: Any) -> bool:
    return (
        isinstance(messenger, BlockMessenger) and messenger.hide_fn is AutoGuide._prototype_hide_fn
    )
