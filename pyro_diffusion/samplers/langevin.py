"""Langevin moves at one noise level: as a corrector after any sampler's step, or alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.linear import BridgeCoefficients
from pyro_diffusion.samplers.base import Denoise, Sampler, State, check_sampler
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_positive_int

__all__ = ["AnnealedLangevin", "Langevin", "PredictorCorrector"]


class Langevin:
    r"""Moves that nearly keep :math:`q(x_s)`: with :math:`\delta = 2\,\text{snr}^2\sigma_s^2`,

    .. math:: x \leftarrow x + \delta\,\nabla\log q(x) + \sqrt{2\delta}\,z
              = (1 - 2\,\text{snr}^2)\,x + 2\,\text{snr}^2 \alpha_s \hat x_0 + 2\,\text{snr}\,\sigma_s z ,

    a linear Gaussian kernel like the bridge. The step is the paper's
    :math:`2(\text{snr}\,|z|/|\text{score}|)^2` with both norms at their typical values, so that it depends
    on the noise level alone: not on the datum, and never on its batch-mates.

    Approximate: moves are not Metropolis-adjusted. Where :math:`q(x_s)` is a normal of variance v, their
    stationary distribution has :math:`v/(1 - \text{snr}^2\sigma_s^2/v)`, however many moves are made.
    Gaussian processes only, in any scale.

    Args:
        snr: signal-to-noise ratio of a move, in (0, 1); the moves are stable below 1.
        moves: moves at each level, one network evaluation each.

    Raises:
        ValueError: if snr lies outside (0, 1) or moves < 1.

    References:
        Song & Ermon, arXiv 1907.05600; Song et al., arXiv 2011.13456, algorithms 4 and 5.
    """

    def __init__(self, snr: float = 0.16, moves: int = 1) -> None:
        if not 0 < snr < 1:
            raise ValueError(f"snr: got {snr}, expected a number in (0, 1)")
        self.snr, self.moves = float(snr), check_positive_int("moves", moves)

    def __repr__(self) -> str:
        return f"Langevin(snr={self.snr:g}, moves={self.moves})"

    def coefficients(self, process: ForwardProcess, s: Level) -> BridgeCoefficients:
        """The kernel of one move at every level.

        Raises:
            ValueError: for a process without Tweedie's formula.
        """
        require(process, Ability.TWEEDIE, argument="corrector", by=self)
        pull = 2 * self.snr**2
        return BridgeCoefficients(
            xt=torch.full_like(s.sigma, 1 - pull),
            x0=pull * s.alpha,
            variance=2 * pull * s.sigma.square(),
        )

    def correct(
        self,
        process: ForwardProcess,
        denoise: Denoise,
        x: Tensor,
        s: Level,
        c: BridgeCoefficients,
    ) -> Tensor:
        r"""All moves at one level, each from x to :math:`a\,x + k\,\hat x_0(x) + \sqrt v\,z`.

        Here :math:`a = 1 - 2\,\text{snr}^2`, :math:`k = 2\,\text{snr}^2 \alpha_s`,
        :math:`v = 4\,\text{snr}^2 \sigma_s^2` and :math:`z \sim \mathcal N(0, I)`.
        """
        for _ in range(self.moves):
            x = draw(process.combine(x, process.point_mass(denoise(x, s).mean), c)).detach()
        return x


class PredictorCorrectorCoefficients(NamedTuple):
    """Rows of the two halves."""

    predictor: tuple[Any, ...]
    corrector: BridgeCoefficients


class PredictorCorrector(Sampler):
    r"""A sampler's step from t to s, then Langevin moves at s.

    The moves pull the state towards :math:`q(x_s)` wherever the step left it. They leave an error of their
    own that more steps do not remove (see :class:`Langevin`), so no order of convergence is declared.
    Network evaluations are the predictor's and one for every move. Gaussian processes only.

    Args:
        predictor: any sampler of Gaussian processes.
        corrector: the moves.

    Raises:
        ValueError: if the predictor is not a sampler or the corrector not a :class:`Langevin`.

    Example:
        >>> from pyro_diffusion.samplers import DDIM
        >>> PredictorCorrector(DDIM(), Langevin(moves=2)).evaluations
        3

    References:
        Song et al., arXiv 2011.13456, algorithm 1.
    """

    def __init__(self, predictor: Sampler, corrector: Langevin | None = None) -> None:
        self.predictor = check_sampler(predictor)
        self.corrector = Langevin() if corrector is None else corrector
        if not isinstance(self.corrector, Langevin):
            raise ValueError(f"corrector: got {corrector!r}, expected Langevin(...)")
        self.evaluations = predictor.evaluations + self.corrector.moves

    def __repr__(self) -> str:
        return f"PredictorCorrector({self.predictor!r}, {self.corrector!r})"

    def init(self, x: Tensor) -> State:
        """The predictor's."""
        return self.predictor.init(x)

    def coefficients(
        self, process: ForwardProcess, s: Level, t: Level
    ) -> PredictorCorrectorCoefficients:
        """Those of both halves.

        Raises:
            ValueError: for a process that is not Gaussian.
        """
        corrector = self.corrector.coefficients(process, s)
        return PredictorCorrectorCoefficients(self.predictor.coefficients(process, s, t), corrector)

    def step(
        self,
        process: ForwardProcess,
        denoise: Denoise,
        state: State,
        s: Level,
        t: Level,
        c: PredictorCorrectorCoefficients,
    ) -> State:
        r"""Predict, then correct; what the predictor remembers stays its own.

        The predictor takes :math:`x_t` to :math:`x_s^{(0)}`; with a, k and v of :meth:`Langevin.correct`

        .. math:: x_s^{(i+1)} = a\,x_s^{(i)} + k\,\hat x_0(x_s^{(i)}) + \sqrt v\,z_i, \qquad
                  z_i \sim \mathcal N(0, I),

        ``moves`` times.
        """
        state = self.predictor.step(process, denoise, state, s, t, c.predictor)
        return state._replace(x=self.corrector.correct(process, denoise, state.x, s, c.corrector))


