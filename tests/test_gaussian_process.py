"""The Gaussian process against Bayes' rule, its own composition, and published special cases."""

import math

import pytest
import torch
from pyro.distributions import Delta, Normal
from torch.testing import assert_close

from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, Level, Rectified, TabulatedBetas, uniform
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import BETAS, DTYPES, SCHEDULES

F64 = torch.float64

each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
PAIRS = [(0.0, 1.0), (0.2, 0.7), (0.5, 0.501), (0.0, 0.03), (0.97, 1.0)]


def f64(*values):
    return [torch.tensor(v, dtype=F64) for v in values]


def moments(distribution):
    base = per_coordinate(distribution)
    return base.mean, base.variance


def five(process, xt, x0, s, t):
    """All conditionals of a state of the process."""
    posterior = Normal(x0, torch.full_like(x0, 0.3)).to_event(process.event_dim)
    return {
        "marginal": process.marginal(x0, t),
        "transition": process.transition(x0, s, t),
        "bridge": process.bridge(xt, x0, s, t),
        "ddim": process.bridge(xt, x0, s, t, eta=0.5),
        "reverse": process.reverse(xt, posterior, s, t),
        "reverse of a point": process.reverse(xt, process.point_mass(x0), s, t),
    }


# Contract


@each_schedule
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("event", [(), (4,), (3, 4, 5)])
def test_shapes(make, dtype, batch, event):
    process = GaussianProcess(make(), event_dim=len(event))
    x0, xt = torch.randn(2, *batch, *event, dtype=dtype)
    times = [(torch.tensor(0.2, dtype=dtype), torch.tensor(0.6, dtype=dtype)), (0.2, 0.6)]
    times.append((torch.rand(batch, dtype=dtype) / 2, 0.5 + torch.rand(batch, dtype=dtype) / 2))
    times.append(tuple(process.level(t) for t in times[-1]))
    for s, t in times:
        for name, law in five(process, xt, x0, s, t).items():
            assert law.batch_shape == batch and law.event_shape == event, name
            x = law.rsample()
            assert x.dtype == dtype and law.log_prob(x).shape == batch, name
            assert bool(torch.isfinite(x).all() and torch.isfinite(law.log_prob(x)).all()), name
    prior = process.prior(event, dtype=dtype)
    assert prior.batch_shape == () and prior.event_shape == event
    assert prior.expand(batch).sample().dtype == dtype


def test_prior_defaults():
    assert GaussianProcess(Cosine()).prior((2,)).sample().dtype == torch.get_default_dtype()


@each_schedule
@pytest.mark.parametrize("event", [(3,), (3, 3, 3)])
def test_times_meet_the_batch_and_not_the_event(make, event):
    """With batch and event sizes alike a wrong broadcast would go unseen; so compare row by row."""
    process = GaussianProcess(make(), event_dim=len(event))
    x0, xt = torch.randn(2, 3, *event, dtype=F64)
    s, t = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.8, 0.9]], dtype=F64)
    whole = five(process, xt, x0, s, t)
    for i in range(3):
        for name, alone in five(process, xt[i], x0[i], s[i], t[i]).items():
            for a, b in zip(moments(whole[name]), moments(alone), strict=True):
                assert_close(a[i], b, msg=name)


def test_particles_share_the_times_of_their_data():
    """(P, B) particles under (B,) times, and under (P, 1) times."""
    process = GaussianProcess(Cosine(), event_dim=1)
    x0, xt = torch.randn(2, 5, 3, 2, dtype=F64)
    s, t = torch.tensor([0.1, 0.3, 0.5], dtype=F64), torch.tensor([0.2, 0.8, 0.9], dtype=F64)
    for name, law in five(process, xt, x0, s, t).items():
        alone = five(process, xt[4], x0[4], s, t)[name]
        assert law.batch_shape == (5, 3)
        for a, b in zip(moments(law), moments(alone), strict=True):
            assert_close(a[4], b)
    s = torch.rand(5, 1, dtype=F64) / 2
    for name, law in five(process, xt, x0, s, s + 0.5).items():
        alone = five(process, xt[:, 1], x0[:, 1], s[:, 0], s[:, 0] + 0.5)[name]
        for a, b in zip(moments(law), moments(alone), strict=True):
            assert_close(a[:, 1], b)


