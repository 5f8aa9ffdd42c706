"""Checkpoints: nested states and modules in one safetensors file.

A checkpoint holds everything in a single file that is replaced in one step, so that tensors,
numbers and description belong together whenever the process is killed. Tensors are stored the
safetensors way; the rest is JSON in the metadata of the file. Loading runs no code from the file.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

FORMAT = "pyro_diffusion"
VERSION = 1

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class CheckpointError(ValueError):
    """A file is no readable checkpoint, or is the checkpoint of something else."""


def save(
    path: str | os.PathLike[str],
    state: Mapping[Any, Any],
    description: Mapping[str, Any] | None = None,
) -> None:
    """Writes a nested state to one file, all or nothing.

    The bytes go to ``.<name>.tmp`` in the same folder, are flushed to the disk, and the file then
    takes its name in one step: a process killed at any moment leaves either the old checkpoint or
    the new one. One process may write to a path at a time.

    Args:
        path: the file, by convention ``*.safetensors``.
        state: nested mappings, lists and tuples of tensors, numpy arrays, numbers, strings,
            booleans and ``None``: state dicts of modules and of
            :class:`~pyro_diffusion.optim.EMA`, what ``PyroOptim.get_state()`` and
            ``pyro.util.get_rng_state()`` return, counters. Keys of mappings may be strings,
            numbers, booleans, ``None`` and tuples of these. Mappings come back as ``dict``,
            subclasses of tuple as ``tuple``, numpy scalars as Python's; tensors that share memory
            come back apart.
        description: what the state belongs to, e.g. the arguments the model was built with, as a
            JSON object. :func:`load` compares it.

    Raises:
        TypeError: if the state holds anything else, naming where, or the description is not JSON.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got {type(state).__name__}, expected a mapping")
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", (), tensors)
    header = {"version": VERSION, "description": _as_json(description or {}), "state": tree}
    header["checksum"] = _checksum(header, tensors)
    data = safetensors.torch.save(tensors, metadata={FORMAT: json.dumps(header, allow_nan=False)})
    _replace(path, data)


def load(
    path: str | os.PathLike[str], description: Mapping[str, Any] | None = None
) -> dict[Any, Any]:
    """Reads back what :func:`save` wrote.

    Args:
        path: the file.
        description: what is being loaded into; compared with the stored one if given.

    Returns:
        The nested state, its tensors on the CPU. ``load_state_dict`` of modules and torch
        optimizers moves them to where they belong. ``PyroOptim.set_state`` must be called *before*
        the first step of a fresh optimizer: it hands a state out when it first meets a parameter,
        and never afterwards.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or no checkpoint, or if the descriptions
            differ, naming the keys with both values.
    """
    path = Path(path)
    header, tensors = _read(path)
    if description is not None:
        _compare(path, header["description"], _as_json(description))
    try:
        state = _decode(header["state"], tensors)
        if not isinstance(state, dict):
            raise TypeError(f"got {type(state).__name__}, expected dict")
        return state
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, the stored state does not fit: {error}") from error


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the description stored in a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, damaged or no checkpoint.
    """
    return _read(Path(path))[0]["description"]


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
        FileNotFoundError: if there is no such file.
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
        CheckpointError: naming every key that is missing, unexpected or of another shape; the
            module is then left as it was.
    """
    own = module.state_dict()
    problems = [f"misses {key}" for key in own if key not in state]
    problems += [f"has unexpected {key}" for key in state if key not in own]
    for key, value in own.items():
        found = state.get(key, value)
        if isinstance(value, Tensor):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if shape != tuple(value.shape):
                problems.append(f"{key} has shape {shape}, expected {tuple(value.shape)}")
    if problems:
        raise CheckpointError(f"{name}: of another module: {'; '.join(problems)}")
    module.load_state_dict(state)


