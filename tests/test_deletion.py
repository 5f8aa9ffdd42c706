"""Deletion against enumeration: strings of up to six of three letters, and their bound in continuous time."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_diffusion.checkpoint import load_module, save_module
from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    InsertionDenoiser,
    StringTableDenoiser,
    TableDenoiser,
)
from pyro_diffusion.denoisers.base import Denoiser
from pyro_diffusion.distributions import (
    CategoricalDecoder,
    Diffusion,
    DiffusionCTMC,
    DiffusionSDE,
    NormalDecoder,
)
from pyro_diffusion.distributions.decoders import StringDecoder
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.guidance import SampledGuidance, SubstitutionGuidance
from pyro_diffusion.nn import Transformer
from pyro_diffusion.processes import Absorbing, Deletion
from pyro_diffusion.processes.string_distributions import Insertions, Subsequence
from pyro_diffusion.processes.strings import compress, embeddings, insertions, lengths
from pyro_diffusion.samplers import DDIM, Remasking
from pyro_diffusion.schedules import Cosine, Rectified
from tests.discrete import F64, chi_square, chi_square_limit, nodes

A, LONG = 3, 6  # letters, and the longest string
PROCESS = Deletion(Rectified.full(), A)
CUT = Deletion(Rectified(5.0, -math.inf), A)


def strings(length, symbols=A):
    """All padded strings, shortest first."""
    rows = [
        [*word, *[symbols] * (length - size)]
        for size in range(length + 1)
        for word in itertools.product(range(symbols), repeat=size)
    ]
    return torch.tensor(rows)


def joint_of(length, symbols=A):
    """A skewed table over all strings, and the probabilities of ``strings``."""
    generator = torch.Generator().manual_seed(length)
    rows = strings(length, symbols)
    probs = torch.rand(len(rows), dtype=F64, generator=generator) ** 3
    probs = probs / probs.sum()
    joint = torch.zeros([symbols + 1] * length, dtype=F64)
    joint[tuple(rows.T)] = probs
    return joint, probs


ALL = strings(LONG)
WORDS = torch.tensor([[0, 1, 0, 0, 2, 1], [2, 2, 2, 2, 3, 3], [1, 3, 3, 3, 3, 3], [3] * 6])


def spelled(x, positions):
    return (*x[list(positions)].tolist(), *[A] * (len(x) - len(positions)))


def survivors(x, keep):
    """Probability of every string that is left, over all sets of survivors of the symbols before the pads."""
    size, out = int(lengths(x, A)), {}
    for mask in itertools.product([0, 1], repeat=size):
        chance = math.prod(keep if m else 1 - keep for m in mask)
        key = spelled(x, [i for i, m in enumerate(mask) if m])
        out[key] = out.get(key, 0.0) + chance
    return torch.tensor([out.get(tuple(row), 0.0) for row in ALL.tolist()], dtype=F64)


def at(t):
    return torch.tensor(t, dtype=F64)


# Embeddings


def test_embeddings_by_choice_of_positions():
    for x in WORDS:
        size = int(lengths(x, A))
        want = {}
        for n in range(size + 1):
            for positions in itertools.combinations(range(size), n):
                key = spelled(x, positions)
                want[key] = want.get(key, 0) + 1
        got = embeddings(x, ALL, A)
        assert got.tolist() == [want.get(tuple(row), 0) for row in ALL.tolist()]


def test_insertions_are_ratios_of_embeddings():
    x = torch.tensor([0, 0, 1, 0, 2, 1])
    y = ALL[(embeddings(x, ALL, A) > 0) & (lengths(ALL, A) < LONG)]
    got = insertions(x.expand_as(y), y, A)
    for row, counts in zip(y.tolist(), got, strict=True):
        size = LONG - row.count(A)
        for gap, symbol in itertools.product(range(LONG), range(A)):
            longer = [*row[:gap], symbol, *row[gap:]][:LONG]
            want = embeddings(x, torch.tensor(longer), A) / embeddings(x, torch.tensor(row), A)
            assert counts[gap, symbol] == pytest.approx(float(want) if gap <= size else 0.0)
    assert_close(got.sum((-1, -2)), (LONG - lengths(y, A)).double())
    assert bool((insertions(x.expand(2, -1), ALL[[5, -1]], A)[1] == 0).all())


def test_long_strings():
    """Binomial coefficients, at the longest that is allowed."""
    x, y = torch.zeros(1000, dtype=torch.int64), torch.ones(1000, dtype=torch.int64)
    y[:500] = 0
    want = math.lgamma(1001) - 2 * math.lgamma(501)
    assert float(embeddings(x, y, 1).log()) == pytest.approx(want, rel=1e-12)
    counts = insertions(x[:300], torch.cat([x[:150], y[500:650]]), 1)
    assert_close(counts[:151, 0], torch.full((151,), 150 / 151, dtype=F64))


def test_compress():
    x = torch.tensor([2, 0, 1, 3])
    assert compress(x, torch.tensor([True, False, True, False]), 3).tolist() == [2, 1, 3, 3]


# The process


@pytest.mark.parametrize("process", [PROCESS, CUT])
@pytest.mark.parametrize("t", [0.02, 0.5, 0.97])
def test_marginal(process, t):
    alpha = float(process.level(at(t)).alpha)
    for x in WORDS:
        got = process.marginal(x, at(t)).log_prob(ALL).exp()
        assert_close(got, survivors(x, alpha), rtol=0, atol=1e-15)


def test_transition_and_bridge():
    """Transitions compose, and Bayes' rule holds, to 1e-14."""
    s, t = at(0.35), at(0.8)
    step = PROCESS.transition(ALL.unsqueeze(1), s, t).log_prob(ALL).exp()
    assert_close(step.sum(-1), torch.ones(len(ALL), dtype=F64))
    for x in WORDS[:3]:
        early = PROCESS.marginal(x, s).log_prob(ALL).exp()
        late = PROCESS.marginal(x, t).log_prob(ALL).exp()
        assert_close(early @ step, late, rtol=0, atol=1e-15)
        xt = ALL[late > 0]
        bridge = PROCESS.bridge(xt.unsqueeze(1), x.expand_as(xt).unsqueeze(1), s, t)
        got = bridge.log_prob(ALL).exp()
        want = (early * step[:, late > 0].T) / late[late > 0].unsqueeze(-1)
        assert_close(got, want, rtol=0, atol=1e-14)


