"""The names under which classes and functions stand in a file: a list, never an import by name."""

import functools
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any, TypeVar

import pyro.distributions as dist
from torch import nn

from pyro_diffusion.nn.definition import Recorded, plain_class

__all__ = ["lookup", "name_of", "register"]

C = TypeVar("C", bound=Callable[..., Any])

# Of these modules every public class; of others what is listed.
_MODULES = (
    "schedules",
    "processes",
    "denoisers",
    "distributions",
    "samplers",
    "dynamics",
    "nn",
    "guidance",
)
_MORE = {
    "denoisers.unit_variance": ("denoisers", "unit_variance"),
    "distributions.StringDecoder": ("distributions.decoders", "StringDecoder"),
    "dynamics.gaussian": ("dynamics.trace_estimators", "gaussian"),
    "dynamics.rademacher": ("dynamics.trace_estimators", "rademacher"),
    "dynamics.sphere": ("dynamics.trace_estimators", "sphere"),
    "foreign.AzulaDenoiser": ("foreign.azula", "AzulaDenoiser"),
    "foreign.FlowTime": ("foreign.timesteps", "FlowTime"),
    "foreign.LearnedRange": ("foreign.learned_range", "LearnedRange"),
    "foreign.LinearBetaTime": ("foreign.timesteps", "LinearBetaTime"),
    "foreign.MaskedLogits": ("foreign.masked_lm", "MaskedLogits"),
    "foreign.QuarterLogSigma": ("foreign.timesteps", "QuarterLogSigma"),
    "foreign.ScalesSchedule": ("foreign.azula", "ScalesSchedule"),
    "foreign.Sigma": ("foreign.timesteps", "Sigma"),
    "foreign.TableTime": ("foreign.timesteps", "TableTime"),
    "foreign.TimestepNetwork": ("foreign.timesteps", "TimestepNetwork"),
}
_TRANSFORMS = (
    "AffineTransform ComposeTransform CorrCholeskyTransform ExpTransform IndependentTransform "
    "LowerCholeskyAffine LowerCholeskyTransform Permute PowerTransform ReshapeTransform SigmoidTransform "
    "SoftmaxTransform SoftplusTransform StickBreakingTransform TanhTransform"
)
_NOISES = "Beta Cauchy Gamma Gumbel Laplace LogNormal Normal SoftLaplace StudentT Uniform"

_registered: dict[str, Any] = {}


def register(value: C) -> C:
    """Lets :func:`save_model` and :func:`load_model` know a class or function of yours, by its name.

    A decorator for networks, schedules, processes, denoisers, decoders, and functions that they take. A
    network remembers from then on what it is built with. The arguments must be numbers, strings, tensors,
    sequences and mappings of these, or other parts of a model. A program that loads the file registers the
    same names first: nothing is imported, and no code is run, because a file says so.

    Args:
        value: the class or function; registered again under its name, as in a notebook, it takes the place
            of the earlier one.

    Returns:
        The same.

    Raises:
        TypeError: for anything but a class or a function with a name.

    Example:
        >>> import torch
        >>> @register
        ... class Linear(torch.nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(size, size)
        ...     def forward(self, x, log_snr):
        ...         return self.layer(x)
    """
    if not isinstance(value, type | FunctionType) or not value.__name__.isidentifier():
        raise TypeError(f"value: got {value!r}, expected a class or a function with a name")
    if isinstance(value, type) and issubclass(value, nn.Module) and not issubclass(value, Recorded):
        value.__new__ = Recorded.__new__  # type: ignore[method-assign, assignment]
    _registered[value.__name__] = value
    return value


def name_of(value: Any) -> str | None:
    """The name of a class or function in files; None if it has none."""
    if isinstance(value, type):
        value = plain_class(value)
    name = getattr(value, "__name__", None)
    if name is not None and _registered.get(name) is value:
        return str(name)
    return _names().get(value)


def lookup(name: str) -> Any:
    """The class or function of a name; None if there is none."""
    return _own().get(name, _registered.get(name))


@functools.cache
def _own() -> dict[str, Any]:
    """What the package itself has names for. Imported late: it stands above this module."""
    found: dict[str, Any] = {}
    for name in _MODULES:
        module = import_module(f"pyro_diffusion.{name}")
        public = {key: getattr(module, key) for key in module.__all__}
        found |= {f"{name}.{key}": v for key, v in public.items() if isinstance(v, type)}
    for name, (place, key) in _MORE.items():
        found[name] = getattr(import_module(f"pyro_diffusion.{place}"), key)
    for key in _TRANSFORMS.split():
        found[f"pyro.{key}"] = getattr(dist.transforms, key)
    for key in _NOISES.split():
        found[f"pyro.{key}"] = getattr(dist, key)
    return found


@functools.cache
def _names() -> dict[Any, str]:
    return {value: name for name, value in _own().items()}
