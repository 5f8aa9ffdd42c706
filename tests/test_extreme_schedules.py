"""Schedules at their extremes: float32 has the numbers of float64, or the range is refused by name."""

import math

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import SDESolver
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.samplers import Ancestral, simulate
from pyro_diffusion.schedules import (
    EDM,
    Cosine,
    LearnedSchedule,
    LinearBeta,
    LogLinear,
    Rectified,
    SubVP,
    TabulatedBetas,
    VarianceExploding,
    uniform_log_snr,
)


def table(end):
    """The betas of a log-SNR that falls evenly from one end to the other."""
    log_snr = torch.linspace(end, -min(end, 30), 200, dtype=torch.float64)
    log_alpha2 = torch.nn.functional.logsigmoid(log_snr)
    return TabulatedBetas(
        -torch.expm1(log_alpha2.diff(prepend=torch.zeros(1, dtype=torch.float64)))
    )


SCHEDULES = {
    "log linear": lambda end: LogLinear(end, -end),
    "cosine": lambda end: Cosine(end, -end),
    "cosine shifted": lambda end: Cosine(end, -end, shift=-1.5),
    "rectified": lambda end: Rectified(end, -end),
    "learned": lambda end: LearnedSchedule(7, end, -end).requires_grad_(False),
    "linear beta": lambda end: LinearBeta(0.1, 4.0 * end, end),
    "sub-VP": lambda end: SubVP(0.1, 2.0 * end, end),
    "table": table,
    "exploding": lambda end: VarianceExploding(math.exp(-end / 2), math.exp(end / 2)),
    "edm": lambda end: EDM(math.exp(-end / 2), math.exp(end / 2)),
}
ENDS = (10.0, 20.0, 40.0, 80.0)


def unit(schedule, dtype):
    """Standard normal data in two dimensions, whose every quantity is known."""
    one = torch.ones(1, dtype=dtype)
    return MixtureDenoiser(GaussianProcess(schedule), one, torch.zeros(1, 2, dtype=dtype), 1.0)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_of_float32_are_those_of_float64(name, end):
    schedule, t = SCHEDULES[name](end), torch.linspace(0, 1, 65)
    got, exact = schedule.level(t), schedule.level(t.double())
    torch.testing.assert_close(exact.log_snr[0].item(), schedule.log_snr_max, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact.log_snr[-1].item(), schedule.log_snr_min, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.log_snr.double(), exact.log_snr, rtol=1e-6, atol=2e-5)
    for one, other in ((got.alpha, exact.alpha), (got.sigma, exact.sigma)):
        torch.testing.assert_close(one.double(), other, rtol=5e-5, atol=1e-38)
    for function in (schedule.log_snr_slope, schedule.f, schedule.g2):
        torch.testing.assert_close(function(t).double(), function(t.double()), rtol=2e-4, atol=1e-6)
    assert bool((exact.log_snr.diff() < 0).all())


def bound(schedule, x, noise):
    """The bound of the chain on 100 even steps of log-SNR, every term at given noise."""
    dtype = x.dtype
    denoiser, process = unit(schedule, dtype), GaussianProcess(schedule)
    times = uniform_log_snr(schedule, 100).to(dtype)
    levels = process.levels(times, dtype)
    start = levels.at(0)
    decoding = Diffusion(denoiser, (2,), times=times).decoder(
        denoiser(process.marginal(x, start).mean + start.sigma * noise, start), start, process
    )
    total = -decoding.log_prob(x)
    for j in range(1, len(times)):
        s, t = levels.at(j - 1), levels.at(j)
        xt = t.alpha * x + t.sigma * noise
        total = total + kl_divergence(
            process.bridge(xt, x, s, t), process.reverse(xt, denoiser(xt, t), s, t)
        )
    return -total


@pytest.mark.parametrize("end", [10.0, 20.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bound_of_the_chain(name, end):
    x, noise = torch.randn(2, 64, 2, dtype=torch.float64)
    x = x.float().double()
    exact = bound(SCHEDULES[name](end), x, noise)
    got = bound(SCHEDULES[name](end), x.float(), noise.float())
    # One draw of the noise for all steps, so rounding does not average out over them.
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.05)
    assert float((got - exact).mean()) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("end", [10.0, 20.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_integrand_of_the_continuous_bound(name, end):
    schedule, x = SCHEDULES[name](end), torch.randn(64, 2)
    noise, t = torch.randn(64, 2), torch.linspace(0, 1, 64)

    def cost(dtype):
        level = schedule.level(t.to(dtype)).unsqueeze(1)
        x0, eps = x.to(dtype), noise.to(dtype)
        mean = unit(schedule, dtype)(level.alpha * x0 + level.sigma * eps, level).mean
        return level.log_snr.exp().squeeze() * (x0 - mean).square().sum(-1)

    torch.testing.assert_close(
        cost(torch.float32).double(), cost(torch.float64), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_flow(name):
    schedule, x = SCHEDULES[name](20.0), torch.randn(3, 2)
    values = [
        ProbabilityFlow(unit(schedule, dtype), (2,)).log_prob(x.to(dtype)).double()
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*values, rtol=0, atol=0.01)


VIEWS = {
    "chain": lambda d: Diffusion(d, (2,), 20),
    "sde": lambda d: DiffusionSDE(d, (2,), solver=SDESolver(steps=20)),
    "flow": lambda d: ProbabilityFlow(d, (2,)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ranges_that_a_dtype_cannot_hold_are_refused(name, view):
    for dtype, end in ((torch.float32, 40.0), (torch.float32, 80.0), (torch.float64, 80.0)):
        law = VIEWS[view](unit(SCHEDULES[name](end), dtype))
        message = f"schedule: got .* with log-SNR {end:g} to .*{dtype}, expected"
        with pytest.raises(ValueError, match=message):
            law.log_prob(torch.zeros(2, dtype=dtype))
        with pytest.raises(ValueError, match=message):
            law.sample()


def test_a_chain_of_float64_at_40():
    # The bound of LogLinear(80, -80) in float32 was 16.4 where the truth was -4.0.
    x = torch.randn(20000, 2, dtype=torch.float64)
    law = Diffusion(unit(LogLinear(40.0, -40.0), torch.float64), (2,), 2000)
    gap = law.log_prob(x) - torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    # Four standard errors, 1 in 16,000: the bound of 2000 steps is 0.02 nats from the truth.
    assert float(gap.mean()) == pytest.approx(0, abs=4 * float(gap.std()) / 141 + 0.02)


def test_the_middle_of_an_extreme_schedule_is_taken():
    denoiser = unit(Rectified.full(), torch.float32)
    law = Diffusion(denoiser, (2,), times=torch.linspace(0.01, 0.99, 20))
    assert law.log_prob(torch.zeros(5, 2)).isfinite().all()
    assert simulate(denoiser, law.times, torch.zeros(5, 2), Ancestral()).isfinite().all()
    with pytest.raises(ValueError, match="schedule: got Rectified"):
        simulate(denoiser, torch.linspace(0, 0.99, 20), torch.zeros(5, 2), Ancestral())


def test_survival_probabilities_may_reach_certainty():
    process = Absorbing(Rectified.full(), 3)
    process.check_precision(torch.float32, torch.tensor([0.0, 1.0]))
    assert process.schedule.alpha(torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.0]