def test_ends():
    assert PROCESS.marginal(WORDS, 0.0).log_prob(WORDS).tolist() == [0.0] * 4
    assert bool((PROCESS.marginal(WORDS, 1.0).sample() == A).all())
    prior = PROCESS.prior((LONG,))
    assert bool((prior.sample((3,)) == A).all()) and float(prior.log_prob(WORDS[3])) == 0
    assert float(prior.log_prob(WORDS[2])) == -math.inf


def counted(draws, rows):
    base = draws.shape[-1]
    power = 10 ** torch.arange(base - 1, -1, -1)
    keys = {int(k): i for i, k in enumerate((rows * power).sum(-1))}
    index = torch.tensor([keys[int(k)] for k in (draws * power).sum(-1)])
    return torch.bincount(index, minlength=len(rows)).double()


DRAWN = {
    "marginal": lambda: PROCESS.marginal(WORDS[0], at(0.4)),
    "bridge": lambda: PROCESS.bridge(torch.tensor([0, 1, 3, 3, 3, 3]), WORDS[0], at(0.3), at(0.7)),
    "insertions": lambda: insertions_of([1, 0, 1, 1, 3, 3]),
    "insertions into none": lambda: insertions_of([3] * 6).thinned(at([0.2])),
}


def insertions_of(row):
    odds = torch.randn(LONG, A, dtype=F64, generator=torch.Generator().manual_seed(1)) - 2
    return Insertions(torch.tensor(row), odds, A)


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_the_probabilities(name):
    """They sum to one; chi-square beyond 4 sigmas, a false alarm once in 30 000, four times."""
    torch.manual_seed(0)
    distribution = DRAWN[name]()
    probs = distribution.log_prob(ALL).exp()
    assert_close(probs.sum(), at(1.0), rtol=1e-12, atol=0)
    counts = counted(distribution.sample((20000,)), ALL)
    common = probs > 1e-3  # the rest together is one category
    pooled = [torch.cat([v[common], v[~common].sum().reshape(1)]) for v in (counts, probs)]
    assert chi_square(*pooled) < chi_square_limit(len(pooled[0]))


