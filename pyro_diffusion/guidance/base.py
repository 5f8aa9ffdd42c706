"""What a guided denoiser is: p(x_0 | x_t) bent towards observations, with how well x_t explains them."""

from typing import NamedTuple

from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["GuidedDenoiser", "Twisted", "check_denoiser", "moved"]


class Twisted(NamedTuple):
    r"""One read of a guided denoiser.

    Attributes:
        prior: the denoiser's own :math:`p(x_0 | x_t)`.
        posterior: an approximation of :math:`p(x_0 | x_t, y)`.
        log_twist: an approximation of :math:`\log p(y | x_t)` in nats, the shape that the likelihood gives.
    """

    prior: TorchDistribution
    posterior: TorchDistribution
    log_twist: Tensor


class GuidedDenoiser(Denoiser):
    r"""A denoiser that knows of observations y: its posterior approximates :math:`p(x_0 | x_t, y)`.

    By Tweedie's formula the exact one has the mean

    .. math:: E[x_0 | x_t, y] = E[x_0 | x_t] + \frac{\sigma_t^2}{\alpha_t} \nabla_{x_t} \log p(y | x_t),

    and methods differ in what they take for :math:`p(y | x_t)`, the twist. It is a denoiser as any other, so
    every sampler walks with it; twisted SMC takes it as proposal and corrects what it gets wrong.

    Subclasses implement :meth:`twisted`. Each datum's answer depends on that datum alone.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior.

    Raises:
        ValueError: if ``denoiser`` is not a denoiser.
    """

    guided = True

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(check_denoiser(denoiser).process)
        self.denoiser = denoiser

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and log-twist at x_t, detached (one network read)."""
        raise NotImplementedError

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0 given x_t and y, batch and event shape of xt."""
        return self.twisted(xt, t, **context).posterior

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """How many rightmost dimensions of a context tensor belong to one datum: as the base has it."""
        return self.denoiser.context_event_dim(name, value)


def moved(posterior: TorchDistribution, shift: Tensor) -> TorchDistribution:
    """A posterior of real data with its mean shifted and its variance kept, as a normal (or a point mass)."""
    base, event_dim = per_coordinate(posterior), posterior.event_dim
    if isinstance(base, Delta):
        return Delta((base.v + shift).detach(), event_dim=event_dim, validate_args=False)
    scale = base.stddev if isinstance(base, Normal) else base.variance.sqrt()
    mean = (base.mean + shift).detach()
    return Normal(mean, scale.detach(), validate_args=False).to_event(event_dim)


def check_denoiser(denoiser: object) -> Denoiser:
    """Refuse anything but a denoiser.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"denoiser: got {type(denoiser).__name__}, expected a Denoiser")
    return denoiser
