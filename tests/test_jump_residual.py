"""The master equation's residual: zero for exact posteriors of every process of symbols, else not."""

import itertools

import pytest
import torch

from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.evaluate import jump_residual
from pyro_diffusion.evaluate.jumps import _residual
from pyro_diffusion.processes import GaussianProcess, draw
from pyro_diffusion.schedules import Cosine
from tests.discrete import F64, JOINT, PROCESSES, all_states, exact

each = pytest.mark.parametrize("name", PROCESSES)


def rows(count):
    index = torch.multinomial(JOINT.flatten(), count, replacement=True)
    return torch.stack([index // 3, index % 3], -1)


class Wrong(Denoiser):
    """The exact posterior of another table."""

    def __init__(self, process):
        super().__init__(process)
        self.other = exact(process, JOINT.flip(0).contiguous())

    def forward(self, xt, t):
        return self.other(xt, t)


def transition_rates(process, t, states):
    """Of the forward process, per unit of -log alpha, by a difference in time."""
    h = 1e-5
    s, e = torch.tensor(t, dtype=F64), torch.tensor(t + h, dtype=F64)
    matrix = torch.stack(
        [process.transition(x.expand(len(states), -1), s, e).log_prob(states).exp() for x in states]
    )
    levels = [process.level(v).alpha for v in (s, e)]
    return (matrix - torch.eye(len(states), dtype=F64)) / float(levels[0].log() - levels[1].log())


@each
def test_rates_are_those_of_the_reversed_process(name):
    """R(y | x) = Q(y -> x) p_t(y) / p_t(x), by enumeration."""
    process, t = PROCESSES[name](), 0.4
    states = all_states(process, 2)
    level = process.level(torch.tensor(t, dtype=F64))
    marginal = sum(
        JOINT[i, j] * process.marginal(torch.tensor([i, j]).expand(len(states), -1), level)
        .log_prob(states).exp()
        for i, j in itertools.product(range(3), repeat=2)
    )  # fmt: skip
    forward = transition_rates(process, t, states)
    denoiser = exact(process)
    for k, x in enumerate(states):
        if marginal[k] < 1e-12:
            continue
        rates = process.reverse_rates(x, denoiser(x, level), level)
        for m, y in enumerate(states):
            different = (x != y).nonzero()
            if len(different) != 1:
                continue
            i = int(different)
            expected = forward[m, k] * marginal[m] / marginal[k]
            assert float(rates[i, y[i]]) == pytest.approx(float(expected), rel=2e-3, abs=2e-4)


@each
def test_zero_for_the_exact_posterior_and_not_for_another(name):
    """32 functions by 6 times; z beyond 5 for the exact one in one of 10^4 seeds."""
    process, x = PROCESSES[name](), rows(3000)
    times = torch.linspace(0.15, 0.85, 6, dtype=F64)
    found = jump_residual(exact(process), x, times=times)
    assert found.value.shape == found.standard_error.shape == (6, 32)
    seen = found.standard_error > 1e-12
    assert float(found.z[seen].abs().max()) < 5
    wrong = jump_residual(Wrong(process), x, times=times)
    assert float(wrong.z.abs().max()) > 10
    assert float(wrong.rms.max()) > 3 * float(found.rms.max())


def test_draws_and_batches():
    process, x = PROCESSES["uniform"](), rows(40)
    found = jump_residual(exact(process), x, times=3, num_functions=4, num_samples=5, batch_size=7)
    assert found.value.shape == (3, 4)
    assert bool((found.log_snr.diff() < 0).all())


def test_refusals():
    process, x = PROCESSES["absorbing"](), rows(5)
    good = exact(process)
    for call, words in (
        (lambda: jump_residual(good, x[:1]), "data: got"),
        (lambda: jump_residual(good, x + 2), "data: got integers"),
        (lambda: jump_residual(good, x, times=0), "times: got 0"),
        (lambda: jump_residual(good, x, times=torch.tensor([0.0, 0.5])), "times: got"),
        (lambda: jump_residual(good, x, num_functions=0), "num_functions: got 0"),
        (lambda: jump_residual(good, x, num_samples=0), "num_samples: got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    normal = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="lacks"):
        jump_residual(normal, x)


@each
def test_the_residual_is_the_sum_over_single_jumps(name):
    """Against phi at every string that differs in one symbol, written out: the same x_t by the same seed."""
    process, x = PROCESSES[name](), rows(20)
    denoiser, level = Wrong(process), process.level(torch.tensor(0.4, dtype=F64), x)
    w = torch.randn(2, len(process.noise), 3, dtype=F64)
    b = torch.rand(3, dtype=F64)
    torch.manual_seed(0)
    found = _residual(denoiser, x, level, w, b)
    torch.manual_seed(0)
    xt = draw(process.marginal(x, level))
    gap = process.reverse_rates(xt, denoiser(xt, level), level)
    gap = gap - process.reverse_rates(xt, process.point_mass(x), level)

    def phi(y):
        return torch.cos(w[0, y[0]] + w[1, y[1]] + b)

    for k, here in enumerate(xt):
        expected = torch.zeros(3, dtype=F64)
        for i, symbol in itertools.product(range(2), range(len(process.noise))):
            there = here.clone()
            there[i] = symbol
            expected += gap[k, i, symbol] * (phi(there) - phi(here))
        torch.testing.assert_close(found[k], expected)
