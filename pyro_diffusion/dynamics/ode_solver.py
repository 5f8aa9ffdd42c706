"""Torchdiffeq's methods, with tolerances that hold for every row of a batch."""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from pyro_diffusion.dynamics.refinement import current_refinement
from pyro_diffusion.dynamics.solver_options import check_options, options_repr

__all__ = ["ADAPTIVE", "FIXED", "Field", "ODESolver", "check_ode_solver"]

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
FIXED = ("rk4", "heun3", "midpoint", "euler")


class Field(Protocol):
    """The velocity of rows: a state of ``size`` numbers each, and the log-determinants per dimension."""

    size: int

    def __call__(self, angle: Tensor, y: Tensor) -> Tensor:
        """The velocity of rows y at an angle."""


@dataclass(frozen=True, repr=False)
class ODESolver:
    r"""A torchdiffeq method and its options.

    Tolerances are per coordinate of the unit-variance state :math:`z` and, for densities, per dimension (nats
    / d). They hold for every row of a batch: the step fits the row that needs the shortest.
    A row whose velocity is NaN is NaN, and that row alone.

    Args:
        method: adaptive (``dopri5``, ``dopri8``, ``bosh3``, ``adaptive_heun``) or of fixed steps (``rk4``,
            ``heun3``, ``midpoint``, ``euler``).
        rtol: relative tolerance of an adaptive method, > 0; 1e-5 by default.
        atol: absolute tolerance of an adaptive method, > 0; 1e-5 by default.
        steps: number of steps of a fixed method, evenly spaced in the angle; 32 by default.
        adjoint: whether gradients solve the adjoint ODE backwards (memory independent of the number of steps,
            accurate to the tolerance) or go through the solver's steps (exact for what was computed).

    Raises:
        ValueError: for an unknown method, a tolerance that is not positive, ``steps < 1``, or an option that
            the method does not take: steps of an adaptive method, tolerances of one of fixed steps.

    References:
        Chen et al., Neural ordinary differential equations, arXiv 1806.07366.
    """

    method: str = "dopri5"
    _: KW_ONLY
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    adjoint: bool = False

    def __post_init__(self) -> None:
        if self.method not in ADAPTIVE + FIXED:
            raise ValueError(
                f"method: got {self.method!r}, expected one of {', '.join(ADAPTIVE)} (adaptive), "
                f"{', '.join(FIXED)} (fixed steps)"
            )
        fixed = self.method in FIXED
        kind = f"the {'fixed-step' if fixed else 'adaptive'} method {self.method!r}"
        defaults = {"steps": 32} if fixed else {"rtol": 1e-5, "atol": 1e-5}
        for name, value in check_options(kind, self._options, defaults).items():
            object.__setattr__(self, name, value)

    @property
    def _options(self) -> dict[str, float | None]:
        return {"steps": self.steps, "rtol": self.rtol, "atol": self.atol}

    def __repr__(self) -> str:
        adjoint = ", adjoint=True" if self.adjoint else ""
        return f"ODESolver({self.method!r}, {options_repr(self._options)}{adjoint})"

    def __call__(
        self, field: Field, y: Tensor, start: float, stop: float, parameters: Iterable[Tensor]
    ) -> Tensor:
        """The state at ``stop`` of rows ``y`` at ``start``; gradients also to ``parameters``."""
        solver = self._refined(y.dtype)
        if self.method in FIXED:
            return solver._integrate(field, y, start, stop, parameters)
        # An adaptive solver fails on a NaN in any row.
        field = _FrozenNaNs(field, y)
        y = solver._integrate(field, y.masked_fill(field.nan, 0.0), start, stop, parameters)
        return y.masked_fill(field.nan, torch.nan)

    def _refined(self, dtype: torch.dtype) -> "ODESolver":
        """Itself, or finer where that is asked for."""
        refinement = current_refinement()
        if refinement is None:
            return self
        refinement.solutions += 1
        if refinement.factor == 1:
            return self
        if self.steps is not None:
            return dataclasses.replace(self, steps=4 * self.steps)
        assert self.rtol is not None and self.atol is not None
        least = 10 * torch.finfo(dtype).eps
        rtol, atol = (
            min(own, max(own / refinement.factor, least)) for own in (self.rtol, self.atol)
        )
        return dataclasses.replace(self, rtol=rtol, atol=atol)

    def _integrate(
        self, field: Field, y: Tensor, start: float, stop: float, parameters: Iterable[Tensor]
    ) -> Tensor:
        count = 2 if self.steps is None else self.steps + 1
        # Solvers compare times on the host, so that is where they are made. Steps stop at both ends, beyond
        # which no level exists.
        times = torch.linspace(start, stop, count, dtype=torch.float64).to(y.device)
        keywords: dict[str, Any] = {"method": self.method}
        options: dict[str, Any] = {}
        adjoint_options: dict[str, Any] = {}
        if self.method in ADAPTIVE:
            keywords |= {"rtol": self.rtol, "atol": self.atol}
            ends, first_step = times[[0, -1]], abs(stop - start) / 32
            norm = functools.partial(_worst_row, size=field.size)
            options = {"norm": norm, "step_t": ends, "first_step": first_step}
            # torchdiffeq runs decreasing times negated, and means the adjoint's options so.
            ends = ends if start < stop else -ends
            adjoint_options = {"norm": "seminorm", "step_t": ends, "first_step": first_step}
        try:
            if not self.adjoint:
                return odeint(field, y, times, options=options, **keywords)[-1]
            return odeint_adjoint(
                field,
                y,
                times,
                options=options,
                adjoint_options=adjoint_options,
                adjoint_params=tuple(parameters),
                **keywords,
            )[-1]
        except AssertionError as error:  # torchdiffeq's, of a step that has shrunk to nothing
            raise ValueError(
                f"denoiser: got a flow that the solver cannot follow ({error}), expected a network whose "
                "output is finite at every level and changes smoothly from one to the next"
            ) from error


def check_ode_solver(solver: object) -> ODESolver:
    """Refuse anything but an ODE solver.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(solver, ODESolver):
        raise ValueError(
            f"solver: got {solver!r}, expected an ODESolver such as ODESolver('rk4', steps=16)"
        )
    return solver


class _FrozenNaNs:
    """A field whose velocity is 0 in rows where it was NaN once.

    Attributes:
        nan: rows that were NaN, (rows, 1).
    """

    def __init__(self, field: Field, y: Tensor) -> None:
        self.field, self.size = field, field.size
        self.nan = y.isnan().any(-1, keepdim=True)

    def __call__(self, angle: Tensor, y: Tensor) -> Tensor:
        velocity = self.field(angle, y)
        self.nan = self.nan | velocity.detach().isnan().any(-1, keepdim=True)
        return velocity.masked_fill(self.nan, 0.0)


def _worst_row(y: Tensor, size: int) -> Tensor:
    """The largest root mean square of any row, its state and its log-determinants apart."""
    parts = [part for part in (y[:, :size], y[:, size:]) if part.numel()]
    return torch.stack([part.square().mean(-1).amax() for part in parts]).amax().sqrt()
