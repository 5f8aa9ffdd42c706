"""The warning of results that are not to be believed."""

import sys
import warnings

__all__ = ["UnreliableWarning", "warn_unreliable"]


class UnreliableWarning(UserWarning):
    """A result was computed and cannot be believed: the message says which, why, and what to change.

    Particles whose weights collapsed or that are too few to judge by, guided draws that left the model, and
    draws that miss their observations warn by this one category. To have an error instead, or silence:

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", UnreliableWarning)
        >>> warnings.simplefilter("ignore", UnreliableWarning)
        >>> warnings.resetwarnings()
    """


def warn_unreliable(message: str) -> None:
    """Warn, at the line of the program that called the package."""
    warnings.warn(message, UnreliableWarning, stacklevel=_depth())


def _depth() -> int:
    """Frames from :func:`warn_unreliable` to the first outside of the package, Pyro and torch."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "pyro_diffusion",
        "pyro",
        "torch",
    ):
        frame, depth = frame.f_back, depth + 1
    return depth
