"""Noise of any distribution: the flow and samplers without noise, on data of which everything is known."""

import copy
import pickle

import pytest
import torch
from pyro.distributions import (
    Categorical,
    Dirichlet,
    Exponential,
    Gumbel,
    Kumaraswamy,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    RelaxedBernoulli,
    StudentT,
    TransformedDistribution,
    Uniform,
    Weibull,
)
from scipy import stats
from torch.distributions import SigmoidTransform, StickBreakingTransform

from pyro_diffusion import nn
from pyro_diffusion.denoisers import Data, GaussianDenoiser, Noise, Score, V, Velocity
from pyro_diffusion.distributions import (
    Diffusion,
    DiffusionSDE,
    FlowMatching,
    ProbabilityFlow,
    Simple,
)
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.processes import (
    Ability,
    AnyNoise,
    GaussianProcess,
    SeededNoise,
    StudentTProcess,
    draw,
    drawing_from,
)
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.samplers import DDIM, AdamsMoulton, Ancestral, Heun, simulate
from pyro_diffusion.schedules import Cosine, LogLinear, VarianceExploding, uniform
from tests.atoms import F64, AtomsDenoiser

close = torch.testing.assert_close
FALSE_ALARM = 1e-4  # of every Kolmogorov-Smirnov test below

ONES = torch.ones(2)


def laplace(dtype=F64):
    return Laplace(torch.zeros((), dtype=dtype), torch.full((), 0.5**0.5, dtype=dtype))


def t3(dtype=F64):
    zero = torch.zeros((), dtype=dtype)
    return StudentT(zero + 3.0, zero, zero + 1.0)


def lumps():
    """A mixture of two uniforms."""
    parts = Uniform(torch.tensor([-1.5, 0.5], dtype=F64), torch.tensor([-0.5, 1.5], dtype=F64))
    return MixtureSameFamily(Categorical(torch.ones(2, dtype=F64)), parts)


def plane(process):
    atoms = torch.tensor([[0.0, 1.0], [-1.0, 0.5], [1.2, -0.8]], dtype=F64)
    return AtomsDenoiser(process, atoms, torch.tensor([0.2, 0.5, 0.3], dtype=F64))


def line(process):
    atoms = torch.tensor([[-1.0], [0.2], [1.5]], dtype=F64)
    return AtomsDenoiser(process, atoms, torch.tensor([0.3, 0.3, 0.4], dtype=F64))


@pytest.mark.parametrize("noise", [laplace, t3])
def test_flow_has_the_density_of_the_blurred_data(noise):
    """To 1e-3 nats a dimension, where noise is smooth; what is left of the data at t = 1 included."""
    denoiser = plane(AnyNoise(LogLinear(3.0, -18.0), noise()))
    level = denoiser.process.level(torch.tensor(0.0, dtype=F64))
    torch.manual_seed(0)
    blurred = denoiser.marginal(level)
    x = blurred.sample((8,))
    wanted = blurred.log_prob(x) + 2 * level.alpha.log().sum()
    flow = ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4", steps=200))
    close(flow.log_prob(x / level.alpha), wanted, rtol=0, atol=2e-3)


def test_the_exact_start_costs_nothing():
    """With sigma = 5 at t = 1 the noise is no good start; the distribution of x_1 is."""
    schedule = VarianceExploding(0.3, 5.0)
    rough = line(AnyNoise(schedule, t3()))
    end = rough.process.level(torch.tensor(1.0, dtype=F64))
    norm = float(torch.hypot(end.alpha, end.sigma))
    zero = torch.zeros(3, dtype=F64)
    parts = StudentT(zero + 3.0, rough.atoms[:, 0] / norm, zero + float(end.sigma) / norm)
    start = MixtureSameFamily(Categorical(rough.weights), parts)
    exact = line(AnyNoise(schedule, t3(), start))
    level = rough.process.level(torch.tensor(0.0, dtype=F64))
    torch.manual_seed(0)
    blurred = rough.marginal(level)
    x = blurred.sample((8,))
    errors = [
        ProbabilityFlow(d, (1,), solver=ODESolver("rk4", steps=60)).log_prob(x)
        - blurred.log_prob(x)
        for d in (rough, exact)
    ]
    assert float(errors[1].abs().max()) < 1e-5
    assert float(errors[0].abs().max()) > 1e-3
    close(
        exact.process.prior((1,), F64).log_prob(x), start.log_prob(x[:, 0] / norm) - end_log(norm)
    )


