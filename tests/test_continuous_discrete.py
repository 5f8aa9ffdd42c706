"""Symbols in continuous time: the bound against enumeration and quadrature, and exact sampling."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from pyro.distributions import Categorical
from torch import nn
from torch.distributions import kl_divergence
from torch.testing import assert_close

from pyro_diffusion.denoisers import CategoricalDenoiser, Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import DiffusionCTMC
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.processes.categorical import CategoricalProcess
from pyro_diffusion.samplers import Ancestral, FirstHitting, simulate
from pyro_diffusion.schedules import Cosine, LearnedSchedule, Rectified, uniform
from tests.discrete import (
    F64,
    JOINT,
    PROCESSES,
    all_states,
    chain_bound,
    chi_square,
    chi_square_limit,
    continuous_bound,
    ends,
    exact,
    expected,
    nodes,
    rate,
)

each_process = pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES)
X0 = torch.tensor([0, 2])


class Wrong(Denoiser):
    """Another posterior at every state, the same at every time."""

    def __init__(self, process, length=2):
        super().__init__(process)
        generator = torch.Generator().manual_seed(3)
        states = all_states(process, length)
        logits = torch.randn(len(states), length, process.states, generator=generator, dtype=F64)
        self.logits = nn.Parameter(logits)
        self.place = len(process.noise) ** torch.arange(length - 1, -1, -1)

    def forward(self, xt, t, **context):
        logits = self.logits[(xt * self.place).sum(-1)]
        return Categorical(logits=logits + self.own(xt, t)).to_event(1)

    def own(self, xt, t):
        return self.process.coordinate_log_likelihood(xt, torch.arange(self.process.states), t)


# The algebra


@each_process
def test_integrand_is_the_limit_of_the_chains_divergence(make):
    process = make()
    wrong = Wrong(process)
    for t in (0.2, 0.7):
        level = process.level(torch.tensor(t, dtype=F64))
        got = rate(wrong, X0, t).detach()
        errors = []
        for h in (1e-3, 1e-4):
            early = process.level(torch.tensor(t - h, dtype=F64))

            def cost(x, early=early, level=level):
                bridge = process.bridge(x, X0.expand_as(x), early, level)
                kernel = process.reverse(x, wrong(x, level), early, level)
                return kl_divergence(bridge, kernel).detach()

            errors.append(float((expected(process, X0, level, cost) / h - got).abs()))
        assert errors[0] < 0.05 * float(got) and errors[1] < 0.15 * errors[0] + 1e-9


@pytest.mark.parametrize("t", [1e-3, 0.4, 0.999])
def test_closed_form_of_masking_is_the_general_one(t):
    process = Absorbing(Rectified.full(), 3)
    x = all_states(process, 2)
    x0, rates = X0.expand_as(x), process.rates(torch.full((len(x),), t, dtype=F64))
    posterior = Wrong(process)(x, rates.level)
    general = CategoricalProcess.divergence_rate(process, x0, x, posterior, rates)
    possible = ((x == X0) | (x == process.mask)).all(-1)
    got = process.divergence_rate(x0, x, posterior, rates)
    assert_close(got[possible], general[possible], rtol=1e-10, atol=1e-10)


@each_process
@pytest.mark.parametrize("symbol", [0, 2])
def test_one_symbol_by_quadrature(make, symbol):
    joint = torch.tensor([0.7, 0.1, 0.2], dtype=F64)
    denoiser, x0 = exact(make(), joint), torch.tensor([symbol])
    # The chain of one symbol is exact in any number of steps.
    got = continuous_bound(denoiser, x0)
    assert got == pytest.approx(chain_bound(denoiser, x0, 3), abs=1e-6)
    if denoiser.process.clock_ends[1] == -math.inf:  # else the prior is that of uniform data
        assert got == pytest.approx(-math.log(joint[symbol]), abs=1e-6)


@each_process
def test_several_symbols_by_quadrature(make):
    denoiser, want = exact(make()), -float(JOINT[tuple(X0)].log())
    got = continuous_bound(denoiser, X0)
    full = denoiser.process.clock_ends[1] == -math.inf
    assert got == pytest.approx(want, abs=1e-6) if full else want < got < want + 0.1


@each_process
def test_another_posterior_is_below(make):
    wrong = Wrong(make())
    total = sum(
        math.exp(-continuous_bound(wrong, torch.tensor(x0), 30))
        for x0 in itertools.product(range(3), repeat=2)
    )
    assert total < 0.99  # a density of all data would sum to one


@pytest.mark.parametrize("name", ["absorbing", "uniform", "skew", "gaussian", "varying"])
def test_chain_tends_to_it(name):
    denoiser = exact(PROCESSES[name]())
    gaps = [chain_bound(denoiser, X0, steps) + float(JOINT[tuple(X0)].log()) for steps in (8, 64)]
    assert gaps[0] > gaps[1] > 0
    assert gaps[1] < 0.2 * gaps[0]  # of order one in the step


def test_orders_of_autoregression():
    """A network that ignores the level: the bound averages autoregression over all orders."""

    class TimeFree(Wrong):
        def own(self, xt, t):
            return torch.zeros((), dtype=F64)

    process, x0 = Absorbing(Rectified.full(), 3), torch.tensor([2, 0, 1])
    denoiser = TimeFree(process, 3)
    start = process.level(torch.tensor(0.0, dtype=F64))
    total = 0.0
    for order in itertools.permutations(range(3)):
        x = torch.full((3,), process.mask)
        for i in order:
            total -= float(denoiser(x, start).base_dist.log_prob(x0)[i].detach())
            x[i] = x0[i]
    # The decoder's term is apart: at t = 0 nothing is masked, and this network forgets what it sees.
    terms = [w * rate(denoiser, x0, t).detach() for t, w in zip(*nodes(20), strict=True)]
    assert float(sum(terms)) == pytest.approx(total / 6, abs=5e-11)
    chain = chain_bound(denoiser, x0, 4) - float(ends(denoiser, x0))
    assert chain > total / 6 + 0.01


# Precision and gradients


@each_process
@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.5, 1 - 1e-4, 1 - 1e-6])
def test_single_precision(make, t):
    process = make()
    x = all_states(process, 2)
    out = []
    for dtype in (torch.float32, F64):
        rates = process.rates(torch.full((len(x),), t).to(dtype))
        level = process.level(torch.tensor(t).to(dtype))
        log_prob = process.marginal(X0.expand_as(x), level).log_prob(x).double()
        posterior = exact(process, JOINT.to(dtype))(x, rates.level)
        cost = process.divergence_rate(X0.expand_as(x), x, posterior, rates).double()
        weight = log_prob.exp().where(log_prob > -80, 0.0)
        out.append((weight * cost).sum())
        assert bool(cost.isfinite().all())
    # Survival near 1 has seven digits in float32: 1e-6 of loss has one. Costs of order one are right to 1e-3.
    assert_close(out[0], out[1], rtol=0.1 if t < 1e-5 else 1e-3, atol=1e-5)


@each_process
def test_gradients(make):
    wrong = Wrong(make())
    law = DiffusionCTMC(wrong, (2,))
    x = torch.tensor([[0, 2], [1, 1]]).repeat(50, 1)
    law.log_prob(x).sum().backward()
    gradient, logits = wrong.logits.grad, wrong.logits
    way = torch.randn_like(logits)
    with torch.no_grad():
        values = []
        for h in (1e-5, -1e-5):
            logits += h * way
            values.append(law.log_prob(x).sum())
            logits -= h * way
    assert_close((values[0] - values[1]) / 2e-5, (gradient * way).sum(), rtol=1e-5, atol=1e-6)


def test_learned_schedules_get_no_gradient():
    schedule = LearnedSchedule(5, 9.0, -9.0)
    law = DiffusionCTMC(Wrong(Uniform(schedule, 3)), (2,))
    law.log_prob(X0.expand(8, -1)).sum().backward()
    # The bound depends on the ends alone, and these are fixed.
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-5 for p in schedule.parameters())


# The estimate


@each_process
def test_estimate_is_unbiased(make):
    """Five standard errors, of 7 x 2 numbers: a false alarm once in 10^5."""
    torch.manual_seed(0)
    law = DiffusionCTMC(exact(make()), (2,))
    x = torch.tensor([[0, 1], [2, 2]])
    got = law.log_prob(x.repeat(40000, 1)).reshape(-1, 2)
    error = got.std(0) / math.sqrt(len(got))
    assert bool((error < 0.1).all())
    want = -torch.tensor([continuous_bound(law.denoiser, v) for v in x])
    assert bool(((got.mean(0) - want).abs() < 5 * error).all())


@each_process
def test_terms(make):
    law = DiffusionCTMC(exact(make()), (2,))
    x = X0.expand(20000, -1)
    got = law.bound_terms(x, 0.3)
    want = rate(law.denoiser, X0, 0.3)
    assert abs(float(got.mean() - want)) < 5 * float(got.std()) / math.sqrt(len(got))
    # A position u stands for the time u^2.
    got = law.reverse_terms(x, torch.full((len(x),), 0.3**0.5, dtype=F64))
    assert abs(float(got.mean() - 2 * 0.3**0.5 * want)) < 10 * float(got.std()) / math.sqrt(
        len(got)
    )
    with pytest.raises(ValueError, match=r"^t: got"):
        law.bound_terms(x, 1.5)


def test_evaluation():
    torch.manual_seed(1)
    x = torch.tensor([[0, 1], [2, 2], [1, 1]])
    got = log_likelihood(
        DiffusionCTMC(exact(Uniform(Rectified.full(), 3)), (2,)), x, num_terms=4000
    )
    error = got.standard_error
    assert bool(((got.value - JOINT[x[:, 0], x[:, 1]].log()).abs() < 4 * error + 1e-3).all())


# Sampling


def counted(x):
    return torch.bincount(3 * x[:, 0] + x[:, 1], minlength=9).double()


@pytest.mark.parametrize("name", ["absorbing", "absorbing cut"])
@pytest.mark.parametrize("steps", [2, 5])
def test_first_hitting_is_exact(name, steps):
    """Chi-square of all pairs, beyond 4 sigmas: a false alarm once in 30 000, four times."""
    torch.manual_seed(2)
    law = DiffusionCTMC(exact(PROCESSES[name]()), (2,), steps, sampler=FirstHitting())
    counts = counted(law.sample((50000,)))
    assert chi_square(counts, JOINT.flatten()) < chi_square_limit(9)


def test_ancestral_gets_there():
    torch.manual_seed(3)
    limit, found = chi_square_limit(9), {}
    for steps in (2, 256):
        law = DiffusionCTMC(exact(Uniform(Rectified.full(), 3)), (2,), steps)
        found[steps] = chi_square(counted(law.sample((10000,))), JOINT.flatten())
    assert found[256] < limit < found[2]


def test_times_of_loss():
    """Their distribution function is 1 - alpha (Kolmogorov's 1.95 / sqrt(n): once in a thousand)."""
    process = Absorbing(Cosine(8.0, -8.0), 3)
    x = torch.full((20000, 2), process.mask)
    x[0] = 1
    times = process.times_of_loss(x, torch.rand(x.shape, dtype=F64))
    assert bool((times[0] == -1).all())
    late, early = (float(process.level(t).alpha) for t in (1.0, 0.0))
    rows = times[times >= 0].sort().values
    alpha = process.schedule.alpha(rows)
    assert_close(
        (times[1:] >= 0).double().mean(),
        torch.tensor((early - late) / (1 - late)).double(),
        atol=0.003,
        rtol=0,
    )
    spread = (early - alpha) / (early - late)
    gap = (spread - torch.linspace(0, 1, len(spread), dtype=F64)).abs().max()
    assert float(gap) < 1.95 / math.sqrt(len(spread))


def test_symbols_appear_in_order_at_their_times():
    process = Absorbing(Rectified.full(), 3)
    seen = []

    class Spy(Wrong):
        def forward(self, xt, t, **context):
            seen.append((t.t.flatten().clone(), (xt == process.mask).sum(-1)))
            return super().forward(xt, t)

    x = torch.full((6, 4), process.mask)
    out = simulate(Spy(process, 4), uniform(4, F64), x, FirstHitting())
    assert bool((out < process.mask).all())
    times = torch.stack([t for t, _ in seen])
    assert bool((times.diff(dim=0) < 0).all()) and len({*times[0].tolist()}) == 6
    assert [m.tolist() for _, m in seen] == [[4 - j] * 6 for j in range(4)]


@pytest.mark.parametrize(("steps", "left"), [(2, [5, 2]), (3, [5, 4, 2])])
def test_fewer_steps_draw_several(steps, left):
    process = Absorbing(Rectified.full(), 3)
    seen = []
    x = torch.full((2, 3, 5), process.mask)
    denoiser = CategoricalDenoiser(Flat(), process)
    simulate(denoiser, uniform(steps), x, FirstHitting(), callback=lambda _, x: seen.append(x))
    assert [int((x == process.mask).sum(-1).max()) for x in seen] == [
        *left[:1],
        *[-(-5 * (steps - j) // steps) for j in range(1, steps + 1)],
    ]


class Flat(nn.Module):
    def forward(self, x, log_snr):
        return torch.zeros(*x.shape, 3)


@pytest.mark.parametrize("event", [(), (3,), (2, 2)])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("sampler", [Ancestral(), FirstHitting()])
def test_shapes(event, batch, sampler):
    process = Absorbing(Rectified.full(), 3, event_dim=len(event))
    law = DiffusionCTMC(CategoricalDenoiser(Flat(), process), event, 4, sampler=sampler)
    x = law.sample(batch)
    assert x.shape == batch + event and int(x.max()) < 3
    assert law.log_prob(x).shape == batch
    assert law.expand((5,)).sample().shape == (5, *event)
    assert torch.equal(law.log_prob(x), law.log_prob(x))


def test_rows_are_independent():
    torch.manual_seed(0)
    process = Uniform(Rectified.full(), 3)
    wrong = Wrong(process)
    x = torch.randint(3, (5, 2))
    rates = process.rates(torch.rand(5, dtype=F64))
    all_ = process.divergence_rate(x, x.flip(0), wrong(x.flip(0), rates.level), rates)
    for i in range(5):
        one = process.rates(rates.level.t[i, 0])
        xt = x.flip(0)[i]
        assert_close(process.divergence_rate(x[i], xt, wrong(xt, one.level), one), all_[i])


def test_copies_and_repr():
    law = DiffusionCTMC(exact(Absorbing(Rectified.full(), 3)), (2,), 7)
    x = X0.expand(9, -1)
    for other in (copy.deepcopy(law), pickle.loads(pickle.dumps(law))):
        assert torch.equal(other.log_prob(x), law.log_prob(x)) and other.steps == 7
    assert repr(law) == "DiffusionCTMC(TableDenoiser, event_shape=(2,), steps=7)"
    assert law.replace(steps=3).steps == 3


BAD = {
    "numbers": (
        lambda: DiffusionCTMC(GaussianDenoiser(MLP(2), GaussianProcess(Cosine())), (2,)),
        "^denoiser: got GaussianDenoiser under GaussianProcess, which lacks a Markov jump process",
    ),
    "steps": (lambda: DiffusionCTMC(exact(Absorbing(Cosine(), 3)), (2,), 0), "^steps: got 0"),
    "sampler": (
        lambda: DiffusionCTMC(exact(Absorbing(Cosine(), 3)), (2,), sampler=1),
        "^sampler: got 1",
    ),
    "no mask": (
        lambda: DiffusionCTMC(
            exact(Uniform(Cosine(), 3)), (2,), 4, sampler=FirstHitting()
        ).sample(),
        r"^sampler: got FirstHitting\(\) under Uniform, which lacks a mask",
    ),
    "symbols": (
        lambda: DiffusionCTMC(exact(Uniform(Cosine(), 3)), (2,)).log_prob(torch.tensor([0, 3])),
        "^value: got",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
