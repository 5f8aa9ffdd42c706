"""Samplers against textbook formulas, exact laws and their declared order."""

import itertools

import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    GaussianDenoiser,
    MixtureDenoiser,
    Noise,
    TableDenoiser,
)
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.samplers import DDIM, Ancestral, Sampler, State, simulate
from pyro_diffusion.samplers.base import check_sampler, recorder
from pyro_diffusion.schedules import (
    EDM,
    Cosine,
    Rectified,
    TabulatedBetas,
    VarianceExploding,
    uniform,
    uniform_log_snr,
)
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import BETAS, DTYPES, SCHEDULES, WEIGHTS, mixture, mixture_law, slope

F64 = torch.float64
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
SAMPLERS = {"ancestral": Ancestral(), "ddim": DDIM(), "ddim 0.5": DDIM(0.5), "ddim 1": DDIM(1.0)}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def start(denoiser, *batch):
    """Draws of the exact law at t = 1, so that only the steps err."""
    return denoiser.marginal(torch.ones((), dtype=F64)).sample(batch)


# Contract


@each_sampler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_shapes(sampler, dtype, batch):
    denoiser = mixture(Cosine()).to(dtype)
    x = torch.randn(*batch, 2, dtype=dtype)
    for steps in (1, 4):
        x0 = simulate(denoiser, uniform(steps, dtype), x, sampler)
        assert x0.shape == x.shape and x0.dtype == dtype
        assert bool(torch.isfinite(x0).all())


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("make", [Absorbing, Uniform])
def test_symbols(make, batch):
    denoiser = TableDenoiser(make(Rectified.full(), 3), torch.rand(3, 3))
    x = denoiser.process.prior((2,)).expand(batch).sample()
    x0 = simulate(denoiser, uniform(5), x, Ancestral())
    assert x0.shape == (*batch, 2) and x0.dtype == torch.int64
    assert int(x0.max()) < 3  # no mask is left


class Counting(nn.Module):
    """Zero noise; remembers the levels and contexts that it was asked for."""

    def __init__(self):
        super().__init__()
        self.levels, self.labels = [], []

    def forward(self, x, log_snr, label=None):
        self.levels.append(log_snr)
        self.labels.append(label)
        return torch.zeros_like(x)


@each_sampler
def test_walk(sampler):
    """One read a step, from the last time to the second; the callback sees every state once."""
    network = Counting()
    denoiser = GaussianDenoiser(network, GaussianProcess(Cosine()), Noise())
    times, x = torch.tensor([0.1, 0.2, 0.5, 0.9]), torch.randn(3, 2)
    calls = []
    label = torch.tensor([1, 2, 3])
    x0 = simulate(
        denoiser,
        times,
        x,
        sampler,
        context={"label": label},
        callback=lambda j, state: calls.append((j, state)),
    )
    expected = Cosine().log_snr(times[[3, 2, 1]])
    assert_close(torch.stack(network.levels), expected[:, None].expand(3, 3))
    assert all(torch.equal(seen, label) for seen in network.labels)
    assert [j for j, _ in calls] == [3, 2, 1, 0]
    assert torch.equal(calls[0][1], x) and torch.equal(calls[-1][1], x0)


def test_recorder():
    states, callback = recorder()
    denoiser = mixture(Cosine())
    x = torch.randn(3, 2, dtype=F64)
    x0 = simulate(denoiser, uniform(4, F64), x, DDIM(), callback=callback)
    assert len(states) == 5
    assert torch.equal(states[0], x) and torch.equal(states[-1], x0)
    # Walking the first part alone gives the same state: a step knows nothing but its state.
    middle = simulate(denoiser, uniform(4, F64)[2:], x, DDIM())
    assert torch.equal(states[2], middle)


