"""A second device without a GPU: tensors that code makes without naming a device stay behind on the host.

Torch refuses operations on tensors of two devices, which a machine with one never shows. Under `OneDevice`
every tensor counts as on an accelerator but those that lines of the package make by a factory without
``device=``, or bring back by ``cpu()``: they count as on the host, say so as ``cpu:0`` when asked for their
device, and stay there until they are moved. What mixes both is noted, with the line of the package that did.

As in torch, numbers without dimensions may mix, and indices may stay on the host. What a module's constructor
makes counts as moved: users move modules.
"""

import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import pyro_diffusion

PACKAGE = str(Path(pyro_diffusion.__file__).parent)
HOST = torch.device("cpu", 0)
FACTORIES = {
    *(torch.arange, torch.linspace, torch.logspace, torch.tril_indices, torch.triu_indices),
    *(torch.empty, torch.eye, torch.full, torch.ones, torch.zeros),
    *(torch.rand, torch.randint, torch.randn, torch.randperm),
    *(torch.as_tensor, torch.from_numpy, torch.tensor),
}
# They look at tensors and compute nothing, or copy from one device to another.
FREE = {torch.is_tensor, torch.is_floating_point, Tensor.requires_grad_, Tensor.copy_}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}


class OneDevice(TorchFunctionMode):
    """Notes in ``mixed`` which lines mix tensors of the host with others: the line, and the operation."""

    def __init__(self, default_on_host: bool = True) -> None:
        super().__init__()
        self.default_on_host = default_on_host  # as torch.set_default_device decides
        self.mixed: dict[str, str] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.device:
            return HOST if on_host(args[0]) else args[0].device
        result = func(*args, **kwargs)
        if func in FACTORIES:
            return left_behind(result) if self.stays(*args, **kwargs) else result
        if func in (Tensor.to, Tensor.cpu):
            moved = result.view_as(result)
            return left_behind(moved) if func is Tensor.cpu or to_host(*args, **kwargs) else moved
        if func in FREE or getattr(func, "__name__", "") == "__set__":
            return result
        known = args[:1] if func in INDEXING else (args, kwargs)
        tensors = [x for x in tree_leaves(known) if isinstance(x, Tensor)]
        host = [x for x in tensors if on_host(x)]
        if len(host) == len(tensors) > 0:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    left_behind(x)
        elif any(x.dim() for x in host):
            self.mixed.setdefault(where(), getattr(func, "__name__", ""))
        return result

    def stays(self, *args, device=None, out=None, **_) -> bool:
        """Whether a factory's tensor is on the host: it is told so, or that is the default."""
        if device is not None:
            return of_host(device)
        for given in (out, *args[:1]):
            if isinstance(given, Tensor):
                return on_host(given)
        return self.default_on_host and of_the_package() and not in_constructor()


def left_behind(x: Tensor) -> Tensor:
    x.stays_on_the_host = True
    return x


def on_host(x: Tensor) -> bool:
    return getattr(x, "stays_on_the_host", False)


def to_host(x: Tensor, *args, **kwargs) -> bool:
    """Whether ``to`` leads to the host, or leaves there what was."""
    for said in (*args, *kwargs.values()):
        if isinstance(said, Tensor):
            return on_host(said)
        if isinstance(said, torch.device | str):
            return of_host(said)
    return on_host(x)


def of_host(device: torch.device | str) -> bool:
    return device == "cpu" if isinstance(device, str) else device.index == 0


def of_the_package() -> bool:
    """Whether a line of the package, not of its caller or of torch, asked for the tensor."""
    frame = sys._getframe(3)
    while frame is not None and (
        "torch/" in frame.f_code.co_filename or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)


def in_constructor() -> bool:
    """Whether a module is being made."""
    frame = sys._getframe(3)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False


def where() -> str:
    """The innermost line of the package that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE):
            return f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno}: {frame.line}"
    return "outside the package"
