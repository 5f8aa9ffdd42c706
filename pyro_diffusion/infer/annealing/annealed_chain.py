"""A chain of tempered laws from a guide to a posterior: weights, and moves that keep each law."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_diffusion.infer.annealing.guide_chart import GuideChart
from pyro_diffusion.infer.annealing.local_scales import LocalScales
from pyro_diffusion.infer.annealing.tempered import TemperedDensity, leapfrog, slope
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel

__all__ = ["AnnealedChain", "Stage"]

# Steps are drawn from around their size, so that no trajectory closes on itself.
JITTER = 0.3


class Stage(NamedTuple):
    r"""One temperature of a chain: move under :math:`q^{1-b} p^b`, then weight by the next.

    Attributes:
        beta: b, in [0, 1].
        next_beta: of the next stage.
        scales: of moves. A particle in part c of them has the metric :math:`(S_c S_c^T)^{-1}`.
        step_size: of a leapfrog step in each part, in units of S_c, (C,).
        leapfrog: how many such steps make a move; one is MALA.
    """

    beta: float
    next_beta: float
    scales: LocalScales
    step_size: Tensor
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
        r"""One Hamiltonian move of every particle in place; the mean probability of acceptance.

        Each is moved in the metric of a part c drawn from :math:`r(c | z)`, and accepted with the law
        :math:`\pi(z)\, r(c | z)` of both, so that scales follow the particle and the law is kept.
        """
        accept, _ = self.propose(state, stage)
        rate = accept.mean()
        self.acceptance.append(rate)
        return rate

    def propose(self, state: Any, stage: Stage) -> tuple[Tensor, Tensor]:
        """A move: the probability of acceptance of every particle and its part, both (N, R)."""
        old = {key: state[key] for key in ("z", "log_q", "gap", "grad_q", "grad_gap")}
        beta, scales, z = stage.beta, stage.scales, old["z"]
        part, *share = scales.draw_part(z)
        jitter = 1 + JITTER * (2 * torch.rand_like(z[..., :1]) - 1)
        momentum = torch.randn_like(z)
        order = _Order(part, scales.size)
        own, step = order(part), order(stage.step_size[part].unsqueeze(-1) * jitter)

        def in_its_part(values: dict[str, Tensor], share: Sequence[Tensor]) -> dict[str, Tensor]:
            found = slope(values, beta)
            if scales.size == 1:
                return {**values, "slope": found}
            return {**values, "slope": found + share[1], "log_share": share[0]}

        def density(z: Tensor) -> dict[str, Tensor]:
            values = self.density(z)
            return in_its_part(values, scales.log_share(z, own) if scales.size > 1 else ())

        first = in_its_part({k: order(v) for k, v in old.items()}, [order(x) for x in share])
        momentum = order(momentum)
        before = _energy(first, beta, momentum)
        new, momentum = leapfrog(
            density,
            first,
            momentum,
            lambda x, transpose: step * scales.times(x, order.counts, transpose),
            steps=stage.leapfrog,
        )
        ratio = (_energy(new, beta, momentum) - before).nan_to_num(-math.inf, 0.0, -math.inf)
        accept = order.undone(ratio.clamp(max=0).exp())
        taken = torch.rand_like(accept) < accept
        for key, value in old.items():
            where = taken.unsqueeze(-1) if value.dim() > taken.dim() else taken
            state[key] = torch.where(where, order.undone(new[key]), value)
        return accept, part


class _Order:
    """States as rows in the order of their parts, (...) of C, each part by itself."""

    def __init__(self, part: Tensor, size: int) -> None:
        self._shape, self.counts, rows = part.shape, [part.numel()], part.flatten()
        self._order: Any = slice(None)
        self._back: Any = slice(None)
        if size > 1:
            self._order = rows.argsort(stable=True)
            self._back, self.counts = (
                self._order.argsort(),
                torch.bincount(rows, minlength=size).tolist(),
            )

    def __call__(self, x: Tensor) -> Tensor:
        """(...) + anything, as (n,) + the same."""
        return x.flatten(0, len(self._shape) - 1)[self._order]

    def undone(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x[self._back].unflatten(0, self._shape)


class NoProposal:
    """Guide of such a filter: the moves are the model's."""

    def init(self, state: Any, z: Tensor) -> None:
        """Propose nothing."""

    def step(self, state: Any, stage: Stage, moves: int) -> None:
        """Propose nothing."""


def _energy(state: dict[str, Tensor], beta: float, momentum: Tensor) -> Tensor:
    """Log density of state, its part and momentum."""
    found = state["log_q"] + beta * state["gap"] - momentum.square().sum(-1) / 2
    return found + state["log_share"] if "log_share" in state else found
