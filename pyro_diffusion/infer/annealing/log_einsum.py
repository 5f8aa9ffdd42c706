"""Sums over discrete latents, in the log, of terms that ``torch.func.vmap`` has batched."""

import math
from typing import Any

import torch
from opt_einsum import shared_intermediates  # type: ignore[import-untyped]
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["EnumeratedDensity", "einsum", "tensordot", "transpose"]


class EnumeratedDensity(TraceEinsumEvaluator):
    """Pyro's tensor variable elimination of a trace, under ``vmap`` too.

    Pyro's own backend takes its logarithm by an autograd function that ``vmap`` refuses. Its other evaluator,
    ``TraceTreeEvaluator``, takes every plate to lie within one other, and dimensions that ``pyro.markov``
    uses again for one latent: it is wrong, without a word, for crossed plates and for chains.

    A discrete latent whose own law is masked out counts as uniform, so that a masked row (of padding, say)
    has the evidence 1. Masked by 0 it would be the number of its values.
    """

    def check_scales(self, model_trace: Any) -> None:
        """Refuse scales on what is summed over, where Pyro's chains and its ELBOs mean different things.

        Raises:
            ValueError: naming the site.
        """
        self._get_log_factors(model_trace)
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            summed = self._enum_dims.intersection(site["packed"]["log_prob"]._pyro_dims)
            if summed and not bool((torch.as_tensor(site["scale"]) == 1).all()):
                raise ValueError(
                    f"site {name!r}: got a scale of {site['scale']} on a density that discrete latents are "
                    "summed over, expected none there: a sum of powers is not the power of a sum"
                )

    def _get_log_factors(self, model_trace: Any) -> Any:
        model_trace.compute_log_prob()
        for site in model_trace.nodes.values():
            dim = site["infer"].get("_enumerate_dim") if site["type"] == "sample" else None
            if dim is not None and site["mask"] is not None:
                count = site["value"].shape[dim - site["fn"].event_dim]
                kept = torch.as_tensor(site["mask"], device=site["log_prob"].device)
                site["log_prob"] = torch.where(kept, site["log_prob"], -math.log(count))
        return super()._get_log_factors(model_trace)

    def log_prob(self, model_trace: Any) -> Tensor:
        """Log density of the trace, enumerated latents summed over."""
        with shared_intermediates() as cache:
            factors = self._get_log_factors(model_trace)
            out: Tensor = contract_to_tensor(factors, self._enum_dims, ring=_Ring(cache))
        return out


class _Ring(LogRing):
    _backend = __name__


def transpose(a: Tensor, axes: Any) -> Tensor:
    """For opt_einsum."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    r""":math:`\log \sum \prod \exp` of operands, in the notation of einsum, without repeated symbols."""
    terms, output = equation.split("->")
    inputs = terms.split(",")
    summed = sorted({*"".join(inputs)} - {*output})
    order = [*output, *summed]
    # From 0: a new tensor, as Pyro's cache expects, for a single operand too.
    total = sum(
        (_spread(x, dims, order) for x, dims in zip(operands, inputs, strict=True)),
        torch.zeros((), dtype=operands[0].dtype, device=operands[0].device),
    )
    return total.logsumexp(tuple(range(len(output), len(order)))) if summed else total


tensordot = Tensordot(einsum)


def _spread(x: Tensor, dims: str, order: list[str]) -> Tensor:
    """Dimensions in another order, singletons for those that are missing."""
    found = x.permute([dims.index(symbol) for symbol in order if symbol in dims])
    return found[tuple(slice(None) if symbol in dims else None for symbol in order)]
