"""Linear Gaussian destruction: all of the Gaussian algebra of the package."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.conditioned_normal import normal_from, normal_tensors
from pyro_diffusion.processes.levels import Rates, check_order
from pyro_diffusion.processes.linear import BridgeCoefficients, LinearProcess
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import check_tensor

__all__ = ["GaussianProcess"]


class GaussianProcess(LinearProcess):
    r""":math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` with independent standard normal noise.

    With :math:`c = 1 - e^{\lambda_t - \lambda_s}` for s < t,

    .. math::
        q(x_t | x_0) &= \mathcal N(\alpha_t x_0, \sigma_t^2), \qquad
        q(x_t | x_s) = \mathcal N(\tfrac{\alpha_t}{\alpha_s} x_s, \sigma_t^2 c), \\
        q_\eta(x_s | x_t, x_0) &= \mathcal N(r\,x_t + k\,x_0,\; \eta^2 \sigma_s^2 c), \quad
        r = \tfrac{\sigma_s}{\sigma_t}\sqrt{1 - \eta^2 c}, \quad k = \alpha_s - r\,\alpha_t .

    Reverse kernel of a posterior with mean m and variance w:
    :math:`\mathcal N(r\,x_t + k\,m,\; \eta^2\sigma_s^2 c + k^2 w)`, exact for point masses and normals,
    the moment-matched normal otherwise (still a valid reverse model, hence a valid bound). A point mass
    gives DDPM's small variance, the exact posterior variance gives Analytic-DPM's.

    The prior is :math:`\mathcal N(0, \alpha_1^2 + \sigma_1^2)`, that of unit-variance data.

    Args:
        schedule: signal and noise scales; chains need finite log-SNR at their ends.
        event_dim: number of rightmost dimensions that make one datum.

    Example:
        >>> from pyro_diffusion.schedules import Cosine
        >>> process = GaussianProcess(Cosine(), event_dim=1)
        >>> process.marginal(torch.zeros(5, 2), torch.rand(5)).event_shape
        torch.Size([2])

    References:
        Ho et al., arXiv 2006.11239; Song et al. (DDIM), arXiv 2010.02502, equation 7;
        Bao et al. (Analytic-DPM), arXiv 2201.06503; Kingma et al., arXiv 2107.00630, appendix A.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(Ability) - {
        *(Ability.SYMBOLS, Ability.STRINGS, Ability.JUMPS, Ability.MASK, Ability.REDRAWS)
    }

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_s (exact)."""
        early, late = self.level(s, xs, "s", "xs"), self.level(t, xs)
        if not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        fresh = -torch.expm1(late.log_snr - early.log_snr)
        return self.noised(late.alpha / early.alpha * xs, late.sigma * fresh.sqrt())

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: BridgeCoefficients
    ) -> TorchDistribution:
        """Bridge integrated over the posterior's first two moments."""
        c, base = coefficients, per_coordinate(posterior)
        variance = c.variance
        if not isinstance(base, Delta):
            variance = variance + c.x0.square() * base.variance
        return self.noised(c.xt * xt + c.x0 * base.mean, variance.sqrt())

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Mean and standard deviation of every coordinate, and the factor of a kernel that has one."""
        return normal_tensors(kernel)

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The normal of such moments."""
        return normal_from(tensors, self.event_dim)

    def divergence_rate(
        self, x0: Tensor, xt: Tensor, posterior: TorchDistribution, rates: Rates
    ) -> Tensor:
        r""":math:`\tfrac12 \sum_i (-\lambda_i')\, e^{\lambda_i} (x_0 - \hat x_0)_i^2`, batch shape."""
        del xt
        error = (x0 - posterior.mean).square()
        weight = -0.5 * rates.log_snr * rates.level.log_snr.exp()
        return sum_rightmost(weight * error, self.event_dim)

    def coordinate_log_likelihood(self, xt: Tensor, values: Tensor, t: Tensor | Level) -> Tensor:
        """log q(x_t | x_0) of every coordinate, for x_0 equal to each of the values, up to a constant."""
        if check_tensor("values", values).dim() != 1:
            raise ValueError(f"values: got shape {tuple(values.shape)}, expected a vector")
        level = self.level(t, xt, state="xt")
        z = (xt.unsqueeze(-1) - level.alpha.unsqueeze(-1) * values) / level.sigma.unsqueeze(-1)
        return -0.5 * z.square()
