"""Bound, decoders, objectives and the unfolded chain of a process whose scales differ by coordinate.

Under the same noise every term is the sum of the terms of its coordinates alone. Expectations over the noise
are taken by Gauss-Hermite nodes, exact for the terms of normals, which are quadratic in it.
"""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from per_coordinate import F64, MEAN, VARIANCE, PerCoordinate, alone, normal
from pyro import poutine

from pyro_diffusion.denoisers import NPR, SN, LevelsDenoiser, VarianceDenoiser
from pyro_diffusion.distributions import (
    Bound,
    Diffusion,
    FlowMatching,
    Hybrid,
    MomentRegression,
    NormalDecoder,
    QuantizedDecoder,
    RedDiff,
    Simple,
    Weighted,
)
from pyro_diffusion.distributions import diffusion as diffusion_module
from pyro_diffusion.distributions.objectives import ReverseStep
from pyro_diffusion.infer import DDPM, ChainReparam
from pyro_diffusion.infer.reparam import forward_chain
from pyro_diffusion.processes import GaussianProcess, draw
from pyro_diffusion.schedules import Cosine, uniform

PAIR = (0, 1)
close = torch.testing.assert_close


def part(x, i):
    return x[..., i : i + 1]


@pytest.fixture
def noise(monkeypatch):
    """A function that says which standard normal noise the next states get."""
    given = {}

    def draw(q):
        return q.mean + q.stddev * given["noise"]

    def give(values):
        given["noise"] = values

    monkeypatch.setattr(diffusion_module, "draw", draw)
    return give


def exact(point_mass):
    return lambda i=None: normal(point_mass) if i is None else alone(i, point_mass)


class Coordinatewise(torch.nn.Module):
    """A network that treats every coordinate alike and is deaf to the clock, which differs when alone."""

    def __init__(self, outputs=()):
        super().__init__()
        self.register_buffer("slopes", torch.linspace(0.3, 1.0, math.prod(outputs), dtype=F64))
        self.outputs = outputs

    def forward(self, x, log_snr):
        return torch.tanh(x.unsqueeze(-1) * self.slopes).reshape(*x.shape, *self.outputs)


def with_head(head):
    return lambda i=None: VarianceDenoiser(exact(False)(i), head(), Coordinatewise())


def levels(i=None):
    process = PerCoordinate() if i is None else alone(i).process
    return LevelsDenoiser(Coordinatewise((5,)), process, torch.linspace(-1, 1, 5, dtype=F64))


REAL = torch.tensor([[0.3, -1.2], [1.5, 0.1], [-0.4, 2.0]], dtype=F64)
INTEGERS = torch.tensor([[0, 4], [2, 1], [3, 3]])
QUANTIZED = QuantizedDecoder(5)


def even(s, t, steps):
    """A weight that is no function of the clock, which differs when alone."""
    return torch.full_like(s, 1 / steps)


CASES = {
    "variance": (exact(False), REAL, {}),
    "point mass": (exact(True), REAL, {}),
    "normal bins": (exact(False), INTEGERS, {"decoder": QUANTIZED}),
    "point mass bins": (exact(True), INTEGERS, {"decoder": QUANTIZED}),
    "levels": (levels, INTEGERS, {"decoder": QUANTIZED}),
    "NPR": (with_head(NPR), REAL, {}),
    "simple": (exact(False), REAL, {"objective": Simple()}),
    "hybrid": (exact(False), REAL, {"objective": Hybrid(0.1)}),
    "weighted": (exact(False), REAL, {"objective": Weighted(even)}),
    "weighted mean": (exact(False), REAL, {"objective": Weighted(even, mean_only=True)}),
    "red-diff": (exact(False), REAL, {"objective": RedDiff()}),
    "red-diff smoothed": (exact(True), REAL, {"objective": RedDiff(lambda v: (0.5 * v).exp())}),
    "regression NPR": (with_head(NPR), REAL, {"objective": MomentRegression()}),
    "regression SN": (with_head(SN), REAL, {"objective": MomentRegression()}),
    "deviance": (with_head(NPR), REAL, {"objective": MomentRegression(deviance=True)}),
}


def views(name, steps):
    """The pair's distribution, those of its coordinates alone, and data."""
    make, data, options = CASES[name]
    times = uniform(steps, F64)
    pair = Diffusion(make(), (2,), times=times, **options)
    return pair, [Diffusion(make(i), (1,), times=times, **options) for i in PAIR], data


@pytest.mark.parametrize("name", CASES)
def test_every_term_is_the_sum_of_its_coordinates(name, noise):
    steps = 4
    pair, apart, data = views(name, steps)
    eps = torch.randn(3, 2, dtype=F64)
    for j in range(steps + 2):
        noise(eps)
        whole = pair.bound_terms(data, j)
        parts = []
        for i in PAIR:
            noise(part(eps, i))
            parts.append(apart[i].bound_terms(part(data, i), j))
        assert whole.shape == (3,) and bool(whole.isfinite().all())
        close(whole, sum(parts))


