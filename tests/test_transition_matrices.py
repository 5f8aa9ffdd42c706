"""Categorical processes of any jump matrix against matrix exponentials, over every state."""

import copy
import pickle

import pytest
import torch
from pyro.distributions import Categorical
from torch.testing import assert_close

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.processes import (
    Ability,
    CategoricalProcess,
    DiscretizedGaussian,
    TransitionMatrix,
)
from pyro_diffusion.schedules import Cosine, Rectified
from pyro_diffusion.unwrapping import per_coordinate
from tests.discrete import CIRCLE, F64, SKEW, chi_square, chi_square_limit

MASKED = torch.tensor([[0, 0.5, 0, 0.5], [0.5, 0, 0, 0.5], [0, 0, 0, 1.0], [0, 0, 0, 0]], dtype=F64)
PROCESSES = {
    "gaussian": lambda **k: DiscretizedGaussian(Rectified.full(), 6, 0.8, **k),
    "wide": lambda **k: DiscretizedGaussian(Cosine(8.0, -8.0), 5, 4.0, **k),
    "circle": lambda **k: TransitionMatrix(Rectified.full(), 3, CIRCLE, **k),
    "replaced, then masked": lambda **k: TransitionMatrix(Rectified(), 3, MASKED, **k),
}
each_process = pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES)
PAIRS = [(0.25, 0.75), (0.1, 0.101), (0.0, 0.5), (0.5, 0.999)]


def f64(*values):
    return [torch.tensor(v, dtype=F64) for v in values]


def matrix(process, s, t):
    """q(x_t = column | x_s = row): the exponential of the generator, by torch's own routine."""
    alpha = process.schedule.alpha(torch.tensor([s, t], dtype=F64))
    return torch.matrix_exp(-(alpha[1] / alpha[0]).log() * process.generator)


def probs(distribution):
    return per_coordinate(distribution).probs


@each_process
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_marginal_and_transition(make, s, t):
    process = make(event_dim=0)
    x = torch.arange(len(process.noise))
    first = matrix(process, 0.0, t) if process.clock_ends[0] == torch.inf else None
    if first is not None:  # nothing is destroyed at t = 0
        assert_close(probs(process.marginal(x, f64(t)[0])), first, atol=1e-12, rtol=1e-9)
    step = probs(process.transition(x, *f64(s, t)))
    assert_close(step, matrix(process, s, t), atol=1e-12, rtol=1e-9)
    early, late = (probs(process.marginal(x, v)) for v in f64(s, t))
    assert_close(early @ step, late, atol=1e-12, rtol=1e-9)


@each_process
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_bridge_and_reverse_by_bayes_rule(make, s, t):
    process = make(event_dim=0)
    count, k = len(process.noise), process.states
    x = torch.arange(count)
    early = probs(process.marginal(x, f64(s)[0]))
    joint = early.T[None] * matrix(process, s, t).T[:, :, None]  # (x_t, x_s, x_0)
    reached = joint.sum(1)
    bridge = (joint / reached[:, None]).transpose(1, 2)
    xt, x0 = torch.meshgrid(x, x[:k], indexing="ij")
    live = reached[:, :k] > 1e-10
    got = probs(process.bridge(xt, x0, *f64(s, t)))
    assert_close(got[live], bridge[:, :k][live], atol=1e-7, rtol=1e-7)
    posterior = torch.rand(count, k, dtype=F64).where(live, 0.0)
    posterior[~live.any(-1)] = 1.0
    posterior /= posterior.sum(-1, keepdim=True)
    got = probs(process.reverse(x, Categorical(posterior), *f64(s, t)))
    want = torch.einsum("ik,ikj->ij", posterior, bridge[:, :k].where(live[..., None], 0.0))
    some = live.any(-1)
    assert_close(got[some], want[some], atol=1e-7, rtol=1e-7)


