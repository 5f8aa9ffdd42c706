"""The laws between a guide and a posterior: their densities and slopes at one state, for any temperature."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_diffusion.infer.annealing.guide_chart import GuideChart
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel

__all__ = ["TemperedDensity", "leapfrog", "slope", "tamed"]


class TemperedDensity:
    r"""log q and :math:`\ell = \log p - \log q` at states of a guide's own coordinates, with their gradients.

    One evaluation serves every temperature: :math:`\log \pi_b = \log q + b\, \ell` up to a constant.

    Args:
        model: log p.
        chart: of the guide, q.

    Attributes:
        evaluations: gradients of the model so far, each of all states of its call.
    """

    def __init__(self, model: UnconstrainedModel, chart: GuideChart) -> None:
        self.model, self.chart = model, chart
        self.evaluations = 0

    def __call__(
        self, z: Tensor, given: Tensor | None = None, *, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Log q, log p - log q (minus infinity where there is no density), and their gradients.

        Args:
            z: (..., D).
            given: further unconstrained latents of the model, (..., E), right of the guide's.
            create_graph: whether the results carry gradients; they are constants if not.
        """
        self.evaluations += 1
        with torch.enable_grad():
            if not (create_graph and z.requires_grad):
                # Another object: a chart may keep what it made of the one without gradients.
                z = z.detach().requires_grad_()
            log_q, grad_q = self._of_the_base(z, create_graph)
            u, log_det = self.chart(z)
            if given is not None:
                u = torch.cat([u, given.expand(*u.shape[:-1], -1)], -1)
            log_p = self.model.raw(u) + log_det
            (grad_p,) = torch.autograd.grad(log_p.sum(), z, create_graph=create_graph)
        gap = log_p - log_q
        if not create_graph:
            gap = gap.detach()
        # A model's plus infinity is no density either: it would take all weight.
        gap = torch.where(gap.isfinite(), gap, -math.inf)
        return {"log_q": log_q, "gap": gap, "grad_q": grad_q, "grad_gap": grad_p - grad_q}

    def _of_the_base(self, z: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Log q and its gradient, in closed form where the base has one."""
        closed_form = getattr(self.chart.base, "log_prob_and_slope", None)
        if closed_form is not None:
            with torch.set_grad_enabled(create_graph):
                found: tuple[Tensor, Tensor] = closed_form(z)
            return found
        log_q = self.chart.base.log_prob(z)
        (slope,) = torch.autograd.grad(log_q.sum(), z, create_graph=create_graph)
        return log_q if create_graph else log_q.detach(), slope


def slope(state: dict[str, Tensor], beta: float | Tensor) -> Tensor:
    """Gradient of the tempered log density, (..., D)."""
    if not isinstance(beta, Tensor):
        return torch.add(state["grad_q"], state["grad_gap"], alpha=beta)
    return torch.addcmul(state["grad_q"], state["grad_gap"], beta)


def leapfrog(
    density: Callable[[Tensor], dict[str, Tensor]],
    state: dict[str, Tensor],
    momentum: Tensor,
    times: Callable[[Tensor, bool], Tensor],
    *,
    largest: float | None = None,
    steps: int = 1,
) -> tuple[dict[str, Tensor], Tensor]:
    """Leapfrog steps: half a kick by the slope of a state, a drift, half a kick by that of the next.

    They keep volume whatever the slopes are of, and are undone by the same steps with the momentum turned
    around.

    Args:
        density: what states hold at z, their "slope" among it.
        state: at z, (..., D).
        momentum: (..., D), standard normal in the metric of S.
        times: h S x, or h times the transpose of S times x, of x (..., D) and whether it is the latter: the
            size of a step in the root of its metric.
        largest: of a coordinate's half kick, see :func:`tamed`.
        steps: how many.
    """

    def kick(at: dict[str, Tensor]) -> Tensor:
        by = times(at["slope"], True) / 2
        return by if largest is None else tamed(by, largest)

    half = kick(state)
    for _ in range(steps):
        z = state["z"] + times(momentum := momentum + half, False)
        state = {"z": z, **density(z)}
        half = kick(state)  # the last of this step, and the first of the next
        momentum = momentum + half
    return state, momentum


def tamed(x: Tensor, largest: float) -> Tensor:
    """Drifts that do not run away where a density is steep: largest tanh(x / largest), 0 where x is NaN."""
    x = x.nan_to_num(0.0, math.inf, -math.inf)
    return x.tanh() if largest == 1 else largest * (x / largest).tanh()
