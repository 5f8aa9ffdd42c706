"""Going back and forth over each step, so that what is known and what is not come to agree."""

from typing import Any

from torch import Tensor

from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.samplers.ancestral import Ancestral
from pyro_diffusion.samplers.base import Denoise, Sampler, State, check_sampler
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_positive_int

__all__ = ["RePaint"]


class RePaint(Sampler):
    r"""A sampler's step from t to s, then ``jumps`` times: noise back by :math:`q(x_t | x_s)`, and again.

    Made for :class:`~pyro_diffusion.guidance.Replacement`, whose known coordinates are right at every level
    while the others depend on them through x_t alone: each round brings the others closer to them. With an
    exact denoiser of no observations the rounds change nothing. Approximate; better with more rounds and
    smaller steps. ``jumps + 1`` times the predictor's evaluations a step; any process. (The jumps are of one
    step of the grid: coarser or finer ones are the grid's business.)

    Args:
        predictor: any sampler; :class:`Ancestral` by default.
        jumps: how often each step is taken back, >= 0.

    Raises:
        ValueError: if the predictor is not a sampler or ``jumps`` is negative.

    Example:
        >>> RePaint(jumps=9).evaluations
        10

    References:
        Lugmayr et al., arXiv 2201.09865, algorithm 1.
    """

    def __init__(self, predictor: Sampler | None = None, jumps: int = 9) -> None:
        self.predictor = check_sampler(Ancestral() if predictor is None else predictor)
        self.jumps = check_positive_int("jumps", jumps, at_least=0)
        self.evaluations = self.predictor.evaluations * (self.jumps + 1)

    def __repr__(self) -> str:
        return f"RePaint({self.predictor!r}, jumps={self.jumps})"

    def init(self, x: Tensor) -> State:
        """The predictor's."""
        return self.predictor.init(x)

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> tuple[Any, ...]:
        """The predictor's.

        Raises:
            ValueError: for a process without a Markov transition, and as the predictor.
        """
        require(process, Ability.MARKOV, argument="sampler", by=self)
        return self.predictor.coefficients(process, s, t)

    def step(
        self, process: ForwardProcess, denoise: Denoise, state: State, s: Level, t: Level, c: Any
    ) -> State:
        r"""Step, and for every jump back and step again; a predictor remembers earlier steps only.

        .. math:: x_s^{(0)} = f(x_t), \qquad x_t^{(i)} \sim q(x_t | x_s^{(i-1)}), \qquad
                  x_s^{(i)} = f(x_t^{(i)}), \qquad i = 1, \ldots, \text{jumps},

        with f for the predictor's step from t to s.
        """
        after = self.predictor.step(process, denoise, state, s, t, c)
        for _ in range(self.jumps):
            back = draw(process.transition(after.x, s, t)).detach()
            after = self.predictor.step(process, denoise, state._replace(x=back), s, t, c)
        return after
