"""Categorical distributions by reparameterization: the largest of several utilities after noise."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor
from torch import distributions as dist
from torch.distributions import constraints, register_kl

from pyro_diffusion.distributions.argmax_probabilities import LOG_PROBABILITIES
from pyro_diffusion.precision import at_least_single
from pyro_diffusion.validation import Shape, check_expands, check_finite, check_tensor

__all__ = ["ArgmaxCategorical", "RelaxedArgmaxCategorical"]


class ArgmaxCategorical(Categorical):
    r"""Which of K utilities is the largest after noise of its own is added to each (random utility).

    .. math:: P(i) = P\big(i = \arg\max_j\, (\mu_j + \epsilon_j)\big)
              = \int f(z - \mu_i) \prod_{j \ne i} F(z - \mu_j)\, dz

    with f and F the density and distribution function of the noise. A Gumbel distribution's is the softmax;
    under an exponential, uniform or normal one (multinomial probit) a category that is far behind loses its
    chances faster than by softmax. The integral is exact to rounding: the softmax in closed form; for the
    exponential a polynomial on one interval, for the uniform on each of K, both by Gauss-Legendre nodes that
    are exact for it; for the normal by 64 nodes on the range of each category's own integrand. Its cost is
    O(K) a category (under normal noise 64 numbers for every pair), O(K^2) under uniform noise.

    It is a :class:`pyro.distributions.Categorical` of these probabilities, so it enumerates, and any method
    that takes categorical posteriors takes it. ``ArgmaxCategorical(f, noise).logits`` makes a network of
    other noise out of one of logits, for :class:`~pyro_diffusion.denoisers.CategoricalDenoiser` say.
    Uniform noise makes a category impossible that is a whole width behind: ``log_prob`` is -inf there, and
    has no gradient that would bring it back.

    Args:
        utilities: :math:`\mu`, finite, batch + (K,).
        noise: a ``Gumbel``, ``Exponential``, ``Uniform`` or ``Normal`` of numbers. Its scale (width, for the
            uniform) broadcasts to the batch and may be learned; its location changes nothing.
        validate_args: whether to check arguments and values.

    Raises:
        ValueError: for utilities without categories or not finite, and noise of another type or batch shape.

    Example:
        >>> import pyro.distributions as dist
        >>> choice = ArgmaxCategorical(torch.tensor([0.0, 0.5, 1.2, -0.7]), dist.Normal(0.0, 1.0))
        >>> [round(p, 4) for p in choice.probs.tolist()]
        [0.122, 0.2516, 0.5899, 0.0365]

    References:
        Train 2009, Discrete Choice Methods with Simulation, chapters 2 to 5; Papandreou and Yuille 2011,
        Perturb-and-MAP random fields.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {  # type: ignore[misc]
        "utilities": constraints.real_vector
    }

    def __init__(
        self, utilities: Tensor, noise: dist.Distribution, validate_args: bool | None = None
    ) -> None:
        scaled = _scaled(utilities, noise)
        self.utilities, self.noise = utilities, noise
        super().__init__(logits=_entry(noise)[1](scaled), validate_args=validate_args)
        if self._validate_args:
            check_finite("utilities", utilities)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "ArgmaxCategorical":
        """The same distribution at a larger batch shape."""
        new = self._get_checked_instance(ArgmaxCategorical, _instance)
        new.utilities = self.utilities.expand(*batch_shape, self._num_events)
        new.noise = self.noise
        super().expand(batch_shape, _instance=new)
        return new

    def entropy(self) -> Tensor:
        """Exact, nats; with a gradient where a probability is zero, too."""
        return -(self.probs * self.logits.masked_fill(self.probs == 0, 0.0)).sum(-1)


