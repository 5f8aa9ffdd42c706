"""What the test files of discrete processes share: one table of them, and expectations by enumeration."""

import itertools
import math

import torch
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.processes import (
    Absorbing,
    CategoricalProcess,
    DiscretizedGaussian,
    TransitionMatrix,
    Uniform,
    VaryingNoise,
)
from pyro_diffusion.schedules import Cosine, Rectified

F64 = torch.float64
SKEW = torch.tensor([0.5, 0.125, 0.375, 0.0], dtype=F64)
CIRCLE = torch.tensor([[0, 1.0, 0], [0, 0, 1], [1, 0.25, 0]], dtype=F64)
# Any symbol at first, then masks.
MENDING = torch.tensor([[0.2, 0.1, 0.3, 0.4], [0, 0, 0, 1.0]], dtype=F64)

PROCESSES = {
    "absorbing": lambda: Absorbing(Rectified.full(), 3),
    "absorbing cut": lambda: Absorbing(Cosine(8.0, -8.0), 3),
    "uniform": lambda: Uniform(Rectified.full(), 3),
    "uniform cut": lambda: Uniform(Cosine(8.0, -8.0), 3),
    "skew": lambda: CategoricalProcess(Rectified.full(), 3, SKEW),
    "gaussian": lambda: DiscretizedGaussian(Rectified.full(), 3, width=0.7),
    "circle": lambda: TransitionMatrix(Rectified.full(), 3, CIRCLE),
    "varying": lambda: VaryingNoise(Rectified.full(), 3, MENDING),
}
JOINT = torch.tensor([[0.2, 0.01, 0.14], [0.05, 0.3, 0.1], [0.03, 0.02, 0.15]], dtype=F64)


def exact(process, joint=JOINT):
    return TableDenoiser(process, joint)


def all_states(process, length):
    return torch.tensor([*itertools.product(range(len(process.noise)), repeat=length)])


def expected(process, x0, level, cost):
    """E[cost(x_t)] under q(x_t | x_0), over all states; ``cost`` returns a number per state."""
    states = all_states(process, len(x0))
    log_prob = process.marginal(x0.expand(len(states), -1), level).log_prob(states)
    weight = log_prob.exp().where(log_prob > -80, 0.0)
    return (weight * cost(states)).where(weight > 0, 0.0).sum(0)


def rate(denoiser, x0, t):
    """E of the bound's integrand at a number t."""
    process = denoiser.process
    t = torch.as_tensor(t, dtype=F64)

    def cost(states):
        rates = process.rates(t.expand(len(states)))
        posterior = denoiser(states, rates.level)
        return process.divergence_rate(x0.expand_as(states), states, posterior, rates).detach()

    return expected(process, x0, process.level(t), cost)


def ends(denoiser, x0):
    """The prior's term and the decoder's, exact."""
    process = denoiser.process
    last, first = (process.level(torch.tensor(t, dtype=F64)) for t in (1.0, 0.0))
    prior = kl_divergence(process.marginal(x0, last), process.prior(x0.shape, dtype=F64))
    decoder = expected(
        process, x0, first, lambda x: -denoiser(x, first).log_prob(x0.expand_as(x)).detach()
    )
    return prior + decoder


def nodes(count):
    """Gauss's nodes and weights for [0, 1], in the square root of t."""
    k = torch.arange(1, count, dtype=F64)
    off = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    u = (values + 1) / 2
    return u.square(), vectors[0].square() * 2 * u


def continuous_bound(denoiser, x0, count=60):
    """Minus the continuous-time bound, by quadrature."""
    reverse = sum(w * rate(denoiser, x0, t) for t, w in zip(*nodes(count), strict=True))
    return float(ends(denoiser, x0) + reverse)


def chain_bound(denoiser, x0, steps, eta=1.0):
    """Minus the chain's bound, by enumeration."""
    process, total = denoiser.process, ends(denoiser, x0)
    times = torch.linspace(0, 1, steps + 1, dtype=F64)
    for s, t in itertools.pairwise(times):
        s, t = process.level(s), process.level(t)

        def cost(x, s=s, t=t):
            bridge = process.bridge(x, x0.expand_as(x), s, t, eta)
            kernel = process.reverse(x, denoiser(x, t), s, t, eta)
            return kl_divergence(bridge, kernel).detach()

        total = total + expected(process, x0, t, cost)
    return float(total)


def chi_square_limit(categories, sigmas=4.0):
    """A value that a chi-square statistic exceeds with the probability that a normal exceeds ``sigmas``.

    Wilson and Hilferty's approximation.
    """
    k = categories - 1
    return k * (1 - 2 / (9 * k) + sigmas * math.sqrt(2 / (9 * k))) ** 3


def chi_square(counts, probs):
    """Pearson's statistic of counts, categories of probability zero left out (and required empty)."""
    live = probs > 0
    assert not bool(counts[~live].any())
    mean = counts.sum() * probs[live]
    return float(((counts[live] - mean).square() / mean).sum())
