"""What the sites of a model must be like for a density over the latents of a guide."""

from typing import Any

import torch
from pyro.distributions import (
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    SineBivariateVonMises,
    SineSkewed,
    VonMises,
)
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to

__all__ = ["guide_latents", "is_enumerated"]

# Periodic, and yet of real support as Pyro has them.
CIRCULAR = (VonMises, SineBivariateVonMises, SineSkewed)


def guide_latents(guide: AutoGuide, runs: list[Any]) -> dict[str, Any]:
    """The sites of the guide in its order, as the model has them.

    Raises:
        ValueError: naming the site; see UnconstrainedModel.
    """
    trace: Any = guide.prototype_trace
    own = [name for name, _ in trace.iter_stochastic_nodes()]
    if not own:
        raise ValueError(
            "model: got no continuous latents, expected one at least: its evidence is that of its data"
        )
    structures = []
    for trace in runs:
        sites = {k: node for k, node in trace.nodes.items() if node["type"] == "sample"}
        for name, node in sites.items():
            _check_site(name, node, own)
        structures.append(
            {k: torch.as_tensor(v["value"]).shape for k, v in sites.items() if _is_data(v)}
        )
    absent = [name for name in own if name not in structures[0]]
    if absent:
        raise ValueError(
            f"model: got no site {absent} (its sites: {list(structures[0])}), expected the guide's latents"
        )
    if structures[0] != structures[1]:
        changed = sorted(
            {
                k
                for k in {*structures[0], *structures[1]}
                if structures[0].get(k) != structures[1].get(k)
            }
        )
        raise ValueError(
            f"model: got sites {changed} that come, go or change their shape from run to run, expected the "
            "same sites and shapes at every run"
        )
    for name in own:
        _check_support(name, *(trace.nodes[name] for trace in runs))
    return {name: runs[0].nodes[name] for name in own}


def _check_support(name: str, node: Any, again: Any) -> None:
    """Refuse a support that other latents move: the guide's map to it is that of its first run."""
    maps = [biject_to(site["fn"].support) for site in (node, again)]
    free = torch.zeros_like(maps[0].inv(node["value"]))
    free = torch.stack([free, free + 1])
    if not torch.equal(*(transform(free) for transform in maps)):
        raise ValueError(
            f"site {name!r}: got a {type(node['fn']).__name__} whose support changes from run to run, with "
            "other latents, expected a fixed one, as its scale and location are outside: for Uniform(0, a) "
            "sample Uniform(0, 1) and multiply it by a"
        )


def is_enumerated(node: Any) -> bool:
    """Whether a site of a run is a discrete latent that is summed over."""
    return (
        node["type"] == "sample"
        and not site_is_subsample(node)
        and not node["is_observed"]
        and node["fn"].has_enumerate_support
    )


def _is_data(node: Any) -> bool:
    return not site_is_subsample(node)


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _check_site(name: str, node: Any, own: list[str]) -> None:
    if site_is_subsample(node):
        size, taken = node["fn"].size, len(node["value"])
        if taken < size:
            raise ValueError(
                f"plate {name!r}: got a subsample of {taken} of {size}, whose evidence would be biased, "
                "expected the whole plate"
            )
        return
    if name in own and isinstance(_base(node["fn"]), CIRCULAR):
        raise ValueError(
            f"site {name!r}: got angles ({type(_base(node['fn'])).__name__}) among all real numbers, over "
            "which their periodic density has no integral, expected Uniform(-pi, pi) with that density in a "
            "pyro.factor"
        )
    if node["is_observed"] or name in own:
        return
    if node["fn"].has_enumerate_support:
        return
    if node["fn"].support.is_discrete:
        raise ValueError(
            f"site {name!r}: got a latent {type(node['fn']).__name__}, which cannot be enumerated, expected "
            "it observed, summed over in the model, or of finite support"
        )
    raise ValueError(f"site {name!r}: got a latent that the guide has not, expected a guide of it")
