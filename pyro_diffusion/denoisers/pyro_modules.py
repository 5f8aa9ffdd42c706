"""Denoisers made of Pyro modules: parameters and random weights, taken where the model runs."""

import contextlib
from collections import OrderedDict
from typing import Any, ClassVar, Self, TypeVar

from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

__all__ = ["in_this_run"]

M = TypeVar("M", bound=nn.Module)


def in_this_run(module: M) -> M:
    """A module as the running model has it: with every value that Pyro manages, taken here and once.

    A ``PyroModule`` makes its ``param`` and ``sample`` statements when an attribute is accessed, under the
    names and values that hold while the enclosing model runs. Distributions score after that, so they take
    what is returned: a copy that shares all else and makes no statements. A module without Pyro modules in it
    is returned as it is.

    Args:
        module: any module; ``PyroModule`` parts may be anywhere in it.

    Returns:
        The same, or a copy whose ``PyroParam``, ``PyroSample`` and ``Parameter`` attributes are fixed.

    Raises:
        ValueError: for random weights outside of a model, which would see no site, or inside a plate.
    """
    parts = [m for m in module.modules() if _is_managed(m)]
    if not parts:
        return module
    random = [m for m in parts if m._pyro_samples or _declared(m, PyroSample)]
    if random and not (am_i_wrapped() or any(map(_is_active, module.modules()))):
        raise ValueError(
            f"denoiser: got random weights (PyroSample) in a {type(random[0]).__name__} with no model around "
            "that runs under inference or a handler, expected the distribution to be built inside the model, "
            "so that the weights are its sites (Predictive draws them from a posterior)"
        )
    with contextlib.ExitStack() as contexts, _OutsidePlates():
        return _copied(module, {}, contexts)


class _OutsidePlates(Messenger):
    """Refuse a weight of its own for every datum."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["cond_indep_stack"]:
            plates = ", ".join(frame.name for frame in msg["cond_indep_stack"])
            raise ValueError(
                f"denoiser: got random weights {msg['name']!r} inside the plate(s) {plates}, expected them "
                "outside of all plates: build the distribution before the plate that it is sampled in, and "
                "run particles and predictions one by one (vectorize_particles=False, parallel=False)"
            )


class _Fixed:
    """In place of a Pyro module's context: never active, so nothing is stated."""

    active = 0
    used = True
    param_state: ClassVar[dict[str, dict[str, Any]]] = {"params": {}, "constraints": {}}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def get(self, name: str) -> None:
        """Nothing is remembered."""

    def set(self, name: str, value: Tensor) -> None:
        """Nothing is remembered."""


def _is_managed(module: nn.Module) -> bool:
    """Whether Pyro has a say in what the module's own attributes are, and was not asked yet."""
    if not isinstance(module, PyroModule) or issubclass(type(module._pyro_context), _Fixed):
        return False
    own = module._parameters or module._pyro_params or module._pyro_samples
    return bool(own or _declared(module, PyroParam | PyroSample))


def _is_active(module: nn.Module) -> bool:
    return isinstance(module, PyroModule) and bool(module._pyro_context.active)


def _declared(module: nn.Module, kind: Any) -> list[str]:
    """Names of a class's attributes that were declared by decorators."""
    return [
        name for c in type(module).__mro__ for name, v in vars(c).items() if isinstance(v, kind)
    ]


def _copied(module: Any, done: dict[int, Any], contexts: contextlib.ExitStack) -> Any:
    """A copy of what Pyro manages; the rest is shared."""
    if id(module) in done:
        return done[id(module)]
    if not any(map(_is_managed, module.modules())):
        return done.setdefault(id(module), module)
    pyro_module = isinstance(module, PyroModule)
    if pyro_module:
        contexts.enter_context(module._pyro_context)
    copy = done[id(module)] = object.__new__(type(module))
    state = {k: v for k, v in module.__dict__.items() if k != "_compiled_call_impl"}
    copy.__dict__.update(state)
    # Through the attribute, which gives a part its name in the whole.
    parts = {
        name: getattr(module, name) if pyro_module and part is not None else part
        for name, part in module._modules.items()
    }
    if pyro_module:
        _fix(module, copy)
    copy.__dict__["_modules"] = {
        name: part if part is None else _copied(part, done, contexts)
        for name, part in parts.items()
    }
    return copy


def _fix(module: Any, copy: Any) -> None:
    """Take what Pyro manages of a module into its copy."""
    own = [name for name in module._parameters if not name.endswith("_unconstrained")]
    declared = _declared(module, PyroParam | PyroSample)
    drawn = {name: getattr(module, name) for name in (*declared, *module._pyro_samples)}
    drawn |= {name: getattr(module, name) for name in module._pyro_params}
    for name in own:
        getattr(module, name)  # states the parameter
    # As buffers, so that gradients, devices and dtypes see them; and where attributes are found first.
    copy.__dict__ |= {
        **drawn,
        "_pyro_context": _Fixed(),
        "_pyro_samples": OrderedDict(),
        "_pyro_params": OrderedDict(),
        "_parameters": dict(module._parameters),
        "_buffers": {**module._buffers, **drawn},
    }