def test_levels_are_times():
    process = GaussianProcess(Cosine(), event_dim=2)
    x0, xt = torch.randn(2, 3, 4, 5)
    s, t = torch.rand(3) / 2, torch.rand(3) / 2 + 0.5
    a = five(process, xt, x0, s, t)
    b = five(process, xt, x0, process.level(s), process.level(t))
    for name in a:
        for u, v in zip(moments(a[name]), moments(b[name]), strict=True):
            assert torch.equal(u, v)


def test_copies():
    process = GaussianProcess(TabulatedBetas(BETAS))
    other = GaussianProcess(TabulatedBetas(BETAS.flip(0)))
    other.load_state_dict(process.state_dict())
    x, t = torch.randn(5, 2), torch.rand(5)
    for a, b in zip(moments(process.marginal(x, t)), moments(other.marginal(x, t)), strict=True):
        assert torch.equal(a, b)


def test_coordinates():
    base = Normal(torch.zeros(2, 3), 1.0)
    assert per_coordinate(base) is base
    assert per_coordinate(base.to_event(1)) is base
    assert per_coordinate(base.to_event(1).to_event(1)) is base
    point = Delta(torch.zeros(2, 3), event_dim=1)
    assert per_coordinate(point) is point


# Algebra and exactness


@each_schedule
def test_marginal(make):
    process, t = GaussianProcess(make()), torch.rand(6, dtype=F64)
    x0 = torch.randn(6, 2, dtype=F64)
    mean, variance = moments(process.marginal(x0, t))
    assert_close(mean, process.schedule.alpha(t)[:, None] * x0)
    assert_close(variance, process.schedule.sigma(t).square()[:, None].expand(6, 2))


@each_schedule
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_transition_after_marginal_is_marginal(make, s, t):
    process = GaussianProcess(make())
    s, t = f64(s, t)
    x0 = torch.randn(4, 2, dtype=F64)
    mean_s, variance_s = moments(process.marginal(x0, s))
    mean, fresh = moments(process.transition(mean_s, s, t))
    weight = mean / mean_s
    expected_mean, expected_variance = moments(process.marginal(x0, t))
    assert_close(mean, expected_mean)
    assert_close(fresh + weight.square() * variance_s, expected_variance, rtol=1e-9, atol=0)


@each_schedule
@pytest.mark.parametrize(("s", "t"), PAIRS[1:-1])
def test_bridge_is_bayes_rule(make, s, t):
    """log q(x_s | x_t, x_0) = log q(x_t | x_s) + log q(x_s | x_0) - log q(x_t | x_0) at any point."""
    process = GaussianProcess(make(), event_dim=0)
    s, t = f64(s, t)
    x0 = torch.randn(50, dtype=F64)
    xs = process.marginal(x0, s).sample()
    xt = process.transition(xs, s, t).sample()
    left = process.bridge(xt, x0, s, t).log_prob(xs)
    right = process.transition(xs, s, t).log_prob(xt) + process.marginal(x0, s).log_prob(xs)
    assert_close(left, right - process.marginal(x0, t).log_prob(xt), rtol=1e-7, atol=1e-7)


@each_schedule
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_every_eta_keeps_the_marginal(make, eta, s, t):
    """Integrated over q(x_t | x_0) the bridge gives q(x_s | x_0) (arXiv 2010.02502, lemma 1)."""
    process = GaussianProcess(make())
    a, k, v = process.coefficients(*(process.level(u) for u in f64(s, t)), eta)
    early, late = (process.schedule.level(u) for u in f64(s, t))
    assert_close(a * late.alpha + k, early.alpha, rtol=1e-9, atol=1e-12)
    assert_close(v + (a * late.sigma).square(), early.sigma.square(), rtol=1e-9, atol=0)
    assert v >= 0 and k >= 0
    if eta == 0:
        assert v == 0


