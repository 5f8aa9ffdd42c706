"""DAPS against conjugate posteriors and quadrature; RED-diff's gradient and where SVI ends with it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.testing import assert_close

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, RedDiff
from pyro_diffusion.distributions.objectives import ReverseStep
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.samplers import DAPS, DDIM, AdamsMoulton, daps, simulate
from pyro_diffusion.schedules import Cosine, Level, LogLinear, Rectified, uniform_log_snr
from tests.exact import mixture
from tests.linear_gaussian import F64, Feed, NormalDenoiser, Reading, isotropic, problem
from tests.small_diffusions import Tiny


def conjugate_variance(variance):
    """Var[x_0 | x_t] of isotropic normal data."""

    def at(level: Level):
        return variance * level.sigma**2 / (level.alpha**2 * variance + level.sigma**2)

    return at


# DAPS.


@pytest.mark.parametrize(("d", "m"), [(3, 1), (4, 2)])
def test_daps_is_exact_for_normals(monkeypatch, d, m):
    """With the posterior's mean and variance: the law of x_{t_0}, without a draw, from three steps."""
    mean, _, reading = problem(d, m)
    denoiser = isotropic(mean, 0.7)
    sampler = DAPS(reading.likelihood(denoiser), inner=1, variance=conjugate_variance(0.7))
    feed = Feed(d, 2 * d + m)
    monkeypatch.setattr(torch, "randn_like", feed.noise)
    monkeypatch.setattr(daps, "draw", feed.draw)
    times = uniform_log_snr(denoiser.process.schedule, 3, F64)
    found, covariance = feed.law(denoiser, times, sampler)
    exact_mean, exact = reading.posterior(mean, 0.7 * torch.eye(d, dtype=F64))
    start = denoiser.process.level(times[0])
    # What is left of the start, N(0, I) for the law of x_1, is of the size of alpha_1.
    assert_close(found, start.alpha * exact_mean, atol=2e-2, rtol=0)
    smeared = start.alpha**2 * exact + start.sigma**2 * torch.eye(d, dtype=F64)
    assert_close(covariance, smeared, atol=2e-2, rtol=0)
    # From the exact law of x_t there is nothing left to forget.
    level = denoiser.process.level(times[2])
    before = level.alpha**2 * exact + level.sigma**2 * torch.eye(d, dtype=F64)
    pair = times[[0, 2]]
    found, covariance = feed.step(
        lambda x: simulate(denoiser, pair, x, sampler), level.alpha * exact_mean, before
    )
    assert_close(found, start.alpha * exact_mean)
    assert_close(covariance, smeared)


def test_inner_steps_follow_the_flow(monkeypatch):
    """Many inner evaluations come to the end of the probability flow from x_t."""
    denoiser = mixture(LogLinear(10.0, -10.0), point_mass=True)
    reading = Reading(torch.eye(2, dtype=F64)[:1], torch.zeros(1, dtype=F64), 1e3)
    seen = {}
    likelihood = reading.likelihood(denoiser)

    def sample_near(center, variance):
        seen["x0"], seen["variance"] = center, variance
        return center

    monkeypatch.setattr(likelihood, "sample_near", sample_near)
    sampler = DAPS(likelihood, inner=200)
    times = uniform_log_snr(denoiser.process.schedule, 2, F64)
    x = torch.randn(7, 2, dtype=F64)
    simulate(denoiser, times[[0, 2]], x, sampler)
    fine = uniform_log_snr(denoiser.process.schedule, 400, F64)
    exact = simulate(denoiser, fine, x, AdamsMoulton())
    assert_close(seen["x0"], exact, atol=0.05, rtol=0)
    level = denoiser.process.level(times[2])
    assert_close(seen["variance"].squeeze(), level.sigma**2 / level.alpha**2)
    assert sampler.evaluations == 200
    # Few reads: DDIM's steps, evenly in log-SNR to the grid's first time, where nothing is read.
    sampler.inner = 4
    simulate(denoiser, times[[0, 2]], x, sampler)
    even = uniform_log_snr(denoiser.process.schedule, 4, F64)[1:]
    assert_close(seen["x0"], denoiser(simulate(denoiser, even, x, DDIM()), even[0]).mean)


