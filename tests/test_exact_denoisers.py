"""The closed forms that other tests trust, against quadrature, Tweedie's formulas and enumeration."""

import itertools

import pytest
import torch
from pyro.distributions import Delta
from torch.testing import assert_close

from pyro_diffusion.denoisers import MixtureDenoiser, TableDenoiser
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, Rectified, VarianceExploding
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import DTYPES, MEANS, SCHEDULES, VARIANCES, WEIGHTS, mixture, mixture_law

F64 = torch.float64
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
TIMES = torch.tensor([0.02, 0.3, 0.6, 0.97], dtype=F64)


# The mixture


@each_schedule
def test_law_of_data_and_of_every_state(make):
    denoiser = mixture(make())
    x = torch.randn(20, 2, dtype=F64)
    assert_close(denoiser.data().log_prob(x), mixture_law().log_prob(x))
    assert denoiser.data().event_shape == (2,) and denoiser.data().batch_shape == ()
    for t in TIMES:
        level = denoiser.process.schedule.level(t)
        y = x * level.sigma
        expected = mixture_law(level.alpha, level.sigma).log_prob(y)
        assert_close(denoiser.marginal(t).log_prob(y), expected)
        assert_close(denoiser.marginal(level).log_prob(y), expected)


@each_schedule
def test_moments_are_those_of_tweedie(make):
    """E and Var per coordinate from the first two derivatives of log q(x_t), itself by autograd."""
    denoiser = mixture(make())
    for t in TIMES:
        level = denoiser.process.schedule.level(t)
        law = mixture_law(level.alpha, level.sigma)
        xt = law.sample((8,)).requires_grad_()
        (score,) = torch.autograd.grad(law.log_prob(xt).sum(), xt, create_graph=True)
        curvature = torch.stack(
            [
                torch.autograd.grad(score[:, i].sum(), xt, retain_graph=True)[0][:, i]
                for i in (0, 1)
            ],
            -1,
        )
        posterior = denoiser(xt, t)
        mean = (xt + level.sigma**2 * score) / level.alpha
        variance = (level.sigma / level.alpha) ** 2 * (1 + level.sigma**2 * curvature)
        assert_close(posterior.mean, mean, rtol=1e-8, atol=1e-8)
        assert_close(posterior.variance, variance, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_moments_by_quadrature(t):
    """One dimension: integrate x_0 against prior times likelihood on a fine grid."""
    means = torch.tensor([[-1.5], [0.5], [1.0]], dtype=F64)
    denoiser = MixtureDenoiser(GaussianProcess(Rectified()), WEIGHTS, means, VARIANCES)
    x0 = torch.linspace(-8, 8, 8001, dtype=F64)
    xt = torch.tensor([-2.0, -0.1, 0.4, 1.7], dtype=F64)[:, None]
    level = denoiser.process.schedule.level(torch.tensor(t, dtype=F64))
    prior = (
        WEIGHTS / VARIANCES.sqrt() * torch.exp(-((x0[:, None] - means.T) ** 2) / 2 / VARIANCES)
    ).sum(-1)
    weight = prior * torch.exp(-((xt - level.alpha * x0) ** 2) / 2 / level.sigma**2)
    weight = weight / weight.sum(-1, keepdim=True)
    mean = (weight * x0).sum(-1, keepdim=True)
    posterior = denoiser(xt, level.t)
    assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-9)
    variance = (weight * (x0 - mean) ** 2).sum(-1, keepdim=True)
    assert_close(posterior.variance, variance, rtol=1e-8, atol=1e-9)


@each_schedule
def test_one_component_is_conjugate(make):
    """Precisions add."""
    process = GaussianProcess(make())
    mean, var = torch.tensor([[0.5, -1.0, 2.0]], dtype=F64), 0.3
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), mean, var)
    xt = torch.randn(5, 3, dtype=F64)
    for t in TIMES:
        level = process.schedule.level(t)
        precision = 1 / var + (level.alpha / level.sigma) ** 2
        expected = (mean / var + level.alpha * xt / level.sigma**2) / precision
        posterior = denoiser(xt, t)
        assert_close(posterior.mean, expected)
        assert_close(posterior.variance, (1 / precision).expand(5, 3))


