"""A normal distribution in integer bins."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.distributions.no_closed_forms import NoClosedForms
from pyro_diffusion.validation import (
    Shape,
    check_broadcast,
    check_positive_int,
    check_tensor,
)

__all__ = ["DiscretizedNormal", "log_ndtr"]


class DiscretizedNormal(NoClosedForms, TorchDistribution):
    r"""Integers k = 0 ... levels - 1 with :math:`P(k) = \Phi(k + \tfrac12) - \Phi(k - \tfrac12)`.

    :math:`\Phi` is the cdf of :math:`\mathcal N(\text{loc}, \text{scale}^2)`; the end bins reach to
    infinity, so that the probabilities sum to one exactly. Logs are taken without cancellation in
    either tail. Scales below 0.02 bins are raised to that: narrower ones change no probability but
    overflow.

    Args:
        loc: mean in units of bins, bin k centred at k.
        scale: standard deviation in units of bins.
        levels: number of integers, >= 2.
        validate_args: whether to check arguments.

    Raises:
        ValueError: for fewer levels, or values that are no such integers.

    Example:
        >>> integers = DiscretizedNormal(torch.tensor(1.3), torch.tensor(0.8), levels=4)
        >>> round(float(integers.log_prob(torch.arange(4)).exp().sum()), 6)
        1.0

    References:
        Ho et al., arXiv 2006.11239, equation 13.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.nonnegative,
    }
    has_rsample = False
    has_enumerate_support = True

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None
    ) -> None:
        check_positive_int("levels", levels, at_least=2)
        check_broadcast("scale", check_tensor("scale", scale).shape, check_tensor("loc", loc).shape)
        dtype = torch.result_type(loc, scale)
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        self.loc, scale = torch.broadcast_tensors(loc.to(dtype), scale.to(dtype))
        self.scale = scale.clamp(min=0.02)
        self.levels = levels
        super().__init__(self.loc.shape, torch.Size(), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Integers from 0 to levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "DiscretizedNormal":
        """The same distribution at a larger batch shape."""
        new = self._get_checked_instance(DiscretizedNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.levels = self.levels
        super(DiscretizedNormal, new).__init__(
            torch.Size(batch_shape), torch.Size(), validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw integers (exact: a normal draw, rounded and clamped)."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            x = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            return x.round().clamp(0, self.levels - 1).long()

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All integers, (levels,) + batch, or (levels,) and ones."""
        values = torch.arange(self.levels, device=self.loc.device)
        values = values.reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(self.levels, *self.batch_shape) if expand else values

    @property
    def mean(self) -> Tensor:
        """Exact, by the sum over all integers; memory grows with their number, as for the variance."""
        return self._expectation(self.enumerate_support(expand=False))

    @property
    def variance(self) -> Tensor:
        """Exact, around the mean."""
        return self._expectation((self.enumerate_support(expand=False) - self.mean).square())

    def entropy(self) -> Tensor:
        """Exact, nats."""
        log_probs = self.log_prob(self.enumerate_support(expand=False))
        return -(log_probs.exp() * log_probs).sum(0)

    def _expectation(self, of: Tensor) -> Tensor:
        return (self.log_prob(self.enumerate_support(expand=False)).exp() * of).sum(0)

    def icdf(self, value: Tensor) -> Tensor:
        """The integer whose bin holds the normal's quantile."""
        x = self.loc + self.scale * torch.special.ndtri(value)
        return x.round().clamp(0, self.levels - 1).long()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of integers."""
        if self._validate_args:
            check_broadcast("value", check_tensor("value", value).shape, self.batch_shape)
            self._validate_sample(value)
        gap = value - self.loc
        # By symmetry work in the lower tail, where log-cdfs are accurate.
        upper = gap > 0
        near = torch.where(upper, 0.5 - gap, gap + 0.5) / self.scale
        far = torch.where(upper, -0.5 - gap, gap - 0.5) / self.scale
        # The end bins are open: at the top (seen from above) or bottom the far edge is at -infinity;
        # the open edge on the other side is +infinity.
        top, bottom = value >= self.levels - 1, value <= 0
        open_far = torch.where(upper, top, bottom)
        open_near = torch.where(upper, bottom, top)
        log_near = log_ndtr(near).masked_fill(open_near, 0.0)
        # Rounding must not make an edge of a very narrow bin cross the other.
        log_ratio = (log_ndtr(far) - log_near).clamp(max=-torch.finfo(far.dtype).eps)
        inner = torch.log(-torch.expm1(log_ratio.masked_fill(open_far, -1.0)))
        return log_near + inner.masked_fill(open_far, 0.0)


class _LogCdf(torch.autograd.Function):
    """Log of the normal cdf, whose own gradient in torch loses its digits in the lower tail."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.special.log_ndtr(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * math.sqrt(2 / math.pi) / torch.special.erfcx(-math.sqrt(0.5) * x)


def log_ndtr(x: Tensor) -> Tensor:
    """Log of the normal cdf, with an accurate gradient in both tails."""
    out: Tensor = _LogCdf.apply(x)
    return out
