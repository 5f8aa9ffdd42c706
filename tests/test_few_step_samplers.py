"""Few-step samplers against their papers' formulas, exact flows, exact laws and their declared orders."""

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from pyro_diffusion.denoisers import (
    Data,
    EDMPreconditioning,
    Noise,
    TableDenoiser,
    V,
    Velocity,
)
from pyro_diffusion.processes import GaussianProcess, Uniform
from pyro_diffusion.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    DPMSolverPP,
    Heun,
    UniPC,
    simulate,
)
from pyro_diffusion.samplers.exponential import average_weights, step_rule
from pyro_diffusion.schedules import EDM, Cosine, LogLinear, Rectified, karras, uniform_log_snr
from tests.exact import DTYPES, SCHEDULES, Gauge, mixture, mixture_law
from tests.sampler_table import DETERMINISTIC, READINGS, STOCHASTIC, grid, normal_data, start

F64 = torch.float64
each_reading = pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
each_deterministic = pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
each_stochastic = pytest.mark.parametrize("sampler", STOCHASTIC, ids=repr)
each_sampler = pytest.mark.parametrize("sampler", DETERMINISTIC + STOCHASTIC, ids=repr)


class Counting:
    """Counts the reads of a denoiser."""

    def __init__(self, denoiser):
        self.reads = 0
        denoiser.register_forward_hook(self)

    def __call__(self, *_):
        self.reads += 1


# Contract


@each_sampler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_shapes_and_evaluations(sampler, dtype, batch):
    denoiser = mixture(Cosine()).to(dtype)
    counting = Counting(denoiser)
    x = torch.randn(*batch, 2, dtype=dtype)
    for steps in (1, 2, 6):
        counting.reads = 0
        x0 = simulate(denoiser, uniform_log_snr(Cosine(), steps, dtype), x, sampler)
        assert x0.shape == x.shape and x0.dtype == dtype
        assert bool(torch.isfinite(x0).all())
        assert counting.reads == steps * sampler.evaluations


@each_sampler
def test_images(sampler):
    """Any event shape: an image of independent coordinates is its coordinates."""
    flat = normal_data(Cosine())

    class Image(type(flat)):
        def forward(self, xt, t, **context):
            mean = super().forward(xt.unsqueeze(-1), t).mean.squeeze(-1)
            return self.process.point_mass(mean)

    image = normal_data(Cosine())
    image.__class__ = Image
    image.process = GaussianProcess(Cosine(), event_dim=3)
    x = torch.randn(2, 1, 3, 3, dtype=F64)
    times = grid(Cosine(), 5)
    torch.manual_seed(1)
    pixels = simulate(image, times, x, sampler)
    torch.manual_seed(1)
    assert_close(pixels.reshape(-1, 1), simulate(flat, times, x.reshape(-1, 1), sampler))


@each_sampler
def test_orders_are_declared(sampler):
    deterministic = sampler in DETERMINISTIC
    assert (sampler.order is not None) == deterministic
    assert (sampler.weak_order is None) == deterministic
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(
            simulate(mixture(Cosine()), grid(Cosine(), 4), torch.ones(2, dtype=F64), sampler)
        )
    assert torch.equal(*runs) == deterministic


@each_deterministic
def test_rows_are_independent(sampler):
    denoiser = mixture(Cosine())
    x, times = start(denoiser, 4), grid(Cosine(), 8)
    whole = simulate(denoiser, times, x, sampler)
    for i in range(4):
        assert_close(whole[i], simulate(denoiser, times, x[i], sampler), rtol=1e-9, atol=1e-9)