@pytest.mark.parametrize("name", CASES)
def test_a_score_is_the_sum_of_its_coordinates(name, noise):
    """With the decoder's baseline, and every datum at a level of its own."""
    pair, apart, data = views(name, 4)
    data, eps = data.repeat(20, 1), torch.randn(60, 2, dtype=F64)
    noise(eps)
    whole, parts = pair.log_prob(data), []
    for i in PAIR:
        apart[i]._seed = pair._seed
        noise(part(eps, i))
        parts.append(apart[i].log_prob(part(data, i)))
    close(whole, sum(parts))


@pytest.mark.parametrize("name", ["red-diff", "red-diff smoothed", "simple", "variance"])
def test_gradients_in_the_data_are_those_of_each_coordinate(name, noise):
    pair, apart, data = views(name, 4)
    eps = torch.randn(3, 2, dtype=F64)

    def gradient(law, x, eps):
        x = x.clone().requires_grad_()
        noise(eps)
        return torch.autograd.grad(law.bound_terms(x, 2).sum(), x)[0]

    parts = [gradient(apart[i], part(data, i), part(eps, i)) for i in PAIR]
    close(gradient(pair, data, eps), torch.cat(parts, -1))


def test_the_baseline_is_the_sum_of_its_coordinates():
    decoder, start = NormalDecoder(), torch.zeros(1, dtype=F64)
    whole = decoder.baseline(normal().process.levels(start).at(0), torch.Size((2,)))
    parts = [decoder.baseline(alone(i).process.levels(start).at(0), torch.Size((1,))) for i in PAIR]
    close(whole, sum(parts))
    # The mean of -log N(x; x, 1/SNR) over its own draws, of images and of numbers, too.
    level = GaussianProcess(Cosine(), event_dim=3).levels(torch.full((1,), 0.3, dtype=F64)).at(0)
    entropy = 0.5 * (1 + math.log(2 * math.pi) - float(level.log_snr))
    close(float(decoder.baseline(level, torch.Size((3, 2, 2)))), 12 * entropy)


@pytest.mark.parametrize("point_mass", [False, True])
def test_simple_is_a_weighted_divergence_where_noise_is_the_same_for_all(point_mass):
    """The weight 2 / (K (e^{lambda_s - lambda_t} - 1)) on the divergence under a point mass at the mean."""
    weighted = Weighted(lambda s, t, k: 2 / (k * torch.expm1(s - t)), mean_only=True)
    for i in PAIR:
        process, x0 = alone(i).process, torch.randn(5, 1, dtype=F64)
        s, t = (process.levels(v) for v in torch.rand(2, 5, dtype=F64).sort(0).values)
        xt = draw(process.marginal(x0, t))
        step = ReverseStep(process, x0, xt, alone(i, point_mass)(xt, t), s, t, 7)
        close(Simple().reverse_term(step), weighted.reverse_term(step), rtol=1e-11, atol=0)


def test_the_bound_is_half_the_lost_signal_to_noise_ratio():
    process, x0 = PerCoordinate(), torch.randn(5, 2, dtype=F64)
    s, t = (process.levels(v) for v in torch.rand(2, 5, dtype=F64).sort(0).values)
    xt = draw(process.marginal(x0, t))
    posterior = normal(point_mass=True)(xt, t)
    weight = (s.log_snr.exp() - t.log_snr.exp()) / 2
    expected = (weight * (x0 - posterior.mean).square()).sum(-1)
    close(Bound().reverse_term(ReverseStep(process, x0, xt, posterior, s, t, 7)), expected)


def test_weights_take_the_clock():
    seen = []

    def weight(s, t, steps):
        seen.append((s, t, steps))
        return torch.ones_like(t)

    times = uniform(4, F64)
    law = Diffusion(normal(), (2,), times=times, objective=Weighted(weight))
    law.bound_terms(REAL, 3)
    ((s, t, steps),) = seen
    clock = PerCoordinate().levels(times).clock
    close(t, clock[3].expand(3, 1))
    close(s, clock[2].expand(3, 1))
    assert steps == 4


# Quadratic in the noise: three nodes are exact.
NODES, WEIGHTS = (torch.tensor(v, dtype=F64) for v in np.polynomial.hermite_e.hermegauss(3))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def expected_bound(law, x, noise):
    """The bound of one datum, exactly.

    Terms are sums over coordinates, so both may have the same noise.
    """
    noise(NODES[:, None].expand(3, len(x)))
    return -sum(
        WEIGHTS @ law.bound_terms(x.expand(3, -1), j).expand(3) for j in range(law.steps + 2)
    )


