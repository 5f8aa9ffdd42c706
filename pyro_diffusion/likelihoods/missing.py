"""Observations that are missing: NaN under a mask, or in Pyro's distributions for such data."""

import math
from typing import Any

import torch
from pyro.distributions import (
    MultivariateNormal,
    NanMaskedMultivariateNormal,
    NanMaskedNormal,
    Normal,
)
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_diffusion.likelihoods.run import Message
from pyro_diffusion.unwrapping import Unwrapped, unwrap

__all__ = ["without_missing"]


def without_missing(site: Message) -> Message:
    """A site with the same log-density and gradients, whose missing values are filled with harmless ones.

    Missing are values that are not finite where a mask hides them, and those in a ``NanMaskedNormal`` or
    ``NanMaskedMultivariateNormal``, which become plain normals of what is there. To leave NaN in place would
    give finite log-densities and gradients of NaN. No value is inspected on the host.

    Args:
        site: an observed site.
    """
    fn, value = site["fn"], site["value"]
    if not torch.is_tensor(value) or not value.is_floating_point():
        return site
    found = unwrap(fn)
    if not found.transforms and isinstance(found.base, NanMaskedNormal):
        there = value.isfinite()
        plain = Normal(found.base.loc, found.base.scale, validate_args=False).mask(there)
        fn, value = found.around(plain), torch.where(there, value, 0.0)
    elif not found.transforms and isinstance(found.base, NanMaskedMultivariateNormal):
        there = value.isfinite()
        fn = found.around(_marginal(found.base, there))
        value = torch.where(there, value, 0.0)
    hidden = _hidden(site, found)
    if hidden is not None:
        bad = ~value.isfinite()
        if fn.event_dim:
            bad = bad.flatten(-fn.event_dim).any(-1)[(..., *(None,) * fn.event_dim)]
        value = torch.where(hidden & bad, _inside(fn, value), value)
    return {**site, "fn": fn, "value": value}


def _marginal(normal: Any, there: Tensor) -> MultivariateNormal:
    """The normal of the entries that are there; 0 in any other has the log-density 0, alone."""
    both = there.unsqueeze(-1) & there.unsqueeze(-2)
    alone = torch.diag_embed((~there).to(normal.loc.dtype)) / (2 * math.pi)
    covariance = torch.where(both, normal.covariance_matrix, 0.0) + alone
    return MultivariateNormal(
        torch.where(there, normal.loc, 0.0), covariance_matrix=covariance, validate_args=False
    )


def _hidden(site: Message, found: Unwrapped) -> Tensor | None:
    """Where a mask hides the value, or None without masks."""
    hidden = None
    for mask, event_dim in ((site["mask"], site["fn"].event_dim), *found.masks):
        if mask is None or mask is True:
            continue
        shown = torch.as_tensor(mask, device=site["value"].device)
        covered = ~shown[(..., *(None,) * event_dim)]
        hidden = covered if hidden is None else hidden | covered
    return hidden


def _inside(fn: Any, value: Tensor) -> Tensor:
    """Some value in the support of a distribution, of a value's shape."""
    support, zeros = fn.support, torch.zeros_like(value)
    if support.is_discrete:
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return zeros + getattr(support, "lower_bound", 0)
    try:
        transform = transform_to(support)
        return transform(zeros.new_zeros(transform.inverse_shape(value.shape))).expand_as(value)
    except NotImplementedError:
        return zeros
