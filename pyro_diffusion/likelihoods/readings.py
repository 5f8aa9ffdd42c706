"""Values of a program's observed sites as vectors of real numbers, one a datum."""

from collections.abc import Callable, Collection

import pyro
import torch
from pyro.distributions import (
    MaskedDistribution,
    NanMaskedMultivariateNormal,
    NanMaskedNormal,
)
from torch import Tensor

from pyro_diffusion.likelihoods.run import Message, log_density
from pyro_diffusion.unwrapping import unwrap_to

__all__ = ["check_complete", "downstream", "values"]

PARTIAL = (MaskedDistribution, NanMaskedNormal, NanMaskedMultivariateNormal)


def values(sites: list[Message], lead: int, collapse: Callable[..., Tensor]) -> Tensor:
    """Values of sites, those of a datum in one vector, sample + batch + (m,).

    Args:
        sites: observed sites of a run.
        lead: number of sample dimensions.
        collapse: of values, the number of sample dimensions and that of event dimensions, see
            ``BatchedProgram``.
    """
    if not sites:
        raise ValueError("model: got no observed site that depends on x_0, expected one")
    parts = []
    for site in sites:
        fn, value = site["fn"], torch.as_tensor(site["value"])
        # A value may be of fewer dimensions than its distribution.
        shape = torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)
        own = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        parts.append(collapse(value.to(own).expand(shape), lead, fn.event_dim))
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def check_complete(sites: list[Message]) -> None:
    """Refuse sites whose values are missing in part, reweighted, or no draws.

    Raises:
        ValueError: naming the site and what was found there.
    """
    for site in sites:
        name, fn, mask = site["name"], site["fn"], site["mask"]
        found = None
        if type(fn).__name__ == "Unit":
            found = "a factor, which says nothing of how data arise"
        elif any(unwrap_to(fn, kind) is not None for kind in PARTIAL) or not (
            mask is None or bool(torch.as_tensor(mask).all())
        ):
            found = "a mask"
        elif not bool(torch.as_tensor(site["scale"] == 1).all()):
            found = "a scale"
        elif not bool(torch.as_tensor(site["value"]).isfinite().all()):
            found = "values that are not finite"
        if found is not None:
            raise ValueError(
                f"site {name!r}: got {found}, expected complete data of a sample site, as simulations have"
            )


def downstream(
    run: Callable[[Collection[str]], list[Message]], names: Collection[str]
) -> tuple[frozenset[str], bool]:
    """Sites of these names and those that depend on their values, and whether any site does.

    One depends on others if its density at its data changes where these are drawn anew.

    Args:
        run: a single run of the program, that draws some observed sites anew.
        names: of the sites that depend on x_0 with the data given.
    """
    found, chained = frozenset(names), False
    state = pyro.util.get_rng_state()
    try:
        given = {site["name"]: site for site in run(())}
        while True:
            drawn = {site["name"]: site for site in run(found)}
            changed = {n for n, site in given.items() if n in drawn and _moved(site, drawn[n])}
            chained = chained or bool(changed) or set(drawn) != set(given)
            if changed <= found:
                return found, chained
            found |= changed
    finally:
        pyro.util.set_rng_state(state)


def _moved(given: Message, drawn: Message) -> bool:
    """Whether a site's density at its data has changed."""
    try:
        return not torch.equal(log_density({**drawn, "value": given["value"]}), log_density(given))
    except ValueError:  # other data than these are in its support now
        return True
