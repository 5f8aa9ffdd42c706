"""Heun's method in the noise-to-signal ratio, with churn."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.linear import BridgeCoefficients
from pyro_diffusion.samplers.ancestral import DDIM
from pyro_diffusion.samplers.base import Denoise, State
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_number

__all__ = ["Heun"]

MOST_CHURN = math.sqrt(2) - 1  # a step raises the noise variance at most to its double


class HeunCoefficients(NamedTuple):
    """Rows of Heun's method.

    Attributes:
        level: the level that the noise is raised to.
        renewal: the transition to it.
        bridge: from the raised level to s, without noise.
        correction: weight of the change in posterior mean over the step.
    """

    level: Level
    renewal: BridgeCoefficients
    bridge: BridgeCoefficients
    correction: Tensor


class Heun(DDIM):
    r"""EDM's stochastic sampler for any schedule: raise the noise, then one step of Heun's method.

    In :math:`y = x/\alpha` and :math:`\rho = \sigma/\alpha` the probability flow is
    :math:`dy/d\rho = (y - \hat x_0)/\rho` in every scale. A step adds noise to raise :math:`\rho_t` to
    :math:`\hat\rho = (1 + \gamma)\rho_t`, with :math:`\gamma = \min(\text{churn}/K, \sqrt2 - 1)` on a grid
    of K steps, goes down to :math:`\rho_s` by Euler's step (DDIM's) and corrects it by the slope found there.
    Noise is never raised above the end of the schedule.

    Two network evaluations a step; processes with a flow (Gaussian ones with churn).
    Deterministic, of order 2 and usable in both directions without churn; with churn
    (and ``noise=1``) the state is of weak order 2, once :math:`K > 2.5\,\text{churn}`: with fewer steps
    :math:`\gamma` is at its limit, every step of log-SNR is at least log 2 wide however many there are, and
    errors fall like 1/K. Made for the
    :func:`~pyro_diffusion.schedules.karras` grid: in few, large steps of log-SNR the correction overshoots.

    Args:
        churn: how much noise is renewed over the whole grid, from 0 to 1e6 (S_churn of the paper).
        noise: factor of the fresh noise, > 0 and at most 1000 (S_noise; a little above 1 makes up for what
            networks remove).
        between: the range of :math:`\rho` in which noise is renewed (S_tmin, S_tmax).

    Raises:
        ValueError: for churn or noise outside these limits, or a range that is not increasing.

    References:
        Karras et al., Elucidating the design space, arXiv 2206.00364, algorithm 2.
    """

    evaluations = 2
    needs = (Ability.LINEAR,)

    def __init__(
        self,
        churn: float = 0.0,
        noise: float = 1.0,
        between: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__(eta=0.0)
        check_number("churn", churn, at_least=0, at_most=1e6)
        check_number("noise", noise, above=0, at_most=1e3)
        if len(between) != 2 or not 0 <= between[0] < between[1]:
            raise ValueError(f"between: got {between}, expected 0 <= low < high")
        self.churn, self.noise, self.between = float(churn), float(noise), between
        self.order = 2 if churn == 0 else None
        self.weak_order = 2 if churn > 0 and noise == 1 else None

    def __repr__(self) -> str:
        return f"Heun(churn={self.churn:g}, noise={self.noise:g})"

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> HeunCoefficients:
        """Raised levels, and the bridges from them.

        Raises:
            ValueError: for a process without a flow, and with churn for one that is not Markov.
        """
        level, variance = t, torch.zeros_like(t.sigma)
        rho = t.sigma / t.alpha
        if self.churn > 0:
            require(process, Ability.MARKOV, argument="sampler", by=self, instead="Heun()")
            gamma = min(self.churn / len(t.t), MOST_CHURN)
            ratio = (-0.5 * t.clock).exp()
            chosen = (ratio >= self.between[0]) & (ratio <= self.between[1])
            raised = torch.where(chosen, t.clock - 2 * math.log1p(gamma), t.clock)
            level = process.level_of_clock(raised.reshape(len(t.t)))
            gain = torch.expm1(t.log_snr - level.log_snr).clamp(min=0)
            variance = (self.noise * level.alpha * rho).square() * gain
        return HeunCoefficients(
            level=level,
            renewal=BridgeCoefficients(level.alpha / t.alpha, torch.zeros_like(rho), variance),
            bridge=super().coefficients(process, s, level),
            correction=0.5 * s.alpha * torch.expm1(0.5 * (s.log_snr - level.log_snr)),
        )

    def step(
        self,
        process: ForwardProcess,
        denoise: Denoise,
        state: State,
        s: Level,
        t: Level,
        c: HeunCoefficients,
    ) -> State:
        r"""Raise the noise, take Euler's step, correct it.

        .. math::
            \hat x &= \frac{\hat\alpha}{\alpha_t}\,x_t
                     + \hat\alpha \sqrt{\hat\rho^2 - \rho_t^2}\;S\,z, \qquad z \sim \mathcal N(0, I), \\
            x' &= r\,\hat x + k\,\hat x_0(\hat x), \qquad
                  r = \frac{\sigma_s}{\hat\sigma}, \quad k = \alpha_s - r\,\hat\alpha, \\
            x_s &= x' + \frac{\alpha_s}{2} \Big(\frac{\hat\rho}{\rho_s} - 1\Big)
                   \big(\hat x_0(x') - \hat x_0(\hat x)\big),

        with hats for the raised level and S for the factor ``noise``; without churn it is the level at t.
        The last line replaces the slope of Euler's step, :math:`(\hat x/\hat\alpha -
        \hat x_0(\hat x))/\hat\rho`, by its average with that at :math:`x'`.
        """
        x = state.x
        if self.churn > 0:
            x = draw(process.combine(x, process.point_mass(x), c.renewal)).detach()
        mean = denoise(x, c.level).mean
        x = self.bridge_step(process, x, mean, c.bridge)
        return State(x + c.correction * (denoise(x, s).mean - mean))