def end_log(norm):
    return torch.tensor(norm, dtype=F64).log()


@pytest.mark.parametrize("noise", [laplace, lumps])
@pytest.mark.parametrize("sampler", [DDIM(), Heun(), AdamsMoulton()], ids=repr)
def test_samples_halfway_have_the_marginals_quantiles(sampler, noise):
    """By Kolmogorov and Smirnov against the exact mixture."""
    process = AnyNoise(LogLinear(7.0, -14.0), noise())
    denoiser = line(process)
    torch.manual_seed(1)
    times = torch.linspace(0.4, 1.0, 201, dtype=F64)
    x = simulate(denoiser, times, draw(process.prior((1,), F64).expand((2_000,))), sampler)
    exact = denoiser.marginal(process.level(torch.tensor(0.4, dtype=F64))).sample((20_000,))
    assert stats.ks_2samp(x[:, 0].numpy(), exact[:, 0].numpy()).pvalue > FALSE_ALARM


def test_normal_noise_is_the_gaussian_process():
    unit = Normal(torch.zeros((), dtype=F64), 1.0)
    ours, theirs = AnyNoise(Cosine(), unit), GaussianProcess(Cosine())
    x0, xt = torch.randn(2, 5, 2, dtype=F64)
    for call in (lambda p: p.marginal(x0, 0.4), lambda p: p.prior((2,), F64)):
        close(call(ours).mean, call(theirs).mean)
        close(call(ours).variance, call(theirs).variance)
        close(call(ours).log_prob(xt), call(theirs).log_prob(xt))
    close(
        ours.bridge(xt, x0, 0.2, 0.6, eta=0.0).mean, theirs.bridge(xt, x0, 0.2, 0.6, eta=0.0).mean
    )
    network = nn.MLP(2, (8,)).double()
    x = {}
    for process in (ours, theirs):
        torch.manual_seed(2)
        x[process] = Diffusion(
            GaussianDenoiser(network, process), (2,), 8, sampler=AdamsMoulton()
        ).sample((3,))
    close(x[ours], x[theirs])


def test_shared_noise_is_of_a_whole_datum():
    student = StudentTProcess(Cosine(), 3.0)
    whole = student.noised(torch.zeros(2, dtype=F64), torch.ones(1, dtype=F64))
    ours = AnyNoise(Cosine(), whole)
    x0, xt = torch.randn(2, 5, 2, dtype=F64)
    close(ours.marginal(x0, 0.4).log_prob(xt), student.marginal(x0, 0.4).log_prob(xt))
    with pytest.raises(
        ValueError, match=r"^noise: got event shape \(2,\), expected \(\) or \(3,\)"
    ):
        ours.marginal(torch.zeros(4, 3), 0.4)


@pytest.mark.parametrize("parameterization", [Data(), Noise(), V(), Velocity()], ids=repr)
def test_training_is_regression(parameterization):
    """Losses fall and gradients are finite, in single precision, for noise given in double."""
    torch.manual_seed(3)
    denoiser = GaussianDenoiser(nn.MLP(2, (16,)), AnyNoise(Cosine(), lumps()), parameterization)
    diffusion = Diffusion(denoiser, (2,), 10, objective=Simple())
    x = torch.randn(64, 2)
    loss = -diffusion.log_prob(x).mean()
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(bool(torch.isfinite(p.grad).all()) for p in denoiser.parameters())


