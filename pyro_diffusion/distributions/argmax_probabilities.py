"""Which of several numbers is the largest after noise: the integrals over the winner's value.

Each function takes utilities in units of the noise's scale, batch + (K,), and returns log-probabilities.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch import distributions as dist

from pyro_diffusion.distributions.discretized import log_ndtr

__all__ = ["LOG_PROBABILITIES", "gauss_legendre"]

# Past these numbers of nodes nothing changes in double precision, for up to a thousand categories; below
# them K/2 nodes are exact for the polynomials.
EXPONENTIAL_NODES, UNIFORM_NODES, NORMAL_NODES = 64, 48, 64
# What of the normal's integrand is negligible: exp(-37) of its largest value, below double precision.
NORMAL_DROP = 37.0
# Where the curvature of -log Phi is 1, to 1 / FAR^2.
FAR = 50.0


@functools.cache
def _nodes(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    x, w = np.polynomial.legendre.leggauss(count)
    return tuple((x + 1) / 2), tuple(w / 2)


def gauss_legendre(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], exact for polynomials of degree below twice their number."""
    x, w = _nodes(count)
    return like.new_tensor(x), like.new_tensor(w)


def gumbel(utilities: Tensor) -> Tensor:
    """The softmax."""
    return utilities.log_softmax(-1)


def exponential(utilities: Tensor) -> Tensor:
    r""":math:`w_i \int_0^1 \prod_{j \ne i} (1 - w_j s)\,ds` with :math:`w_j = e^{u_j - \max u}`.

    The winner's value is beyond the largest utility, by :math:`-\log s`. The integrand is a polynomial.
    """
    gap = utilities - utilities.amax(-1, keepdim=True)
    s, weight = gauss_legendre(_enough(gap, EXPONENTIAL_NODES), gap)
    rest = s.flip(0)  # 1 - s, without rounding: the nodes are symmetric
    below = (rest - gap.expm1().unsqueeze(-1) * s).log()  # log(1 - w_j s)
    others = below.sum(-2, keepdim=True) - below
    return gap + (others + weight.log()).logsumexp(-1)


def uniform(utilities: Tensor) -> Tensor:
    r""":math:`\int_0^{1 - d_i} \prod_{j \ne i} \min(v + d_j, 1)\,dv` with :math:`d_j = \max u - u_j`.

    The winner's value is beyond the largest utility, by v. The integrand is a polynomial between the points
    :math:`1 - d_j`. A category with :math:`d_i \ge 1` never wins: its logarithm is -inf, without a gradient.
    """
    below = utilities.amax(-1, keepdim=True) - utilities
    reach = (1 - below).clamp(min=0)
    ends = reach.sort(-1).values
    starts = torch.cat([torch.zeros_like(ends[..., :1]), ends[..., :-1]], -1)
    width = ends - starts
    s, weight = gauss_legendre(_enough(below, UNIFORM_NODES), below)
    v = starts.unsqueeze(-1) + width.unsqueeze(-1) * s  # pieces, nodes
    # The least positive number is for pieces of no width, which are left out below.
    least = torch.finfo(v.dtype).tiny
    log_cdf = (v.unsqueeze(-3) + below[..., None, None]).clamp(least, 1).log()
    others = log_cdf.sum(-3, keepdim=True) - log_cdf
    inside = (width > 0).unsqueeze(-2) & (ends.unsqueeze(-2) <= reach.unsqueeze(-1))
    log_width = torch.where(width > 0, width, 1.0).log()[..., None, :, None]
    terms = torch.where(inside.unsqueeze(-1), others + log_width + weight.log(), -torch.inf)
    possible = reach > 0
    terms = torch.where(possible[..., None, None], terms, 0.0)
    return torch.where(possible, terms.flatten(-2).logsumexp(-1), -torch.inf)


def normal(utilities: Tensor) -> Tensor:
    r""":math:`\int \varphi(z - u_i) \prod_{j \ne i} \Phi(z - u_j)\,dz`.

    Every integrand is log-concave. Its nodes are where it is above :math:`e^{-37}` of its own largest value,
    so that each probability has full relative accuracy, however small.
    """
    u = utilities - utilities.amax(-1, keepdim=True)
    u = u.clamp(min=-(torch.finfo(u.dtype).max ** 0.4))  # of which sums of squares are finite
    s, weight = gauss_legendre(NORMAL_NODES, u)
    with torch.no_grad():  # where the nodes are does not matter to the integral
        start, width = _range(u)
        z = start.unsqueeze(-1) + width.unsqueeze(-1) * s
    terms = _log_integrand(z, u) + weight.log()
    # Its gradient has the weights exp(term - sum), which need a sum near zero.
    most = terms.detach().amax(-1, keepdim=True)
    return (terms - most).logsumexp(-1) + most.squeeze(-1) + width.log()


def _log_integrand(z: Tensor, u: Tensor) -> Tensor:
    """Log-density of the winner's value z of every category, batch + (K, nodes)."""
    others = 1 - torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    competitors = log_ndtr(z.unsqueeze(-1) - u[..., None, None, :]) * others.unsqueeze(-2)
    gap = z - u.unsqueeze(-1)
    return competitors.sum(-1) - 0.5 * gap.square() - 0.5 * math.log(2 * math.pi)


def _range(u: Tensor) -> tuple[Tensor, Tensor]:
    """Start and width of where each integrand is not negligible, by bisection on both sides of its mode."""
    mode = _modes(u)
    side = torch.tensor([-1.0, 1.0], dtype=u.dtype, device=u.device)
    least = _log_integrand(mode.unsqueeze(-1), u) - NORMAL_DROP
    # The curvature is at least that of the normal density itself.
    inner, outer = torch.zeros_like(side), side * math.sqrt(2 * NORMAL_DROP)
    inner, outer = (end.expand(*u.shape, 2) for end in (inner, outer))
    for _ in range(6):
        middle = (inner + outer) / 2
        inside = _log_integrand(mode.unsqueeze(-1) + middle, u) > least
        inner, outer = torch.where(inside, middle, inner), torch.where(inside, outer, middle)
    return mode + outer[..., 0], outer[..., 1] - outer[..., 0]


def _modes(u: Tensor) -> Tensor:
    """Modes of the normal's integrands: Newton's method from the left, which never passes one."""
    others = 1 - torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    z = u
    for _ in range(8):
        gap = z.unsqueeze(-1) - u.unsqueeze(-2)
        ratio = math.sqrt(2 / math.pi) / torch.special.erfcx(-math.sqrt(0.5) * gap)
        slope = (others * ratio).sum(-1) - (z - u)
        # Far below, gap + ratio is rounding, and the product close to its bound of 1.
        bend = torch.where(gap < -FAR, 1.0, ratio * (gap + ratio))
        curvature = (others * bend).sum(-1) + 1
        z = z + slope / curvature
    return z


def _enough(u: Tensor, most: int) -> int:
    return min((u.shape[-1] + 1) // 2, most)


# By the noise's type (torch's, of which Pyro's are): how its scale is read, and the function at scale one.
LOG_PROBABILITIES: dict[type, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    dist.Gumbel: (lambda noise: noise.scale, gumbel),
    dist.Exponential: (lambda noise: 1 / noise.rate, exponential),
    dist.Uniform: (lambda noise: noise.high - noise.low, uniform),
    dist.Normal: (lambda noise: noise.scale, normal),
}
