"""Path independence: the continuous bound under two ways from the same clean to the same noisy end."""

import math

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from process_rows import Row
from process_rows._rotated import MEANS, SCALES, WEIGHTS, mixture
from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.distributions import DiffusionSDE
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.processes import Basis, LearnedSpectralGaussian
from pyro_diffusion.schedules import Level, LogLinear


class _Shrunk(Denoiser):
    """Means pulled to 0 in noise, by the clock: a posterior of no distribution of data."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.process)
        self.denoiser = denoiser

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        level = self.process.level(t, xt, state="xt")
        posterior = self.denoiser(xt, level)
        mean = posterior.mean * (1 - 0.5 * torch.sigmoid(-level.clock))
        return Normal(mean, posterior.variance.sqrt(), validate_args=False).to_event(1)


def claim_paths(row: Row, basis: Basis, shift: Tensor, draws: int) -> None:
    """Add to a row the bounds by path, for the exact denoiser and for one that errs."""
    x = mixture().sample((min(draws, 20_000),))
    truth = mixture().log_prob(x)
    lines = [
        "SpectralGaussian: continuous bound less log p (standard error) by path between the same ends"
    ]
    for name in ("exact", "wrong"):
        gaps = []
        for late in (0, 1):  # the coordinate that keeps its signal for longer
            process = LearnedSpectralGaussian(LogLinear(12.0, -12.0), basis, shift, degree=6)
            with torch.no_grad():
                process.steps[0, 1 - late], process.steps[-1, late] = 4.0, 4.0
            own = MixtureDenoiser(process, WEIGHTS, basis(MEANS), SCALES.square())
            denoiser = own if name == "exact" else _Shrunk(own)
            bound = log_likelihood(
                DiffusionSDE(denoiser, (2,)), basis(x), num_terms=50, num_samples=2, seed=late
            )
            gaps.append(bound.value - truth)
        means = [float(gap.mean()) for gap in gaps]
        errors = [float(gap.std()) / math.sqrt(len(gap)) for gap in gaps]
        one, two = (f"{m:.4f} ({e:.4f})" for m, e in zip(means, errors, strict=True))
        apart = abs(means[0] - means[1]) / math.hypot(*errors)
        lines.append(f"  {name} denoiser: {one} and {two}, {apart:.1f} standard errors apart")
        if name == "exact":
            row.claims["two paths, standard errors apart"] = (apart, 3.0)
    row.notes.append("\n".join(lines))
