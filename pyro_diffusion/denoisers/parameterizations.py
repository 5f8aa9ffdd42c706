"""What a network's output means: one row of coefficients each."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.processes import Ability
from pyro_diffusion.validation import check_number

__all__ = [
    "Coefficients",
    "Data",
    "EDMPreconditioning",
    "Noise",
    "Parameterization",
    "Score",
    "V",
    "Velocity",
]


class Coefficients(NamedTuple):
    r"""Preconditioning :math:`\hat x_0 = c_{skip}\,x_t + c_{out}\,F(c_{in}\,x_t, \lambda)`.

    Attributes:
        c_in: scale of the network's input.
        c_skip: weight of the state.
        c_out: weight of the network's output.
    """

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor


@dataclass(frozen=True)
class Parameterization:
    r"""How a network's output F gives :math:`\hat x_0 = E[x_0 | x_t]`.

    Subclasses give the two coefficients of :meth:`skip_out`. The input is always scaled by
    :math:`c_{in} = (\alpha^2 + \sigma^2)^{-1/2}`, so that the network sees unit variance, and the same
    numbers under every schedule of the same log-SNR.

    Attributes:
        needs: what the denoiser's process must be able to do, see :class:`~pyro_diffusion.processes.Ability`.
    """

    needs: ClassVar[tuple[Ability, ...]] = (Ability.LINEAR,)

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        """The three coefficients at given scales."""
        return Coefficients(torch.hypot(alpha, sigma).reciprocal(), *self.skip_out(alpha, sigma))

    def skip_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the state and of the network's output."""
        raise NotImplementedError

    def target(self, x0: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output that makes the estimate x_0: what a regression would fit."""
        skip, out = self.skip_out(alpha, sigma)
        return (x0 - skip * xt) / out


@dataclass(frozen=True)
class Data(Parameterization):
    r"""F is the data: :math:`\hat x_0 = F`, under any process of real numbers."""

    needs: ClassVar[tuple[Ability, ...]] = ()

    def skip_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """0 and 1."""
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class Noise(Parameterization):
    r"""F is the noise: :math:`\hat x_0 = (x_t - \sigma F)/\alpha` (arXiv 2006.11239)."""

    def skip_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """1 / alpha and -sigma / alpha."""
        return 1 / alpha, -sigma / alpha


@dataclass(frozen=True)
class V(Parameterization):
    r"""F is :math:`v = (\alpha\epsilon - \sigma x_0)/\sqrt{\alpha^2+\sigma^2}` (arXiv 2202.00512)."""

    def skip_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha / n^2 and -sigma / n with n^2 = alpha^2 + sigma^2."""
        norm = torch.hypot(alpha, sigma)
        return alpha / norm.square(), -sigma / norm


@dataclass(frozen=True)
class Score(Parameterization):
    r"""F is the score: :math:`\hat x_0 = (x_t + \sigma^2 F)/\alpha`, F = grad log q(x_t) (Tweedie).

    The only one whose output depends on the state's scale: it belongs to its schedule.
    """

    needs: ClassVar[tuple[Ability, ...]] = (Ability.LINEAR, Ability.TWEEDIE)

    def skip_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """1 / alpha and sigma^2 / alpha."""
        return 1 / alpha, sigma.square() / alpha


@dataclass(frozen=True)
class Velocity(Parameterization):
    r"""F is the straight path's velocity :math:`\epsilon - x_0` (flow matching, arXiv 2210.02747)."""

    def skip_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """1 / (alpha + sigma) and -sigma / (alpha + sigma)."""
        total = alpha + sigma
        return 1 / total, -sigma / total


@dataclass(frozen=True)
class EDMPreconditioning(Parameterization):
    r"""Karras preconditioning for data of standard deviation ``sigma_data``, at any signal scale.

    With :math:`n^2 = \alpha^2\sigma_d^2 + \sigma^2`: c_in = 1/n, c_skip = :math:`\alpha\sigma_d^2/n^2`,
    c_out = :math:`\sigma\sigma_d/n`. Input and regression target have unit variance at every t.

    Args:
        sigma_data: standard deviation of the data, in [1e-6, 1e6].

    Raises:
        ValueError: for another.

    References:
        Karras et al., arXiv 2206.00364, table 1 (there alpha = 1).
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_number("sigma_data", self.sigma_data, at_least=1e-6, at_most=1e6)

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        """The three coefficients at given scales."""
        norm = torch.hypot(alpha * self.sigma_data, sigma)
        return Coefficients(1 / norm, *self.skip_out(alpha, sigma))

    def skip_out(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the state and of the network's output."""
        norm = torch.hypot(alpha * self.sigma_data, sigma)
        return alpha * self.sigma_data**2 / norm.square(), sigma * self.sigma_data / norm
