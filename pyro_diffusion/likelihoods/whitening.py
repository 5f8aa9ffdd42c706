"""The whitened residual of an observed site."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.likelihoods.deviance import deviance_residual
from pyro_diffusion.likelihoods.run import Message
from pyro_diffusion.unwrapping import unwrap

__all__ = ["RESIDUALS", "Whitened", "whitened"]

RESIDUALS = ("normal", "deviance")


class Whitened(NamedTuple):
    """A likelihood as a sum of squares: log p(y | x_0) = -\\|residual\\|^2 / 2 + log_normalizer.

    Attributes:
        residual: sample + batch + (m,).
        log_normalizer: sample + batch, nats.
    """

    residual: Tensor
    log_normalizer: Tensor


def whitened(site: Message, residuals: str = "normal") -> tuple[Tensor, Tensor, int] | None:
    r"""Residual :math:`r = L^{-1}(y - m)` of a Normal site and what is left of its log-density.

    .. math:: \log \mathcal N(y; m, L L^T) = -\tfrac12 |r|^2 + \sum_i n_i, \quad
              n_i = -\log L_{ii} - \tfrac12 \log 2\pi .

    Scales multiply r by their root; masked entries are 0 in both.

    Args:
        site: an observed site.
        residuals: ``"deviance"`` for signed deviance residuals of sites that are not Normal.

    Returns:
        r and n, of one shape, sample + batch + event, and their number of event dimensions; None if the site
        has no such residual.
    """
    fn, value = site["fn"], site["value"]
    event = fn.event_dim
    masks: list[tuple[Any, int]] = [(site["mask"], event)]
    inside = unwrap(fn, torch.distributions.TransformedDistribution)
    fn, masks = inside.base, [*masks, *inside.masks]
    found = _normal(fn, value)
    if found is None and residuals == "deviance":
        found = deviance_residual(fn, value)
    if found is None:
        return None
    residual, normalizer = found
    scale = _beside(site["scale"], event)
    if torch.is_tensor(scale):
        residual = residual * scale.sqrt()
    elif scale != 1:
        residual = residual * math.sqrt(scale)
    normalizer = normalizer * scale
    for mask, inner in masks:
        if mask is None or mask is True:
            continue
        shown = _beside(mask, inner)
        residual, normalizer = (_where(shown, v) for v in (residual, normalizer))
    residual, normalizer = torch.broadcast_tensors(residual, normalizer)
    return residual, normalizer, event


def _normal(fn: Any, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Whitened residual and normalizer of every coordinate of a normal."""
    if isinstance(fn, torch.distributions.Normal):
        residual, log_scale = (value - fn.loc) / fn.scale, fn.scale.log()
    elif isinstance(
        fn,
        torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal,
    ):
        root: Tensor = fn.scale_tril
        gap = (value - fn.loc).unsqueeze(-1)
        residual = torch.linalg.solve_triangular(root, gap, upper=False).squeeze(-1)
        log_scale = root.diagonal(dim1=-1, dim2=-2).log()
    else:
        return None
    return residual, -0.5 * math.log(2 * math.pi) - log_scale


def _beside(x: Any, event_dim: int) -> Any:
    """A tensor over a batch shape, with singleton event dimensions."""
    return x.reshape(x.shape + (1,) * event_dim) if torch.is_tensor(x) else x


def _where(mask: Any, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if mask is False else torch.where(mask, x, x.new_zeros(()))
