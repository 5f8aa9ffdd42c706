"""The one-site estimate against the bound, and the bound against exact likelihoods.

Monte-Carlo comparisons accept 4 standard errors: a two-sided false alarm in 6e-5 of seeds. The seed is
fixed, so a test that passes passes always.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    GaussianDenoiser,
    LearnedVariance,
    MixtureDenoiser,
    TableDenoiser,
    Velocity,
)
from pyro_diffusion.distributions import (
    Bound,
    Diffusion,
    FlowMatching,
    Hybrid,
    NormalDecoder,
    Objective,
    QuantizedDecoder,
    Simple,
    Weighted,
)
from pyro_diffusion.distributions.objectives import ReverseStep, divergence
from pyro_diffusion.infer import ChainReparam
from pyro_diffusion.infer.reparam import forward_chain
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, LinearBeta, Rectified, uniform, uniform_log_snr
from tests.small_diffusions import SMALL_DIFFUSIONS

F64 = torch.float64


def close(a: Tensor, b: Tensor, standard_errors: float = 4.0) -> None:
    """Means of two groups of independent draws (first dimension) agree."""
    gap = (a.mean(0) - b.mean(0)).abs()
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    assert (gap <= standard_errors * error + 1e-12).all(), (gap, error)


def mixture(components: int = 3, size: int = 2, **arguments) -> MixtureDenoiser:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(components, size, generator=generator, dtype=F64)
    process = GaussianProcess(Cosine())
    return MixtureDenoiser(process, torch.ones(components, dtype=F64), means, 0.05, **arguments)


def table(process: type = Absorbing, length: int = 4) -> TableDenoiser:
    generator = torch.Generator().manual_seed(2)
    joint = torch.rand((3,) * length, generator=generator, dtype=F64) ** 3
    # The process holds float32 constants; all else is float64 here.
    return TableDenoiser(process(Rectified.full(), 3).double(), joint)


def total(diffusion: Diffusion, value: Tensor, repeats: int) -> Tensor:
    """Minus the sum of all K + 2 terms, ``repeats`` independent times."""
    many = value.expand(repeats, *value.shape)
    return -sum(diffusion.bound_terms(many, j) for j in range(diffusion.steps + 2))


QUANTIZED = QuantizedDecoder(5, low=-2.0, high=2.0)


@pytest.mark.parametrize(
    ("denoiser", "event", "decoder"),
    [
        (mixture, (2,), None),
        (lambda: mixture(point_mass=True), (2,), None),
        (mixture, (2,), QUANTIZED),
        (lambda: table(Absorbing), (4,), None),
        (lambda: table(Uniform), (4,), None),
    ],
    ids=["normal", "point", "quantized", "absorbing", "uniform"],
)
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_one_site_is_unbiased_for_every_datum(denoiser, event, decoder, steps):
    denoiser, times = denoiser(), uniform(steps, F64)

    def fresh() -> Diffusion:
        return Diffusion(denoiser, event, times=times, decoder=decoder)

    data = fresh().sample((5,))
    # One instance scores 40 copies; its low-discrepancy draws depend on each other, instances do not.
    copies = data.repeat(40, 1)
    estimates = torch.stack([fresh().log_prob(copies).view(40, 5).mean(0) for _ in range(150)])
    close(estimates, total(fresh(), data, 2000))


class _Count(Objective):
    """Costs that show how often, and under which weight, each term is drawn."""

    def __init__(self, decoder_share: float):
        self.decoder_share = decoder_share

    def reverse_term(self, step):
        return torch.full_like(step.x0[..., 0], 1.0)

    def decoder_term(self, step):
        return torch.full_like(step.value[..., 0], 1000.0)

    def decoder_baseline(self, decoder, t, event_shape):
        return 0.0


class _NoBaseline(Bound):
    def decoder_baseline(self, decoder, t, event_shape):
        return 0.0


def test_the_decoders_baseline_takes_its_known_size_out_of_the_draw():
    """Same randomness with and without: only the part that is known is no longer drawn."""
    denoiser, data = mixture(), torch.zeros(4000, 2, dtype=F64)
    law = Diffusion(denoiser, (2,), times=uniform(100, F64))
    plain = law.replace(objective=_NoBaseline())
    plain._seed = law._seed
    ours, theirs = law.log_prob(data), plain.log_prob(data)
    start = denoiser.process.schedule.level(torch.zeros((), dtype=F64))
    known = NormalDecoder().baseline(start, torch.Size([2]))
    gap = ours - theirs
    decodes = gap.abs() > 2 * known.abs()
    # 1/16 of the data gain 15 times what the others lose: nothing on average.
    torch.testing.assert_close(gap[decodes], (15 * known).expand(250))
    torch.testing.assert_close(gap[~decodes], (-known).expand(3750))
    assert ours.std() < theirs.std()


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("share", [0.0, 1 / 16, 0.5])
def test_every_term_has_the_weight_of_its_probability(steps, share):
    batch = 1600
    law = Diffusion(mixture(), (2,), times=uniform(steps, F64), objective=_Count(share))
    cost = -law.log_prob(torch.zeros(batch, 2, dtype=F64)) - law.bound_terms(
        torch.zeros(2, dtype=F64), steps + 1
    )
    expected = max(share, 1 / (steps + 1))
    decodes = cost > 900
    # Evenly spaced places: counts are right to one, for any offset.
    assert abs(int(decodes.sum()) - batch * expected) <= 1
    torch.testing.assert_close(cost[decodes] * expected, torch.full_like(cost[decodes], 1000.0))
    weight = torch.full_like(cost[~decodes], steps / (1 - expected))
    torch.testing.assert_close(cost[~decodes], weight)


def test_every_step_is_drawn_equally_often():
    seen = []

    class Record(_Count):
        def reverse_term(self, step):
            seen.append(torch.stack([step.s.t.flatten(), step.t.t.flatten()]))
            return super().reverse_term(step)

    law = Diffusion(mixture(), (2,), times=uniform(10, F64), objective=Record(0.0))
    law.log_prob(torch.zeros(1100, 2, dtype=F64))
    early, late = seen[0]
    torch.testing.assert_close(late - early, torch.full_like(late, 0.1))
    # 1100 data, 11 terms: 100 each, and the decoder's (whose levels are the first step's) 100 more.
    counts = (late * 10).round().long().bincount(minlength=11)
    assert ((counts - torch.tensor([0, 200, *[100] * 9])).abs() <= 1 + (counts > 150)).all()


@pytest.mark.parametrize("shape", [(64,), (3, 64), (64, 5), (2, 64, 3)], ids=str)
def test_low_discrepancy_beats_independent_draws(shape):
    """Also along the one long dimension of a batch of several, such as the data of one enumerated class."""
    denoiser, times, batch = mixture(), uniform(100, F64), 64
    data = denoiser.data().sample((1,)).expand(*shape, 2)
    runs = []
    for _ in range(150):
        # Without the decoder's baseline, whose term is then the large one that even draws tame.
        scores = Diffusion(denoiser, (2,), times=times, objective=_NoBaseline()).log_prob(data)
        runs.append(scores.movedim(shape.index(batch), 0).reshape(batch, -1))
    scores = torch.stack(runs)  # equal data, so that all of them tell the variance of one
    ratio = scores.mean(1).var(0).mean() / (scores.var() / batch)
    # Independent draws give a ratio of 1 with a standard deviation of .1 or less; here it is .2 to .45,
    # with one of .02.
    assert ratio < 0.55, ratio


def log_weights(law: Diffusion, value: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x, chain) - log q(chain | x) for one draw of the chain per datum, and its x_{t_K}."""

    def model():
        with pyro.plate("data", len(value)):
            pyro.sample("x", law, obs=value)

    def guide():
        with pyro.plate("data", len(value)):
            forward_chain("x", law, value)

    q = poutine.trace(guide).get_trace()
    p = poutine.trace(
        poutine.replay(poutine.reparam(model, config={"x": ChainReparam()}), trace=q)
    ).get_trace()
    p.compute_log_prob()
    q.compute_log_prob()
    weights = torch.zeros(len(value), dtype=F64)
    for sign, trace in ((1, p), (-1, q)):
        for node in trace.stochastic_nodes + trace.observation_nodes:
            if node.startswith("x"):
                weights = weights + sign * trace.nodes[node]["log_prob"]
    return weights, q.nodes[f"x_t{law.steps}"]["value"]


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("schedule", [Cosine(), Rectified(), Cosine(6.0, -6.0)])
def test_isotropic_gaussian_is_exact_draw_by_draw(steps, schedule):
    process = GaussianProcess(schedule)
    denoiser = MixtureDenoiser(
        process, torch.ones(1, dtype=F64), torch.tensor([[0.7, -0.4, 0.1]], dtype=F64), 0.3
    )
    law = Diffusion(denoiser, (3,), times=uniform(steps, F64))
    value = denoiser.data().sample((100,))
    weights, end = log_weights(law, value)
    # The exact reverse kernel makes every chain's weight p(x), up to the prior that replaces q(x_1).
    prior = process.prior((3,), dtype=F64).log_prob(end)
    mismatch = prior - denoiser.marginal(law.times[-1]).log_prob(end)
    expected = denoiser.data().log_prob(value)
    torch.testing.assert_close(weights - mismatch, expected, rtol=0, atol=1e-9)


