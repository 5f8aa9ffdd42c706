"""What is saved and loaded: states, modules, and the description they are checked against."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_diffusion.checkpoint.encoding import Json, decode, encode
from pyro_diffusion.checkpoint.files import CheckpointError, read_file, write_file
from pyro_diffusion.nn.definition import definition_differences


def save(
    path: str | os.PathLike[str],
    state: Mapping[Any, Any],
    description: Mapping[str, Any] | None = None,
) -> None:
    """Writes a nested state to one file, all or nothing.

    The bytes go to a new file of a name of its own in the same folder, are flushed to the disk, and
    the file then takes the name ``path`` in one step. A process killed at any moment leaves either
    the old checkpoint or the new one; of several processes that write to a path the last one wins;
    and another process that loads it meanwhile gets one or the other.

    Args:
        path: the file, by convention ``*.safetensors``.
        state: nested mappings, lists and tuples of tensors, numpy arrays, numbers, strings,
            booleans and ``None``: state dicts of modules and of
            :class:`~pyro_diffusion.optim.EMA`, what ``PyroOptim.get_state()`` and
            ``pyro.util.get_rng_state()`` return, counters. Keys of mappings may be strings,
            numbers, booleans, ``None`` and tuples of these. Mappings come back as ``dict``, state
            dicts of modules with the metadata that torch gave them, subclasses of tuple as
            ``tuple``, numpy scalars as Python's; tensors that share memory come back apart.
        description: what the state belongs to, e.g. the arguments the model was built with, as a
            JSON object. :func:`load` compares it.

    Raises:
        TypeError: if the state holds anything else, naming where, or the description is not JSON.
        ValueError: if what is not tensors makes more than 32 MiB or 500,000 lists and mappings.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got {type(state).__name__}, expected a mapping")
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    tree = encode(state, "state", (), tensors)
    write_file(path, {"description": _as_json(description or {}), "state": tree}, tensors)


def load(
    path: str | os.PathLike[str], description: Mapping[str, Any] | None = None
) -> dict[Any, Any]:
    """Loads what :func:`save` wrote.

    Args:
        path: the file.
        description: what is being loaded into; compared with the stored one if given.

    Returns:
        The nested state, its tensors on the CPU. ``load_state_dict`` of modules and torch
        optimizers moves them to where they belong. ``PyroOptim.set_state`` must be called *before*
        the first step of a fresh optimizer: it hands a state out when it first meets a parameter,
        and never afterwards.

    Raises:
        OSError: if the file cannot be opened, ``FileNotFoundError`` if there is none.
        CheckpointError: if the file is truncated, damaged or no checkpoint, or if the descriptions
            differ, naming the keys with both values.
    """
    path = Path(path)
    header, tensors = read_file(path)
    if description is not None:
        _compare(path, header["description"], _as_json(description))
    try:
        state = decode(header["state"], tensors)
        if not isinstance(state, dict):
            raise TypeError(f"got {type(state).__name__}, expected dict")
        return state
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, the stored state does not fit: {error}") from error


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the description stored in a checkpoint.

    Raises:
        OSError: as :func:`load`.
        CheckpointError: if the file is truncated, damaged or no checkpoint.
    """
    return read_file(Path(path))[0]["description"]


def save_module(
    path: str | os.PathLike[str], module: nn.Module, description: Mapping[str, Any] | None = None
) -> None:
    """Writes the state dict of a module, under its own names, see :func:`save`."""
    save(path, module.state_dict(), description)


def load_module(
    path: str | os.PathLike[str], module: nn.Module, description: Mapping[str, Any] | None = None
) -> None:
    """Loads a file of :func:`save_module` into a module of the same architecture.

    Raises:
        OSError: as :func:`load`.
        CheckpointError: as :func:`load`, and if names or shapes are not those of the module, which
            is then left as it was.
    """
    restore_module(module, load(path, description), name=str(path))


def restore_module(module: nn.Module, state: Mapping[str, Any], name: str = "state") -> None:
    """Loads a state dict into a module, all or nothing.

    Args:
        module: the module.
        state: its state dict, e.g. one part of what :func:`load` returned.
        name: what to call the state in errors.

    Raises:
        CheckpointError: naming each key (of many the first) that is missing, unexpected, of another shape or
            of a dtype that does not convert, and what defines the model otherwise
            (:class:`~pyro_diffusion.nn.definition.DefinedModule`); the module is then left as it was.
    """
    problems = module_differences(module, state)
    if problems:
        raise CheckpointError(f"{name}: of another module: {listed(problems)}")
    module.load_state_dict(state)


def module_differences(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Why a state dict does not fit a module, see :func:`restore_module`."""
    own = module.state_dict()
    problems = [f"misses {key}" for key in own if key not in state]
    problems += [f"has unexpected {key}" for key in state if key not in own]
    for key, value in own.items():
        found = state.get(key, value)
        if isinstance(value, Tensor):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if shape != tuple(value.shape):
                problems.append(f"{key} has shape {shape}, expected {tuple(value.shape)}")
            elif not torch.can_cast(found.dtype, value.dtype):
                problems.append(f"{key} has {found.dtype}, expected {value.dtype}")
    return problems + definition_differences(module, state)


def listed(problems: list[str], most: int = 20) -> str:
    """All in one line, or the first of very many."""
    more = [f"and {len(problems) - most} more"] * (len(problems) > most)
    return "; ".join([*problems[:most], *more])


def _as_json(description: Mapping[str, Any]) -> dict[str, Json]:
    try:
        return json.loads(json.dumps(description, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"description: got {description!r}, expected JSON: {error}") from error


def _compare(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = differences(stored, expected)
    if found:
        raise CheckpointError(f"{path}: of another model: {'; '.join(found)}")


def differences(stored: object, expected: object, where: str = "") -> list[str]:
    """What two nested mappings have otherwise, each by its keys with both values."""
    if not (isinstance(stored, Mapping) and isinstance(expected, Mapping)):
        return [] if stored == expected else [f"{where}: got {stored!r}, expected {expected!r}"]
    found = []
    for key in sorted({*stored, *expected}):
        inner = f"{where}.{key}" if where else key
        if key not in expected:
            found.append(f"{inner}: got {stored[key]!r}, expected none")
        elif key not in stored:
            found.append(f"{inner}: got none, expected {expected[key]!r}")
        else:
            found += differences(stored[key], expected[key], inner)
    return found
