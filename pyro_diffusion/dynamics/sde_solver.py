"""Which of torchsde's methods integrates an SDE, in how many steps or to which tolerance."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
import torchsde
from torch import Tensor

from pyro_diffusion.dynamics.brownian import IndependentIncrements, brownian_interval
from pyro_diffusion.dynamics.sde import GaussianSDE, Node
from pyro_diffusion.dynamics.solver_options import check_options, options_repr
from pyro_diffusion.schedules.base import Grid

__all__ = ["METHODS", "Method", "SDESolver", "check_sde_solver"]


class Method(NamedTuple):
    """What one of torchsde's methods does to an SDE with additive noise.

    Attributes:
        sde_type: the calculus that it is written for (all the same under additive noise).
        strong_order: order of the error of paths.
        weak_order: order of the error of expectations.
        evaluations: of the drift, a step.
        nodes: times of a step at which coefficients are needed: evenly spaced, the next step's start not
            counted.
        adaptive: whether step doubling gives it an error estimate of use.
    """

    sde_type: str
    strong_order: float
    weak_order: float
    evaluations: int
    nodes: int
    adaptive: bool


METHODS = {
    "euler": Method("ito", 1.0, 1.0, 1, 1, adaptive=False),
    "milstein": Method("ito", 1.0, 1.0, 1, 1, adaptive=False),
    "heun": Method("stratonovich", 1.0, 2.0, 2, 1, adaptive=True),
    "srk": Method("ito", 1.5, 2.0, 3, 4, adaptive=True),
}


class TabulatedSDE(torchsde.BaseSDE):
    r"""An SDE on a fixed grid of steps, in a time in which they have length 1.

    With h = 1 / steps it is :math:`dy = h f\,d\tau + \sqrt h\,g\,dw`, :math:`\tau = u / h`. Its coefficients
    are computed once, at the times that the method evaluates, and looked up on the host. They carry no
    gradient to the schedule.

    Args:
        sde: with the time u in [0, 1].
        steps: number of steps.
        method: of integration.
        like: a state.
    """

    def __init__(self, sde: GaussianSDE, steps: int, method: Method, like: Tensor) -> None:
        super().__init__("additive", method.sde_type)
        self._drift, self._nodes = sde.drift, method.nodes
        with torch.no_grad():
            u = torch.linspace(0, 1, method.nodes * steps + 1, dtype=torch.float64)
            state, noise, data, level = sde.nodes(u)
        self._state = _rows(state / steps, like)
        self._noise = _rows(noise / math.sqrt(steps), like)
        self._grid = None
        if level is not None and data is not None:
            self._data = _rows(data / steps, like)
            self._grid = Grid(*level.map(lambda v: v.to(like)))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift, a step."""
        return self._drift(y, self._node(t))

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times a vector."""
        return self._noise[self._index(t)] * v

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and diffusion times a vector."""
        i = self._index(t)
        if self._grid is None:  # no network: the drift is linear
            return self._state[i] * y, self._noise[i] * v
        return self._drift(y, self._node(t)), self._noise[i] * v

    def _index(self, t: Tensor) -> int:
        step = float(t)
        return int(step) if self._nodes == 1 else round(step * self._nodes)

    def _node(self, t: Tensor) -> Node:
        i = self._index(t)
        if self._grid is None:
            return Node(self._state[i], self._noise[i])
        return Node(self._state[i], self._noise[i], self._data[i], self._grid.row(i))


def _rows(table: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """A coefficient step by step: a number each, or one per coordinate."""
    if table.shape[-1] == 1:
        # Numbers on the host of the state's own dtype cost the least to multiply with.
        return table.to(like.dtype).squeeze(-1).unbind()
    return table.to(like).unbind()


@dataclass(frozen=True, repr=False)
class SDESolver:
    """A torchsde method and its options.

    Fixed steps are even in u and take independent increments. Adaptive ones are torchsde's, which compare two
    half steps with a whole one for all rows at once, along a Brownian path that is kept.

    Args:
        method: ``"euler"``, ``"milstein"`` (the same under additive noise), ``"heun"`` or
            ``"srk"``; the last of strong order 1.5.
        steps: number of fixed steps; 1000 by default.
        adaptive: whether steps adapt; ``"heun"`` and ``"srk"`` only.
        rtol: relative tolerance of adaptive steps, > 0; 0.01 by default.
        atol: absolute tolerance of adaptive steps, > 0; 0.01 by default.

    Raises:
        ValueError: naming the argument, what it was and what was expected; also for a number of adaptive
            steps, and for tolerances of fixed ones.

    References:
        Li et al. (torchsde), arXiv 2001.01328; Roessler, SIAM J. Numer. Anal. 48, 2010 (srk).
    """

    method: str = "euler"
    _: KW_ONLY
    steps: int | None = None
    adaptive: bool = False
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.adaptive and not METHODS[self.method].adaptive:
            able = ", ".join(name for name, method in METHODS.items() if method.adaptive)
            raise ValueError(
                f"adaptive: got True with method {self.method!r}, whose single evaluation of the drift "
                f"gives no estimate of its error, expected one of {able}"
            )
        kind = f"adaptive={self.adaptive}"
        defaults = {"rtol": 1e-2, "atol": 1e-2} if self.adaptive else {"steps": 1000}
        for name, value in check_options(kind, self._options, defaults).items():
            object.__setattr__(self, name, value)

    @property
    def _options(self) -> dict[str, float | None]:
        return {"steps": self.steps, "rtol": self.rtol, "atol": self.atol}

    def __repr__(self) -> str:
        adaptive = "adaptive=True, " if self.adaptive else ""
        return f"SDESolver({self.method!r}, {adaptive}{options_repr(self._options)})"

    @property
    def order(self) -> Method:
        """The method's orders and costs."""
        return METHODS[self.method]

    def __call__(self, sde: GaussianSDE, y: Tensor) -> Tensor:
        """The state at u = 1.

        Args:
            sde: to integrate; adaptive steps set its ``sde_type`` to the method's.
            y: state at u = 0, (rows, numbers in a datum).
        """
        if self.steps is None:  # adaptive
            sde.sde_type = self.order.sde_type
            times = torch.tensor([0.0, 1.0], dtype=torch.float64)
            keywords = {"rtol": self.rtol, "atol": self.atol, "dt": 1e-2}
            brownian: torchsde.BaseBrownian = brownian_interval(y.shape, y.dtype, y.device)
            return self._integrate(sde, y, times, brownian, adaptive=True, **keywords)
        tabulated = TabulatedSDE(sde, self.steps, self.order, y)
        times = torch.tensor([0.0, self.steps], dtype=torch.promote_types(y.dtype, torch.float32))
        brownian = IndependentIncrements(y.shape, y.dtype, y.device)
        return self._integrate(tabulated, y, times, brownian, dt=torch.ones_like(times[0]))

    def _integrate(
        self,
        sde: torchsde.BaseSDE,
        y: Tensor,
        times: Tensor,
        brownian: torchsde.BaseBrownian,
        **keywords: Any,
    ) -> Tensor:
        """torchsde's own loop; it compares times, which are therefore on the host."""
        states = torchsde.sdeint(sde, y, times, bm=brownian, method=self.method, **keywords)
        out: Tensor = states[-1]
        return out


def check_sde_solver(solver: object) -> SDESolver:
    """Refuse anything but an SDE solver.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(solver, SDESolver):
        raise ValueError(
            f"solver: got {solver!r}, expected an SDESolver such as SDESolver('heun', steps=200)"
        )
    return solver
