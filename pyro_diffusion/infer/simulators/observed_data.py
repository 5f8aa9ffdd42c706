"""Data that a guide of a simulator is asked about, by the names of their sites."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.infer.simulators.simulations import SimulatedSite
from pyro_diffusion.validation import check_finite, check_tensor, kind_of

__all__ = ["check_by_name", "check_data"]


def check_by_name(values: Any) -> None:
    """Refuse observations that are no dictionary."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f"observations: got {kind_of(values)}, expected a dictionary by the names of observed sites"
        )


def check_data(
    name: str, value: Any, shape: torch.Size, site: SimulatedSite, expected: str = "simulated"
) -> Tensor:
    """An observed site's data, if they are finite, of the shape or a batch of it, and not below its support.

    Raises:
        ValueError: naming the site.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"site {name!r}: got {kind_of(value)}, expected a tensor of numbers"
            ) from None
    value = check_tensor(f"site {name!r}", value)
    lead = value.dim() - len(shape)
    if lead < 0 or value.shape[lead:] != shape:
        raise ValueError(
            f"site {name!r}: got data of shape {tuple(value.shape)}, expected {tuple(shape)}, as "
            f"{expected}, or further batch dimensions on its left"
        )
    if not value.numel():
        raise ValueError(
            f"site {name!r}: got data of shape {tuple(value.shape)}, expected one observation at least"
        )
    check_finite(f"site {name!r}", value)
    below = value <= 0 if site.positive else value < 0
    if (site.positive or site.counts) and bool(below.any()):
        kind = "positive ones" if site.positive else "0 or more"
        raise ValueError(
            f"site {name!r}: got {float(value.min()):.6g} as least value, expected {kind}, as its "
            "distribution has them"
        )
    return value
