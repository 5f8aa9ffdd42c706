"""Blur as a degradation, with noise that is carried along; and cold diffusion, which has no bound."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from process_rows import Row
from process_rows._blurred import DATA, blur, blurred, blurred_row, sampled
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.processes import DegradedGaussian
from pyro_diffusion.samplers import Ancestral, simulate
from pyro_diffusion.schedules import Cosine, Level, LogLinear


def row_degraded(draws: int) -> Row:
    process = blurred(LogLinear(8.0, -8.0), 0.05)
    row = sampled(blurred_row("DegradedGaussian", process, draws), process)
    row.claims |= cold_diffusion()
    return row


def saturating(x0: Tensor, t: Tensor) -> Tensor:
    """Not linear."""
    return (1 - 0.9 * t) * x0 / torch.sqrt(1 + 3 * t * x0.square())


class Restorer(Denoiser):
    """The exact inverse of ``saturating``."""

    point_mass = True

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0."""
        level = self.process.level(t, xt, state="xt")
        y = xt / (1 - 0.9 * level.t)
        return self.process.point_mass(y / torch.sqrt(1 - 3 * level.t * y.square()))


def cold_diffusion() -> dict[str, tuple[float, float]]:
    """The published update beside the bridge of r = 1, and an exact restorer."""
    x, estimate = torch.randn(2, 1000, 2)
    times = torch.linspace(0, 1, 101)
    update = 0.0
    for sigma, operator in ((0.0, saturating), (0.3, saturating), (0.3, blur)):
        process = DegradedGaussian(Cosine(), operator, sigma=sigma, renewal=0.0)
        dtype = torch.float64 if operator is blur else torch.float32
        xt, x0 = x.to(dtype), estimate.to(dtype)
        for s, t in ((times[k], times[k + 1]) for k in range(0, 100, 9)):
            late, early = t.to(dtype), s.to(dtype)
            published = xt - operator(x0, late) + operator(x0, early)
            error = (process.bridge(xt, x0, early, late).mean - published).abs().max()
            update = max(update, float(error))
    cold = DegradedGaussian(Cosine(), saturating, sigma=0.0)
    x0 = DATA.sample((1000,))
    degraded = cold.marginal(x0, torch.tensor(1.0)).mean
    restored = simulate(Restorer(cold), times.double(), degraded, Ancestral())
    return {
        "cold diffusion's update less the bridge of r = 1": (update, 1e-6),
        "error of an exact restorer after 100 steps": (float((restored - x0).abs().max()), 1e-9),
    }
