"""Variances of the posterior that are measured or fitted, and the grid that is best for them.

Monte-Carlo comparisons accept 4.5 standard errors per number (a two-sided false alarm in 7e-6 of seeds, below
1e-3 for a whole test). Seeds are fixed, so a test that passes passes always.
"""

import itertools
import pickle

import pyro
import pytest
import torch
from pyro.distributions import Delta, Normal
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence
from torch.testing import assert_close

from pyro_diffusion import checkpoint
from pyro_diffusion.denoisers import (
    NPR,
    SN,
    CategoricalDenoiser,
    EstimatedVariance,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    MixtureDenoiser,
    TimeVariance,
    VarianceDenoiser,
    analytic_variance,
    residual_variance,
    uniform_levels,
    unit_variance,
)
from pyro_diffusion.distributions import Diffusion, MomentRegression, QuantizedDecoder
from pyro_diffusion.evaluate import chain_costs, log_likelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.optim import JointOptim
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, Rectified, optimal_grid, uniform
from pyro_diffusion.schedules.optimal_grid import optimal_grids, step_costs
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import SCHEDULES, mixture
from tests.small_diffusions import Tiny

F64 = torch.float64
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


def isotropic(variance=0.49, size=4) -> MixtureDenoiser:
    means = torch.full((1, size), 0.3, dtype=F64)
    return MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1, dtype=F64), means, variance)


class Wrong(MixtureDenoiser):
    """The exact posterior with its mean pulled towards zero."""

    def forward(self, xt, t, **context):
        law = per_coordinate(super().forward(xt, t))
        return Normal(0.8 * law.mean, law.scale).to_event(1)


def wrong() -> Wrong:
    exact = mixture(Cosine())
    return Wrong(exact.process, exact.weights, exact.means, exact.variances)


# One number per noise level


@each_schedule
def test_analytic_and_residual_are_the_average_variance_of_an_exact_mean(make):
    denoiser = mixture(make())
    data = denoiser.data().sample((4000,))
    knots = torch.linspace(-6, 6, 9, dtype=F64)
    for estimate in (analytic_variance, residual_variance):
        measured = estimate(denoiser, data, knots=knots)
        assert measured.value.dtype == F64
        for knot, value, error in zip(knots, measured.value, measured.standard_error, strict=True):
            level = denoiser.process.schedule.level(denoiser.process.schedule.time_of_log_snr(knot))
            xt = denoiser.process.marginal(denoiser.data().sample((40_000,)), level).sample()
            truth = denoiser(xt, level).variance.mean(-1)
            # The clip at the data's own variance may bind where nothing is known: it only helps.
            spread = (error**2 + truth.var() / len(truth)).sqrt()
            assert abs(value - truth.mean()) <= 4.5 * spread


def test_standard_errors_are_those_of_repetitions():
    denoiser, knots = isotropic(), torch.tensor([-1.0, 2.0], dtype=F64)  # where no clip binds
    values, errors = [], []
    for _ in range(150):
        data = denoiser.data().sample((200,))
        measured = analytic_variance(denoiser, data, knots=knots, num_samples=2)
        values.append(measured.value)
        errors.append(measured.standard_error)
    ratio = torch.stack(values).std(0) / torch.stack(errors).mean(0)
    assert ((ratio > 0.77) & (ratio < 1.23)).all()  # 150 repetitions: 4 standard errors are 0.23