def test_isotropic_standard_normal_one_site_is_exact():
    process = GaussianProcess(Cosine())
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), torch.zeros(1, 4, dtype=F64), 1.0)
    value = denoiser.data().sample((20000,))
    for steps in (1, 5, 50):
        law = Diffusion(denoiser, (4,), times=uniform(steps, F64))
        gap = (total(law, value, 1)[0] - denoiser.data().log_prob(value)) / 4
        assert gap.mean().abs() <= 4 * gap.std() / math.sqrt(20000)


def gap_per_dimension(denoiser: MixtureDenoiser, times: Tensor, n: int) -> tuple[float, float]:
    pyro.set_rng_seed(5)
    data = denoiser.data().sample((n,))
    gap = denoiser.data().log_prob(data) - total(
        Diffusion(denoiser, (data.shape[1],), times=times), data, 1
    )
    return float(gap.mean()) / data.shape[1], float(gap.std()) / math.sqrt(n) / data.shape[1]


def test_the_posterior_variance_is_worth_more_than_steps():
    times = uniform(50, F64)
    # Weights of whole chains have the bound as their mean, and hardly scatter where it is tight.
    denoiser = mixture(25)
    data = denoiser.data().sample((2000,))
    weights, _ = log_weights(Diffusion(denoiser, (2,), times=times), data)
    gap = (denoiser.data().log_prob(data) - weights) / 2
    error = gap.std() / math.sqrt(len(gap))
    assert -4 * error <= gap.mean() <= 0.02 + 4 * error and error < 0.003
    gap, error = gap_per_dimension(mixture(25, point_mass=True), times, 1000)
    assert gap > 4.0 + 8 * error  # 14 with an error of .5


