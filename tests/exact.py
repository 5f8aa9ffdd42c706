"""Tables and closed forms that several test files share: every schedule, and a mixture whose law is known."""

import pyro.distributions
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pyro_diffusion import schedules
from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Schedule

BETAS = torch.linspace(1e-3, 0.1, 40, dtype=torch.float64)

SCHEDULES = {
    "cosine": schedules.Cosine,
    "cosine shifted": lambda: schedules.Cosine(12.0, -8.0, shift=-1.5),
    "linear beta": schedules.LinearBeta,
    "sub-VP": schedules.SubVP,
    "learned": lambda: learned(),
    "log linear": schedules.LogLinear,
    "table": lambda: schedules.TabulatedBetas(BETAS),
    "exploding": schedules.VarianceExploding,
    "edm": schedules.EDM,
    "rectified": schedules.Rectified,
}


def learned() -> schedules.LearnedSchedule:
    """A learned curve of some shape."""
    schedule = schedules.LearnedSchedule(7, 9.0, -11.0)
    generator = torch.Generator().manual_seed(3)
    for parameter in schedule.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return schedule.requires_grad_(False)


DTYPES = (torch.float32, torch.float64)


class Gauge(schedules.LogLinear):
    """The log-linear curve under any scale: alpha = scale(log-SNR) * the variance-preserving alpha."""

    def __init__(self, scale: float, log_snr_max: float = 10.0, log_snr_min: float = -10.0):
        super().__init__(log_snr_max, log_snr_min)
        self.scale = scale

    def _signal(self, log_snr):
        return self.scale * super()._signal(log_snr)

    def _noise(self, log_snr):
        return self.scale * super()._noise(log_snr)


WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.0, -1.0]], dtype=torch.float64)
VARIANCES = torch.tensor([0.1, 0.3, 0.05], dtype=torch.float64)


def mixture(schedule: Schedule, point_mass: bool = False) -> MixtureDenoiser:
    """The exact denoiser of a mixture of three normals in two dimensions."""
    return MixtureDenoiser(GaussianProcess(schedule), WEIGHTS, MEANS, VARIANCES, point_mass)


def mixture_law(alpha=1.0, sigma=0.0) -> MixtureSameFamily:
    """The law of alpha x_0 + sigma eps for the same mixture, written apart from the package."""
    alpha, sigma = torch.as_tensor(alpha), torch.as_tensor(sigma)
    scale = (alpha**2 * VARIANCES + sigma**2).sqrt()[:, None].expand(-1, 2)
    return MixtureSameFamily(
        Categorical(WEIGHTS), Independent(Normal(alpha * MEANS, scale, validate_args=False), 1)
    )


def slope(steps, errors) -> float:
    """The order of convergence: minus the regression slope of log error on log steps."""
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return -float((x * y).sum() / x.square().sum())


class Shifted(Denoiser):
    """The exact posterior of N(c, 0.5) for a context c, one vector per datum."""

    variance = 0.5

    def __init__(self):
        super().__init__(GaussianProcess(schedules.LogLinear(14, -14)))

    def forward(self, xt, t, c):
        level = self.process.level(t)
        gain = level.alpha * self.variance / (level.alpha**2 * self.variance + level.sigma**2)
        mean = c + gain * (xt - level.alpha * c)
        scale = (self.variance * (1 - gain * level.alpha)).sqrt()
        return pyro.distributions.Normal(mean, scale, validate_args=False).to_event(1)