def test_only_the_residual_sees_an_error_of_the_mean():
    denoiser, exact = wrong(), mixture(Cosine())
    data, knots = denoiser.data().sample((20_000,)), torch.tensor([-1.0, 1.0], dtype=F64)
    residual = residual_variance(denoiser, data, knots=knots)
    level = denoiser.process.level(denoiser.process.schedule.time_of_log_snr(knots[1]))
    xt = denoiser.process.marginal(data, level).sample()
    law = exact(xt, level)
    expected = (law.variance + (0.2 * law.mean).square()).mean()
    assert abs(residual.value[1] - expected) <= 6 * residual.standard_error[1]
    # The formula of analytic_variance, word by word.
    noise = (xt - level.alpha * denoiser(xt, level).mean) / level.sigma
    analytic = analytic_variance(denoiser, data, knots=knots)
    word = (level.sigma / level.alpha).square() * (1 - noise.square().mean(-1))
    assert abs(analytic.value[1] - word.mean()) <= 4.5 * word.std() / len(word) ** 0.5
    assert abs(analytic.value[1] - residual.value[1]) > 10 * residual.standard_error[1]


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_analytic_makes_the_bound_exact_on_isotropic_data(steps):
    """Any number of steps; what is left is the estimate's own error, of second order."""
    denoiser = isotropic()
    variance = analytic_variance(denoiser, denoiser.data().sample((5000,)), knots=60)
    wrapped = VarianceDenoiser(MixtureDenoiser(*_parts(denoiser), point_mass=True), variance)
    data = denoiser.data().sample((4000,))
    result = log_likelihood(Diffusion(wrapped, (4,), steps), data)
    gap = denoiser.data().log_prob(data) - result.value
    assert abs(gap.mean()) <= 4.5 * gap.std() / len(gap) ** 0.5 + 2e-3
    # The point mass is far away, so that the test would notice.
    point = log_likelihood(Diffusion(VarianceDenoiser(denoiser), (4,), steps), data)
    assert (result.value - point.value).mean() > 0.1


def _parts(denoiser):
    return denoiser.process, denoiser.weights, denoiser.means, denoiser.variances


def test_variances_are_clipped():
    """To the data's variance above (a hopeless mean), to e^-15 of the noise's below (a certain one)."""
    data = torch.randn(50, 3, dtype=F64)
    process = GaussianProcess(Cosine())

    class Far(MixtureDenoiser):
        def forward(self, xt, t, **context):
            level = self.process.level(t, xt)
            mean = xt / level.alpha if self.sure else 0 * xt
            return Delta(mean, event_dim=1)

    denoiser = Far(process, torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), 1.0)
    denoiser.sure = False  # eps_hat = x_t / sigma: 1 - |eps_hat|^2/d is far below zero
    assert_close(
        analytic_variance(denoiser, data, knots=5).log_ratio, torch.full((5,), -15.0, dtype=F64)
    )
    denoiser.sure = True  # eps_hat = 0: v would be sigma^2/alpha^2
    knots = torch.tensor([-8.0, -5.0, 5.0], dtype=F64)
    high = analytic_variance(denoiser, data, knots=knots, num_samples=20).value
    assert_close(high[:2], data.var(0).mean().expand(2))
    # Its average over 20 * 150 draws scatters by 2.6%, and only downwards.
    assert 0.9 <= high[2] * torch.tensor(5.0, dtype=F64).exp() <= 1 + 1e-6


def test_an_estimate_travels_in_a_checkpoint(tmp_path):
    denoiser = mixture(Cosine())
    other = MixtureDenoiser(
        denoiser.process, torch.ones(3, dtype=F64), torch.zeros(3, 2, dtype=F64), 0.2
    )
    variance = analytic_variance(denoiser, denoiser.data().sample((100,)), knots=7)
    assert not any(p.requires_grad for p in variance.parameters())
    wrapped = VarianceDenoiser(denoiser, variance)
    checkpoint.save_module(tmp_path / "model.safetensors", wrapped)
    empty = EstimatedVariance(torch.linspace(0, 1, 7, dtype=F64)).double()
    fresh = VarianceDenoiser(other, empty)
    checkpoint.load_module(tmp_path / "model.safetensors", fresh)
    x = torch.randn(3, 2, dtype=F64)
    assert_close(fresh(x, 0.4).mean, wrapped(x, 0.4).mean)
    assert_close(fresh(x, 0.4).variance, wrapped(x, 0.4).variance)
    assert_close(fresh.variance.standard_error, variance.standard_error)


