"""One torch optimizer for all of a model's parameters, as SVI takes it."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_diffusion.checkpoint import load as load_state
from pyro_diffusion.checkpoint import save as save_state
from pyro_diffusion.validation import check_number

__all__ = ["JointOptim"]


class JointOptim(PyroOptim):
    r"""A :class:`pyro.optim.PyroOptim` that holds one torch optimizer instead of one per parameter.

    Pyro's own wrapper builds an optimizer for every parameter, which costs a network of a hundred tensors
    several milliseconds a step; one optimizer takes them together (``fused=True``, ``foreach=True`` work).
    Steps are the same to float error. Gradients can be clipped by their global norm, and a scheduler
    of the learning rate can be attached: call :meth:`step` once per step or epoch.

    Parameters that appear later join when they are first seen; a step leaves those without a gradient
    unchanged.

    Args:
        optimizer: a torch optimizer's class.
        optim_args: its arguments.
        scheduler: a torch scheduler's class.
        scheduler_args: its arguments.
        clip_norm: largest global norm of the gradients, > 0.

    Raises:
        ValueError: if ``clip_norm`` is not positive.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> optim = JointOptim(torch.optim.AdamW, {"lr": 1e-3, "fused": True}, clip_norm=1.0)
        >>> svi = SVI(lambda: pyro.factor("f", -pyro.param("w", torch.ones(3)).square().sum()),
        ...           lambda: None, optim, Trace_ELBO())
        >>> svi.step()
        3.0
    """

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        optim_args: dict[str, Any],
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        scheduler_args: dict[str, Any] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(optimizer, optim_args)
        self._build = partial(optimizer, **optim_args)
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, above=0)
        for name, value in optim_args.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"optim_args[{name!r}]: got {value}, expected a finite number")
        self._scheduler_type, self._scheduler_args = scheduler, dict(scheduler_args or {})
        self._clip_norm = clip_norm
        self._names: dict[Tensor, str] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self._waiting: dict[str, Any] | None = None

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step on the gradients of ``params``, which are then set to ``None``."""
        params = set(params)
        self._meet(params)
        for other in self._names.keys() - params:
            other.grad = None
        if self._clip_norm is not None:
            # In a fixed order, which a set has not: the norm is then the same in every run.
            ordered = [p for p in self._names if p in params]
            torch.nn.utils.clip_grad_norm_(ordered, self._clip_norm)
        assert self._optimizer is not None
        self._optimizer.step()
        # None, not zeros: the next backward pass then writes instead of adding.
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, *args: Any) -> None:
        """Advance the learning rate's scheduler, if there is one (and a first step was taken)."""
        if self._scheduler is not None:
            self._scheduler.step(*args)

    def get_state(self) -> dict[str, Any]:
        """The optimizer's and scheduler's state, with what tells whether it fits: the parameters' names and
        shapes in the optimizer's order, and the two classes."""
        if self._optimizer is None:
            return dict(self._waiting or {})
        return {
            "names": list(self._names.values()),
            "shapes": [tuple(p.shape) for p in self._names],
            "classes": self._classes(self._optimizer, self._scheduler),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
        }

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Set a state of :meth:`get_state`; it is loaded when the parameters are next seen.

        Raises:
            ValueError: if it is no such state. One of other parameters or classes is refused when the
                parameters are seen. Nothing is changed in either case.
        """
        if state_dict:
            missing = sorted({"names", "optimizer", "scheduler"} - set(state_dict))
            if missing:
                raise ValueError(f"state: got {sorted(state_dict)}, and misses {missing}")
        self._names, self._optimizer, self._scheduler = {}, None, None
        self._waiting = dict(state_dict) or None

    def save(self, filename: str) -> None:
        """Write the state as a checkpoint (safetensors, see :mod:`pyro_diffusion.checkpoint`)."""
        save_state(filename, self.get_state())

    def load(self, filename: str, map_location: Any = None) -> None:
        """Load what :meth:`save` wrote; nothing is unpickled."""
        self.set_state(load_state(filename))

    def _built(self, params: Any) -> torch.optim.Optimizer:
        try:
            return self._build(params)
        except Exception as error:
            given = self._build.keywords
            error.add_note(f"optim_args: got {given}, expected arguments of {self._build.func}")
            raise

    def _meet(self, params: set[Tensor]) -> None:
        """Add parameters that are new to the optimizer."""
        new = params - self._names.keys()
        if not new:
            return
        store = pyro.get_param_store()
        # By name: sets have no order, and a state must find its parameters again.
        named = sorted((str(store.param_name(p)), p) for p in new)
        if self._optimizer is not None:
            self._optimizer.add_param_group({"params": [p for _, p in named]})
        elif self._waiting is not None:
            named = self._go_on(named, self._waiting)
        else:
            self._optimizer = self._built([p for _, p in named])
            self._scheduler = self._schedule(self._optimizer)
        self._names.update({p: name for name, p in named})

    def _go_on(
        self, named: list[tuple[str, Tensor]], state: dict[str, Any]
    ) -> list[tuple[str, Tensor]]:
        """Load the state that was set, if it fits; the parameters in its order, new ones last."""
        known = dict(named)
        missing = set(state["names"]) - known.keys()
        if missing:
            raise ValueError(
                f"state: got parameters {sorted(missing)}, expected those of the model"
            )
        shapes = [tuple(known[name].shape) for name in state["names"]]
        for name, found, own in zip(
            state["names"], state.get("shapes", shapes), shapes, strict=True
        ):
            if tuple(found) != own:
                raise ValueError(f"state: got {name} of shape {tuple(found)}, expected {own}")
        # Groups as they were made: a parameter that joined late has one of its own.
        counts = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        tensors = iter([known[name] for name in state["names"]])
        first, *others = [list(islice(tensors, count)) for count in counts]
        optimizer = self._built(first)
        for group in others:
            optimizer.add_param_group({"params": group})
        scheduler = self._schedule(optimizer)
        classes = self._classes(optimizer, scheduler)
        found = state.get("classes", classes)
        if found != classes:
            raise ValueError(f"state: got the state of {found}, expected that of {classes}")
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None and state["scheduler"] is not None:
            scheduler.load_state_dict(state["scheduler"])
        later = [(name, p) for name, p in named if name not in set(state["names"])]
        if later:
            optimizer.add_param_group({"params": [p for _, p in later]})
        self._optimizer, self._scheduler, self._waiting = optimizer, scheduler, None
        return [(name, known[name]) for name in state["names"]] + later

    def _schedule(
        self, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        if self._scheduler_type is None:
            return None
        return self._scheduler_type(optimizer, **self._scheduler_args)

    @staticmethod
    def _classes(optimizer: object, scheduler: object) -> str:
        names = [type(part).__name__ for part in (optimizer, scheduler) if part is not None]
        return " with ".join(names)