def test_gradients_in_data_pass_through_draws():
    process = AnyNoise(Cosine(), lumps())
    x0 = torch.randn(5, 2, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(process.marginal(x0, 0.5).rsample().sum(), x0)
    close(slope, process.level(0.5, x0).alpha.expand(5, 2))


def test_a_row_is_drawn_alike_in_any_batch():
    process, x0 = AnyNoise(Cosine(), laplace()), torch.randn(6, 2, dtype=F64)

    def rows(index):
        with drawing_from(RowNoise(3, index)):
            return draw(process.marginal(x0[index], 0.5))

    close(rows(torch.arange(2, 4)), rows(torch.arange(6))[2:4])
    with drawing_from(SeededNoise(1)):
        wide = draw(process.marginal(x0[:1].expand(20_000, 2), 0.5))
    level = process.level(0.5, x0)
    z = (wide - level.alpha * x0[:1]) / level.sigma
    assert stats.kstest(z[:, 1].numpy(), stats.laplace(scale=0.5**0.5).cdf).pvalue > FALSE_ALARM


def test_copies_and_state_dicts_keep_the_noise():
    process = AnyNoise(Cosine(), laplace(torch.float32))
    x = torch.randn(3, 2)
    for again in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        close(again.marginal(x, 0.5).log_prob(x), process.marginal(x, 0.5).log_prob(x))
    with pytest.raises(ValueError, match="noise"):
        AnyNoise(Cosine(), t3()).load_state_dict(process.state_dict())


def test_noise_of_other_numbers_is_other_noise():
    """Also of tensors, and whatever was computed of a distribution since."""
    eye, mixture = torch.eye(2), MixtureSameFamily(Categorical(torch.ones(2)), Uniform(-ONES, ONES))
    wide = MixtureSameFamily(Categorical(torch.ones(2)), Uniform(-ONES, 2 * ONES))
    normals = (MultivariateNormal(ONES, eye), MultivariateNormal(ONES, 9 * eye))
    for one, other in (normals, (mixture, wide), (Normal(ONES, 1.0).to_event(1), normals[0])):
        process = AnyNoise(Cosine(), one)
        before = process.definition()
        process.marginal(torch.zeros(3, 2), 0.5).log_prob(torch.zeros(3, 2))
        assert process.definition() == before
        with pytest.raises(ValueError, match="noise"):
            AnyNoise(Cosine(), other).load_state_dict(process.state_dict())


def test_noise_of_bounded_support_trains():
    noise = Uniform(torch.tensor(-(3**0.5)), torch.tensor(3**0.5))
    denoiser = GaussianDenoiser(nn.MLP(2, (8,)), AnyNoise(LogLinear(7.0, -9.0), noise))
    torch.manual_seed(0)
    for objective in (Simple(), FlowMatching()):
        loss = Diffusion(denoiser, (2,), 20, objective=objective).log_prob(torch.randn(1000, 2))
        assert bool(loss.isfinite().all())


@pytest.mark.parametrize("noise", [Uniform(-1.5, 1.5), lumps(), Exponential(1.0)], ids=repr)
def test_densities_of_bounded_noise_integrate_to_one(noise):
    """Where no noise leads to, they are 0; 0.02 is what edges cost on this grid."""
    torch.manual_seed(0)
    denoiser = GaussianDenoiser(nn.MLP(1, (8,)), AnyNoise(LogLinear(6.0, -6.0), noise))
    flow = ProbabilityFlow(denoiser, (1,), solver=ODESolver("rk4", steps=8))
    x = torch.linspace(-12, 36, 4801).unsqueeze(-1)
    with torch.no_grad():
        log_prob = flow.log_prob(x)
    assert float(log_prob[0]) == -torch.inf
    assert abs(float(log_prob.exp().sum()) * 0.01 - 1) < 0.02
    with pytest.raises(ValueError, match=r"^denoiser: got NaN"):
        denoiser.network.layers[-1].bias.data.fill_(torch.nan)
        flow.log_prob(x)


def test_noise_has_no_density_outside_its_support():
    """Also that of which the formula goes on, in whatever it is wrapped."""
    shifted = TransformedDistribution(
        Exponential(1.0), [torch.distributions.AffineTransform(-1.0, 1.0)]
    )
    rates = torch.tensor([1.0, 2.0])
    mixed = MixtureSameFamily(Categorical(torch.ones(2)), Exponential(rates))
    z = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-2.0, 0.5], [torch.nan, 0.5]])
    inside = 0.5 * rates[0] * (-0.5 * rates[0]).exp() + 0.5 * rates[1] * (-0.5 * rates[1]).exp()
    for noise, want in (
        (Exponential(1.0), [-1.0, -torch.inf, -torch.inf, torch.nan]),
        (shifted, [-3.0, -2.0, -torch.inf, torch.nan]),
        (mixed, [2 * float(inside.log()), -torch.inf, -torch.inf, torch.nan]),
        (Dirichlet(ONES), [0.0, -torch.inf, -torch.inf, torch.nan]),
    ):
        base = AnyNoise(Cosine(), noise).base_distribution((2,))
        close(base.log_prob(z), torch.tensor(want), equal_nan=True)