# Heads


class Oracle(nn.Module):
    """A head network that knows the mixture: under a variance-preserving schedule it sees x_t itself."""

    def __init__(self, denoiser, head):
        super().__init__()
        self.denoiser, self.head = denoiser, head

    def forward(self, x, log_snr):
        t = self.denoiser.process.schedule.time_of_log_snr(log_snr)
        level = self.denoiser.process.level(t, x)
        law = self.denoiser(x, level)
        if isinstance(self.head, SN) and not self.head.skip:
            noise = (x - level.alpha * law.mean) / level.sigma
            return (level.log_snr.exp() * law.variance + noise.square()).log()
        return (law.variance / unit_variance(level)).log()


HEADS = {"npr": NPR, "sn": SN, "sn skip": lambda: SN(skip=True)}
each_head = pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)


@each_head
def test_an_oracle_head_recovers_the_variance_per_coordinate(make_head):
    denoiser, head = mixture(Cosine()), make_head()
    wrapped = VarianceDenoiser(denoiser, head, Oracle(denoiser, head))
    x = torch.randn(200, 2, dtype=F64)
    for t in (0.05, 0.3, 0.6, 0.9):
        assert_close(wrapped(x, t).variance, denoiser(x, t).variance, rtol=1e-4, atol=1e-9)
        assert_close(wrapped(x, t).mean, denoiser(x, t).mean)


@each_head
@pytest.mark.parametrize("t", [0.15, 0.5, 0.8])
def test_the_target_of_a_head_averages_to_its_moment_given_the_state(make_head, t):
    """E[(y - h(x_t)) psi(x_t)] = 0 for any psi, with h of the oracle."""
    denoiser, head = mixture(Cosine()), make_head()
    level = denoiser.process.level(t, torch.zeros(1, 2, dtype=F64))
    x0 = denoiser.data().sample((100_000,))
    eps = torch.randn_like(x0)
    xt = level.alpha * x0 + level.sigma * eps
    law = per_coordinate(VarianceDenoiser(denoiser, head, Oracle(denoiser, head))(xt, level))
    y = head.target(eps - law.noise, law.noise)
    if isinstance(head, SN):
        assert_close(y, eps.square())
    for psi in (torch.ones_like(xt), torch.sin(2 * xt), xt.flip(-1).square()):
        z = (y - law.moment) * psi
        assert (z.mean(0).abs() <= 4.5 * z.std(0) / len(z) ** 0.5).all()
    assert y.std() > 0.1 * y.mean() > 0


@each_head
@pytest.mark.parametrize("deviance", [False, True])
def test_the_regression_is_least_at_the_oracle(make_head, deviance):
    """In expectation, among shifts of the head: the cost is higher to either side."""
    denoiser, head = mixture(Cosine(4.0, -3.0)), make_head()
    oracle = Oracle(denoiser, head)
    data = denoiser.data().sample((40_000,))

    class Shifted(nn.Module):
        def forward(self, x, log_snr):
            return oracle(x, log_snr) + self.shift

    network = Shifted()
    objective = MomentRegression(deviance)
    costs = []
    for shift in (-1.0, 0.0, 1.0):
        network.shift = shift
        law = Diffusion(VarianceDenoiser(denoiser, head, network), (2,), 20, objective=objective)
        pyro.set_rng_seed(3)  # common noise
        costs.append(-law.log_prob(data))
        assert costs[-1].shape == (40_000,)
    low, best, high = costs
    for other in (low, high):
        gap = other - best
        assert gap.mean() > 2 * gap.std() / len(gap) ** 0.5


