"""Posteriors of short sequences given a noisy reading, against enumeration of the chain."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import SampledGuidance, SubstitutionGuidance
from pyro_diffusion.infer import TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import LogLinear, Rectified, uniform
from pyro_diffusion.unwrapping import per_coordinate

F64 = torch.float64
LENGTH, STATES, STEPS = 3, 3, 4
READ = torch.tensor([0, 2, 1])
processes = pytest.mark.parametrize("process", [Absorbing, Uniform], ids=lambda p: p.__name__)


def table(process: type) -> TableDenoiser:
    joint = torch.rand((STATES,) * LENGTH, generator=torch.Generator().manual_seed(5), dtype=F64)
    return TableDenoiser(process(Rectified.full(), STATES).double(), joint**3)


def confusion(right: float = 0.7) -> Tensor:
    off = (1 - right) / (STATES - 1)
    return torch.full((STATES, STATES), off, dtype=F64) + (right - off) * torch.eye(
        STATES, dtype=F64
    )


def reading(law: Diffusion, count: int = 1, right: float = 0.7) -> ProgramLikelihood:
    """Every symbol is misread now and then; ``count`` sequences with one reading each, all alike."""

    def model():
        with pyro.plate("data", count):
            x = pyro.sample("x", law)
            y = dist.Categorical(confusion(right)[x.long()]).to_event(1)
            pyro.sample("y", y, obs=READ.expand(count, LENGTH))

    return ProgramLikelihood(model)


def summed(law: Diffusion) -> ProgramLikelihood:
    """A reading of the sum of all symbols, which does not factorize over them."""

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x.sum(-1).to(F64), 0.6), obs=torch.tensor(4.0, dtype=F64))

    return ProgramLikelihood(model)


def chain_law(denoiser: TableDenoiser, steps: int) -> Tensor:
    """The chain's own probability of every sequence: its kernels multiplied out over all states."""
    process = denoiser.process
    states = torch.cartesian_prod(*[torch.arange(len(process.noise))] * LENGTH)
    times = uniform(steps, F64)
    mass = process.prior((LENGTH,), dtype=F64).log_prob(states).exp()
    for j in range(steps, -1, -1):
        kernel = denoiser(states, times[j])
        targets = denoiser.sequences
        if j:
            kernel, targets = process.reverse(states, kernel, times[j - 1], times[j]), states
        probs = per_coordinate(kernel).probs
        joint = math.prod(probs[:, i, targets[:, i]] for i in range(LENGTH))
        mass = mass @ joint
    return mass


def index(x: Tensor) -> Tensor:
    return (x * STATES ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """The p-value of counts; cells that expect fewer than five are put together."""
    expected = probs * counts.sum()
    order = expected.argsort()
    small = expected[order].cumsum(0) < 5
    groups = torch.where(small, 0, torch.arange(len(order)))
    pooled = [
        torch.zeros(len(order), dtype=F64).scatter_add_(0, groups, v[order].to(F64))
        for v in (counts, expected)
    ]
    kept = pooled[1] > 0
    observed, expected = (v[kept].numpy() for v in pooled)
    return float(stats.chisquare(observed, expected).pvalue)


@processes
@pytest.mark.parametrize(
    "guidance", [SampledGuidance, SubstitutionGuidance], ids=lambda g: g.__name__
)
@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_the_posterior_is_that_of_enumeration(process, guidance):
    # 1200 filters side by side, one draw of each. Chi-square at 1e-4, evidence at 4 standard errors (6e-5).
    denoiser, count = table(process), 1200
    law = Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64))
    likelihood = reading(law, count)
    done = TwistedSMC(law, likelihood, guidance, 32).run()
    joint = (
        chain_law(denoiser, STEPS)
        * likelihood.log_prob(denoiser.sequences[:, None].expand(-1, count, -1))[:, 0].exp()
    )
    exact = joint.sum()
    ratio = (done.log_evidence_terms - exact.log()).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / count**0.5
    counts = torch.bincount(index(done.sample(()).long()), minlength=STATES**LENGTH)
    p = chi_square(counts, joint / exact)
    assert p > 1e-4, p
    # And the weighted particles of all filters together, cell by cell, far more precisely.
    weights = done.log_weights.exp()
    cells = torch.zeros(STATES**LENGTH, count, dtype=F64)
    cells.scatter_add_(0, index(done.value.long()), weights)
    error = cells.std(1) / count**0.5
    # The bias of a weighted mean is the evidence's relative variance times what is left to learn.
    bias = ratio.var() * 0.5 * joint / exact
    assert (abs(cells.mean(1) - joint / exact) < 4.5 * error + bias).all()