def log_prior_ratio(x):
    """E[log p(x_1) - log q(x_1)] over q(x_1 | x): what the prior of unit-variance data costs."""
    process = PerCoordinate()
    end = process.level(torch.ones((), dtype=F64))
    mean, scale = end.alpha * x, end.sigma
    data = torch.tensor(MEAN, dtype=F64)
    marginal = torch.distributions.Normal(
        end.alpha * data, (end.alpha**2 * VARIANCE + end.sigma**2).sqrt()
    )
    prior = process.prior((2,), F64).base_dist
    q = torch.distributions.Normal(mean, scale)
    kl = torch.distributions.kl_divergence
    return (kl(q, marginal) - kl(q, prior)).sum()


def log_density(x):
    mean = torch.tensor(MEAN, dtype=F64)
    return torch.distributions.Normal(mean, VARIANCE**0.5).log_prob(x).sum()


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_bound_of_exact_normals_is_their_density(steps, noise):
    """With its variance the reverse chain is the forward one's reversal: only the prior is not exact."""
    law = Diffusion(normal(), (2,), times=uniform(steps, F64))
    for x in REAL:
        close(expected_bound(law, x, noise), log_density(x) + log_prior_ratio(x))


def test_the_bound_of_point_masses_reaches_the_density_as_steps_grow(noise):
    """The gap falls as 1 / K; extrapolated, it is gone."""
    x, gaps = REAL[0], []
    for steps in (64, 128, 256, 512):
        law = Diffusion(normal(point_mass=True), (2,), times=uniform(steps, F64))
        gaps.append(log_density(x) + log_prior_ratio(x) - expected_bound(law, x, noise))
    ratios = [a / b for a, b in itertools.pairwise(gaps)]
    assert all(gap > 0 for gap in gaps) and abs(2 * gaps[-1] - gaps[-2]) < 0.01, gaps
    assert all(1.8 < ratio < 2.2 for ratio in ratios), ratios


LATENTS = [f"x_t{j}" for j in range(4)]


@pytest.mark.parametrize("point_mass", [False, True])
def test_the_chain_spelled_out_is_that_of_each_coordinate(point_mass):
    steps, x = 3, REAL
    laws = [Diffusion(exact(point_mass)(i), (2 if i is None else 1,), steps) for i in (None, *PAIR)]
    laws = [law.replace(times=uniform(steps, F64)).expand((3,)) for law in laws]

    def traces(law, x, latents):
        def model():
            pyro.sample("x", law, obs=x)

        chain = poutine.reparam(model, config={"x": ChainReparam()})
        return score(chain, lambda: forward_chain("x", law, x), latents)

    check_sites(traces(laws[0], x, None), lambda i, v: traces(laws[1 + i], part(x, i), v))


def test_ddpm_is_that_of_each_coordinate():
    x, times = REAL, uniform(3, F64)

    def traces(denoiser, x, latents):
        ddpm = DDPM(denoiser, x.shape[-1:], times=times)
        return score(lambda: ddpm.model(x), lambda: ddpm.guide(x), latents)

    check_sites(traces(normal(), x, None), lambda i, v: traces(alone(i), part(x, i), v))


def score(model, guide, latents):
    """Traces of model and guide at given latents, or at draws of the guide."""
    if latents is None:
        trace = poutine.trace(guide).get_trace()
        latents = {name: trace.nodes[name]["value"] for name in LATENTS}
    traces = [poutine.trace(poutine.condition(f, data=latents)).get_trace() for f in (model, guide)]
    for trace in traces:
        trace.compute_log_prob()
    return traces


def check_sites(whole, alone_with):
    """Every site's log-density is the sum of its coordinates'."""
    values = {name: whole[1].nodes[name]["value"] for name in LATENTS}
    parts = [alone_with(i, {k: part(v, i) for k, v in values.items()}) for i in PAIR]
    for k, sites in enumerate(([*LATENTS, "x"], LATENTS)):
        for name in sites:
            got = whole[k].nodes[name]["log_prob"]
            assert got.shape == (3,)
            close(got, sum(p[k].nodes[name]["log_prob"] for p in parts))


def test_flow_matching_weighs_each_coordinate_by_its_own_level():
    denoiser, x0 = normal(), torch.randn(7, 2, dtype=F64)
    law = Diffusion(denoiser, (2,), times=uniform(4, F64), objective=FlowMatching())
    seen = []
    denoiser.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output.mean)))
    for j in range(5):
        term = law.bound_terms(x0, j)
        xt, level, mean = seen.pop()
        noise, estimate = ((xt - level.alpha * x) / level.sigma for x in (x0, mean))
        error = (noise - x0) - (estimate - mean)
        torch.testing.assert_close(term, error.square().sum(-1) / 4)
