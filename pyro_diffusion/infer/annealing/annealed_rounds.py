"""A base around the particles that another led to."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_diffusion.infer.annealing.annealed_particles import (
    BLIND,
    AnnealedParticles,
    disagreement,
    mean_gap,
)
from pyro_diffusion.infer.annealing.annealed_verdict import AGREE
from pyro_diffusion.infer.annealing.guide_chart import GuideChart, normal_chart
from pyro_diffusion.infer.annealing.local_scales import fitted
from pyro_diffusion.infer.annealing.scale_map import ScaleMap, scale_map
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel

__all__ = ["WIDER", "of_the_guide", "refitted", "settled"]

# The base is that much wider than the particles, so that the next find what these just missed; with
# ``widen`` no less than the first was, since a rare mode that is far hardly widens the cloud.
WIDER = 1.5


def refitted(found: AnnealedParticles, wider: float = WIDER) -> GuideChart | None:
    r"""A base around a run's particles: one normal in coordinates where they are as wide everywhere.

    One for all modes, and no mixture with a part for each of those that have the particles for it. Between
    base and posterior the particles near mode k have the share :math:`\int_k q^{1-b} p^b`, which is
    :math:`q_k^{1-b} p_k^b` times how far the two laws overlap there. Where q is as smooth over all modes that
    factor is about the same in each, and shares go from the base's to the posterior's. A part that fits a
    common mode, beside none for the rare ones, makes it many times larger in the former: half way rare
    modes have next to no particles, at any share that base and posterior give them.

    None where they are too few for a covariance.

    Args:
        found: the run.
        wider: than its particles, as a ratio of scales.

    References:
        Woodard, Schmidler & Huber, Electronic Journal of Probability 14 (2009) (modes of other widths lose
        their share under tempering); Tawn, Roberts & Rosenthal, Statistics and Computing 30 (2020).
    """
    present = found.log_weights > -math.inf
    u, log_weights = found.unconstrained[present], found.log_weights[present]
    known = scale_map(u, log_weights)
    dim = u.shape[1]
    scales = fitted(u if known is None else known.inv(u), log_weights, most=1)
    if scales.roots.dim() == 2 and dim > 1:
        return None
    # Of one dimension the root is a diagonal, (1, 1), too.
    normal = MultivariateNormal(scales.locs[0], scale_tril=wider * scales.roots.reshape(dim, dim))
    chart = normal_chart(normal)
    if known is None:
        return chart

    def log_prob(u: Tensor) -> Tensor:
        z = known.inv(u)
        return normal.log_prob(z) - known.log_abs_det_jacobian(z, u)

    return GuideChart(chart.base, _Both(chart.transform, known), log_prob)


def settled(rounds: Sequence[AnnealedParticles]) -> bool:
    """Whether the last of them may be believed and differs from the one before by chance at most."""
    if len(rounds) < 2 or rounds[-1].verdict.problems:
        return False
    return disagreement(rounds[-2], rounds[-1]) < AGREE


class _Both:
    """One map after another."""

    def __init__(self, first: Any, second: ScaleMap) -> None:
        self._first, self._second = first, second

    def __call__(self, z: Tensor) -> Tensor:
        return self._second(self._first(z))

    def inv(self, u: Tensor) -> Tensor:
        """The inverse."""
        found: Tensor = self._first.inv(self._second.inv(u))
        return found

    def log_abs_det_jacobian(self, z: Tensor, u: Tensor) -> Tensor:
        """(...)."""
        between = self._first(z)
        found: Tensor = self._first.log_abs_det_jacobian(z, between)
        return found + self._second.log_abs_det_jacobian(between, u)


def of_the_guide(
    found: AnnealedParticles, first: AnnealedParticles, model: UnconstrainedModel, chart: GuideChart
) -> AnnealedParticles:
    """With both bounds and k-hat of the guide, where particles started at another base."""
    with torch.no_grad():
        gap = (model(found.unconstrained) - chart.log_prob(found.unconstrained)).double()
    eubo = mean_gap(gap, found.log_weights, BLIND, found.repeat)
    verdict = dataclasses.replace(found.verdict, guide_khat=first.verdict.guide_khat)
    return dataclasses.replace(found, elbo=first.elbo, eubo=eubo, verdict=verdict)
