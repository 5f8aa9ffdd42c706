"""A Pyro program as one torch module: everything it trains, and its loss in a unit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions import Distribution
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_diffusion.likelihoods.run import is_computed
from pyro_diffusion.train.batches import Arguments, rows_of, to_device
from pyro_diffusion.train.units import Unit
from pyro_diffusion.validation import kind_of

__all__ = ["Program"]


class Program(nn.Module):
    """Model, guide and ELBO; calling it gives the loss.

    What it trains is known after :meth:`prepare`, which runs it once:

    - the parameters of model and guide, where they are modules or methods of modules, as
      ``ELBO()(model, guide).parameters()``;
    - the parameters in Pyro's store that the run used, by ``pyro.param``, ``pyro.module`` or a
      ``PyroModule`` in Pyro's default mode.

    Attributes:
        parts: the modules that hold them, with all their other tensors. Modules of a plain function are found
            by being called and having a parameter in the store; parameters of no module share
            one of their own.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], elbo: ELBO, unit: Unit
    ) -> None:
        super().__init__()
        self._callables = model, guide  # a tuple, so that they are not registered twice
        self.unit = unit
        self._elbo: Callable[..., Tensor] = elbo.differentiable_loss  # type: ignore[attr-defined]
        self.parts = nn.ModuleDict()
        self._trained: list[tuple[str, Tensor]] = []
        self._full_size: int | None = None
        self._coordinates = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO of one datum, in the unit; differentiable, one draw of the program's noise."""
        store = pyro.get_param_store()
        known = len(store)
        loss = self._elbo(*self._callables, *args, **kwargs)
        if len(store) > known:
            new = sorted(list(store)[known:])
            raise ValueError(
                f"model: got parameters {new} that its first run had not, expected all at the first run"
            )
        rows = self._full_size or rows_of(args, kwargs)
        return loss / (rows * self.unit.of_datum(self._coordinates))

    def trained(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of what is trained, unconstrained, in an order that is the same in each run."""
        return self._trained

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self._trained[0][1].device

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Run once, which creates parameters that do not exist yet, and find what there is to train.

        Raises:
            ValueError: if that is nothing, or the unit has no meaning for what the program observes.
        """
        run, there = _Run(), None
        called: list[nn.Module] = []
        try:
            with run, _recording(called):
                self._elbo(*self._callables, *args, **kwargs)
        except Exception as error:
            owned = [p for m in _owners(*self._callables).values() for p in m.parameters()]
            there = _elsewhere([*owned, *run.parameters.values()], (args, kwargs))
            if there is None:
                parts: list[tuple[object, Any]] = [*enumerate(args), *kwargs.items()]
                shapes = {name: tuple(part.shape) for name, part in parts if hasattr(part, "shape")}
                error.add_note(
                    f"data: got batches of shapes {shapes}, expected arguments of the model"
                )
                raise
        if there is not None:
            args, kwargs = to_device((args, kwargs), there)
            self.prepare(*args, **kwargs)
            return
        self._measure(run, args, kwargs)
        self._collect(run, called)

    def _collect(self, run: "_Run", called: list[nn.Module]) -> None:
        """Find what a run used: modules and parameters."""
        owners = _owners(*self._callables)
        self.parts.update(owners)
        own = {id(p) for m in owners.values() for p in m.parameters()}
        names = {id(p): name for name, p in run.parameters.items() if id(p) not in own}
        found = _outermost([m for m in called if any(id(p) in names for p in m.parameters())])
        self.parts.update({_name(module, names): module for module in found})
        held = {id(p) for p in self.parts.parameters()}
        alone = {n: p for n, p in sorted(run.parameters.items()) if id(p) not in held}
        if stale := sorted(run.stale & {*alone}):
            raise ValueError(
                f"model: got {stale[0]!r} of another module from Pyro's store, expected that of the module "
                "that ran; pyro.clear_param_store() before a new one takes its name"
            )
        if alone:
            self.parts["store"] = _FromStore(alone)
            names |= {
                id(p): n for n, p in zip(alone, self.parts["store"].parameters(), strict=True)
            }
        self._trained = [
            (names[id(p)] if name.startswith("store.") else name, p)
            for name, p in self.parts.named_parameters()
            if p.requires_grad and (id(p) in own or id(p) in names)
        ]
        if not self._trained:
            raise ValueError(
                "model: got a program without parameters to train, expected a PyroModule, or a function that "
                "registers its networks by pyro.module"
            )

    def _measure(self, run: "_Run", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """How many data the ELBO speaks of, and how many observed coordinates each has."""
        parts = {size: full for size, full in run.plates.values() if full > size}
        if args or kwargs:
            rows = rows_of(args, kwargs)
            wholes = {full for size, full in run.plates.values() if size == rows and full > size}
            if len(wholes) > 1:
                raise ValueError(
                    f"data: got batches of {rows} rows and plates with subsamples of as many, of "
                    f"{sorted(wholes)} in all, expected batches whose size tells which plate is theirs"
                )
            self._full_size = parts.get(rows)
            if parts and not any(rows in sizes for sizes in run.plates.values()):
                raise ValueError(
                    f"data: got batches of {rows} rows and plates of {parts} (subsample: all), expected a "
                    "plate of as many rows"
                )
        elif len(parts) == 1:
            (self._full_size,) = parts.values()
            rows = self._full_size
        else:
            raise ValueError(
                f"data: got None and a program with {len(parts)} plates of subsamples, expected data, or one "
                "such plate"
            )
        self._coordinates = sum(run.observed.values()) / (self._full_size or rows)
        if not self.unit.per_datum and self._coordinates <= 0:
            raise ValueError(
                f'unit: got "{self.unit.name}" and a program that observes nothing, expected "nats/datum"'
            )


class _Run(Messenger):
    """What a run of a program meets: its parameters, plates and observations."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Tensor] = {}
        self.stale: set[str] = set()  # those that the store had of an earlier module of this name
        self.plates: dict[str, tuple[int, int]] = {}  # size of the subsample and of the whole
        self.observed: dict[str, float] = {}  # numbers, as many as the whole plates have

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        self.parameters[msg["name"]] = leaf
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(given, nn.Parameter) and given is not leaf:
            self.stale.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        share = 1.0
        for frame in msg["cond_indep_stack"]:
            size, full = int(frame.size), int(frame.full_size or frame.size)
            self.plates[frame.name] = size, full
            share *= size / full
        observed = msg["is_observed"] and not is_computed(msg)
        if observed and isinstance(msg["value"], Tensor):
            self.observed[msg["name"]] = msg["value"].numel() / share


class _FromStore(nn.Module):
    """Parameters of Pyro's store that belong to no module."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        store = pyro.get_param_store()
        constraints = store.get_state()["constraints"]
        for name, value in tensors.items():
            # The store keeps plain tensors; torch takes a Parameter for one, as PyroModule gives it too.
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            if parameter is not value:
                store.set_state(
                    {"params": {name: parameter}, "constraints": {name: constraints[name]}}
                )
            self.register_parameter(name.replace(".", "/"), parameter)


@contextmanager
def _recording(called: list[nn.Module]) -> Iterator[None]:
    """Note every module that is called."""

    @torch.compiler.disable
    def note(module: nn.Module, _: object) -> None:
        if not any(module is other for other in called):
            called.append(module)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _elsewhere(parameters: list[Tensor], batch: Arguments) -> torch.device | None:
    """The device of the parameters that a run has met, if that is another than the batch's."""
    devices = {p.device for p in parameters}
    own = {part.device for part in (*batch[0], *batch[1].values()) if isinstance(part, Tensor)}
    return devices.pop() if len(devices) == 1 and own and own != devices else None


def _owners(model: Callable[..., Any], guide: Callable[..., Any]) -> dict[str, nn.Module]:
    """The modules that model and guide are, or are methods of."""
    found: dict[str, nn.Module] = {}
    for name, function in (("model", model), ("guide", guide)):
        while isinstance(function, partial):
            function = function.func
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if isinstance(owner, nn.Module) and not any(owner is other for other in found.values()):
            found[name] = owner
    return found


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    """Without those that are inside another."""
    inside = {id(child) for m in modules for child in m.modules() if child is not m}
    return [m for m in modules if id(m) not in inside]


def _name(module: nn.Module, names: dict[int, str]) -> str:
    """By the name in the store of one of its parameters, without that parameter's own."""
    local, full = next((n, names[id(p)]) for n, p in module.named_parameters() if id(p) in names)
    return full.removesuffix(local).rstrip("$.").replace("$$$", "/").replace(".", "/") or "module"


def check_program(
    model: object, guide: object, loss: object
) -> tuple[Callable[..., Any], Callable[..., Any], ELBO]:
    """Model, guide and ELBO of what a trainer was given, an ELBO's module among it.

    Raises:
        ValueError: naming what was found.
    """
    if isinstance(model, pyro.infer.elbo.ELBOModule):
        if guide is not None or loss is not None:
            raise ValueError(
                "model: got an ELBO's module beside a guide or a loss, expected it alone"
            )
        model, guide, loss = model.model, model.guide, model.elbo
    loss = pyro.infer.Trace_ELBO() if loss is None else loss
    guide = _empty if guide is None else guide
    for name, value in (("model", model), ("guide", guide)):
        if not callable(value) or isinstance(value, type | Distribution):
            raise ValueError(f"{name}: got {kind_of(value)}, expected a Pyro program")
    if not isinstance(loss, ELBO) or not hasattr(loss, "differentiable_loss"):
        raise ValueError(
            f"loss: got {kind_of(loss)}, expected an ELBO with a differentiable_loss, such as Trace_ELBO(); "
            "others train by SVI"
        )
    return model, guide, loss  # type: ignore[return-value]


def _empty(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latent variables of its own."""
