"""Classifier-free guidance: a conditional estimate, extrapolated from the one without the condition."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Categorical, Delta, Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.guidance.base import check_denoiser
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["ClassifierFreeGuidance", "Scale", "check_scale"]

Scale = float | Callable[[Level], Tensor]


class ClassifierFreeGuidance(Denoiser):
    r"""Two evaluations of one conditional denoiser, extrapolated from the null context to the given one.

    .. math:: \hat x_0 = \hat x_0(x_t, \varnothing)
              + w \big(\hat x_0(x_t, c) - \hat x_0(x_t, \varnothing)\big),

    with the variance of the conditional. It is the posterior mean of
    :math:`p_t(x_t | c)^w\, p_t(x_t)^{1 - w}`, noise level by noise level; for w other than 1 these are not
    the noised marginals of one distribution, so that of the samples has no closed form (approximate). With
    w = 1 it *is* the conditional denoiser: its own distribution, from one evaluation. With w = 0 it has the
    mean of the null model. It takes no likelihood: the observation is the denoiser's context.

    Categorical posteriors combine by logits, symbol by symbol, where both give the symbol a chance. A
    posterior over quantized values becomes a normal of the combined mean.

    The network must have been trained without its context, too, see
    :class:`~pyro_diffusion.nn.LabelContext` and its ``dropout``.

    Args:
        denoiser: a conditional denoiser.
        scale: w, a number or a function of a :class:`~pyro_diffusion.schedules.Level`; one number or one for
            each datum.
        interval: (low, high) of the log-SNR in which w holds; outside it is 1, and where a level is one for
            the whole batch, only the conditional is evaluated.
        null: the null context, laid over the given one; None for a name leaves it out. By default
            all context is left out.

    Raises:
        ValueError: for what is no denoiser, a scale that is neither finite nor a function, or an empty
            interval.

    Example:
        >>> import torch
        >>> from pyro_diffusion.denoisers import GaussianDenoiser
        >>> from pyro_diffusion.nn import MLP, LabelContext
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> network = MLP(2, context={"label": LabelContext(3, 16)})
        >>> denoiser = GaussianDenoiser(network, GaussianProcess(Cosine()))
        >>> guided = ClassifierFreeGuidance(denoiser, scale=2.0, interval=(-4.0, 4.0))
        >>> guided(torch.zeros(5, 2), torch.tensor(0.5), label=torch.tensor(1)).mean.shape
        torch.Size([5, 2])

    References:
        Ho & Salimans, arXiv 2207.12598; Kynkaanniemi et al. (interval), arXiv 2404.07724.
    """

    guided = True

    def __init__(
        self,
        denoiser: Denoiser,
        scale: Scale,
        interval: tuple[float, float] | None = None,
        null: dict[str, Tensor | None] | None = None,
    ) -> None:
        process = check_denoiser(denoiser).process
        if Ability.SYMBOLS not in process.abilities:  # logits, else means
            require(process, Ability.NUMBERS, argument="denoiser", by=type(denoiser).__name__)
        super().__init__(process)
        self.denoiser, self.scale = denoiser, check_scale(scale)
        self.interval = None if interval is None else _check_interval(interval)
        self.null = None if null is None else dict(null)

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """How many rightmost dimensions of a context tensor belong to one datum: as the base has it."""
        return self.denoiser.context_event_dim(name, value)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The guided posterior over x_0, batch and event shape of xt."""
        level = self.process.level(t, xt, state="xt")
        posterior = self.denoiser(xt, level, **context)
        inside = self._inside(level)
        if self.scale == 1 or inside is False or not (context or self.null):
            return posterior
        over = {} if self.null is None else {**context, **self.null}
        null = self.denoiser(xt, level, **{k: v for k, v in over.items() if v is not None})
        scale = self.scale(level) if callable(self.scale) else self.scale
        if torch.is_tensor(inside):
            scale = torch.where(inside, torch.as_tensor(scale).to(xt), 1.0)
        return _combine(posterior, null, scale)

    def _inside(self, level: Level) -> bool | Tensor:
        """Whether levels lie in the interval; a plain truth where there is one level for all."""
        if self.interval is None:
            return True
        if level.clock.numel() > 1:
            return self._between(level)[0]
        return bool(level.tabulate(self._on_host)[0])

    def _between(self, level: Level) -> tuple[Tensor]:
        assert self.interval is not None
        low, high = self.interval
        return ((level.clock >= low) & (level.clock <= high),)

    def _on_host(self, level: Level) -> tuple[Tensor]:
        # A grid asks once for all of its steps: no wait for the device at each.
        return (self._between(level)[0].cpu(),)


def check_scale(scale: Any) -> Scale:
    """A guidance scale: a finite number or a function of a level.

    Raises:
        ValueError: if it is neither.
    """
    if callable(scale):
        return scale
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not abs(float(scale)) < float("inf"):
        raise ValueError(f"scale: got {scale!r}, expected a finite number or a function of a Level")
    return float(scale)


def _check_interval(interval: Any) -> tuple[float, float]:
    ends = tuple(interval) if isinstance(interval, tuple | list) else ()
    if len(ends) != 2 or not float(ends[0]) < float(ends[1]):
        raise ValueError(
            f"interval: got {interval!r}, expected (low, high), log-SNRs in increasing order"
        )
    return float(ends[0]), float(ends[1])


def _combine(
    posterior: TorchDistribution, null: TorchDistribution, scale: Tensor | float
) -> TorchDistribution:
    """null + scale (posterior - null), by logits or by means."""
    base, other, event_dim = per_coordinate(posterior), per_coordinate(null), posterior.event_dim
    if hasattr(base, "logits") and not isinstance(base, Quantized):
        weight = scale.unsqueeze(-1) if torch.is_tensor(scale) and scale.dim() else scale
        gap = base.logits - other.logits
        # Impossible symbols: the evidence of x_t rules out the same ones in both.
        gap = torch.where(base.logits.isfinite() & other.logits.isfinite(), gap, 0.0)
        logits = base.logits + (weight - 1) * gap
        return Categorical(logits=logits, validate_args=False).to_event(event_dim)
    mean = other.mean + scale * (base.mean - other.mean)
    if isinstance(base, Delta):
        return Delta(mean, event_dim=event_dim, validate_args=False)
    spread = base.scale if isinstance(base, Normal) else base.variance.sqrt()
    return Normal(mean, spread, validate_args=False).to_event(event_dim)