def test_insertions_by_enumeration():
    """The density of what a gap of three and one of two come to, against all fillings of the slots."""
    y, keep = torch.tensor([0, 3, 3]), at([0.6])
    odds = torch.randn(3, A, dtype=F64, generator=torch.Generator().manual_seed(2))
    odds[2] = -math.inf
    p = odds.flatten().exp() / (1 + odds.flatten().exp().sum())
    choices = [*range(6), None]
    want = {}
    for filled in itertools.product(choices, repeat=2):
        chance = math.prod(
            1 - 0.6 * float(p.sum()) if c is None else 0.6 * float(p[c]) for c in filled
        )
        gaps = [[c % A for c in filled if c is not None and c // A == g] for g in (0, 1)]
        orders = [*itertools.product(*(itertools.permutations(g) for g in gaps))]
        for before, after in orders:
            row = (*before, 0, *after, 3, 3, 3)[:3]
            want[row] = want.get(row, 0.0) + chance / len(orders)
    rows = strings(3)
    got = Insertions(y, odds, A).thinned(keep).log_prob(rows).exp()
    assert_close(got, torch.tensor([want.get(tuple(r), 0.0) for r in rows.tolist()], dtype=F64))


# The bound


def rate(denoiser, x, times):
    """E of the bound's integrand at times, over all that can be left of x."""
    process = denoiser.process
    rows = strings(len(x), process.symbols)
    rows = rows[embeddings(x, rows, process.symbols) > 0]
    rates = process.rates(times.repeat_interleave(len(rows)))
    xt = rows.repeat(len(times), 1)
    probs = process.marginal(x.expand_as(xt), rates.level).log_prob(xt).exp()
    cost = process.divergence_rate(x.expand_as(xt), xt, denoiser(xt, rates.level), rates)
    return (probs * cost).reshape(len(times), -1).sum(-1)


def decoder_cost(denoiser, x):
    process, rows = denoiser.process, strings(len(x), denoiser.process.symbols)
    level = process.level(at(0.0))
    probs = process.marginal(x, level).log_prob(rows).exp()
    decoder = StringDecoder(process.symbols)(denoiser(rows[probs > 0], level), level, process)
    return -(probs[probs > 0] * decoder.log_prob(x)).sum()


def continuous_bound(denoiser, x, count=60):
    """Minus the bound, by quadrature over t and enumeration of the states."""
    times, weights = nodes(count)
    total = (weights * rate(denoiser, x, times)).sum() + decoder_cost(denoiser, x)
    return float(total.detach())


def chain_bound(denoiser, x, steps):
    process, total, rows = denoiser.process, decoder_cost(denoiser, x), strings(len(x))
    times = torch.linspace(0, 1, steps + 1, dtype=F64)
    for s, t in itertools.pairwise(times):
        s, t = process.level(s), process.level(t)
        weight = process.marginal(x, t).log_prob(rows).exp()
        xt = rows[weight > 0]
        bridge = process.bridge(xt.unsqueeze(1), x.expand_as(xt).unsqueeze(1), s, t).log_prob(rows)
        kernel = process.reverse(xt, denoiser(xt, t), s, t)
        found = kernel.expand((len(rows), len(xt))).log_prob(rows.unsqueeze(1)).T
        gap = torch.where(bridge > -math.inf, bridge.exp() * (bridge - found), 0.0)
        total = total + (weight[weight > 0] * gap.sum(-1)).sum()
    return float(total.detach())


class Wrong(Denoiser):
    """Counts that depend on the string and the level, and are not those of any data."""

    def __init__(self, process, length):
        super().__init__(process)
        weight = torch.randn(3, length, process.symbols, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(weight.double())

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt, state="xt")
        lost = (1 - level.alpha).clamp(min=1e-300).unsqueeze(-1)
        shape = self.weight[0] + self.weight[1] * lost
        n = lengths(xt, self.process.symbols)[..., None, None]
        return Insertions(xt, shape + self.weight[2] * n / 5 + lost.log(), self.process.symbols)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_exact_denoiser_is_tight(length):
    joint, probs = joint_of(length)
    denoiser, rows = StringTableDenoiser(PROCESS, joint), strings(length)
    for index in (0, 1, len(rows) - 2):
        got = continuous_bound(denoiser, rows[index])
        assert got == pytest.approx(-math.log(probs[index]), abs=1e-6)


def test_symbols_lost_at_the_start():
    """A schedule that begins with losses: the decoder inserts apart, which costs a little on average."""
    joint, probs = joint_of(2)
    denoiser = StringTableDenoiser(CUT, joint)
    bounds = -torch.tensor([continuous_bound(denoiser, x) for x in strings(2)], dtype=F64)
    assert 0 < float((probs * (probs.log() - bounds)).sum()) < 0.03
    assert float(bounds.exp().sum()) < 1 + 1e-6


@pytest.mark.parametrize("process", [PROCESS, CUT])
def test_wrong_denoisers_are_below(process):
    wrong = Wrong(process, 2)
    total = sum(math.exp(-continuous_bound(wrong, x, 20)) for x in strings(2))
    assert total < 0.99  # a density would sum to one


def test_chain_tends_to_it():
    joint, probs = joint_of(2)
    denoiser, gaps = StringTableDenoiser(PROCESS, joint), []
    for steps in (1, 8, 32):
        bounds = -torch.tensor([chain_bound(denoiser, x, steps) for x in strings(2)], dtype=F64)
        assert float(bounds.exp().sum()) < 1 + 1e-9
        gaps.append(float((probs * (probs.log() - bounds)).sum()))
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 0.4 * gaps[1]


def test_integrand_is_the_limit_of_the_chains_divergence():
    wrong, x = Wrong(PROCESS, 3), torch.tensor([1, 1, 0])
    rows = strings(3)
    for t in (0.2, 0.8):
        got, errors = float(rate(wrong, x, at([t])).detach()), []
        for h in (1e-2, 1e-3):
            s, late = PROCESS.level(at(t - h)), PROCESS.level(at(t))
            weight = PROCESS.marginal(x, late).log_prob(rows).exp()
            total = 0.0
            for xt, w in zip(rows[weight > 0], weight[weight > 0], strict=True):
                bridge = PROCESS.bridge(xt, x, s, late).log_prob(rows)
                found = PROCESS.reverse(xt, wrong(xt, late), s, late).log_prob(rows)
                gap = torch.where(bridge > -math.inf, bridge.exp() * (bridge - found), 0.0)
                total += float((w * gap.sum()).detach())
            errors.append(abs(total / h - got))
        assert errors[1] < 0.15 * errors[0] and errors[1] < 0.01 * got


def test_rates_are_of_strings():
    """Counts that move between gaps around equal symbols change no rate; those that move elsewhere do."""
    x0, xt = torch.tensor([[0, 1, 1, 1, 2, 0]]), torch.tensor([[1, 1, 2, 3, 3, 3]])
    rates = PROCESS.rates(at([0.4]))
    odds = torch.zeros(1, LONG, A, dtype=F64)

    def cost(first, second, symbol, share=0.7):
        moved = odds.clone()
        moved[0, first, symbol], moved[0, second, symbol] = math.log(1 - share), math.log(1 + share)
        return float(PROCESS.divergence_rate(x0, xt, Insertions(xt, moved, A), rates))

    even = cost(0, 1, 1, share=0.0)
    assert cost(0, 1, 1) == pytest.approx(even, rel=1e-12)
    assert cost(2, 0, 1) == pytest.approx(even, rel=1e-12)
    assert cost(2, 3, 2) == pytest.approx(even, rel=1e-12)
    assert abs(cost(0, 3, 1) - even) > 1e-3 and abs(cost(0, 1, 0) - even) > 1e-3


def test_alignments_summed_out_cost_less():
    """The cost of a known embedding is larger on average: conditioned on more, the rates are further off."""
    x0, xt = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 3, 3, 3])
    rates = PROCESS.rates(at(0.5))
    posterior = Insertions(xt, torch.zeros(4, A, dtype=F64), A)
    got = float(PROCESS.divergence_rate(x0, xt, posterior, rates))
    found, aligned = posterior.counts, 0.0
    for place in (0, 1, 3):
        known = torch.zeros(4, A, dtype=F64)
        for j, symbol in enumerate(x0.tolist()):
            known[int(j > place), symbol] += float(j != place)
        cost = found - known + torch.xlogy(known, known / found.clamp(min=1e-300))
        aligned += float(cost[:2].sum()) / 3 / 0.5
    assert got < aligned - 0.1