@processes
def test_a_reading_that_ties_symbols_together(process):
    denoiser = table(process)
    law = Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64))
    likelihood = summed(law)
    joint = chain_law(denoiser, STEPS) * likelihood.log_prob(denoiser.sequences).exp()
    exact, spread = joint.sum(), []
    for guidance in (SampledGuidance, SubstitutionGuidance):
        done = TwistedSMC(law, likelihood, guidance, 8000).run()
        estimate = done.log_evidence
        assert abs(estimate.value - exact.log()) < 4.5 * estimate.standard_error
        mean = (joint[:, None] * denoiser.sequences).sum(0) / exact
        assert (abs(done.mean - mean) < 4.5 * done.mean_error).all()
        spread.append(estimate.standard_error)
    # Tilting one symbol at a time overshoots here; draws do not.
    # (Its weights undo one another from step to step, which makes its error bar a cautious one.)
    assert spread[0] < 0.05 and spread[0] < spread[1] < 1.5


@processes
def test_substitutions_are_exact_for_readings_symbol_by_symbol(process):
    denoiser = table(process)
    law = Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64))
    likelihood = reading(law)
    states = torch.randint(len(denoiser.process.noise), (7, 1, LENGTH))
    probs = None
    for floor in (0.0, 0.2):
        guided = SubstitutionGuidance(denoiser, likelihood, floor)
        twisted = guided.twisted(states, torch.tensor(0.6, dtype=F64))
        probs = per_coordinate(twisted.prior).probs
        tilted = probs * confusion()[:, READ].T
        exact = tilted / tilted.sum(-1, True)
        mixed = (1 - floor) * exact + floor * probs
        torch.testing.assert_close(per_coordinate(twisted.posterior).probs, mixed)
    torch.testing.assert_close(twisted.log_twist, tilted.sum(-1).log().sum(-1))


def test_substitutions_are_seen_one_at_a_time():
    # Readings of the sum: what the program says of the mode with one symbol replaced, by hand.
    denoiser = table(Absorbing)
    law = Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64))
    likelihood = summed(law)
    xt = torch.tensor([[3, 1, 3]])
    guided = SubstitutionGuidance(denoiser, likelihood, floor=0.0)
    twisted = guided.twisted(xt, torch.tensor(0.5, dtype=F64))
    probs = per_coordinate(twisted.prior).probs[0]
    mode = probs.argmax(-1)
    for i in range(LENGTH):
        rows = mode.repeat(STATES, 1)
        rows[:, i] = torch.arange(STATES)
        tilted = probs[i] * likelihood.log_prob(rows).exp()
        expected = tilted / tilted.sum()
        torch.testing.assert_close(per_coordinate(twisted.posterior).probs[0, i], expected)


@processes
def test_sampled_twist_is_unbiased_and_its_posterior_right_with_many_draws(process):
    denoiser = table(process)
    law = Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64))
    likelihood = reading(law)
    xt = torch.tensor([[denoiser.process.noise.argmax(), 2, 2]]).expand(3000, 1, LENGTH)
    guided = SampledGuidance(denoiser, likelihood, num_samples=3)
    twisted = guided.twisted(xt, torch.tensor(0.7, dtype=F64))
    probs = per_coordinate(twisted.prior).probs[0, 0]
    tilted = probs * confusion()[:, READ].T
    exact = tilted.sum(-1).prod()
    ratio = twisted.log_twist.exp() / exact
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 3000**0.5  # false alarm 6e-5
    # No symbol that the prior holds possible is lost, though three draws see few of them.
    assert (per_coordinate(twisted.posterior).probs[probs.expand(3000, 1, -1, -1) > 0] > 0).all()
    many = SampledGuidance(denoiser, likelihood, num_samples=40_000).twisted(
        xt[:1], torch.tensor(0.7, dtype=F64)
    )
    found = per_coordinate(many.posterior).probs[0, 0]
    assert abs(found - tilted / tilted.sum(-1, keepdim=True)).max() < 0.02


