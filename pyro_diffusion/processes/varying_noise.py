"""Destruction of symbols by replacement from a distribution that changes on the way."""

import math

import torch
from torch import Tensor

from pyro_diffusion.processes.categorical import CategoricalProcess
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.validation import check_finite, check_tensor

__all__ = ["VaryingNoise"]


class VaryingNoise(CategoricalProcess):
    r"""Symbols are lost as under :class:`CategoricalProcess`, to noise :math:`\pi_t` that changes with time.

    .. math::
        q(x_t | x_0) &= \alpha_t\,\delta_{x_0} + m_t, \qquad m_t = (1 - \alpha_t)\,\pi_t, \\
        q(x_t | x_s) &= \tfrac{\alpha_t}{\alpha_s}\,\delta_{x_s} + m_{t|s}, \qquad
        m_{t|s} = m_t - \tfrac{\alpha_t}{\alpha_s} m_s .

    Bridge, reverse kernel and the continuous-time bound follow as for constant noise, exact. The noise is the
    polynomial through given ``stages`` :math:`\pi^{(0)}, \dots, \pi^{(n)}`,

    .. math:: \pi_t = \sum_{j=0}^n \binom nj (1 - \alpha_t)^j\,\alpha_t^{n-j}\, \pi^{(j)} :

    the first is that of the first symbols lost, the last that which everything ends in. One stage is
    constant noise. Two are, say, wrong symbols early and masks in the end, so that a model trained under it
    has learned to mend what it sees, and all of the data's symbols stay under suspicion.

    A symbol that is replaced at t, at rate :math:`-\alpha'/\alpha`, gets a draw of
    :math:`r_t = m_t - \alpha_t\, dm_t/d\alpha_t`, which sums to one. Transitions exist,
    :math:`m_{t|s} \ge 0` for all s < t, if and only if this has no negative part: always with one or two
    stages; from three on noise may be taken back faster than replacement can, which is refused.

    Args:
        schedule: ``alpha(t)`` is the probability that a symbol was never replaced.
        states: number of symbols that data may take, 0 ... states - 1.
        stages: (n + 1, K), probabilities over K >= states symbols by row, at most 32 rows.
        event_dim: number of rightmost dimensions that make one datum.

    Attributes:
        noise: the last stage.

    Raises:
        ValueError: for stages that are no probabilities, or under which transitions would have negative ones.

    Example:
        A fifth of the first symbols lost become any symbol, the others a mask, and all end as masks.

        >>> from pyro_diffusion.schedules import Rectified
        >>> mask = torch.tensor([0.0, 0.0, 0.0, 1.0])
        >>> uniform = torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3
        >>> stages = torch.stack([0.8 * mask + 0.2 * uniform, mask])
        >>> process = VaryingNoise(Rectified.full(), states=3, stages=stages)
        >>> process.marginal(torch.tensor([0, 1]), 0.5).event_shape
        torch.Size([2])

    References:
        von Ruette et al. (GIDD), arXiv 2503.04482.
    """

    stages: Tensor

    def __init__(self, schedule: Schedule, states: int, stages: Tensor, event_dim: int = 1) -> None:
        stages = _checked(stages)
        super().__init__(schedule, states, stages[-1], event_dim)
        self.register_buffer("stages", stages)
        alpha = torch.linspace(0, 1, 1001, dtype=torch.float64).unsqueeze(-1)
        least = self._replacement(alpha).min(0)
        if float(least.values.min()) < -1e-9:
            symbol = int(least.values.argmin())
            at = 1 - float(alpha[least.indices[symbol]])
            raise ValueError(
                f"stages: got noise that takes symbol {symbol} back faster than replacement can at 1 - alpha "
                f"= {at:.3g}, expected transitions m_t - (alpha_t / alpha_s) m_s >= 0 (fewer stages, or "
                "slower changes)"
            )

    def _until(self, t: Level) -> Tensor:
        """alpha_t, then m_t, on a last dimension of 1 + K."""
        alpha = t.alpha.unsqueeze(-1)
        return torch.cat([alpha, self._mass(alpha.double()).to(alpha.dtype)], -1)

    def _between(self, s: Level, t: Level) -> Tensor:
        """alpha_t / alpha_s, then m_t|s, likewise: their small difference is taken in double precision."""
        early, late = (v.alpha.unsqueeze(-1).double() for v in (s, t))
        kept = late / early
        mass = (self._mass(late) - kept * self._mass(early)).clamp(min=0)
        return torch.cat([kept, mass], -1).to(t.alpha.dtype)

    def _rows(self, x: Tensor, survival: Tensor) -> Tensor:
        kept = torch.nn.functional.one_hot(x, len(self.noise)).to(survival.dtype)
        return survival[..., :1] * kept + survival[..., 1:]

    def _columns(self, x: Tensor, survival: Tensor) -> Tensor:
        kept = torch.nn.functional.one_hot(x, len(self.noise)).to(survival.dtype)
        return survival[..., :1] * kept + _at(survival[..., 1:], x)

    def _spread(self, weights: Tensor, survival: Tensor) -> Tensor:
        return survival[..., :1] * weights + survival[..., 1:] * weights.sum(-1, keepdim=True)

    def _inflow(self, x: Tensor, t: Level) -> Tensor:
        stays = torch.nn.functional.one_hot(x, len(self.noise))
        rates = self._replacement(t.alpha.unsqueeze(-1).double()).clamp(min=0)
        return _at(rates, x) * (1 - stays)

    def _mass(self, alpha: Tensor) -> Tensor:
        """m, of alpha (float64) with a last dimension for symbols."""
        return (1 - alpha) * (self._weights(alpha) @ self.stages.double())

    def _replacement(self, alpha: Tensor) -> Tensor:
        """r, the distribution of what replaces a symbol, likewise."""
        n = len(self.stages) - 1
        place = torch.arange(n + 1, dtype=alpha.dtype, device=alpha.device)
        change = (place + 1) * alpha + (place + 1 - n) * (1 - alpha)
        return (self._weights(alpha) * change) @ self.stages.double()

    def _weights(self, alpha: Tensor) -> Tensor:
        """Weights of the stages in the noise, on the last dimension."""
        n = len(self.stages) - 1
        place = torch.arange(n + 1, dtype=alpha.dtype, device=alpha.device)
        count = alpha.new_tensor([math.comb(n, j) for j in range(n + 1)])
        return count * (1 - alpha) ** place * alpha ** (n - place)


def _at(probs: Tensor, x: Tensor) -> Tensor:
    """Entries of the last dimension at symbols, of shapes that broadcast; one is left of that dimension."""
    index = x.unsqueeze(-1)
    shape = torch.broadcast_shapes(probs.shape[:-1], x.shape)
    return probs.expand(*shape, -1).gather(-1, index.expand(*shape, 1))


def _checked(stages: Tensor) -> Tensor:
    stages = check_tensor("stages", stages).detach().double()
    check_finite("stages", stages)
    if stages.dim() != 2 or not 1 <= len(stages) <= 32:
        raise ValueError(
            f"stages: got shape {tuple(stages.shape)}, expected a row of probabilities for each of 1 to 32 "
            "stages"
        )
    sums = stages.sum(-1)
    if bool((stages < 0).any()) or bool(((sums - 1).abs() > 1e-5).any()):
        raise ValueError(
            f"stages: got numbers from {float(stages.min()):g} and rows that sum to {float(sums.min()):g} to "
            f"{float(sums.max()):g}, expected probabilities"
        )
    return stages / sums.unsqueeze(-1)