# The estimate


def test_estimate_is_unbiased():
    """Three standard errors, of 8 numbers: a false alarm once in 50, at a fixed seed."""
    torch.manual_seed(0)
    joint, _ = joint_of(4)
    rows = strings(4)[[0, 2, 7, 30, 41, 77, 100, 120]]
    law = DiffusionCTMC(StringTableDenoiser(PROCESS, joint), (4,))
    got = law.log_prob(rows.repeat(20000, 1)).reshape(-1, 8)
    error = got.std(0) / math.sqrt(len(got))
    assert bool((error < 0.15).all())
    want = joint[tuple(rows.T)].log()
    assert bool(((got.mean(0) - want).abs() < 3 * error).all())


def test_evaluation():
    torch.manual_seed(1)
    joint, _ = joint_of(3)
    rows = strings(3)[[3, 17, 39]]
    found = log_likelihood(
        DiffusionCTMC(StringTableDenoiser(PROCESS, joint), (3,)), rows, num_terms=300
    )
    gap = found.value - joint[tuple(rows.T)].log()
    assert bool((gap.abs() < 4 * found.standard_error + 1e-3).all())


@pytest.mark.parametrize("process", [PROCESS, CUT])
def test_gradients(process):
    wrong = Wrong(process, 4)
    x = strings(4)[[5, 60, 110]].repeat(20, 1)
    for law in (DiffusionCTMC(wrong, (4,)), Diffusion(wrong, (4,), 5)):
        wrong.weight.grad = None
        law.log_prob(x).sum().backward()
        way = torch.randn_like(wrong.weight)
        with torch.no_grad():
            values = []
            for h in (1e-5, -1e-5):
                wrong.weight += h * way
                values.append(law.log_prob(x).sum())
                wrong.weight -= h * way
        assert_close(
            (values[0] - values[1]) / 2e-5, (wrong.weight.grad * way).sum(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.5, 1 - 1e-4, 1 - 1e-6])
