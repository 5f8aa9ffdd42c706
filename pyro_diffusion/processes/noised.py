"""Distributions of loc + scale z for a noise z that is any distribution of Pyro's."""

import copy
import weakref
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from pyro_diffusion.processes.noise import NoiseSource, draw
from pyro_diffusion.validation import Shape

__all__ = ["PARTS", "Noised"]

# What distributions are made of beside numbers.
PARTS = (torch.distributions.Distribution, torch.distributions.Transform)


class Noised(TorchDistribution):
    """loc + scale z for z of any distribution, of one coordinate or of a whole datum.

    Args:
        noise: of z, batch shape ().
        loc: batch + event.
        scale: broadcasts to it.
        event_dim: how many rightmost dimensions make one datum.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self, noise: TorchDistribution, loc: Tensor, scale: Tensor, event_dim: int
    ) -> None:
        self.noise, (self.loc, self.scale) = noise, torch.broadcast_tensors(loc, scale)
        shape = self.loc.shape
        split = len(shape) - event_dim
        if noise.event_shape not in (torch.Size(), shape[split:]):
            raise ValueError(
                f"noise: got event shape {tuple(noise.event_shape)}, expected () or {tuple(shape[split:])}, "
                "that of the data"
            )
        super().__init__(shape[:split], shape[split:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """loc + scale E z, where the noise knows its mean."""
        return self.loc + self.scale * self._standard().mean

    @property
    def variance(self) -> Tensor:
        """Of every coordinate, where the noise knows its own."""
        return self.scale.square() * self._standard().variance

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution at a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        loc, scale = self.loc.expand(shape), self.scale.expand(shape)
        return type(self)(self.noise, loc, scale, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, sample + batch; -inf outside the support."""
        z, dim = (value - self.loc) / self.scale, len(self.event_shape)
        out = _log_density(self._standard(), z)
        out = out.masked_fill(sum_rightmost(z, dim).isnan(), torch.nan)
        return out - sum_rightmost(self.scale.log(), dim)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draws, differentiable in location and scale, sample + batch + event."""
        return self.loc + self.scale * draw(self._standard(), sample_shape).detach()

    def draw_from(self, noise: NoiseSource, sample_shape: Shape, event_dim: int) -> Tensor:
        """Draws by a source's numbers, whose rows have ``event_dim`` dimensions."""
        wide = self._standard().to_event(event_dim - len(self.event_shape))
        return self.loc + self.scale * noise.draw(wide, sample_shape).detach()

    def _standard(self) -> TorchDistribution:
        """The distribution of z at this batch and event shape, dtype and device."""
        noise = _like(self.noise, self.loc)
        if noise.event_shape == self.event_shape:
            out: TorchDistribution = noise.expand(self.batch_shape)
        else:
            out = noise.expand(self.loc.shape).to_event(len(self.event_shape))
        return out


def _log_density(z_of: Any, z: Tensor) -> Tensor:
    """Log-density, -inf outside the support: unchecked, formulas say anything there (an Exponential's)."""
    if isinstance(z_of, Independent):
        inner = _log_density(z_of.base_dist, z)
        return sum_rightmost(inner, z_of.reinterpreted_batch_ndims)
    if isinstance(z_of, MixtureSameFamily):
        inner = _log_density(z_of.component_distribution, z.unsqueeze(-1 - z_of._event_ndims))
        shares: Tensor = z_of.mixture_distribution.logits.log_softmax(-1)
        return (inner + shares).logsumexp(-1)
    out: Tensor = z_of.log_prob(z)
    return out.masked_fill(~_supported(z_of, z), -torch.inf)


def _supported(z_of: Any, z: Tensor) -> Tensor:
    """Whether z has a density, by what the distribution is made of."""
    if isinstance(z_of, Independent):
        inner = _supported(z_of.base_dist, z)
        count = z_of.reinterpreted_batch_ndims
        return inner.flatten(-count).all(-1) if count else inner
    if isinstance(z_of, MixtureSameFamily):
        inside = _supported(z_of.component_distribution, z.unsqueeze(-1 - z_of._event_ndims))
        return inside.any(-1)
    if isinstance(z_of, TransformedDistribution):
        event, inside = len(z_of.event_shape), torch.ones((), dtype=torch.bool, device=z.device)
        for transform in reversed(ComposeTransform(z_of.transforms).parts):
            # Asked before the inverse: that of a sigmoid clamps, that of a square forgets the sign.
            image, origin = transform.codomain, transform.domain
            found, rest = image.check(z), event - image.event_dim
            inside = inside & (found.flatten(-rest).all(-1) if rest else found)
            z, event = transform.inv(z), rest + origin.event_dim
        return inside & _supported(z_of.base_dist, z)
    inside = z_of.support.check(z)
    return inside


def _like(part: Any, like: Tensor, done: dict[int, Any] | None = None) -> Any:
    """A distribution, with all that it is made of, in another's dtype and on its device, unchecked.

    ``done`` holds the parts that were met: a transform and its inverse know each other.
    """
    done = {} if done is None else done
    if id(part) in done:
        return done[id(part)]
    if isinstance(part, weakref.ref):
        return None  # a transform's memory of its inverse
    if isinstance(part, Tensor):
        return part.to(like) if part.is_floating_point() else part.to(like.device)
    if isinstance(part, list | tuple) and not isinstance(part, torch.Size):
        return type(part)(_like(x, like, done) for x in part)
    if not isinstance(part, PARTS) or isinstance(part, torch.nn.Module):
        return part
    new = done[id(part)] = copy.copy(part)
    new.__dict__.update({name: _like(value, like, done) for name, value in vars(part).items()})
    if isinstance(new, torch.distributions.Distribution):
        new._validate_args = False  # outside its support the density is 0
    return new
