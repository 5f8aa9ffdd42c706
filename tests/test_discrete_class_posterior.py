"""A class and a diffusion both latent, with readings of x: one filter a class, weighed by its evidence."""

import pyro
import pyro.distributions as dist
import torch

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from tests.classes import LOCS as LOCS64
from tests.classes import SCALE, NormalClass
from tests.classes import WEIGHTS as WEIGHTS64

LOCS, WEIGHTS = LOCS64.float(), WEIGHTS64.float()
A, NOISE = torch.tensor([[1.0, 0.5], [0.2, -1.0]]), 0.7
Y = torch.tensor([0.4, 0.1])


def exact():
    """p(k | y), and the mean and covariance of x given y and each class."""
    gram = SCALE**2 * A @ A.T + NOISE**2 * torch.eye(2)
    log_y = dist.MultivariateNormal(LOCS @ A.T, gram).log_prob(Y)
    gain = SCALE**2 * A.T @ torch.linalg.inv(gram)
    means = LOCS + (Y - LOCS @ A.T) @ gain.T
    covariance = SCALE**2 * (torch.eye(2) - gain @ A)
    return (WEIGHTS.log() + log_y).softmax(0), log_y, means, covariance


def test_one_filter_a_class_weighed_by_evidence():
    prior = Diffusion(NormalClass(), (2,), 20, context={"loc": LOCS})  # batch shape: the classes

    def given_class(y):
        with pyro.plate("class", len(LOCS)):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x @ A.T, NOISE).to_event(1), obs=y.expand(len(LOCS), 2))

    run = TwistedSMC(prior, ProgramLikelihood(given_class, (Y,)), num_particles=2000).run()
    probs, log_y, means, covariance = exact()
    # The classes are of different probability, and none is negligible: the reading decides.
    assert float(probs.min()) > 0.1
    assert float((probs - WEIGHTS).abs().max()) > 0.1
    evidence = run.log_evidence_terms.float()
    torch.testing.assert_close(evidence, log_y, atol=0.02, rtol=0)
    found = (WEIGHTS.log() + evidence).softmax(0)
    torch.testing.assert_close(found, probs, atol=0.02, rtol=0)
    # Draws of both: the class by its probability, x from that class's filter.
    k = dist.Categorical(found).sample((4000,))
    x = run.sample((4000,))[torch.arange(4000), k]
    mean = probs @ means
    between = (probs[:, None, None] * (means - mean)[:, :, None] * (means - mean)[:, None]).sum(0)
    # 4000 draws from 2000 particles a class: standard errors of about 0.015; five of them.
    torch.testing.assert_close(x.mean(0), mean, atol=0.08, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), covariance + between, atol=0.08, rtol=0)
