"""A pilot run that chooses temperatures and moves, which the reported run then takes as they are."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.infer.annealing.annealed_chain import AnnealedChain, Stage
from pyro_diffusion.infer.annealing.local_scales import fitted

__all__ = ["interpolated", "next_stage"]

TARGET = 0.8  # acceptance
NEAR = 0.1  # of the target: tuned enough
ROUNDS = 6
GAIN = 1.5
LEAST_STEP = 1e-4
BISECTIONS = 40
LEAST_INCREMENT = 1e-8
# Most of what is left of the way to 1 that one step takes, until so little is left. Where the posterior has
# the heavier tails, a guide's hold particles back until its share 1 - b is small, and no particle says so.
STRIDE = 0.6
END = 0.005


def next_stage(
    chain: AnnealedChain,
    state: Any,
    log_weights: Tensor,
    last: Stage | None,
    *,
    conditional_ess: float,
    max_leapfrog: int,
) -> Stage:
    """Tune moves at the present temperature on the particles, and choose the next temperature.

    Args:
        chain: the pilot's.
        state: its particles, which the tuning moves.
        log_weights: theirs, (N, 1), normalized.
        last: the stage before; None at the start, where particles are the guide's own draws.
        conditional_ess: share of the particles that the next weighting leaves.
        max_leapfrog: steps of a move at most.
    """
    beta = 0.0 if last is None else last.next_beta
    scales = fitted(
        state["z"].flatten(0, -2), log_weights.flatten(), near=last and last.scales.size
    )
    size = scales.locs.new_full(
        (scales.size,), 1.0 if last is None else float(last.step_size.mean())
    )
    stage = Stage(beta, 1.0, scales, size, _leapfrog(size, max_leapfrog))
    if last is not None:
        stage = _tuned(chain, state, stage, max_leapfrog)
    if beta == 1:
        return stage
    most = 1 - beta if 1 - beta < END else STRIDE * (1 - beta)
    increment = _increment(state["gap"].double(), log_weights, most, conditional_ess)
    # The last stage ends at 1 exactly.
    following = 1.0 if increment >= 1 - beta else beta + increment
    return stage._replace(next_beta=following)


def _tuned(chain: AnnealedChain, state: Any, stage: Stage, max_leapfrog: int) -> Stage:
    """Step sizes by the acceptance in each part."""
    for _ in range(ROUNDS):
        accept, part = chain.propose(state, stage)
        size = stage.step_size
        zero = torch.zeros_like(size)
        count = zero.scatter_add(0, part.flatten(), torch.ones_like(accept.flatten()))
        rate = (zero.scatter_add(0, part.flatten(), accept.flatten()) + TARGET) / (count + 1)
        size = (size * (GAIN * (rate - TARGET)).exp()).clamp(min=LEAST_STEP)
        stage = stage._replace(step_size=size, leapfrog=_leapfrog(size, max_leapfrog))
        if bool(((rate - TARGET).abs() < NEAR).all()):
            break
    return stage


def _leapfrog(step_size: Tensor, most: int) -> int:
    """Steps for a quarter of a normal's period, after which a draw has forgotten where it was."""
    return min(max(round(math.pi / 2 / float(step_size.mean())), 1), most)


def _increment(gap: Tensor, log_weights: Tensor, most: float, share: float) -> float:
    """The largest step of the temperature after which the conditional effective size is that share."""

    def left(step: float) -> float:
        moved = (log_weights + (step * gap).nan_to_num(-math.inf)).reshape(-1)
        squares = (moved + (step * gap).nan_to_num(-math.inf).reshape(-1)).logsumexp(0)
        return float((2 * moved.logsumexp(0) - squares).exp())

    if left(most) >= share:
        return most
    low, high = 0.0, most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) >= share else (low, middle)
    return max(low, LEAST_INCREMENT)


def interpolated(stages: list[Stage], steps: int) -> list[Stage]:
    """A pilot's stages spread over another number of steps; the last, at 1, is kept.

    Temperatures are those between which the pilot's would lie, moves those of the stage before.
    """
    betas, count = [stage.beta for stage in stages], len(stages) - 1
    found = []
    for step in range(steps):
        at = [step * count / steps, (step + 1) * count / steps]
        beta, following = (_between(betas, x) for x in at)
        found.append(stages[int(at[0])]._replace(beta=beta, next_beta=following))
    return [*found, stages[-1]]


def _between(values: list[float], at: float) -> float:
    low = min(int(at), len(values) - 2)
    return values[low] + (at - low) * (values[low + 1] - values[low])
