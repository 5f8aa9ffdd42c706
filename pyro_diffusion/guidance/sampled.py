"""Guidance without gradients: the likelihood of draws from the denoiser's own posterior."""

import math

import torch
from pyro.distributions import Categorical, Delta, Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted, shift_mean
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.base import check_likelihood
from pyro_diffusion.processes import Ability, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import check_positive_int

__all__ = ["SampledGuidance"]


class SampledGuidance(GuidedDenoiser):
    r"""Weigh M draws of the denoiser's posterior by the likelihood: for any data, no gradient needed.

    With :math:`x_0^m \sim p(x_0 | x_t)` and :math:`\ell_m = p(y | x_0^m)`,

    .. math::
        \psi_t = \tfrac1M \textstyle\sum_m \ell_m, \qquad
        p(x_{0,i} = k | x_t, y) \approx \frac{n \sum_m w_m [x^m_{0,i} = k] + c\, p(x_{0,i} = k | x_t)}{n + c},
        \qquad w_m = \frac{\ell_m}{\sum \ell} .

    n is the effective number of draws :math:`1 / \sum w_m^2`, and a pseudo-count of c draws of the prior
    keeps every symbol possible that the prior holds possible. Of real data the mean is averaged likewise and
    the variance kept.

    The twist is an unbiased estimate of :math:`\int p(x_0|x_t)\, p(y|x_0)\, dx_0` for the posterior as the
    denoiser states it (per-symbol independent for categorical data). Twisted SMC stays exact with it. Alone
    it is approximate, better with more draws. All draws of a point mass would be one, and a twist that is
    too sharp where x_t is noise; they are taken with the variance that data of unit variance have given x_t,
    :math:`\sigma_t^2/(\alpha_t^2 + \sigma_t^2)`, as in :class:`~pyro_diffusion.guidance.PiGDM`. Particles
    of point masses are weighed by that twist and not shifted: the kernels between them are too narrow.

    Cost: one network evaluation and M runs of the program in one batch.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, of real numbers or symbols.
        likelihood: log p(y | x_0).
        num_samples: number M of draws.
        prior_count: pseudo-count c > 0 of draws of the prior.

    Raises:
        ValueError: for other data (strings), no draws, or c not positive; outside particles for a posterior
            that is a point mass under a process that is not linear (``DegradedGaussian``).

    References:
        Li et al., Derivative-free guidance in continuous and discrete diffusion models, arXiv 2408.08252
        (the idea of weighing draws).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        num_samples: int = 16,
        prior_count: float = 1.0,
    ) -> None:
        super().__init__(denoiser)
        if Ability.SYMBOLS not in self.process.abilities:
            kind = type(denoiser).__name__
            require(self.process, Ability.NUMBERS, argument="denoiser", by=kind)
        self.likelihood = check_likelihood(likelihood)
        self.num_samples = check_positive_int("num_samples", num_samples)
        if not 0 < prior_count < math.inf:
            raise ValueError(f"prior_count: got {prior_count}, expected a positive number")
        self.prior_count = float(prior_count)

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and the log of an estimated twist (one network evaluation)."""
        found = self._weighed(xt, t, context)
        # Kernels between point masses are too narrow for a shift by what is uncertain of x_0.
        point = isinstance(per_coordinate(found.prior), Delta)
        return found._replace(posterior=found.prior) if point else found

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0 given x_t and y, batch and event shape of xt."""
        posterior = self._weighed(xt, t, context).posterior
        if isinstance(per_coordinate(posterior), Delta) and not self._linear:
            raise ValueError(
                f"denoiser: got a {type(self.denoiser).__name__} whose posterior is a point mass, expected "
                "one with a variance (such as LearnedVariance()): draws that are all alike do not guide a "
                "chain, which would be the prior's (TwistedSMC and AutoTwistedSMC take point masses)"
            )
        return posterior

    def _weighed(self, xt: Tensor, t: Tensor | Level, context: dict[str, Tensor]) -> Twisted:
        """What the draws say, with a posterior that is shifted in any case."""
        with torch.no_grad():
            level = self.process.level(t, xt, state="xt")
            prior = self.denoiser(xt, level, **context)
            x0 = draw(self._wide(prior, level), (self.num_samples,))
            log_likelihood = self.likelihood.log_prob(x0)
            log_twist = log_likelihood.logsumexp(0) - math.log(self.num_samples)
            # Draws that all are impossible tell nothing.
            spread = log_likelihood - log_twist.where(log_twist > -math.inf, 0.0)
            weights = spread.where(log_twist > -math.inf, 0.0).softmax(0)
            effective = weights.square().sum(0).reciprocal()
            share = effective / (effective + self.prior_count)
            return Twisted(prior, self._posterior(prior, x0, weights, share), log_twist)

    @property
    def _linear(self) -> bool:
        return Ability.LINEAR in self.process.abilities

    def _wide(self, prior: TorchDistribution, level: Level) -> TorchDistribution:
        """What x_0 is drawn from: the denoiser's posterior, or a normal around a point mass."""
        if not (self._linear and isinstance(per_coordinate(prior), Delta)):
            return prior
        scale = level.sigma / torch.hypot(level.alpha, level.sigma)
        normal = Normal(prior.mean, scale.expand(prior.mean.shape), validate_args=False)
        return normal.to_event(prior.event_dim)

    def _posterior(
        self, prior: TorchDistribution, x0: Tensor, weights: Tensor, share: Tensor
    ) -> TorchDistribution:
        event_dim = self.process.event_dim
        weights = weights.reshape(weights.shape + (1,) * event_dim)
        share = share.reshape(share.shape + (1,) * event_dim)
        if Ability.SYMBOLS not in self.process.abilities:
            # Less the plain mean, which is 0 but for its noise: even weights shift nothing.
            shift = ((weights - 1 / self.num_samples) * (x0 - prior.mean)).sum(0)
            return shift_mean(prior, share * shift)
        probs = per_coordinate(prior).probs
        hot = torch.nn.functional.one_hot(x0, probs.shape[-1])
        seen = (weights.unsqueeze(-1) * hot).sum(0).to(probs.dtype)
        share = share.unsqueeze(-1).to(probs.dtype)
        mixed = share * seen + (1 - share) * probs
        return Categorical(probs=mixed, validate_args=False).to_event(event_dim)
