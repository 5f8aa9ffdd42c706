"""Data of three classes, each in closed form: a mixture for enumerated latents."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Level, LogLinear

F64 = torch.float64
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
LOCS = torch.tensor([[-1.0, 0.4], [0.6, 0.9], [0.3, -1.1]], dtype=F64)
SCALE = 0.6


class NormalClass(Denoiser):
    """The exact posterior of data N(loc, SCALE^2 I), where loc is context."""

    is_exact = True

    def __init__(self, log_snr_max: float = 10.0, log_snr_min: float = -10.0) -> None:
        super().__init__(GaussianProcess(LogLinear(log_snr_max, log_snr_min)))
        self.calls = 0

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> dist.TorchDistribution:
        self.calls += 1
        level = self.process.level(t, xt)
        total = level.alpha**2 * SCALE**2 + level.sigma**2
        loc = context["loc"]
        mean = loc + level.alpha * SCALE**2 / total * (xt - level.alpha * loc)
        return dist.Normal(mean, SCALE * level.sigma / total.sqrt()).to_event(1)


def log_joint(x: Tensor) -> Tensor:
    """log p(k, x) for every class, a new last dimension."""
    parts = dist.Normal(LOCS, SCALE).to_event(1)
    return WEIGHTS.log() + parts.log_prob(x.unsqueeze(-2))


def data(size: int) -> Tensor:
    """Draws of the mixture."""
    return LOCS[dist.Categorical(WEIGHTS).sample((size,))] + SCALE * torch.randn(size, 2, dtype=F64)
