"""Steps of a path from a guide to a posterior, each with its density forward and back."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_diffusion.infer.annealing.tempered import leapfrog, slope, tamed

__all__ = ["LangevinKernel", "Levels", "PathKernel", "UnderdampedKernel"]

# Of a step's drift, in units of the guide's own scale: steeper slopes are followed no further.
LARGEST = 1.0


class Levels(NamedTuple):
    r"""The schedule of a path of K steps.

    Attributes:
        betas: (K + 1,), temperatures of its states, from 0 to 1.
        step_sizes: (K,), h.
        scale: (D,), s, of the moves in each of the guide's own coordinates.
        persistence: share of the momentum that a step keeps, in [0, 1).
    """

    betas: Tensor
    step_sizes: Tensor
    scale: Tensor
    persistence: Tensor

    def __len__(self) -> int:
        return len(self.step_sizes)


State = dict[str, Tensor]
Arrive = Callable[[Tensor, int], State]  # what a state holds, at z and a level


class PathKernel(Protocol):
    """One step between neighbouring levels, either way.

    Attributes:
        has_density: whether a step has a density given its states, as score gradients need.
        controlled: whether it takes a control.
    """

    has_density: bool
    controlled: bool

    def start(self, state: State) -> State:
        """A state with what the kernel adds to it."""
        ...

    def edge(self, state: State) -> Tensor:
        """Log density of what the kernel added, (...)."""
        ...

    def step(
        self, levels: Levels, arrive: Arrive, state: State, here: int, there: int, pathwise: bool
    ) -> tuple[State, Tensor, Tensor]:
        """The next state, and log densities of the step and of the same step back, (...)."""
        ...


class LangevinKernel:
    r"""Unadjusted Langevin steps, by default uncontrolled.

    .. math::

        z' = z + h s^2 \nabla \log \pi_b(z) \pm h s\, u(z, b) + \sqrt{2 h}\, s\, \varepsilon,

    with the control u added on the way to the posterior and subtracted on the way back, each way at the
    temperature of the state that it leaves. The first part of the drift is bounded by
    :func:`~pyro_diffusion.infer.annealing.tempered.tamed`.
    """

    has_density = True
    controlled = True

    def start(self, state: State) -> State:
        """Nothing is added."""
        return state

    def edge(self, state: State) -> Tensor:
        """No density."""
        return state["z"].new_zeros(state["z"].shape[:-1])

    def step(
        self, levels: Levels, arrive: Arrive, state: State, here: int, there: int, pathwise: bool
    ) -> tuple[State, Tensor, Tensor]:
        """See the class."""
        h, sign = levels.step_sizes[min(here, there)], there - here
        spread = (2 * h).sqrt() * levels.scale

        def mean(at: State, level: int, sign: int) -> Tensor:
            drift = tamed(h * levels.scale.square() * slope(at, levels.betas[level]), LARGEST)
            if "control" in at:
                drift = drift + sign * h * levels.scale * at["control"]
            return at["z"] + drift

        towards = mean(state, here, sign)
        z = towards + spread * torch.randn_like(state["z"])
        new = arrive(z if pathwise else z.detach(), there)
        back = mean(new, there, -sign)
        return new, _normal(new["z"], towards, spread), _normal(state["z"], back, spread)


class UnderdampedKernel:
    r"""Steps of a momentum: half a refreshment, one leapfrog step, half a refreshment.

    A refreshment is :math:`\rho' = \sqrt{\eta}\, \rho + \sqrt{1 - \eta}\, \varepsilon`, with the persistence
    :math:`\eta`. The leapfrog step is deterministic and keeps volume.
    """

    has_density = False
    controlled = False

    def start(self, state: State) -> State:
        """A standard normal momentum is added."""
        return {**state, "momentum": torch.randn_like(state["z"])}

    def edge(self, state: State) -> Tensor:
        """That of the momentum."""
        return _standard(state["momentum"])

    def step(
        self, levels: Levels, arrive: Arrive, state: State, here: int, there: int, pathwise: bool
    ) -> tuple[State, Tensor, Tensor]:
        """See the class. Densities have a factor in common, of each refreshment and its opposite."""
        sign, keep = there - here, levels.persistence
        h = levels.step_sizes[min(here, there)].sqrt()
        betas = levels.betas[here], levels.betas[there]

        def refreshed(momentum: Tensor) -> Tensor:
            return keep.sqrt() * momentum + (1 - keep).sqrt() * torch.randn_like(momentum)

        first = state["momentum"]
        second = refreshed(first)
        new, third = leapfrog(
            lambda z: arrive(z, there), state, sign * second, h, levels.scale, betas, LARGEST
        )
        third = sign * third
        fourth = refreshed(third)
        new["momentum"] = fourth
        return new, _standard(second) + _standard(fourth), _standard(first) + _standard(third)


def _normal(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return _standard((x - mean) / scale) - scale.log().sum(-1)


def _standard(x: Tensor) -> Tensor:
    return -(x.square() + math.log(2 * math.pi)).sum(-1) / 2
