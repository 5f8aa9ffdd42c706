"""Log p(x) with a latent diffusion: against a linear-Gaussian model of known evidence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AffineTransform
from pyro.infer.autoguide import AutoNormal

from pyro_diffusion.denoisers import CategoricalDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.evaluate import latent_log_likelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified

F64 = torch.float64
MAP = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, 0.2]], dtype=F64)
MEAN, VARIANCE = torch.tensor([0.5, -1.0], dtype=F64), 0.49
NOISE = 0.4


def prior(steps=400, scale=1.0):
    """N(MEAN, VARIANCE), exactly, as a diffusion; times a scale."""
    process = GaussianProcess(Cosine())
    exact = MixtureDenoiser(process, torch.ones(1, dtype=F64), MEAN[None], VARIANCE)
    chain = Diffusion(exact, (2,), steps=steps)
    return (
        dist.TransformedDistribution(chain, [AffineTransform(0.0, scale)]) if scale != 1 else chain
    )


def programs(law, scale=1.0):
    """The model, and a guide that is the exact posterior, widened."""
    precision = torch.eye(2, dtype=F64) / VARIANCE + MAP.T @ MAP / NOISE**2
    posterior = torch.linalg.inv(precision)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z @ MAP.T / scale, NOISE).to_event(1), obs=x)

    def guide(x):
        mean = (x @ MAP / NOISE**2 + MEAN / VARIANCE) @ posterior
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MultivariateNormal(scale * mean, 1.3 * scale**2 * posterior))

    return model, guide


def rows(count=12):
    z = MEAN + VARIANCE**0.5 * torch.randn(count, 2, dtype=F64)
    return z @ MAP.T + NOISE * torch.randn(count, 3, dtype=F64)


def evidence(x):
    covariance = VARIANCE * MAP @ MAP.T + NOISE**2 * torch.eye(3, dtype=F64)
    return dist.MultivariateNormal(MAP @ MEAN, covariance).log_prob(x)


def widening():
    """KL from the widened posterior to the posterior, the same for every row: what the ELBO misses."""
    return 0.5 * 2 * (1.3 - 1 - math.log(1.3))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_by_the_flow(scale):
    """Within five of its own errors a row (1 in 10^5 seeds), and .002 nats of the flow's end."""
    x = rows()
    model, guide = programs(prior(scale=scale), scale)
    found = latent_log_likelihood(model, guide, x, num_samples=400, batch_size=5, seed=1)
    estimate = found.importance
    gap = (estimate.value - evidence(x)).abs()
    assert bool((gap < 5 * estimate.standard_error + 0.002).all())
    assert float(estimate.standard_error.max()) < 0.05
    assert bool((estimate.ess > 200).all()) and bool((estimate.khat < 0.7).all())
    elbo = evidence(x) - widening()
    assert bool(((found.elbo.value - elbo).abs() < 5 * found.elbo.standard_error + 0.002).all())
    assert found.elbo.kind == "lower bound" and estimate.kind == "importance-weighted"
    assert estimate.dimensions == 3 and estimate.evaluations > 400
    assert "k-hat" in str(found)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_by_the_chain(scale):
    """The weights' variance is the chain's, too; its ELBO is below the flow's by the chain's gap."""
    x = rows(4)
    model, guide = programs(prior(steps=100, scale=scale), scale)
    found = latent_log_likelihood(model, guide, x, by="chain", num_samples=300, seed=1)
    estimate = found.importance
    assert bool(((estimate.value - evidence(x)).abs() < 5 * estimate.standard_error + 0.02).all())
    assert bool((found.elbo.value < evidence(x)).all())
    assert estimate.evaluations == 300 * 101


def test_never_by_the_single_sites_estimate(monkeypatch):
    def refuse(*_):
        raise AssertionError("the site's own estimate was asked for")

    monkeypatch.setattr(Diffusion, "log_prob", refuse)
    model, guide = programs(prior())
    latent_log_likelihood(model, guide, rows(2), num_samples=2)


def scaled(program, scale):
    def run(x):
        with poutine.scale(scale=scale):
            program(x)

    return run


def test_scales_of_a_loss_are_left_out():
    """Those of annealing and of minibatches: a scaled density is no density."""
    x = rows(3)
    model, guide = programs(prior())
    one, two = (
        latent_log_likelihood(scaled(model, s), scaled(guide, s), x, num_samples=30, seed=3)
        for s in (1.0, 10.0)
    )
    assert torch.equal(one.importance.value, two.importance.value)
    assert torch.equal(one.elbo.value, two.elbo.value)


