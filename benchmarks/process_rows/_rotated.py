"""What the rows of spectral processes share: a mixture of normals whose axes are not those of the basis."""

import torch
from pyro.distributions import (
    Categorical,
    MixtureSameFamily,
    Normal,
    TorchDistribution,
    TransformedDistribution,
)
from torch import Tensor

from process_rows import STEPS, Row, gap
from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.processes import SpectralGaussian
from pyro_diffusion.samplers import AdamsMoulton, Ancestral

WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)
MEANS = torch.tensor([[-1.2, 0.9], [0.8, -0.4]], dtype=torch.float64)
SCALES = torch.tensor([0.5, 0.3], dtype=torch.float64)


def mixture() -> TorchDistribution:
    """Two isotropic normals in the plane; turned, they are two isotropic normals."""
    parts = Normal(MEANS, SCALES.unsqueeze(-1)).to_event(1)
    return MixtureSameFamily(Categorical(WEIGHTS), parts)


def rotated_row(name: str, process: SpectralGaussian, draws: int) -> Row:
    """Bounds, density and samples of a process over the plane, with the exact denoiser."""
    data, basis, event = mixture(), process.basis, (2,)
    denoiser = MixtureDenoiser(process, WEIGHTS, basis(MEANS), SCALES.square())
    x = data.sample((draws,))
    truth = data.log_prob(x)

    def of_data(view: TorchDistribution) -> TorchDistribution:
        return TransformedDistribution(view, [basis.transform])

    def bound(view: TorchDistribution) -> tuple[float, float]:
        return gap(of_data(view).log_prob, x, truth)

    gaps = {str(k): bound(Diffusion(denoiser, event, k)) for k in STEPS}
    gaps["inf"] = bound(DiffusionSDE(denoiser, event))
    flow = ProbabilityFlow(denoiser, event, solver=ODESolver("rk4", steps=200))
    error = (flow.log_prob(basis(x[:200])) - truth[:200]).abs().max() / 2
    exact = data.sample((4_000_000,))
    count = (min(draws, 20_000),)
    samples = {
        repr(sampler): moments(
            of_data(Diffusion(denoiser, event, 300, sampler=sampler)).sample(count), exact
        )
        for sampler in (Ancestral(), AdamsMoulton())
    }
    return Row(name, True, gaps, samples, float(error))


def moments(x: Tensor, exact: Tensor) -> float:
    """Largest deviation of first and second moments, in standard errors."""

    def parts(v: Tensor) -> Tensor:
        return torch.cat([v, v.square(), v.prod(-1, keepdim=True)], -1)

    got, want = parts(x), parts(exact)
    error = (want.var(0) * (1 / len(x) + 1 / len(exact))).sqrt()
    return float(((got.mean(0) - want.mean(0)) / error).abs().max())