@pytest.mark.parametrize(
    ("noise", "outside"),
    [
        (TransformedDistribution(Normal(0.0, 1.0), [SigmoidTransform()]), [1.5, -0.5]),
        (RelaxedBernoulli(torch.tensor(0.7), torch.tensor(0.3)), [1.5, -0.5]),
        (Weibull(1.0, 2.0), [-0.5, -1.5]),
        (Kumaraswamy(2.0, 2.0), [1.5, -0.5]),
        (TransformedDistribution(Normal(torch.zeros(1), 1.0), [StickBreakingTransform()]), None),
    ],
    ids=["logit-normal", "relaxed", "weibull", "kumaraswamy", "simplex"],
)
def test_a_transform_whose_inverse_takes_anything_has_no_density_there(noise, outside):
    """That of a sigmoid clamps, that of a square forgets the sign."""
    process = AnyNoise(Cosine(), noise)
    inside = torch.tensor([[0.3, 0.7]])
    got, want = process.base_distribution((2,)).log_prob(inside), noise.log_prob(inside)
    close(got, want.flatten().sum().unsqueeze(0))
    rows = torch.tensor([[0.3, v] for v in outside or (1.5, -0.5)])
    assert (process.base_distribution((2,)).log_prob(rows) == -torch.inf).all()


@pytest.mark.parametrize(
    "noise", [None, 1.0, Categorical(torch.ones(3)), Normal(torch.zeros(2), 1.0)], ids=repr
)
def test_bad_noise(noise):
    with pytest.raises(ValueError, match=r"^noise: got .*expected a Pyro distribution of real"):
        AnyNoise(Cosine(), noise)
    if noise is not None:
        with pytest.raises(ValueError, match=r"^start: got .*expected a Pyro distribution of real"):
            AnyNoise(Cosine(), laplace(), noise)


def test_what_it_lacks_is_refused_by_name():
    process = AnyNoise(Cosine(), laplace(torch.float32))
    assert Ability.FREE_VARIANCE not in process.abilities
    network, x = nn.MLP(2, (8,)), torch.zeros(3, 2)
    denoiser = GaussianDenoiser(network, process)
    for sampler in (DDIM(eta=0.5), AdamsMoulton(eta=1.0)):
        with pytest.raises(
            ValueError, match=r"^sampler: .*lacks bridges of a free.*expected eta=0"
        ):
            simulate(denoiser, uniform(4), x, sampler)
    with pytest.raises(ValueError, match=r"^process: got AnyNoise for a bridge of eta=1"):
        simulate(denoiser, uniform(4), x, Ancestral())
    with pytest.raises(ValueError, match=r"^process: got AnyNoise for a bridge of eta=1"):
        Diffusion(denoiser, (2,), 4).log_prob(x)
    with pytest.raises(ValueError, match="Markov transition"):
        simulate(denoiser, uniform(4), x, Heun(churn=1.0))
    with pytest.raises(ValueError, match="Markov transition"):
        process.transition(x, 0.2, 0.4)
    with pytest.raises(ValueError, match="Tweedie"):
        GaussianDenoiser(network, process, Score())
    with pytest.raises(ValueError, match="stochastic differential equation"):
        DiffusionSDE(denoiser, (2,))


def test_noise_of_transformed_distributions_is_cast():
    shifted = TransformedDistribution(
        Normal(torch.zeros((), dtype=F64), 1.0),
        [torch.distributions.AffineTransform(torch.tensor(1.0, dtype=F64), 2.0)],
    )
    process = AnyNoise(Cosine(), shifted)
    x = torch.randn(4, 2)
    assert process.marginal(x, 0.5).rsample().dtype == torch.float32
    assert process.marginal(x, 0.5).log_prob(x).dtype == torch.float32


def test_noise_made_of_transforms_and_their_inverses():
    """A transform and its inverse know each other: copies end all the same."""
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    logistic = TransformedDistribution(Uniform(zero, one), [SigmoidTransform().inv])
    for noise in (Gumbel(zero, one), logistic):
        marginal = AnyNoise(Cosine(), noise).marginal(torch.zeros(3, 2, dtype=F64), 0.5)
        x = marginal.sample()
        sigma = Cosine().level(torch.tensor(0.5)).sigma
        wanted = (noise.log_prob((x / sigma).float()) - sigma.log()).sum(-1)
        assert x.dtype == F64
        torch.testing.assert_close(marginal.log_prob(x), wanted.double(), rtol=1e-4, atol=1e-4)