def test_single_precision(t):
    joint, _ = joint_of(3)
    x0, out = torch.tensor([0, 0, 2]), []
    rows = strings(3)
    for dtype in (torch.float32, F64):
        rates = PROCESS.rates(torch.full((len(rows),), t).to(dtype))
        weight = PROCESS.marginal(x0, torch.tensor(t).to(dtype)).log_prob(rows).double().exp()
        posterior = StringTableDenoiser(PROCESS, joint.to(dtype))(rows, rates.level)
        cost = PROCESS.divergence_rate(x0.expand_as(rows), rows, posterior, rates)
        assert cost.dtype == dtype and bool(cost.isfinite().all())
        out.append((weight * cost.double()).sum())
    assert_close(out[0], out[1], rtol=0.1 if t < 1e-5 else 1e-3, atol=1e-5)


# Samples


def test_samples_of_the_exact_denoiser():
    """Chi-square over all 15 strings, beyond 4 sigmas: a false alarm once in 30 000."""
    torch.manual_seed(3)
    joint, probs = joint_of(3, 2)
    process, found = Deletion(Rectified.full(), 2), {}
    for steps in (1, 128):
        law = DiffusionCTMC(StringTableDenoiser(process, joint), (3,), steps)
        counts = counted(law.sample((5000,)), strings(3, 2))
        found[steps] = chi_square(counts, probs)
    assert found[128] < chi_square_limit(15) < found[1]