def test_point_mass_gap_falls_like_one_over_steps():
    denoiser = mixture(25, point_mass=True)
    gaps = [
        gap_per_dimension(denoiser, uniform_log_snr(denoiser.process.schedule, k, F64), 4000)
        for k in (80, 160)
    ]
    (coarse, e1), (fine, e2) = gaps
    ratio, error = coarse / fine, coarse / fine * math.hypot(e1 / coarse, e2 / fine)
    assert abs(ratio - 2) < 0.15 + 4 * error and error < 0.15, (gaps, ratio, error)


def exact_terms(law: Diffusion, value: Tensor) -> Tensor:
    """All K + 2 terms of a categorical chain, exactly: every state of x_t is visited."""
    process, times = law.denoiser.process, law.times
    states = torch.cartesian_prod(*[torch.arange(len(process.noise))] * value.shape[-1])
    x0 = value.unsqueeze(-2).expand(*value.shape[:-1], *states.shape)
    xt = states.expand_as(x0)
    terms = []
    for j in range(law.steps + 1):
        level = process.level(times[j])
        posterior = law.denoiser(states, level)
        weights = process.marginal(x0, level).log_prob(xt).exp()
        if j == 0:
            cost = -law.decoder(posterior, level, process).log_prob(x0)
        else:
            early = process.level(times[j - 1])
            reverse = process.reverse(states, posterior, early, level)
            cost = kl_divergence(
                process.bridge(xt, x0, early, level), reverse.expand(x0.shape[:-1])
            )
        terms.append((weights * cost).sum(-1))
    end = process.marginal(value, times[-1])
    prior = process.prior(law.event_shape, dtype=F64).expand(value.shape[:-1])
    return torch.stack([*terms, kl_divergence(end, prior)])