@each_schedule
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_variance_is_eta_squared_of_the_markov_one(make, eta):
    process = GaussianProcess(make())
    s, t = (process.level(u) for u in f64(0.3, 0.8))
    early, late = s, t
    # DDIM's equation 16, written for any signal scale.
    ratio = (late.alpha / early.alpha).square()
    markov = (
        early.sigma.square()
        / late.sigma.square()
        * (late.sigma.square() - ratio * early.sigma.square())
    )
    assert_close(process.coefficients(s, t, eta).variance, eta**2 * markov, rtol=1e-8, atol=0)


@each_schedule
def test_bridges_compose(make):
    """A Markov bridge from t to s, then from s to r, is the bridge from t to r."""
    process = GaussianProcess(make())
    r, s, t = (process.level(u) for u in f64(0.1, 0.45, 0.9))
    a1, k1, v1 = process.coefficients(s, t)
    a2, k2, v2 = process.coefficients(r, s)
    a, k, v = process.coefficients(r, t)
    assert_close(a2 * a1, a)
    assert_close(a2 * k1 + k2, k)
    assert_close(v2 + a2**2 * v1, v)


@each_schedule
def test_deterministic_bridge_inverts(make):
    """At eta = 0 a step up undoes a step down for the same x_0."""
    process = GaussianProcess(make())
    s, t = (process.level(u) for u in f64(0.3, 0.6))
    down, up = process.coefficients(s, t, 0.0), process.coefficients(t, s, 0.0)
    x, x0 = torch.randn(2, 5, dtype=F64)
    assert_close(up.xt * (down.xt * x + down.x0 * x0) + up.x0 * x0, x)


@each_schedule
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_reverse_of_normal_data_is_exact(make, eta):
    """For one coordinate of normal data the joint of (x_s, x_t) is normal, its conditional known."""
    process = GaussianProcess(make(), event_dim=0)
    s, t = f64(0.25, 0.7)
    mean, var = 0.7, 0.4
    early, late = process.schedule.level(s), process.schedule.level(t)
    total = late.alpha**2 * var + late.sigma**2
    xt = torch.randn(20, dtype=F64) * total.sqrt() + late.alpha * mean
    posterior = Normal(
        mean + late.alpha * var / total * (xt - late.alpha * mean),
        (var * late.sigma**2 / total).sqrt(),
    )
    m, v = moments(process.reverse(xt, posterior, s, t, eta))
    if eta == 1:  # the Markov process: covariance of x_s and x_t is (alpha_t / alpha_s) Var[x_s]
        var_s = early.alpha**2 * var + early.sigma**2
        cov = late.alpha / early.alpha * var_s
        assert_close(m, early.alpha * mean + cov / total * (xt - late.alpha * mean))
        assert_close(v, (var_s - cov**2 / total).expand(20))
    # For every eta, x_s keeps its law: the law of total variance over x_t.
    weight = (m[1] - m[0]) / (xt[1] - xt[0])
    assert_close(v[0] + weight**2 * total, early.alpha**2 * var + early.sigma**2)
    centre = m[0] + weight * (late.alpha * mean - xt[0])
    assert_close(centre, early.alpha * mean)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_matches_the_moments_of_any_posterior(eta):
    """A posterior on three values: the kernel has the first two moments of the mixture of bridges."""
    process = GaussianProcess(Cosine(), event_dim=0)
    s, t = f64(0.2, 0.8)
    values = torch.tensor([-1.0, 0.1, 0.9], dtype=F64)
    posterior = Quantized(torch.randn(7, 3, dtype=F64), values)
    xt = torch.randn(7, dtype=F64)
    mean, variance = moments(process.reverse(xt, posterior, s, t, eta))
    means, variances = moments(process.bridge(xt[:, None], values.expand(7, 3), s, t, eta))
    p = posterior.probs
    assert_close(mean, (p * means).sum(-1))
    second = (p * (variances + means.square())).sum(-1)
    assert_close(variance, second - mean.square())


