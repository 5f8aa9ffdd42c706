"""Linear observations with normal noise, and what they make of a normal prior: written apart."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import simulate
from pyro_diffusion.schedules import Level, LogLinear, Schedule
from pyro_diffusion.unwrapping import per_coordinate

F64 = torch.float64


class NormalDenoiser(Denoiser):
    """The exact posterior, or its mean alone, of data from N(mean, covariance)."""

    def __init__(self, mean: Tensor, covariance: Tensor, point_mass: bool = False) -> None:
        super().__init__(GaussianProcess(LogLinear(10.0, -10.0)))
        self.register_buffer("mean", mean)
        self.register_buffer("covariance", covariance)
        self.point_mass = point_mass

    def given(self, level: Level) -> tuple[Tensor, Tensor]:
        """Gain and covariance of x_0 given x_t, at one scalar level."""
        eye = torch.eye(len(self.mean), dtype=self.mean.dtype)
        total = level.alpha**2 * self.covariance + level.sigma**2 * eye
        gain = level.alpha * self.covariance @ torch.linalg.inv(total)
        return gain, self.covariance - level.alpha * gain @ self.covariance

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> dist.TorchDistribution:
        level = self.process.level(t, xt)
        gain, covariance = self.given(level)
        mean = self.mean + (xt - level.alpha * self.mean) @ gain.mT
        if self.point_mass:
            return dist.Delta(mean, event_dim=1, validate_args=False)
        return dist.Normal(mean, covariance.diagonal().sqrt()).to_event(1)


class Reading:
    """y = A x_0 + noise, as tensors and as a Pyro program."""

    def __init__(self, matrix: Tensor, y: Tensor, scale: Tensor | float) -> None:
        self.matrix, self.y = matrix, y
        self.scale = torch.as_tensor(scale, dtype=y.dtype).expand(len(y))

    def likelihood(self, denoiser: Denoiser) -> ProgramLikelihood:
        """Read out of a program with that prior."""

        def model() -> None:
            x = pyro.sample("x", Diffusion(denoiser, self.matrix.shape[-1:], steps=2))
            law = dist.Normal((self.matrix @ x.unsqueeze(-1)).squeeze(-1), self.scale)
            pyro.sample("y", law.to_event(1), obs=self.y)

        return ProgramLikelihood(model)

    def posterior(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_0 given y under the prior N(mean, covariance); mean may be a batch."""
        total = self.matrix @ covariance @ self.matrix.mT + self.scale.square().diag()
        gain = covariance @ self.matrix.mT @ torch.linalg.inv(total)
        return mean + (self.y - mean @ self.matrix.mT) @ gain.mT, covariance - gain @ (
            self.matrix @ covariance
        )

    def log_evidence(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """log p(y) under that prior."""
        total = self.matrix @ covariance @ self.matrix.mT + self.scale.square().diag()
        return dist.MultivariateNormal(mean @ self.matrix.mT, total).log_prob(self.y)


def isotropic(mean: Tensor, variance: float, schedule: Schedule | None = None) -> MixtureDenoiser:
    """The package's exact denoiser of N(mean, variance I)."""
    process = GaussianProcess(schedule or LogLinear(10.0, -10.0))
    return MixtureDenoiser(process, torch.ones(1, dtype=mean.dtype), mean[None], variance)


def problem(d: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Reading]:
    """A prior's mean and covariance, and a random reading."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": F64}
    matrix, mean, y = torch.randn(m, d, **draw), torch.randn(d, **draw), torch.randn(m, **draw)
    root = torch.randn(d, d, **draw) / d**0.5
    covariance = root @ root.mT + 0.1 * torch.eye(d, dtype=F64)
    return mean, covariance, Reading(matrix, y, 0.3 + torch.rand(m, **draw))


def affine_map(walk, d: int) -> tuple[Tensor, Tensor]:
    """Offset and matrix of an affine map of row vectors, by its values at 0 and at the unit vectors."""
    ends = walk(torch.cat([torch.zeros(1, d, dtype=F64), torch.eye(d, dtype=F64)]))
    return ends[0], (ends[1:] - ends[0]).mT


class Feed:
    """Stands in for every source of noise of a step: row 0 gets none, row 1 + d + k unit noise from source k.

    The step's law is affine in its start and its noise; :meth:`step` finds it, and pushes a normal through.
    """

    def __init__(self, d: int, sources: int) -> None:
        self.d, self.sources, self.used = d, sources, 0

    def noise(self, like: Tensor) -> Tensor:
        """Noise of that shape."""
        out, size = torch.zeros_like(like), like.shape[-1]
        first = 1 + self.d + self.used
        out[first : first + size] = torch.eye(size, dtype=like.dtype)
        self.used += size
        assert self.used <= self.sources
        return out

    def draw(self, kernel) -> Tensor:
        """A draw of a normal kernel."""
        base = per_coordinate(kernel)
        mean = base.mean
        return mean + base.stddev * self.noise(mean)

    def step(self, walk, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance after ``walk`` of one step, and before."""
        self.used = 0
        rows = torch.zeros(1 + self.d + self.sources, self.d, dtype=F64)
        rows[1 : 1 + self.d] = torch.eye(self.d, dtype=F64)
        ends = walk(rows)
        parts = (ends[1:] - ends[0]).mT
        matrix, noise = parts[:, : self.d], parts[:, self.d :]
        return ends[0] + matrix @ mean, matrix @ covariance @ matrix.mT + noise @ noise.mT

    def law(self, denoiser: Denoiser, times: Tensor, sampler) -> tuple[Tensor, Tensor]:
        """Mean and covariance of a walk from the process's prior."""
        prior = denoiser.process.prior((self.d,), dtype=F64)
        mean, covariance = prior.mean, prior.variance.diag()
        for j in range(len(times) - 1, 0, -1):
            pair = times[j - 1 : j + 1]
            mean, covariance = self.step(
                lambda x, pair=pair: simulate(denoiser, pair, x, sampler), mean, covariance
            )
        return mean, covariance
