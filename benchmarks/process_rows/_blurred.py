"""What the rows of degraded data share: normal data of two pixels, blurred, and the exact posterior mean."""

import math

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor

from process_rows import STEPS, Row
from process_rows._rotated import moments
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.processes import DegradedGaussian
from pyro_diffusion.samplers import DDIM, Ancestral
from pyro_diffusion.schedules import Level, Schedule

F64 = torch.float64
EYE = torch.eye(2, dtype=F64)
DATA = MultivariateNormal(
    torch.tensor([0.7, -0.4], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
)


def matrix(t: Tensor) -> Tensor:
    """Two pixels are blurred and dimmed: times + (2, 2)."""
    t = t.reshape(*t.shape, 1)
    return (1 - 0.8 * t) * ((1 - t) * EYE + 0.5 * t)


def blur(x0: Tensor, t: Tensor) -> Tensor:
    """D_t(x_0); times have a singleton dimension for events."""
    return (matrix(t if t.dim() else t.reshape(1)) @ x0.unsqueeze(-1)).squeeze(-1)


class ExactMean(Denoiser):
    """E[x_0 | x_t] of ``DATA`` under blur, as a point mass."""

    point_mass = True

    def gain(self, level: Level) -> tuple[Tensor, Tensor]:
        """Weight of the state in the mean, and the covariance, times + (2, 2)."""
        a = matrix(level.t if level.t.dim() else level.t.reshape(1))
        cross = DATA.covariance_matrix @ a.mT
        noise = level.sigma.reshape(*level.sigma.shape, 1).square() * EYE
        gain = cross @ torch.linalg.inv(a @ cross + noise)
        return gain, DATA.covariance_matrix - gain @ cross.mT

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0."""
        level = self.process.level(t, xt, state="xt")
        off = (xt - blur(DATA.mean, level.t)).unsqueeze(-1)
        return self.process.point_mass(DATA.mean + (self.gain(level)[0] @ off).squeeze(-1))


def blurred(schedule: Schedule, sigma: float, **arguments: float) -> DegradedGaussian:
    """The process, which starts from the exact distribution of x_1."""
    a = matrix(torch.ones(1, dtype=F64))
    end = MultivariateNormal(a @ DATA.mean, a @ DATA.covariance_matrix @ a.T + sigma**2 * EYE)
    return DegradedGaussian(schedule, blur, sigma=sigma, prior=end, **arguments)  # type: ignore[arg-type]


def blurred_row(name: str, process: DegradedGaussian, draws: int) -> Row:
    """Gaps in closed form, beside the estimates of ``Diffusion``; and samples."""
    denoiser = ExactMean(process)
    x = DATA.sample((draws,))
    row = Row(name, False, {str(k): (closed_gap(denoiser, k), 0.0) for k in STEPS}, {})
    for steps in STEPS:
        with torch.no_grad():
            gap = DATA.log_prob(x) - Diffusion(denoiser, (2,), steps).log_prob(x)
        error = float(gap.std()) / draws**0.5
        what = f"gap of Diffusion less the closed form, K = {steps}, standard errors"
        row.claims[what] = (abs(float(gap.mean()) - row.gaps[str(steps)][0]) / error, 3.0)
    return row


def closed_gap(denoiser: ExactMean, steps: int) -> float:
    """E[log p less the bound] (nats): normal kernels, and an estimate that errs by the posterior's spread."""
    process = denoiser.process
    levels = process.levels(torch.linspace(0, 1, steps + 1, dtype=F64))
    s, t = levels.at(slice(-1)), levels.at(slice(1, None))
    c = process.coefficients(s, t)
    change = matrix(s.t) - c.noise.unsqueeze(-1) * matrix(t.t)
    left = denoiser.gain(levels)[1]
    square = (change @ left[1:] @ change.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    ratio = (c.variance / c.reverse_variance)[:, 0]
    reverse = square / (2 * c.reverse_variance[:, 0]) + (ratio - 1 - ratio.log())
    noise = levels.noise_to_signal[0, 0].square()
    decoder = left[0].trace() / (2 * noise) + (2 * math.pi * noise).log()
    end = (
        process.prior((2,)).entropy() - (1 + math.log(2 * math.pi)) - 2 * levels.sigma[-1, 0].log()
    )
    return float(reverse.sum() + decoder + end - DATA.entropy())


def chain_end(denoiser: ExactMean, steps: int) -> MultivariateNormal:
    """The distribution of ancestral samples: every kernel is normal, with a mean affine in the state."""
    process = denoiser.process
    levels = process.levels(torch.linspace(0, 1, steps + 1, dtype=F64))
    c = process.coefficients(levels.at(slice(-1)), levels.at(slice(1, None)))
    gain, a = denoiser.gain(levels)[0], matrix(levels.t)
    prior = process.prior((2,))
    # Off the states' means A m, which the kernels keep.
    off, cov = prior.mean - a[-1] @ DATA.mean, prior.covariance_matrix
    for k in reversed(range(steps)):
        slope = a[k] @ gain[k + 1] + c.noise[k] * (EYE - a[k + 1] @ gain[k + 1])
        off, cov = slope @ off, slope @ cov @ slope.T + c.reverse_variance[k] * EYE
    # The decoder.
    noise = levels.noise_to_signal[0, 0].square()
    cov = gain[0] @ cov @ gain[0].T + noise * EYE
    return MultivariateNormal(DATA.mean + gain[0] @ off, cov)


def sampled(row: Row, process: DegradedGaussian, own: bool = False) -> Row:
    """The row with the moments of samples, of ancestral ones beside the data's or the chain's ``own``."""
    denoiser = ExactMean(process)
    for label, sampler in {"ancestral": Ancestral(), "deterministic": DDIM()}.items():
        wanted = chain_end(denoiser, 300) if own and label == "ancestral" else DATA
        view = Diffusion(denoiser, (2,), 300, sampler=sampler)
        row.samples[label] = moments(view.sample((20_000,)), wanted.sample((1_000_000,)))
    return row