def test_ddpm_variances():
    """A point mass gives DDPM's lower reverse variance, the posterior of unit-variance data its upper."""
    process = GaussianProcess(TabulatedBetas(BETAS))
    times = uniform(len(BETAS) - 1, F64)
    alpha_bar = torch.cumprod(1 - BETAS, 0)
    for i in (1, 2, 20, len(BETAS) - 1):
        s, t = times[i - 1], times[i]
        x = torch.randn(3, 2, dtype=F64)
        lower = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * BETAS[i]
        assert_close(moments(process.bridge(x, x, s, t))[1], lower.expand(3, 2))
        posterior = Normal(x, (1 - alpha_bar[i]).sqrt()).to_event(1)
        assert_close(moments(process.reverse(x, posterior, s, t))[1], BETAS[i].expand(3, 2))
        mean = (
            alpha_bar[i - 1].sqrt() * BETAS[i] * x
            + (1 - BETAS[i]).sqrt() * (1 - alpha_bar[i - 1]) * 2 * x
        ) / (1 - alpha_bar[i])  # equation 7 of arXiv 2006.11239 at x_0 = x, x_t = 2 x
        assert_close(moments(process.bridge(2 * x, x, s, t))[0], mean)


@each_schedule
def test_prior(make):
    """The marginal at t = 1 of independent data of zero mean and unit variance."""
    process = GaussianProcess(make())
    mean, variance = moments(process.prior((3,), dtype=F64))
    end = process.schedule.level(torch.ones((), dtype=F64))
    assert_close(mean, torch.zeros(3, dtype=F64))
    assert_close(variance, (end.alpha.square() + end.sigma.square()).expand(3))


@each_schedule
@pytest.mark.parametrize("t", [torch.tensor(0.4, dtype=F64), torch.rand(5, dtype=F64)])
@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
def test_log_evidence(make, t, event):
    """The marginal's log-density over the values, up to a constant in them."""
    process = GaussianProcess(make(), event_dim=len(event))
    values = torch.tensor([-1.0, 0.0, 0.7, 2.0], dtype=F64)
    xt = torch.randn(5, *event, dtype=F64)
    evidence = process.coordinate_log_likelihood(xt, values, t)
    assert evidence.shape == (*xt.shape, 4)
    expected = torch.stack(
        [per_coordinate(process.marginal(v.expand(xt.shape), t)).log_prob(xt) for v in values], -1
    )
    gap = evidence - expected
    assert_close(gap, gap[..., :1].expand(gap.shape), rtol=0, atol=1e-7)


# Ends and precision


def test_uncut_ends():
    """With infinite log-SNR at both ends the bridge reaches x_0 exactly and forgets x_1 exactly."""
    process = GaussianProcess(Rectified.full())
    zero, one, half = (process.level(u) for u in (0.0, 1.0, 0.5))
    for eta in (0.0, 1.0):
        assert tuple(map(float, process.coefficients(zero, half, eta))) == (0, 1, 0)
    a, k, v = map(float, process.coefficients(half, one, 1.0))
    assert (a, k, v) == (0, 0.5, 0.25)
    # The straight line of rectified flow: x_s = s x_1 + (1 - s) x_0.
    assert tuple(map(float, process.coefficients(half, one, 0.0))) == (0.5, 0.5, 0)
    x = torch.randn(3, 2)
    assert torch.equal(moments(process.marginal(x, 0.0))[0], x)
    assert_close(moments(process.transition(x, zero, half))[0], x / 2)
    assert_close(moments(process.transition(x, zero, half))[1], torch.full((3, 2), 0.25))


