"""Densities and quantiles of a guide whose latents are packed into one unconstrained vector."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_diffusion.infer.simulators.intervals import of_one
from pyro_diffusion.infer.simulators.simulations import SimulatedSite
from pyro_diffusion.validation import check_finite, check_positive_int, check_tensor

__all__ = [
    "at_edge",
    "is_far",
    "pack",
    "packed_log_prob",
    "packed_quantiles",
    "packed_values",
    "unconstrained",
    "unpack",
]

# Normal quantiles of the least number of single precision and of the last below 1, less rounding; logits and
# logarithms of these, and those of double precision, are further out.
FAR = (-12.9, 5.1)
CLOSE = 1e-3  # of the largest number of a value: what a transform and its inverse may lose


def unconstrained(guide: Any, values: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, value and unconstrained value of every latent of an ``AutoContinuous`` guide."""
    found = []
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        transform = biject_to(site["fn"].support)
        value = torch.as_tensor(values[name])
        found.append((name, value, transform.inv(value)))
    return found


def _bounds(support: Any) -> tuple[Any, Any]:
    """Both ends of a support, None where there is none."""
    support, _ = of_one(support)
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


def _check_inside(name: str, value: Tensor, support: Any) -> None:
    """Refuse values beyond an end by more than a draw is rounded: the inverse of a sigmoid takes them.

    So does that of a stick whose shares do not add up; a value of a support without two ends must come back.
    """
    lower, upper = _bounds(support)
    if lower is None or upper is None:
        transform, x = biject_to(support), value.detach()
        outside = ~((transform(transform.inv(x)) - x).abs() <= CLOSE * x.abs().amax()).all()
    else:
        rounding = 2 * torch.finfo(value.dtype).eps * (abs(lower) + abs(upper))
        outside = ((value < lower - rounding) | (value > upper + rounding)).any()
    if bool(outside):
        raise ValueError(
            f"latents[{name!r}]: got a value outside of its support, expected {support}"
        )


def at_edge(guide: Any, values: Mapping[str, Tensor]) -> Tensor | None:
    """Which rows, (n,), have a latent that rounding put at the edge of its support; None if there are none.

    Draws are kept off the edge by one rounding, and the inverse of a sigmoid stops there, too: a finite
    number stands for all that lie beyond.
    """
    found = None
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        value = torch.as_tensor(values[name])
        lower, upper = _bounds(site["fn"].support)
        simplex = of_one(site["fn"].support)[0] is constraints.simplex
        if not (simplex or lower is not None) or not value.is_floating_point():
            continue
        ends = torch.finfo(value.dtype)
        if simplex:  # by breaking a stick: what is left of it is what is unknown
            left = 1 - value[..., :-1].cumsum(-1)
            touches = (value <= ends.tiny).any(-1) | (left <= ends.eps).any(-1)
        else:
            width = 1.0 if upper is None else upper - lower
            touches = value - lower <= ends.tiny * width
            if upper is not None:
                touches = touches | (upper - value <= ends.eps * width)
        rows = touches.reshape(len(value), -1).any(-1)
        found = rows if found is None else found | rows
    return None if found is None or not bool(found.any()) else found


def is_far(free: Tensor) -> bool:
    """Whether an unconstrained number is so far out that its value may be at an edge: one pass."""
    if not free.numel():
        return False
    low, high = free.aminmax()
    return not (float(low) > FAR[0] and float(high) < FAR[1])


def pack(guide: Any, values: Mapping[str, Tensor], batch: torch.Size) -> Tensor:
    """Unconstrained latents in one vector, batch + (latent size,)."""
    frees = [free for _, _, free in unconstrained(guide, values)]
    parts = [x.reshape(*batch, x.shape[len(batch) :].numel()) for x in frees]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def unpack(guide: Any, packed: Tensor) -> dict[str, Tensor]:
    """Values of the latents in their supports, batch + the shape of each: the inverse of :func:`pack`."""
    found, start = {}, 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        shape = guide._unconstrained_shapes[name]
        free = packed[..., start : start + shape.numel()].reshape(*packed.shape[:-1], *shape)
        found[name] = biject_to(site["fn"].support)(free.to(site["value"].dtype))
        start += shape.numel()
    return found