@each_process
def test_everything_is_a_probability_and_single_precision_agrees(make):
    process = make()
    x0 = torch.randint(process.states, (40, 2))
    t = torch.linspace(0, 1, 40, dtype=F64)
    xt = process.marginal(x0, t).sample()
    posterior = torch.rand(40, 2, process.states, dtype=F64)
    s = t * 0.6
    for dtype in (F64, torch.float32):
        times = (s[1:].to(dtype), t[1:].to(dtype))
        got = [
            process.marginal(x0, t.to(dtype)),
            process.reverse(xt[1:], Categorical(posterior[1:].to(dtype)).to_event(1), *times),
            process.prior((2,), dtype=dtype),
        ]
        for distribution in got:
            p = probs(distribution)
            assert p.dtype == dtype and bool((p >= 0).all())
            assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
        if dtype == F64:
            want = [probs(d) for d in got]
    for distribution, p in zip(got, want, strict=True):
        assert_close(probs(distribution).double(), p, atol=2e-5, rtol=2e-4)


def test_replacement_by_noise_is_a_special_case():
    schedule, noise = Rectified.full(), SKEW
    plain = CategoricalProcess(schedule, 3, noise)
    process = TransitionMatrix(schedule, 3, noise.expand(4, -1) - torch.eye(4, dtype=F64))
    assert_close(process.noise, noise)
    x0 = torch.randint(3, (50, 2))
    t = torch.rand(50, dtype=F64)
    xt = plain.marginal(x0, t).sample()
    posterior = Categorical(torch.rand(50, 2, 3, dtype=F64)).to_event(1)
    for name, arguments in {
        "marginal": (x0, t),
        "transition": (x0, t / 2, t),
        "bridge": (xt, x0, t / 2, t),
        "reverse": (xt, posterior, t / 2, t),
    }.items():
        assert_close(
            *(probs(getattr(p, name)(*arguments)) for p in (process, plain)), atol=1e-9, rtol=1e-9
        )
    values = torch.arange(3)
    assert_close(
        *(p.coordinate_log_likelihood(xt, values, t).exp() for p in (process, plain)),
        atol=1e-12,
        rtol=1e-9,
    )
    rates = plain.rates(t)
    assert_close(*(p.divergence_rate(x0, xt, posterior, rates) for p in (process, plain)))
    assert_close(probs(process.prior((2,), F64)), probs(plain.prior((2,), F64)))


def test_discretized_gaussian():
    process = DiscretizedGaussian(Rectified.full(), 9, 1.0, event_dim=0)
    generator = process.generator
    assert_close(generator, generator.T)
    assert_close(generator.sum(-1), torch.zeros(9, dtype=F64))
    assert float(generator[2, 4] / generator[2, 3]) == pytest.approx(
        torch.tensor(-1.5).exp().item()
    )
    assert_close(process.noise, torch.full((9,), 1 / 9, dtype=F64))
    # The slowest mode decays as alpha.
    rates = -torch.linalg.eigvalsh(generator)
    assert float(rates[-2]) == pytest.approx(1.0)
    # Near symbols are reached first, unlike under uniform noise.
    early = probs(process.marginal(torch.tensor(4), torch.tensor(0.02, dtype=F64)))
    assert bool((early[4:].diff() < 0).all()) and float(early[8]) < 0.05 * float(early[5])
    narrow = DiscretizedGaussian(Rectified.full(), 9, 0.05)
    assert bool(narrow.generator.isfinite().all())
    assert float(narrow.generator[0, 2]) == pytest.approx(0, abs=1e-12)


def test_absorbing_jumps_end_in_the_mask():
    process = PROCESSES["replaced, then masked"]()
    assert_close(process.noise, torch.tensor([0, 0, 0, 1.0], dtype=F64), atol=1e-12, rtol=0)
    assert Ability.MASK not in process.abilities