def exact_log_prob(law: Diffusion, value: Tensor) -> Tensor:
    """Log-likelihood of a categorical chain itself: the law of x_t is carried through every step."""
    process, times = law.denoiser.process, law.times
    states = torch.cartesian_prod(*[torch.arange(len(process.noise))] * value.shape[-1])
    log_p = process.prior(law.event_shape, dtype=F64).log_prob(states)
    for j in range(law.steps, 0, -1):
        level, early = process.level(times[j]), process.level(times[j - 1])
        reverse = process.reverse(states, law.denoiser(states, level), early, level)
        log_p = (reverse.log_prob(states.unsqueeze(1)) + log_p).logsumexp(1)
    level = process.level(times[0])
    data = law.decoder(law.denoiser(states, level), level, process)
    return (data.log_prob(value.unsqueeze(1)) + log_p).logsumexp(1)


@pytest.mark.parametrize("process", [Absorbing, Uniform])
def test_table_bound_never_exceeds_the_truth_and_its_gap_falls_like_one_over_steps(process):
    denoiser = table(process)
    log_data, gaps = denoiser.log_joint, []
    for steps in (8, 16, 32):
        law = Diffusion(denoiser, (4,), times=uniform(steps, F64))
        terms = exact_terms(law, denoiser.sequences)
        assert terms.shape == (steps + 2, 81) and (terms >= -1e-12).all()
        # Each sequence: below the chain's own likelihood, which is a probability over the 81.
        log_model = exact_log_prob(law, denoiser.sequences)
        assert log_model.exp().sum() == pytest.approx(1.0, abs=1e-9)
        assert (-terms.sum(0) <= log_model + 1e-12).all()
        # On average over data: below the data's entropy, which no model exceeds.
        gaps.append(float((log_data.exp() * (log_data + terms.sum(0))).sum()))
        assert gaps[-1] > 0
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.3)
    assert gaps[1] / gaps[2] == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("process", [Absorbing, Uniform])
def test_estimated_terms_are_the_exact_ones(process):
    denoiser = table(process, length=3)
    law = Diffusion(denoiser, (3,), times=uniform(5, F64))
    value = denoiser.sequences[[0, 13, 26]]
    for j, term in enumerate(exact_terms(law, value)):
        draws = law.bound_terms(value.expand(3000, 3, 3), j)
        error = (draws.var(0) / len(draws)).sqrt()
        assert ((draws.mean(0) - term).abs() <= 4 * error + 1e-9).all(), (j, draws.mean(0), term)


@pytest.mark.parametrize("name", ["normal", "point", "image", "levels", "absorbing", "uniform"])
def test_gradient_against_finite_differences(name):
    (small,) = (small for small in SMALL_DIFFUSIONS if small.name == name)
    denoiser = small.denoiser().double()
    diffusion, value = small(denoiser, times=uniform(6, F64)), small.data((64,), dtype=F64)
    parameters = list(denoiser.parameters())
    loss = diffusion.log_prob(value).sum()
    gradient = torch.autograd.grad(loss, parameters)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(step * d)
            value_there = diffusion.log_prob(value).sum()
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(step * d)
        return value_there

    h = 1e-5
    torch.testing.assert_close((moved(h) - moved(-h)) / (2 * h), slope, rtol=1e-5, atol=1e-6)