@pytest.mark.parametrize("view", [Diffusion, DiffusionCTMC])
def test_samples_where_most_strings_are_impossible(view):
    """Steps insert apart from each other, and so reach strings that the table has not."""
    torch.manual_seed(0)
    joint = torch.zeros(3, 3, 3)
    joint[0, 1, 0], joint[0, 1, 2], joint[1, 2, 2] = 0.5, 0.3, 0.2
    denoiser = StringTableDenoiser(Deletion(Rectified.full(), 2), joint)
    x = view(denoiser, (3,), 50).sample((4000,))
    counts = counted(x, strings(3, 2))
    wanted = 4000 * joint[tuple(strings(3, 2).T)]
    assert bool(((counts - wanted).abs() <= 5 * (0.02 * 4000 + wanted).sqrt() + 0.02 * 4000).all())


def test_samples_are_those_of_the_chain():
    """One step: insertions into nothing, whose density is known; chi-square as above."""
    torch.manual_seed(4)
    wrong = Wrong(PROCESS, 3)
    empty = torch.full((3,), A)
    want = wrong(empty, torch.tensor(1.0, dtype=F64)).log_prob(strings(3)).exp().detach()
    counts = counted(Diffusion(wrong, (3,), 1).sample((10000,)), strings(3))
    assert chi_square(counts, want) < chi_square_limit(40)


# Networks, shapes and copies


def network(outputs=A, length=LONG):
    torch.manual_seed(0)
    out = Transformer(states=A + 1, length=length, width=8, depth=1, heads=2, outputs=outputs)
    nn.init.normal_(out.last.weight)
    return out


@torch.no_grad()
def test_network():
    denoiser = InsertionDenoiser(network(), PROCESS)
    nothing, all_ = denoiser(WORDS, 0.0), denoiser(WORDS, 1.0)
    assert float(nothing.counts.sum()) < 1e-20
    assert bool((all_.counts[0] == 0).all())  # no room
    # Gaps beyond the end are closed; the gap at the end is open.
    assert bool((all_.counts[2, 2:] == 0).all()) and bool((all_.counts[2, :2] > 0).all())
    flat = InsertionDenoiser(nn.Module(), PROCESS)
    flat.network.forward = lambda x, log_snr: torch.zeros(*x.shape, A)
    counts = flat(WORDS, 1.0).counts
    assert_close(counts[3, 0], torch.full((3,), LONG / 2 / 3))
    assert_close(counts.sum((-1, -2)), (LONG - lengths(WORDS, A)) / 2)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("view", [DiffusionCTMC, Diffusion])
def test_shapes(view, batch):
    law = view(InsertionDenoiser(network(), PROCESS), (LONG,), 4)
    x = law.sample(batch)
    PROCESS.check_state("x", x)
    assert x.shape == (*batch, LONG)
    assert law.log_prob(x).shape == batch and torch.equal(law.log_prob(x), law.log_prob(x))
    assert law.expand((5,)).sample().shape == (5, LONG)
    for distribution in (PROCESS.marginal(x, 0.4), PROCESS.bridge(x, x, 0.2, 0.4)):
        assert distribution.batch_shape == batch and distribution.event_shape == (LONG,)
        assert distribution.expand((7, *batch)).sample((2,)).shape == (2, 7, *batch, LONG)
        assert distribution.log_prob(distribution.sample((2,))).shape == (2, *batch)
    posterior = law.denoiser(x, 0.4).expand((7, *batch))
    assert posterior.log_prob(posterior.sample()).shape == (7, *batch)
    assert posterior.counts.shape == (7, *batch, LONG, A)


