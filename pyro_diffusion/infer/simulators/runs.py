"""One run of a program: its sites, and what they score."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.infer.simulators.site_checks import with_own_mask
from pyro_diffusion.likelihoods.run import Message, check_fixed_rows, is_computed, isolated

__all__ = ["WholeData", "score", "site_score", "sites_of", "traced"]


class WholeData(Messenger):
    """Refuses plates that draw their rows."""

    def _pyro_sample(self, msg: Any) -> None:
        check_fixed_rows(msg)


def traced(program: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A trace of one run, as if nothing were around it."""
    with isolated(), torch.no_grad(), WholeData():
        try:
            return poutine.trace(poutine.block(program, hide_types=["param"])).get_trace(
                *args, **kwargs
            )
        except NotImplementedError as error:
            error.add_note("model: got a site without draws, expected one that can be simulated")
            raise


def sites_of(trace: Any) -> dict[str, Message]:
    """Sample sites, without those of plates and what is computed, each with its masks in `mask`."""
    return {
        name: with_own_mask(node)
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node) and not is_computed(node)
    }


def score(node: Message) -> Tensor:
    """Log-density of a site's value; of a point mass, the point."""
    fn = node["fn"]
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    if not isinstance(base, Delta):
        out: Tensor = fn.log_prob(node["value"])
        return out
    point: Tensor = base.v.double()
    event = tuple(range(point.dim() - fn.event_dim, point.dim()))
    return point.sum(event) if event else point


def site_score(node: Message) -> Tensor:
    """Log-density of a site's value, of its batch shape; of a point mass, the point."""
    return score(node).expand(node["fn"].batch_shape)
