r"""Latents between two ends on the real line: by the quantile function of the normal distribution.

``biject_to`` an interval is a sigmoid, under which a uniform prior has the tails of a logistic distribution,
and a posterior that an end cuts off has one of them. By normal quantiles a uniform prior is standard normal,
which is what a diffusion starts from, and tails at an end are those of a normal.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Transform,
    biject_to,
    constraints,
)

__all__ = ["NormalCdf", "NormalInterval", "bounded_places", "by_normal_quantiles", "of_one"]


class NormalCdf(Transform):
    r"""y = Phi(x): from the reals to (0, 1), short of both ends by one rounding."""

    domain = constraints.real
    codomain = constraints.unit_interval
    bijective = True
    sign = +1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormalCdf)

    def _call(self, x: Tensor) -> Tensor:
        # torch's ndtr adds 1 to an erf, and so is 0 where Phi is less than a rounding of 1
        return _inside(0.5 * torch.erfc(-math.sqrt(0.5) * x))

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.special.ndtri(_inside(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The standard normal's log-density."""
        return -0.5 * (x.square() + math.log(2 * math.pi))


def _inside(x: Tensor) -> Tensor:
    ends = torch.finfo(x.dtype)
    return x.clamp(ends.tiny, 1 - ends.eps)


class NormalInterval(constraints.interval):
    """An interval that ``biject_to`` takes to the reals by normal quantiles."""

    def __repr__(self) -> str:
        # torch's leaves out the first letter of the class's name, in its own an underscore
        return f"Interval(lower_bound={self.lower_bound}, upper_bound={self.upper_bound})"


@biject_to.register(NormalInterval)
def _(support: NormalInterval) -> Transform:
    lower, upper = support.lower_bound, support.upper_bound
    return ComposeTransform([NormalCdf(), AffineTransform(lower, upper - lower)])


class _Within(TorchDistribution):
    """A distribution that names its support otherwise."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: Any, support: Any) -> None:
        self.base_dist, self._support = base_dist, support
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        return self._support

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        drawn: Tensor = self.base_dist.sample(sample_shape)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = self.base_dist.log_prob(value)
        return found


def by_normal_quantiles(trace: Any) -> None:
    """Let the latents of a guide's prototype that lie in an interval go to the reals by normal quantiles.

    A prototype's distributions are what Pyro's guides, and ours, take supports from.
    """
    for _, node in trace.iter_stochastic_nodes():
        support, dims = of_one(node["fn"].support)
        if type(support) in (constraints.interval, constraints.half_open_interval):
            support = NormalInterval(support.lower_bound, support.upper_bound)
            node["fn"] = _Within(
                node["fn"], constraints.independent(support, dims) if dims else support
            )


def bounded_places(trace: Any, shapes: Mapping[str, Size]) -> list[int]:
    """Which coordinates of the packed latents lie in an interval.

    Args:
        trace: of a guide's prototype, after :func:`by_normal_quantiles`.
        shapes: of the unconstrained value of every latent.
    """
    found: list[int] = []
    start = 0
    for name, node in trace.iter_stochastic_nodes():
        size = shapes[name].numel()
        if type(of_one(node["fn"].support)[0]) is NormalInterval:
            found += range(start, start + size)
        start += size
    return found


def of_one(support: Any) -> tuple[Any, int]:
    """The support of what is independent, and how many dimensions are."""
    dims = 0
    while isinstance(support, constraints.independent):
        dims += support.reinterpreted_batch_ndims
        support = support.base_constraint
    return support, dims