def test_langevin_moves_reach_their_target():
    """Poisson counts under a normal, one and two coordinates a row: moments by quadrature.

    Two-sided z-tests of two moments at 4.5 errors: false alarms below 2e-5.
    """
    denoiser = isotropic(torch.zeros(2, dtype=F64), 1.0)

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,), steps=2))
        law = dist.Poisson(torch.nn.functional.softplus(3 * x)).to_event(1)
        pyro.sample("y", law, obs=torch.tensor([7.0, 0.0], dtype=F64))

    sampler = DAPS(ProgramLikelihood(model), moves=150)
    center, variance = torch.tensor([0.5, 0.2], dtype=F64), torch.tensor(0.8, dtype=F64)
    x = sampler._langevin(center.expand(4000, 2), variance, 150)
    grid = torch.linspace(-6, 6, 4001, dtype=F64)
    rate = torch.nn.functional.softplus(3 * grid)
    for i, count in enumerate((7.0, 0.0)):
        log_p = count * rate.log() - rate - (grid - center[i]).square() / (2 * variance)
        p = log_p.softmax(0)
        for power in (1, 2):
            values, truth = x[:, i] ** power, (p * grid**power).sum()
            z = (values.mean() - truth) / (values.std() / len(x) ** 0.5)
            assert abs(float(z)) < 4.5


def test_langevin_steps_adapt_to_sharp_readings():
    """A reading a thousand times sharper than the start: moves still get there."""
    denoiser = isotropic(torch.zeros(1, dtype=F64), 1.0)
    reading = Reading(torch.ones(1, 1, dtype=F64), torch.tensor([2.0], dtype=F64), 1e-2)
    sampler = DAPS(reading.likelihood(denoiser), moves=200)
    x = sampler._langevin(torch.zeros(400, 1, dtype=F64), torch.tensor(10.0, dtype=F64), 200)
    # The median distance of a normal is 0.674 standard deviations.
    assert 0.5e-2 < float((x - 2).abs().median()) < 1e-2


@pytest.mark.parametrize("moves", [None, 3])
def test_daps_row_alone(monkeypatch, moves):
    """The other rows are wild, the noise is that of the row."""
    denoiser = mixture(LogLinear(10.0, -10.0))
    reading = Reading(torch.ones(1, 2, dtype=F64), torch.tensor([1.0], dtype=F64), 0.3)
    sampler = DAPS(reading.likelihood(denoiser), inner=2, moves=moves)
    times = uniform_log_snr(denoiser.process.schedule, 4, F64)
    x, noises = torch.randn(5, 2, dtype=F64), torch.randn(100, 5, 2, dtype=F64)
    x[1:] *= 20

    def walk(rows):
        feed = iter(noises[:, :rows])
        monkeypatch.setattr(
            torch, "randn_like", lambda like: next(feed)[:, : like.shape[-1]].reshape(like.shape)
        )
        monkeypatch.setattr(torch, "rand_like", lambda like: next(feed)[:, 0].sigmoid())
        monkeypatch.setattr(daps, "draw", lambda q: q.mean + q.base_dist.stddev * next(feed))
        return simulate(denoiser, times, x[:rows], sampler)

    assert_close(walk(1)[0], walk(5)[0])


@pytest.mark.parametrize("moves", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_daps_on_images_in_plates(moves, dtype):
    denoiser = GaussianDenoiser(Tiny((1, 2, 2)), GaussianProcess(Cosine(), event_dim=3)).to(dtype)
    y = torch.randn(3, dtype=dtype)

    def model(together):
        with pyro.plate("images", 3):
            x = pyro.sample("x", Diffusion(denoiser, (1, 2, 2), steps=3))
            if not together:
                pyro.sample("y", dist.Normal(x.mean((-1, -2, -3)), 0.5), obs=y)
        if together:
            pyro.sample("z", dist.Normal(x.mean((-1, -2, -3)).sum(-1), 0.5), obs=y[0])

    for together in (False, True):
        sampler = DAPS(ProgramLikelihood(model, (together,)), moves=moves)
        law = Diffusion(denoiser, (1, 2, 2), steps=3, sampler=sampler).expand((3,))
        draws = law.sample((2, 4))
        assert draws.shape == (2, 4, 3, 1, 2, 2) and draws.dtype == dtype
        assert torch.isfinite(draws).all()


def test_daps_bad_arguments():
    denoiser = mixture(LogLinear(10.0, -10.0))

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,), steps=2))
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=torch.ones(2))

    likelihood = ProgramLikelihood(model)
    with pytest.raises(ValueError, match="likelihood: got MixtureDenoiser, expected a Likelihood"):
        DAPS(denoiser)
    with pytest.raises(ValueError, match="inner: got 0"):
        DAPS(likelihood, inner=0)
    with pytest.raises(ValueError, match="moves: got 0"):
        DAPS(likelihood, moves=0)
    with pytest.raises(ValueError, match=r"variance: got 0.5, expected a function"):
        DAPS(likelihood, variance=0.5)
    with pytest.raises(ValueError, match=r"'y' with a Poisson, expected a Normal"):
        Diffusion(denoiser, (2,), steps=3, sampler=DAPS(likelihood)).sample()
    level = denoiser.process.level(torch.linspace(0, 1, 3))
    with pytest.raises(ValueError, match="under Absorbing, which lacks bridges"):
        DAPS(likelihood).coefficients(Absorbing(Rectified.full(), 2), level, level)


