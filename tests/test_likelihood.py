"""A likelihood written by hand is as good as one extracted from a program."""

import doctest
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import (
    MMPS,
    TMPD,
    DiffPIR,
    PiGDM,
    PlugIn,
    Replacement,
    SampledGuidance,
    base,
)
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.infer.filtering.twisted_smc import default_guidance
from pyro_diffusion.likelihoods import Likelihood, ProgramLikelihood, Whitened
from pyro_diffusion.samplers import DAPS
from pyro_diffusion.schedules import LogLinear
from tests.exact import mixture

F64 = torch.float64
SCALE = 0.3
DENOISER = mixture(LogLinear(10.0, -10.0))
Y = torch.tensor([0.4, -1.0, 2.0], dtype=F64)


class Sum(Likelihood):
    """Three data, of each of which the sum of two coordinates is observed."""

    batch_shape, event_shape = torch.Size((3,)), torch.Size((2,))

    def whitened(self, x0):
        residual = ((Y - x0.sum(-1)) / SCALE).unsqueeze(-1)
        constant = -math.log(SCALE) - 0.5 * math.log(2 * math.pi)
        return Whitened(residual, torch.full_like(residual[..., 0], constant))

    def log_prob(self, x0):
        residual, log_normalizer = self.whitened(x0)
        return log_normalizer - 0.5 * residual.square().sum(-1)


class Bare(Likelihood):
    """A log-density and nothing else."""

    batch_shape, event_shape = Sum.batch_shape, Sum.event_shape

    def log_prob(self, x0):
        return Sum().log_prob(x0)


class Rounded(Bare):
    """A log-density without a gradient."""

    differentiable = False


def program() -> ProgramLikelihood:
    prior = Diffusion(DENOISER, (2,))  # here, as each new one draws a seed

    def model():
        with pyro.plate("data", 3):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x.sum(-1), SCALE), obs=Y)

    return ProgramLikelihood(model)


@pytest.mark.parametrize("guidance", [PlugIn, MMPS, PiGDM, TMPD, DiffPIR])
def test_guidance_takes_either(guidance):
    x, t = torch.randn(3, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    by_hand, extracted = (guidance(DENOISER, v).twisted(x, t) for v in (Sum(), program()))
    assert_close(by_hand.posterior.mean, extracted.posterior.mean)
    assert_close(by_hand.log_twist, extracted.log_twist)


@pytest.mark.parametrize("moves", [None, 3])
def test_daps_takes_either(moves):
    def draws(likelihood):
        pyro.set_rng_seed(1)
        sampler = DAPS(likelihood, inner=2, moves=moves)
        return Diffusion(DENOISER, (2,), steps=4, sampler=sampler).expand((3,)).sample()

    assert_close(draws(Sum()), draws(program()))


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_particles_take_either():
    def evidence(likelihood):
        pyro.set_rng_seed(1)
        return TwistedSMC(Diffusion(DENOISER, (2,), steps=4), likelihood, num_particles=16).run()

    by_hand, extracted = evidence(Sum()), evidence(program())
    assert by_hand.log_evidence_terms.shape == (3,)  # a filter for each datum
    assert_close(by_hand.value, extracted.value)
    assert_close(by_hand.log_evidence_terms, extracted.log_evidence_terms)


def test_default_guidance_asks_what_there_is():
    kinds = [type(default_guidance(DENOISER, v)) for v in (Sum(), Bare(), Rounded())]
    assert kinds == [MMPS, PlugIn, SampledGuidance]


def test_what_a_likelihood_lacks_is_named():
    assert_close(Sum().residual(torch.zeros(3, 2, dtype=F64))[:, 0], Y / SCALE)
    assert Bare().site_value(Y) is Y
    with pytest.raises(
        ValueError, match="got a Bare without residuals, expected one that implements"
    ):
        MMPS(DENOISER, Bare())(torch.zeros(3, 2, dtype=F64), torch.tensor(0.4, dtype=F64))
    with pytest.raises(ValueError, match="got a Rounded without a gradient in x_0"):
        PlugIn(DENOISER, Rounded())
    with pytest.raises(ValueError, match="likelihood: got function, expected a Likelihood"):
        SampledGuidance(DENOISER, lambda x0: x0.sum(-1))
    with pytest.raises(ValueError, match="likelihood: got NoneType, expected a Likelihood"):
        TwistedSMC(Diffusion(DENOISER, (2,)), None)
    with pytest.raises(ValueError, match="mix coordinates of x_0"):
        Replacement(DENOISER, Sum())
    with pytest.raises(TypeError, match="abstract"):
        Likelihood()


def test_a_program_knows_whether_it_has_a_gradient():
    def model(rounded):
        x = pyro.sample("x", Diffusion(DENOISER, (2,)))
        x = x.round() if rounded else x
        pyro.sample("y", dist.Normal(x, SCALE).to_event(1), obs=Y[:2])

    assert ProgramLikelihood(model, (False,)).differentiable
    likelihood = ProgramLikelihood(model, (True,))
    assert not likelihood.differentiable
    with pytest.raises(ValueError, match="got no gradient in x_0 at site 'y', expected a differ"):
        likelihood.check_gradient()


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_the_guidance_of_the_documentation_runs_inside_particles():
    names = dict(vars(base))
    for example in doctest.DocTestParser().get_examples(base.GuidedDenoiser.__doc__):
        exec(example.source, names)  # a definition, which the doctest itself does not call
    x, t = torch.zeros(3, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    guided = names["Shifted"](DENOISER, Sum(), 0.2)
    mean = DENOISER(x, t).mean
    slope = (Y - mean.sum(-1)) / SCALE**2  # of log p(y | x_0) in either coordinate
    assert_close(guided(x, t).mean, mean + 0.2 * slope.unsqueeze(-1).expand(3, 2))
    law = Diffusion(DENOISER, (2,), steps=4)
    assert TwistedSMC(law, Sum(), names["Shifted"], num_particles=64).run().ess.min() >= 1
