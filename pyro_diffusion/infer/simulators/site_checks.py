"""What the sites of a simulator must be like, in all of its trial runs."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import biject_to

from pyro_diffusion.likelihoods.run import Message, is_computed
from pyro_diffusion.unwrapping import unwrap

__all__ = ["check_same", "check_whole", "is_reweighted", "known", "with_own_mask"]


def with_own_mask(node: Message) -> Message:
    """A site whose distribution's own masks, those of whole events, are the site's."""
    fn, mask = node["fn"], node["mask"]
    while isinstance(fn, MaskedDistribution):
        mask = fn._mask if mask is None else torch.as_tensor(mask) & torch.as_tensor(fn._mask)
        fn = fn.base_dist
    return {**node, "fn": fn, "mask": mask}


def is_reweighted(node: Message) -> bool:
    """Whether its density counts for more or less than once, other than in a plate of some rows."""
    if is_computed(node):
        point = unwrap(node["fn"]).base
        return isinstance(point, Delta) and bool(point.log_density.any())
    node = with_own_mask(node)
    of_rows = math.prod(
        (f.full_size or f.size) / f.size for f in node["cond_indep_stack"] if f.size
    )
    scale = torch.as_tensor(node["scale"], dtype=torch.float64)
    masks = [node["mask"], *(mask for mask, _ in unwrap(node["fn"]).masks)]
    masked = any(mask is not None and not bool(torch.as_tensor(mask).all()) for mask in masks)
    return masked or not torch.allclose(scale, torch.full_like(scale, of_rows))


def check_whole(nodes: Mapping[str, Message]) -> None:
    """Refuse data of which some are to count less: a guide takes all that it is given.

    Raises:
        ValueError: naming the first such site.
    """
    for name, node in nodes.items():
        if is_reweighted(node):
            raise ValueError(
                f"site {name!r}: got data under a mask or scale, of which the guide knows nothing, expected "
                "whole data (rows can be left out of a plate whose rows are a set, by poutine.mask; what "
                "else may be missing is to be part of the simulator)"
            )


def known(
    argument: str, names: Collection[str], sites: dict[str, Message], trace: Any
) -> list[str]:
    """The names in the order of the program."""
    computed = [n for n in names if n in trace.nodes and n not in sites]
    if computed and not isinstance(names, str):
        raise ValueError(
            f"{argument}: got {computed}, which the model computes, expected sites that it draws; "
            "pyro.sample(name, Delta(value), obs=...) lets a computed value be observed"
        )
    if isinstance(names, str) or not all(name in sites for name in names):
        raise ValueError(f"{argument}: got {names!r}, expected names of sites out of {list(sites)}")
    return [name for name in sites if name in names]


def check_same(name: str, nodes: list[Message | None], latent: bool, argument: str) -> None:
    """Refuse a site that is not in every run, or is another there; a latent that is discrete."""
    if any(node is None for node in nodes):
        raise ValueError(f"site {name!r}: got it in some runs only, expected it in every run")
    present: list[Message] = [node for node in nodes if node is not None]
    first = present[0]
    shapes = {tuple(node["value"].shape) for node in present}
    if len(shapes) > 1:
        raise ValueError(
            f"site {name!r}: got shapes {sorted(shapes)}, expected one shape in every run"
        )
    if not latent:
        return
    support = first["fn"].support
    if support.is_discrete:
        raise ValueError(
            f"site {name!r}: got a discrete {argument[:-1]} ({type(first['fn']).__name__}), expected "
            f"continuous ones (name those of interest, {argument}=[...]; the others are then integrated out)"
        )
    try:
        at = torch.zeros_like(biject_to(support).inv(first["value"]))
    except NotImplementedError:
        raise ValueError(
            f"site {name!r}: got a support ({support}) that no transform of torch maps to real numbers, "
            f"expected another parametrization, or {argument}=[...] without it"
        ) from None
    if not _takes_batches(biject_to(support), first["value"]):
        raise ValueError(
            f"site {name!r}: got a support ({support}) whose transform takes one value and no batch, "
            "expected one that counts its dimensions from the right"
        )
    ends = [biject_to(node["fn"].support)(at) for node in present]
    if not all(torch.equal(ends[0], end) for end in ends):
        raise ValueError(
            f"site {name!r}: got a support that differs from run to run, expected a fixed one (sample on a "
            "fixed support and compute the value from it)"
        )


def _takes_batches(transform: Any, value: Tensor) -> bool:
    try:
        many = transform.inv(torch.stack([value, value]))
        one = transform.inv(value)
        return many.shape == (2, *one.shape) and bool(
            torch.isclose(many[1], one, equal_nan=True).all()
        )
    except (RuntimeError, AssertionError, IndexError):
        return False