def _as_json(description: Mapping[str, Any]) -> dict[str, Json]:
    try:
        return json.loads(json.dumps(description, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"description: got {description!r}, expected JSON: {error}") from error


def _encode(
    value: object, where: str, path: tuple[object, ...], tensors: dict[str, Tensor]
) -> Json:
    """Turns a state into JSON, putting its tensors aside under readable names.

    Strings, finite numbers, booleans and None stand for themselves; anything else becomes an object
    with a single key that says what it is.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        return {"tensor": _put(value, where, path, tensors)}
    if isinstance(value, np.ndarray):
        return {"array": _put(_from_numpy(value, where), where, path, tensors)}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_encode_key(key, where), _encode(item, f"{where}[{key!r}]", (*path, key), tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        return {
            "tuple" if isinstance(value, tuple) else "list": [
                _encode(item, f"{where}[{index}]", (*path, index), tensors)
                for index, item in enumerate(value)
            ]
        }
    raise TypeError(
        f"{where}: got {type(value).__name__}, expected a tensor, array, number, string, boolean, "
        "None, mapping, list or tuple"
    )


def _encode_key(key: object, where: str) -> Json:
    held: dict[str, Tensor] = {}
    encoded = _encode(key, f"key {key!r} of {where}", (), held)
    if held:
        raise TypeError(f"key {key!r} of {where}: expected strings, numbers, None or tuples")
    return encoded


def _put(value: Tensor, where: str, path: tuple[object, ...], tensors: dict[str, Tensor]) -> str:
    if value.layout != torch.strided or value.is_quantized or value.dtype == torch.complex128:
        raise TypeError(f"{where}: got {value.layout}, {value.dtype}, expected a plain tensor")
    base = name = "/".join(str(key) for key in path) or "tensor"
    count = 1
    # taken by a key such as "a/b" beside "a" with "b", or by the format itself
    while name in tensors or name == "__metadata__":
        count += 1
        name = f"{base}#{count}"
    # a copy of its own: safetensors stores neither shared memory nor strides
    tensors[name] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return name


def _from_numpy(value: np.ndarray, where: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: got an array of {value.dtype}, expected numbers") from error


def _decode(node: Json, tensors: Mapping[str, Tensor]) -> object:
    """Inverse of :func:`_encode`."""
    match node:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"array": str(name)}:
            return tensors[name].numpy()
        case {"float": str(text)}:
            return float(text)
        case {"list": list(items)}:
            return [_decode(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(_decode(item, tensors) for item in items)
        case {"dict": list(items)}:
            return dict(_decode_pair(item, tensors) for item in items)
        case dict() | list():
            raise ValueError(f"unknown entry {node!r}")
    return node


def _decode_pair(node: Json, tensors: Mapping[str, Tensor]) -> tuple[object, object]:
    match node:
        case [key, item]:
            return _decode(key, tensors), _decode(item, tensors)
    raise ValueError(f"unknown pair {node!r}")


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of everything a state is made of; safetensors itself notices only truncation."""
    parts = {key: header[key] for key in ("version", "description", "state")}
    crc = zlib.crc32(json.dumps(parts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name, too, must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # copies: the file's own pages would follow whatever happens to the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated, damaged or no safetensors: {error}") from error
    if FORMAT not in metadata:
        raise CheckpointError(f"{path}: got safetensors without a {FORMAT} header")
    try:
        header = json.loads(metadata[FORMAT])
        version, stored = header["version"], header["checksum"]
        computed = _checksum(header, tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from error
    if version != VERSION:
        raise CheckpointError(f"{path}: got format version {version}, expected {VERSION}")
    if stored != computed:
        raise CheckpointError(f"{path}: damaged, got checksum {computed}, expected {stored}")
    return header, tensors


def _compare(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    differences = _differences(stored, expected, "")
    if differences:
        raise CheckpointError(f"{path}: of another model: {'; '.join(differences)}")


def _differences(stored: object, expected: object, where: str) -> list[str]:
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
            found += _differences(stored[key], expected[key], inner)
    return found