@each_process
@pytest.mark.parametrize("event", [(), (3,), (2, 2)])
def test_shapes_and_rows(make, event):
    process = make(event_dim=len(event))
    x0 = torch.randint(process.states, (2, 3, *event))
    t = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.8, 0.9]], dtype=F64)
    xt = process.marginal(x0, t).sample()
    p = torch.rand(2, 3, *event, process.states, dtype=F64)
    rates = process.rates(t)
    posterior = Categorical(p).to_event(len(event))
    kernel = process.reverse(xt, posterior, t / 2, t)
    cost = process.divergence_rate(x0, xt, posterior, rates)
    assert kernel.batch_shape == (2, 3) and kernel.event_shape == event and cost.shape == (2, 3)
    one = Categorical(p[1, 2]).to_event(len(event))
    alone = process.reverse(xt[1, 2], one, t[1, 2] / 2, t[1, 2])
    assert_close(probs(kernel)[1, 2], probs(alone))
    assert_close(
        cost[1, 2], process.divergence_rate(x0[1, 2], xt[1, 2], one, process.rates(t[1, 2]))
    )


@each_process
def test_copies(make):
    process, other = make(), make()
    other.generator.mul_(2.0)
    x = torch.arange(3)
    before = probs(other.marginal(x, 0.4))
    other.load_state_dict(process.state_dict())
    want = probs(process.marginal(x, 0.4))
    assert not torch.allclose(
        before, want
    )  # what was kept of the old generator is not used any more
    for copied in (other, copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert_close(probs(copied.marginal(x, 0.4)), want)
    single = copy.deepcopy(process).to(torch.float32)
    assert_close(probs(single.marginal(x, 0.4)), want, atol=1e-6, rtol=1e-5)
    with torch.inference_mode():
        assert_close(probs(make().marginal(x, 0.4)), want)


def test_samples_of_ordinal_data():
    """Chi-square beyond 4 sigmas: a false alarm once in 30 000."""
    torch.manual_seed(0)
    joint = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=F64)
    process = DiscretizedGaussian(Rectified.full(), 5, 1.0)
    diffusion = Diffusion(TableDenoiser(process, joint), (1,), steps=3)
    counts = torch.bincount(diffusion.sample((20000,))[:, 0], minlength=5)
    assert chi_square(counts, joint) < chi_square_limit(5)


BAD = {
    "no matrix": (
        lambda: TransitionMatrix(Cosine(), 3, torch.ones(3)),
        r"^generator: got shape \(3,\)",
    ),
    "small": (
        lambda: TransitionMatrix(Cosine(), 3, torch.ones(2, 2)),
        r"^generator: got shape \(2, 2\)",
    ),
    "negative": (
        lambda: TransitionMatrix(Cosine(), 2, -torch.ones(2, 2)),
        "^generator: got rates from -1",
    ),
    "no rates": (
        lambda: TransitionMatrix(Cosine(), 2, torch.eye(2)),
        "^generator: got rates from 0 to 0",
    ),
    "NaN": (
        lambda: TransitionMatrix(Cosine(), 2, torch.full((2, 2), torch.nan)),
        "^generator: got",
    ),
    "defective": (
        lambda: TransitionMatrix(Cosine(), 3, torch.tensor([[0, 1.0, 0], [0, 0, 1], [0, 0, 0]])),
        "^generator: got a matrix without a well-conditioned basis",
    ),
    "list": (lambda: TransitionMatrix(Cosine(), 2, [[0, 1], [1, 0]]), "^generator: got"),
    "width": (lambda: DiscretizedGaussian(Cosine(), 4, 0.0), "^width: got 0"),
    "states": (lambda: DiscretizedGaussian(Cosine(), 1), "^states: got 1"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("width", [0.1, 0.02, 1e-30, 1e-300])
def test_narrow_jumps_are_to_neighbours(width):
    process = DiscretizedGaussian(Rectified.full(), states=4, width=width)
    steps = process.generator - torch.diag(process.generator.diagonal())
    neighbours = torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)
    assert_close(steps / steps.max(), neighbours.to(steps))