def test_rows_are_independent():
    wrong, generator = Wrong(PROCESS, LONG), torch.Generator().manual_seed(0)
    x0 = PROCESS.trial_data((5, LONG))
    xt = compress(x0, torch.rand(x0.shape, generator=generator) < 0.5, A)
    xt = torch.where(lengths(x0, A).unsqueeze(-1) > 0, xt, A)
    rates = PROCESS.rates(torch.rand(5, dtype=F64, generator=generator))
    every = PROCESS.divergence_rate(x0, xt, wrong(xt, rates.level), rates)
    density = wrong(xt, rates.level).log_prob(x0)
    for i in range(5):
        one = PROCESS.rates(rates.level.t[i, 0])
        alone = PROCESS.divergence_rate(x0[i], xt[i], wrong(xt[i], one.level), one)
        assert_close(alone, every[i])
        assert_close(wrong(xt[i], one.level).log_prob(x0[i]), density[i])


def test_trial_data():
    x = PROCESS.trial_data((50, LONG))
    PROCESS.check_state("x", x)
    assert torch.equal(x, PROCESS.trial_data((50, LONG)))
    assert len(lengths(x, A).unique()) > 3


def test_kernels_from_tensors():
    kernel = PROCESS.reverse(WORDS, Wrong(PROCESS, LONG)(WORDS, 0.5), 0.4, 0.5)
    again = PROCESS.kernel_from(PROCESS.kernel_tensors(kernel))
    assert torch.equal(again.log_prob(WORDS), kernel.log_prob(WORDS))
    decoder, level = StringDecoder(A), PROCESS.level(at(0.0))
    for process in (PROCESS, CUT):
        last = decoder(kernel, level, process)
        same = decoder.kernel_from(decoder.kernel_tensors(last), 1)
        assert torch.equal(same.log_prob(WORDS), last.log_prob(WORDS))


def test_copies_and_checkpoints(tmp_path):
    law = DiffusionCTMC(InsertionDenoiser(network(), PROCESS), (LONG,), 7)
    for other in (copy.deepcopy(law), pickle.loads(pickle.dumps(law))):
        assert torch.equal(other.log_prob(WORDS), law.log_prob(WORDS)) and other.steps == 7
    save_module(tmp_path / "words.safetensors", law.denoiser)
    again = InsertionDenoiser(network(), Deletion(Rectified.full(), A))
    nn.init.zeros_(again.network.last.weight)
    load_module(tmp_path / "words.safetensors", again)
    assert torch.equal(again(WORDS, 0.3).counts, law.denoiser(WORDS, 0.3).counts)


# Bad input

