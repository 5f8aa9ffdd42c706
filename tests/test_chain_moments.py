"""Moments of x_0 given x_t measured on a chain: against closed forms, and as the twist of particles."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import CalibratedCovariance
from pyro_diffusion.guidance.chain_moments import ChainMoments
from pyro_diffusion.guidance.moments import DRAWS, KNOTS, measured
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear, uniform

F64 = torch.float64
PROCESS = GaussianProcess(LogLinear(10.0, -10.0))
VARIANCE, CENTRE = 0.7, torch.tensor([0.5, -1.0, 2.0], dtype=F64)
MATRIX = torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]], dtype=F64)


class Noisy(Denoiser):
    """The exact moments of one isotropic normal, the mean wrong by noise below a log-SNR."""

    def __init__(self, amplitude: float = 0.0, head: bool = True) -> None:
        super().__init__(PROCESS)
        weights, means = torch.ones(1, dtype=F64), CENTRE[None]
        self.inner = MixtureDenoiser(PROCESS, weights, means, torch.tensor(VARIANCE, dtype=F64))
        self.amplitude = torch.nn.Parameter(torch.tensor(amplitude, dtype=F64), requires_grad=False)
        self.head = head

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        exact = self.inner(xt, level)
        wrong = self.amplitude * torch.where(level.clock < -2, torch.sin(50 * xt.flip(-1)), 0.0)
        if not self.head:
            return dist.Delta(exact.mean + wrong, event_dim=1)
        return dist.Normal(exact.mean + wrong, exact.variance.sqrt()).to_event(1)


def program(denoiser, sd=0.05, steps=24):
    prior = Diffusion(denoiser, (3,), times=uniform(steps, F64))
    y = MATRIX @ torch.tensor([1.0, -0.4, 1.5], dtype=F64)

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ MATRIX.mT, sd).to_event(1), obs=y)

    return prior, ProgramLikelihood(model), y


@pytest.mark.parametrize("head", [True, False], ids=["variance head", "point mass"])
def test_moments_of_normal_data_are_found_at_every_level(head):
    # Fixed draws: no false alarms. 512 of them know a variance to 6 %, a mean to 4 % of a deviation.
    denoiser, like = Noisy(head=head), torch.zeros(3, dtype=F64)
    # Between point masses the chain itself is narrower than its data: by little if steps are many.
    prior, likelihood, _ = program(denoiser, steps=24 if head else 200)
    guided = ChainMoments(denoiser, likelihood, times=prior.times)
    for clock in (-8.0, -2.0, 0.0, 3.0):
        t = PROCESS.level_of_clock(torch.tensor([clock], dtype=F64)).t.flatten()
        x = prior.denoiser.process.marginal(CENTRE.expand(5, 3), t.expand(5)).sample()
        at, level = guided._linearized(x, t.expand(5), {})
        exact = denoiser.inner(x, level)
        eye = torch.eye(3, dtype=F64)
        v = torch.stack([guided.covariance(at, level, e.expand(5, 3)) for e in eye], -1)
        truth = exact.variance.mean()
        assert (v / truth - eye).abs().max() < 0.25
        assert ((at.mean - exact.mean).abs() / truth.sqrt()).max() < 0.2
    assert measured(denoiser, guided.times, like, guided._sums) is at.moments
    assert len(at.moments.knots) == (25 if head else KNOTS) and at.moments.clocks.diff().gt(0).all()


def test_a_mean_that_is_noise_is_not_trusted():
    denoiser = Noisy(amplitude=1.0)
    prior, likelihood, _ = program(denoiser)
    guided = ChainMoments(denoiser, likelihood, times=prior.times)
    x = torch.randn(50, 3, dtype=F64)
    at, level = guided._linearized(
        x, PROCESS.level_of_clock(torch.tensor([-8.0], dtype=F64)).t.flatten()[0], {}
    )
    exact = denoiser.inner(x, level).mean
    assert (at.mean - exact).abs().max() < 0.2 < (at.prior.mean - exact).abs().max()


@pytest.mark.parametrize("amplitude", [0.0, 1.0], ids=["exact", "wrong where x is noise"])
def test_particles_find_the_evidence_by_default(amplitude):
    denoiser = Noisy(amplitude)
    prior, likelihood, y = program(denoiser)
    smc = TwistedSMC(prior, likelihood, num_particles=128)
    assert isinstance(smc.chain.guided, ChainMoments)
    run = smc.run()
    assert run.ess.min() > 64 and run.ancestors[-1] > 16
    if amplitude == 0:
        total = VARIANCE * MATRIX @ MATRIX.mT + 0.05**2 * torch.eye(2, dtype=F64)
        truth = dist.MultivariateNormal(MATRIX @ CENTRE, total).log_prob(y)
        # Five standard errors, a false alarm in 1e-6 of seeds.
        found = run.log_evidence
        assert float(found.value) == pytest.approx(float(truth), abs=5 * found.standard_error)
        assert found.standard_error < 0.1


def test_a_network_that_is_sure_and_wrong_of_some_states_says_little_of_the_others():
    class Sure(Noisy):
        """Of every other state, by its first coordinate: as integer levels are where noise is low."""

        def forward(self, xt, t, **context):
            found = super().forward(xt, t)
            sure = torch.where(xt[..., :1] > 0.5, 1e-6, 1.0)
            return dist.Normal(found.mean, found.variance.sqrt() * sure).to_event(1)

    denoiser = Sure()
    prior, likelihood, _ = program(denoiser)
    guided = ChainMoments(denoiser, likelihood, times=prior.times)
    t = PROCESS.level_of_clock(torch.tensor([3.0], dtype=F64)).t.flatten()[0]
    x = torch.tensor([[1.0, -1.0, 2.0], [0.0, -1.0, 2.0]], dtype=F64)  # sure, not sure
    at, level = guided._linearized(x, t, {})
    v = guided.covariance(at, level, torch.ones(3, dtype=F64).expand(2, 3))
    truth = denoiser.inner(x, level).variance.mean()
    # Half of the errors are 1 / LEAST_SHARE times what is said of them, so variances 10 times too large.
    assert v[0].min() > 0.1 * truth
    assert v[1].max() < 25 * truth


def test_data_sharper_than_the_chain_are_drawn_about_the_denoisers_own_mean():
    # The chain ends coarse: the measured mean is off it by much more than the readings' noise.
    process = GaussianProcess(LogLinear(3.0, -10.0))
    weights, variance = torch.ones(1, dtype=F64), torch.tensor(VARIANCE, dtype=F64)
    denoiser = MixtureDenoiser(process, weights, CENTRE[None], variance)
    prior, likelihood, y = program(denoiser, sd=5e-4)
    guidance = functools.partial(ChainMoments, times=prior.times)
    run = TwistedSMC(prior, likelihood, guidance, num_particles=128).run()
    assert run.ess.min() > 100
    total = VARIANCE * MATRIX @ MATRIX.mT + 5e-4**2 * torch.eye(2, dtype=F64)
    truth = dist.MultivariateNormal(MATRIX @ CENTRE, total).log_prob(y)
    # Five standard errors, a false alarm in 1e-6 of seeds.
    found = run.log_evidence
    assert float(found.value) == pytest.approx(float(truth), abs=5 * found.standard_error)


def test_times_of_their_own_find_their_own_knots():
    denoiser = Noisy()
    prior, likelihood, _ = program(denoiser)
    guided = ChainMoments(denoiser, likelihood, times=prior.times)
    x, t = torch.randn(2, 3, dtype=F64), torch.tensor([0.2, 0.7], dtype=F64)
    both = guided(x, t).mean
    for i in range(2):
        assert_close(both[i], guided(x[i], t[i]).mean)


def test_measured_once_until_parameters_change_and_seeds_left_alone():
    denoiser, like = Noisy(), torch.zeros(3, dtype=F64)
    before, times = torch.get_rng_state(), tuple(uniform(8, F64).tolist())
    found = measured(denoiser, times, like)
    assert torch.get_rng_state().equal(before)
    assert measured(denoiser, tuple(list(times)), like) is found
    assert measured(denoiser, tuple(uniform(9, F64).tolist()), like) is not found
    denoiser.amplitude.fill_(0.5)
    again = measured(denoiser, times, like)
    assert again is not found
    other = torch.zeros((), dtype=F64).fill_(0.25)  # another tensor, as often changed
    denoiser.amplitude = torch.nn.Parameter(other, requires_grad=False)
    assert denoiser.amplitude._version == 1
    assert measured(denoiser, times, like) is not again
    assert DRAWS >= 256


def test_a_full_gradient_is_refused():
    denoiser = Noisy()
    with pytest.raises(ValueError, match="full_gradient: got True for ChainMoments"):
        ChainMoments(denoiser, program(denoiser)[1], full_gradient=True)


def test_a_context_is_left_to_another_guidance():
    class Labelled(Noisy):
        def forward(self, xt, t, label=None):
            return super().forward(xt, t)

    denoiser = Labelled()
    prior = Diffusion(denoiser, (3,), times=uniform(8, F64), context={"label": torch.tensor(1)})

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x.sum(-1), 0.3), obs=torch.tensor(1.0))

    smc = TwistedSMC(prior, ProgramLikelihood(model), num_particles=8)
    assert isinstance(smc.chain.guided, CalibratedCovariance)
    guided = ChainMoments(denoiser, smc.likelihood)
    with pytest.raises(ValueError, match="context: got label, expected none"):
        guided(torch.zeros(3, dtype=F64), torch.tensor(0.5, dtype=F64), label=torch.tensor(1))
    assert math.isfinite(float(smc.run().log_evidence.value))


def test_half_of_the_shift_is_the_gradients_and_no_longer_than_the_other():
    denoiser = Noisy()
    prior, likelihood, _ = program(denoiser)
    guided = ChainMoments(denoiser, likelihood, times=prior.times)
    x, t = torch.randn(4, 3, dtype=F64), torch.tensor(0.5, dtype=F64)
    found = guided.twisted(x, t)
    at, level = guided._linearized(x, t, {})
    with torch.enable_grad():
        solved = guided._direct(at, level)
    kept, gradient = solved.image.detach(), level.tweedie * at.score(solved.log_evidence)
    # The normal's gradient is its shift, but for what 512 draws know of its covariance.
    assert ((gradient - kept).norm(dim=-1) < 0.3 * kept.norm(dim=-1)).all()
    assert_close(found.posterior.mean - found.prior.mean, 0.5 * (kept + gradient))
    assert not (found.log_twist.requires_grad or found.readings.gap.requires_grad)
    assert_close(guided(x, t).mean, found.posterior.mean)
    # A gradient of a thousand times the length: what is added is as long as the first half.
    at, level = guided._linearized(x, t, {})
    at.score = lambda log_twist: 1000 * gradient / level.tweedie
    cut = guided._by_gradient(at, level)
    added = cut.image - kept
    assert_close(added.norm(dim=-1), kept.norm(dim=-1))


def test_the_evidence_of_observations_that_are_not_linear():
    denoiser = Noisy()
    prior = Diffusion(denoiser, (3,), times=uniform(24, F64))
    y = torch.tensor([2.0, 1.0, 3.0], dtype=F64)

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x.square(), 0.5).to_event(1), obs=y)

    run = TwistedSMC(prior, ProgramLikelihood(model), num_particles=256).run().log_evidence
    x = CENTRE + VARIANCE**0.5 * torch.randn(100_000, 3, dtype=F64)
    weights = dist.Normal(x.square(), 0.5).to_event(1).log_prob(y).exp()
    error = math.hypot(float(run.standard_error), float(weights.std() / weights.mean()) / 316)
    # Five standard errors: a false alarm in 1e-6 of seeds.
    assert float(run.value) == pytest.approx(float(weights.mean().log()), abs=5 * error)
    assert error < 0.2


def test_data_of_a_point_mass_are_wider_by_the_decoders_noise():
    # 512 draws: a standard deviation is wrong by 3 % (1 s.e.), by 16 % once in a million.
    class PointMass(Denoiser):
        def forward(self, xt, t, **context):
            level = self.process.level(t, xt)
            weight = level.alpha / (level.alpha**2 + level.sigma**2)
            return dist.Delta(weight * xt, event_dim=1)

    process = GaussianProcess(LogLinear(5.0, -8.0))
    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    found = measured(PointMass(process), tuple(times.tolist()), torch.zeros(2, dtype=torch.float64))
    last = process.level(times[0])
    spread = found.knots[-1].scale * found.spread(None, last, found.knots[-1].floor)
    assert_close(spread / last.noise_to_signal, torch.ones_like(spread), rtol=0.16, atol=0.0)


def test_the_linear_estimate_is_judged_on_draws_that_did_not_make_it():
    # 256 numbers of variances 1/k, 512 draws: judged on its own draws it seemed better than the exact mean,
    # whose trust was .04; nearly 1 is due.
    n = 256
    variances = 1 / torch.arange(1.0, n + 1, dtype=F64)

    class Exact(Denoiser):
        def forward(self, xt, t, **context):
            level = self.process.level(t, xt)
            noise = level.noise_to_signal.square()
            weight = variances / (variances + noise)
            own = (variances * noise / (variances + noise)).expand_as(xt)
            return dist.Normal(weight * xt / level.alpha, own.sqrt()).to_event(1)

    found = measured(Exact(PROCESS), tuple(uniform(16, F64).tolist()), torch.zeros(n, dtype=F64))
    knot = found.knots[int(found._nearest(torch.tensor(1.3, dtype=F64)))]
    assert knot.trust.gains.mean() > 0.6
