"""Steps of a path from a guide to a posterior, each with its density forward and back."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_diffusion.infer.annealing.tempered import leapfrog, tamed

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
# What a state holds, at z and a level: the slope at its temperature, and a control if there is one.
Arrive = Callable[[Tensor, int], State]


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

    def schedule(self, levels: Levels) -> Any:
        """What all steps of a path need of its levels, made once."""
        ...

    def step(
        self, schedule: Any, arrive: Arrive, state: State, here: int, there: int, pathwise: bool
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

    def schedule(self, levels: Levels) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """h s^2, h s, the noise's scale, each (D,), and the log of its normalizing constant, of each step."""
        h, scale = levels.step_sizes.unsqueeze(-1), levels.scale
        spread = (2 * h).sqrt() * scale
        constants = spread.log().sum(-1) + len(scale) * math.log(2 * math.pi) / 2
        parts = (h * scale.square(), h * scale, spread, constants)
        return list(zip(*(part.unbind() for part in parts), strict=True))

    def step(
        self, schedule: Any, arrive: Arrive, state: State, here: int, there: int, pathwise: bool
    ) -> tuple[State, Tensor, Tensor]:
        """See the class."""
        rate, reach, spread, constant = schedule[min(here, there)]

        def mean(at: State, sign: int) -> Tensor:
            to = at["z"] + tamed(rate * at["slope"], LARGEST)
            return torch.addcmul(to, at["control"], reach, value=sign) if "control" in at else to

        towards, noise = mean(state, there - here), torch.randn_like(state["z"])
        z = torch.addcmul(towards, noise, spread)
        if not pathwise:
            z = z.detach()
            if torch.is_grad_enabled():  # scores are of the mean, the end held fixed
                noise = (z - towards) / spread
        new = arrive(z, there)
        missed = (state["z"] - mean(new, here - there)) / spread
        return new, _square(noise) - constant, _square(missed) - constant


class UnderdampedKernel:
    r"""Steps of a momentum: half a refreshment, one leapfrog step, half a refreshment.

    A refreshment is :math:`\rho' = \sqrt{\eta}\, \rho + \sqrt{1 - \eta}\, \varepsilon`, with the persistence
    :math:`\eta`. The leapfrog step is deterministic and keeps volume.
    """

    has_density = False
    controlled = False

    def start(self, state: State) -> State:
        """A standard normal momentum is added."""
        momentum = torch.randn_like(state["z"])
        return {**state, "momentum": momentum, "energy": _standard(momentum)}

    def edge(self, state: State) -> Tensor:
        """That of the momentum."""
        return state["energy"]

    def schedule(self, levels: Levels) -> tuple[list[Tensor], Tensor, Tensor]:
        """Root h times s of each step, (D,), and the shares of the momentum that is kept and that is new."""
        reach = levels.step_sizes.sqrt().unsqueeze(-1) * levels.scale
        return list(reach.unbind()), levels.persistence.sqrt(), (1 - levels.persistence).sqrt()

    def step(
        self, schedule: Any, arrive: Arrive, state: State, here: int, there: int, pathwise: bool
    ) -> tuple[State, Tensor, Tensor]:
        """See the class. Densities have a factor in common, of each refreshment and its opposite."""
        reaches, kept, fresh = schedule
        reach, back = reaches[min(here, there)], there < here

        def refreshed(momentum: Tensor) -> Tensor:
            return torch.addcmul(kept * momentum, torch.randn_like(momentum), fresh)

        second = refreshed(state["momentum"])
        new, third = leapfrog(
            lambda z: arrive(z, there),
            state,
            -second if back else second,
            lambda x, _: x * reach,
            largest=LARGEST,
        )
        third = -third if back else third
        new["momentum"] = refreshed(third)
        new["energy"] = _standard(new["momentum"])
        ahead, behind = _standard(second) + new["energy"], state["energy"] + _standard(third)
        return new, ahead, behind


def _standard(x: Tensor) -> Tensor:
    return _square(x) - x.shape[-1] * math.log(2 * math.pi) / 2


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1) / -2