ONES = torch.ones(4, 4)
BAD = {
    "schedule": (lambda: Deletion(Cosine(), 3), r"^schedule: got Cosine with a log-SNR of -\d"),
    "symbols": (lambda: Deletion(Rectified.full(), 0), "^symbols: got 0"),
    "pad in the middle": (
        lambda: PROCESS.marginal(torch.tensor([0, 3, 1]), 0.5),
        r"^x0: got a pad \(3\) before a symbol",
    ),
    "out of range": (
        lambda: PROCESS.marginal(torch.tensor([0, 4, 3]), 0.5),
        "^x0: got integers from 0 to 4, expected symbols from 0 to 2 and the pad 3",
    ),
    "floats": (lambda: PROCESS.marginal(torch.zeros(3), 0.5), "^x0: got dtype torch.float32"),
    "too long": (
        lambda: PROCESS.marginal(torch.zeros(1001, dtype=torch.int64), 0.5),
        "^x0: got rows of 1001 symbols, expected at most 1000",
    ),
    "event too long": (lambda: PROCESS.prior((1001,)), r"^event_shape: got \(1001,\)"),
    "event": (lambda: PROCESS.prior((3, 3)), r"^event_shape: got \(3, 3\)"),
    "order": (lambda: PROCESS.transition(WORDS, 0.5, 0.2), "^s, t: got s at or after t"),
    "eta": (lambda: PROCESS.bridge(WORDS, WORDS, 0.2, 0.5, 0.5), "^eta: got 0.5, expected 1"),
    "value": (
        lambda: wrong_law().log_prob(torch.tensor([0, 3, 1])),
        r"^value: got a pad \(3\) before a symbol",
    ),
    "value too long": (
        lambda: wrong_law().log_prob(torch.tensor([0, 1, 1, 1])),
        r"^value: got shape \(4,\)",
    ),
    "posterior": (
        lambda: PROCESS.reverse(WORDS, Subsequence(WORDS, at([0.5]), A), 0.2, 0.5),
        "^posterior: got Subsequence, expected Insertions",
    ),
    "network": (
        lambda: InsertionDenoiser(network(2), PROCESS)(WORDS, 0.5),
        r"^network: got an output of shape \(4, 6, 2\)",
    ),
    "other process": (
        lambda: InsertionDenoiser(network(), Absorbing(Cosine(), 3)),
        "^process: got Absorbing, which lacks data of strings .* such as Deletion",
    ),
    "table": (
        lambda: StringTableDenoiser(PROCESS, torch.ones(3, 3)),
        r"^joint: got shape \(3, 3\), expected every dimension to be 4",
    ),
    "table pads": (lambda: StringTableDenoiser(PROCESS, ONES), "^joint: got .* a pad before"),
    "table length": (
        lambda: StringTableDenoiser(PROCESS, joint_of(2)[0])(WORDS, 0.5),
        "^xt: got .* expected a last dimension of 2",
    ),
    "symbols' table": (
        lambda: TableDenoiser(PROCESS, ONES),
        "^process: got Deletion, which lacks data of finitely many symbols",
    ),
    "symbols' network": (
        lambda: CategoricalDenoiser(network(), PROCESS),
        "^process: got Deletion, which lacks data of finitely many symbols",
    ),
    "decoder": (
        lambda: wrong_law(decoder=StringDecoder(2)),
        r"^decoder: got StringDecoder\(\) of 2 symbols, expected 3",
    ),
    "normal decoder": (lambda: wrong_law(decoder=NormalDecoder()), "^decoder: got NormalDecoder"),
    "symbols' decoder": (
        lambda: wrong_law(decoder=CategoricalDecoder(4)),
        "^decoder: got CategoricalDecoder.* under Deletion, which lacks data of finitely many",
    ),
    "SDE": (
        lambda: DiffusionSDE(Wrong(PROCESS, 3), (3,)),
        "^denoiser: got Wrong under Deletion, which lacks a stochastic differential equation",
    ),
    "DDIM": (
        lambda: wrong_law(sampler=DDIM()).sample(),
        r"^sampler: got DDIM\(eta=0\) under Deletion, which lacks",
    ),
    "guidance": (
        lambda: SampledGuidance(Wrong(PROCESS, 3), None),
        "^denoiser: got Wrong under Deletion, which lacks data of real numbers",
    ),
    "guidance of symbols": (
        lambda: SubstitutionGuidance(Wrong(PROCESS, 3), None),
        "^denoiser: got Wrong under Deletion, which lacks data of finitely many symbols",
    ),
    "remasking": (
        lambda: wrong_law(sampler=Remasking(0.1)).sample(),
        "^sampler: got Remasking.* under Deletion, which lacks bridges that draw",
    ),
}


def wrong_law(**arguments):
    return DiffusionCTMC(Wrong(PROCESS, 3), (3,), 4, **arguments)


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
