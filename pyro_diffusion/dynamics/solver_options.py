"""Steps or tolerances of a solver: each kind of method takes one of the two."""

import math
from collections.abc import Mapping

from pyro_diffusion.validation import check_positive_int

__all__ = ["check_options", "options_repr"]


def check_options(
    kind: str, given: Mapping[str, float | None], defaults: Mapping[str, float]
) -> dict[str, float | None]:
    """The options of a solver: defaults filled in for those that the method takes, None for others.

    Args:
        kind: the method, as errors call it.
        given: ``steps``, ``rtol`` and ``atol`` as passed in, None where left out.
        defaults: of the options that the method takes.

    Raises:
        ValueError: for an option that the method does not take, a tolerance that is not positive, or steps
            < 1.
    """
    options = {
        name: defaults.get(name) if value is None else value for name, value in given.items()
    }
    for name, value in options.items():
        if value is None:
            continue
        if name not in defaults:
            raise ValueError(
                f"{name}: got {value!r} for {kind}, expected no {name} (it takes {', '.join(defaults)})"
            )
        if name == "steps":
            check_positive_int(name, value)
        elif not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value}, expected a tolerance > 0")
    return options


def options_repr(options: Mapping[str, float | None]) -> str:
    """The options that a method takes, as arguments."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in options.items()
        if value is not None
    )
