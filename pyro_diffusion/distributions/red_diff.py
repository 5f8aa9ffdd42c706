"""Regularization by a denoiser's errors: the objective that makes SVI under a diffusion prior RED-diff."""

from collections.abc import Callable

from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.objectives import DecoderStep, ReverseStep
from pyro_diffusion.distributions.regressions import Regression
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.abilities import require

__all__ = ["RedDiff"]


class RedDiff(Regression):
    r"""A prior for data that are being inferred: its gradient is :math:`w\,(\hat\epsilon - \epsilon)`.

    As ``objective`` of the :class:`~pyro_diffusion.distributions.Diffusion` site of a Pyro program, with an
    ``AutoDelta`` or ``AutoNormal`` guide and ``Trace_ELBO``, SVI is RED-diff: minus the site's ``log_prob``
    has the gradient in :math:`x_0`

    .. math:: \frac{1}{K + 1} \sum_{j=0}^K w(\lambda_{t_j}) (\hat\epsilon - \epsilon) =
              \frac{1}{K + 1} \sum_{j=0}^K w(\lambda_{t_j})\,\tfrac{\alpha}{\sigma} (x_0 - \hat x_0)

    in expectation, the network left out of differentiation. The value reported is
    :math:`\tfrac12 w \|\hat\epsilon - \epsilon\|^2`, averaged likewise; it is no bound, and not what is
    descended. The network is not trained. The site adds the chain's own
    :math:`KL(q(x_{t_K}|x_0) \| p(x_{t_K}))`, whose gradient is about :math:`\alpha_K^2 x_0`: nothing, on a
    grid that ends in noise.

    The default :math:`w = \text{weight}\cdot\sigma/\alpha`, the paper's, makes the gradient
    :math:`\text{weight}\cdot(x_0 - \hat x_0)`. With weight 2 and a grid even in log-SNR between
    :math:`\pm\Lambda` that is exactly :math:`-\nabla \log p` for standard normal data; for data of another
    scale it is approximate. :math:`w = \text{weight}\cdot\alpha/\sigma` makes it the gradient of
    :math:`KL(q(x_t|x_0) \| p(x_t))`, averaged: a prior smoothed by the noise, exact as times go to 0.
    Gaussian processes only.

    Args:
        weight: factor of the paper's weight, > 0 (its experiments use 0.25 for unweighted squared errors of
            the observation), or :math:`w` itself as a function of the log-SNR (of each coordinate, where they
            differ).

    Raises:
        ValueError: if the weight is neither a positive number nor a function.

    References:
        Mardani et al., arXiv 2305.04391, section 4 and algorithm 1.
    """

    def __init__(self, weight: float | Callable[[Tensor], Tensor] = 2.0) -> None:
        if not callable(weight) and not weight > 0:
            raise ValueError(
                f"weight: got {weight!r}, expected a number > 0 or a function of log-SNR"
            )
        self.weight = weight

    def check(self, denoiser: Denoiser) -> None:
        """A process of real numbers and noise that is independent of them."""
        super().check(denoiser)
        needs = Ability.INDEPENDENT
        require(denoiser.process, needs, argument="objective", by=type(self).__name__)

    def error(self, step: ReverseStep | DecoderStep) -> Tensor:
        """The error at t over the number of levels, batch shape."""
        log_snr = step.t.log_snr
        root = (0.5 * log_snr).exp()
        error = (root * (step.x0 - step.posterior.mean)).detach()
        weight = self.weight(log_snr) if callable(self.weight) else self.weight / root
        pull = weight * error * step.x0
        cost = 0.5 * weight * error.square() + (pull - pull.detach())
        return sum_rightmost(cost, step.process.event_dim) / (step.steps + 1)
