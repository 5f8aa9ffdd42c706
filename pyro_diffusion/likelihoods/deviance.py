"""Signed deviance residuals: what a likelihood that is not Normal has in place of a whitened residual."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.validation import check_broadcast, check_tensor

__all__ = ["deviance_residual"]

# Densities of (y - loc) / scale alone, highest at y = loc.
LOCATION = (
    torch.distributions.Cauchy,
    torch.distributions.Gumbel,
    torch.distributions.Laplace,
    torch.distributions.StudentT,
    dist.AsymmetricLaplace,
    dist.Logistic,
    dist.SoftLaplace,
)
SERIES = 0.05  # below this the remainder of log(1 + h) is summed as a series


def deviance_residual(fn: Any, value: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""Signed root r of the deviance and the saturated log-density l, :math:`\log p(y) = l - r^2/2`.

    .. math:: r = \text{sign}(y - \mu) \sqrt{2\,(l - \log p(y))}

    with l the highest log-density of y over the mean (or location) :math:`\mu`. For a normal r is
    the whitened residual. r is smooth through 0, where its slope is that of Pearson's residual.
    Distributions:

    * location families (StudentT, Cauchy, Laplace, AsymmetricLaplace, SoftLaplace, Logistic, Gumbel): l is
      the log-density at ``loc``. A cusp there is rounded within ``eps ** 0.25`` scales of it;
    * Poisson, Binomial, NegativeBinomial, Geometric: l is that of :math:`\mu = y`, for a Poisson
      :math:`l - \log p(y) = y \log(y/\mu) - y + \mu`;
    * Multinomial: each class as a Poisson, which given the total they are;
    * other discrete distributions (Bernoulli, Categorical, ...): the bound l = 0, and the sign is +.

    Args:
        fn: a distribution.
        value: what was observed, y.

    Returns:
        r and l, of one shape, with the distribution's batch and event dimensions, to be summed over the
        latter (singletons but for a Multinomial); None for any other distribution.

    Example:
        >>> rate = torch.tensor([1.0, 4.0, 9.0])
        >>> residual, saturated = deviance_residual(dist.Poisson(rate), torch.tensor(4.0))
        >>> residual
        tensor([ 2.2562,  0.0000, -1.8742])
        >>> torch.allclose(saturated - residual**2 / 2, dist.Poisson(rate).log_prob(torch.tensor(4.0)))
        True

    References:
        McCullagh & Nelder, Generalized linear models, 2nd edition, section 2.4.
    """
    shape = fn.batch_shape + fn.event_shape
    check_broadcast("value", check_tensor("value", value, boolean=True).shape, shape)
    if isinstance(fn, LOCATION):
        return _location(fn, value)
    if isinstance(fn, torch.distributions.Poisson):
        y = value.to(fn.rate.dtype)
        return _count(fn, y, fn.rate, torch.xlogy(y, y) - y - (y + 1).lgamma())
    if isinstance(fn, torch.distributions.Binomial):
        n, y = torch.broadcast_tensors(fn.total_count, value.to(fn.probs.dtype))
        saturated = torch.xlogy(y, y) + torch.xlogy(n - y, n - y) - torch.xlogy(n, n)
        choices = (n + 1).lgamma() - (y + 1).lgamma() - (n - y + 1).lgamma()
        return _count(fn, y, fn.mean, saturated + choices, below=n)
    if isinstance(fn, torch.distributions.NegativeBinomial | torch.distributions.Geometric):
        y = value.to(fn.probs.dtype)
        n = getattr(fn, "total_count", torch.ones_like(y))
        geometric = isinstance(fn, torch.distributions.Geometric)
        mean = (-fn.logits).exp() if geometric else fn.mean
        saturated = torch.xlogy(y, y) + torch.xlogy(n, n) - torch.xlogy(y + n, y + n)
        choices = (y + n).lgamma() - (y + 1).lgamma() - n.lgamma()
        return _count(fn, y, mean, saturated + choices, beyond=n)
    if isinstance(fn, torch.distributions.Multinomial):
        return _multinomial(fn, value)
    if _is_discrete(fn):
        log_prob = fn.log_prob(value)
        log_prob = log_prob.reshape(log_prob.shape + (1,) * fn.event_dim)
        return _root(-log_prob), torch.zeros_like(log_prob)
    return None


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _root(drop: Tensor) -> Tensor:
    """Root of twice a drop of log-density >= 0; the slope is finite, and 0 at rounding's 0."""
    return (2 * drop).clamp(min=torch.finfo(drop.dtype).tiny).sqrt()


def _location(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """z times the secant of its root deviance, which is held constant near z = 0."""
    z = (value - fn.loc) / fn.scale
    least = torch.finfo(z.dtype).eps ** 0.25
    near = z.abs() < least
    far = torch.where(z < 0, -least, torch.where(near, least, z))
    far = torch.where(near, far, z)
    top = fn.log_prob(fn.loc.expand(z.shape))
    shifted = fn.log_prob(torch.where(near, fn.loc + fn.scale * far, value))
    residual = z * (2 * (top - shifted) / far.square()).sqrt()
    # What rounding a cusp takes from r is the normalizer's.
    return residual, torch.where(near, fn.log_prob(value) + 0.5 * residual.square(), top)


def _count(
    fn: Any,
    y: Tensor,
    mean: Tensor,
    saturated: Tensor,
    below: Tensor | None = None,
    beyond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Near the mean without cancellation, by :math:`D(y, \mu) = y\log(y/\mu) - (y - \mu)`.

    Half the deviance is :math:`D(y, \mu)` for a Poisson, plus :math:`D(n - y, n - \mu)` for a Binomial, less
    :math:`D(y + n, \mu + n)` for a NegativeBinomial.
    """
    saturated, y, mean = torch.broadcast_tensors(saturated, y, mean)
    gap = y - mean
    least = y if below is None else torch.minimum(y, below - y)
    near = gap.abs() < 0.5 * least

    def part(size: Tensor, change: Tensor) -> Tensor:
        """D / gap^2 of a size that the mean changes so."""
        size = torch.where(near, size, 1.0)
        return _remainder(torch.where(near, change, 0.0) / size) / size

    secant = part(y, -gap)
    if below is not None:
        secant = secant + part(below - y, gap)
    if beyond is not None:
        secant = secant - part(y + beyond, -gap)
    far = gap.detach().sign() * _root(torch.where(near, 1.0, saturated - fn.log_prob(y)))
    root = (2 * torch.where(near, secant, 1.0)).sqrt()
    return torch.where(near, gap * root, far), saturated


def _multinomial(fn: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.full_like(fn.probs[..., :1], fn.total_count)
    rate = (n * fn.probs).clamp(min=torch.finfo(n.dtype).tiny)
    found = deviance_residual(torch.distributions.Poisson(rate, validate_args=False), y)
    assert found is not None
    total = torch.distributions.Poisson(n, validate_args=False).log_prob(n)
    return found[0], found[1] - total / y.shape[-1]


def _remainder(h: Tensor) -> Tensor:
    """(h - log(1 + h)) / h^2, for h > -1."""
    small = h.abs() < SERIES
    series = torch.zeros_like(h)
    for k in range(10, 1, -1):
        series = 1 / k - h * series
    safe = torch.where(small, 1.0, h)
    return torch.where(small, series, (safe - safe.log1p()) / safe.square())