class Rescaling(Sampler):
    r"""Keeps :math:`x/\alpha` from level to level, without a network evaluation."""

    evaluations = 0

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> tuple[Tensor]:
        """Ratio of the signal scales."""
        return (s.alpha / t.alpha,)

    def step(
        self, process: ForwardProcess, denoise: Denoise, state: State, s: Level, t: Level, c: Any
    ) -> State:
        r""":math:`x_s = (\alpha_s/\alpha_t)\,x_t`."""
        return State(c[0] * state.x)


class AnnealedLangevin(PredictorCorrector):
    r"""Annealed Langevin dynamics: :math:`x/\alpha` is kept from level to level, Langevin moves do the rest.

    The sampler of noise-conditional score networks. It wants many levels, near enough for the moves to
    equilibrate: the ratio of neighbouring :math:`\sigma/\alpha` close to 1. ``moves`` network evaluations a
    step; approximate as :class:`Langevin` is, and no order of convergence is declared. Gaussian processes
    only.

    Args:
        snr: signal-to-noise ratio of a move, in (0, 1).
        moves: moves at each level.

    Raises:
        ValueError: if snr lies outside (0, 1) or moves < 1.

    References:
        Song & Ermon, arXiv 1907.05600, algorithm 1; step sizes of arXiv 2011.13456, algorithm 4.
    """

    def __init__(self, snr: float = 0.3, moves: int = 5) -> None:
        super().__init__(Rescaling(), Langevin(snr, moves))
        self.snr, self.moves = snr, moves

    def __repr__(self) -> str:
        return f"AnnealedLangevin(snr={self.corrector.snr:g}, moves={self.corrector.moves})"
