"""What a guided denoiser is: p(x_0 | x_t, y) of observations y, with an approximation of log p(y | x_t)."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.proposal import Readings
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = [
    "Guidance",
    "GuidedDenoiser",
    "Twisted",
    "check_denoiser",
    "check_guidance",
    "shift_mean",
]


class Twisted(NamedTuple):
    r"""What a guided denoiser finds at one state.

    Attributes:
        prior: the denoiser's own :math:`p(x_0 | x_t)`.
        posterior: an approximation of :math:`p(x_0 | x_t, y)`.
        log_twist: an approximation of :math:`\log p(y | x_t)` in nats, the shape that the likelihood gives.
        readings: the observations as linearized readings of x_0, where the method makes them: they say how
            far particles may spread.
    """

    prior: TorchDistribution
    posterior: TorchDistribution
    log_twist: Tensor
    readings: Readings | None = None


class GuidedDenoiser(Denoiser):
    r"""A denoiser that knows of observations y: its posterior approximates :math:`p(x_0 | x_t, y)`.

    By Tweedie's formula the exact one has the mean

    .. math:: E[x_0 | x_t, y] = E[x_0 | x_t] + \frac{\sigma_t^2}{\alpha_t} \nabla_{x_t} \log p(y | x_t),

    and methods differ in their approximation of :math:`p(y | x_t)`, the twist. It is a denoiser as any other,
    so every sampler takes it; twisted SMC uses it as proposal and corrects its error.

    **Implementing a guidance.** The constructor takes the denoiser first and the observations second, as a
    :class:`~pyro_diffusion.likelihoods.Likelihood` or a classifier: then the class itself can be given as
    ``guidance`` to :class:`~pyro_diffusion.infer.TwistedSMC` and the guides, which call
    ``guidance(denoiser, likelihood)``. Implement :meth:`twisted`, which is called under ``torch.no_grad``;
    what it returns for a datum must depend on that datum alone. A guidance without a log-twist overrides
    ``forward`` instead, and serves samplers only. What it asks of the forward process, as Tweedie's formula,
    it lists in ``needs``; nothing else tells processes apart.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior.

    Attributes:
        needs: what the denoiser's process must be able to do, see :class:`~pyro_diffusion.processes.Ability`.

    Raises:
        ValueError: if ``denoiser`` is not a denoiser, or its process lacks an ability.

    Example:
        >>> import torch
        >>> class Shifted(GuidedDenoiser):
        ...     '''The mean shifted by s times the gradient of log p(y | x_0) at the mean.'''
        ...     def __init__(self, denoiser, likelihood, s=0.1):
        ...         super().__init__(denoiser)
        ...         self.likelihood, self.s = likelihood, s
        ...     def twisted(self, xt, t, **context):
        ...         prior = self.denoiser(xt, t, **context)
        ...         with torch.enable_grad():
        ...             x0 = prior.mean.detach().requires_grad_()
        ...             log_twist = self.likelihood.log_prob(x0)
        ...             (gradient,) = torch.autograd.grad(log_twist.sum(), x0)
        ...         posterior = Normal(prior.mean + self.s * gradient, prior.stddev).to_event(1)
        ...         return Twisted(prior, posterior, log_twist.detach())
    """

    guided = True
    needs: ClassVar[tuple[Ability, ...]] = ()

    def __init__(self, denoiser: Denoiser) -> None:
        process = check_denoiser(denoiser).process
        own = process.abilities
        by_draws = Ability.INDEPENDENT in own and bool(own & {Ability.NUMBERS, Ability.SYMBOLS})
        require(
            process,
            Ability.INDEPENDENT,
            *self.needs,
            argument="denoiser",
            by=type(denoiser).__name__,
            instead=f"SampledGuidance in place of {type(self).__name__}" if by_draws else None,
        )
        super().__init__(process)
        self.denoiser = denoiser

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and log-twist at x_t, detached (one network evaluation)."""
        raise NotImplementedError

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0 given x_t and y, batch and event shape of xt."""
        return self.twisted(xt, t, **context).posterior

    def follow(self, kernel: TorchDistribution, level: Level | None) -> TorchDistribution | None:
        """The chain's own kernel to the next state times the twist there, as far as a method knows both.

        Particles draw from it in place of the bridge to :meth:`twisted`'s posterior. Its weights are exact
        whatever it is, if its density is that of its draws and positive where the kernel's is.

        Args:
            kernel: the chain's own, from x_t to x_s, or at the end to the data.
            level: of s; None at the data, where the likelihood is the twist.

        Returns:
            A kernel of the same shape, or None (here always) where a method has none.
        """
        return None

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """How many rightmost dimensions of a context tensor belong to one datum: as the base has it."""
        return self.denoiser.context_event_dim(name, value)


# What makes a guided denoiser of a prior's denoiser and a likelihood: a class, or a partial of one.
Guidance = Callable[[Denoiser, Likelihood], GuidedDenoiser]


def shift_mean(
    posterior: TorchDistribution, shift: Tensor | float, share: Tensor | float = 1.0
) -> TorchDistribution:
    """A posterior of real data with its mean shifted and a share of its variance, a normal (or point mass).

    Args:
        posterior: over real x_0.
        shift: what is added to its mean.
        share: of its variance that is kept, by coordinate; all of it by default.
    """
    base, event_dim = per_coordinate(posterior), posterior.event_dim
    if isinstance(base, Delta):
        return Delta((base.v + shift).detach(), event_dim=event_dim, validate_args=False)
    scale = base.stddev if isinstance(base, Normal) else base.variance.sqrt()
    if isinstance(share, Tensor):
        scale = scale * share.sqrt()
    mean = (base.mean + shift).detach()
    return Normal(mean, scale.detach(), validate_args=False).to_event(event_dim)


def check_guidance(guidance: object) -> None:
    """Refuse what does not make a guided denoiser of a denoiser and a likelihood, as an instance of one.

    Raises:
        ValueError: naming what was found.
    """
    found = type(guidance).__name__
    if isinstance(guidance, Denoiser):
        raise ValueError(
            f"guidance: got an instance of {found}, expected a class of guided denoisers such as MMPS, or a "
            "function of (denoiser, likelihood) that returns an instance"
        )
    if not callable(guidance):
        raise ValueError(
            f"guidance: got {found}, expected guidance(denoiser, likelihood) such as the class MMPS"
        )


def check_denoiser(denoiser: object) -> Denoiser:
    """Refuse anything but a denoiser.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"denoiser: got {type(denoiser).__name__}, expected a Denoiser")
    return denoiser
