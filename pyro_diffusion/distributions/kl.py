"""Divergences between distributions of denoisers: none is known, and each says what to do instead."""

from typing import Any, Never

from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, kl_divergence, register_kl

from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.distributions.flow import ProbabilityFlow

__all__: list[str] = []


# Pairs of these and their own kinds apart, so that torch finds one rule that is the most specific.
@register_kl(DenoisedDistribution, DenoisedDistribution)
@register_kl(DenoisedDistribution, Distribution)
@register_kl(Distribution, DenoisedDistribution)
@register_kl(ProbabilityFlow, TransformedDistribution)
@register_kl(TransformedDistribution, ProbabilityFlow)
def _kl_unknown(p: Distribution, q: Distribution) -> Never:
    names = f"{type(p).__name__}, {type(q).__name__}"
    views = [x for x in (p, q) if isinstance(x, DenoisedDistribution)]
    bound = any(not isinstance(x, ProbabilityFlow) for x in views)
    raise NotImplementedError(
        f"kl_divergence({names}): there is no closed form; average p.log_prob(x) - q.log_prob(x) over draws "
        "x of p"
        + (" (where a log_prob is a bound, so is its share of the result)" if bound else "")
    )


@register_kl(ProbabilityFlow, ProbabilityFlow)
def _kl_flows(p: ProbabilityFlow, q: ProbabilityFlow) -> Tensor:
    if p.transforms != q.transforms or p.event_shape != q.event_shape:
        _kl_unknown(p, q)
    out: Tensor = kl_divergence(p.base_dist, q.base_dist)
    return out


@register_kl(Delta, DenoisedDistribution)
def _kl_delta(p: Any, q: DenoisedDistribution) -> Tensor:
    """As Pyro has it for any distribution: the point's own density is a constant."""
    out: Tensor = -q.log_prob(p.v)
    return out
