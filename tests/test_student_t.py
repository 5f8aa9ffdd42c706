"""Student-t noise against closed forms, quadrature and the Gaussian process."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from pyro.distributions import Delta, Normal
from scipy import stats
from torch.distributions import kl_divergence

from pyro_diffusion import nn
from pyro_diffusion.denoisers import (
    GaussianDenoiser,
    LevelsDenoiser,
    MixtureDenoiser,
    Score,
    TimeVariance,
)
from pyro_diffusion.distributions import (
    Diffusion,
    DiffusionSDE,
    NormalDecoder,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.processes import (
    Ability,
    GaussianProcess,
    SeededNoise,
    StudentTProcess,
    draw,
    drawing_from,
)
from pyro_diffusion.processes.multivariate_t import DiagonalStudentT
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.samplers import (
    DDIM,
    AdamsMoulton,
    Ancestral,
    Heun,
    Langevin,
    PredictorCorrector,
    RePaint,
    simulate,
)
from pyro_diffusion.schedules import Cosine, LogLinear, VarianceExploding, uniform
from tests.atoms import F64, AtomsDenoiser, ExactStudentT, IntegersDenoiser

close = torch.testing.assert_close
FALSE_ALARM = 1e-4  # of every Kolmogorov-Smirnov or chi-square test below


def t1(loc, scale, df):
    """Of one coordinate, batch (n,)."""
    loc, scale = (torch.as_tensor(v, dtype=F64).reshape(-1, 1) for v in (loc, scale))
    return DiagonalStudentT(df, loc, scale, 1)


def line(df):
    """A grid over the real line, dense at 0 and far out, and its trapezoidal weights."""
    u = torch.linspace(-48.0, 48.0, 24001, dtype=F64)
    return torch.sinh(u), torch.cosh(u) * (u[1] - u[0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The distribution.


@pytest.mark.parametrize("df", [0.5, 3.0, 2e4])
def test_density_is_scipys(df):
    loc, scale = torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    x = torch.randn(7, 2, dtype=F64)
    ours = DiagonalStudentT(df, loc, scale, 1).log_prob(x)
    close(ours, torch.tensor(stats.multivariate_t(loc, np.diag(scale**2), df).logpdf(x)))
    shared = DiagonalStudentT(df, loc, scale[:1], 1).log_prob(x)
    close(shared, DiagonalStudentT(df, loc, scale[:1].expand(2), 1).log_prob(x))


def test_the_kernel_is_that_of_pfgm_plus_plus():
    """With D further dimensions it is (|x - y|^2 + r^2)^(-(N + D)/2), r = sigma sqrt(D)."""
    extra, process = 5.0, StudentTProcess(VarianceExploding(0.01, 50.0), 5.0)
    y, x = torch.randn(2, 9, 3, dtype=F64)
    level = process.level(0.6, y)
    r2 = extra * level.sigma.square()
    kernel = -(3 + extra) / 2 * ((x - y).square().sum(-1) + r2).log()
    gap = process.marginal(y, 0.6).log_prob(x) - kernel
    close(gap, gap[:1].expand(9))


@pytest.mark.parametrize("df", [0.5, 1.0, 3.0, 30.0, 1e6])
@pytest.mark.parametrize("p", [(0.0, 1.0), (0.3, 1.2), (-2.0, 0.1), (1e-3, 50.0), (0.0, 1.001)])
def test_divergence_is_the_integral(df, p):
    here, there = t1(*p, df), t1(0.0, 1.0, df)
    z, weight = line(df)
    x = p[0] + p[1] * z
    lp, lq = (d.log_prob(x.unsqueeze(-1)) for d in (here, there))
    wanted = (lp.exp() * (lp - lq) * weight * p[1]).sum()
    close(kl_divergence(here, there)[0], wanted, rtol=1e-6, atol=1e-9)
    single = DiagonalStudentT(df, here.loc.float(), here.scale.float(), 1)
    other = DiagonalStudentT(df, there.loc.float(), there.scale.float(), 1)
    close(kl_divergence(single, other)[0].double(), wanted, rtol=2e-3, atol=1e-5)


def test_divergence_of_several_scales_is_the_mean_log_ratio():
    """Within 5 standard errors: false alarms below 1e-6."""
    torch.manual_seed(0)
    p = DiagonalStudentT(3.0, torch.zeros(3, dtype=F64), torch.tensor([1.0, 0.5, 2.0]).double(), 1)
    q = DiagonalStudentT(
        3.0, torch.tensor([0.5, -0.5, 1.0]).double(), torch.tensor([0.7, 0.9, 1.0]).double(), 1
    )
    x = p.rsample((200_000,))
    ratio = p.log_prob(x) - q.log_prob(x)
    assert abs(kl_divergence(p, q) - ratio.mean()) < 5 * ratio.std() / len(ratio) ** 0.5
    wide = DiagonalStudentT(3.0, q.loc, torch.ones(3, dtype=F64), 1)
    alike = DiagonalStudentT(3.0, q.loc, torch.ones(1, dtype=F64), 1)
    close(kl_divergence(p, wide), kl_divergence(p, alike))


def test_divergence_is_differentiable():
    loc, scale = torch.tensor([[0.3, 1.0]], dtype=F64), torch.tensor([[0.8, 1.3]], dtype=F64)
    q = DiagonalStudentT(2.5, torch.zeros(1, 2, dtype=F64), torch.ones(1, 1, dtype=F64), 1)

    def divergence(m, s):
        return kl_divergence(DiagonalStudentT(2.5, m, s, 1), q)

    inputs = (loc.requires_grad_(), scale.requires_grad_())
    assert torch.autograd.gradcheck(divergence, inputs)


# The process.


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_bridge_over_marginal_is_the_marginal(eta):
    """By quadrature over x_t, nu = 3, in one dimension."""
    process, x0 = StudentTProcess(Cosine(), 3.0), 0.7
    z, weight = line(3.0)
    z, weight = z[::8], weight[::8] * 8
    s, t = torch.tensor(0.3, dtype=F64), torch.tensor(0.6, dtype=F64)
    level = process.level(t, z.unsqueeze(-1))
    xt = (level.alpha * x0 + level.sigma * z.unsqueeze(-1)).reshape(-1, 1)
    start = torch.full_like(xt, x0)
    share = process.marginal(start, t).log_prob(xt).exp() * weight * float(level.sigma)
    xs = torch.tensor([-3.0, -0.5, 0.2, 0.9, 6.0], dtype=F64).reshape(-1, 1, 1)
    found = (process.bridge(xt, start, s, t, eta).log_prob(xs).exp() * share).sum(-1)
    wanted = process.marginal(torch.full((5, 1), x0, dtype=F64), s).log_prob(xs[:, 0]).exp()
    close(found, wanted, rtol=1e-6, atol=1e-9)


def test_bridge_over_marginal_in_the_plane():
    """Radius and one coordinate, by Kolmogorov and Smirnov."""
    torch.manual_seed(1)
    process = StudentTProcess(Cosine(), 3.0)
    x0 = torch.tensor([0.7, -1.0], dtype=F64).expand(50_000, 2)
    xt = process.marginal(x0, 0.7).rsample()
    xs = process.bridge(xt, x0, 0.35, 0.7).rsample()
    level = process.level(0.35, x0)
    z = (xs - level.alpha * x0) / level.sigma
    assert stats.kstest(z[:, 0].numpy(), stats.t(3.0).cdf).pvalue > FALSE_ALARM
    squared = z.square().sum(-1).numpy() / 2  # F of 2 and nu degrees of freedom
    assert stats.kstest(squared, stats.f(2, 3.0).cdf).pvalue > FALSE_ALARM


class PerCoordinateT(StudentTProcess):
    def scales(self, level):
        log_snr = level.clock + torch.tensor([1.5, -1.0]).to(level.clock)
        return level._replace(
            log_snr=log_snr,
            alpha=torch.sigmoid(log_snr).sqrt(),
            sigma=torch.sigmoid(-log_snr).sqrt(),
        )


def test_scales_may_differ_by_coordinate():
    torch.manual_seed(2)
    process = PerCoordinateT(Cosine(), 3.0)
    assert Ability.ISOTROPIC not in process.abilities
    x0 = torch.tensor([0.7, -1.0], dtype=F64).expand(50_000, 2)
    xt = process.marginal(x0, 0.7).rsample()
    xs = process.bridge(xt, x0, 0.35, 0.7).rsample()
    level = process.level(0.35, x0)
    z = (xs - level.alpha * x0) / level.sigma
    for i in (0, 1):
        assert stats.kstest(z[:, i].numpy(), stats.t(3.0).cdf).pvalue > FALSE_ALARM
    assert stats.kstest(z.square().sum(-1).numpy() / 2, stats.f(2, 3.0).cdf).pvalue > FALSE_ALARM
    p, q = (process.bridge(xt[:5], x, 0.35, 0.7) for x in (x0[:5], x0[:5] + 0.3))
    x = p.rsample((100_000,))
    ratio = p.log_prob(x) - q.log_prob(x)
    error = ratio.std(0) / len(x) ** 0.5
    assert bool(((kl_divergence(p, q) - ratio.mean(0)).abs() < 5 * error).all())


def test_kernel_of_a_posterior_with_variance_has_the_moments_of_the_integral():
    """Of a normal posterior, mean and variances within 5 standard errors (false alarms below 1e-5)."""
    torch.manual_seed(3)
    process, xt = StudentTProcess(Cosine(), 8.0), torch.tensor([[1.5, -0.4]], dtype=F64)
    posterior = Normal(torch.tensor([[0.5, 0.1]]).double(), torch.tensor([[0.6, 0.3]]).double())
    kernel = process.reverse(xt, posterior.to_event(1), 0.3, 0.6)
    x0 = posterior.sample((400_000,)).squeeze(1)
    wide = xt.expand_as(x0)
    xs = process.bridge(wide, x0, 0.3, 0.6).rsample()
    for got, want in ((xs, kernel.mean), ((xs - kernel.mean).square(), kernel.variance)):
        error = got.std(0) / len(got) ** 0.5
        assert bool(((got.mean(0) - want).abs() < 5 * error).all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (F64, 1e-9)])
def test_many_degrees_of_freedom_are_the_gaussian_process(dtype, tolerance):
    schedule = Cosine()
    t, gaussian = StudentTProcess(schedule, 1e20), GaussianProcess(schedule)
    x0, xt = torch.randn(2, 6, 2, generator=seeded(), dtype=dtype)
    for call in (
        lambda p: p.marginal(x0, 0.4),
        lambda p: p.bridge(xt, x0, 0.3, 0.6),
        lambda p: p.bridge(xt, x0, 0.3, 0.6, eta=0.5),
        lambda p: p.prior((2,), dtype),
        lambda p: p.reverse(xt, Normal(x0, 0.3).to_event(1), 0.3, 0.6),
    ):
        ours, theirs = call(t), call(gaussian)
        close(ours.mean, theirs.mean)
        close(ours.variance, theirs.variance)
        close(ours.log_prob(xt), theirs.log_prob(xt), rtol=tolerance, atol=tolerance)
    p, q = (t.bridge(xt, x, 0.3, 0.6) for x in (x0, x0 + 0.2))
    a, b = (gaussian.bridge(xt, x, 0.3, 0.6) for x in (x0, x0 + 0.2))
    close(kl_divergence(p, q), kl_divergence(a, b), rtol=10 * tolerance, atol=tolerance)
    values = {}
    for process in (t, gaussian):
        torch.manual_seed(0)
        network = nn.MLP(2, (8,)).to(dtype)
        denoiser = GaussianDenoiser(
            network, process, variance=TimeVariance([-10.0, 10.0]).to(dtype)
        )
        torch.manual_seed(0)
        diffusion = Diffusion(denoiser, (2,), 20)
        flow = ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4", steps=10))
        with torch.no_grad():
            values[process] = (
                torch.stack([diffusion.log_prob(x0), flow.log_prob(x0)]),
                diffusion.replace(sampler=DDIM()).decode(xt).mean,
            )
    for ours, theirs in zip(values[t], values[gaussian], strict=True):
        close(ours, theirs, rtol=20 * tolerance, atol=20 * tolerance)


def test_a_million_degrees_of_freedom_in_single_precision():
    process, gaussian = StudentTProcess(Cosine(), 1e6), GaussianProcess(Cosine())
    x0, xt = torch.randn(2, 6, 16, generator=seeded())
    for s, t in ((0.3, 0.6), (0.01, 0.012)):
        ours, theirs = (p.bridge(xt, x0, s, t) for p in (process, gaussian))
        assert bool(torch.isfinite(ours.log_prob(ours.rsample())).all())
        if s == 0.3:
            close(ours.log_prob(x0), theirs.log_prob(x0), rtol=1e-3, atol=1e-3)


# Views and samplers, on data of which everything is known.


def integers(process, count=16):
    atoms = torch.linspace(-1.8, 1.8, count, dtype=F64)
    return IntegersDenoiser(process, atoms.unsqueeze(-1), torch.exp(-0.5 * atoms.square()))


def test_bound_is_below_and_loosens_with_steps():
    """Within 4 standard errors of 0 at one step, above 0 at a thousand: false alarms below 1e-4 each."""
    torch.manual_seed(4)
    denoiser = integers(ExactStudentT(LogLinear(7.0, -14.0), 3.0))
    x = torch.multinomial(denoiser.weights, 10_000, replacement=True).unsqueeze(-1)
    truth, gaps = denoiser.weights.log()[x[:, 0]], {}
    for steps in (1, 10, 100, 1000):
        diffusion = Diffusion(denoiser, (1,), steps, decoder=QuantizedDecoder(16, -1.8, 1.8))
        gap = truth - diffusion.log_prob(x)
        gaps[steps] = (float(gap.mean()), float(gap.std()) / len(gap) ** 0.5)
        assert gaps[steps][0] > -4 * gaps[steps][1]
    assert abs(gaps[1][0]) < 4 * gaps[1][1]
    assert gaps[1000][0] > 4 * gaps[1000][1]
    assert gaps[1000][0] > gaps[100][0]


def plane(process):
    atoms = torch.tensor([[0.0, 1.0], [-1.0, 0.5], [1.2, -0.8]], dtype=F64)
    return AtomsDenoiser(process, atoms, torch.tensor([0.2, 0.5, 0.3], dtype=F64))


@pytest.mark.parametrize("kind", [StudentTProcess, PerCoordinateT])
def test_flow_has_the_density_of_the_blurred_data(kind):
    """The largest error in nats a dimension; it is what is left of the data at t = 1."""
    denoiser = plane(kind(LogLinear(4.0, -18.0), 3.0))
    level = denoiser.process.level(torch.tensor(0.0, dtype=F64))
    torch.manual_seed(5)
    blurred = denoiser.marginal(level)
    x = blurred.sample((8,))
    wanted = blurred.log_prob(x) + level.alpha.log().expand(2).sum()
    flow = ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4", steps=60))
    close(flow.log_prob(x / level.alpha), wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(), Heun(), AdamsMoulton()], ids=repr)
def test_samples_halfway_have_the_marginals_quantiles(sampler):
    """By Kolmogorov and Smirnov against the exact mixture: fourth moments are infinite."""
    exact = ExactStudentT(LogLinear(7.0, -14.0), 3.0)
    denoiser = integers(exact)
    torch.manual_seed(6)
    times = torch.linspace(0.4, 1.0, 101, dtype=F64)
    x = draw(exact.prior((1,), F64).expand((2_000,)))
    x = simulate(denoiser, times, x, sampler)
    level = exact.level(torch.tensor(0.4, dtype=F64))
    centers = (level.alpha * denoiser.atoms[:, 0]).numpy()
    weights = denoiser.weights.numpy()

    def cdf(v):
        return (weights * stats.t(3.0).cdf((v[:, None] - centers) / float(level.sigma))).sum(-1)

    assert stats.kstest(x[:, 0].numpy(), cdf).pvalue > FALSE_ALARM


def test_a_row_is_drawn_alike_in_any_batch():
    process = StudentTProcess(Cosine(), 3.0)
    x0 = torch.randn(6, 2, generator=seeded())
    whole = draw_rows(process, x0, torch.arange(6))
    part = draw_rows(process, x0[2:4], torch.arange(2, 4))
    close(part, whole[2:4])


def draw_rows(process, x0, rows):
    with drawing_from(RowNoise(3, rows)):
        return torch.stack([draw(process.marginal(x0, 0.5)), draw(process.marginal(x0, 0.7))], 1)


@pytest.mark.parametrize("make", [SeededNoise, lambda s: RowNoise(s, torch.arange(40_000))])
@pytest.mark.parametrize("df", [0.5, 3.0, 1e6])
def test_draws_of_a_source_have_the_distribution(make, df):
    base = DiagonalStudentT(df, torch.zeros(40_000, 1, dtype=F64), torch.ones(1, dtype=F64), 1)
    x = make(5).draw(base)
    assert x.shape == (40_000, 1)
    assert stats.kstest(x[:, 0].numpy(), stats.t(df).cdf).pvalue > FALSE_ALARM


def test_scoring_leaves_the_generators_alone_and_repeats():
    denoiser = GaussianDenoiser(nn.MLP(2, (8,)), StudentTProcess(Cosine(), 3.0))
    diffusion, x = Diffusion(denoiser, (2,), 10), torch.randn(5, 2)
    state = torch.get_rng_state()
    close(diffusion.log_prob(x), diffusion.log_prob(x), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_bound_trains_every_parameter():
    denoiser = GaussianDenoiser(nn.MLP(2, (8,)), StudentTProcess(Cosine(), 1.0))
    for steps in (5, 1000):
        denoiser.zero_grad()
        (-Diffusion(denoiser, (2,), steps).log_prob(torch.randn(64, 2)).mean()).backward()
        for p in denoiser.parameters():
            assert bool(torch.isfinite(p.grad).all())


def test_a_point_mass_is_decoded_by_the_noise():
    process = StudentTProcess(Cosine(), 3.0)
    level, mean = process.level(torch.tensor(0.0)), torch.randn(4, 2)
    decoder = NormalDecoder()
    kernel = decoder(Delta(mean, event_dim=1), level, process)
    wanted = DiagonalStudentT(3.0, mean, level.noise_to_signal, 1)
    x = torch.randn(4, 2)
    close(kernel.log_prob(x), wanted.log_prob(x))
    again = decoder.kernel_from(decoder.kernel_tensors(kernel), 1)
    close(again.log_prob(x), wanted.log_prob(x))
    bridge = process.bridge(x, mean, 0.3, 0.6)
    close(process.kernel_from(process.kernel_tensors(bridge)).log_prob(x), bridge.log_prob(x))


def test_copies_and_state_dicts_keep_the_degrees_of_freedom():
    process = StudentTProcess(Cosine(), 3.0)
    for again in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert again.degrees_of_freedom == 3.0
    with pytest.raises(ValueError, match="degrees_of_freedom"):
        StudentTProcess(Cosine(), 4.0).load_state_dict(process.state_dict())


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "three", 0.1])
def test_bad_degrees_of_freedom(value):
    with pytest.raises(ValueError, match=r"^degrees_of_freedom: got .*expected a finite number"):
        StudentTProcess(Cosine(), value)


def test_abilities():
    """As docs/contracts.md lists them."""
    abilities = {
        *(Ability.NUMBERS, Ability.LINEAR, Ability.INDEPENDENT, Ability.FREE_VARIANCE),
        *(Ability.ISOTROPIC, Ability.ODE),
    }
    assert StudentTProcess.abilities == abilities


def test_what_it_lacks_is_refused_by_name():
    process = StudentTProcess(Cosine(), 3.0)
    network, x = nn.MLP(2, (8,)), torch.zeros(3, 2)
    denoiser = GaussianDenoiser(network, process)
    with pytest.raises(ValueError, match="lacks a Markov transition"):
        process.transition(x, 0.2, 0.4)
    with pytest.raises(ValueError, match=r"^parameterization: got Score\(\).*Tweedie"):
        GaussianDenoiser(network, process, Score())
    with pytest.raises(ValueError, match="Tweedie"):
        MixtureDenoiser(process, torch.ones(1), torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match=r"lacks a likelihood q\(x_t,i"):
        LevelsDenoiser(network, process, torch.linspace(-1, 1, 4))
    with pytest.raises(ValueError, match="stochastic differential equation"):
        DiffusionSDE(denoiser, (2,))
    times = uniform(4)
    langevin = PredictorCorrector(Ancestral(), Langevin())
    with pytest.raises(ValueError, match="Tweedie"):
        simulate(denoiser, times, x, langevin)
    with pytest.raises(ValueError, match="Markov transition"):
        simulate(denoiser, times, x, Heun(churn=2.0))
    with pytest.raises(ValueError, match="Markov transition"):
        simulate(denoiser, times, x, RePaint())
    narrow = StudentTProcess(Cosine(), 1.0)
    posterior = Normal(torch.zeros(3, 1), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"^posterior: got Normal under degrees_of_freedom=1"):
        narrow.reverse(torch.zeros(3, 1), posterior, 0.2, 0.4)


@pytest.mark.parametrize(
    "df, d, scale, wanted", [(0.5, 50, 0.03, 34.7708), (1.0, 50, 0.03, 55.6145)]
)
def test_the_divergence_of_narrow_distributions_of_few_degrees_of_freedom(df, d, scale, wanted):
    """Where the integrand reaches far beyond 1, against draws (false alarm 1e-6)."""
    zero = torch.zeros(d, dtype=F64)
    p, q = DiagonalStudentT(df, zero, zero + scale, 1), DiagonalStudentT(df, zero, zero + 1, 1)
    found = kl_divergence(p, q)
    assert abs(found - wanted) < 1e-3
    torch.manual_seed(0)
    x = p.sample((200_000,))
    ratio = p.log_prob(x) - q.log_prob(x)
    assert abs(found - ratio.mean()) < 5 * ratio.std() / len(ratio) ** 0.5
