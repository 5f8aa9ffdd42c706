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
            log_q = self.chart.base.log_prob(z)
            u, log_det = self.chart(z)
            if given is not None:
                u = torch.cat([u, given.expand(*u.shape[:-1], -1)], -1)
            log_p = self.model.raw(u) + log_det
            (grad_q,) = torch.autograd.grad(log_q.sum(), z, create_graph=create_graph)
            (grad_p,) = torch.autograd.grad(log_p.sum(), z, create_graph=create_graph)
        gap = log_p - log_q
        if not create_graph:
            log_q, gap = log_q.detach(), gap.detach()
        # A model's plus infinity is no density either: it would take all weight.
        gap = torch.where(gap.isfinite(), gap, -math.inf)
        return {"log_q": log_q, "gap": gap, "grad_q": grad_q, "grad_gap": grad_p - grad_q}


def slope(state: dict[str, Tensor], beta: float | Tensor) -> Tensor:
    """Gradient of the tempered log density, (..., D)."""
    return state["grad_q"] + beta * state["grad_gap"]


def leapfrog(
    density: Callable[[Tensor], dict[str, Tensor]],
    state: dict[str, Tensor],
    momentum: Tensor,
    step: float | Tensor,
    root: Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    largest: float | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One leapfrog step: half a kick at the first temperature, a drift, half a kick at the second.

    It keeps volume for any temperatures, and is undone by the step from the second to the first with the
    momentum turned around.

    Args:
        density: what states hold, at z.
        state: at z, (..., D).
        momentum: (..., D), standard normal in the metric of root.
        step: its size, in units of root.
        root: (D, D) lower triangular or (D,), or one for each state, (..., D, D).
        betas: the two temperatures.
        largest: of a coordinate's half kick, see :func:`tamed`.
    """

    def kick(at: dict[str, Tensor], beta: float | Tensor) -> Tensor:
        by = step / 2 * _times(slope(at, beta), root, transpose=True)
        return by if largest is None else tamed(by, largest)

    momentum = momentum + kick(state, betas[0])
    z = state["z"] + step * _times(momentum, root)
    new = {"z": z, **density(z)}
    return new, momentum + kick(new, betas[1])


def tamed(x: Tensor, largest: float) -> Tensor:
    """Drifts that do not run away where a density is steep: largest tanh(x / largest), 0 where x is NaN."""
    x = torch.where(x.isnan(), 0.0, x)
    return largest * (x / largest).tanh()


def _times(x: Tensor, root: Tensor, transpose: bool = False) -> Tensor:
    """S x, or its transpose times x, of (..., D)."""
    if root.dim() == 1:
        return x * root
    if root.dim() > 2:
        return torch.einsum("...ij,...i->...j" if transpose else "...ij,...j->...i", root, x)
    return x @ (root if transpose else root.mT)