@each_sampler
def test_the_scale_of_the_state_does_not_matter(sampler):
    """The same log-SNRs under three scales, the same noise: the same x / alpha."""
    ends = []
    plain = LogLinear(9.0, -9.0)
    for schedule in (
        plain,
        Gauge(3.0, 9.0, -9.0),
        Rectified(9.0, -9.0),
        EDM(math.exp(-4.5), math.exp(4.5)),
    ):
        denoiser = mixture(schedule, point_mass=True)
        times = schedule.time_of_log_snr(plain.log_snr(grid(plain, 7)))
        level = schedule.level(times)
        torch.manual_seed(5)
        x = simulate(denoiser, times, level.sigma[-1] * torch.ones(3, 2, dtype=F64), sampler)
        ends.append(x / level.alpha[0])
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_walked(name):
    schedule = SCHEDULES[name]()
    denoiser = mixture(schedule)
    x = start(denoiser, 64)
    ends = [simulate(denoiser, grid(schedule, n), x, AdamsMoulton()) for n in (32, 1024)]
    assert float((ends[0] - ends[1]).abs().median()) < 2e-3


def test_gradient_through_a_deterministic_walk():
    denoiser = mixture(LogLinear(4.0, -4.0))
    x = torch.randn(2, 2, dtype=F64, requires_grad=True)
    for sampler in (AdamsMoulton(), DPMSolverPP(), Heun()):
        times = grid(LogLinear(4.0, -4.0), 4)
        assert torch.autograd.gradcheck(lambda x: simulate(denoiser, times, x, sampler), x)  # noqa: B023


# Algebra


@pytest.mark.parametrize("h", [1e-8, 0.01, 0.7, 3.0, -0.7, -3.0])
@pytest.mark.parametrize("c", [1, 2])
def test_moments_of_the_data_weight(h, c):
    """Averages under exp(-z (1 - theta)), z = c h, by their recurrence (by their limit for tiny h)."""
    h = torch.tensor([h], dtype=F64)
    z = c * h
    moments = step_rule(Data(), 0 * h - 1, h, z, 4).moments[0]
    if abs(h) < 1e-6:
        expected = 1 / torch.arange(1, 5, dtype=F64)
        assert_close(moments, expected, rtol=1e-7, atol=0)
        return
    integrals = [-torch.expm1(-z) / z]
    for k in range(1, 4):
        integrals.append((1 - k * integrals[-1]) / z)
    expected = torch.cat(integrals) / integrals[0]
    assert_close(moments, expected, rtol=1e-7 if abs(h) < 0.1 else 1e-12, atol=1e-12)


@each_reading
def test_a_constant_reading_is_integrated_exactly(reading):
    """F kept: x_0 = c_skip x + c_out F moves linearly; one step is a fine midpoint walk's limit."""
    late, h = torch.tensor([-1.0], dtype=F64), torch.tensor([0.8], dtype=F64)
    rule = step_rule(reading, late, h, h, 1)
    count = 20_000
    fine = torch.linspace(-1.0, -0.2, count + 1, dtype=F64)
    middle = (fine[1:] + fine[:-1]) / 2
    alpha, sigma = torch.sigmoid(2 * middle).sqrt(), torch.sigmoid(-2 * middle).sqrt()
    skip, out = reading.skip_out(alpha, sigma)
    # w = x / sigma: dw = e^u (skip sigma w + out F) du, midpoint rule on log-growth and source.
    growth = torch.exp(alpha * skip * 0.8 / count)
    source = torch.exp(middle) * out * 0.8 / count
    for w0, f in ((1.0, 0.0), (0.0, 1.0)):
        w = w0
        for g, b in zip(growth.tolist(), source.tolist(), strict=True):
            w = g * w + math.sqrt(g) * b * f
        x0 = (w - w0) / (math.exp(-0.2) - math.exp(-1.0))
        assert float(rule.state * w0 + rule.moments[0, 0] * f) == pytest.approx(
            x0, rel=1e-7, abs=1e-9
        )


def test_weights_average_polynomials():
    nodes = torch.tensor([[0.0, -0.7, -1.9]], dtype=F64)
    moments = torch.tensor([[1.0, 0.6, 0.4]], dtype=F64)
    weights = average_weights(nodes, moments)
    for coefficients in torch.eye(3, dtype=F64):
        values = sum(a * nodes**k for k, a in enumerate(coefficients))
        assert_close((weights * values).sum(), (coefficients * moments).sum())


