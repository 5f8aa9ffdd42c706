"""Who called: Pyro's inference is not always on its stack of handlers, but always among the callers."""

import sys
from collections.abc import Iterator
from types import FrameType

__all__ = ["called_from", "callers", "inside_markov_chain"]


def callers(frame: FrameType | None = None) -> Iterator[tuple[str, FrameType]]:
    """The name of the module and the frame of each caller, innermost first; from a frame on, if given."""
    frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame
        frame = frame.f_back


def called_from(module: str) -> bool:
    """Whether a function of a module, or of a package's modules, is among the callers."""
    return any(name == module or name.startswith(module + ".") for name, _ in callers())


def inside_markov_chain() -> bool:
    """Whether a kernel of ``pyro.infer.mcmc`` is among the callers (the hook of its ``MCMC`` is not one)."""
    for module, _ in callers():
        if module.startswith("pyro.infer.mcmc"):
            return module != "pyro.infer.mcmc.api"
    return False
