"""SDEs and the probability flow under scales by coordinate: closed forms, and each coordinate alone."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import (
    ExactTrace,
    ForwardSDE,
    Hutchinson,
    HutchPlusPlus,
    KnownData,
    ODESolver,
    ReverseSDE,
    SDESolver,
)
from pyro_diffusion.processes import SeededNoise, draw, drawing_from
from tests.exact import MEANS, VARIANCES, WEIGHTS
from tests.per_coordinate import F64, MEAN, VARIANCE, PerCoordinate, alone, normal

PAIR = (0, 1)
TIGHT = ODESolver("dopri8", rtol=1e-9, atol=1e-9)
close = torch.testing.assert_close


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


METHODS = [SDESolver("euler", 12), SDESolver("heun", 12), SDESolver("srk", 12)]


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
    for solver in (SDESolver("srk", 60), SDESolver("srk", adaptive=True, rtol=1e-2, atol=1e-2)):
        end = solver(ForwardSDE(process, (2,)), y)
        gap = (end.mean(0) - last.alpha * x0) / (last.sigma / len(y) ** 0.5)
        assert gap.abs().max() < 4.5
        assert (end.var(0) / last.sigma**2).log().abs().max() < 4.5 * (2 / len(y)) ** 0.5 + 0.02


def test_known_data_leads_home():
    process, x0 = PerCoordinate(), torch.randn(500, 2, dtype=F64)
    last = process.level(1.0)
    y = last.alpha * x0 + last.sigma * torch.randn_like(x0)
    end = SDESolver("euler", 400)(ReverseSDE(KnownData(process, x0), (2,)), y)
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