def test_gradient_in_the_data_against_finite_differences():
    small = SMALL_DIFFUSIONS[0]
    diffusion = small(small.denoiser().double(), times=uniform(6, F64))
    value = small.data((40,), dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(diffusion.log_prob, (value,), fast_mode=True)


class _TwoHeads(nn.Module):
    """Mean and log-variance with nothing shared."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        both = torch.cat([x, 0.1 * log_snr[:, None]], -1)
        return torch.stack([self.mean(both), self.spread(both)], -1)


def _term_and_gradients(law: Diffusion, value: Tensor, j: int) -> tuple[Tensor, list[Tensor]]:
    pyro.set_rng_seed(11)
    term = law.bound_terms(value, j)
    network = law.denoiser.network
    gradient = torch.autograd.grad(term.sum(), list(network.parameters()), allow_unused=True)
    return term, [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(gradient, network.parameters(), strict=True)
    ]


def two_heads() -> GaussianDenoiser:
    process = GaussianProcess(Cosine())
    return GaussianDenoiser(_TwoHeads(), process, variance=LearnedVariance()).double()


@pytest.mark.parametrize("decoder", [None, QUANTIZED], ids=["normal", "quantized"])
@pytest.mark.parametrize("steps", [1, 6])
def test_simple_is_the_squared_noise_error(decoder, steps):
    value = torch.randint(5, (7, 3)) if decoder else torch.randn(7, 3, dtype=F64)
    denoiser = two_heads()
    law = Diffusion(denoiser, (3,), times=uniform(steps, F64), decoder=decoder, objective=Simple())
    seen = []
    denoiser.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    for j in range(steps + 1):
        pyro.set_rng_seed(11)
        term = law.bound_terms(value, j)
        xt, level, posterior = seen.pop()
        x0 = law.encode(value)
        noise = (xt - level.alpha * x0) / level.sigma
        estimate = (xt - level.alpha * posterior.mean) / level.sigma
        torch.testing.assert_close(term, (noise - estimate).square().sum(-1) / steps)


@pytest.mark.parametrize(
    "schedule", [Cosine(), Rectified(), LinearBeta()], ids=lambda s: type(s).__name__
)
def test_flow_matching_is_the_squared_error_of_the_straight_velocity(schedule):
    network, value = nn.Linear(3, 3).double(), torch.randn(7, 3, dtype=F64)
    network.forward = lambda x, log_snr, own=network.forward: own(x)
    denoiser = GaussianDenoiser(network, GaussianProcess(schedule), Velocity())
    times = uniform(6, F64)
    law = Diffusion(denoiser, (3,), times=times, objective=FlowMatching())
    seen = []
    network.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    for j in range(7):
        pyro.set_rng_seed(11)
        term = law.bound_terms(value, j)
        scaled, velocity = seen.pop()
        level = denoiser.process.level(times[j].expand(7), value)
        xt = scaled * torch.hypot(level.alpha, level.sigma)
        noise = (xt - level.alpha * value) / level.sigma
        torch.testing.assert_close(term, (noise - value - velocity).square().sum(-1) / 6)


@pytest.mark.parametrize("j", [1, 3, 6])
def test_simple_is_a_reweighted_bound_with_its_gradient(j):
    denoiser, value, times = two_heads(), torch.randn(7, 3, dtype=F64), uniform(6, F64)
    log_snr = denoiser.process.schedule.log_snr(times)
    weight = 2 / (6 * torch.expm1(log_snr[j - 1] - log_snr[j]))
    # The bound of a chain whose denoiser reports its mean alone.
    point = GaussianDenoiser(nn.Identity(), denoiser.process)
    point.forward = lambda xt, t: denoiser.process.point_mass(denoiser(xt, t).mean)
    point.network = denoiser.network
    simple = _term_and_gradients(
        Diffusion(denoiser, (3,), times=times, objective=Simple()), value, j
    )
    bound = _term_and_gradients(Diffusion(point, (3,), times=times), value, j)
    torch.testing.assert_close(simple[0], weight * bound[0])
    for a, b in zip(simple[1], bound[1], strict=True):
        torch.testing.assert_close(a, weight * b)


@pytest.mark.parametrize("decoder", [None, QuantizedDecoder(100)], ids=["normal", "quantized"])
@pytest.mark.parametrize("j", range(5))
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(decoder, j):
    denoiser, times, gamma = two_heads(), uniform(4, F64), 0.3
    value = torch.randint(100, (7, 3)) if decoder else torch.randn(7, 3, dtype=F64)
    terms, gradients = {}, {}
    for objective in (Bound(), Simple(), Hybrid(gamma)):
        law = Diffusion(denoiser, (3,), times=times, decoder=decoder, objective=objective)
        name = type(objective).__name__
        terms[name], gradients[name] = _term_and_gradients(law, value, j)
    torch.testing.assert_close(terms["Hybrid"], terms["Simple"] + gamma * terms["Bound"])
    mean, spread = slice(0, 2), slice(2, 4)
    for a, b in zip(gradients["Hybrid"][mean], gradients["Simple"][mean], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients["Hybrid"][spread], gradients["Bound"][spread], strict=True):
        torch.testing.assert_close(a, gamma * b)
        assert (a != 0).any()
    assert all((g == 0).all() for g in gradients["Simple"][spread])


def test_weighted_multiplies_each_term():
    denoiser, value, times = two_heads(), torch.randn(7, 3, dtype=F64), uniform(6, F64)
    weighted = Weighted(lambda s, t, steps: torch.exp(-s) + 10 * steps)
    for j in range(1, 7):
        plain, _ = _term_and_gradients(Diffusion(denoiser, (3,), times=times), value, j)
        law = Diffusion(denoiser, (3,), times=times, objective=weighted)
        log_snr = denoiser.process.schedule.log_snr(times[j - 1])
        term, _ = _term_and_gradients(law, value, j)
        torch.testing.assert_close(term, (torch.exp(-log_snr) + 60) * plain)


def test_divergence_in_closed_form_and_by_draws():
    q = dist.Normal(torch.tensor(0.3, dtype=F64), torch.tensor(0.7, dtype=F64))
    p = dist.Normal(torch.tensor(-1.0, dtype=F64), torch.tensor(1.5, dtype=F64))
    assert divergence(q, p) == kl_divergence(q, p)
    heavy = dist.StudentT(torch.tensor(3.0, dtype=F64), 0.2, 1.5)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, heavy)
    x = torch.linspace(-6, 7, 40001, dtype=F64)
    truth = torch.trapezoid(q.log_prob(x).exp() * (q.log_prob(x) - heavy.log_prob(x)), x)
    draws = divergence(q.expand((40000,)), heavy.expand((40000,)))
    assert draws.shape == (40000,)
    assert (draws.mean() - truth).abs() <= 4 * draws.std() / 200
    # Pathwise gradient where q has one.
    loc = torch.tensor(0.3, dtype=F64, requires_grad=True)
    q = dist.Normal(loc, 0.7).expand((40000,))
    (slope,) = torch.autograd.grad(divergence(q, heavy.expand((40000,))).mean(), loc)
    x = 0.3 + 0.7 * torch.linspace(-8, 8, 40001, dtype=F64)
    density = dist.Normal(0.3, torch.tensor(0.7, dtype=F64)).log_prob(x).exp()
    grad_log = (4.0 * (x - 0.2) / 1.5**2) / (3.0 + ((x - 0.2) / 1.5) ** 2)
    assert slope == pytest.approx(float(torch.trapezoid(density * grad_log, x)), abs=0.02)


def test_a_mixture_reverse_kernel_goes_through_the_draws():
    q = dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)
    parts = dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)
    p = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(5, 1)), dist.Normal(torch.zeros(5, 1, 2), 1.0).to_event(1)
    )
    torch.testing.assert_close(divergence(q, p), torch.zeros(5), atol=1e-6, rtol=0)
    assert divergence(q, parts).shape == (5,)


def test_float32_follows_float64():
    # 1000 steps, so that reverse kernels lie close to their bridges and digits could cancel.
    for denoiser in (mixture(5), mixture(5, point_mass=True)):
        value = denoiser.data().sample((200,))
        costs = {}
        for dtype in (F64, torch.float32):
            law = Diffusion(denoiser.to(dtype), (2,), times=uniform(1000, F64))
            process, x0 = law.denoiser.process, value.to(dtype)
            level = process.schedule.level(law.times.to(dtype)[1:]).at(torch.arange(4, 1000, 5))
            early = process.schedule.level(law.times.to(dtype)[:-1]).at(torch.arange(4, 1000, 5))
            level, early = level.unsqueeze(1), early.unsqueeze(1)
            noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
            # 199 levels for the first 199 data.
            xt = level.alpha * x0[: len(level.t)] + level.sigma * noise[: len(level.t)].to(dtype)
            x0, posterior = x0[: len(level.t)], law.denoiser(xt, level)
            step = ReverseStep(process, x0, xt, posterior, early, level, 1000)
            costs[dtype] = Bound().reverse_term(step)
        gap = costs[torch.float32].to(F64) - costs[F64]
        assert gap.abs().max() < 2e-3 * costs[F64].mean()


def test_a_categorical_network_bound_is_finite_at_certain_levels():
    process = Absorbing(Rectified.full(), 5)
    (small,) = (small for small in SMALL_DIFFUSIONS if small.name == "absorbing")
    denoiser = small.denoiser()
    assert isinstance(denoiser, CategoricalDenoiser) and process.schedule.alpha(torch.ones(())) == 0
    value = small.data((50,))
    diffusion = small(denoiser)
    for j in range(diffusion.steps + 2):
        assert diffusion.bound_terms(value, j).isfinite().all()
    # Nothing is masked at t = 0 and all is at t = 1: both ends cost nothing.
    assert diffusion.bound_terms(value, 0).abs().max() < 1e-5
    assert diffusion.bound_terms(value, diffusion.steps + 1).abs().max() < 1e-5
