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

from process_rows import Row, bound_gaps
from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.processes import Basis, GaussianProcess
from pyro_diffusion.samplers import AdamsMoulton, Ancestral

WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)
MEANS = torch.tensor([[-1.2, 0.9], [0.8, -0.4]], dtype=torch.float64)
SCALES = torch.tensor([0.5, 0.3], dtype=torch.float64)


def mixture() -> TorchDistribution:
    """Two isotropic normals in the plane; turned, they are two isotropic normals."""
    parts = Normal(MEANS, SCALES.unsqueeze(-1)).to_event(1)
    return MixtureSameFamily(Categorical(WEIGHTS), parts)


def rotated_row(name: str, process: GaussianProcess, draws: int) -> Row:
    """Bounds, density and samples of a process over the plane, with the exact denoiser."""
    data, event = mixture(), (2,)
    basis = getattr(process, "basis", Basis.identity(event))
    denoiser = exact(process)
    x = data.sample((draws,))
    truth = data.log_prob(x)
    middle = WEIGHTS @ MEANS
    normal = MixtureDenoiser(process, torch.ones(1), basis(middle[None]), 1.0)

    def view(denoiser: MixtureDenoiser, steps: int | None) -> TorchDistribution:
        inner = (
            DiffusionSDE(denoiser, event) if steps is None else Diffusion(denoiser, event, steps)
        )
        return TransformedDistribution(inner, [basis.transform])

    control = (normal, Normal(middle, 1.0).to_event(1).log_prob(x))
    gaps = bound_gaps(view, (denoiser, truth), x, control)
    flow = ProbabilityFlow(denoiser, event, solver=ODESolver("rk4", steps=200))
    error = (flow.log_prob(basis(x[:200])) - truth[:200]).abs().max() / 2
    reference = data.sample((2_000_000,))
    samples = {
        label: moments(
            basis.inverse(Diffusion(denoiser, event, 250, sampler=sampler).sample((10_000,))),
            reference,
        )
        for label, sampler in {"ancestral": Ancestral(), "deterministic": AdamsMoulton()}.items()
    }
    return Row(name, True, gaps, samples, float(error))


def exact(process: GaussianProcess) -> MixtureDenoiser:
    """The posterior of the mixture, in the coordinates of the process."""
    basis = getattr(process, "basis", Basis.identity((2,)))
    return MixtureDenoiser(process, WEIGHTS, basis(MEANS), SCALES.square())


def moments(x: Tensor, exact: Tensor) -> float:
    """Largest deviation of first and second moments, in standard errors."""

    def parts(v: Tensor) -> Tensor:
        return torch.cat([v, v.square(), v.prod(-1, keepdim=True)], -1)

    got, want = parts(x), parts(exact)
    error = (want.var(0) * (1 / len(x) + 1 / len(exact))).sqrt()
    return float(((got.mean(0) - want.mean(0)) / error).abs().max())