def test_progress(capsys):
    simulate(mixture(Cosine()), uniform(3, F64), torch.zeros(2, dtype=F64), DDIM())
    assert capsys.readouterr().err == ""
    simulate(mixture(Cosine()), uniform(3, F64), torch.zeros(2, dtype=F64), DDIM(), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_sampler_of_the_users():
    """State carries history; coefficients arrive a row at a time."""

    class Counter(Sampler):
        def init(self, x):
            return State(x, (0,))

        def coefficients(self, process, s, t):
            assert s.t.shape == t.t.shape == (6, 1)
            return (t.log_snr - s.log_snr, s.t)

        def step(self, process, denoise, state, s, t, c):
            assert torch.equal(c[1], s.t) and c[0] < 0 and s.t < t.t
            return State(denoise(state.x, t).mean, (state.history[0] + 1,))

    simulate(mixture(Cosine()), uniform(6, F64), torch.zeros(2, dtype=F64), Counter())


@each_sampler
def test_randomness_is_torchs(sampler):
    denoiser, x = mixture(Cosine()), torch.randn(4, 2, dtype=F64)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(simulate(denoiser, uniform(5, F64), x, sampler))
    assert torch.equal(runs[0], runs[1])
    deterministic = isinstance(sampler, DDIM) and sampler.eta == 0
    assert torch.equal(runs[0], runs[2]) == deterministic


def test_rows_are_independent():
    denoiser = mixture(Cosine())
    x = start(denoiser, 5)
    whole = simulate(denoiser, uniform(20, F64), x, DDIM())
    for i in range(5):
        assert_close(whole[i], simulate(denoiser, uniform(20, F64), x[i], DDIM()))


# Exact


@pytest.mark.parametrize("mean_network", [lambda x: torch.sin(2 * x), lambda x: 0.3 * x + 0.1])
def test_ddim_one_on_the_table_is_ddpm(mean_network):
    """Algorithm 2 of arXiv 2006.11239 with its lower variance, over the same noise."""

    class Eps(nn.Module):
        def forward(self, x, log_snr):
            return mean_network(x)

    count = len(BETAS)
    denoiser = GaussianDenoiser(Eps(), GaussianProcess(TabulatedBetas(BETAS)), Noise())
    x = torch.randn(7, 3, dtype=F64)
    results = []
    for sampler in (DDIM(1.0), Ancestral()):
        torch.manual_seed(3)
        results.append(simulate(denoiser, uniform(count - 1, F64), x, sampler))
    torch.manual_seed(3)
    alpha_bar = torch.cumprod(1 - BETAS, 0)
    for i in range(count - 1, 0, -1):
        beta, now, before = BETAS[i], alpha_bar[i], alpha_bar[i - 1]
        mean = (x - beta / (1 - now).sqrt() * mean_network(x)) / (1 - beta).sqrt()
        deviation = ((1 - before) / (1 - now) * beta).sqrt()
        x = torch.normal(mean, deviation.expand(mean.shape))
    for result in results:
        assert_close(result, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_on_a_strided_table(eta):
    """Equation 12 of arXiv 2010.02502 on every third level, its sigma from equation 16."""

    class Eps(nn.Module):
        def forward(self, x, log_snr):
            return torch.sin(2 * x)

    denoiser = GaussianDenoiser(Eps(), GaussianProcess(TabulatedBetas(BETAS)), Noise())
    kept = list(range(0, len(BETAS), 3))
    times = uniform(len(BETAS) - 1, F64)[kept]
    x = torch.randn(7, 3, dtype=F64)
    torch.manual_seed(3)
    result = simulate(denoiser, times, x, DDIM(eta))
    torch.manual_seed(3)
    alpha_bar = torch.cumprod(1 - BETAS, 0)
    for before, now in reversed(list(itertools.pairwise(kept))):
        a, b = alpha_bar[now], alpha_bar[before]
        eps = torch.sin(2 * x)
        sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * x0 + (1 - b - sigma**2).sqrt() * eps
        if eta:
            x = torch.normal(x, sigma.expand(x.shape))
    assert_close(result, x, rtol=1e-9, atol=1e-9)


def test_euler_of_the_probability_flow():
    """Exploding noise: DDIM(0) is Euler's step of dx / dsigma = (x - x0hat) / sigma."""
    denoiser = mixture(EDM(0.01, 20.0))
    sigma = EDM(0.01, 20.0).sigma(uniform(9, F64))
    x = start(denoiser, 6)
    result = simulate(denoiser, uniform(9, F64), x, DDIM())
    for j in range(9, 0, -1):
        noise = (x - denoiser(x, uniform(9, F64)[j]).mean) / sigma[j]
        x = x + (sigma[j - 1] - sigma[j]) * noise
    assert_close(result, x)


@each_schedule
@pytest.mark.parametrize("steps", [1, 7])
def test_normal_data_is_sampled_exactly_in_any_number_of_steps(make, steps):
    """The kernel's mean is affine; carry mean and variance through the chain: no error is left."""
    process = GaussianProcess(make())
    mean, var = torch.tensor([[0.6]], dtype=F64), 0.3
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), mean, var)
    times = uniform(steps, F64)
    law = denoiser.marginal(times[-1])
    m, v = law.mean, law.variance
    for j in range(steps, 0, -1):
        points = torch.stack([m, m + 1])
        kernel = process.reverse(points, denoiser(points, times[j]), times[j - 1], times[j])
        gain = kernel.mean[1] - kernel.mean[0]
        m, v = kernel.mean[0], kernel.variance[0] + gain**2 * v
    law = denoiser.marginal(times[0])
    assert_close(m, law.mean)
    assert_close(v, law.variance, rtol=1e-6, atol=0)


