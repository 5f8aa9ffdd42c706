"""Whether a program simulates the same with these arguments as with those: the same but for the data."""

import inspect
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_diffusion.infer.simulators.simulations import Simulator, traced

__all__ = ["Call", "simulates_alike"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def simulates_alike(
    simulator: Simulator, first: Call, now: Call, data: Mapping[str, Tensor]
) -> bool:
    """Whether the arguments of two calls differ in their data alone.

    Arguments that are the values of observed sites are data, and equal ones are alike. If others are left,
    such as data that the program transforms, or a design, the program is run under both from one seed,
    observing nothing: it must draw the same.

    Args:
        simulator: the program.
        first: arguments and keyword arguments that simulations were made with.
        now: likewise, of another call.
        data: values of the observed sites in that call.
    """
    before, after = (_by_name(simulator.program, call) for call in (first, now))
    values = list(data.values())
    for name, value in after.items():
        is_data = any(value is each for each in values)
        if not is_data and not _equal(before.get(name), value):
            break
    else:
        # what was given then and is not now: data, unless it made a difference
        if all(name in after or value is None for name, value in before.items()):
            return True
    try:
        one, other = (_drawn(simulator, call) for call in (first, now))
    except (RuntimeError, ValueError, TypeError):
        return False
    return all(_equal(one[name], other[name]) for name in one)


def _by_name(program: Any, call: Call) -> dict[str, Any]:
    args, kwargs = call
    try:
        bound = inspect.signature(program).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{str(i): each for i, each in enumerate(args)}, **kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool((a == b).all()))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError, TypeError):  # arrays and the like
        return False


def _drawn(simulator: Simulator, call: Call) -> dict[str, Tensor]:
    state = pyro.util.get_rng_state()
    pyro.util.set_rng_seed(0)
    try:
        nodes = traced(poutine.uncondition(simulator.program), *call).nodes
    finally:
        pyro.util.set_rng_state(state)
    return {
        name: torch.as_tensor(nodes[name]["value"])
        for name in (*simulator.latents, *simulator.observed)
    }
