"""A model as names and arguments, and back: what it is built of, without its weights."""

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor, nn

from pyro_diffusion.checkpoint.registry import lookup, name_of
from pyro_diffusion.nn.definition import DefinedModule, constructor_arguments, plain_class

__all__ = ["Builder", "Describer"]

_PLAIN = (bool, int, float, str, Tensor, np.ndarray, np.generic)
_REGISTER = "one that pyro_diffusion has, or that checkpoint.register was given"


class Describer:
    """Turns a model into nested mappings of names and arguments.

    Attributes:
        roots: modules that are within no other one, by where they are.
        network: the only module of an unknown class, if there is one.
    """

    def __init__(self) -> None:
        self.roots: dict[str, nn.Module] = {}
        self.network: nn.Module | None = None
        self._seen: dict[int, str] = {}

    def describe(self, value: Any, where: str, root: nn.Module | None = None) -> Any:
        """The description of a value.

        Raises:
            ValueError: naming what cannot be described.
        """
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, list | tuple):
            items = [self.describe(v, f"{where}[{i}]", root) for i, v in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, nn.ModuleDict):
            value = dict(value.items())
        if isinstance(value, Mapping):
            return {
                "mapping": {k: self.describe(v, _below(where, k), root) for k, v in value.items()}
            }
        if isinstance(value, FunctionType):
            return {"function": self._name(value, value.__name__, where)}
        if type(value) is TransformedDistribution:  # a ProbabilityFlow is one, too
            parts = {"base_distribution": value.base_dist, "transforms": value.transforms}
            arguments = {k: self.describe(v, _below(where, k), root) for k, v in parts.items()}
            return {"class": "pyro.TransformedDistribution", "arguments": arguments}
        return self._describe_object(value, where, root)

    def _describe_object(self, value: Any, where: str, root: nn.Module | None) -> Any:
        if isinstance(value, nn.Module):
            if id(value) in self._seen:
                return {"same": self._seen[id(value)]}
            self._seen[id(value)] = where
            if root is None:
                root = self.roots[where] = value
            elif all(value is not part for part in root.modules()):
                raise ValueError(
                    f"{where}: got a {type(value).__name__} that its owner does not keep as a submodule, "
                    "expected one whose weights are in the owner's state dict"
                )
            if name_of(type(value)) is None and not isinstance(value, DefinedModule):
                return self._leave_out(value, where)
        cls: Any = type(value)
        if isinstance(value, nn.Module):
            cls = plain_class(cls)
        name = self._name(cls, cls.__name__, where)
        try:
            arguments = constructor_arguments(value, cls)
        except ValueError as error:
            raise ValueError(
                f"{where}: {cls.__name__}: {error} (or the class registered before the object was built)"
            ) from error
        described = {k: self.describe(v, _below(where, k), root) for k, v in arguments.items()}
        return {"class": name, "arguments": described}

    def _leave_out(self, value: nn.Module, where: str) -> dict[str, str]:
        """A network that whoever loads the model will bring."""
        if "_orig_mod" in value._modules:
            raise ValueError(
                f"{where}: got what torch.compile returned, whose weights have other names, expected the "
                "module that it was given, or one compiled in place by its method compile()"
            )
        if self.network is not None:
            raise ValueError(
                f"{where}: got a {type(value).__name__} beside a {type(self.network).__name__} at "
                f"{self._seen[id(self.network)]}, both unknown, expected at most one that is not {_REGISTER}"
            )
        self.network = value
        return {"network": type(value).__name__}

    @staticmethod
    def _name(value: Any, shown: str, where: str) -> str:
        name = name_of(value)
        if name is None:
            raise ValueError(f"{where}: got {shown}, expected {_REGISTER}")
        return name


class Builder:
    """Builds what a :class:`Describer` described, weights aside.

    Args:
        network: what stands for the module of an unknown class.
        ready: called with every module that is within no other one, and where it is, before anything else
            is built with it.
        device: of tensors that are outside of modules.

    Attributes:
        used: whether the network had its place.
    """

    def __init__(
        self,
        network: nn.Module | None,
        ready: Callable[[nn.Module, str], None],
        device: torch.device | str | None = None,
    ) -> None:
        self.network, self.ready, self.device = network, ready, device
        self.used = False
        self._built: dict[str, Any] = {}

    def build(self, node: Any, where: str, inside: bool = False) -> Any:
        """The value of a description.

        Raises:
            ValueError: naming what is unknown, or refused by its class.
        """
        match node:
            case Tensor():
                return node if inside else node.to(self.device)
            case list() | tuple():
                items = [self.build(v, f"{where}[{i}]", inside) for i, v in enumerate(node)]
                return items if isinstance(node, list) else tuple(items)
            case {"mapping": dict(items), **rest} if not rest:
                return {k: self.build(v, _below(where, k), inside) for k, v in items.items()}
            case {"function": str(name), **rest} if not rest:
                return self._known(name, where, FunctionType)
            case {"same": str(place), **rest} if not rest and place in self._built:
                return self._built[place]
            case {"network": str(name), **rest} if not rest:
                return self._given(name, where, inside)
            case {"class": str(name), "arguments": dict(arguments), **rest} if not rest:
                return self._build_object(name, arguments, where, inside)
            case dict():
                raise ValueError(f"{where}: got the entry {node!r}, expected a part of a model")
        return node

    def _build_object(self, name: str, arguments: dict[Any, Any], where: str, inside: bool) -> Any:
        known = {"pyro.TransformedDistribution": TransformedDistribution}
        cls = known.get(name) or self._known(name, where, type)
        module = issubclass(cls, nn.Module)
        inner = inside or module
        built = {k: self.build(v, _below(where, k), inner) for k, v in arguments.items()}
        _check_arguments(cls, built, where)
        try:
            value = cls(**built)
        except Exception as error:  # whatever a class makes of what a file says
            raise ValueError(f"{where}: refused by {cls.__name__}: {error}") from error
        if module:
            self._built[where] = value
            if not inside:
                self.ready(value, where)
        return value

    def _given(self, name: str, where: str, inside: bool) -> nn.Module:
        if self.network is None:
            raise ValueError(
                f"{where}: got a network of class {name!r}, expected {_REGISTER}; or give network=, a module "
                "of that class"
            )
        self.used = True
        if not inside:
            self.ready(self.network, where)
        return self.network

    @staticmethod
    def _known(name: str, where: str, kind: type) -> Any:
        value = lookup(name)
        if not isinstance(value, kind):
            what = "class" if kind is type else "function"
            raise ValueError(f"{where}: got the {what} {name!r}, expected {_REGISTER}")
        return value


def _check_arguments(cls: Any, given: dict[str, Any], where: str) -> None:
    """Refuse arguments that this version's class does not know, or misses."""
    signature = inspect.signature(cls)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(
            f"{where}: got arguments {', '.join(map(str, given)) or 'none'} ({error}), expected "
            f"{cls.__name__}{signature} of this version"
        ) from error


def _below(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)