@each_schedule
def test_ancestral_samples_follow_the_mixture(make):
    """Moments at four standard errors (2 means, 3 second moments: false alarms 3e-4) and a
    Kolmogorov-Smirnov test at 1e-4 of one projection. 100 steps err far below the noise of 4000 draws.
    """
    schedule = make()
    denoiser, count = mixture(schedule), 4000
    times = uniform_log_snr(schedule, 100, F64)
    x = simulate(denoiser, times, start(denoiser, count), Ancestral())
    law = denoiser.marginal(times[0])
    exact = law.sample((200_000,))
    for f in (lambda x: x, lambda x: x**2, lambda x: x.prod(-1, keepdim=True)):
        gap = f(x).mean(0) - f(exact).mean(0)
        error = f(x).std(0) * (1 / count + 1 / 200_000) ** 0.5
        assert bool((gap.abs() < 4 * error).all())
    direction = torch.tensor([0.8, 0.6], dtype=F64)
    level = schedule.level(times[0])
    centres = level.alpha * (denoiser.means @ direction)
    scales = (level.alpha**2 * denoiser.variances + level.sigma**2).sqrt()

    def cdf(y):
        parts = stats.norm.cdf(y[:, None], centres.numpy(), scales.numpy())
        return parts @ WEIGHTS.numpy()

    assert stats.kstest((x @ direction).numpy(), cdf).pvalue > 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_samples_the_mixture(eta):
    """Kolmogorov-Smirnov tests at 1e-4 of both coordinates (false alarms 2e-4); 200 steps, 2000 draws."""
    schedule = Cosine()
    denoiser = mixture(schedule)
    times = uniform_log_snr(schedule, 200, F64)
    x = simulate(denoiser, times, start(denoiser, 2000), DDIM(eta))
    exact = mixture_law().sample((100_000,))
    for i in (0, 1):
        assert stats.ks_2samp(x[:, i].numpy(), exact[:, i].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("make", [Absorbing, Uniform])
def test_one_symbol_is_sampled_exactly_in_any_number_of_steps(make):
    """Multiply the chain's kernels over all states: the law of the data, to float error."""
    process = make(Rectified.full(), 4)
    data = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    denoiser = TableDenoiser(process, data)
    every = torch.arange(len(process.noise))[:, None]
    for steps in (1, 2, 5):
        times = uniform(steps, F64)
        law = per_coordinate(process.prior((1,), dtype=F64)).probs[0]
        for j in range(steps, 0, -1):
            posterior = denoiser(every, times[j])
            kernel = process.reverse(every, posterior, times[j - 1], times[j])
            law = law @ per_coordinate(kernel).probs[:, 0]
        assert_close(law[:4], data, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [Absorbing, Uniform])
def test_symbols_follow_their_table(make):
    """Chi-squared at 1e-4 over nine sequences; 60 steps leave an error far below 5000 draws' noise."""
    joint = torch.tensor([[6.0, 1.0, 1.0], [1.0, 4.0, 2.0], [1.0, 3.0, 5.0]])
    denoiser = TableDenoiser(make(Rectified.full(), 3), joint)
    x = denoiser.process.prior((2,)).expand((5000,)).sample()
    x0 = simulate(denoiser, uniform(60), x, Ancestral())
    counts = torch.bincount(3 * x0[:, 0] + x0[:, 1], minlength=9)
    expected = joint.double().reshape(-1) / joint.double().sum() * 5000
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4


def test_categorical_denoiser_walks():
    """A network of constant logits under masking: every symbol is drawn from its softmax.

    Chi-squared at 1e-4 over three symbols, 6000 draws.
    """
    logits = torch.tensor([0.0, 1.0, -1.0])

    class Prior(nn.Module):
        def forward(self, x, log_snr):
            return logits.expand(*x.shape, 3)

    denoiser = CategoricalDenoiser(Prior(), Absorbing(Rectified.full(), 3))
    x = denoiser.process.prior((2,)).expand((3000,)).sample()
    x0 = simulate(denoiser, uniform(4), x, Ancestral())
    counts = torch.bincount(x0.flatten(), minlength=4)
    assert int(counts[3]) == 0
    expected = logits.double().softmax(-1) * 6000
    assert stats.chisquare(counts[:3].numpy(), expected.numpy()).pvalue > 1e-4


# Order


@pytest.mark.parametrize("name", ["cosine", "linear beta", "exploding", "rectified"])
def test_ddim_is_of_first_order(name):
    schedule = SCHEDULES[name]()
    denoiser = mixture(schedule)
    x = start(denoiser, 64)

    def solve(steps):
        return simulate(denoiser, uniform_log_snr(schedule, steps, F64), x, DDIM())

    # Richardson's extrapolation of two fine walks stands in for the exact flow.
    reference = 2 * solve(2048) - solve(1024)
    steps = [32, 64, 128, 256]
    errors = [float((solve(n) - reference).abs().mean()) for n in steps]
    assert slope(steps, errors) == pytest.approx(1, abs=0.25)


def test_ddim_walks_both_ways():
    """Down and up again: what is missing falls in the first order of the step."""
    schedule = Cosine()
    denoiser = mixture(schedule)
    x = start(denoiser, 64)
    steps, errors = [64, 128, 256, 512], []
    for n in steps:
        times = uniform_log_snr(schedule, n, F64)
        data = simulate(denoiser, times, x, DDIM())
        errors.append(float((simulate(denoiser, times.flip(0), data, DDIM()) - x).abs().mean()))
    assert errors[-1] < 0.02
    assert slope(steps, errors) == pytest.approx(1, abs=0.25)


def test_ddim_keeps_the_deterministic_map_of_normal_data():
    """The flow of normal data is affine, x_0 - mean = sqrt(var / var_1) (x_1 - mean_1): its fine limit."""
    process = GaussianProcess(Cosine())
    denoiser = MixtureDenoiser(
        process, torch.ones(1, dtype=F64), torch.full((1, 1), 0.6, dtype=F64), 0.3
    )
    times = uniform_log_snr(process.schedule, 2000, F64)
    end, first = denoiser.marginal(times[-1]), denoiser.marginal(times[0])
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    expected = first.mean + (first.variance / end.variance).sqrt() * (x - end.mean)
    assert_close(simulate(denoiser, times, x, DDIM()), expected, rtol=0, atol=3e-3)


def test_gradient_through_a_deterministic_walk():
    denoiser = mixture(VarianceExploding(0.1, 5.0))
    x = torch.randn(2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: simulate(denoiser, uniform(4, F64), x, DDIM()), x)


# Bad input


@pytest.mark.parametrize("bad", ["ddim", None, DDIM, 3])
def test_unknown_sampler(bad):
    with pytest.raises(ValueError, match=r"^sampler: got .*expected a Sampler such as Ancestral"):
        check_sampler(bad)
    with pytest.raises(ValueError, match=r"^sampler: got"):
        simulate(mixture(Cosine()), uniform(2, F64), torch.zeros(2, dtype=F64), bad)


def test_check_sampler_passes_on():
    sampler = DDIM(0.5)
    assert check_sampler(sampler) is sampler
    assert repr(sampler) == "DDIM(eta=0.5)"


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta(eta):
    with pytest.raises(ValueError, match=r"^eta: got .*expected a number in \[0, 1\]"):
        DDIM(eta)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_refuses_symbols(eta):
    denoiser = TableDenoiser(Uniform(Cosine(), 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"^sampler: got DDIM.*free variance.* expected Ancestral"):
        simulate(denoiser, uniform(2), torch.zeros(2, dtype=torch.int64), DDIM(eta))


def test_the_base_sampler_is_abstract():
    with pytest.raises(NotImplementedError):
        simulate(mixture(Cosine()), uniform(2, F64), torch.zeros(2, dtype=F64), Sampler())


# Precision and checks


def test_ddim_one_on_symbols_is_ancestral_or_refused():
    denoiser = TableDenoiser(Uniform(Cosine(), 3), torch.ones(3, 3))
    try:
        simulate(denoiser, uniform(2), torch.zeros(2, dtype=torch.int64), DDIM(1.0))
    except ValueError as error:
        assert "process" in str(error) or "sampler" in str(error)


def test_a_float32_grid_walks_a_float64_state_in_float64():
    denoiser, x = mixture(Cosine()), torch.ones(2, dtype=F64)
    single = simulate(denoiser, uniform(4), x, DDIM())
    assert_close(single, simulate(denoiser, uniform(4, F64), x, DDIM()), rtol=1e-12, atol=1e-12)


def test_the_network_sees_one_dtype():
    network = Counting()
    denoiser = GaussianDenoiser(network, GaussianProcess(Cosine()), Noise())
    simulate(denoiser, uniform(2, F64), torch.zeros(3, 2), DDIM())
    assert network.levels[0].dtype == torch.float32
