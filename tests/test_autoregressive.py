"""Autoregressive densities: they sum to one, see nothing of what comes later, and meet masked diffusion.

The chi-square test rejects at p < 1e-5, a false alarm in one of 10^5 seeds; seeds are fixed.
"""

import itertools
import math
import pickle

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy import stats

from pyro_diffusion import checkpoint
from pyro_diffusion.denoisers import CategoricalDenoiser
from pyro_diffusion.distributions import Autoregressive, DiffusionCTMC, OrderAgnostic
from pyro_diffusion.nn import MADE, NADE
from pyro_diffusion.nn.autoregressive import AutoregressiveNetwork
from pyro_diffusion.processes import Absorbing, Uniform
from pyro_diffusion.schedules import Rectified

F64 = torch.float64
close = torch.testing.assert_close


def some_orders(size, count):
    return torch.stack([torch.randperm(size) for _ in range(count)])


class Table(torch.nn.Module):
    """Logits of every place from the masked vector, by random features; time-free unless told otherwise."""

    def __init__(self, size, states, timed=False):
        super().__init__()
        self.states, self.timed = states, timed
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(size * (states + 1), 16),
            torch.nn.Tanh(),
            torch.nn.Linear(16, size * states),
        )

    def forward(self, x, log_snr):
        seen = torch.nn.functional.one_hot(x, self.states + 1).flatten(-2).to(log_snr.dtype)
        out = self.layers(seen).unflatten(-1, (x.shape[-1], self.states))
        return out * (1 + 0.1 * log_snr.clamp(-5, 5).reshape(-1, 1, 1)) if self.timed else out


def masked(size, states, orders=None, timed=False):
    process = Absorbing(Rectified.full(), states)
    return OrderAgnostic(CategoricalDenoiser(Table(size, states, timed), process), size, orders)


KINDS = {
    "made": lambda size, states, orders, **more: MADE(size, (64, 70), states, orders, **more),
    "made with skips": lambda size, states, orders, **more: MADE(
        size, (64,), states, orders, skip=True, **more
    ),
    "nade": lambda size, states, orders, **more: NADE(size, 7, states, orders, **more),
    "order-agnostic": masked,
}
each = pytest.mark.parametrize("kind", KINDS)
with_context = pytest.mark.parametrize("kind", ["made", "made with skips", "nade"])


def network(kind, size, states=2, count=1, scale=2.0, **more):
    """Weights far from those of a start, in double precision."""
    orders = some_orders(size, count)
    net = KINDS[kind](size, states, orders, **more).double()
    for p in net.parameters():
        p.data.mul_(scale).add_(0.1 * torch.randn_like(p))
    return net.requires_grad_(False)


def every_vector(size, states):
    return torch.cartesian_prod(*[torch.arange(states)] * size)


@each
@pytest.mark.parametrize("size, states, count", [(10, 2, 1), (10, 2, 3), (4, 3, 2), (2, 5, 2)])
def test_sums_to_one(kind, size, states, count):
    law = Autoregressive(network(kind, size, states, count))
    total = law.log_prob(every_vector(size, states)).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-12)


@each
def test_no_symbol_sees_a_later_one(kind):
    """Exactly: not a digit of a logit moves. And the earlier ones are seen."""
    net = network(kind, 6, 3, 2)
    x = torch.randint(3, (6,))
    for m, position in itertools.product(range(2), range(6)):
        place = net.orders[m, position]
        changed = x.clone()
        changed[place] = (x[place] + 1) % 3
        same = (net(x, m) == net(changed, m)).all(-1)
        before = net.orders[m, : position + 1]
        assert bool(same[before].all())
        later = net.orders[m, position + 1 :]
        # All but those whose few units are at zero for this vector.
        assert len(later) == 0 or float((~same[later]).double().mean()) > 0.5


@each
def test_one_conditional_is_that_of_all(kind):
    net = network(kind, 5, 3, 2)
    x = torch.randint(3, (7, 5))
    for m, position in itertools.product(range(2), range(5)):
        close(net.conditional(x, position, m), net(x, m)[:, net.orders[m, position]])


