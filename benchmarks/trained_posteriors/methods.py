"""Posterior draws of this package, one function a method."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from pyro.infer import Predictive
from torch import Tensor

from pyro_diffusion import samplers
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance import MMPS, TMPD, DataCovariance, DiffPIR, DPSStep, PiGDM, PlugIn
from pyro_diffusion.guidance.base import Guidance
from pyro_diffusion.guidance.calibration import calibrated
from pyro_diffusion.guidance.kept import weight_sums
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, TwistedSMC
from pyro_diffusion.likelihoods import Likelihood, ProgramLikelihood
from pyro_diffusion.unreliable import UnreliableWarning
from trained_posteriors import references
from trained_posteriors.images import Images
from trained_posteriors.prior import chain
from trained_posteriors.problems import Problem

Draw = Callable[..., Tensor]  # (problem, denoiser, y, count) -> (count, n) + SHAPE


@contextmanager
def divergence_allowed() -> Iterator[None]:
    """Sampling returns what has left the model: it is counted here."""
    limit = samplers.divergence.LARGEST_NOISE
    samplers.divergence.LARGEST_NOISE = float("inf")
    try:
        yield
    finally:
        samplers.divergence.LARGEST_NOISE = limit


def calibration(denoiser: Denoiser, images: Images) -> None:
    """What the default finds out of a denoiser, once."""
    like = images.train.new_zeros(images.shape)
    calibrated(denoiser, like, {}, weight_sums(denoiser))


def by_residuals(guidance: Guidance) -> Guidance:
    """On deviance residuals, which are a Normal site's own."""
    return lambda denoiser, likelihood: guidance(denoiser, likelihood.with_residuals("deviance"))


def of_data(images: Images) -> Guidance:
    """The training images' covariance."""
    return functools.partial(DataCovariance, covariance=images.covariance.float())


def dps(denoiser: Denoiser, likelihood: Likelihood, zeta: float = 1.0) -> PlugIn:
    """By the paper's step rule."""
    rule = DPSStep(zeta, chain(denoiser, likelihood.event_shape).times, squared_norm=False)
    return PlugIn(denoiser, likelihood, step_size=rule)


def guided(
    guidance: Guidance | None,
    problem: Problem,
    denoiser: Denoiser,
    y: Tensor,
    count: int,
    sampler: samplers.Sampler | None = None,
) -> Tensor:
    """Draws of the guided chain by ``Predictive``; NaN where sampling found no number."""
    model = problem.program(chain(denoiser, problem.images.shape), y)
    guide = AutoGuidance(model, guidance, sampler=sampler)
    try:
        with divergence_allowed():
            return Predictive(model, guide=guide, num_samples=count, parallel=True)()["x"]
    except ValueError as error:
        if "leaves the model" not in str(error):
            raise
        return torch.full((count, len(y), *problem.images.shape), torch.nan)


def particles(
    guidance: Guidance | None, problem: Problem, denoiser: Denoiser, y: Tensor, count: int
) -> Tensor:
    """Draws of as many particles as draws are asked for."""
    prior = chain(denoiser, problem.images.shape)
    likelihood = ProgramLikelihood(problem.program(prior, y))
    return TwistedSMC(prior, likelihood, guidance, num_particles=count).run().sample((count,))


def small_runs(problem: Problem, denoiser: Denoiser, y: Tensor, count: int) -> Tensor:
    """Every draw from eight particles of its own."""
    model = problem.program(chain(denoiser, problem.images.shape), y)
    guide = AutoTwistedSMC(model, num_particles=8, sweeps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # of data that the prior does not know
        return Predictive(model, guide=guide, num_samples=count, parallel=True)()["x"]


GUIDANCE: dict[str, Guidance | None] = {
    "default": None,
    "MMPS": by_residuals(MMPS),
    "MMPS 1 it.": by_residuals(functools.partial(MMPS, solver="cg", iterations=1)),
    "PiGDM": by_residuals(PiGDM),
    "TMPD": by_residuals(TMPD),
    "DiffPIR": by_residuals(DiffPIR),
    "DPS": dps,
}


def methods(images: Images) -> dict[str, Draw]:
    """By name; those of azula where it is installed, references for linear problems alone."""
    choices = GUIDANCE | {"DataCovariance": by_residuals(of_data(images))}
    found: dict[str, Draw] = {k: functools.partial(guided, v) for k, v in choices.items()}
    found["default, 1 jump"] = functools.partial(guided, None, sampler=samplers.RePaint(jumps=1))
    found["twisted SMC"] = functools.partial(particles, None)
    found["8 a draw"] = small_runs
    found["linear-Gaussian"] = lambda problem, denoiser, *args: references.linear_gaussian(
        problem, *args
    )
    found["kernel"] = lambda problem, denoiser, *args: references.kernel(problem, *args)
    try:
        from trained_posteriors import azula_methods
    except ImportError:
        return found
    return found | azula_methods.METHODS
