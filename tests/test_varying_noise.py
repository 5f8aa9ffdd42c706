"""Noise that changes on the way: all of its distributions and rates against enumeration."""

import copy
import pickle

import pytest
import torch
from pyro.distributions import Categorical
from torch.testing import assert_close

from pyro_diffusion.distributions import DiffusionCTMC
from pyro_diffusion.processes import CategoricalProcess, VaryingNoise
from pyro_diffusion.schedules import Cosine, Rectified
from pyro_diffusion.unwrapping import per_coordinate
from tests.discrete import F64, MENDING, SKEW, chi_square, chi_square_limit, exact

# Three stages that transitions can follow: a little of one symbol, then of another, then masks.
THREE = torch.tensor([[0.3, 0, 0.3, 0.4], [0.1, 0.2, 0.2, 0.5], [0.05, 0.15, 0.1, 0.7]], dtype=F64)
PROCESSES = {
    "two": lambda **k: VaryingNoise(Rectified.full(), 3, MENDING, **k),
    "three": lambda **k: VaryingNoise(Cosine(8.0, -8.0), 3, THREE, **k),
}
each_process = pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES)
PAIRS = [(0.25, 0.75), (0.1, 0.101), (0.0, 0.5), (0.5, 0.999), (0.2, 1.0)]


def f64(*values):
    return [torch.tensor(v, dtype=F64) for v in values]


def probs(distribution):
    return per_coordinate(distribution).probs


def mass(stages, alpha):
    """m of two or three stages, written out."""
    a, b = alpha, 1 - alpha
    if len(stages) == 2:
        return b * (a * stages[0] + b * stages[1])
    return b * (a * a * stages[0] + 2 * a * b * stages[1] + b * b * stages[2])


@each_process
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_marginals_and_transitions(make, s, t):
    process = make(event_dim=0)
    x = torch.arange(4)
    early, late = process.schedule.alpha(torch.tensor([s, t], dtype=F64))
    eye = torch.eye(4, dtype=F64)
    want = late * eye + mass(process.stages, late)
    assert_close(probs(process.marginal(x, f64(t)[0])), want, atol=1e-12, rtol=1e-9)
    step = probs(process.transition(x, *f64(s, t)))
    between = mass(process.stages, late) - late / early * mass(process.stages, early)
    assert_close(step, late / early * eye + between, atol=1e-12, rtol=1e-9)
    first = probs(process.marginal(x, f64(s)[0]))
    assert_close(first @ step, want, atol=1e-12, rtol=1e-9)
    assert_close(step.sum(-1), torch.ones(4, dtype=F64))


@each_process
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_bridge_and_reverse_by_bayes_rule(make, s, t):
    process, states = make(event_dim=0), torch.arange(4)
    early = probs(process.marginal(states, f64(s)[0]))
    step = probs(process.transition(states, *f64(s, t)))
    joint = early.T[None] * step.T[:, :, None]  # (x_t, x_s, x_0)
    bridge = (joint / joint.sum(1, keepdim=True)).transpose(1, 2)
    xt, x0 = torch.meshgrid(states, states[:3], indexing="ij")
    live = (joint.sum(1) > 1e-10)[:, :3]
    got = probs(process.bridge(xt, x0, *f64(s, t)))
    assert_close(got[live], bridge[:, :3][live], atol=1e-9, rtol=1e-7)
    posterior = torch.rand(4, 3, dtype=F64).where(live, 0.0)
    posterior[~live.any(-1)] = 1.0
    posterior /= posterior.sum(-1, keepdim=True)
    got = probs(process.reverse(states, Categorical(posterior), *f64(s, t)))
    want = torch.einsum("ik,ikj->ij", posterior, bridge[:, :3].where(live[..., None], 0.0))
    some = live.any(-1)
    assert_close(got[some], want[some], atol=1e-9, rtol=1e-7)


@each_process
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_rates_of_jumps(make, t):
    """The chance of a jump over a short time, over that time and the rate of replacement."""
    process, states, h = make(event_dim=0), torch.arange(4), 1e-6
    step = probs(process.transition(states, *f64(t, t + h)))
    rates = process.rates(torch.tensor(t + h / 2, dtype=F64))
    level = rates.level
    got = process._inflow(states, level).T * -rates.log_alpha
    off = ~torch.eye(4, dtype=torch.bool)
    assert_close(got[off], (step / h)[off], atol=1e-5, rtol=1e-5)


def test_one_stage_is_constant_noise():
    schedule = Rectified.full()
    process, plain = VaryingNoise(schedule, 3, SKEW[None]), CategoricalProcess(schedule, 3, SKEW)
    x0 = torch.randint(3, (50, 2))
    t = torch.rand(50, dtype=F64)
    xt = plain.marginal(x0, t).sample()
    posterior = Categorical(torch.rand(50, 2, 3, dtype=F64)).to_event(1)
    for name, arguments in {
        "marginal": (x0, t),
        "transition": (x0, t / 2, t),
        "bridge": (xt, x0, t / 2, t),
        "reverse": (xt, posterior, t / 2, t, 0.3),
    }.items():
        assert_close(*(probs(getattr(p, name)(*arguments)) for p in (process, plain)))
    rates = plain.rates(t)
    assert_close(*(p.divergence_rate(x0, xt, posterior, rates) for p in (process, plain)))
    assert_close(probs(process.prior((2,), F64)), probs(plain.prior((2,), F64)))
    assert_close(*(p.coordinate_log_likelihood(xt, torch.arange(3), t) for p in (process, plain)))


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_what_is_refused_has_no_transitions(rows):
    """Stages at random: refused if and only if some transition between two of many times is negative."""
    generator = torch.Generator().manual_seed(rows)
    alpha = torch.linspace(1, 0, 400, dtype=F64)
    refused = 0
    for _ in range(40):
        sharp = torch.randn(rows, 4, generator=generator, dtype=F64)
        stages = torch.softmax(sharp * torch.rand((), generator=generator) * 4, -1)
        basis = (
            Plain(stages)._mass(alpha.unsqueeze(-1)) if rows > 3 else mass(stages, alpha[:, None])
        )
        between = basis[1:] - (alpha[1:] / alpha[:-1])[:, None] * basis[:-1]
        try:
            VaryingNoise(Cosine(), 3, stages)
            assert float(between.min()) > -1e-10
        except ValueError:
            refused += 1
            assert float(between.min()) < 0
    assert refused == 0 if rows == 2 else 5 < refused < 40