def test_nade_is_its_formula():
    net = network("nade", 4)
    x, order = torch.tensor([1, 0, 1, 1]), net.orders[0].tolist()
    for k, i in enumerate(order):
        a = net.hidden_bias + sum(net.inputs[j, 0] * float(x[j]) for j in order[:k])
        logit = net.bias[i, 0] + (net.outputs[i, 0] * (1 / (1 + torch.exp(-a)))).sum()
        close(net(x)[i, 1] - net(x)[i, 0], logit)


def test_made_is_pyros_network():
    """Under its first order; for bits the network's only output is the log-odds."""
    net = network("made", 5, count=2)
    x = torch.randint(2, (6, 5))
    close(net(x)[..., 1], net.network(x.double()))
    assert net.network.permutation.tolist() == net.orders[0].tolist()


@each
def test_draws_follow_the_probabilities(kind):
    law = Autoregressive(network(kind, 3, 3, 2))
    x = law.sample((20_000,))
    assert x.dtype == torch.int64
    counts = (x @ torch.tensor([9, 3, 1])).bincount(minlength=27).double()
    expected = 20_000 * law.log_prob(every_vector(3, 3)).exp()
    keep = expected > 5
    statistic = ((counts - expected)[keep].square() / expected[keep]).sum()
    assert stats.chi2.sf(float(statistic), int(keep.sum()) - 1) > 1e-5


@with_context
def test_context(kind):
    """A row's context is its own, in scores and draws, and gradients flow to it."""
    net = network(kind, 4, 2, 2, context_size=3)
    y = torch.randn(5, 3, dtype=F64, requires_grad=True)
    law = Autoregressive(net, context=y)
    assert law.batch_shape == (5,) and law.sample((2,)).shape == (2, 5, 4)
    x = every_vector(4, 2).unsqueeze(1)
    log_prob = law.log_prob(x)
    close(log_prob.exp().sum(0), torch.ones(5, dtype=F64))
    alone = Autoregressive(net, context=y[3]).log_prob(x[:, 0])
    close(log_prob[:, 3], alone)
    (slope,) = torch.autograd.grad(log_prob[3].sum(), y)
    assert bool((slope != 0).all())
    wide = law.expand((2, 5))
    close(wide.log_prob(x[:7].unsqueeze(1)), log_prob[:7].unsqueeze(1).expand(7, 2, 5))
    sharp = Autoregressive(
        net, context=100 * torch.ones(2, 3, dtype=F64) * torch.tensor([[1], [-1]])
    )
    many = sharp.sample((200,)).double().mean(0)
    exact = (sharp.log_prob(x).exp().unsqueeze(-1) * x).sum(0)
    assert float((many - exact).abs().max()) < 0.2


def test_the_mixture_is_above_the_mean_of_its_orders():
    net = network("made", 6, count=4)
    x = torch.randint(2, (9, 6))
    each_order = torch.stack([Autoregressive(net, m).log_prob(x) for m in range(4)])
    close(Autoregressive(net).log_prob(x), each_order.logsumexp(0) - math.log(4))
    assert bool((Autoregressive(net).log_prob(x) >= each_order.mean(0)).all())


def test_mean_over_all_orders_is_the_bound_of_masked_diffusion():
    """A time-free network; the bound by 20000 draws, to three standard errors (1 in 370 seeds)."""
    torch.manual_seed(3)
    orders = torch.tensor([*itertools.permutations(range(4))])
    net = masked(4, 3, orders).double()
    for p in net.requires_grad_(False).parameters():
        p.mul_(3)
    x = torch.tensor([2, 0, 1, 1])
    exact = torch.stack([Autoregressive(net, m).log_prob(x) for m in range(24)]).mean()
    view = DiffusionCTMC(net.denoiser, (4,))
    with torch.no_grad():
        draws = view.log_prob(x.expand(20000, 4))
    error = float(draws.std() / 20000**0.5)
    assert error < 0.05
    assert float((draws.mean() - exact.detach()).abs()) < 3 * error
    assert float(Autoregressive(net).log_prob(x)) > float(exact)