def test_reverse_kernel_turns_the_law_at_t_into_the_law_at_s():
    """Normal data: posterior and kernel are exact, so moments flow back without error at any step."""
    process = GaussianProcess(Cosine())
    mean, var = torch.tensor([[1.0]], dtype=F64), 0.2
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), mean, var)
    for s, t in ((0.0, 1.0), (0.3, 0.4)):
        early, late = (process.schedule.level(torch.tensor(u, dtype=F64)) for u in (s, t))
        xt = torch.tensor([[0.0], [1.0]], dtype=F64)
        kernel = process.reverse(xt, denoiser(xt, late), early, late)
        slope = kernel.mean[1] - kernel.mean[0]
        total = late.alpha**2 * var + late.sigma**2
        assert_close(
            kernel.variance[0] + slope**2 * total,
            (early.alpha**2 * var + early.sigma**2).reshape(1),
        )
        centre = kernel.mean[0] + slope * late.alpha * mean[0]
        assert_close(centre, early.alpha * mean[0])


def test_point_mass_keeps_the_mean():
    xt, t = torch.randn(3, 2, dtype=F64), torch.rand(3, dtype=F64)
    point = mixture(Cosine(), point_mass=True)(xt, t)
    assert isinstance(point, Delta) and point.event_shape == (2,)
    assert_close(point.mean, mixture(Cosine())(xt, t).mean)


def test_limits():
    """All is known at the data's end, nothing at the noise's."""
    denoiser = mixture(VarianceExploding(1e-4, 1e4))
    xt = mixture_law().sample((6,))
    sharp = denoiser(xt, torch.tensor(0.0, dtype=F64))
    assert_close(sharp.mean, xt, rtol=0, atol=1e-6)
    assert_close(sharp.variance, torch.full_like(xt, 1e-8), rtol=1e-5, atol=0)
    blind = denoiser(xt, torch.tensor(1.0, dtype=F64))
    mean = WEIGHTS @ MEANS
    assert_close(blind.mean, mean.expand(6, 2), rtol=0, atol=1e-5)
    variance = WEIGHTS @ (VARIANCES[:, None] + MEANS**2) - mean**2
    assert_close(blind.variance, variance.expand(6, 2), rtol=1e-6, atol=0)


@each_schedule
def test_float32_follows_float64(make):
    exact, single = mixture(make()), mixture(make()).float()
    t = torch.linspace(0, 1, 11)
    x = torch.stack([exact.marginal(u.double()).sample() for u in t])
    a, b = exact(x, t.double()), single(x.float(), t)
    assert_close(b.mean.double(), a.mean, rtol=1e-3, atol=1e-3)
    assert_close(b.variance.double(), a.variance, rtol=1e-2, atol=1e-5)


def test_weights_are_normalized():
    process = GaussianProcess(Cosine())
    denoiser = MixtureDenoiser(process, 7 * WEIGHTS, MEANS, VARIANCES)
    assert_close(denoiser.weights, WEIGHTS)
    shared = MixtureDenoiser(process, WEIGHTS, MEANS, 0.5)
    assert shared.variances.tolist() == [0.5] * 3


def test_mixture_refuses():
    cases = (
        (GaussianProcess(Cosine(), 2), r"^process: got event_dim=2, expected 1"),
        (Uniform(Cosine(), 3), r"^process: got Uniform, which lacks Tweedie"),
    )
    for process, message in cases:
        with pytest.raises(ValueError, match=message):
            MixtureDenoiser(process, WEIGHTS, MEANS, VARIANCES)
    process = GaussianProcess(Cosine())
    for weights, means in ((WEIGHTS[:2], MEANS), (WEIGHTS, MEANS[:, 0]), (WEIGHTS[None], MEANS)):
        with pytest.raises(ValueError, match=r"^weights, means: got shapes"):
            MixtureDenoiser(process, weights, means, 0.1)


# The table


def brute_force(process, joint, xt, t):
    """p(x_0,i = k | x_t) by summing over every sequence, one at a time."""
    length, states = joint.dim(), process.states
    out = torch.zeros(length, states, dtype=F64)
    for x0 in itertools.product(range(states), repeat=length):
        likelihood = per_coordinate(process.marginal(torch.tensor(x0), t)).probs
        p = joint[x0] * likelihood[torch.arange(length), xt].prod()
        for i, k in enumerate(x0):
            out[i, k] += p
    return out / out.sum(-1, keepdim=True)


