"""Guidance by functions of the noisy state: a classifier, a regression, or a similarity of features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted, shift_mean
from pyro_diffusion.guidance.classifier_free import Scale, check_scale
from pyro_diffusion.precision import at_least_single
from pyro_diffusion.processes import Ability
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_broadcast, check_tensor

__all__ = ["ClassifierGuidance", "NoiseAwareGuidance", "SimilarityGuidance"]


class NoiseAwareGuidance(GuidedDenoiser):
    r"""Guidance by a twist that is a function of x_t itself: the posterior mean shifts by Tweedie's formula.

    .. math:: \hat x_0 + \frac{\sigma_t^2}{\alpha_t} \nabla_{x_t} \log \psi_t(x_t),

    exact if :math:`\psi_t(x_t)` is proportional to :math:`p(y | x_t)`; the variance is the denoiser's own.
    The denoiser is evaluated without a graph, so the gradient costs a backward pass of the twist alone.

    Subclasses implement :meth:`log_twist`.

    Args:
        denoiser: posterior p(x_0 | x_t), under a process with Tweedie's formula.
        scale: multiplies the log-twist, a number or a function of a
            :class:`~pyro_diffusion.schedules.Level`.

    Raises:
        ValueError: for a process without Tweedie's formula, or a wrong scale.
    """

    needs = (Ability.NUMBERS, Ability.TWEEDIE)

    def __init__(self, denoiser: Denoiser, scale: Scale = 1.0) -> None:
        super().__init__(denoiser)
        self.scale = check_scale(scale)

    def log_twist(self, xt: Tensor, log_snr: Tensor) -> Tensor:
        """log psi_t(x_t) in nats, of the batch shape of xt, before the scale.

        Args:
            xt: state, batch + event.
            log_snr: batch shape.
        """
        raise NotImplementedError

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and log-twist at x_t, detached (one evaluation of either network)."""
        level, event_dim = self.process.level(t, xt, state="xt"), self.process.event_dim
        batch = xt.shape[: xt.dim() - event_dim]
        with torch.no_grad():
            prior = self.denoiser(xt, level, **context)
        log_snr = level.clock
        if log_snr.dim():
            log_snr = log_snr.reshape(log_snr.shape[: log_snr.dim() - event_dim])
        scale = self.scale(level) if callable(self.scale) else self.scale
        if torch.is_tensor(scale) and scale.dim():
            if scale.shape[scale.dim() - event_dim :].numel() != 1:
                raise ValueError(
                    f"scale: got a function whose values are of shape {tuple(scale.shape)}, expected one "
                    "number per level (of its t or clock, where the noise differs by coordinate)"
                )
            scale = scale.reshape(scale.shape[: scale.dim() - event_dim])
        with torch.enable_grad():
            x = xt.detach().requires_grad_()
            value = self.log_twist(x, log_snr.expand(batch))
            if value.shape != batch:
                raise ValueError(
                    f"log_twist: got shape {tuple(value.shape)}, expected {tuple(batch)}, one number per "
                    "datum (declare events with `to_event`)"
                )
            if not value.requires_grad:
                raise ValueError(
                    "log_twist: got no gradient in x_t, expected a differentiable function of it"
                )
            value = scale * value
            (slope,) = torch.autograd.grad(value.sum(), x)
        posterior = shift_mean(prior, level.tweedie * slope)
        return Twisted(prior, posterior, value.detach())