def test_a_network_that_uses_the_level_is_a_model_all_the_same():
    law = Autoregressive(masked(4, 3, some_orders(4, 2), timed=True).double().requires_grad_(False))
    assert float(law.log_prob(every_vector(4, 3)).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind, count", [("made", 2), ("nade", 1)])
def test_training_by_svi_finds_a_joint(kind, count):
    """A joint of three bits, orders drawn afresh at every step: KL below .01 nats."""
    joint = torch.rand(8, dtype=F64).pow(2)
    joint = joint / joint.sum()
    net = KINDS[kind](3, 2, some_orders(3, count)).double()
    x = every_vector(3, 2)[torch.multinomial(joint, 2000, replacement=True)]

    def model(rows):
        pyro.module("network", net)
        law = Autoregressive(net, order=int(torch.randint(count, ())))
        with pyro.plate("rows", len(rows)):
            pyro.sample("x", law, obs=rows)

    svi = SVI(model, lambda rows: None, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(500):
        svi.step(x)
    log_q = Autoregressive(net).log_prob(every_vector(3, 2)).detach()
    shares = (x @ torch.tensor([4, 2, 1])).bincount(minlength=8).double() / len(x)
    assert float((shares * (shares.log() - log_q)).sum()) < 0.01


def test_contract():
    law = Autoregressive(network("nade", 4, 3))
    assert law.support.event_dim == law.event_dim == 1
    assert law.expand((2,)).expand((3, 2)).sample().shape == (3, 2, 4)
    x = law.expand((2, 3)).sample((5,))
    assert law.log_prob(x).shape == (5, 2, 3)
    close(law.log_prob(x.double()), law.log_prob(x))
    close(pickle.loads(pickle.dumps(law)).log_prob(x), law.log_prob(x))
    masked_law = law.expand((2,)).mask(torch.tensor([True, False]))
    assert float(masked_law.log_prob(x[0, :, 0]).detach()[1]) == 0
    single = Autoregressive(network("made", 4, 3).float())
    assert single.log_prob(x).dtype == torch.float32


@pytest.mark.parametrize("kind", ["made", "nade"])
def test_saved_and_loaded(kind, tmp_path):
    net = network(kind, 4, 3, 2)
    checkpoint.save(tmp_path / "model.safetensors", net.state_dict())
    again = KINDS[kind](4, 3, net.orders).double()
    again.load_state_dict(checkpoint.load(tmp_path / "model.safetensors"))
    again.requires_grad_(False)
    x = torch.randint(3, (5, 4))
    close(Autoregressive(again).log_prob(x), Autoregressive(net).log_prob(x))
    other = KINDS[kind](4, 3, net.orders.flip(1)).double()
    with pytest.raises(ValueError, match="orders: got"):
        other.load_state_dict(net.state_dict())


def test_refusals():
    made = MADE(3, (8,))
    for wrong in (
        lambda: MADE(1, (8,)),
        lambda: MADE(3, ()),
        lambda: MADE(3, (5,), states=3),
        lambda: NADE(3, 0),
        lambda: MADE(3, (8,), orders=torch.tensor([[0, 1, 1]])),
        lambda: MADE(3, (8,), orders=torch.arange(3)),
        lambda: NADE(3, 4, orders=torch.rand(1, 3)),
        lambda: made(torch.zeros(2, 4)),
        lambda: made(torch.full((2, 3), 2)),
        lambda: made(torch.zeros(2, 3), 1),
        lambda: made.conditional(torch.zeros(2, 3), 3),
        lambda: NADE(3, 4).conditional(torch.zeros(2, 3), -1),
        lambda: made(torch.zeros(2, 3), 0, torch.zeros(2, 1)),
        lambda: NADE(3, 4, context_size=2)(torch.zeros(2, 3)),
        lambda: Autoregressive(torch.nn.Linear(2, 2)),
        lambda: Autoregressive(made, order=1),
        lambda: Autoregressive(made, context=torch.zeros(2)),
        lambda: Autoregressive(NADE(3, 4, context_size=2)),
        lambda: Autoregressive(NADE(3, 4, context_size=2), context=torch.zeros(4)),
        lambda: Autoregressive(made).log_prob(torch.full((3,), 2)),
        lambda: OrderAgnostic(made, 3),
        lambda: OrderAgnostic(CategoricalDenoiser(Table(3, 2), Uniform(Rectified.full(), 2)), 3),
    ):
        with pytest.raises(ValueError, match=r"got|Expected"):
            wrong()
    with pytest.raises(NotImplementedError):
        AutoregressiveNetwork(3)(torch.zeros(3))