# RED-diff.

WEIGHTS = {"paper": 2.0, "smoothed": lambda log_snr: (0.5 * log_snr).exp()}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_gradient_is_the_closed_form(weight):
    """Normal data: the gradient is affine in the noise, so that two opposite draws give its mean."""
    mean, covariance, _ = problem(3, 1)
    denoiser = NormalDenoiser(mean, covariance)
    process, objective = denoiser.process, RedDiff(weight)
    x0 = torch.randn(4, 3, dtype=F64, requires_grad=True)
    noise = torch.randn(4, 3, dtype=F64)
    for time in (0.1, 0.5, 0.9):
        level = process.level(torch.full((4,), time, dtype=F64), x0)
        costs = []
        for sign in (1, -1):
            xt = level.alpha * x0 + sign * level.sigma * noise
            posterior = denoiser(xt, process.level(torch.tensor(time, dtype=F64)))
            step = ReverseStep(process, x0, xt, posterior, level, level, 9)
            costs.append(objective.reverse_term(step))
        (found,) = torch.autograd.grad(sum(costs).sum() / 2, x0)
        alpha, sigma = level.alpha[0, 0], level.sigma[0, 0]
        total = alpha**2 * covariance + sigma**2 * torch.eye(3, dtype=F64)
        # E[eps_hat] = alpha sigma (alpha^2 C + sigma^2)^{-1} (x_0 - mean)
        noise_hat = alpha * sigma * (x0 - mean).detach() @ torch.linalg.inv(total)
        w = weight(2 * torch.log(alpha / sigma)) if callable(weight) else weight * sigma / alpha
        assert_close(found, w * noise_hat / 10)
        error = (noise_hat**2).sum(-1)  # at least: noise adds to it
        assert bool((sum(costs) / 2 * 10 >= 0.5 * w * error).all())


def test_network_gets_no_gradient():
    denoiser = GaussianDenoiser(Tiny((3,)), GaussianProcess(Cosine()))
    x0 = torch.randn(50, 3, requires_grad=True)
    Diffusion(denoiser, (3,), steps=4, objective=RedDiff()).log_prob(x0).sum().backward()
    assert x0.grad is not None and all(p.grad is None for p in denoiser.parameters())


def unit_problem():
    """A standard normal prior moved to a mean, and a reading of it."""
    mean, _, reading = problem(3, 2, seed=1)
    denoiser = isotropic(mean, 1.0)
    times = uniform_log_snr(denoiser.process.schedule, 20, F64)

    def model():
        law = Diffusion(denoiser, (3,), times=times, objective=RedDiff())
        x = pyro.sample("x", law)
        at = (reading.matrix @ x.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Normal(at, reading.scale).to_event(1), obs=reading.y)

    return model, *reading.posterior(mean, torch.eye(3, dtype=F64))


@pytest.mark.parametrize("family", [AutoDelta, AutoNormal])
def test_svi_with_it_ends_at_the_posterior(family):
    """Unit variance, weight 2, a grid even in log-SNR: the posterior mean, and the mean-field variances.

    The tolerance is six times the scatter of the end over seeds: no false alarm to speak of.
    """
    model, mean, covariance = unit_problem()
    guide = family(model, init_loc_fn=lambda site: torch.zeros(3, dtype=F64))
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / 300)})
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(300):
        svi.step()
    if family is AutoDelta:
        assert_close(guide.median()["x"].detach(), mean, atol=0.05, rtol=0)
        return
    assert_close(guide.locs.x.detach(), mean, atol=0.05, rtol=0)
    field = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert_close(guide.scales.x.detach(), field, atol=0, rtol=0.1)


def test_weight_that_is_none():
    with pytest.raises(ValueError, match="weight: got 0, expected a number > 0 or a function"):
        RedDiff(0)
