"""Samplers of symbols: in order of the times at which they are unmasked, and ones that change their mind."""

from typing import Any

import torch
from pyro.distributions import Uniform
from torch import Tensor

from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.samplers.ancestral import Ancestral
from pyro_diffusion.samplers.base import Denoise, Sampler, State
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_number

__all__ = ["FirstHitting", "Remasking"]


class FirstHitting(Sampler):
    """Unmask symbols one after another, each at its own time: exact in continuous time.

    Under masking, the times at which symbols are lost do not depend on what the symbols are. They are drawn
    first; from the last to the first, each symbol is then drawn from the posterior at its time, as the
    continuous-time chain does. With as many steps as there are symbols in a datum (or more) that is exact.
    With fewer, each step draws the next few symbols together, at the time of the first of them: as many every
    step, which is an approximation.

    The grid gives the number of steps only. One network evaluation a step, at levels that differ from datum
    to datum.

    References:
        Zheng et al., arXiv 2409.02908.
    """

    def __repr__(self) -> str:
        return "FirstHitting()"

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> tuple[Tensor, Tensor]:
        """How many steps come before each, and how many there are.

        Raises:
            ValueError: for a process without a mask.
        """
        require(process, Ability.MASK, argument="sampler", by=self, instead="Ancestral()")
        count = len(t.t)
        before = torch.arange(count - 1, -1, -1, device=t.t.device)
        return before, torch.full_like(before, count)

    def step(
        self, process: Any, denoise: Denoise, state: State, s: Level, t: Level, c: Any
    ) -> State:
        """Draw the next symbols, at the time at which the last of them was lost."""
        x = state.x
        rank, masked, levels = state.history or self._order(process, x, t)
        before, steps = c
        count = rank.shape[rank.dim() - process.event_dim :].numel()
        first, after = before * count // steps, (before + 1) * count // steps
        level = levels.at(first.clamp(max=count - 1).reshape(1)).at(0)
        symbols = draw(denoise(x, level)).detach()
        chosen = masked & (rank >= first) & (rank < after)
        return State(torch.where(chosen, symbols, x), (rank, masked, levels))

    def _order(self, process: Any, x: Tensor, t: Level) -> tuple[Tensor, Tensor, Level]:
        """Each symbol's place in the order of unmasking, whether it has one, and the levels by place."""
        like = torch.zeros(x.shape, dtype=t.alpha.dtype, device=x.device)
        noise = Uniform(like, 1.0, validate_args=False).to_event(process.event_dim)
        times = process.times_of_loss(x, draw(noise))
        batch = x.shape[: x.dim() - process.event_dim]
        rows = times.reshape(*batch, x.shape[len(batch) :].numel())
        ordered, index = rows.sort(-1, descending=True)
        levels = process.levels(ordered.clamp(min=0).movedim(-1, 0))
        return index.argsort(-1).reshape(x.shape), times >= 0, levels


class Remasking(Ancestral):
    r"""Ancestral sampling that draws a share of the symbols anew in every step, so that errors are mended.

    From t to s each symbol comes from the Markov bridge or, with probability ``share``, from
    :math:`q(x_s | x_0)` with x_0 from the posterior, whatever :math:`x_t` is. The marginals are those of the
    process for every share. Under masking a visible symbol is masked again with probability
    :math:`\rho = \text{share}\,(1 - \alpha_s)`, which is ReMDM and, with
    :math:`\sigma = (1 - \text{share})(1 - \alpha_s)/(1 - \alpha_t)`, discrete DDIM.

    With the exact posterior each single symbol is right for any number of steps; several together are as the
    number of steps grows, as with :class:`Ancestral`, to whose kernel a share of 0 reduces it.

    Args:
        share: probability, in [0, 1], that a symbol is drawn anew in a step.

    Raises:
        ValueError: if the share lies outside [0, 1].

    References:
        Song et al. (DDIM), arXiv 2010.02502, appendix A; Wang et al. (ReMDM), arXiv 2503.00307.
    """

    weak_order: int | None = None
    strong_order: int | None = None

    def __init__(self, share: float) -> None:
        self.share = check_number("share", share, at_least=0, at_most=1)

    def __repr__(self) -> str:
        return f"Remasking(share={self.share:g})"

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> Any:
        """Those of the mixed bridge.

        Raises:
            ValueError: for a process that cannot draw a share of its symbols anew.
        """
        require(process, Ability.REDRAWS, argument="sampler", by=self, instead="Ancestral()")
        return process.coefficients(s, t, 1 - self.share)
