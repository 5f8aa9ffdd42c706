"""What the tolerances of ODE solvers leave in a log evidence."""

import math
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.dynamics.refinement import refined

__all__ = ["solver_error"]

SCORED = 64  # draws, which know a difference that is alike for all of them


def solver_error(model: Any, guide: Any, log_weights: Tensor, nesting: int) -> float:
    r"""How far a log evidence may be off by the solvers of its densities and of its draws (nats).

    Finer solutions (a hundredth of the tolerances, or four times the steps) change the log-weight of draw i
    by :math:`d_i`, and the density that it was drawn from by a factor :math:`1 + \delta_i`. With weights w of
    mean 1,

    .. math:: \Big|\sum_i w_i d_i \Big/ \sum_i w_i\Big|
              + \min\big(\operatorname{sd}(\delta) \operatorname{sd}(w),\; \max |\delta|\big).

    The first is the densities' part, to first order. The second bounds the draws': if their law is off their
    density by a factor :math:`1 + \epsilon`, where :math:`\operatorname E \epsilon = 0` as both integrate to
    1, the evidence changes by :math:`\operatorname E w \epsilon`. Draws and densities come of one solver,
    so :math:`\epsilon` is taken to be as large as :math:`\delta`. Approximate, from the first 64 draws.

    Args:
        model: its trace in a plate of all draws, with log-densities.
        guide: likewise.
        log_weights: (S,), their own.
        nesting: dimensions of plates right of that of the draws.
    """
    count = min(SCORED, len(log_weights))
    change, law = log_weights.new_zeros(count), log_weights.new_zeros(count)
    for trace, sign in ((model, 1), (guide, -1)):
        for node in trace.nodes.values():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            by_solver = _change(node, len(log_weights), nesting)
            weighed = scale_and_mask(by_solver, node["scale"], node["mask"])
            change = change + sign * _of_draws(weighed, count, nesting)
            # latents that the guide leaves out are drawn by the model, which does not weigh them
            if not node["is_observed"] and (sign < 0 or node["mask"] is False):
                law = law + _of_draws(by_solver, count, nesting)
    first = log_weights[:count]
    if not bool((first > -math.inf).any()):
        first = torch.zeros_like(first)
    mean = (first.softmax(0) * change).sum().abs()
    uneven = len(log_weights) * log_weights.softmax(0).square().sum() - 1
    spread = law.std() * uneven.clamp(min=0).sqrt()
    return float(mean + torch.minimum(spread, law.abs().max()))


def _change(node: Any, total: int, nesting: int) -> Tensor:
    """What finer solutions add to a site's log-density, right of the first draws; 0 if it asks no solver."""
    fn, value = node["fn"], node["value"]
    of_draws = len(fn.batch_shape) > nesting and fn.batch_shape[0] == total
    share = min(SCORED, total) / total if of_draws else 1.0
    with refined(share=share) as finer:
        log_prob = fn.log_prob(value, *node["args"], **node["kwargs"])
    if not finer.solutions:
        return torch.zeros((), dtype=torch.float64)
    change = (log_prob - node["unscaled_log_prob"]).double()
    return change.where(change.isfinite(), 0.0)


def _of_draws(change: Tensor, count: int, nesting: int) -> Tensor:
    """Sums over plates, (count,), or () of a site that all draws share."""
    change = change.cpu()
    if change.dim() <= nesting:
        return change.sum()
    return change[:count].reshape(len(change[:count]), -1).sum(-1)
