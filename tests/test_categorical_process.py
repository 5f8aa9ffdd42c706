"""Categorical processes against products of explicit transition matrices, over every state."""

import copy

import pytest
import torch
from pyro.distributions import Categorical
from torch.testing import assert_close

from pyro_diffusion.processes import Absorbing, CategoricalProcess, Uniform
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import DTYPES

F64 = torch.float64
# Dyadic, so that noise kept in float32 is exact in float64 too.
SKEW = torch.tensor([0.5, 0.125, 0.125, 0.0, 0.25])

PROCESSES = {
    "absorbing": lambda **k: Absorbing(Cosine(), 4, **k),
    "absorbing uncut": lambda **k: Absorbing(Rectified.full(), 3, **k),
    "uniform": lambda **k: Uniform(LogLinear(), 4, **k),
    "uniform uncut": lambda **k: Uniform(Rectified.full(), 2, **k),
    "skew": lambda **k: CategoricalProcess(Rectified(), 5, SKEW, **k),
    "skew with an extra symbol": lambda **k: CategoricalProcess(Rectified(), 4, SKEW, **k),
}
each_process = pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES)
PAIRS = [(0.25, 0.75), (0.1, 0.101), (0.0, 0.5), (0.0, 0.01), (0.5, 1.0), (0.0, 1.0)]


def f64(*values):
    return [torch.tensor(v, dtype=F64) for v in values]


def matrix(process, s, t):
    """q(x_t = column | x_s = row) from the definition alone; t and s are floats."""
    alpha = process.schedule.alpha(torch.tensor([s, t], dtype=F64))
    kept = alpha[1] / alpha[0]
    noise = process.noise.double()
    return kept * torch.eye(len(noise), dtype=F64) + (1 - kept) * noise.expand(len(noise), -1)


def survival(process, t):
    """q(x_t = column | x_0 = row)."""
    alpha = process.schedule.alpha(torch.tensor(t, dtype=F64))
    noise = process.noise.double()
    return alpha * torch.eye(len(noise), dtype=F64) + (1 - alpha) * noise.expand(len(noise), -1)


def probs(law):
    return per_coordinate(law).probs


# Contract


@each_process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("event", [(), (5,), (2, 3)])
def test_shapes(make, dtype, batch, event):
    process = make(event_dim=len(event))
    symbols = len(process.noise)
    x0 = torch.randint(process.states, (*batch, *event))
    times = [(torch.tensor(0.2, dtype=dtype), torch.tensor(0.6, dtype=dtype))]
    times.append((torch.rand(batch, dtype=dtype) / 2, 0.5 + torch.rand(batch, dtype=dtype) / 2))
    times.append(tuple(process.level(t) for t in times[-1]))
    posterior = Categorical(logits=torch.randn(*batch, *event, process.states, dtype=dtype))
    posterior = posterior.to_event(len(event))
    for s, t in times:
        xt = process.marginal(x0, t).sample()
        laws = {
            "marginal": process.marginal(x0, t),
            "transition": process.transition(x0, s, t),
            "bridge": process.bridge(xt, x0, s, t),
            "reverse": process.reverse(xt, posterior, s, t),
        }
        for name, law in laws.items():
            assert law.batch_shape == batch and law.event_shape == event, name
            x = law.sample()
            assert x.dtype == torch.int64 and int(x.max()) < symbols, name
            assert law.log_prob(x).shape == batch and law.log_prob(x).dtype == dtype, name
            assert bool(torch.isfinite(law.log_prob(x)).all()), name
    prior = process.prior(event, dtype=dtype)
    assert prior.batch_shape == () and prior.event_shape == event
    assert prior.expand(batch).sample().shape == (*batch, *event)
    assert prior.log_prob(prior.sample()).dtype == dtype


