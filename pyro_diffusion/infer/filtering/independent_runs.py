"""The error of evidence from independent runs."""

import math

import torch
from torch import Tensor

from pyro_diffusion.infer.filtering.resampling import genealogical_variance

__all__ = ["LEAST_RUNS", "independent_variance", "log_mean_square_error"]

# The spread of independent runs is told from so many.
LEAST_RUNS = 16
# Runs this many nats below their mean add nothing to it: as if they had died.
NOTHING = 20.0
# Runs that differ by more nats than this have no evidence to speak of.
LARGEST_SD = 8.0
EULER = 0.5772156649015329
# Of quadrature: a Gumbel density is known to 1e-10 by its values this far apart.
STEP = 0.4


def independent_variance(log_z: Tensor) -> Tensor:
    r"""Mean square error of :math:`\log \bar Z`, the mean of M independent unbiased :math:`\hat Z_m`.

    The larger of two. The sample variance of the mean over its square, which knows of drawn weights only and
    cannot exceed 1; and that of log-normal :math:`\hat Z_m`, of which the share p is not 0
    (:func:`log_mean_square_error`), with :math:`s^2` the mean square of :math:`\log \hat Z_m` above their
    median: the upper tail is what a mean depends on. It has the square of the bias of a logarithm in it.
    Runs that are :math:`e^{-20}` of the mean or less, as those that miss by far, add nothing to it and count
    as 0: how far they miss is no spread. Of log-normal runs with s up to 3, 4 % of means are off by more than
    three errors if M is 64 and s at its largest, 1 % if s is 1; 12 % and 3 % if M is 16, which is few.

    Args:
        log_z: (M,) + batch, -inf for runs of evidence 0.

    Returns:
        Batch; infinite, for "not estimated", where fewer than ``LEAST_RUNS`` are not 0 or s exceeds 8 nats.
    """
    count = len(log_z)
    told = log_z > log_z.logsumexp(0) - math.log(count) - NOTHING
    left = told.sum(0)
    enough = left >= LEAST_RUNS
    if not bool(enough.any()):
        return torch.full_like(log_z[0], math.inf)
    own = torch.arange(count, device=log_z.device).reshape(-1, *(1,) * (log_z.dim() - 1))
    log_weights = log_z.where(enough, 0.0).log_softmax(0)
    correction = torch.full_like(log_z[0], count / (count - 1))
    plain = genealogical_variance(log_weights, own.expand(log_z.shape), correction)
    above = (log_z - log_z.where(told, math.nan).nanquantile(0.5, 0)).clamp(min=0).where(told, 0.0)
    sd = (2 * above.square().sum(0) / (left - 1).clamp(min=1)).sqrt()
    enough = enough & (sd <= LARGEST_SD)
    log_normal = log_mean_square_error(sd.where(enough, 0.0), left / count, count)
    return torch.maximum(plain, log_normal).where(enough, math.inf)


def log_mean_square_error(sd: Tensor, share: Tensor, count: int) -> Tensor:
    r"""E of :math:`(\log \bar Z)^2`, of M independent Z of mean 1 that are log-normal, or 0.

    A Gumbel variable G independent of :math:`\bar Z` makes :math:`U = \log \bar Z + G` one whose
    distribution function is a power,

    .. math:: P(U \le u) = E\, e^{-\bar Z e^{-u}} = \varphi(e^{-u} / M)^M, \qquad
              \varphi(t) = 1 - p + p\, E\, e^{-t Z}, \quad Z = e^{s X - s^2/2} / p,

    so that :math:`\operatorname E \log \bar Z = \operatorname E U - \gamma` and
    :math:`\operatorname{Var} \log \bar Z = \operatorname{Var} U - \pi^2 / 6`, given that one is not 0. To
    first order it is :math:`(e^{s^2}/p - 1) / M`, of which little is left where that is large. Exact, by
    quadrature (to 1e-7).

    Args:
        sd: s in [0, 8], any shape.
        share: p in (0, 1], of that shape.
        count: M >= 1.
    """
    s, p = (v.to(torch.float64).unsqueeze(-1) for v in (sd, share))
    top = max(float(sd.max()), 1.0)
    x = torch.linspace(-9, 9, 2 * math.ceil(9 * top / STEP) + 1, dtype=s.dtype, device=s.device)
    weights = torch.softmax(-x.square() / 2, -1)
    places = [STEP * k for k in range(int((-9 * top - 11) / STEP), int((9 * top + 35) / STEP))]
    log_z = s * x - p.log()  # times e^{s^2 / 2}
    density = torch.stack([_density(log_z, weights, p, u, count) for u in places], -1)
    density = density / density.sum(-1, keepdim=True)
    u = s.new_tensor(places)
    mean = (density * u).sum(-1)
    variance = (density * (u - mean.unsqueeze(-1)).square()).sum(-1) - math.pi**2 / 6
    bias = mean - EULER - s.squeeze(-1).square() / 2
    return variance.clamp(min=0) + bias.square()


def _density(log_z: Tensor, weights: Tensor, share: Tensor, u: float, count: int) -> Tensor:
    """Of U at u: the derivative of its distribution function."""
    t = (log_z - u - math.log(count)).exp()
    kept = (-t).exp()
    below = 1 - share.squeeze(-1) * (1 - (kept * weights).sum(-1))
    return count * below ** (count - 1) * share.squeeze(-1) * (t * kept * weights).sum(-1)