@pytest.mark.parametrize("make", [Absorbing, Uniform])
@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("length", "states"), [(1, 4), (2, 3), (3, 2)])
def test_table_by_enumeration(make, t, length, states):
    process = make(Rectified(), states)
    joint = torch.rand((states,) * length, dtype=F64)
    denoiser = TableDenoiser(process, 5 * joint)
    t = torch.tensor(t, dtype=F64)
    every = torch.tensor(list(itertools.product(range(len(process.noise)), repeat=length)))
    posterior = denoiser(every, t)
    assert posterior.batch_shape == (len(every),) and posterior.event_shape == (length,)
    expected = torch.stack([brute_force(process, joint, xt, t) for xt in every])
    assert_close(per_coordinate(posterior).probs, expected)


def test_table_reads_one_time_a_row():
    process = Absorbing(Cosine(), 3)
    denoiser = TableDenoiser(process, torch.rand(3, 3, dtype=F64))
    xt, t = torch.randint(4, (2, 5, 2)), torch.rand(5, dtype=F64)
    whole = per_coordinate(denoiser(xt, t)).probs
    for i in range(5):
        assert_close(whole[1, i], per_coordinate(denoiser(xt[1, i], t[i])).probs)


def test_independent_positions_do_not_speak():
    process = Uniform(Rectified(), 3)
    a, b = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.6, 0.3, 0.1]).double()
    denoiser = TableDenoiser(process, a[:, None] * b)
    alone = TableDenoiser(process, a)
    t = torch.tensor(0.4, dtype=F64)
    for other in range(3):
        got = per_coordinate(denoiser(torch.tensor([1, other]), t)).probs[0]
        assert_close(got, per_coordinate(alone(torch.tensor([1]), t)).probs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_sequences_stay_impossible(dtype):
    """Two equal bits: what one shows the other must be."""
    denoiser = TableDenoiser(Absorbing(Rectified.full(), 2), torch.eye(2, dtype=dtype))
    xt = torch.tensor([[2, 1], [0, 2], [2, 2], [0, 0], [0, 1]])
    probs = per_coordinate(denoiser(xt, torch.tensor(0.5, dtype=dtype))).probs
    one, zero, half = [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]
    expected = [[one, one], [zero, zero], [half, half], [zero, zero]]
    assert_close(probs[:4], torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-12)
    assert bool(torch.isfinite(probs).all())  # even where nothing explains the state


def test_table_refuses():
    with pytest.raises(ValueError, match=r"^process: got GaussianProcess, which lacks"):
        TableDenoiser(GaussianProcess(Cosine()), torch.ones(2, 2))
    for process, joint in (
        (Uniform(Cosine(), 3), torch.ones(2, 2)),
        (Uniform(Cosine(), 3), torch.ones(3, 2)),
    ):
        with pytest.raises(ValueError, match=r"^joint: got shape"):
            TableDenoiser(process, joint)


# Checks at the door


def test_mixture_refuses_points():
    with pytest.raises(ValueError, match=r"^variances: got 0, expected positive"):
        MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(3), MEANS.float(), 0.0)


def test_mixture_refuses_variances_of_another_shape():
    with pytest.raises(ValueError, match=r"variances: got shape"):
        MixtureDenoiser(GaussianProcess(Cosine()), WEIGHTS, MEANS, torch.ones(2))


@pytest.mark.parametrize("weight", [-0.5, torch.nan, torch.inf])
def test_mixture_refuses_weights(weight):
    weights = torch.tensor([1.0, 1.0, weight], dtype=F64)
    with pytest.raises(ValueError, match=r"^weights: got"):
        MixtureDenoiser(GaussianProcess(Cosine()), weights, MEANS, 0.1)


def test_table_refuses_events_that_are_not_sequences():
    with pytest.raises(ValueError, match=r"process"):
        TableDenoiser(Uniform(Cosine(), 2, event_dim=2), torch.ones(2, 2))


@pytest.mark.parametrize("entry", [-0.5, torch.nan])
def test_table_refuses_what_is_no_probability(entry):
    with pytest.raises(ValueError, match=r"^joint: got"):
        TableDenoiser(Uniform(Cosine(), 2), torch.tensor([[1.0, entry], [1.0, 1.0]]))
