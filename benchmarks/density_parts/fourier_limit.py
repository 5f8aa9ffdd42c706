"""The best Fourier density of a degree, and a proof that none of its location and scale is better."""

import math

import torch
from pyro.distributions import MixtureSameFamily
from torch import Tensor

from pyro_diffusion.distributions import FourierDensity

F64 = torch.float64
# Scales and locations to start at, in units of the target's standard deviation.
SCALES, SHIFTS = (1.3, 1.55, 1.8), (-0.45, 0.0, 0.45)


def fitted(truth: MixtureSameFamily, degree: int, start: tuple[float, float], steps: int) -> Tensor:
    """Coefficients, location and log-scale, from one start, by the density itself."""
    generator = torch.Generator().manual_seed(0)
    a = 0.3 * torch.randn(degree + 1, 2, dtype=F64, generator=generator)
    a[0, 0] += 1
    packed = torch.cat([a.flatten(), torch.tensor(start, dtype=F64)]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [packed],
        max_iter=steps,
        history_size=40,
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = divergence(truth, packed)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return packed.detach()


def grid_of(truth: MixtureSameFamily) -> tuple[Tensor, Tensor]:
    """Points, and the probability at each."""
    x = torch.linspace(-9, 9, 1201, dtype=F64)
    return x, truth.log_prob(x).exp() * (x[1] - x[0])


def density(packed: Tensor) -> FourierDensity:
    """That of one row of numbers."""
    return FourierDensity(
        packed[:-2].view(-1, 2), packed[-2], packed[-1].exp(), validate_args=False
    )


def divergence(truth: MixtureSameFamily, packed: Tensor) -> Tensor:
    """KL(truth || density) in nats, by quadrature."""
    x, weight = grid_of(truth)
    return (weight * (truth.log_prob(x) - density(packed).log_prob(x))).sum()


def gap(truth: MixtureSameFamily, packed: Tensor) -> float:
    r"""How far at most any coefficients are below these in KL, at their location and scale.

    By Jensen's inequality :math:`E \log q_b - E \log q_a \le \log E (q_b / q_a) \le \log \lambda`, with
    :math:`\lambda` the largest eigenvalue of :math:`E\, e(u) e(u)^* / (2 q_a(u))`, e the waves: the ratio is
    its quadratic form at b of unit length.
    """
    x, weight = grid_of(truth)
    u = ((x - packed[-2]) / packed[-1].exp()).tanh()
    ratio = weight / (2 * density(packed)._log_density(u).exp())
    waves = torch.arange(len(packed) // 2 - 1, dtype=F64) * math.pi * u.unsqueeze(-1)
    e = torch.polar(torch.ones_like(waves), waves)
    form = e.mT @ (ratio.unsqueeze(-1) * e.conj())
    return float(torch.linalg.eigvalsh(form)[-1].log())


def least(truth: MixtureSameFamily, degree: int, steps: int) -> tuple[float, float]:
    """The least KL that was found, and how far below it any could be there."""
    middle, spread = float(truth.mean), float(truth.variance.sqrt())
    starts = [(middle + b * spread, math.log(a * spread)) for a in SCALES for b in SHIFTS]
    best = min(
        (fitted(truth, degree, start, steps) for start in starts),
        key=lambda packed: float(divergence(truth, packed)),
    )
    return float(divergence(truth, best)), gap(truth, best)
