"""Twists learned of a program's simulations: closed forms, exact particles whatever was learned, refusals."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import F64, NormalDenoiser, isotropic, problem
from pyro.infer import Predictive
from torch.testing import assert_close

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import AmortizedTwist
from pyro_diffusion.infer import AutoGuidance, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.schedules import uniform
from pyro_diffusion.train import fit_amortized

MEAN = torch.tensor([0.5, -1.0], dtype=F64)
VARIANCE, SD = 0.7, 0.2
MATRIX = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=F64)
Y = torch.tensor([1.2, -0.3], dtype=F64)


def prior(steps=24):
    return Diffusion(isotropic(MEAN, VARIANCE), (2,), times=uniform(steps, F64))


def linear_program(own, y):
    """Rows of a plate, each with two sites."""

    def model():
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", own)
            pyro.sample("first", dist.Normal(x @ MATRIX[0], SD), obs=y[:, 0])
            pyro.sample("second", dist.Normal(x @ MATRIX[1:].mT, SD).to_event(1), obs=y[:, 1:])

    return model


@functools.cache
def twist():
    own = prior()
    pyro.set_rng_seed(0)
    found = AmortizedTwist(ProgramLikelihood(linear_program(own, Y[None])), hidden=(16,)).double()
    fit_amortized(found, found.simulate(20_000), steps=40, progress=False)
    return found


def evidence():
    total = VARIANCE * MATRIX @ MATRIX.mT + SD**2 * torch.eye(2, dtype=F64)
    return dist.MultivariateNormal(MATRIX @ MEAN, total).log_prob(Y)


def log_evidences(guidance, particles=16, rows=300):
    """Of independent filters."""
    own = prior()
    likelihood = ProgramLikelihood(linear_program(own, Y.expand(rows, 2)))
    run = TwistedSMC(own, likelihood, guidance, num_particles=particles).run()
    return run.log_evidence_terms


def test_the_log_ratio_of_a_linear_normal_program():
    """Moments of 20,000 draws leave up to .03 nats of log p(y | x_t), which varies by .1 to .5."""
    mean, covariance, reading = problem(5, 3)
    denoiser = NormalDenoiser(mean, covariance)
    own = Diffusion(denoiser, (5,), times=uniform(64, F64))

    def model():
        x = pyro.sample("x", own)
        law = dist.Normal(x @ reading.matrix[:2].mT, reading.scale[:2]).to_event(1)
        pyro.sample("y", law, obs=reading.y[:2])
        pyro.sample("z", dist.Normal(x @ reading.matrix[2], reading.scale[2]), obs=reading.y[2])

    likelihood = ProgramLikelihood(model)
    assert_close(likelihood.observations(), reading.y)
    found = AmortizedTwist(likelihood, hidden=(16, 16)).double()
    found.simulate(20_000)
    for clock in (-8.0, -2.0, 0.0, 3.0, 8.0):
        t = denoiser.process.level_of_clock(torch.tensor([clock], dtype=F64)).t.flatten()
        x = denoiser.process.marginal(mean.expand(50, 5), t.expand(50)).sample()
        level = denoiser.process.level(t[0], x)
        gain, given = denoiser.given(level)
        centre = mean + (x - level.alpha * mean) @ gain.mT
        total = reading.matrix @ given @ reading.matrix.mT + reading.scale.square().diag()
        exact = dist.MultivariateNormal(centre @ reading.matrix.mT, total).log_prob(reading.y)
        assert (found.log_prob(x, level, reading.y) - exact).abs().max() < 0.06


def test_evidence_is_unbiased_and_its_scatter_small():
    # By the error of 300 filters: 4 of them, a false alarm in 16,000.
    ratio = (log_evidences(twist()) - evidence()).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 0.1


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_a_bad_twist_has_the_same_evidence_and_scatters_more():
    pyro.set_rng_seed(1)
    bad = AmortizedTwist(ProgramLikelihood(linear_program(prior(), Y[None])), hidden=(16,)).double()
    bad.simulate(2000)
    torch.nn.init.normal_(bad.network.last.weight, std=0.1)
    torch.nn.init.constant_(bad.network.last.bias, 0.3)
    ratio = (log_evidences(bad, 64) - evidence()).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() > 3 * (log_evidences(twist(), 64) - evidence()).exp().std()


def test_the_kernel_that_follows_is_the_chains_own_times_the_next_twist():
    own = prior()
    likelihood = ProgramLikelihood(linear_program(own, Y.expand(7, 2)))
    guided = twist()(own.denoiser, likelihood)
    level = own.denoiser.process.level(torch.tensor(0.4, dtype=F64), torch.zeros(7, 2, dtype=F64))
    pyro.set_rng_seed(2)
    kernel = dist.Normal(torch.randn(7, 2, dtype=F64), 0.3).to_event(1)
    followed = guided.follow(kernel, level)
    x = torch.randn(50, 7, 2, dtype=F64)
    log_twist = guided.twisted(x, level).log_twist
    ratio = kernel.log_prob(x) + log_twist - followed.log_prob(x)
    assert log_twist.std() > 1
    # Normal but for what 40 steps have bent.
    assert ratio.std(0).max() < 0.05
    last = guided.follow(kernel, None)
    ratio = kernel.log_prob(x) + likelihood.log_prob(x) - last.log_prob(x)
    assert ratio.std(0).max() < 1e-9


def test_moments_of_x0_are_those_of_a_normal_posterior():
    own = prior()
    guided = twist()(own.denoiser, ProgramLikelihood(linear_program(own, Y.expand(9, 2))))
    for t in (0.1, 0.4, 0.7):
        level = own.denoiser.process.level(torch.tensor(t, dtype=F64), torch.zeros(9, 2, dtype=F64))
        x = own.denoiser.process.marginal(MEAN.expand(9, 2), level).sample()
        before = own.denoiser(x, level)
        precision = torch.diag_embed(1 / before.variance) + MATRIX.mT @ MATRIX / SD**2
        covariance = torch.linalg.inv(precision)
        gap = Y - before.mean @ MATRIX.mT
        mean = before.mean + (covariance @ MATRIX.mT @ gap.unsqueeze(-1)).squeeze(-1) / SD**2
        exact = covariance.diagonal(dim1=-1, dim2=-2)
        after = guided(x, level)
        # Moments of 20,000 draws are known to 1 or 2 % of what is unknown of x_0 without y.
        assert ((after.mean - mean) / exact.sqrt()).abs().max() < 0.2
        assert ((after.variance - exact) / before.variance).abs().max() < 0.04


def test_guidance_alone_draws_the_posterior_of_a_normal_prior():
    model = linear_program(prior(200), Y[None])
    pyro.set_rng_seed(3)
    x = Predictive(model, guide=AutoGuidance(model, twist()), num_samples=4000, parallel=True)()[
        "x"
    ]
    x = x.reshape(-1, 2)
    precision = torch.eye(2, dtype=F64) / VARIANCE + MATRIX.mT @ MATRIX / SD**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (MEAN / VARIANCE + MATRIX.mT @ Y / SD**2)
    # Four errors of 4000 draws, and as much for the moments' own.
    away = (x.mean(0) - mean) / covariance.diagonal().sqrt()
    assert away.abs().max() < 8 / math.sqrt(len(x))
    assert (x.var(0) / covariance.diagonal() - 1).abs().max() < 0.15


def test_magnitudes_are_learned():
    """y = |x| + noise: mean and variance of y given x_t are those of a folded normal."""
    own = Diffusion(isotropic(torch.zeros(1, dtype=F64), 1.0), (1,), times=uniform(24, F64))

    def model():
        x = pyro.sample("x", own)
        pyro.sample("y", dist.Normal(x.abs(), 0.1).to_event(1), obs=torch.ones(1, dtype=F64))

    pyro.set_rng_seed(0)
    found = AmortizedTwist(ProgramLikelihood(model), hidden=(32, 32)).double()
    simulations = found.simulate(5000)
    process = own.denoiser.process
    x = torch.linspace(-2, 2, 21, dtype=F64)[:, None]
    level = process.level(process.level_of_clock(torch.tensor([1.0], dtype=F64)).t.flatten()[0], x)
    share = level.alpha**2 + level.sigma**2
    m, v = level.alpha * x / share, level.sigma**2 / share
    mean = (2 * v / math.pi).sqrt() * (-m.square() / (2 * v)).exp() + m * (m / (2 * v).sqrt()).erf()
    sd = (m.square() + v - mean.square() + 0.01).sqrt()

    def errors():
        with torch.no_grad():
            centre, root = found.moments(x, level)
        linear = found.linear
        away = (centre * linear.unit + linear.centre - mean).square().mean().sqrt()
        return away, (root[..., 0] * linear.unit - sd).square().mean().sqrt()

    before = errors()
    fit_amortized(found, simulations, steps=500, lr=3e-3, progress=False)
    after = errors()
    assert before[0] > 0.3 and after[0] < 0.06
    assert before[1] > 0.08 and after[1] < 0.06


def test_a_row_alone_is_as_in_the_batch():
    own = prior()
    y = torch.stack([Y, Y + 1, Y - 2])
    together, alone = (
        twist()(own.denoiser, ProgramLikelihood(linear_program(own, each))) for each in (y, y[1:2])
    )
    x, t = torch.randn(5, 3, 2, dtype=F64), torch.tensor(0.3, dtype=F64)
    a, b = together.twisted(x, t), alone.twisted(x[:, 1:2], t)
    assert_close(a.log_twist[:, 1:2], b.log_twist)
    assert_close(a.posterior.mean[:, 1:2], b.posterior.mean)
    assert_close(together(x, t).variance[:, 1:2], alone(x[:, 1:2], t).variance)
    times = torch.tensor([0.3, 0.5, 0.7], dtype=F64)
    assert_close(together.twisted(x, times).log_twist[:, :1], a.log_twist[:, :1])


def test_its_state_is_that_of_another():
    likelihood = ProgramLikelihood(linear_program(prior(), Y[None]))
    other = AmortizedTwist(likelihood, hidden=(16,)).double()
    other.load_state_dict(twist().state_dict())
    x = torch.randn(4, 2, dtype=F64)
    level = prior().denoiser.process.level(torch.tensor(0.4, dtype=F64), x)
    assert_close(other.log_prob(x, level, Y), twist().log_prob(x, level, Y))


def program_with(site):
    own = prior()

    def model():
        x = pyro.sample("x", own)
        site(x)

    return ProgramLikelihood(model)


NAN = torch.tensor([1.0, math.nan], dtype=F64)
INCOMPLETE = {
    "a mask": lambda x: pyro.sample(
        "y", dist.Normal(x, 1.0).mask(torch.tensor([True, False])).to_event(1), obs=Y
    ),
    "mask": lambda x: pyro.sample("y", dist.NanMaskedNormal(x, 1.0).to_event(1), obs=NAN),
    "a factor": lambda x: pyro.factor("y", -x.square().sum(-1)),
    "a scale": lambda x: pyro.poutine.scale(
        lambda: pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=Y), scale=0.5
    )(),
}


@pytest.mark.parametrize("found", INCOMPLETE)
def test_incomplete_data_are_refused_by_name(found):
    with pytest.raises(ValueError, match=f"site 'y': got .*{found}"):
        AmortizedTwist(program_with(INCOMPLETE[found]))


def test_refusals():
    own = prior()
    likelihood = ProgramLikelihood(linear_program(own, Y[None]))
    fresh = AmortizedTwist(likelihood)
    with pytest.raises(ValueError, match="guidance: got an AmortizedTwist without simulations"):
        fresh(own.denoiser, likelihood)
    with pytest.raises(ValueError, match="training_model: got an AmortizedTwist without"):
        fresh.training_model(torch.zeros(2, 2), torch.zeros(2, 2))
    other = program_with(lambda x: pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=Y[0]))
    with pytest.raises(ValueError, match="with 1 readings, expected 2 and 2"):
        twist()(own.denoiser, other)
    with pytest.raises(ValueError, match="likelihood: got function"):
        AmortizedTwist(lambda: None)

    def joint():
        with pyro.plate("rows", 3):
            x = pyro.sample("x", own)
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=Y[0])

    with pytest.raises(ValueError, match="observed jointly"):
        AmortizedTwist(ProgramLikelihood(joint))


@pytest.mark.parametrize("batched", [True, False], ids=["vectorized", "vmap"])
def test_readings_are_simulated_anew_for_every_datum(batched):
    def site(x):
        centre = x if batched else x.reshape(2)
        pyro.sample("y", dist.Normal(centre, 0.5).to_event(1), obs=Y)

    likelihood = program_with(site)
    pyro.set_rng_seed(4)
    y = likelihood.simulate(MEAN.expand(4000, 2))
    assert y.shape == (4000, 2)
    assert (y.mean(0) - MEAN).abs().max() < 5 * 0.5 / math.sqrt(4000)
    assert (y.std(0) / 0.5 - 1).abs().max() < 0.06


@pytest.mark.parametrize("indexed", [False, True], ids=["alone", "indexed"])
def test_readings_that_depend_on_others_are_simulated_with_them(indexed):
    """y_2 is around y_1 as drawn, not as observed: mean and covariance within 5 errors of 4000 draws."""

    def site(x):
        first = pyro.sample("a", dist.Normal(x[..., 0], 0.5), obs=torch.tensor(10.0, dtype=F64))
        if indexed:
            (first,) = pyro.sample("c", dist.Normal(first.reshape(1), 0.5).to_event(1), obs=Y[:1])
        pyro.sample("b", dist.Normal(first + x[..., 1], 0.5), obs=Y[1])

    likelihood = program_with(site)
    pyro.set_rng_seed(4)
    y = likelihood.simulate(MEAN.expand(4000, 2))
    links = torch.ones(y.shape[1], y.shape[1], dtype=F64).tril()
    around = torch.cat([MEAN[:1].expand(y.shape[1] - 1), MEAN.sum()[None]])
    expected = 0.25 * links @ links.mT
    assert ((y.mean(0) - around) / expected.diagonal().sqrt()).abs().max() < 5 / 4000**0.5
    assert (torch.cov(y.mT) - expected).abs().max() < 5 * 0.75 * (2 / 4000) ** 0.5


def test_precision_of_its_own():
    """A twist in double precision over a prior in single: as in the prior's own, up to that."""
    pyro.set_rng_seed(0)
    own = Diffusion(isotropic(MEAN.float(), VARIANCE).float(), (2,), times=uniform(8))

    def model():
        x = pyro.sample("x", own)
        pyro.sample("y", dist.Normal(x, SD).to_event(1), obs=Y.float())

    likelihood = ProgramLikelihood(model, ())
    found = AmortizedTwist(likelihood, hidden=(8,))
    found.simulate(500)
    x, level = torch.randn(5, 2), own.denoiser.process.level(torch.tensor(0.5), torch.zeros(2))
    single = found.log_prob(x, level, Y.float())
    assert_close(found.double().log_prob(x, level, Y.float()), single, rtol=1e-5, atol=1e-5)
    assert float(TwistedSMC(own, likelihood, found, num_particles=8).run().log_evidence.value) < 0


def test_too_few_draws_for_moments_are_refused():
    found = AmortizedTwist(
        ProgramLikelihood(linear_program(prior(), Y[None])), hidden=(8,)
    ).double()
    with pytest.raises(ValueError, match="num_samples: got 4 at first"):
        found.simulate(4)
