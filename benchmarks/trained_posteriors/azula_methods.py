"""azula's methods on the same network, at the same noise levels and as many steps."""

import functools
from typing import Any

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance import DPSSampler, MMPSDenoiser, PGDMSampler
from azula.noise import Schedule
from azula.sample import DDPMSampler
from torch import Tensor

from pyro_diffusion.denoisers import GaussianDenoiser
from trained_posteriors.prior import STEPS
from trained_posteriors.problems import Problem


class SameLevels(Schedule):
    """The prior's own noise levels."""

    def __init__(self, denoiser: GaussianDenoiser) -> None:
        self.process = denoiser.process

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at a time."""
        level = self.process.levels(t.float().reshape(1), torch.float32, t.device)
        return level.alpha.reshape(t.shape), level.sigma.reshape(t.shape)


class SameNetwork(Denoiser):
    """The prior's posterior mean of images as vectors."""

    def __init__(self, denoiser: GaussianDenoiser, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.shape = denoiser, SameLevels(denoiser), shape

    def forward(self, x_t: Tensor, t: Tensor, **context: Any) -> DiracPosterior:
        """A point mass."""
        mean = self.denoiser(x_t.reshape(-1, *self.shape), t.reshape(()).float()).mean
        return DiracPosterior(mean=mean.reshape(x_t.shape))


def options(problem: Problem) -> dict[str, Any]:
    """Of every sampler."""
    return {"steps": STEPS, "silent": True, "device": problem.images.train.device}


def operator(problem: Problem, x: Tensor) -> Tensor:
    """The forward operator on vectors."""
    return problem.operator(x.unflatten(-1, problem.images.shape))


def sample(sampler: Any, problem: Problem, rows: int) -> Tensor:
    """Vectors, (rows, pixels)."""
    return sampler(sampler.init((rows, problem.images.pixels)))


def mmps(problem: Problem, denoiser: GaussianDenoiser, y: Tensor, count: int) -> Tensor:
    """One iteration, azula's default."""
    assert problem.sd is not None
    noise = functools.partial(torch.mul, y.new_tensor(problem.sd**2))
    rows = y.repeat(count, 1)
    guided = MMPSDenoiser(
        SameNetwork(denoiser, problem.images.shape),
        rows,
        functools.partial(operator, problem),
        noise,
    )
    return sample(DDPMSampler(guided, **options(problem)), problem, len(rows)).reshape(
        count, len(y), *problem.images.shape
    )


def pgdm(
    problem: Problem, denoiser: GaussianDenoiser, y: Tensor, count: int, eta: float = 1.0
) -> Tensor:
    """With the pseudoinverse that its user has to write."""
    assert problem.matrix is not None
    inverse = torch.linalg.pinv(problem.matrix)
    rows = y.repeat(count, 1)
    sampler = PGDMSampler(
        SameNetwork(denoiser, problem.images.shape),
        rows,
        functools.partial(operator, problem),
        lambda v: v @ inverse.T,
        eta=eta,
        **options(problem),
    )
    return sample(sampler, problem, len(rows)).reshape(count, len(y), *problem.images.shape)


def dps(problem: Problem, denoiser: GaussianDenoiser, y: Tensor, count: int) -> Tensor:
    """One draw at a time: its step is divided by the norm of the whole batch's residual."""
    drawn = []
    for row in y.repeat(count, 1):
        sampler = DPSSampler(
            SameNetwork(denoiser, problem.images.shape),
            row[None],
            functools.partial(operator, problem),
            **options(problem),
        )
        drawn.append(sample(sampler, problem, 1))
    return torch.cat(drawn).reshape(count, len(y), *problem.images.shape)


METHODS = {"azula MMPS": mmps, "azula PGDM": pgdm, "azula DPS": dps}
