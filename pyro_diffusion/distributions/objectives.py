"""What a chain's reverse terms are summed with: the bound itself, or weights on its terms."""

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_diffusion.processes import ForwardProcess
from pyro_diffusion.schedules import Level

__all__ = ["Bound", "Hybrid", "Objective", "Simple", "Weighted", "divergence"]

Weight = Callable[[Tensor, Tensor, int], Tensor]


def divergence(q: TorchDistribution, p: TorchDistribution) -> Tensor:
    """KL(q || p), in closed form where torch has one, else unbiased from one draw of q."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        x = q.rsample() if q.has_rsample else q.sample()
        return q.log_prob(x) - p.log_prob(x)


class Objective:
    """The cost of one reverse step: a number per datum that :class:`Diffusion` sums over the chain.

    ``is_bound`` says whether the sum is minus a lower bound of log p(x).
    """

    is_bound = False

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """Cost of the step from t to s, batch shape."""
        raise NotImplementedError


class Bound(Objective):
    r"""The evidence lower bound: :math:`KL(q(x_s | x_t, x_0) \,\|\, p(x_s | x_t))` (nats)."""

    is_bound = True

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """The divergence of the step, batch shape."""
        return divergence(process.bridge(xt, x0, s, t), process.reverse(xt, posterior, s, t))


class Weighted(Bound):
    r"""The bound's terms under weights: :math:`\sum_j w(\lambda_{s_j}, \lambda_{t_j}, K)\, KL_j`.

    Not a bound of log p(x) in general. When :math:`w` grows with t (falls with the log-SNR) it is one, up
    to a constant, averaged over noisy copies of the data (arXiv 2303.00848, section 3): weighting that way
    trains a likelihood of augmented data.

    Args:
        weight: ``weight(log_snr_s, log_snr_t, steps)``, a tensor of the levels' shape.
        mean_only: whether the posterior is replaced by a point mass at its mean, so that the weights act on
            squared errors alone.
    """

    is_bound = False

    def __init__(self, weight: Weight, mean_only: bool = False) -> None:
        self.weight, self.mean_only = weight, mean_only

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """The weighted divergence of the step, batch shape."""
        if self.mean_only:
            posterior = process.point_mass(posterior.mean)
        terms = super().__call__(process, xt, x0, posterior, s, t, steps)
        weight = self.weight(s.log_snr, t.log_snr, steps)
        return weight.reshape(weight.shape[: terms.dim()]) * terms


class Simple(Weighted):
    r"""DDPM's L_simple: :math:`\tfrac1K\sum_j \|\epsilon - \hat\epsilon(x_{t_j})\|^2`.

    With a point mass the bound's term is
    :math:`\tfrac12 (e^{\lambda_s - \lambda_t} - 1)\,\|\epsilon - \hat\epsilon\|^2`, so this is the weight
    :math:`2 / (K (e^{\lambda_s - \lambda_t} - 1))` on it. Gaussian processes only. The variance, if any, is
    not trained (use :class:`Hybrid`).

    References:
        Ho et al., arXiv 2006.11239, equation 14.
    """

    def __init__(self) -> None:
        super().__init__(lambda s, t, steps: 2 / (steps * torch.expm1(s - t)), mean_only=True)


class Hybrid(Objective):
    r"""L_simple for the mean, the bound for the variance: :math:`L_{simple} + \gamma L_{vlb}`.

    The mean is detached inside :math:`L_{vlb}`, so the bound trains the variance head alone.

    Args:
        gamma: weight of the bound's terms, > 0.

    References:
        Nichol & Dhariwal, arXiv 2102.09672, section 3.1 (gamma = 0.001).
    """

    def __init__(self, gamma: float = 1e-3) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma: got {gamma}, expected a number > 0")
        self.gamma, self._simple, self._bound = float(gamma), Simple(), Bound()

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """Both parts, batch shape."""
        base = posterior.base_dist
        fixed = type(base)(base.mean.detach(), base.variance.sqrt(), validate_args=False)
        fixed = fixed.to_event(process.event_dim)
        simple = self._simple(process, xt, x0, posterior, s, t, steps)
        return simple + self.gamma * self._bound(process, xt, x0, fixed, s, t, steps)