class _Towards(MixtureDenoiser):
    """N(given, VARIANCE), exactly, whatever is given."""

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt, state="xt")
        gain = level.alpha * VARIANCE / (level.alpha**2 * VARIANCE + level.sigma**2)
        mean = context["given"] + gain * (xt - level.alpha * context["given"])
        return dist.Delta(mean, event_dim=1)

    point_mass = True

    def context_event_dim(self, name, value):
        return 1


@pytest.mark.parametrize("by", ["context", "transform"])
def test_a_prior_that_depends_on_another_latent(by):
    """z ~ N(0, 1), y ~ N(z, VARIANCE), x ~ N(y, NOISE^2): each draw of z has its own prior of y.

    Within five of its own errors a row (1 in 10^5 seeds), and .005 nats of the flow's end and solver.
    """
    process = GaussianProcess(LogLinear(12.0, -14.0))  # which forgets what it was given
    exact = _Towards(process, torch.ones(1, dtype=F64), MEAN[None], VARIANCE)
    x = 1.5 * torch.randn(4, 2, dtype=F64)
    total = 1 + VARIANCE + NOISE**2

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            if by == "context":
                law = Diffusion(exact, (2,), steps=50, context={"given": z})
            else:
                law = Diffusion(exact, (2,), steps=50, context={"given": torch.zeros_like(z)})
                law = dist.TransformedDistribution(law, [AffineTransform(z, 1.0, event_dim=1)])
            y = pyro.sample("y", law)
            pyro.sample("x", dist.Normal(y, NOISE).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            z = dist.Normal(x / total, ((total - 1) / total) ** 0.5).to_event(1)
            z = pyro.sample("z", z)
            precision = 1 / VARIANCE + 1 / NOISE**2
            y = dist.Normal((z / VARIANCE + x / NOISE**2) / precision, precision**-0.5)
            pyro.sample("y", y.to_event(1))

    found = latent_log_likelihood(model, guide, x, num_samples=50, seed=1).importance
    truth = dist.Normal(0.0, total**0.5).log_prob(x).sum(-1)
    assert bool(((found.value - truth).abs() < 5 * found.standard_error + 0.005).all())
    assert float(found.standard_error.max()) < 0.05


def test_a_model_without_a_diffusion_and_seeds():
    x = rows(3)
    law = dist.Normal(MEAN, VARIANCE**0.5).to_event(1)
    model, guide = programs(law)
    one, two = (latent_log_likelihood(model, guide, x, num_samples=50, seed=3) for _ in range(2))
    assert torch.equal(one.importance.value, two.importance.value)
    gap = (one.importance.value - evidence(x)).abs()
    assert bool((gap < 5 * one.importance.standard_error).all())


def test_refusals():
    x = rows(3)
    model, guide = programs(prior())
    with pytest.raises(ValueError, match="by: got 'site'"):
        latent_log_likelihood(model, guide, x, by="site")
    with pytest.raises(ValueError, match="num_samples: got 1"):
        latent_log_likelihood(model, guide, x, num_samples=1)
    with pytest.raises(ValueError, match="data: got"):
        latent_log_likelihood(model, guide, x * math.nan)

    def flat(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z @ MAP.T, NOISE).to_event(2), obs=x)

    with pytest.raises(ValueError, match=r"site 'x': got log-probabilities of shape \(\)"):
        latent_log_likelihood(flat, guide, x)

    symbols = CategoricalDenoiser(MLP(2, outputs=2), Absorbing(Rectified.full(), 2))

    def discrete(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", Diffusion(symbols, (2,), steps=2))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    def bits(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))

    with pytest.raises(ValueError, match="site 'z': got a diffusion of discrete data"):
        latent_log_likelihood(discrete, bits, x)


def test_latents_that_only_one_of_both_has_are_refused():
    """Their weights would be no importance weights: above log p(x), even."""
    model, guide = programs(prior(10))
    x = rows(3)

    def renamed(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("other", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))

    def unseen(x):
        with poutine.uncondition():
            model(x)

    def more(x):
        guide(x)
        with pyro.plate("again", len(x)):
            pyro.sample("other", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))

    for program, law, message in [
        (model, renamed, r"guide: got one that draws \['other'\], expected \['z'\], too"),
        (model, lambda x: None, r"guide: got one that draws \[\], expected \['z'\], too"),
        (unseen, guide, r"guide: got one that draws \['z'\], expected \['x'\], too"),
        (model, more, r"guide: got sites \['other'\], expected latents of the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            latent_log_likelihood(program, law, x, num_samples=4)
    found = latent_log_likelihood(model, AutoNormal(model, init_scale=0.5), x, num_samples=4)
    assert bool(found.elbo.value.isfinite().all())
