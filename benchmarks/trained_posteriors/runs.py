"""Runs of particles on many observations at once, as far as memory goes, and what they say of themselves."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import Guidance
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.infer.filtering.particles import Particles
from pyro_diffusion.infer.filtering.swept import Swept
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.unreliable import UnreliableWarning
from trained_posteriors.prior import chain
from trained_posteriors.problems import Problem


class Found(NamedTuple):
    """Means and standard deviations of posteriors, and how many ancestors they rest on."""

    mean: Tensor
    sd: Tensor
    effective_ancestors: Tensor


@dataclass
class Runner:
    """Particles on a problem, every image a filter of its own.

    Attributes:
        problem: what is observed.
        denoiser: the prior's.
        at_once: most particles of all images together.
        seed: of the next run.
        guidance: of the particles, None for their default.
    """

    problem: Problem
    denoiser: Denoiser
    at_once: int
    seed: int = 0
    guidance: Guidance | None = None

    def parts(self, y: Tensor, count: int) -> list[Particles]:
        """Runs of ``count`` particles an image on observations (n, m), in parts of images, in order."""
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            for some in y.split(max(self.at_once // count, 1)):
                found.append(self._next(some, count).run())
        return found

    def draws(self, y: Tensor, count: int, draws: int, sweeps: int = 1) -> list[Swept]:
        """Draws with particles of their own, in parts of images, in order."""
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            for some in y.split(max(self.at_once // (count * draws), 1)):
                found.append(self._next(some, count).draws(draws, sweeps))
        return found

    def _next(self, y: Tensor, count: int) -> TwistedSMC:
        """Particles for some observations, at the next seed."""
        pyro.set_rng_seed(self.seed)
        self.seed += 1
        prior = chain(self.denoiser, self.problem.images.shape)
        likelihood = ProgramLikelihood(self.problem.program(prior, y))
        return TwistedSMC(prior, likelihood, self.guidance, num_particles=count)

    def moments(self, y: Tensor, count: int, repeats: int = 1) -> "Found":
        """What independent runs find, (repeats, n) + SHAPE."""
        found = self.parts(y.repeat(repeats, 1), count)
        mean = torch.cat([run.mean for run in found])
        variance = torch.cat([run.variance for run in found])
        ancestors = torch.cat([run.verdict.effective_ancestors for run in found])
        values = (v.unflatten(0, (repeats, -1)) for v in (mean, variance.sqrt(), ancestors))
        return Found(*values)

    def evidence(self, y: Tensor, count: int, repeats: int, draws: int = 0) -> str:
        """How log-evidence scatters over repeats, and what error they print: of one run, or of so many small
        ones."""
        several = y.repeat(repeats, 1)
        found: Sequence[Particles | Swept] = (
            self.draws(several, count, draws) if draws else self.parts(several, count)
        )
        z, error = (
            torch.cat(values).unflatten(0, (repeats, -1))
            for values in (
                [run.log_evidence_terms for run in found],
                [run.log_evidence_errors for run in found],
            )
        )
        known = error.isfinite()
        sd = float(z.var(0).mean().sqrt()) if repeats > 1 else math.nan
        printed = float(error[known].square().mean().sqrt())
        share = 100 * float(known.double().mean())
        return f"log Z sd {sd:5.2f} printed {printed:5.2f} ({share:3.0f} %)"