@pytest.mark.parametrize("make_head", [NPR, lambda: SN(skip=True)], ids=["npr", "sn skip"])
def test_a_short_regression_recovers_the_variance(make_head):
    """By plain SVI at a Diffusion site: closer to the truth than the best single number per noise level."""
    denoiser, head = mixture(Cosine(5.0, -3.0)).float(), make_head()
    network = MLP(2, hidden=(64, 64))
    wrapped = VarianceDenoiser(denoiser, head, network)
    optim = JointOptim(
        torch.optim.Adam,
        {"lr": 5e-3},
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {"T_max": 400},
    )
    objective = MomentRegression(deviance=isinstance(head, NPR))
    law = denoiser.data()

    def model(x):
        pyro.module("head", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Diffusion(wrapped, (2,), 100, objective=objective), obs=x)

    svi = SVI(model, lambda x: None, optim, Trace_ELBO())
    for _ in range(400):
        svi.step(law.sample((256,)))
        optim.step()
    analytic = VarianceDenoiser(
        denoiser, analytic_variance(denoiser, law.sample((2000,)), knots=50)
    )
    gap = {"head": 0.0, "analytic": 0.0}
    for t in (0.3, 0.5, 0.7):
        xt = denoiser.process.marginal(law.sample((4000,)), torch.tensor(t)).sample()
        truth = denoiser(xt, t).variance
        for name, each in (("head", wrapped), ("analytic", analytic)):
            gap[name] += float((each(xt, t).variance.detach() - truth).square().mean().sqrt())
    assert gap["head"] < 0.7 * gap["analytic"]