class ClassifierGuidance(NoiseAwareGuidance):
    r"""Guidance by a classifier, or any likelihood, trained on noisy data.

    .. math:: E[x_0 | x_t, y] \approx \hat x_0 + w \frac{\sigma_t^2}{\alpha_t} \nabla_{x_t} \log p(y | x_t) .

    ``classifier`` is any function from (x_t, log-SNR) to a Pyro distribution over y: a ``Categorical`` for a
    classifier, a ``Normal`` for a regression. With the exact :math:`p(y | x_t)` and w = 1 the posterior mean
    is exact; other w sharpen or flatten, noise level by noise level (approximate).

    Args:
        denoiser: posterior p(x_0 | x_t), under a process with Tweedie's formula.
        classifier: ``classifier(xt, log_snr)``, xt of shape batch + event and log_snr of the batch shape,
            returns a distribution whose batch shape is that of xt. It is a module of this one if it is
            one.
        value: what was observed; broadcasts to the batch.
        scale: w, a number or a function of a :class:`~pyro_diffusion.schedules.Level`.

    Raises:
        ValueError: for a process without Tweedie's formula, a classifier that is not callable, a wrong scale;
            at a call, for a distribution of another batch shape or without gradient.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> process = GaussianProcess(Cosine())
        >>> denoiser = MixtureDenoiser(process, torch.ones(1), torch.zeros(1, 2), 1.0)
        >>> classifier = lambda xt, log_snr: dist.Bernoulli(logits=xt.sum(-1))
        >>> guided = ClassifierGuidance(denoiser, classifier, torch.tensor(1.0))
        >>> guided(torch.zeros(5, 2), torch.tensor(0.5)).mean.shape
        torch.Size([5, 2])

    References:
        Dhariwal & Nichol, arXiv 2105.05233, algorithm 1; Song et al., arXiv 2011.13456, section 5.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Callable[[Tensor, Tensor], Any],
        value: Tensor | float,
        scale: Scale = 1.0,
    ) -> None:
        if not callable(classifier):
            raise ValueError(
                f"classifier: got {type(classifier).__name__}, expected a function of (x_t, log-SNR) that "
                "returns a distribution"
            )
        super().__init__(denoiser, scale)
        self.classifier = classifier
        self.value = check_tensor("value", torch.as_tensor(value), boolean=True)

    def log_twist(self, xt: Tensor, log_snr: Tensor) -> Tensor:
        """log p(y | x_t) in nats, of the batch shape of xt."""
        try:
            out: Tensor = self.classifier(xt, log_snr).log_prob(self.value.to(xt.device))
        except Exception as error:
            error.add_note(
                f"classifier, value: got a value of shape {tuple(self.value.shape)} ({self.value.dtype}), "
                "expected one that the classifier's distribution scores"
            )
            raise
        return out


class SimilarityGuidance(NoiseAwareGuidance):
    r"""Guidance towards data whose features are like a target's.

    .. math:: \log \psi_t(x_t) = w\, s\big(f(x_t, \lambda_t), f^*\big), \qquad
              \text{shift} = \frac{\sigma_t^2}{\alpha_t} \nabla_{x_t} \log \psi_t(x_t) .

    s is the cosine similarity or the inner product of noise-aware features with those of the target. No
    likelihood stands behind it, so there is nothing for it to be exact for.

    Args:
        denoiser: posterior p(x_0 | x_t), under a process with Tweedie's formula.
        features: ``features(xt, log_snr)``, batch + (n,).
        target: the features to be like, broadcasts to batch + (n,).
        scale: w, a number or a function of a :class:`~pyro_diffusion.schedules.Level`; nats per unit of
            similarity.
        similarity: ``"cosine"`` or ``"dot"``.

    Raises:
        ValueError: for a process without Tweedie's formula, features that are not callable, a target without
            dimensions, a wrong scale, or an unknown similarity.

    References:
        Liu et al., arXiv 2112.05744, section 3.2.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        features: Callable[[Tensor, Tensor], Tensor],
        target: Tensor,
        scale: Scale = 1.0,
        similarity: str = "cosine",
    ) -> None:
        check_tensor("target", target)
        if not callable(features):
            raise ValueError(
                f"features: got {type(features).__name__}, expected a function of (x_t, log-SNR)"
            )
        if not torch.is_tensor(target) or target.dim() == 0:
            raise ValueError(
                f"target: got {target!r}, expected a tensor whose last dimension is features"
            )
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity: got {similarity!r}, expected 'cosine' or 'dot'")
        super().__init__(denoiser, scale)
        self.features, self.target, self.similarity = features, target, similarity

    def log_twist(self, xt: Tensor, log_snr: Tensor) -> Tensor:
        """The similarity, of the batch shape of xt."""
        found = self.features(xt, log_snr)
        found = found.to(at_least_single(found.dtype))
        target = self.target.to(found)
        if found.shape[-1:] != target.shape[-1:]:
            raise ValueError(
                f"features: got shape {tuple(found.shape)}, expected a last dimension of "
                f"{target.shape[-1]}, the target's"
            )
        check_broadcast("target", target.shape, found.shape)
        if self.similarity == "cosine":
            return functional.cosine_similarity(found, target, dim=-1)
        return (found * target).sum(-1)
