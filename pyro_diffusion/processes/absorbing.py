"""Destruction of symbols by masking."""

import math
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.categorical import CategoricalProcess
from pyro_diffusion.processes.levels import Rates
from pyro_diffusion.schedules import Schedule
from pyro_diffusion.validation import check_positive_int

__all__ = ["Absorbing"]


class Absorbing(CategoricalProcess):
    """Destruction by masking: a lost symbol becomes the extra symbol ``mask`` = states and stays so.

    Args:
        schedule: ``alpha(t)`` is the probability that a symbol is not yet masked.
        states: number of data symbols.
        event_dim: number of rightmost dimensions that make one datum.

    References:
        Austin et al., arXiv 2107.03006; Sahoo et al. (MDLM), arXiv 2406.07524.
    """

    abilities: ClassVar[frozenset[Ability]] = CategoricalProcess.abilities | {Ability.MASK}

    def __init__(self, schedule: Schedule, states: int, event_dim: int = 1) -> None:
        check_positive_int("states", states, at_least=2)
        self.mask = states
        noise = torch.zeros(states + 1, dtype=torch.float64)
        noise[states] = 1.0
        super().__init__(schedule, states, noise, event_dim)

    def divergence_rate(
        self, x0: Tensor, xt: Tensor, posterior: TorchDistribution, rates: Rates
    ) -> Tensor:
        r"""The same in closed form, :math:`\frac{-\alpha'}{1 - \alpha} \sum_i -\log p_{x_{0,i}}`
        over masked i.

        References:
            Sahoo et al. (MDLM), arXiv 2406.07524; Shi et al. (MD4), arXiv 2406.04329.
        """
        alpha = rates.level.alpha
        clean = self._floored(posterior, alpha.dtype)
        cost = -clean.gather(-1, x0.unsqueeze(-1)).squeeze(-1).log()
        weight = -rates.log_alpha * alpha / (1 - alpha).clamp(min=torch.finfo(alpha.dtype).eps)
        return sum_rightmost(torch.where(xt == self.mask, weight * cost, 0.0), self.event_dim)

    def times_of_loss(self, x: Tensor, uniform: Tensor) -> Tensor:
        r"""The times at which symbols were lost, given which of them are by t = 1.

        A symbol is lost after t with probability :math:`\alpha_t`, apart from all others; so :math:`\alpha`
        at the time of its loss is uniform above :math:`\alpha_1`.

        Args:
            x: a state at t = 1, batch + event.
            uniform: numbers in [0, 1], of x's shape.

        Returns:
            Times in [0, 1], of x's shape; -1 for a symbol that is no mask (it was not lost), and for one that
            was lost before t = 0.
        """
        low, high = torch.zeros_like(uniform), torch.ones_like(uniform)
        first, last = self._survival(low), self._survival(high)
        alpha = last + (1 - last) * uniform
        for _ in range(2 + round(-math.log2(torch.finfo(uniform.dtype).eps))):  # bisection
            middle = (low + high) / 2
            later = self._survival(middle) > alpha
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return torch.where((x == self.mask) & (alpha <= first), high, -1.0)

    def _survival(self, t: Tensor) -> Tensor:
        """alpha at times of the shape of a state."""
        return self.scales(self.schedule.level(t, check=False)).alpha
