"""Coordinates in which a cloud of particles is as wide everywhere: funnels become normals."""

import math

import torch
from torch import Tensor

from pyro_diffusion.infer.annealing.local_scales import DENSE

__all__ = ["ScaleMap", "scale_map"]

MOST_PARENTS = 4
CANDIDATES = 20
STEPS = 6  # of Fisher scoring
LARGEST = 8.0  # change of a log scale: no overflow far outside of the particles
OUTLIER = 5.0  # squared residuals that count as no more


class ScaleMap:
    r"""Coordinates z of latents u whose width and place depend on a few of them, the parents p.

    .. math:: u_j = a_j + B_j (u_p - m) + \exp(c_j + D_j (u_p - m))\, z_j, \qquad u_p = z_p .

    In Neal's funnel, and in a hierarchy written with centres, that is the map to the one without.

    Args:
        parents: p, indices.
        centre: m, (P,).
        locs: a and B, (D, 1 + P), 0 for parents.
        log_scales: c and D, likewise.

    References:
        Gorinova, Moore & Hoffman, arXiv 1906.03028 (reparametrization between centred and not);
        Breusch & Pagan, Econometrica 47 (1979); Cook & Weisberg, Biometrika 70 (1983) (such regressions).
    """

    def __init__(self, parents: Tensor, centre: Tensor, locs: Tensor, log_scales: Tensor) -> None:
        self.parents, self.centre = parents, centre
        self.locs, self.log_scales = locs, log_scales

    def __call__(self, z: Tensor) -> Tensor:
        """u at z, (..., D)."""
        loc, log_scale = self._at(z)
        return loc + log_scale.exp() * z

    def inv(self, u: Tensor) -> Tensor:
        """z at u, (..., D)."""
        loc, log_scale = self._at(u)
        return (u - loc) * (-log_scale).exp()

    def log_abs_det_jacobian(self, z: Tensor, u: Tensor) -> Tensor:
        """(...)."""
        return self._at(z)[1].sum(-1)

    def to(self, like: Tensor) -> "ScaleMap":
        """In the precision of a tensor."""
        parts = (part.to(like) for part in (self.centre, self.locs, self.log_scales))
        return ScaleMap(self.parents, *parts)

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = x[..., self.parents] - self.centre
        features = torch.cat([torch.ones_like(features[..., :1]), features], -1)
        change = (features[..., 1:] @ self.log_scales[:, 1:].mT).clamp(-LARGEST, LARGEST)
        return features @ self.locs.mT, self.log_scales[:, 0] + change


def scale_map(u: Tensor, log_weights: Tensor) -> ScaleMap | None:
    """The map whose coordinates of weighted draws, (n, D) and (n,), are nearest to one normal.

    Parents are added while the BIC of a normal in the new coordinates falls; None where no one makes it.
    """
    rows, weights = u.double(), log_weights.double().exp()
    dim, count = rows.shape[1], float(weights.square().sum().reciprocal())
    if dim == 1 or dim > DENSE or count < 5 * dim:
        return None
    least, best = _cost(rows, weights, None), None
    parents: list[int] = []
    while len(parents) < min(MOST_PARENTS, dim - 1):
        tried = []
        for k in _candidates(rows, weights, best, parents):
            found = _regressed(rows, weights, [*parents, k])
            tried.append((_cost(rows, weights, found), k, found))
        cost, k, found = min(tried, key=lambda row: row[0])
        # A slope of a place and of a scale for each of the others.
        if not (least - cost) * count > (dim - len(parents) - 1) * math.log(count):
            break
        least, best, parents = cost, found, [*parents, k]
    return None if best is None else best.to(u)


def _cost(rows: Tensor, weights: Tensor, chart: ScaleMap | None) -> float:
    """Mean negative log density of a normal in these coordinates, less a constant."""
    z = rows if chart is None else chart.inv(rows)
    centred = z - weights @ z
    covariance = (centred.mT * weights) @ centred
    covariance.diagonal().mul_(1 + 1e-9)
    cost = torch.linalg.slogdet(covariance).logabsdet / 2
    if chart is not None:
        cost = cost + weights @ chart.log_abs_det_jacobian(rows, rows)
    return float(cost.nan_to_num(math.inf, math.inf, math.inf))


def _candidates(
    rows: Tensor, weights: Tensor, chart: ScaleMap | None, taken: list[int]
) -> list[int]:
    """Latents with which the others' places, or the sizes of their residuals, change most."""
    z = rows if chart is None else chart.inv(rows)
    z, parts = _standard(z, weights), _standard(rows, weights)
    sizes = _standard((z.square() + 1e-12).log(), weights)
    linked = torch.stack([(parts.mT * weights) @ x for x in (z, sizes)]).square()
    linked.diagonal(dim1=1, dim2=2).zero_()
    score = linked.sum((0, 2))
    score[taken] = -1.0
    order = score.argsort(descending=True).tolist()
    return order[: min(CANDIDATES, len(order) - len(taken))]


def _standard(x: Tensor, weights: Tensor) -> Tensor:
    centred = x - weights @ x
    return centred / (weights @ centred.square()).sqrt()


def _regressed(rows: Tensor, weights: Tensor, parents: list[int]) -> ScaleMap:
    """Places and log scales of all but the parents, by regression on these."""
    index = torch.tensor(parents, device=rows.device)
    centre = weights @ rows[:, index]
    features = torch.cat([torch.ones_like(rows[:, :1]), rows[:, index] - centre], -1)
    normal = torch.linalg.pinv((features.mT * weights) @ features)
    hat = normal @ (features.mT * weights)
    locs = (hat @ rows).mT
    size = (rows - features @ locs.mT).square()
    # The mean log of a normal's square is -1.27; sizes of zero, a parent's own, count for nothing.
    logs = hat @ (size + 1e-12 * (weights @ rows.square())).log()
    logs[0] += 1.27
    for _ in range(STEPS):
        inner = weights[:, None] * (-features @ logs).clamp(-60, 60).exp()
        gram = torch.einsum("nj,np,nq->jpq", inner, features, features)
        gram.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-9)
        moment = torch.einsum("nj,np->jp", inner * rows, features)
        locs = (torch.linalg.pinv(gram) @ moment.unsqueeze(-1)).squeeze(-1)
        size = (rows - features @ locs.mT).square()
        surplus = (size * (-features @ logs).clamp(-60, 60).exp() - 1).clamp(max=OUTLIER)
        logs = logs + hat @ surplus
    log_scales = logs.mT / 2
    locs[index], log_scales[index] = 0.0, 0.0
    return ScaleMap(index, centre, locs, log_scales)