class RelaxedArgmaxCategorical(TorchDistribution):
    r"""The softmax of utilities after noise, a point of the simplex with gradients.

    .. math:: y = \operatorname{softmax}\big((\mu + \epsilon) / \tau\big)

    Its largest entry is at the draw of :class:`ArgmaxCategorical`, and as :math:`\tau \to 0` the whole vector
    is that category's corner. Under Gumbel noise it is the concrete distribution, Pyro's
    ``RelaxedOneHotCategorical``. The density is in closed form for all four noises: with
    :math:`s_i = \mu_i - \tau \log y_i` and a scale b of noise,

    .. math:: p(y) = \frac{(\tau/b)^{K-1}}{\prod_i y_i} \int \prod_i f(c - s_i / b)\, dc,

    relative to the volume of the first K - 1 entries.

    Args:
        temperature: :math:`\tau > 0`, broadcasts to the batch.
        utilities: as in :class:`ArgmaxCategorical`.
        noise: likewise.
        validate_args: whether to check arguments and values.

    Raises:
        ValueError: for a temperature that is not positive, or of another shape; and as
            :class:`ArgmaxCategorical`.

    Example:
        >>> import pyro.distributions as dist
        >>> mu = torch.tensor([0.0, 0.5, 1.2, -0.7], requires_grad=True)
        >>> y = RelaxedArgmaxCategorical(torch.tensor(0.5), mu, dist.Normal(0.0, 1.0)).rsample()
        >>> hard = torch.nn.functional.one_hot(y.argmax(-1), 4) + y - y.detach()  # straight-through

    References:
        Maddison et al., arXiv 1611.00712; Jang et al., arXiv 1611.01144 (Gumbel noise).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "temperature": constraints.positive,
        "utilities": constraints.real_vector,
    }
    support = constraints.simplex
    has_rsample = True

    def __init__(
        self,
        temperature: Tensor,
        utilities: Tensor,
        noise: dist.Distribution,
        validate_args: bool | None = None,
    ) -> None:
        _scaled(utilities, noise)
        batch = utilities.shape[:-1]
        check_expands("temperature", check_tensor("temperature", temperature), batch)
        self.temperature = temperature.expand(batch)
        self.utilities, self.noise = utilities, noise
        super().__init__(batch, utilities.shape[-1:], validate_args=validate_args)
        if self._validate_args:
            check_finite("utilities", utilities)
            check_finite("temperature", temperature)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "RelaxedArgmaxCategorical":
        """The same distribution at a larger batch shape."""
        new = self._get_checked_instance(RelaxedArgmaxCategorical, _instance)
        new.temperature = self.temperature.expand(batch_shape)
        new.utilities = self.utilities.expand(*batch_shape, *self.event_shape)
        new.noise = self.noise
        super(RelaxedArgmaxCategorical, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw points of the simplex, differentiable in utilities, temperature and the noise's scale."""
        u, tau = _scaled(self.utilities, self.noise), self._scaled_temperature()
        noise = _kind(self.noise)(*_standard(self.noise, u), validate_args=False)
        eps = noise.expand(self._extended_shape(sample_shape)).sample()
        return ((u + eps) / tau).softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in closed form; -inf where uniform noise never leads."""
        if self._validate_args:
            self._validate_sample(value)
        tau = self._scaled_temperature()
        log_value = value.clamp(min=torch.finfo(value.dtype).tiny).log()
        s = _scaled(self.utilities, self.noise) - tau * log_value
        volume = (s.shape[-1] - 1) * tau.log().squeeze(-1) - log_value.sum(-1)
        out: Tensor = volume + _DENSITIES[_kind(self.noise)](s)
        return out

    def _scaled_temperature(self) -> Tensor:
        scale = _entry(self.noise)[0](self.noise)
        return (self.temperature / scale).unsqueeze(-1)


def _gumbel(s: Tensor) -> Tensor:
    count = s.shape[-1]
    return s.sum(-1) - count * s.logsumexp(-1) + math.lgamma(count)


def _exponential(s: Tensor) -> Tensor:
    count = s.shape[-1]
    return s.sum(-1) - count * s.amax(-1) - math.log(count)


def _uniform(s: Tensor) -> Tensor:
    left = 1 - (s.amax(-1) - s.amin(-1))
    return torch.where(left > 0, left.where(left > 0, 1.0).log(), -torch.inf)


def _normal(s: Tensor) -> Tensor:
    count = s.shape[-1]
    square = (s - s.mean(-1, keepdim=True)).square().sum(-1)
    return -0.5 * (square + math.log(count) + (count - 1) * math.log(2 * math.pi))


# Logarithms of the integrals over c, for noise of scale one.
_DENSITIES = {
    dist.Gumbel: _gumbel,
    dist.Exponential: _exponential,
    dist.Uniform: _uniform,
    dist.Normal: _normal,
}


def _kind(noise: object) -> type:
    for kind in LOG_PROBABILITIES:
        if isinstance(noise, kind):
            return kind
    names = ", ".join(kind.__name__ for kind in LOG_PROBABILITIES)
    raise ValueError(f"noise: got {type(noise).__name__}, expected one of {names}")


def _entry(noise: Any) -> Any:
    return LOG_PROBABILITIES[_kind(noise)]


def _standard(noise: Any, like: Tensor) -> tuple[Tensor, ...]:
    """Arguments of the noise at scale one."""
    zero, one = like.new_zeros(()), like.new_ones(())
    return (one,) if _kind(noise) is dist.Exponential else (zero, one)


def _scaled(utilities: Tensor, noise: Any) -> Tensor:
    """Utilities in units of the noise's scale, at least in single precision."""
    scale = _entry(noise)[0](noise)
    if check_tensor("utilities", utilities).dim() < 1 or utilities.numel() == 0:
        raise ValueError(
            f"utilities: got shape {tuple(utilities.shape)}, expected batch + (K,) with K >= 1"
        )
    check_expands("noise", scale, utilities.shape[:-1])
    dtype = at_least_single(utilities.dtype)
    return utilities.to(dtype) / scale.to(dtype).unsqueeze(-1)


@register_kl(ArgmaxCategorical, ArgmaxCategorical)
@register_kl(ArgmaxCategorical, dist.Categorical)
@register_kl(dist.Categorical, ArgmaxCategorical)
def _kl_categorical(p: Any, q: Any) -> Tensor:
    """By enumeration: infinite where q denies what p allows; gradients stay finite where p has zeros."""
    if p.logits.shape[-1] != q.logits.shape[-1]:
        raise ValueError(
            f"q: got {q.logits.shape[-1]} categories, expected {p.logits.shape[-1]}, those of p"
        )
    never = p.probs == 0
    gap = p.logits.masked_fill(never, 0.0) - q.logits.masked_fill(never, 0.0)
    return (p.probs * gap).sum(-1)
