"""Nested states as JSON, with their tensors put aside."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class StateDict(OrderedDict[Any, Any]):
    """The state dict of a module with what torch knows of it: the versions of its parts."""

    _metadata: OrderedDict[Any, Any]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._metadata = OrderedDict()


def encode(value: object, where: str, path: tuple[object, ...], tensors: dict[str, Tensor]) -> Json:
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
        node: dict[str, Json] = {
            "dict": [
                [_encode_key(key, where), encode(item, f"{where}[{key!r}]", (*path, key), tensors)]
                for key, item in value.items()
            ]
        }
        metadata = getattr(value, "_metadata", None)
        if isinstance(metadata, Mapping):  # the state dict of a module
            known = {k: _known(entry) for k, entry in metadata.items()}
            node["metadata"] = encode(known, f"metadata of {where}", path, tensors)
        return node
    if isinstance(value, list | tuple):
        return {
            "tuple" if isinstance(value, tuple) else "list": [
                encode(item, f"{where}[{index}]", (*path, index), tensors)
                for index, item in enumerate(value)
            ]
        }
    raise TypeError(
        f"{where}: got {type(value).__name__}, expected a tensor, array, number, string, boolean, "
        "None, mapping, list or tuple"
    )


def _known(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a module's metadata: torch's version and our definition."""
    return {key: entry[key] for key in ("version", "definition") if key in entry}


def _encode_key(key: object, where: str) -> Json:
    held: dict[str, Tensor] = {}
    encoded = encode(key, f"key {key!r} of {where}", (), held)
    if held:
        raise TypeError(f"key {key!r} of {where}: expected strings, numbers, None or tuples")
    return encoded


def _put(value: Tensor, where: str, path: tuple[object, ...], tensors: dict[str, Tensor]) -> str:
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    if not plain or value.dtype == torch.complex128:
        kind = f"{value.layout}, {value.dtype} on {value.device}"
        raise TypeError(f"{where}: got {kind}, expected a plain tensor")
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


def decode(node: Json, tensors: Mapping[str, Tensor]) -> object:
    """Inverse of :func:`encode`."""
    match node:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"array": str(name)}:
            return tensors[name].numpy()
        case {"float": str(text)}:
            return float(text)
        case {"list": list(items)}:
            return [decode(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(decode(item, tensors) for item in items)
        case {"dict": list(items), "metadata": {"dict": list(entries)}}:
            state = StateDict(_decode_pair(item, tensors) for item in items)
            for path, entry in (_decode_pair(entry, tensors) for entry in entries):
                if not (isinstance(entry, dict) and isinstance(entry.get("definition", {}), dict)):
                    raise ValueError(f"unknown metadata {entry!r}")
                state._metadata[path] = entry
            return state
        case {"dict": list(items)}:
            return dict(_decode_pair(item, tensors) for item in items)
        case dict() | list():
            raise ValueError(f"unknown entry {node!r}")
    return node


def _decode_pair(node: Json, tensors: Mapping[str, Tensor]) -> tuple[object, object]:
    match node:
        case [key, item]:
            return decode(key, tensors), decode(item, tensors)
    raise ValueError(f"unknown pair {node!r}")
