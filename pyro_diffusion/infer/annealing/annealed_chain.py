"""A chain of tempered laws from a guide to a posterior: weights, and moves that keep each law."""

import math
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_diffusion.infer.annealing.guide_chart import GuideChart
from pyro_diffusion.infer.annealing.tempered import TemperedDensity, leapfrog
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel

__all__ = ["AnnealedChain", "Stage"]

# Steps are drawn from around their size, so that no trajectory closes on itself.
JITTER = 0.3


class Stage(NamedTuple):
    r"""One temperature of a chain: move under :math:`q^{1-b} p^b`, then weight by the next.

    Attributes:
        beta: b, in [0, 1].
        next_beta: of the next stage.
        root: S, (D, D) lower triangular or (D,), the scale of moves: their metric is :math:`(S S^T)^{-1}`.
        step_size: of a leapfrog step, in units of S.
        leapfrog: how many such steps make a move; one is MALA.
    """

    beta: float
    next_beta: float
    root: Tensor
    step_size: float
    leapfrog: int


class AnnealedChain:
    r"""The model of a particle filter whose steps are stages.

    The filter is :class:`~pyro_diffusion.infer.filtering.particle_filter.ParticleFilter`.

    States are ``z`` (N, R, D) in the guide's own coordinates, ``log_q`` and ``gap``
    :math:`\ell = \log p - \log q`, (N, R), and the gradients of both. A step moves particles under the
    stage's law and weights them by :math:`(b' - b)\,\ell`. Both depend on the stage alone, so that with
    stages fixed before, the mean weight is unbiased.

    Args:
        model: log p.
        chart: of the guide, q.
        num_particles: N, of each filter.
        num_repeats: R, filters side by side.

    Attributes:
        density: log q and log p - log q.
        acceptance: mean probability of acceptance of each step so far.
    """

    def __init__(
        self, model: UnconstrainedModel, chart: GuideChart, num_particles: int, num_repeats: int
    ) -> None:
        self.model, self.chart = model, chart
        self.density = TemperedDensity(model, chart)
        self.shape = num_particles, num_repeats
        self.acceptance: list[Tensor] = []

    @property
    def evaluations(self) -> int:
        """Gradients of the model so far, each of N R particles."""
        return self.density.evaluations

    def init(self, state: Any, z: Tensor) -> None:
        """Start at draws of the guide, (N, R, D)."""
        state["z"] = z
        state.update(self.density(z))

    def step(self, state: Any, stage: Stage, moves: int) -> None:
        """Move, and weight for the next stage."""
        if stage.beta > 0:
            for _ in range(moves):
                self.move(state, stage)
        pyro.factor("increment", (stage.next_beta - stage.beta) * state["gap"].double())

    def move(self, state: Any, stage: Stage) -> Tensor:
        """One Hamiltonian move of every particle in place; the mean probability of acceptance."""
        old = {key: state[key] for key in ("z", "log_q", "gap", "grad_q", "grad_gap")}
        beta, root = stage.beta, stage.root
        jitter = 1 + JITTER * (2 * torch.rand_like(old["z"][..., :1]) - 1)
        step = stage.step_size * jitter
        momentum = torch.randn_like(old["z"])
        before = _energy(old, beta, momentum)
        new = dict(old)
        for _ in range(stage.leapfrog):
            new, momentum = leapfrog(self.density, new, momentum, step, root, (beta, beta))
        ratio = (_energy(new, beta, momentum) - before).nan_to_num(-math.inf, 0.0, -math.inf)
        accept = ratio.clamp(max=0).exp()
        taken = torch.rand_like(accept) < accept
        for key, value in new.items():
            where = taken.unsqueeze(-1) if value.dim() > taken.dim() else taken
            state[key] = torch.where(where, value, old[key])
        rate = accept.mean()
        self.acceptance.append(rate)
        return rate


class NoProposal:
    """Guide of such a filter: the moves are the model's."""

    def init(self, state: Any, z: Tensor) -> None:
        """Propose nothing."""

    def step(self, state: Any, stage: Stage, moves: int) -> None:
        """Propose nothing."""


def _energy(state: dict[str, Tensor], beta: float, momentum: Tensor) -> Tensor:
    """Log density of state and momentum."""
    return state["log_q"] + beta * state["gap"] - momentum.square().sum(-1) / 2