def test_a_frozen_base_stays_as_it_is():
    base = GaussianDenoiser(MLP(2, hidden=(8,), dropout=0.5), GaussianProcess(Cosine()))
    before = {k: v.clone() for k, v in base.state_dict().items()}
    wrapped = VarianceDenoiser(base.requires_grad_(False), NPR(), MLP(2, hidden=(8,)))
    wrapped.train()
    assert wrapped.network.training and not base.training

    def model(x):
        pyro.module("head", wrapped.network)
        with pyro.plate("data", len(x)):
            law = Diffusion(wrapped, (2,), 10, objective=MomentRegression())
            pyro.sample("x", law, obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    start = [p.clone() for p in wrapped.network.parameters()]
    for _ in range(2):
        svi.step(torch.randn(16, 2))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert len(list(pyro.get_param_store())) == len(start)
    assert any(
        not torch.equal(a, b) for a, b in zip(start, wrapped.network.parameters(), strict=True)
    )
    trained = GaussianDenoiser(MLP(2), GaussianProcess(Cosine()))
    assert VarianceDenoiser(trained).train().denoiser.training


# The wrapper


def image(levels=False):
    process = GaussianProcess(Cosine(), event_dim=3)
    if levels:
        return LevelsDenoiser(Tiny((1, 2, 2), 4), process, uniform_levels(4))
    return GaussianDenoiser(Tiny((1, 2, 2)), process)


VARIANCES = {
    "point mass": (lambda: None, False),
    "unit": (lambda: unit_variance, False),
    "time": (lambda: TimeVariance([-5.0, 5.0], [0.1, -0.3]), False),
    "estimated": (
        lambda: EstimatedVariance(torch.tensor([-5.0, 5.0]), torch.tensor([1.0, 0.1])),
        False,
    ),
    "learned": (LearnedVariance, True),
    "npr": (NPR, True),
    "sn": (SN, True),
    "sn skip": (lambda: SN(skip=True, largest=1.0), True),
}
each_variance = pytest.mark.parametrize("make, head", VARIANCES.values(), ids=VARIANCES)


@each_variance
@pytest.mark.parametrize("levels", [False, True], ids=["gaussian", "levels"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_contract(make, head, levels, dtype):
    base = image(levels)
    network = Tiny((1, 2, 2)) if head else None
    wrapped = VarianceDenoiser(base, make(), network).to(dtype)
    for batch in ((), (1,), (2, 3)):
        x = torch.randn(*batch, 1, 2, 2, dtype=dtype)
        for t in (0.3, torch.rand(batch, dtype=dtype)):
            law = wrapped(x, t)
            assert law.batch_shape == batch and law.event_shape == (1, 2, 2)
            assert law.mean.dtype == dtype and torch.isfinite(law.variance).all()
            assert_close(law.mean, base(x, t).mean)
            assert law.expand((5, *batch)).batch_shape == (5, *batch)
    x = torch.randn(4, 1, 2, 2, dtype=dtype)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=dtype)
    together, alone = wrapped(x, t).variance, wrapped(x[1], t[1]).variance
    assert_close(together[1], alone, rtol=1e-4, atol=1e-7)
    again = pickle.loads(pickle.dumps(wrapped))
    assert_close(again(x, t).variance, together)
    again.load_state_dict(wrapped.state_dict())
    data = torch.randint(4, (6, 1, 2, 2))
    chain = Diffusion(wrapped, (1, 2, 2), 4, decoder=QuantizedDecoder(4))
    assert torch.isfinite(chain.log_prob(data)).all()
    assert chain.sample((2,)).shape == (2, 1, 2, 2)


def test_the_variance_is_the_one_asked_for():
    base, x = image(), torch.randn(5, 1, 2, 2)
    level = base.process.level(torch.rand(5))
    assert isinstance(per_coordinate(VarianceDenoiser(base)(x, level)), Delta)
    unit = VarianceDenoiser(base, unit_variance)(x, level).variance
    assert_close(unit, (level.sigma**2 / (level.alpha**2 + level.sigma**2)).expand_as(x))
    for head in (NPR(), SN(skip=True)):  # untrained networks of zeros: F = 0
        network = Tiny((1, 2, 2))
        nn.init.zeros_(network.last.weight)
        nn.init.zeros_(network.last.bias)
        assert_close(VarianceDenoiser(base, head, network)(x, level).variance, unit)


def test_sn_is_clipped():
    class Constant(nn.Module):
        def forward(self, x, log_snr):
            return torch.full_like(x, self.value)

    base, network = isotropic(), Constant()
    x, level = (
        3 * torch.randn(50, 4, dtype=F64),
        base.process.level(0.7, torch.zeros(1, 4, dtype=F64)),
    )
    network.value = -15.0
    low = VarianceDenoiser(base, SN(), network)(x, level).variance
    assert_close(
        low.min(), torch.tensor(-15.0, dtype=F64).exp() * unit_variance(level), rtol=1e-5, atol=0
    )
    network.value = 15.0
    assert VarianceDenoiser(base, SN(largest=1.0), network)(x, level).variance.max() == 1.0


def test_context_reaches_base_and_head():
    base = GaussianDenoiser(Tiny((3,), context=True), GaussianProcess(Cosine()))
    wrapped = VarianceDenoiser(base, NPR(), Tiny((3,), context=True))
    x = torch.randn(4, 3)
    first, second = (wrapped(x, 0.5, label=torch.full((4,), i)) for i in (0, 1))
    assert not torch.allclose(first.mean, second.mean)
    assert not torch.allclose(first.variance, second.variance)
    assert wrapped.context_event_dim("y", torch.zeros(2)) == 1


def test_the_network_may_see_the_noise_estimate():
    class Seen(nn.Module):
        def forward(self, x, log_snr, noise, label=None):
            self.noise = noise
            return noise

    base, network = image(), Seen()
    wrapped = VarianceDenoiser(base, NPR(), network, show_noise=True)
    x, level = torch.randn(2, 3, 1, 2, 2), base.process.level(0.4, torch.zeros(1))
    law = wrapped(x, level)
    noise = (x - level.alpha * base(x, level).mean) / level.sigma
    assert_close(network.noise, noise.reshape(6, 1, 2, 2))
    assert_close(law.variance, noise.exp() * unit_variance(level), rtol=1e-4, atol=1e-7)


# The optimal grid


@each_schedule
def test_a_steps_cost_is_the_divergence_of_its_kernels(make):
    process = GaussianProcess(make())
    s, t = torch.tensor(0.31, dtype=F64), torch.tensor(0.57, dtype=F64)
    xt, x0, mean = torch.randn(3, 5, 2, dtype=F64)
    variance = torch.rand(5, 2, dtype=F64) + 0.1
    posterior = Normal(mean, variance.sqrt()).to_event(1)
    gain = process.schedule.log_snr(s).exp() - process.schedule.log_snr(t).exp()
    for law, v in ((posterior, variance), (Delta(mean, event_dim=1), torch.zeros(()))):
        exact = kl_divergence(process.bridge(xt, x0, s, t), process.reverse(xt, law, s, t))
        assert_close(step_costs(gain, v, (x0 - mean).square()).sum(-1), exact, rtol=1e-7, atol=1e-9)


def test_chain_costs_are_divergences_averaged_over_data():
    """Under the same noise, for a point mass, one number and one per coordinate."""
    exact = mixture(Cosine(5.0, -5.0))
    times, data = uniform(6, F64), exact.data().sample((30,))
    variance = analytic_variance(exact, data, knots=20)
    for denoiser in (VarianceDenoiser(exact), VarianceDenoiser(exact, variance), exact):
        pyro.set_rng_seed(1)
        costs = chain_costs(denoiser, data, times, num_samples=2)
        pyro.set_rng_seed(1)
        noise = torch.randn(2, 30, 2, dtype=F64)
        assert costs.shape == (7, 7) and torch.isinf(costs.tril()[costs.tril() != 0]).all()
        for i, j in itertools.combinations(range(7), 2):
            level = denoiser.process.level(times[j])
            xt = level.alpha * data + level.sigma * noise
            bridge = exact.process.bridge(xt, data.expand(2, 30, 2), times[i], times[j])
            reverse = exact.process.reverse(xt, denoiser(xt, times[j]), times[i], times[j])
            assert_close(costs[i, j], kl_divergence(bridge, reverse).mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_grid_is_the_best_of_all_subsets(seed):
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(9, generator=generator, dtype=F64).sort().values
    unread = torch.full((9, 9), torch.nan, dtype=F64).tril()
    costs = torch.rand(9, 9, generator=generator, dtype=F64).triu(1) + unread.nan_to_num(-7.0)

    def total(path):
        return sum(float(costs[i, j]) for i, j in itertools.pairwise(path))

    for steps in range(1, 9):
        inner = itertools.combinations(range(1, 8), steps - 1)
        best = min(((0, *path, 8) for path in inner), key=total)
        assert_close(optimal_grid(times, costs, steps), times[list(best)])
    several = optimal_grids(times, costs, [2, 7])
    assert_close(several[2], optimal_grid(times, costs, 2))
    assert len(several[7]) == 8


def test_the_optimal_grid_tightens_the_bound():
    """Held-out data: the costs of both grids under one noise, and the bound where it is far from log p."""
    exact = mixture(Cosine())
    times = uniform(60, F64)
    for denoiser in (VarianceDenoiser(exact), exact):
        costs = chain_costs(denoiser, exact.data().sample((500,)), times)
        held_out = chain_costs(denoiser, exact.data().sample((2000,)), times)
        for steps in (3, 6, 15):
            grid = optimal_grid(times, costs, steps)
            place = torch.searchsorted(times, grid).tolist()
            even = range(0, 61, 60 // steps)
            best, plain = (
                sum(float(held_out[i, j]) for i, j in itertools.pairwise(p)) for p in (place, even)
            )
            assert best < plain + 1e-3 * abs(plain)
            if steps < 15:
                assert best < plain
    data, bounds = exact.data().sample((500,)), []
    for each in (
        optimal_grid(times, chain_costs(VarianceDenoiser(exact), data, times), 6),
        uniform(6),
    ):
        law = Diffusion(VarianceDenoiser(exact), (2,), times=each.to(F64))
        bounds.append(log_likelihood(law, data).value)
    gain = bounds[0] - bounds[1]
    assert gain.mean() > 4.5 * gain.std() / len(gain) ** 0.5


# Bad input


def categorical():
    return CategoricalDenoiser(Tiny((3,), 5), Absorbing(Rectified.full(), 5))


BAD = {
    "categorical": (lambda: VarianceDenoiser(categorical()), "denoiser: got CategoricalDenoiser"),
    "no denoiser": (lambda: VarianceDenoiser(MLP(2)), "denoiser: got MLP"),
    "variance": (lambda: VarianceDenoiser(isotropic(), "beta"), "variance: got 'beta'"),
    "no network": (lambda: VarianceDenoiser(isotropic(), NPR()), "network: got NoneType"),
    "network": (lambda: VarianceDenoiser(isotropic(), None, MLP(4)), "network: got MLP"),
    "largest": (lambda: SN(largest=0.0), "largest: got 0.0"),
    "head alone": (lambda: NPR()(torch.zeros(2), Cosine().level(0.5)), "variance: got NPR"),
    "head elsewhere": (
        lambda: GaussianDenoiser(MLP(2, outputs=2), GaussianProcess(Cosine()), variance=SN())(
            torch.zeros(1, 2), 0.5
        ),
        "variance: got SN",
    ),
    "head shape": (
        lambda: VarianceDenoiser(isotropic(), NPR(), MLP(4, outputs=2))(torch.zeros(1, 4), 0.5),
        "network: got an output",
    ),
    "objective": (
        lambda: Diffusion(isotropic(), (4,), 3, objective=MomentRegression()).log_prob(
            torch.zeros(4, dtype=F64)
        ),
        "objective: got MomentRegression",
    ),
    "one datum": (lambda: analytic_variance(isotropic(), torch.zeros(1, 4)), "data: got shape"),
    "data shape": (lambda: residual_variance(isotropic(), torch.zeros(4)), "data: got shape"),
    "integers": (
        lambda: analytic_variance(isotropic(), torch.ones(3, 4).long()),
        "data: got torch",
    ),
    "nan": (lambda: analytic_variance(isotropic(), torch.full((3, 4), torch.nan)), "data: got 12"),
    "knots": (lambda: analytic_variance(isotropic(), torch.zeros(3, 4), knots=1), "knots: got 1"),
    "knots order": (
        lambda: analytic_variance(isotropic(), torch.zeros(3, 4), knots=torch.tensor([1.0, 0.0])),
        "log_snr: got",
    ),
    "draws": (
        lambda: analytic_variance(isotropic(), torch.zeros(3, 4), num_samples=0),
        "num_samples: got 0",
    ),
    "negative": (
        lambda: EstimatedVariance(torch.tensor([0.0, 1.0]), torch.tensor([1.0, -1.0])),
        "variance: got -1",
    ),
    "too many steps": (lambda: optimal_grid(uniform(3), torch.zeros(4, 4), 4), "steps: got 4"),
    "no steps": (lambda: optimal_grid(uniform(3), torch.zeros(4, 4), 0), "steps: got 0"),
    "costs": (lambda: optimal_grid(uniform(3), torch.zeros(3, 3), 1), "costs: got shape"),
    "nan costs": (
        lambda: optimal_grid(uniform(3), torch.full((4, 4), torch.nan), 1),
        "costs: got NaN",
    ),
    "times": (lambda: optimal_grid(torch.zeros(4), torch.zeros(4, 4), 1), "times: got shape"),
    "chain": (
        lambda: chain_costs(isotropic(), torch.zeros(3, 4), torch.tensor([0.5, 0.1])),
        "times: got a grid",
    ),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
