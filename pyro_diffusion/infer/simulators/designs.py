"""Whether a program simulates the same with these arguments as with those: the same but for the data."""

import inspect
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_diffusion.infer.simulators.plates import Level
from pyro_diffusion.infer.simulators.runs import site_score, sites_of, traced
from pyro_diffusion.infer.simulators.simulations import Simulator
from pyro_diffusion.likelihoods.run import Message, unconditioned

__all__ = ["Call", "rows_alike", "simulates_alike"]

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
    if _only_data(simulator, first, now, data):
        return True
    try:
        one, other = (_drawn(simulator, call) for call in (first, now))
    except (RuntimeError, ValueError, TypeError):
        return False
    return all(_equal(one[name], other[name]) for name in one)


def rows_alike(
    simulator: Simulator,
    levels: tuple[Level, ...],
    first: Call,
    now: Call,
    data: Mapping[str, Tensor],
) -> bool:
    """As :func:`simulates_alike`, for calls whose plates of rows may have other sizes.

    Draws of other shapes are no longer the same from one seed, so densities are compared: rows of a run under
    the first arguments, in turn as often as there are now, must have the densities that they had. Of a
    program with noise of its own, which no two runs have alike, nothing is known unless it has as many rows.

    Args:
        simulator: the program.
        levels: its plates of rows.
        first: arguments and keyword arguments that simulations were made with.
        now: likewise, of another call.
        data: values of the observed sites in that call.
    """
    sizes = {
        name: tuple(value.shape[value.dim() - len(site.shape) :])
        for (name, site), value in zip(simulator.observed.items(), data.values(), strict=True)
    }
    as_many = all(sizes[name] == tuple(site.shape) for name, site in simulator.observed.items())
    if as_many and _only_data(simulator, first, now, data):
        return True
    program = unconditioned(simulator.program)
    state = pyro.util.get_rng_state()
    pyro.util.set_rng_seed(0)
    try:
        one, other = (sites_of(traced(program, *call)) for call in (first, now))
        own = {name: node["value"] for name, node in one.items()}
        again = sites_of(traced(poutine.condition(program, data=own), *first))
        if not all(_same(site_score(again[n]), site_score(one[n])) for n in one):
            return not as_many or simulates_alike(simulator, first, now, data)
        if set(one) != set(other):
            return False
        names = {plate for level in levels for plate in level.plates}
        values = {
            name: _in_turn(value, one[name]["fn"].event_dim, other[name], names)
            for name, value in own.items()
        }
        found = sites_of(traced(poutine.condition(program, data=values), *now))
        return all(
            _same(_in_turn(site_score(one[n]), 0, other[n], names), site_score(found[n]))
            for n in one
        )
    except (RuntimeError, ValueError, TypeError, KeyError):
        return False
    finally:
        pyro.util.set_rng_state(state)


def _in_turn(value: Tensor, event_dim: int, node: Message, plates: set[str]) -> Tensor:
    """Rows of a value in turn, as many as the site's plates of rows have."""
    for frame in node["cond_indep_stack"]:
        place = value.dim() - event_dim + (frame.dim or 0)
        if frame.name in plates and frame.dim is not None and place >= 0:
            order = torch.arange(frame.size, device=value.device) % value.shape[place]
            value = value.index_select(place, order)
    return value


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, where the other may be of a batch of observations."""
    a, b = torch.broadcast_tensors(one, other)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def _only_data(simulator: Simulator, first: Call, now: Call, data: Mapping[str, Tensor]) -> bool:
    """Whether arguments that are no data are equal."""
    before, after = (_by_name(simulator.program, call) for call in (first, now))
    values = list(data.values())
    for name, value in after.items():
        is_data = any(value is each for each in values)
        if not is_data and not _equal(before.get(name), value):
            return False
    # what was given then and is not now: data, unless it made a difference
    return all(name in after or value is None for name, value in before.items())


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
        nodes = traced(unconditioned(simulator.program), *call).nodes
    finally:
        pyro.util.set_rng_state(state)
    return {
        name: torch.as_tensor(nodes[name]["value"])
        for name in (*simulator.latents, *simulator.observed)
    }
