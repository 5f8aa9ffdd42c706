"""Plates of a program whose rows are alike: sets of data, and latents of their own for every row."""

import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_diffusion.infer.simulators.runs import site_score
from pyro_diffusion.infer.simulators.simulations import Simulator, trial_runs
from pyro_diffusion.likelihoods.run import Message

__all__ = ["Level", "find_levels", "in_rows"]

Rerun = Callable[[dict[str, Tensor]], dict[str, Message]]


class Level(NamedTuple):
    """What is in one plate of rows, or outside of all of them.

    Attributes:
        plates: names of the plates of rows around it, outermost first.
        dims: their dimensions.
        latents: names of the latents in these plates and in no other such plate.
        observed: likewise of the observed sites.
        parent: number of the level that it is in, -1 of the first.
    """

    plates: tuple[str, ...]
    dims: tuple[int, ...]
    latents: tuple[str, ...]
    observed: tuple[str, ...]
    parent: int


def in_rows(value: Tensor, event_dim: int, dims: tuple[int, ...], lead: int) -> Tensor:
    """A site's values by row, lead + rows of every plate + (numbers in a row,).

    Args:
        value: lead + plates + event.
        event_dim: dimensions of the event.
        dims: of the plates, from the right and outermost plate first.
        lead: how many dimensions are further ones on the left.
    """
    here = [value.dim() - event_dim + dim for dim in dims]
    out = value.movedim(here, list(range(lead, lead + len(here))))
    return out.reshape(*out.shape[: lead + len(here)], -1)


def find_levels(
    simulator: Simulator, args: Any, kwargs: Any, names: Collection[str] | None
) -> tuple[Level, ...]:
    """The plates whose rows are a set, and what is in them.

    Rows are a set if they are alike and know of each other only by what is outside: when all sites of two
    rows change places, so do their densities, and when a row has other values, no density changes but the
    row's own. Both are looked at in runs of the program, as point masses are by their points.

    Args:
        simulator: the program and its sites.
        args: the program's.
        kwargs: likewise.
        names: of the plates to take for sets, found by trial if None.

    Raises:
        ValueError: for names that are no plate with observed sites, plates that cross, and latents of rows
            that depend on an unknown they share.
    """
    latents, observed = tuple(simulator.latents), tuple(simulator.observed)
    if names is not None and not names:
        return (Level((), (), latents, observed, -1),)
    runs, rerun = trial_runs(simulator, args, kwargs)
    first = runs[0]
    frames = {f.name: f for n in first.values() for f in n["cond_indep_stack"] if f.dim is not None}
    members = {
        name: frozenset(n for n, node in first.items() if _dim_in(node, name) is not None)
        for name in frames
    }
    possible = [n for n in frames if frames[n].size > 1 and members[n] & set(observed)]
    if names is not None:
        if isinstance(names, str) or not set(names) <= set(frames):
            raise ValueError(f"plates: got {names!r}, expected names of plates out of {[*frames]}")
        possible = [n for n in frames if n in names]
        if not all(members[n] & set(observed) for n in possible):
            raise ValueError(f"plates: got {names!r}, expected plates with observed sites in them")
    else:
        possible = [n for n in possible if _is_set(n, frames[n].dim, runs, rerun)]
    crossed = [
        n
        for n in possible
        if any(
            members[n] & members[m] and not (members[n] <= members[m] or members[m] <= members[n])
            for m in possible
        )
    ]
    if crossed and names is not None:
        raise ValueError(f"plates: got {crossed}, which cross, expected nested ones")
    nested = [n for n in possible if n not in crossed]
    # a plate around another has all of its sites; of two of the same sites the first entered is around
    nested.sort(key=lambda n: (-len(members[n]), list(frames).index(n)))
    paths = {name: tuple(n for n in nested if name in members[n]) for name in (*latents, *observed)}
    found = [Level((), (), *_at((), paths, latents, observed), -1)]
    for i, name in enumerate(nested):
        path = tuple(n for n in nested[: i + 1] if members[name] <= members[n])
        dims = tuple(int(frames[n].dim) for n in path)
        parent = next(j for j, level in enumerate(found) if level.plates == path[:-1])
        found.append(Level(path, dims, *_at(path, paths, latents, observed), parent))
    _check_known_above(tuple(found), runs, rerun)
    return tuple(found)


def _check_known_above(
    levels: tuple[Level, ...], runs: list[dict[str, Message]], rerun: Rerun
) -> None:
    """Refuse latents of rows that share an unknown: given the others alone, rows would not be independent.

    Raises:
        ValueError: naming it.
    """
    first, *others = runs
    known = {n for level in levels for n in (*level.latents, *level.observed)}
    for level in levels[1:]:
        if not level.latents:
            continue
        inside = [n for n, node in first.items() if _dim_in(node, level.plates[-1]) is not None]
        above = [n for n in first if n not in known and n not in inside]
        for name in above:
            values = {n: node["value"] for n, node in first.items()}
            moved = any(
                _moves(inside, first, rerun, {**values, name: other[name]["value"]})
                for other in others
            )
            if moved:
                raise ValueError(
                    f"latents: got {list(level.latents)} in plate {level.plates[-1]!r} without {name!r}, on "
                    f"which they depend, expected {name!r} among the latents"
                )


def _moves(
    inside: list[str], first: dict[str, Message], rerun: Rerun, values: dict[str, Tensor]
) -> bool:
    """Whether densities inside of a plate are others at these values."""
    try:
        again = rerun(values)
        return not all(torch.equal(site_score(again[n]), site_score(first[n])) for n in inside)
    except Exception:  # whatever a program may raise at values of another run
        return True


def _at(
    path: tuple[str, ...],
    paths: dict[str, tuple[str, ...]],
    latents: Collection[str],
    observed: Collection[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(n for n in latents if paths[n] == path), tuple(
        n for n in observed if paths[n] == path
    )


def _dim_in(node: Message, plate: str) -> int | None:
    """The dimension that a plate has at a site, if the site is in it."""
    return next((f.dim for f in node["cond_indep_stack"] if f.name == plate), None)


def _is_set(plate: str, dim: int, runs: list[dict[str, Message]], rerun: Rerun) -> bool:
    """Whether rows of a plate are alike, and independent given what is outside.

    Every run is asked: in one alone, data may say nothing, as counts of 0 do of rates that all are tiny.
    """
    try:
        with warnings.catch_warnings(), pyro.validation_enabled(False):
            warnings.simplefilter("ignore")
            pairs = zip(runs, [*runs[1:], runs[0]], strict=True)
            return all(_is_set_in(plate, dim, run, other, rerun) for run, other in pairs)
    except Exception:  # whatever a program may raise at values of another run
        return False


def _is_set_in(
    plate: str, dim: int, run: dict[str, Message], other: dict[str, Message], rerun: Rerun
) -> bool:
    """Whether it looks so in a run whose rows move on by one, the first to have another run's values."""
    inside = [n for n, node in run.items() if _dim_in(node, plate) is not None]
    values = {n: node["value"] for n, node in run.items()}
    for name in inside:
        place = values[name].dim() - run[name]["fn"].event_dim + dim
        size = values[name].shape[place]
        first = other[name]["value"].narrow(place, 0, 1)
        values[name] = torch.cat([first, values[name].narrow(place, 0, size - 1)], place)
    after = rerun(values)
    for name, node in run.items():
        was, now = site_score(node), site_score(after[name])
        if name in inside:
            size = was.shape[dim]
            was, now = was.narrow(dim, 0, size - 1), now.narrow(dim, 1, size - 1)
        if not _same(was, now):
            return False
    return True


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