@each_schedule
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_float32_does_not_cancel(make, eta):
    """A thousand steps. The formulas lose nothing (same levels, read in both precisions); the levels
    themselves lose up to 3e-4 of the smallest steps, and these errors do not pile up.
    """
    process, times = GaussianProcess(make()), uniform(1000)
    rounded = process.schedule.level(times)
    levels = rounded, Level(*(v.double() for v in rounded)), process.schedule.level(times.double())
    low, same, high = (
        process.coefficients(level.at(slice(0, -1)), level.at(slice(1, None)), eta)
        for level in levels
    )
    for a, b, c in zip(low, same, high, strict=True):
        assert_close(a.double(), b, rtol=2e-6, atol=0)
        assert_close(a.double(), c, rtol=3e-4, atol=0)
    assert_close(low.xt.double().log().sum(), high.xt.log().sum(), rtol=0, atol=1e-3)
    steps = [process.transition(torch.zeros(1000, 1), s, t) for s, t in pairs(levels[:2])]
    assert_close(moments(steps[0])[1].double(), moments(steps[1])[1], rtol=2e-6, atol=0)


def pairs(levels):
    """Neighbours of each table of levels, against events of one dimension."""
    wide = [level.unsqueeze(1) for level in levels]
    return [(level.at(slice(0, -1)), level.at(slice(1, None))) for level in wide]


@each_schedule
def test_gradients_are_finite_and_right(make):
    process = GaussianProcess(make())
    s, t = f64(0.3, 0.8)
    xt, x0 = torch.randn(2, 3, 2, dtype=F64).unbind(0)
    scale = torch.tensor(0.5, dtype=F64)
    leaves = [v.clone().requires_grad_() for v in (xt, x0, scale, s, t)]

    def log_prob(xt, x0, scale, s, t):
        return process.reverse(xt, Normal(x0, scale).to_event(1), s, t, eta=0.7).log_prob(0.1 * xt)

    assert torch.autograd.gradcheck(log_prob, leaves)
    at_the_ends = [v.clone().requires_grad_() for v in (xt, x0, scale, *f64(0.0, 1.0))]
    for gradient in torch.autograd.grad(log_prob(*at_the_ends).sum(), at_the_ends):
        assert bool(torch.isfinite(gradient).all())


# Bad input


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, 7])
def test_times_outside(bad):
    process, x = GaussianProcess(Cosine()), torch.zeros(2, 3)
    good = torch.tensor(0.5)
    calls = [
        lambda t: process.marginal(x, t),
        lambda t: process.transition(x, good, t),
        lambda t: process.transition(x, t, good),
        lambda t: process.bridge(x, x, t, good),
        lambda t: process.reverse(x, process.point_mass(x), good, t),
        lambda t: process.coordinate_log_likelihood(x, x[0], t),
    ]
    for call in calls:
        for t in (bad, torch.tensor([0.5, bad])):
            with pytest.raises(
                ValueError, match=r"^[st]: got times from .*expected times in \[0, 1\]"
            ):
                call(t)


def test_constructor():
    with pytest.raises(ValueError, match=r"^schedule: got function, expected a Schedule"):
        GaussianProcess(lambda t: t)
    for bad in (-1, 1.5, None):
        with pytest.raises(ValueError, match=r"^event_dim: got"):
            GaussianProcess(Cosine(), event_dim=bad)


# Precision and checks


@pytest.mark.parametrize("eta", [-0.5, 1.5, math.nan])
def test_eta_outside(eta):
    process, x = GaussianProcess(Cosine()), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^eta: got"):
        process.bridge(x, x, torch.tensor(0.2), torch.tensor(0.7), eta)


def test_times_in_the_wrong_order():
    process, x = GaussianProcess(Cosine()), torch.zeros(2, 3)
    for call in (process.transition, lambda x, s, t: process.bridge(x, x, s, t)):
        with pytest.raises(ValueError, match=r"s"):
            call(x, torch.tensor(0.7), torch.tensor(0.2))


def test_a_number_as_time_has_the_precision_of_the_state():
    process, x = GaussianProcess(Cosine()), torch.ones(2, 3, dtype=F64)
    assert torch.equal(process.marginal(x, 0.3).mean, process.marginal(x, f64(0.3)[0]).mean)