def packed_log_prob(
    guide: Any,
    posterior: TorchDistribution,
    latents: Mapping[str, Tensor],
    sites: Mapping[str, SimulatedSite],
    nesting: int,
) -> Tensor:
    """Log-density of latents in their own space, from that of the unconstrained vector (nats).

    Args:
        guide: an ``AutoContinuous`` that has seen its model.
        posterior: of the unconstrained vector.
        latents: sample + batch + shape of each latent.
        sites: shapes of the latents.
        nesting: dimensions of the model's plates, for which several posteriors leave room.

    Returns:
        sample + batch.

    Raises:
        ValueError: for missing latents, other shapes, no values, and values outside the support.
    """
    missing = [name for name in sites if name not in latents]
    if missing:
        raise ValueError(f"latents: got no value of {missing}, expected all of {list(sites)}")
    batches = set()
    for name, site in sites.items():
        shape = check_tensor(f"latents[{name!r}]", latents[name]).shape
        split = len(shape) - len(site.shape)
        batches.add(shape[: max(split, 0)])
        if split < 0 or shape[split:] != site.shape or len(batches) > 1:
            raise ValueError(
                f"latents[{name!r}]: got shape {tuple(shape)}, expected batch dimensions, alike for all "
                f"latents, and {tuple(site.shape)}"
            )
    batch = batches.pop()
    if not batch.numel():
        raise ValueError(f"latents: got an empty batch of shape {tuple(batch)}, expected values")
    for name in sites:
        _check_inside(name, latents[name], guide.prototype_trace.nodes[name]["fn"].support)
    packed = pack(guide, latents, batch)
    check_finite("latents (unconstrained)", packed)
    plates = (1,) * nesting if posterior.batch_shape else ()
    out = posterior.log_prob(packed.reshape(*batch, *plates, packed.shape[-1])).reshape(batch)
    for name, value, free in unconstrained(guide, latents):
        transform = biject_to(guide.prototype_trace.nodes[name]["fn"].support)
        log_det = transform.inv.log_abs_det_jacobian(value, free)
        # of an event, a plate, or neither
        own = log_det.flatten(len(batch)).sum(-1) if log_det.dim() > len(batch) else log_det
        out = out + own
    return out


def packed_values(guide: Any, latent: Tensor, nesting: int) -> dict[str, Tensor]:
    """Values of every latent in its support, sample + batch + its shape.

    Args:
        guide: an ``AutoContinuous`` that has seen its model.
        latent: unconstrained vectors, sample + batch + (size,), with ``nesting`` singletons for the model's
            plates before the last dimension.
        nesting: how many of these.
    """
    latent = latent.reshape(*latent.shape[: latent.dim() - 1 - nesting], latent.shape[-1])
    found, place = {}, 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        shape = guide._unconstrained_shapes[name]
        free = latent[..., place : place + shape.numel()].reshape(*latent.shape[:-1], *shape)
        found[name] = biject_to(site["fn"].support)(free.to(site["value"].dtype))
        place += shape.numel()
    return found


@torch.no_grad()
def packed_quantiles(
    guide: Any,
    posterior: TorchDistribution,
    quantiles: Sequence[float],
    num_samples: int,
    nesting: int,
) -> dict[str, Tensor]:
    """Quantiles of every coordinate over draws, each (quantiles,) + batch + the site's shape.

    Raises:
        ValueError: for a number of draws below 1, and quantiles outside [0, 1].
    """
    check_positive_int("num_samples", num_samples)
    if not all(0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles: got {quantiles}, expected numbers in [0, 1]")
    plates = nesting if posterior.batch_shape else 0
    draws = packed_values(guide, posterior.sample(torch.Size([num_samples])), plates)
    return {
        name: value.quantile(torch.tensor(quantiles, dtype=value.dtype, device=value.device), dim=0)
        for name, value in draws.items()
    }
