"""What the tolerances of ODE solvers leave in a log evidence."""

import warnings
from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from pyro_diffusion.dynamics.refinement import refined

__all__ = ["solver_error"]

SCORED = 64  # draws, which know a difference that is alike for all of them


def solver_error(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    traces: tuple[Any, Any],
    log_weights: Tensor,
    nesting: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    r"""How far a log evidence may be off by its densities' and draws' solvers (nats).

    With :math:`d_i` what finer solutions (a hundredth of the tolerances, or four times the steps) add to the
    log-weight of draw i, and weights w of mean 1,

    .. math:: \Big|\sum_i w_i d_i \Big/ \sum_i w_i\Big| + \operatorname{sd}(d)\,\operatorname{sd}(w).

    The first is the densities' part, to first order. The second bounds the draws': their law is off the
    density that is meant by a factor :math:`1 + \delta`, with :math:`\operatorname E \delta = 0` as both
    integrate to 1, which changes the evidence by :math:`\operatorname{Cov}(\delta, w)`; :math:`\delta` comes
    of the same solver, and is taken to be as large as d. Approximate, from the first 64 draws.

    Args:
        model: as the weights' own.
        guide: likewise.
        traces: of model and guide, in a plate of all draws.
        log_weights: (S,), their own.
        nesting: dimensions of plates right of that of the draws.
        args: of both.
        kwargs: of both.
    """
    total, count = len(log_weights), min(SCORED, len(log_weights))
    data = {}
    for trace in traces:
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and not node["is_observed"]:
                value, dim = node["value"], -1 - nesting - node["fn"].event_dim
                whole = value.dim() >= -dim and value.shape[dim] == total
                data[name] = value.narrow(dim, 0, count) if whole else value
    with refined(), warnings.catch_warnings():
        # what is conditioned on counts as observed by the model
        warnings.filterwarnings("ignore", "Found non-auxiliary vars in guide", UserWarning)
        finer, _, _ = vectorized_importance_weights(
            poutine.condition(model, data),
            poutine.condition(guide, data),
            *args,
            num_samples=count,
            max_plate_nesting=nesting,
            **kwargs,
        )
    first = log_weights[:count]
    difference = finer.detach().to(first) - first
    mean = (first.softmax(0) * difference).sum().abs()
    uneven = total * log_weights.softmax(0).square().sum() - 1
    return float(mean + difference.std() * uneven.clamp(min=0).sqrt())
