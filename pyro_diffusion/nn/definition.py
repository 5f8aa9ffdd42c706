"""Modules whose state dict says what they are, so that it is not loaded into something else."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from types import FunctionType
from typing import Any, Self

from pyro.nn import PyroModule
from torch import nn

__all__ = ["DefinedModule", "Recorded", "constructor_arguments", "definition_differences"]

_KEY = "definition"
_SKIP = object()


class Recorded:
    """An object that remembers the arguments it was built with, so that it can be built again.

    :func:`constructor_arguments` has them by name. Copies and pickles keep them, since they are an attribute.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """The object, before its constructor runs."""
        self = object.__new__(cls)
        # past nn.Module, which takes no attributes before its own constructor ran
        self.__dict__["_built_with"] = (args, kwargs)
        return self


def constructor_arguments(value: Any, cls: Any) -> dict[str, Any]:
    """The arguments that build an object like this one again, defaults included.

    Those that were recorded (:class:`Recorded`), but modules among them as they are now; of other objects
    the attributes that are called as the arguments are, as in scikit-learn.

    Args:
        value: the object.
        cls: its class, or the one that was turned into a Pyro module.

    Raises:
        ValueError: naming an argument that is kept nowhere.
    """
    if cls.__init__ in (object.__init__, nn.Module.__init__):
        return {}
    signature = inspect.signature(cls.__init__)
    parameters = list(signature.parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        raise ValueError(
            f"got a constructor {cls.__name__}{signature}, expected named arguments only"
        )
    if "_built_with" in vars(value):
        args, kwargs = vars(value)["_built_with"]
        bound = signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        found = dict(list(bound.arguments.items())[1:])
        for p in parameters:
            if p.kind is p.VAR_KEYWORD:
                found |= found.pop(p.name)
        return {name: _present(value, name, given) for name, given in found.items()}
    found = {}
    for p in parameters:
        kept = next((key for key in (p.name, f"_{p.name}") if hasattr(value, key)), None)
        if kept is None:
            raise ValueError(
                f"got no attribute {p.name!r}, expected the constructor's argument in it"
            )
        found[p.name] = getattr(value, kept)
    return found


def _present(value: Any, name: str, given: Any) -> Any:
    """An argument, or the module that has taken its place."""
    if not isinstance(given, nn.Module):
        return given
    children: Mapping[str, Any] = getattr(value, "_modules", {})
    return next((children[key] for key in (name, f"_{name}") if key in children), given)


class DefinedModule(Recorded, nn.Module):
    r"""A module that is defined by more than its weights: the ends of a schedule, a parameterization.

    Its :meth:`definition` travels in the *metadata* of its state dict, beside the version that torch keeps
    there: keys and tensors of the state dict are the same with and without it. Loading compares it, so that
    a model that was trained on a log-SNR from 7 to -7 is not loaded into one from 10 to -7.
    :mod:`pyro_diffusion.checkpoint`, ``torch.save`` and copies keep the metadata. A state dict without it,
    such as an older file or a plain ``dict(state)``, is loaded unchecked: with the latter you give trained
    weights to another model on purpose.
    """

    def definition(self) -> dict[str, Any]:
        """What defines the module beside its weights, buffers and submodules.

        By default its class and those arguments of its constructor that it keeps under their names and that
        are numbers, strings, None, functions, frozen dataclasses, or sequences and mappings of these; of
        submodules of this kind, which have a definition of their own, the class.
        """
        cls: Any = type(self)
        found: dict[str, Any] = {"class": _name(cls)}
        for name in _arguments(cls):
            # not by getattr, which in a Pyro module may be a sample statement
            kept = (vars(self), self._modules)
            value = next((d[key] for key in (name, f"_{name}") for d in kept if key in d), _SKIP)
            plain = _plain(value)
            if plain is not _SKIP:
                found[name] = plain
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch, but a state dict of a model defined otherwise is refused before anything changes.

        Raises:
            ValueError: naming what differs, with both values.
            RuntimeError: as in torch, for other names or shapes.
        """
        differences = definition_differences(self, state_dict)
        if differences:
            raise ValueError(f"state_dict: of another model: {'; '.join(differences)}")
        return super().load_state_dict(state_dict, strict, assign)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_KEY] = self.definition()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        # Within a module that is not of this kind; torch raises what is put among the errors.
        stored = local_metadata.get(_KEY)
        if stored is not None:
            args[-1].extend(_differences(prefix, stored, self.definition()))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def definition_differences(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """What a state dict says of itself and the module says otherwise, each with both values.

    Args:
        module: any module; its submodules are compared, too.
        state: a state dict; one without metadata says nothing.
    """
    metadata = getattr(state, "_metadata", None) or {}
    found = []
    for path, part in module.named_modules():
        stored = metadata.get(path, {}).get(_KEY)
        if stored is not None and isinstance(part, DefinedModule):
            found += _differences(f"{path}." if path else "", stored, part.definition())
    return found


def _differences(prefix: str, stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    if stored.get("class") != own["class"]:
        where = prefix[:-1] or "the module"
        return [f"{where}: got {stored.get('class')}, expected {own['class']}"]
    # Arguments that one of two versions does not know say nothing.
    shared = [name for name in own if name in stored and not _same(stored[name], own[name])]
    return [
        f"{prefix}{name}: got {_shown(stored[name])}, expected {_shown(own[name])}"
        for name in shared
    ]


def _same(one: Any, other: Any) -> bool:
    match one, other:
        case {"module": _}, {"module": _}:
            return True  # the two are compared where they are
        case Mapping(), Mapping():
            return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
        case (list() | tuple(), list() | tuple()):
            return len(one) == len(other) and all(map(_same, one, other))
        case (float(), int() | float()) | (int(), float()):
            # some are computed, and libraries round alike only to a few bits
            return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _shown(value: Any) -> str:
    match value:
        case {"module": name} | {"function": name}:
            return str(name)
        case {"class": name, **rest}:
            return f"{name}({', '.join(f'{k}={v!r}' for k, v in rest.items())})"
    return repr(value)


def _plain(value: Any) -> Any:
    """The value as something that can be stored and compared, if it is simple enough."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, DefinedModule):
        cls: Any = type(value)
        return {"module": _name(cls)}
    if isinstance(value, FunctionType):
        return {"function": value.__name__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return _whole({"class": type(value).__name__, **fields})
    if isinstance(value, Mapping):
        return _whole({str(k): _plain(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return _whole({i: _plain(v) for i, v in enumerate(value)}, list)
    return _SKIP


def _whole(parts: dict[Any, Any], build: type = dict) -> Any:
    """The parts together, if each is simple enough."""
    if any(part is _SKIP for part in parts.values()):
        return _SKIP
    return parts if build is dict else list(parts.values())


@functools.cache
def _arguments(cls: Any) -> tuple[str, ...]:
    """Names of the arguments of a class's constructor and of its bases' constructors."""
    names: dict[str, None] = {}
    for base in cls.__mro__[: cls.__mro__.index(DefinedModule)]:
        if "__init__" in vars(base):
            names |= dict.fromkeys(list(inspect.signature(base.__init__).parameters)[1:])
    return tuple(names)


@functools.cache
def plain_class(cls: Any) -> Any:
    """The class that was turned into a Pyro module, if it was."""
    return next(base for base in cls.__mro__ if not issubclass(base, PyroModule))


def _name(cls: Any) -> str:
    return plain_class(cls).__name__
