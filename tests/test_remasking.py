"""Bridges that draw a share of symbols anew: marginals, bounds and samples against enumeration."""

import pytest
import torch
from pyro.distributions import Categorical
from torch.testing import assert_close

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.processes import Ability, Absorbing, GaussianProcess
from pyro_diffusion.samplers import Ancestral, Remasking, simulate
from pyro_diffusion.schedules import Cosine, Rectified, uniform
from pyro_diffusion.unwrapping import per_coordinate
from tests.discrete import F64, JOINT, PROCESSES, chain_bound, chi_square, chi_square_limit, exact

each_process = pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES)
X0 = torch.tensor([0, 2])
ONE = torch.tensor([0.6, 0.1, 0.3], dtype=F64)


def probs(distribution):
    return per_coordinate(distribution).probs


@each_process
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("s", "t"), [(0.2, 0.7), (0.0, 0.5), (0.5, 1.0)])
def test_marginals_are_kept(make, eta, s, t):
    process = make()
    s, t = (process.level(torch.tensor(v, dtype=F64)) for v in (s, t))
    states = torch.arange(len(process.noise)).unsqueeze(-1)
    for x0 in range(3):
        x0 = torch.full_like(states, x0)
        late = probs(process.marginal(x0, t))[0, 0]
        bridge = probs(process.bridge(states, x0, s, t, eta))[:, 0]
        late = late.where(late > 1e-30, 0.0)
        assert_close(late @ bridge, probs(process.marginal(x0, s))[0, 0], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_masking_is_discrete_ddim_and_remdm(eta):
    """sigma = eta (1 - a_s) / (1 - a_t), and a visible symbol is masked with rho = (1 - eta)(1 - a_s)."""
    process = Absorbing(Rectified.full(), 3, event_dim=0)
    s, t = torch.tensor(0.3, dtype=F64), torch.tensor(0.8, dtype=F64)
    a, b = 1 - s, 1 - t
    sigma = eta * (1 - a) / (1 - b)
    hot, mask = torch.eye(4, dtype=F64), torch.eye(4, dtype=F64)[3]
    for xt in (1, 3):
        want = sigma * hot[xt] + (a - sigma * b) * hot[1] + (1 - a - sigma * (1 - b)) * mask
        got = probs(process.bridge(torch.tensor(xt), torch.tensor(1), s, t, eta))
        assert_close(got, want, atol=1e-12, rtol=1e-12)
    seen = probs(process.bridge(torch.tensor(1), torch.tensor(1), s, t, eta))
    assert float(seen[3]) == pytest.approx(float((1 - eta) * (1 - a)))


@each_process
def test_reverse_of_a_posterior_is_the_mixture_of_bridges(make):
    process = make()
    s, t = (process.level(torch.tensor(v, dtype=F64)) for v in (0.2, 0.6))
    xt = torch.tensor([[2]])
    p = (
        torch.tensor([[[0.0, 0.0, 1.0]]], dtype=F64)
        if process.noise[2] == 0
        else ONE.expand(1, 1, 3)
    )
    got = probs(process.reverse(xt, Categorical(p).to_event(1), s, t, 0.4))[0, 0]
    want = sum(
        float(p[0, 0, k]) * probs(process.bridge(xt, torch.tensor([[k]]), s, t, 0.4))[0, 0]
        for k in range(3)
        if float(p[0, 0, k])
    )
    assert_close(got, want, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["absorbing", "uniform", "skew", "gaussian", "varying"])
@pytest.mark.parametrize("eta", [0.9, 0.5])
def test_bound_is_valid_and_looser(name, eta):
    denoiser = exact(PROCESSES[name]())
    cost = -float(JOINT[tuple(X0)].log())
    for steps in (4, 32):
        plain, remasked = (chain_bound(denoiser, X0, steps, e) for e in (1.0, eta))
        assert cost < plain < remasked
    # It does not tend to log p: the bridges are those of no Markov process.
    assert remasked - cost > 3 * (plain - cost)


@each_process
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_one_symbol_is_right_in_any_number_of_steps(make, steps, share):
    """Chi-square beyond 4.5 sigmas: a false alarm once in 300 000, 63 times."""
    process = make()
    torch.manual_seed(10 * steps + round(100 * share))
    diffusion = Diffusion(exact(process, ONE), (1,), steps, sampler=Remasking(share))
    if process.clock_ends[1] > -torch.inf:  # the prior is that of uniform data
        end = process.level(1.0)
        x0 = torch.multinomial(ONE, 4000, replacement=True)[:, None]
        x = process.marginal(x0, end).sample()
    else:
        x = process.prior((1,)).expand((4000,)).sample()
    times = uniform(steps, F64)
    x = simulate(diffusion.denoiser, times, x, diffusion.sampler)
    counts = torch.bincount(diffusion.decode(x).sample()[:, 0], minlength=3)
    assert chi_square(counts, ONE) < chi_square_limit(3, 4.5)


def test_pairs_get_right_as_steps_grow():
    torch.manual_seed(0)
    twins = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=F64)
    denoiser = exact(Absorbing(Rectified.full(), 2), twins)
    for sampler in (Ancestral(), Remasking(0.1)):
        wrong = []
        for steps in (4, 16, 64):
            x = Diffusion(denoiser, (2,), steps, sampler=sampler).sample((5000,))
            wrong.append(float((x[:, 0] != x[:, 1]).double().mean()))
        # Standard errors below 0.005.
        assert wrong[0] > 2 * wrong[1] and wrong[1] > 2 * wrong[2]


def test_a_share_of_zero_is_ancestral():
    denoiser = exact(Absorbing(Rectified.full(), 3))
    out = []
    for sampler in (Ancestral(), Remasking(0.0)):
        torch.manual_seed(1)
        out.append(Diffusion(denoiser, (2,), 5, sampler=sampler).sample((50,)))
    assert torch.equal(*out)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^share: got 1\.5"):
        Remasking(1.5)
    normal = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
    with pytest.raises(
        ValueError, match=r"^sampler: got Remasking\(share=0.1\) under GaussianProcess, which lacks"
    ):
        Diffusion(normal, (2,), 4, sampler=Remasking(0.1)).sample()
    assert Ability.REDRAWS not in GaussianProcess.abilities