class Plain(VaryingNoise):
    """Stages that nobody has checked."""

    def __init__(self, stages):
        torch.nn.Module.__init__(self)
        self.register_buffer("stages", stages)


@each_process
@pytest.mark.parametrize("event", [(), (3,), (2, 2)])
def test_shapes_rows_and_precision(make, event):
    process = make(event_dim=len(event))
    x0 = torch.randint(3, (2, 3, *event))
    t = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.8, 0.9]], dtype=F64)
    xt = process.marginal(x0, t).sample()
    p = torch.rand(2, 3, *event, 3, dtype=F64)
    rates, posterior = process.rates(t), Categorical(p).to_event(len(event))
    kernel = process.reverse(xt, posterior, t / 2, t)
    cost = process.divergence_rate(x0, xt, posterior, rates)
    assert kernel.batch_shape == (2, 3) and kernel.event_shape == event and cost.shape == (2, 3)
    one = Categorical(p[1, 2]).to_event(len(event))
    alone = process.reverse(xt[1, 2], one, t[1, 2] / 2, t[1, 2])
    assert_close(probs(kernel)[1, 2], probs(alone))
    assert_close(
        cost[1, 2], process.divergence_rate(x0[1, 2], xt[1, 2], one, process.rates(t[1, 2]))
    )
    short = Categorical(p.float()).to_event(len(event))
    single = process.reverse(xt, short, t.float() / 2, t.float())
    assert probs(single).dtype == torch.float32
    assert_close(probs(single).double(), probs(kernel), atol=2e-5, rtol=2e-4)


@each_process
def test_copies(make):
    process, other = make(), VaryingNoise(Rectified.full(), 3, torch.ones(3, 4) / 4)
    x = torch.arange(3)
    want = probs(process.marginal(x, 0.4))
    for copied in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert_close(probs(copied.marginal(x, 0.4)), want)
    if len(process.stages) == 3:
        other = VaryingNoise(Cosine(8.0, -8.0), 3, torch.ones(3, 4) / 4)
        other.load_state_dict(process.state_dict())
        assert_close(probs(other.marginal(x, 0.4)), want)
    single = copy.deepcopy(process).to(torch.float32)
    assert_close(probs(single.marginal(x, 0.4)), want, atol=1e-6, rtol=1e-5)


def test_samples():
    """Chi-square beyond 4 sigmas: a false alarm once in 30 000."""
    torch.manual_seed(0)
    joint = torch.tensor([0.15, 0.6, 0.25], dtype=F64)
    view = DiffusionCTMC(exact(PROCESSES["two"](), joint), (1,), steps=3)
    counts = torch.bincount(view.sample((20000,))[:, 0], minlength=3)
    assert chi_square(counts, joint) < chi_square_limit(3)


def test_a_visible_symbol_may_be_wrong():
    """Unlike under masking: at the same survival, a posterior of what is seen is not certain."""
    denoiser = exact(PROCESSES["two"](), torch.tensor([0.5, 0.3, 0.2], dtype=F64))
    posterior = probs(denoiser(torch.tensor([[0]]), torch.tensor(0.5, dtype=F64)))[0, 0]
    wrong = 0.25 * 0.2  # m of symbol 0 at alpha = 1/2
    want = torch.tensor([0.5 * (0.5 + wrong), 0.3 * wrong, 0.2 * wrong], dtype=F64)
    assert_close(posterior, want / want.sum())


GONE = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1]])
BAD = {
    "list": ([[0.5, 0.5]], "^stages: got"),
    "shape": (torch.ones(3) / 3, r"^stages: got shape \(3,\)"),
    "many": (torch.ones(33, 3) / 3, r"^stages: got shape \(33, 3\)"),
    "few": (torch.ones(2, 2) / 2, "^noise: got shape"),
    "negative": (torch.tensor([[1.5, -0.5, 0]]), "^stages: got numbers from -0.5"),
    "sum": (torch.ones(2, 3), "^stages: got numbers from 1 and rows that sum to 3 to 3"),
    "NaN": (torch.full((1, 3), torch.nan), "^stages: got"),
    "taken back": (
        GONE,
        r"^stages: got noise that takes symbol 0 back faster .* at 1 - alpha = 0\.\d",
    ),
}


@pytest.mark.parametrize(("stages", "message"), BAD.values(), ids=BAD)
def test_bad_input(stages, message):
    with pytest.raises(ValueError, match=message):
        VaryingNoise(Cosine(), 3, stages)
