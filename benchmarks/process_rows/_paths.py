"""Path independence: the continuous bound under two ways from the same clean to the same noisy end."""

import math

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from process_rows import Row, bound_gaps
from process_rows._rotated import MEANS, WEIGHTS, exact, mixture
from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.distributions import DiffusionSDE
from pyro_diffusion.processes import Basis, LearnedSpectralGaussian
from pyro_diffusion.schedules import Level, LogLinear


class _Shifted(Denoiser):
    """The first mean too large by 1 where both coordinates are noisy: a posterior of no distribution."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.process)
        self.denoiser = denoiser

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        level = self.process.level(t, xt, state="xt")
        posterior = self.denoiser(xt, level)
        both = torch.sigmoid(-level.log_snr).prod(-1, keepdim=True)
        mean = posterior.mean + both * torch.eye(2).to(both)[0]
        return Normal(mean, posterior.variance.sqrt(), validate_args=False).to_event(1)


def claim_paths(row: Row, basis: Basis, shift: Tensor, draws: int) -> None:
    """Add to a row the bounds by path, for the exact denoiser and for one that errs."""
    x = mixture().sample((min(draws, 10_000),))
    truth, middle = mixture().log_prob(x), WEIGHTS @ MEANS

    def view(denoiser: Denoiser, steps: int | None) -> TorchDistribution:
        del steps
        return DiffusionSDE(denoiser, (2,))

    gaps: dict[str, list[tuple[float, float]]] = {"exact": [], "wrong": []}
    for late in (0, 1):  # the coordinate that keeps its signal for longer
        process = LearnedSpectralGaussian(LogLinear(12.0, -12.0), basis, shift, degree=6)
        with torch.no_grad():
            process.steps[0, 1 - late], process.steps[-1, late] = 4.0, 4.0
        normal = MixtureDenoiser(process, torch.ones(1), basis(middle[None]), 1.0)
        control = (normal, Normal(middle, 1.0).to_event(1).log_prob(x))
        right, u = (exact(process), truth), basis(x)
        gaps["exact"] += bound_gaps(view, right, u, control, (None,)).values()
        wrong = (_Shifted(right[0]), truth)
        gaps["wrong"] += bound_gaps(view, wrong, u, right, (None,)).values()
    lines = [f"{row.name}: log p less the continuous bound, by path between the same ends"]
    for name, ((a, ea), (b, eb)) in gaps.items():
        apart = abs(a - b) / math.hypot(ea, eb)
        lines.append(
            f"  {name} denoiser: {a:.4f} ({ea:.4f}) and {b:.4f} ({eb:.4f}), {apart:.1f} errors apart"
        )
        if name == "exact":
            row.claims["two paths, standard errors apart"] = (apart, 3.0)
    row.notes.append("\n".join(lines))
