"""The same solutions by finer steps: what a solver's own tolerances leave is the difference."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["Refinement", "current_refinement", "refined"]


@dataclass
class Refinement:
    """What solvers are asked for beyond their own settings.

    Attributes:
        factor: by which tolerances are smaller; 1 for the solvers' own.
        share: of the rows of a batch, its first ones, that are solved.
        solutions: how many were asked for so far.
    """

    factor: float
    share: float = 1.0
    solutions: int = 0


_CURRENT: ContextVar[Refinement | None] = ContextVar("refinement", default=None)


@contextmanager
def refined(factor: float = 100.0, share: float = 1.0) -> Iterator[Refinement]:
    """Every :class:`~pyro_diffusion.dynamics.ODESolver` inside has smaller tolerances, or 4 times the steps.

    Tolerances go down to ten roundings of the state's dtype and no further. With ``factor=1`` solutions are
    the solvers' own, and are counted. Of a smaller ``share`` the first rows of a batch are solved, and all
    others are 0; with a stochastic trace, whose probes are rows of noise, all are solved.
    """
    refinement = Refinement(factor, share)
    token = _CURRENT.set(refinement)
    try:
        yield refinement
    finally:
        _CURRENT.reset(token)


def current_refinement() -> Refinement | None:
    """What solvers are asked for here."""
    return _CURRENT.get()
