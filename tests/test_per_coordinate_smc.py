"""Twisted SMC, its guide and particle Gibbs where scales differ by coordinate, against closed forms.

Independent normals with their exact denoiser make a chain of normals, whose moments :mod:`linear_normal`
gives. So the evidence and the posterior of a linear observation are known at any number of steps. Every row
of a plate observes the same: the rows are independent runs.

A mean of runs is compared at 4.5 standard errors, which a normal one exceeds in 7e-6 of seeds; no test makes
more than seven such comparisons, so that each alarms falsely in 5e-5 of seeds.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_normal import TAU, A, Y, chain, conditioned
from per_coordinate import F64, normal
from pyro.infer import MCMC, Trace_ELBO

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import MMPS, GuidedDenoiser, Twisted
from pyro_diffusion.guidance.base import shift_mean
from pyro_diffusion.infer import AutoTwistedSMC, ParticleGibbs, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood

# Noisy at both ends, so that prior and decoder matter as much as the kernels between them.
TIMES = torch.tensor([0.35, 0.42, 0.5, 0.58, 0.65], dtype=F64)
PRIOR = Diffusion(normal(), (2,), times=TIMES)
MEAN, COVARIANCE, EVIDENCE = conditioned(*chain(TIMES, guided=False))
VARIANCE = COVARIANCE.diagonal()


def repeated(runs):
    def model():
        with pyro.plate("runs", runs):
            x = pyro.sample("x", PRIOR)
            pyro.sample("y", dist.Normal(x @ A.mT, TAU).to_event(1), obs=Y.expand(runs, 2))

    return model


class Misguided(GuidedDenoiser):
    """A proposal and a twist that are both wrong, and unlike each other."""

    def __init__(self, denoiser, likelihood):
        super().__init__(denoiser)

    def twisted(self, xt, t, **context):
        prior = self.denoiser(xt, t, **context)
        shift = 0.3 * prior.variance.sqrt()
        return Twisted(prior, shift_mean(prior, shift), 0.5 * prior.mean[..., 0])


def averages(values, truth):
    """Assert that the mean of independent runs is the truth."""
    gap = values.mean(0) - truth
    assert (abs(gap) < 4.5 * values.std(0) / len(values) ** 0.5).all(), gap


@pytest.mark.parametrize("systematic", [True, False], ids=["systematic", "multinomial"])
@pytest.mark.parametrize("guidance", [MMPS, Misguided], ids=lambda g: g.__name__)
def test_evidence_and_posterior(guidance, systematic):
    likelihood = ProgramLikelihood(repeated(400))
    done = TwistedSMC(PRIOR, likelihood, guidance, 128, systematic=systematic).run()
    ratio = (done.log_evidence_terms - EVIDENCE).exp()
    averages(ratio, 1.0)
    assert ratio.std() < 1  # else the rest would say little
    # Z_hat times a weighted mean is unbiased, too: of the coordinates and of their squares around the truth.
    gap = done.mean - MEAN
    averages(ratio[:, None] * gap, 0.0)
    averages(ratio[:, None] * (done.variance + gap.square() - VARIANCE), 0.0)


def test_the_guide_draws_the_posterior_and_its_density_makes_the_evidence():
    model = repeated(400)
    guide = AutoTwistedSMC(model, MMPS, 128)
    loss = Trace_ELBO().loss(model, guide)
    terms = guide.particles.log_evidence_terms
    assert loss == pytest.approx(-float(terms.sum()), rel=1e-9)
    averages((terms - EVIDENCE).exp(), 1.0)
    x = guide()["x"]
    averages(x, MEAN)
    averages((x - MEAN).square(), VARIANCE)


def test_particle_gibbs():
    kernel = ParticleGibbs(repeated(1000), guidance=Misguided, num_particles=16)
    mcmc = MCMC(kernel, 1, 15, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["x"][0]
    averages(x, MEAN)
    averages((x - MEAN).square(), VARIANCE)
    averages((x - MEAN).prod(-1), COVARIANCE[0, 1])