def test_draws_guide_real_data_too():
    denoiser = MixtureDenoiser(
        GaussianProcess(LogLinear(10, -10)),
        torch.ones(1, dtype=F64),
        torch.zeros(1, 2, dtype=F64),
        1.0,
    )
    law, y = Diffusion(denoiser, (2,), times=uniform(4, F64)), torch.tensor([1.0, -1.0], dtype=F64)

    def model():
        pyro.sample("y", dist.Normal(pyro.sample("x", law), 1.0).to_event(1), obs=y)

    guided = SampledGuidance(denoiser, ProgramLikelihood(model), num_samples=100_000)
    twisted = guided.twisted(torch.tensor([0.4, 0.1], dtype=F64), torch.tensor(0.5, dtype=F64))
    variance = twisted.prior.variance
    expected = twisted.prior.mean + variance / (variance + 1) * (y - twisted.prior.mean)
    assert abs(twisted.posterior.mean - expected).max() < 0.03
    torch.testing.assert_close(twisted.posterior.variance, variance)
    evidence = dist.Normal(twisted.prior.mean, (variance + 1).sqrt()).log_prob(y).sum()
    assert abs(twisted.log_twist - evidence) < 0.03


@processes
def test_row_0_alone_is_row_0_in_a_batch(process):
    denoiser = table(process)
    likelihood = reading(Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64)))
    xt = torch.randint(len(denoiser.process.noise), (5, 1, LENGTH))
    guided = SubstitutionGuidance(denoiser, likelihood)
    many, one = (guided.twisted(x, torch.tensor(0.4, dtype=F64)) for x in (xt, xt[:1]))
    assert many.log_twist[:1].equal(one.log_twist)
    assert per_coordinate(many.posterior).probs[:1].equal(per_coordinate(one.posterior).probs)


@pytest.mark.parametrize("right", [1.0, 0.999])
def test_a_hard_reading(right):
    denoiser = table(Absorbing)
    law = Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64))
    likelihood = reading(law, right=right)
    joint = (
        chain_law(denoiser, STEPS) * likelihood.log_prob(denoiser.sequences[:, None])[:, 0].exp()
    )
    for guidance in (SampledGuidance, SubstitutionGuidance):
        done = TwistedSMC(law, likelihood, guidance, 4000).run()
        estimate = done.log_evidence
        assert abs(estimate.value - joint.sum().log()) < 4.5 * estimate.standard_error
        assert (done.sample((50,))[:, 0] == READ).double().mean() > 0.95


def test_bad_input():
    denoiser = table(Absorbing)
    law = Diffusion(denoiser, (LENGTH,), times=uniform(STEPS, F64))
    likelihood = reading(law)
    for draws in (0, 1.5):
        with pytest.raises(ValueError, match="num_samples: got"):
            SampledGuidance(denoiser, likelihood, num_samples=draws)
    for prior_count in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="prior_count: got"):
            SampledGuidance(denoiser, likelihood, prior_count=prior_count)
    real = MixtureDenoiser(
        GaussianProcess(LogLinear(10, -10)), torch.ones(1), torch.zeros(1, 2), 1.0
    )
    with pytest.raises(ValueError, match="which lacks data of finitely many symbols"):
        SubstitutionGuidance(real, likelihood)

    def together():
        with pyro.plate("data", 2):
            x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x.sum().to(F64), 0.6), obs=torch.tensor(4.0, dtype=F64))

    guided = SubstitutionGuidance(denoiser, ProgramLikelihood(together))
    with pytest.raises(ValueError, match="expected one that factorizes"):
        guided.twisted(torch.zeros(4, 2, LENGTH, dtype=torch.long), torch.tensor(0.5, dtype=F64))


def test_substitutions_do_not_deny_what_two_together_allow():
    """Symbols tied to one another: no single substitution is possible, and the evidence is right."""
    process = Absorbing(Rectified.full(), 3)
    one = torch.tensor([0.4, 0.35, 0.25], dtype=F64)
    denoiser = TableDenoiser(process, one[:, None] * one)
    law = Diffusion(denoiser, (2,), times=uniform(3, F64))

    def model():
        x = pyro.sample("x", law)
        tied = x[..., 0] == x[..., 1]
        pyro.factor("tied", torch.where(tied, 0.0, -torch.inf).to(F64))

    smc = TwistedSMC(law, ProgramLikelihood(model), SubstitutionGuidance, 20_000)
    runs = [smc.run() for _ in range(8)]
    truth = one.square() / one.square().sum()
    found = torch.stack(
        [
            sum((run.log_weights.exp() * (run.value[:, 0] == k)).sum() for run in runs) / len(runs)
            for k in range(3)
        ]
    )
    # Weights have heavy tails here, so that one run's own error bar is not enough: over 64 runs the evidence
    # scatters by .11 of itself and a share by .06. The tolerances are five errors of the mean of eight; what
    # was denied is a share of 0.5.
    found_evidence = torch.tensor([run.log_evidence.value for run in runs], dtype=F64).exp().mean()
    torch.testing.assert_close(found_evidence, one.square().sum(), atol=0, rtol=0.2)
    torch.testing.assert_close(found, truth, atol=0.1, rtol=0)
