"""A learned log-SNR: the spline, the bound that does not see it, and the gradient that lowers its variance.

Monte-Carlo comparisons accept 4 standard errors (a two-sided false alarm in 6e-5 of seeds each); seeds are
fixed, so a test that passes passes always.
"""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_diffusion.distributions import Diffusion, DiffusionSDE
from pyro_diffusion.schedules import Cosine, LearnedSchedule, LogLinear
from tests.exact import learned, mixture, mixture_law

F64 = torch.float64


def test_it_starts_as_a_straight_line():
    t = torch.linspace(0, 1, 101, dtype=F64)
    schedule, line = LearnedSchedule(8, 7.0, -5.0), LogLinear(7.0, -5.0)
    torch.testing.assert_close(schedule.log_snr(t), line.log_snr(t))
    torch.testing.assert_close(schedule.log_snr_slope(t), line.log_snr_slope(t))
    torch.testing.assert_close(schedule.time_of_log_snr(line.log_snr(t)), t)


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_any_parameters_give_a_monotone_curve_between_its_ends(scale):
    schedule = LearnedSchedule(16, 9.0, -11.0)
    for parameter in schedule.parameters():
        parameter.data.normal_().mul_(scale)
    t = torch.linspace(0, 1, 5001, dtype=F64)
    log_snr = schedule.log_snr(t)
    assert bool((log_snr.diff() < 0).all()) and bool((schedule.log_snr_slope(t) < 0).all())
    torch.testing.assert_close(log_snr[[0, -1]], torch.tensor([9.0, -11.0], dtype=F64))
    torch.testing.assert_close(schedule.time_of_log_snr(log_snr), t, rtol=0, atol=1e-9)


def test_gradients_are_finite_differences():
    schedule = learned().double().requires_grad_(True)
    t = torch.linspace(0.03, 0.98, 9, dtype=F64)

    def of(heights: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        parameters = {"heights": heights, "slopes": slopes}
        return tuple(
            torch.func.functional_call(
                _Method(schedule, name), {f"schedule.{k}": v for k, v in parameters.items()}, (x,)
            )
            for name, x in (("log_snr", t), ("log_snr_slope", t), ("time_of_log_snr", -10 * t + 3))
        )

    assert torch.autograd.gradcheck(of, (schedule.heights, schedule.slopes))


class _Method(torch.nn.Module):
    """A method of a module as a module, for functional_call."""

    def __init__(self, schedule, name):
        super().__init__()
        self.schedule, self.name = schedule, name

    def forward(self, x):
        return getattr(self.schedule, self.name)(x)


def test_the_ends_do_not_move():
    schedule = learned().requires_grad_(True)
    ends = schedule.log_snr(torch.tensor([0.0, 1.0]))
    gradients = torch.autograd.grad(ends.sum(), tuple(schedule.parameters()))
    assert all(float(g.abs().max()) < 1e-5 for g in gradients)


@pytest.mark.parametrize("arguments", [{"bins": 0}, {"bins": 2.5}, {"log_snr_max": -10.0}])
def test_bad_input(arguments):
    with pytest.raises(ValueError, match=r"^(bins|log_snr_max, log_snr_min): got"):
        LearnedSchedule(**arguments)


# The bound


def diffusion_term(law: DiffusionSDE, data: Tensor, reads: int) -> tuple[float, float]:
    """The diffusion term's mean over data and its standard error."""
    position = (torch.arange(reads, dtype=F64) + torch.rand(reads, dtype=F64)) / reads
    terms = law.reverse_terms(data.expand(reads, *data.shape), position[:, None]).mean(0)
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(data))


def test_schedules_of_equal_ends_have_equal_bounds():
    ends = (7.0, -6.0)
    bent = LearnedSchedule(6, *ends)
    bent.heights.data.copy_(torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 0.0]))
    terms = []
    for schedule in (Cosine(*ends), LogLinear(*ends), bent):
        pyro.set_rng_seed(3)
        data = mixture_law().sample((400,))
        with torch.no_grad():
            law = DiffusionSDE(mixture(schedule, point_mass=True), (2,))
            terms.append(diffusion_term(law, data, 200))
    for mean, error in terms[1:]:
        assert abs(mean - terms[0][0]) <= 4 * math.hypot(error, terms[0][1])
        assert error < 0.02 * mean


def test_the_gradient_is_that_of_the_squared_term():
    """E L^2 over fixed data, times and noise, by finite differences."""
    schedule = learned().double().requires_grad_(True)
    law = DiffusionSDE(mixture(schedule, point_mass=True), (2,))
    data = mixture_law().sample((64,))
    t = torch.rand(64, dtype=F64)
    parameters = tuple(schedule.parameters())

    def terms() -> Tensor:
        torch.manual_seed(5)
        return law.reverse_terms(data, t)

    gradients = torch.autograd.grad(terms().sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for i in range(0, len(parameter), 3):
            squares = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[i] += step
                    squares.append(float(terms().square().sum()))
                    parameter[i] -= step
            expected = (squares[0] - squares[1]) / 2e-6
            assert float(gradient[i]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_data_and_the_network_get_the_bounds_own_gradient():
    data = mixture_law().sample((16,)).requires_grad_()
    gradients = []
    for trains in (False, True):
        schedule = learned().double().requires_grad_(trains)
        law = DiffusionSDE(mixture(schedule), (2,))
        law._seed = 11
        gradients.append(torch.autograd.grad(law.log_prob(data).sum(), data)[0])
    torch.testing.assert_close(*gradients)


def test_a_chain_trains_it_on_the_bound():
    """There the interior matters, and the gradient is the plain one."""
    schedule = learned().double().requires_grad_(True)
    law = Diffusion(mixture(schedule), (2,), times=torch.linspace(0, 1, 6, dtype=F64))
    data = mixture_law().sample((4,))
    (gradient, _) = torch.autograd.grad(law.log_prob(data).sum(), tuple(schedule.parameters()))
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            schedule.heights[2] += step
            values.append(float(law.log_prob(data).sum()))
            schedule.heights[2] -= step
    assert float(gradient[2]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def variance(law: DiffusionSDE, data: Tensor) -> float:
    """Of the diffusion term read once, given the data."""
    with torch.no_grad():
        copies = data.expand(2000, *data.shape)
        return float(
            law.reverse_terms(copies, torch.rand(2000, len(data), dtype=F64)).var(0).mean()
        )


def test_svi_learns_a_schedule_of_lower_variance_and_the_same_bound():
    """Plain SVI; the schedule is the denoiser's submodule, so Pyro sees it."""
    schedule = LearnedSchedule(12, 6.0, -6.0).double()
    denoiser = mixture(schedule)
    assert {name for name, _ in denoiser.named_parameters()} == {
        "process.schedule.heights",
        "process.schedule.slopes",
    }
    train, held = mixture_law().sample((512,)), mixture_law().sample((20,))

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", DiffusionSDE(denoiser, (2,)), obs=x)

    law = DiffusionSDE(denoiser, (2,))
    with torch.no_grad():
        before, first = variance(law, held), diffusion_term(law, train, 100)
    svi = SVI(model, lambda x: None, Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(150):
        svi.step(train)
    with torch.no_grad():
        after, last = variance(law, held), diffusion_term(law, train, 100)
    assert after < 0.8 * before, (before, after)
    assert abs(first[0] - last[0]) <= 4 * math.hypot(first[1], last[1])