def table(schedule, times):
    """Names of the papers, walked order: lambda is half our log-SNR."""
    level = schedule.level(times.flip(0))
    return level.alpha, level.sigma, 0.5 * level.log_snr


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_pp(eta):
    """Algorithm 2 of arXiv 2211.01095 and its SDE form (appendix A.6), on an uneven grid."""
    schedule = Cosine()
    denoiser = mixture(schedule, point_mass=True)
    times, x = karras(schedule, 7, dtype=F64), torch.randn(5, 2, dtype=F64)
    torch.manual_seed(3)
    result = simulate(denoiser, times, x, DPMSolverPP(eta))
    torch.manual_seed(3)
    alpha, sigma, lam = table(schedule, times)
    before = None
    for i in range(1, 8):
        h = lam[i] - lam[i - 1]
        mean = denoiser(x, times.flip(0)[i - 1]).mean
        d = mean
        if before is not None:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * mean - 1 / (2 * r) * before
        if eta:
            noise = torch.normal(torch.zeros_like(x), torch.ones_like(x))
            x = sigma[i] / sigma[i - 1] * torch.exp(-h) * x - alpha[i] * torch.expm1(-2 * h) * d
            x = x + sigma[i] * (-torch.expm1(-2 * h)).sqrt() * noise
        else:
            x = sigma[i] / sigma[i - 1] * x - alpha[i] * torch.expm1(-h) * d
        before = mean
    assert_close(result, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc(p):
    """Section 3 of arXiv 2302.04867 with data prediction and bh2, on an uneven grid."""
    schedule = Cosine()
    denoiser = mixture(schedule, point_mass=True)
    times, x = karras(schedule, 7, dtype=F64), torch.randn(5, 2, dtype=F64)
    result = simulate(denoiser, times, x, UniPC(p))
    alpha, sigma, lam = table(schedule, times)

    def combine(i, base, means, r, order_of_rho):
        """x_i from x_{i-1}: r and means of the differences, rho solving R rho B(h) = phi."""
        h = lam[i] - lam[i - 1]
        phi, factorial, rows, right = torch.expm1(-h) / -h - 1, 1, [], []
        big = torch.expm1(-h)
        for k in range(1, len(r) + 1):
            rows.append(r ** (k - 1))
            factorial *= k
            right.append(phi * factorial / big)
            phi = phi / -h - 1 / (factorial * (k + 1))
        if order_of_rho == 1:
            rho = torch.full((1,), 0.5, dtype=F64)
        else:
            rho = torch.linalg.solve(torch.stack(rows), torch.stack(right))
        moved = sigma[i] / sigma[i - 1] * base - alpha[i] * big * means[0]
        differences = [(m - means[0]) / a for m, a in zip(means[1:], r, strict=True)]
        return moved - alpha[i] * big * sum(a * d for a, d in zip(rho, differences, strict=True))

    means, last = [], None
    for i in range(7):
        mean = denoiser(x, times.flip(0)[i]).mean
        if last is not None:
            base, order = last
            past = [(lam[i - 1 - m] - lam[i - 1]) / (lam[i] - lam[i - 1]) for m in range(1, order)]
            r = torch.stack([*past, torch.ones((), dtype=F64)])
            x = combine(i, base, [means[0], *means[1:order], mean], r, len(r))
        means = [mean, *means]
        order = min(p, i + 1)
        h = lam[i + 1] - lam[i]
        past = [(lam[i - m] - lam[i]) / h for m in range(1, order)]
        last = (x, order)
        if past:
            x = combine(i + 1, x, means[:order], torch.stack(past), len(past))
        else:
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * mean
    assert_close(result, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("churn", [0.0, 3.0, 100.0])
def test_heun_is_algorithm_two_of_edm(churn):
    """arXiv 2206.00364 with S_noise 1.01 and noise renewed between 0.05 and 5."""
    schedule = EDM(0.01, 20.0)
    denoiser = mixture(schedule, point_mass=True)
    times, x = karras(schedule, 8, dtype=F64), 20 * torch.randn(5, 2, dtype=F64)
    torch.manual_seed(3)
    result = simulate(denoiser, times, x, Heun(churn, noise=1.01, between=(0.05, 5.0)))
    torch.manual_seed(3)
    sigma = schedule.sigma(times).flip(0)

    def slope_at(x, sigma):
        return (x - denoiser(x, schedule.time_of_log_snr(-2 * sigma.log())).mean) / sigma

    for i in range(8):
        gamma = min(churn / 8, math.sqrt(2) - 1) if 0.05 <= sigma[i] <= 5 else 0.0
        raised = sigma[i] * (1 + gamma)
        if churn:
            noise = torch.normal(torch.zeros_like(x), torch.ones_like(x))
            x = x + 1.01 * (raised**2 - sigma[i] ** 2).clamp(min=0).sqrt() * noise
        first = slope_at(x, raised)
        euler = x + (sigma[i + 1] - raised) * first
        x = x + (sigma[i + 1] - raised) * (first + slope_at(euler, sigma[i + 1])) / 2
    assert_close(result, x, rtol=1e-7, atol=1e-7)


def test_first_order_is_ddim():
    denoiser = mixture(Cosine(), point_mass=True)
    x, times = start(denoiser, 5), grid(Cosine(), 6)
    for eta in (0.0, 0.4, 1.0):
        ends = []
        for sampler in (DDIM(eta), AdamsBashforth(1, eta)):
            torch.manual_seed(2)
            ends.append(simulate(denoiser, times, x, sampler))
        assert_close(*ends, rtol=1e-10, atol=1e-10)


# Exact


@each_deterministic
def test_certain_data_is_reached_in_one_step(sampler):
    """Data at one point: the posterior mean stays, so no step errs that reads x_0, noise or velocity."""
    denoiser = normal_data(Cosine(), 0.6, 1e-14)
    times, x = grid(Cosine(), 1), torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    level = Cosine().level(times)
    expected = level.alpha[0] * 0.6 + level.sigma[0] / level.sigma[1] * (x - level.alpha[1] * 0.6)
    reading = getattr(sampler, "extrapolate", Data())
    exact = isinstance(reading, Data | Noise | Velocity)
    error = float((simulate(denoiser, times, x, sampler) - expected).abs().max())
    assert (error < 1e-6) == exact


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("steps", [1, 5])
def test_rosenbrock_is_exact_on_normal_data_of_its_scale(order, steps):
    """Centred normal data of standard deviation s: EDM's output is zero, so the whole flow is integrated."""
    denoiser = normal_data(Cosine(), 0.0, 0.49)
    times, x = grid(Cosine(), steps), torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    first, end = denoiser.marginal(times[0]), denoiser.marginal(times[-1])
    sampler = AdamsBashforth(order, extrapolate=EDMPreconditioning(0.7))
    expected = (first.variance / end.variance).sqrt() * x
    assert_close(simulate(denoiser, times, x, sampler), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "sampler",
    [AdamsMoulton(), AdamsMoulton(eta=1.0), DPMSolverPP(1.0), AdamsBashforth(3, 0.5), Heun(20.0)],
)
def test_samples_follow_the_mixture(sampler):
    """Kolmogorov-Smirnov tests at 1e-4 of both coordinates (false alarms 2e-4 a sampler); 2000 draws."""
    denoiser = mixture(Cosine())
    x = simulate(denoiser, grid(Cosine(), 60), start(denoiser, 2000), sampler)
    exact = mixture_law().sample((100_000,))
    for i in (0, 1):
        assert stats.ks_2samp(x[:, i].numpy(), exact[:, i].numpy()).pvalue > 1e-4


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamsBashforth(0), r"^order: got 0, expected an integer >= 1"),
        (lambda: AdamsBashforth(5), r"^order: got 5, expected an integer from 1 to 4"),
        (lambda: AdamsBashforth(2, 1.5), r"^eta: got 1.5"),
        (lambda: AdamsBashforth(2, extrapolate="v"), r"^extrapolate: got 'v'.*Data\(\)"),
        (
            lambda: AdamsBashforth(2, 0.5, V()),
            r"^extrapolate: got V\(\) with eta=0.5, expected Data",
        ),
        (lambda: AdamsMoulton(1), r"^order: got 1, expected an integer >= 2"),
        (lambda: AdamsMoulton(5), r"^order: got 5, expected an integer from 2 to 4"),
        (lambda: DPMSolverPP(-0.1), r"^eta: got -0.1"),
        (lambda: UniPC(0), r"^predictor_order: got 0"),
        (lambda: UniPC(4), r"^predictor_order: got 4, expected an integer from 1 to 3"),
        (lambda: Heun(-1.0), r"^churn: got -1.0"),
        (lambda: Heun(math.inf), r"^churn: got inf"),
        (lambda: Heun(noise=0.0), r"^noise: got 0.0"),
        (lambda: Heun(between=(1.0, 0.5)), r"^between: got \(1.0, 0.5\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", [AdamsMoulton(), DPMSolverPP(), UniPC(), Heun()], ids=repr)
def test_symbols_are_refused(sampler):
    denoiser = TableDenoiser(Uniform(Cosine(), 3), torch.ones(3, 3))
    with pytest.raises(
        ValueError,
        match=r"^sampler: got .* under Uniform, which lacks bridges .*, expected Ancestral",
    ):
        simulate(denoiser, grid(Cosine(), 2), torch.zeros(2, dtype=torch.int64), sampler)


def test_infinite_ends_are_refused():
    denoiser = mixture(Rectified.full())
    times = torch.linspace(0, 1, 5, dtype=F64)
    with pytest.raises(ValueError, match=r"^schedule: got Rectified with log-SNR inf to -inf"):
        simulate(denoiser, times, torch.zeros(2, dtype=F64), AdamsMoulton())
    start, end = (denoiser.process.level(times[i : i + 4]) for i in (0, 1))
    with pytest.raises(
        ValueError, match=r"^schedule: got an infinite log-SNR .* expected finite ends"
    ):
        AdamsMoulton().coefficients(denoiser.process, start, end)


def test_long_steps_are_corrected_less():
    """In full up to .7 in half log-SNR, half at 1.2, from 1.7 on not at all; UniPC always, as published."""

    class Always(AdamsMoulton):
        corrected = None

    half = torch.tensor([0.0, 0.3, 1.0, 2.2, 3.9, 6.0, 6.5], dtype=F64)  # its steps .3 to 2.1
    process = GaussianProcess(LogLinear(13.0, 0.0))
    times = (1 - half / 6.5).flip(0)
    levels = [process.level(part) for part in (times[:-1], times[1:])]
    steps = 0.5 * (levels[0].log_snr - levels[1].log_snr)
    found, full = (s.coefficients(process, *levels).correction for s in (AdamsMoulton(), Always()))
    share = ((1.7 - steps) / 1.0).clamp(0, 1)[1:]  # a step's correction is made by the one after
    assert share.min() == 0 and share.max() == 1 and ((share > 0) & (share < 1)).any()
    assert_close(found[:-1], share.unsqueeze(-1) * full[:-1])
    unipc = UniPC(3).coefficients(process, *levels).correction
    assert (unipc[:-1].abs().amax((-1, -2)) > 0).all()


def test_repr():
    assert repr(AdamsMoulton()) == "AdamsMoulton(order=4, eta=0, V())"
    assert repr(UniPC(2)) == "UniPC(predictor_order=2)"
    assert repr(DPMSolverPP(1.0)) == "DPMSolverPP(eta=1)"
    assert repr(Heun(2.0)) == "Heun(churn=2, noise=1)"