@each_process
@pytest.mark.parametrize("event", [(3,), (3, 3)])
def test_rows_are_independent(make, event):
    process = make(event_dim=len(event))
    x0 = torch.randint(process.states, (2, 3, *event))
    t = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.8, 0.9]], dtype=F64)
    s = t / 2
    xt = process.marginal(x0, t).sample()
    p = torch.rand(2, 3, *event, process.states, dtype=F64)
    law = process.reverse(xt, Categorical(p).to_event(len(event)), s, t)
    shared = process.reverse(xt, Categorical(p).to_event(len(event)), s[1], t[1])
    for i in range(3):
        one = Categorical(p[1, i]).to_event(len(event))
        alone = process.reverse(xt[1, i], one, s[1, i], t[1, i])
        assert_close(probs(law)[1, i], probs(alone))
        assert_close(probs(shared)[1, i], probs(alone))
        assert_close(
            probs(process.marginal(x0, t))[1, i], probs(process.marginal(x0[1, i], t[1, i]))
        )
        evidence = process.coordinate_log_likelihood(xt, torch.arange(process.states), t)
        assert_close(
            evidence[1, i],
            process.coordinate_log_likelihood(xt[1, i], torch.arange(process.states), t[1, i]),
        )


@each_process
def test_copies(make):
    process, other = make(), make()
    other.load_state_dict(process.state_dict())
    for copied in (other, copy.deepcopy(process)):
        assert torch.equal(copied.noise, process.noise)


# Exactness, exhaustively


@each_process
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_marginal(make, t):
    process = make(event_dim=0)
    x0 = torch.arange(len(process.noise))
    assert_close(probs(process.marginal(x0, f64(t)[0])), survival(process, t))


@each_process
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_transition_after_marginal_is_marginal(make, s, t):
    process = make(event_dim=0)
    x = torch.arange(len(process.noise))
    step = probs(process.transition(x, *f64(s, t)))
    assert_close(step, matrix(process, s, t))
    assert_close(probs(process.marginal(x, f64(s)[0])) @ step, survival(process, t))


def bridges(process, s, t):
    """q(x_s = j | x_t = i, x_0 = k) by Bayes' rule, index (i, k, j), and q(x_t = i | x_0 = k)."""
    joint = survival(process, s).T[None] * matrix(process, s, t).T[:, :, None]  # (i, j, k)
    reached = joint.sum(1)
    return (joint / reached[:, None]).transpose(1, 2), reached


@each_process
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_bridge_is_bayes_rule(make, s, t):
    process = make(event_dim=0)
    n = len(process.noise)
    expected, reached = bridges(process, s, t)
    xt, x0 = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    possible = reached > 0
    assert bool(possible.any())
    got = probs(process.bridge(xt, x0, *f64(s, t)))
    assert_close(got[possible], expected[possible], rtol=1e-9, atol=1e-12)
    assert bool(torch.isfinite(got).all())  # also where x_0 cannot lead to x_t
    assert_close(got.sum(-1), torch.ones(n, n, dtype=F64))


@each_process
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_reverse_sums_over_the_posterior(make, s, t):
    process = make(event_dim=0)
    expected, reached = bridges(process, s, t)
    p = torch.rand(len(process.noise), process.states, dtype=F64)
    possible = reached[:, : process.states] > 0
    p = p * possible  # a posterior never proposes what cannot have led to x_t
    seen = p.sum(-1) > 0
    p = p[seen] / p[seen].sum(-1, keepdim=True)
    terms = p.unsqueeze(-1) * expected[seen][:, : process.states]
    expected = terms.nan_to_num(0.0).sum(1)
    xt = torch.arange(len(process.noise))[seen]
    got = probs(process.reverse(xt, Categorical(p, validate_args=False), *f64(s, t)))
    assert_close(got, expected, rtol=1e-9, atol=1e-12)


