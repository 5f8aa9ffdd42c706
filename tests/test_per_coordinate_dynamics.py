"""SDEs and the probability flow under scales by coordinate: closed forms, and each coordinate alone."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO
from pyro.optim import Adam
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import (
    ExactTrace,
    ForwardSDE,
    Hutchinson,
    HutchPlusPlus,
    ODESolver,
    ReverseSDE,
    SDESolver,
)
from pyro_diffusion.dynamics.sde import KnownData
from pyro_diffusion.processes import SeededNoise, draw, drawing_from
from pyro_diffusion.schedules import LearnedSchedule
from tests.exact import MEANS, VARIANCES, WEIGHTS
from tests.per_coordinate import (
    F64,
    GROWTHS,
    MEAN,
    RATES,
    SHIFTS,
    VARIANCE,
    PerCoordinate,
    alone,
    normal,
)

PAIR = (0, 1)
TIGHT = ODESolver("dopri8", rtol=1e-9, atol=1e-9)
close = torch.testing.assert_close
traced = pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")


def mixture():
    return MixtureDenoiser(PerCoordinate(), WEIGHTS, MEANS, VARIANCES)


def blurred():
    """The distribution of x_{t_0} / alpha_0 where data are the mixture, written apart from the package."""
    ratio = PerCoordinate().level(0.0).noise_to_signal
    scale = (VARIANCES[:, None] + ratio**2).sqrt()
    return MixtureSameFamily(
        Categorical(WEIGHTS), Independent(Normal(MEANS, scale, validate_args=False), 1)
    )


# --- the probability flow ---------------------------------------------------------------------------


def test_the_flow_of_normals_is_each_coordinates_own():
    flow, x = ProbabilityFlow(normal(), (2,), solver=TIGHT), torch.randn(7, 2, dtype=F64)
    parts = [ProbabilityFlow(alone(i), (1,), solver=TIGHT) for i in PAIR]
    apart = [x[:, i : i + 1] for i in PAIR]
    total = sum(part.log_prob(v) for part, v in zip(parts, apart, strict=True))
    close(flow.log_prob(x), total, rtol=0, atol=1e-7)
    z = flow.encode(x)
    close(
        z,
        torch.cat([p.encode(v) for p, v in zip(parts, apart, strict=True)], -1),
        atol=1e-7,
        rtol=0,
    )
    close(flow.decode(z), x, atol=1e-7, rtol=0)


@pytest.mark.parametrize("trace", [ExactTrace(), HutchPlusPlus(6)])
def test_the_density_of_a_mixture_is_its_closed_form(trace):
    # What is left of the data in the prior at log-SNR -10 and -4.5 is the error; HutchPlusPlus is exact here.
    flow, x = ProbabilityFlow(mixture(), (2,), solver=TIGHT, trace=trace), blurred().sample((9,))
    # The base is a standard normal where x_1 is not quite: correct for that in closed form.
    z, log_det = flow.encode(x), flow.log_prob(x)
    end = PerCoordinate().level(1.0)
    norm = torch.hypot(end.alpha, end.sigma)
    scale = (end.alpha**2 * VARIANCES[:, None] + end.sigma**2).sqrt() / norm
    exact_end = MixtureSameFamily(
        Categorical(WEIGHTS),
        Independent(Normal(end.alpha / norm * MEANS, scale, validate_args=False), 1),
    )
    got = log_det - flow.base_dist.log_prob(z) + exact_end.log_prob(z)
    close(got, blurred().log_prob(x), rtol=0, atol=1e-6)


def test_hutchinson_is_unbiased():
    # 9 data within 4.5 of their own standard errors: a false alarm in 16 000 runs.
    solver = ODESolver("rk4", steps=48)
    x = blurred().sample((9,))
    exact = ProbabilityFlow(mixture(), (2,), solver=solver).log_prob(x)
    density = ProbabilityFlow(mixture(), (2,), solver=solver, trace=Hutchinson(500)).score(x)
    assert ((density.value - exact).abs() < 4.5 * density.standard_error + 1e-9).all()


def test_draws_have_gradients_and_densities():
    flow = ProbabilityFlow(mixture(), (2,), solver=TIGHT)
    x, log_prob = flow.rsample_and_log_prob((5,))
    close(log_prob, flow.log_prob(x), rtol=0, atol=1e-6)
    z = torch.randn(2, dtype=F64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(flow.decode, z)
    log_det = flow.transform.log_abs_det_jacobian(z.detach(), flow.decode(z.detach()))
    close(torch.linalg.slogdet(jacobian).logabsdet, log_det, rtol=0, atol=1e-6)


def test_single_precision_stays_single():
    denoiser = MixtureDenoiser(
        PerCoordinate(), torch.ones(1), torch.tensor([MEAN]), torch.tensor(VARIANCE)
    )
    flow = ProbabilityFlow(denoiser, (2,))
    x = torch.randn(4, 2)
    assert flow.log_prob(x).dtype == flow.sample((3,)).dtype == torch.float32
    exact = ProbabilityFlow(normal(), (2,), solver=TIGHT).log_prob(x.double())
    close(flow.log_prob(x).double(), exact, rtol=0, atol=1e-3)


# --- the SDEs ---------------------------------------------------------------------------------------


def columns(value, width):
    return value.expand(*value.shape[:-1], width)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_coefficients_are_each_coordinates_own(eta):
    u = torch.linspace(0, 1, 5, dtype=F64)
    builds = [lambda d, n: ForwardSDE(d.process, (n,)), lambda d, n: ReverseSDE(d, (n,), eta)]
    for build in builds:
        whole = build(normal(), 2).nodes(u)
        parts = [build(alone(i), 1).nodes(u) for i in PAIR]
        for k, value in enumerate(whole[:3]):
            if value is not None:
                close(columns(value, 2), torch.cat([columns(p[k], 1) for p in parts], -1))
        y = torch.randn(5, 2, dtype=F64)
        for noise_type in ("additive", "diagonal"):
            sde, t = build(normal(), 2), torch.tensor(0.3, dtype=F64)
            sde.noise_type = noise_type
            apart = [build(alone(i), 1).f(t, y[:, i : i + 1]) for i in PAIR]
            close(sde.f(t, y), torch.cat(apart, -1))


METHODS = [SDESolver("euler", steps=12), SDESolver("heun", steps=12), SDESolver("srk", steps=12)]


@pytest.mark.parametrize("solver", METHODS, ids=repr)
def test_paths_have_the_marginals_moments(solver):
    # From the exact x_1 to x_0 of independent normals: means and variances within 4.5 standard errors of
    # 20 000 rows of those of each coordinate alone. 12 numbers: false alarms below 1e-4.
    start = PerCoordinate().level(1.0)
    mean, std = (
        start.alpha * torch.tensor(MEAN, dtype=F64),
        (start.alpha**2 * VARIANCE + start.sigma**2).sqrt(),
    )
    y = mean + std * torch.randn(20_000, 2, dtype=F64)
    whole = solver(ReverseSDE(normal(), (2,)), y)
    for i in PAIR:
        part = solver(ReverseSDE(alone(i), (1,)), y[:, i : i + 1])[:, 0]
        mine = whole[:, i]
        gap = (mine.mean() - part.mean()) / (2 * part.var() / len(y)).sqrt()
        assert gap.abs() < 4.5
        assert (mine.var() / part.var()).log().abs() < 4.5 * (4 / len(y)) ** 0.5


def test_adaptive_steps_and_the_forward_sde():
    # The forward SDE from one datum ends in the process's own marginal. 4 numbers within 4.5 errors.
    process, x0 = PerCoordinate(), torch.tensor([0.5, -1.0], dtype=F64)
    first, last = process.level(0.0), process.level(1.0)
    y = first.alpha * x0 + first.sigma * torch.randn(4000, 2, dtype=F64)
    for solver in (
        SDESolver("srk", steps=60),
        SDESolver("srk", adaptive=True, rtol=1e-2, atol=1e-2),
    ):
        end = solver(ForwardSDE(process, (2,)), y)
        gap = (end.mean(0) - last.alpha * x0) / (last.sigma / len(y) ** 0.5)
        assert gap.abs().max() < 4.5
        assert (end.var(0) / last.sigma**2).log().abs().max() < 4.5 * (2 / len(y)) ** 0.5 + 0.02


def test_known_data_lead_back_to_them():
    process, x0 = PerCoordinate(), torch.randn(500, 2, dtype=F64)
    last = process.level(1.0)
    y = last.alpha * x0 + last.sigma * torch.randn_like(x0)
    end = SDESolver("euler", steps=400)(ReverseSDE(KnownData(process, x0), (2,)), y)
    first = process.level(0.0)
    residual = (end - first.alpha * x0) / first.sigma
    assert (residual.square().mean(0).log().abs() < 0.5).all()


# --- the continuous-time bound ----------------------------------------------------------------------


def test_the_integrand_is_the_sum_of_the_coordinates():
    x, t = torch.randn(6, 2, dtype=F64), torch.rand(6, dtype=F64)
    with drawing_from(SeededNoise(1)):
        whole = DiffusionSDE(normal(), (2,)).bound_terms(x, t)
    with drawing_from(SeededNoise(1)):
        noise = draw(dist.Normal(torch.zeros(6, 2, dtype=F64), 1.0).to_event(1))
    expected = 0.0
    for i in PAIR:
        rates = alone(i).process.rates(t)
        level = rates.level
        xt = level.alpha * x[:, i : i + 1] + level.sigma * noise[:, i : i + 1]
        gap = x[:, i : i + 1] - alone(i)(xt, t).mean
        expected = expected + (-0.5 * rates.log_snr * level.log_snr.exp() * gap**2).squeeze(-1)
    close(whole, expected)


def test_the_bound_is_the_log_density():
    # Exact posterior: the bound is log p up to the ends, at log-SNR 10, 7.5 and -10, -4.5. Mean of 400 000
    # estimates within 4.5 of its standard errors: a false alarm in 100 000 runs.
    x = torch.tensor([0.3, -0.2], dtype=F64)
    exact = Normal(torch.tensor(MEAN, dtype=F64), VARIANCE**0.5).log_prob(x).sum()
    sde = DiffusionSDE(normal(), (2,))
    estimates = sde.log_prob(x.expand(400_000, 2))
    error = estimates.std() / len(estimates) ** 0.5
    assert (estimates.mean() - exact).abs() < 4.5 * error + 0.01
    assert error < 0.03


# --- learned scales, and where rates are computed -----------------------------------------------------


class LearnedScales(PerCoordinate):
    """The same process, whose numbers are parameters."""

    def __init__(self, schedule=None):
        super().__init__(schedule)
        for name in ("rate", "shift", "growth"):
            value = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, torch.nn.Parameter(value))


def learned_normal(schedule=None):
    """A denoiser that is not exact for the data of the tests, under a process that learns its scales."""
    mean = torch.tensor([MEAN], dtype=F64)
    process = LearnedScales(schedule).double()
    return MixtureDenoiser(process, torch.ones(1, dtype=F64), mean, VARIANCE)


def close_rates(got, expected, **tolerance):
    for a, b in zip((*got.level, *got[1:]), (*expected.level, *expected[1:]), strict=True):
        close(a, b, **tolerance)


@pytest.mark.parametrize("make", [PerCoordinate, LearnedScales])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rates_need_no_autograd(mode, make):
    process, t = make(), torch.linspace(0, 1, 5, dtype=F64)
    expected = process.rates(t)
    with mode():
        for times in (t, t.clone()):
            got = process.rates(times)
            assert not got.log_snr.requires_grad
            close_rates(got, expected)


@pytest.mark.parametrize("make", [PerCoordinate, LearnedScales])
def test_single_precision_rates(make):
    process, t = make(), torch.linspace(0, 1, 5)
    got = process.rates(t)
    assert {v.dtype for v in (*got.level, *got[1:])} == {torch.float32}
    exact = process.rates(t.double())
    close_rates(got, exact, check_dtype=False, rtol=1e-5, atol=1e-5)


def rates_of(process, t, rate, shift, growth):
    """Rates as a function of times and of the numbers of the scales."""
    process.rate, process.shift, process.growth = rate, shift, growth
    rates = process.rates(t)
    return rates.log_snr, rates.log_alpha, rates.diffusion


NUMBERS = [torch.tensor(numbers, dtype=F64) for numbers in (RATES, SHIFTS, GROWTHS)]


def test_rates_have_gradients_to_times_and_scales():
    t = torch.tensor([0.2, 0.7], dtype=F64)
    leaves = [v.clone().requires_grad_() for v in (t, *NUMBERS)]
    assert torch.autograd.gradcheck(partial(rates_of, PerCoordinate()), leaves)


@traced
def test_compiled_rates_follow_times_and_scales():
    # Nothing of the first call stays in the program, derivatives included.
    function, first = partial(rates_of, PerCoordinate()), torch.tensor([0.2, 0.7], dtype=F64)
    compiled = torch.jit.trace(lambda *tensors: function(*tensors), (first, *NUMBERS))
    t = torch.tensor([0.1, 0.6], dtype=F64)
    others = [(v + 0.1).requires_grad_() for v in NUMBERS]
    got, expected = compiled(t, *others), function(t, *others)
    close(got, expected)
    slopes = [
        torch.autograd.grad(sum(v.sin().sum() for v in out), others) for out in (got, expected)
    ]
    close(*slopes)


@traced
def test_compiled_bounds_train_the_scales():
    denoiser, x = learned_normal(), torch.randn(4, 2, dtype=F64)
    before = denoiser.process.rate.detach().clone()

    def model(x):
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", DiffusionSDE(denoiser, (2,)), obs=x)

    svi = SVI(model, lambda x: None, Adam({"lr": 1e-2}), JitTrace_ELBO(ignore_jit_warnings=True))
    for _ in range(3):
        svi.step(x)
    assert (denoiser.process.rate != before).all() and denoiser.process.rate.isfinite().all()


def test_schedules_get_the_squared_terms_gradient_and_scales_the_bounds():
    # Both by finite differences, over fixed data, times and noise.
    schedule = LearnedSchedule(4)
    denoiser = learned_normal(schedule)
    sde, t = DiffusionSDE(denoiser, (2,)), torch.linspace(0.1, 0.9, 6, dtype=F64)
    x = torch.randn(6, 2, dtype=F64, requires_grad=True)

    def terms():
        with drawing_from(SeededNoise(3)):
            return sde.reverse_terms(x, t)

    def differences(parameter, power):
        out = torch.zeros_like(parameter)
        with torch.no_grad():
            for i in range(len(parameter)):
                values = []
                for step in (1e-6, -1e-6):
                    parameter[i] += step
                    values.append(terms().pow(power).sum())
                    parameter[i] -= step
                out[i] = (values[0] - values[1]) / 2e-6
        return out

    process = denoiser.process
    schedule_parameters = list(process.schedule.parameters())
    scales = [process.rate, process.shift, process.growth]
    got = torch.autograd.grad(terms().sum(), [*schedule_parameters, *scales, x])
    powers = [2] * len(schedule_parameters) + [1] * len(scales)
    for gradient, parameter, power in zip(
        got, [*schedule_parameters, *scales], powers, strict=False
    ):
        close(gradient, differences(parameter, power), rtol=1e-4, atol=1e-4)
    for parameter in schedule_parameters:
        parameter.requires_grad_(False)
    close(got[-1], torch.autograd.grad(terms().sum(), x)[0])


@traced
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_draws_by_a_fixed_method_can_be_compiled():
    flow = ProbabilityFlow(normal(), (2,), solver=ODESolver("rk4", steps=4))
    z, other = torch.randn(2, 5, 2, dtype=F64)
    compiled = torch.jit.trace(flow.decode, (z,), check_trace=False)
    close(compiled(other), flow.decode(other))
    with pytest.raises(ValueError, match=r"got a density under torch.jit.trace.*without Jit"):
        torch.jit.trace(flow.log_prob, (z,), check_trace=False)


def test_nothing_else_needs_autograd():
    with torch.inference_mode():
        x = torch.randn(3, 2, dtype=F64)
        sde, flow = (
            DiffusionSDE(normal(), (2,), solver=SDESolver("heun", steps=4)),
            ProbabilityFlow(normal(), (2,)),
        )
        assert sde.sample((3,)).isfinite().all() and sde.log_prob(x).isfinite().all()
        close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-3)
        inside = flow.log_prob(x)
    close(inside, ProbabilityFlow(normal(), (2,)).log_prob(x.clone()), rtol=0, atol=1e-3)