@each_process
def test_reverse_of_the_exact_posterior_is_exact(make):
    """For one symbol of known law: Bayes' rule from x_t to x_s, without x_0."""
    process = make(event_dim=0)
    s, t = 0.3, 0.7
    data = torch.zeros(len(process.noise), dtype=F64)
    data[: process.states] = torch.arange(1, process.states + 1)
    data = data / data.sum()
    at_s = data @ survival(process, s)
    joint = at_s[:, None] * matrix(process, s, t)  # (x_s, x_t)
    seen = joint.sum(0) > 0
    posterior = data[:, None] * survival(process, t)
    posterior = (posterior / posterior.sum(0)).T[seen][:, : process.states]
    xt = torch.arange(len(process.noise))[seen]
    got = probs(process.reverse(xt, Categorical(posterior), *f64(s, t)))
    assert_close(got, (joint / joint.sum(0)).T[seen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masking_in_closed_form(dtype):
    """A mask stays with (1 - alpha_s) / (1 - alpha_t); a symbol that is seen stays (arXiv 2406.07524)."""
    process = Absorbing(Rectified.full(), 3, event_dim=0)
    s, t = torch.tensor(0.2, dtype=dtype), torch.tensor(0.8, dtype=dtype)
    p = torch.tensor([0.2, 0.5, 0.3], dtype=dtype)
    masked = probs(process.reverse(torch.tensor(process.mask), Categorical(p), s, t))
    assert_close(masked, torch.cat([0.75 * p, torch.tensor([0.25], dtype=dtype)]))
    for k in range(3):
        kept = probs(process.reverse(torch.tensor(k), Categorical(p), s, t))
        assert_close(kept, torch.eye(4, dtype=dtype)[k])


def test_evidence_is_the_marginal():
    for name, make in PROCESSES.items():
        process = make(event_dim=1)
        values = torch.arange(process.states)
        xt = torch.arange(len(process.noise))
        for t in (torch.tensor(0.3, dtype=F64), 0.9):
            got = process.coordinate_log_likelihood(xt, values, t)
            alpha = process.schedule.alpha(torch.as_tensor(t))
            hit = xt[:, None] == values
            expected = alpha * hit + (1 - alpha) * process.noise.to(alpha)[xt][:, None]
            assert_close(got.exp(), expected, msg=name)
            assert bool(torch.isfinite(got).all())


@each_process
def test_prior_is_the_last_marginal_of_uniform_data(make):
    process = make(event_dim=1)
    data = torch.zeros(len(process.noise), dtype=F64)
    data[: process.states] = 1 / process.states
    expected = (data @ survival(process, 1.0)).expand(2, -1)
    assert_close(probs(process.prior((2,), dtype=F64)), expected)
    default = process.prior((2,))
    assert probs(default).dtype == torch.get_default_dtype()


def test_named_noises():
    absorbing = Absorbing(Cosine(), 3)
    assert absorbing.mask == 3 and absorbing.noise.tolist() == [0, 0, 0, 1]
    assert Uniform(Cosine(), 4).noise.tolist() == [0.25] * 4


# Ends, floors and gradients


@each_process
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_posterior_that_denies_the_state_gives_a_law(make, dtype):
    """Nothing is NaN when a posterior or a state is impossible; the kernel still sums to one."""
    process = make(event_dim=0)
    n = len(process.noise)
    sure = torch.eye(n, dtype=dtype)[: process.states, : process.states]
    xt = torch.arange(n)[:, None].expand(n, process.states)
    for s, t in PAIRS:
        s, t = torch.tensor(s, dtype=dtype), torch.tensor(t, dtype=dtype)
        law = process.reverse(xt, Categorical(sure, validate_args=False).expand(xt.shape), s, t)
        assert_close(probs(law).sum(-1), torch.ones(xt.shape, dtype=dtype))
        assert bool(torch.isfinite(law.log_prob(torch.zeros((), dtype=torch.int64))).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_symbol_that_is_seen_stays_whatever_the_posterior_says(dtype):
    process = Absorbing(Rectified.full(), 3, event_dim=0)
    sure_of_another = Categorical(torch.eye(3, dtype=dtype)[[1, 2, 0]])
    s, t = torch.tensor(0.2, dtype=dtype), torch.tensor(0.8, dtype=dtype)
    kernel = process.reverse(torch.arange(3), sure_of_another, s, t)
    assert_close(probs(kernel), torch.eye(4, dtype=dtype)[:3])


@each_process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_gradients_are_finite(make, dtype, s, t):
    """Of every state's log-probability, in the logits of posteriors flat and sharp."""
    process = make(event_dim=0)
    n = len(process.noise)
    for scale in (1.0, 60.0):
        logits = (scale * torch.randn(n, 1, process.states, dtype=dtype)).requires_grad_()
        xt = torch.arange(n)[:, None].expand(n, n)
        posterior = Categorical(logits=logits.expand(n, n, process.states))
        law = process.reverse(
            xt, posterior, torch.tensor(s, dtype=dtype), torch.tensor(t, dtype=dtype)
        )
        law.log_prob(torch.arange(n)).sum().backward()
        assert bool(torch.isfinite(logits.grad).all())


def test_gradient_is_right():
    process = Uniform(LogLinear(), 4, event_dim=1)
    xt, xs = torch.randint(4, (2, 3, 5)).unbind(0)
    s, t = f64(0.2, 0.6)

    def log_prob(logits):
        return process.reverse(xt, Categorical(logits=logits).to_event(1), s, t).log_prob(xs)

    assert torch.autograd.gradcheck(log_prob, torch.randn(3, 5, 4, dtype=F64, requires_grad=True))


@each_process
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_follows_float64(make, dtype):
    process = make(event_dim=0)
    n = len(process.noise)
    xt, x0 = torch.arange(n)[:, None].expand(n, process.states), torch.arange(process.states)
    s, t = torch.tensor(0.5), torch.tensor(0.501)
    low = probs(process.bridge(xt, x0.expand(xt.shape), s, t)).double()
    high = probs(process.bridge(xt, x0.expand(xt.shape), s.double(), t.double()))
    assert_close(low, high, rtol=1e-3, atol=1e-7)


@each_process
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_the_times_is_finite(make, dtype):
    """What a learned schedule needs."""
    process = make(event_dim=0)
    n = len(process.noise)
    xt = torch.arange(n)[:, None].expand(n, n)
    s, t = (torch.tensor(u, dtype=dtype, requires_grad=True) for u in (0.2, 0.7))
    posterior = Categorical(torch.ones(n, n, process.states, dtype=dtype))
    law = process.reverse(xt, posterior, s, t)
    for gradient in torch.autograd.grad(law.log_prob(torch.arange(n)).sum(), (s, t)):
        assert bool(torch.isfinite(gradient))


# Bad input


@pytest.mark.parametrize("states", [1, 0, -1, 2.0, None])
def test_states(states):
    for make in (Absorbing, Uniform, lambda *a: CategoricalProcess(*a, SKEW)):
        with pytest.raises(ValueError, match=r"^states: got .*expected an integer >= 2"):
            make(Cosine(), states)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ([0.5, 0.5], r"^noise: got shape \(2,\), expected .* at least 3 symbols"),
        ([[0.5, 0.25, 0.25]], r"^noise: got shape \(1, 3\)"),
        ([0.75, 0.5, -0.25], r"^noise: .*non-negative"),
        ([0.5, 0.5, 0.5], r"^noise: got a sum of 1.5, expected 1"),
    ],
)
def test_noise(noise, message):
    with pytest.raises(ValueError, match=message):
        CategoricalProcess(Cosine(), 3, torch.tensor(noise))


@pytest.mark.parametrize("eta", [-0.1, 2.0])
def test_eta(eta):
    x = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"^eta: got {eta}, expected a number in \[0, 1\]"):
        Uniform(Cosine(), 4).bridge(x, x, torch.tensor(0.1), torch.tensor(0.2), eta)


def test_times_and_schedule():
    x = torch.zeros(2, 3, dtype=torch.int64)
    for bad in (-0.1, 1.1, torch.tensor([0.5, torch.nan])):
        with pytest.raises(ValueError, match=r"^t: got times from"):
            Uniform(Cosine(), 4).marginal(x, bad)
    with pytest.raises(ValueError, match=r"^schedule: got str"):
        Uniform("cosine", 4)
    with pytest.raises(ValueError, match=r"^event_dim: got -1"):
        Uniform(Cosine(), 4, event_dim=-1)


# Precision and checks


def test_noise_of_nan():
    with pytest.raises(ValueError, match=r"^noise: got"):
        CategoricalProcess(Cosine(), 2, torch.tensor([torch.nan, 0.5]))


def test_noise_in_float64():
    process = Uniform(LogLinear(), 3, event_dim=0)
    one = f64(1.0)[0]
    got = probs(process.marginal(torch.tensor(0), one))
    assert_close(got[1], (1 - process.schedule.alpha(one)) / 3, rtol=1e-12, atol=0)
