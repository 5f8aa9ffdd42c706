"""Categoricals by reparameterization: probabilities, gradients, zeros, relaxed draws, and use in models.

Chi-square and Kolmogorov-Smirnov tests that reject at p < 1e-5 raise a false alarm in one of 10^5 seeds each;
seeds are fixed.
"""

import functools
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from scipy import integrate, stats
from torch import nn
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import CategoricalDenoiser
from pyro_diffusion.distributions import (
    ArgmaxCategorical,
    Diffusion,
    DiffusionCTMC,
    RelaxedArgmaxCategorical,
)
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, Uniform
from pyro_diffusion.schedules import Rectified

F64 = torch.float64
UTILITIES = torch.tensor([0.0, 0.5, 1.2, -0.7], dtype=F64)
NOISES = {
    "gumbel": lambda b=1.0: dist.Gumbel(0.3, b),
    "exponential": lambda b=1.0: dist.Exponential(1 / torch.as_tensor(b)),
    "uniform": lambda b=3.0: dist.Uniform(0.0, b),
    "normal": lambda b=1.0: dist.Normal(-1.0, b),
}
LAWS = {
    "gumbel": stats.gumbel_r,
    "exponential": stats.expon,
    "uniform": stats.uniform(scale=3),
    "normal": stats.norm,
}
TABLE = {
    "gumbel": (0.1547, 0.2550, 0.5135, 0.0768),
    "exponential": (0.1200, 0.2128, 0.6104, 0.0568),
    "uniform": (0.1106, 0.2531, 0.6151, 0.0212),
    "normal": (0.1220, 0.2516, 0.5899, 0.0365),
}
every = pytest.mark.parametrize("name", NOISES)
close = torch.testing.assert_close


def chances(name, utilities=UTILITIES, *scale):
    return ArgmaxCategorical(utilities, NOISES[name](*scale))


@every
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_published_table(name, dtype):
    probs = chances(name, UTILITIES.to(dtype)).probs
    close(probs, torch.tensor(TABLE[name], dtype=dtype), atol=6e-5, rtol=0)
    assert probs.dtype == dtype


@every
@pytest.mark.parametrize("count", [1, 2, 5])
def test_probabilities_are_the_integrals(name, count):
    """By adaptive quadrature in the winner's value, which the package does not use."""
    utilities = torch.randn(count, dtype=F64)
    law, u = LAWS[name], utilities.numpy()

    def density(z, i):
        return law.pdf(z - u[i]) * np.prod([law.cdf(z - u[j]) for j in range(count) if j != i])

    start, end = (u.max(), u.max() + 60) if name == "exponential" else (-12.0, 60.0)
    if name == "uniform":
        start, end = u.max(), u.max() + 3
    kinks = [v + 3 for v in u if start < v + 3 < end] if name == "uniform" else [float(u.max())]
    expected = [
        integrate.quad(density, start, end, args=(i,), points=kinks, epsabs=1e-13, limit=300)[0]
        for i in range(count)
    ]
    close(chances(name, utilities).probs, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=1e-11)


@every
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_draws_with_noise_follow_the_probabilities(name, scale):
    """The definition itself: the largest entry of relaxed draws, at any temperature."""
    law = chances(name, UTILITIES, scale)
    relaxed = RelaxedArgmaxCategorical(torch.tensor(3.0), UTILITIES, law.noise)
    counts = relaxed.rsample((100_000,)).argmax(-1).bincount(minlength=4).double()
    expected = 100_000 * law.probs
    seen = expected > 0
    assert not counts[~seen].any()
    statistic = ((counts - expected)[seen].square() / expected[seen]).sum()
    assert stats.chi2.sf(float(statistic), int(seen.sum()) - 1) > 1e-5


@every
@pytest.mark.parametrize(("count", "spread"), [(3, 0.0), (40, 1.0), (200, 0.3)])
def test_probabilities_of_many_categories_sum_to_one(name, count, spread):
    """The logits were not normalized to hide it: the integrals are taken again here."""
    from pyro_diffusion.distributions.argmax_probabilities import LOG_PROBABILITIES

    noise = NOISES[name]()
    (log_probs,) = [f for kind, (_, f) in LOG_PROBABILITIES.items() if isinstance(noise, kind)]
    utilities = spread * torch.randn(count, dtype=F64)
    assert float(log_probs(utilities).exp().sum()) == pytest.approx(1, abs=1e-10)
    assert float(log_probs(utilities.float()).exp().sum()) == pytest.approx(1, abs=2e-5)


def test_small_probabilities_have_all_their_digits():
    gaps = torch.tensor([1.0, 10.0, 100.0], dtype=F64)
    pair = torch.stack([torch.zeros(3, dtype=F64), -gaps], -1)
    normal = chances("normal", pair).logits[:, 1]
    close(normal, torch.special.log_ndtr(-gaps / math.sqrt(2)), rtol=1e-12, atol=0)
    close(chances("exponential", pair).logits[:, 1], -gaps - math.log(2), rtol=1e-12, atol=0)
    # Twenty categories ahead, all equal: int_0^w v^20 dv at width 1.
    u = torch.zeros(21)
    u[-1] = -0.99
    uniform = ArgmaxCategorical(u, dist.Uniform(0.0, 1.0)).logits[-1]
    assert float(uniform) == pytest.approx(21 * math.log(0.01) - math.log(21), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_normal_far_behind(dtype):
    """Where the curvature is lost in rounding: log Phi(-d / sqrt 2), slope d / 2; beyond squares, finite."""
    gaps = torch.tensor([1e3, 1e4, 1e5, 1e9], dtype=dtype)
    pair = torch.stack([torch.zeros_like(gaps), -gaps], -1).requires_grad_()
    chance = chances("normal", pair).logits[:, 1]
    close(
        chance, torch.special.log_ndtr(-gaps.double() / math.sqrt(2)).to(dtype), rtol=1e-6, atol=0
    )
    (slope,) = torch.autograd.grad(chance.sum(), pair)
    close(slope[:, 1], gaps / 2, rtol=1e-4, atol=0)
    extreme = chances("normal", torch.tensor([3e38, -3e38, 0.0], dtype=dtype).requires_grad_())
    assert extreme.probs.tolist() == [1, 0, 0]
    (slope,) = torch.autograd.grad(extreme.entropy(), extreme.utilities)
    assert slope.isfinite().all()


@every
def test_gradients_in_utilities_and_scale(name):
    def logits(utilities, scale):
        return chances(name, utilities, scale).logits

    # At a width of 2.5 all categories are possible under the uniform, too.
    scale = torch.tensor(2.5, dtype=F64, requires_grad=True)
    utilities = torch.randn(3, 4, dtype=F64).mul(0.5).requires_grad_()
    assert torch.autograd.gradcheck(logits, (utilities, scale))


def test_zeros_are_exact_and_leave_gradients_finite():
    utilities = torch.tensor([0.0, 0.5, 1.2, -0.7], requires_grad=True)
    narrow = ArgmaxCategorical(utilities, dist.Uniform(0.0, 1.5))
    wide = ArgmaxCategorical(utilities, dist.Uniform(0.0, 2.5))
    assert narrow.probs[3] == 0 and narrow.log_prob(torch.tensor(3)) == -torch.inf
    assert narrow.log_prob(torch.tensor([0, 1, 2])).isfinite().all()
    assert kl_divergence(narrow, wide).isfinite()
    assert kl_divergence(wide, narrow) == torch.inf
    own = (narrow.entropy(), narrow.log_prob(torch.arange(4))[2])
    for value in (*own, kl_divergence(narrow, wide)):
        (gradient,) = torch.autograd.grad(value, utilities, retain_graph=True)
        assert gradient.isfinite().all() and gradient[:3].ne(0).all()
        assert bool(gradient[3] == 0) == any(value is one for one in own)
    assert narrow.sample((1000,)).max() < 3


@every
def test_divergence_and_entropy_by_enumeration(name):
    p, q = chances(name), chances("normal", UTILITIES.flip(0))
    values = p.enumerate_support()
    log_p, log_q = p.log_prob(values), q.log_prob(values)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    close(kl_divergence(p, q), expected)
    close(kl_divergence(p, dist.Categorical(logits=q.logits)), expected)
    close(kl_divergence(dist.Categorical(logits=p.logits), q), expected)
    close(p.entropy(), -(log_p.exp() * log_p).sum())
    with pytest.raises(ValueError, match=r"^q: got 2 categories, expected 4"):
        kl_divergence(p, ArgmaxCategorical(torch.zeros(2), dist.Normal(0.0, 1.0)))


@every
def test_it_is_a_pyro_distribution(name):
    law = chances(name, torch.randn(2, 1, 4))
    wide = law.expand((2, 3))
    assert wide.batch_shape == (2, 3) and isinstance(wide, ArgmaxCategorical)
    assert wide.sample((5,)).shape == (5, 2, 3) and wide.to_event(1).log_prob(
        0 * wide.sample()
    ).shape == (2,)
    assert wide.enumerate_support(expand=False).shape == (4, 1, 1)
    close(pickle.loads(pickle.dumps(law)).logits, law.logits)
    with pyro.plate("data", 3, dim=-1):
        assert pyro.sample("k", chances(name)).shape == (3,)
        relaxed = RelaxedArgmaxCategorical(torch.tensor(0.5), torch.zeros(4), NOISES[name]())
        y = pyro.sample("y", relaxed)
    assert y.shape == (3, 4) and relaxed.expand((2, 3)).log_prob(y).shape == (2, 3)


def test_a_scale_by_datum_is_learned():
    scale = torch.tensor([0.5, 2.0], requires_grad=True)
    law = ArgmaxCategorical(UTILITIES.float().expand(2, 4), dist.Normal(0.0, scale))
    alone = [chances("normal", UTILITIES.float(), b) for b in (0.5, 2.0)]
    close(law.logits, torch.stack([one.logits for one in alone]))
    law.log_prob(torch.tensor(2)).sum().backward()
    assert (scale.grad < 0).all()  # less noise, and the best wins more often


def test_enumeration_marginalizes_it_exactly():
    centres = torch.tensor([-2.0, 0.0, 1.0, 3.0])

    @config_enumerate
    def model():
        with pyro.plate("data", 3):
            k = pyro.sample("k", ArgmaxCategorical(UTILITIES.float(), dist.Normal(0.0, 1.0)))
            pyro.sample("x", dist.Normal(centres[k], 0.5), obs=torch.tensor([0.1, 0.9, 2.0]))

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    joint = chances("normal").logits.float() + dist.Normal(centres, 0.5).log_prob(
        torch.tensor([[0.1], [0.9], [2.0]])
    )
    assert loss == pytest.approx(-float(joint.logsumexp(-1).sum()), rel=1e-5)


def test_the_relaxed_gumbel_is_the_concrete_distribution():
    temperature = torch.tensor(0.7, dtype=F64)
    ours = RelaxedArgmaxCategorical(temperature, UTILITIES, dist.Gumbel(0.0, 1.0))
    theirs = dist.RelaxedOneHotCategorical(temperature, logits=UTILITIES)
    y = theirs.sample((50,))
    close(ours.log_prob(y), theirs.log_prob(y))
    # Utilities, temperature and noise in another unit are the same distribution.
    scaled = RelaxedArgmaxCategorical(2 * temperature, 2 * UTILITIES, dist.Gumbel(1.0, 2.0))
    close(scaled.log_prob(y), ours.log_prob(y))


@every
def test_relaxed_densities_integrate_to_one(name):
    """Three categories: over the two log-odds, on a grid wide enough for every noise."""
    law = RelaxedArgmaxCategorical(torch.tensor(1.3, dtype=F64), UTILITIES[:3], NOISES[name]())
    axis = torch.linspace(-30, 30, 1001, dtype=F64)
    z = torch.stack(
        [*torch.meshgrid(axis, axis, indexing="ij"), torch.zeros(1001, 1001, dtype=F64)], -1
    )
    y = z.softmax(-1)
    # dy_1 dy_2 = y_1 y_2 y_3 dz_1 dz_2; the jumps of the uniform's density leave half a grid step.
    mass = (law.log_prob(y) + y.log().sum(-1)).exp().sum() * 0.06**2
    assert float(mass) == pytest.approx(1, abs=2e-2 if name == "uniform" else 1e-3)


@every
def test_relaxed_draws_follow_their_density(name):
    law = RelaxedArgmaxCategorical(torch.tensor(0.8, dtype=F64), UTILITIES[:2], NOISES[name]())
    z = torch.linspace(-30, 30, 60_001, dtype=F64)
    y = torch.stack([z, torch.zeros_like(z)], -1).softmax(-1)
    cumulative = ((law.log_prob(y) + y.log().sum(-1)).exp() * (z[1] - z[0])).cumsum(0)
    draws = law.rsample((20_000,)).log()
    log_odds = (draws[:, 0] - draws[:, 1]).numpy()
    test = stats.kstest(log_odds, lambda x: np.interp(x, z.numpy(), cumulative.numpy()))
    assert test.pvalue > 1e-5


@every
def test_relaxed_draws_have_their_gradients(name):
    def draw(utilities, temperature, scale):
        torch.manual_seed(1)
        law = RelaxedArgmaxCategorical(temperature, utilities, NOISES[name](scale))
        return law.rsample((3,))

    arguments = [UTILITIES, torch.tensor(0.9, dtype=F64), torch.tensor(1.4, dtype=F64)]
    assert torch.autograd.gradcheck(draw, [x.clone().requires_grad_() for x in arguments])


def test_cold_draws_have_a_density():
    law = RelaxedArgmaxCategorical(torch.tensor(0.01), UTILITIES.float(), dist.Normal(0.0, 1.0))
    y = law.sample((1000,))
    assert (y == 0).any() and law.log_prob(y).isfinite().all()


class Chooser(nn.Module):
    """A network whose outputs are utilities under some noise."""

    def __init__(self, network, noise):
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, x, log_snr):
        return ArgmaxCategorical(self.network(x.float(), log_snr), self.noise).logits


@every
@pytest.mark.parametrize("process", [Absorbing, Uniform])
def test_it_is_the_posterior_of_a_categorical_diffusion(name, process):
    """A chain over two symbols with such a posterior is scored, drawn from and trained."""
    width = 30.0 if name == "uniform" else 6.0  # narrow uniform noise may deny the data
    network = Chooser(MLP(2, (16,), outputs=3), NOISES[name](width))
    denoiser = CategoricalDenoiser(network, process(Rectified.full(), 3))
    data = torch.tensor([0, 1, 1, 1] * 50).unsqueeze(-1).expand(-1, 2)

    def model():
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", 200):
            pyro.sample("x", Diffusion(denoiser, (2,), steps=4), obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    losses = [svi.step() for _ in range(40)]
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    chain = Diffusion(denoiser, (2,), steps=4)
    assert chain.sample((5,)).max() < 3
    assert DiffusionCTMC(denoiser, (2,), steps=4).log_prob(data).isfinite().all()


@every
def test_the_reverse_kernel_is_that_of_its_probabilities(name):
    process = Uniform(Rectified.full(), 4)
    law = chances(name, torch.randn(5, 2, 4, dtype=F64), 2.0)
    plain = dist.Categorical(probs=law.probs)
    xt = torch.randint(4, (5, 2))
    kernels = [
        process.reverse(
            xt, p.to_event(1), torch.tensor(0.3, dtype=F64), torch.tensor(0.7, dtype=F64)
        )
        for p in (law, plain)
    ]
    close(kernels[0].base_dist.logits, kernels[1].base_dist.logits)


NORMAL = dist.Normal(0.0, 1.0)
BAD = [
    ((torch.zeros(3), dist.Laplace(0.0, 1.0)), r"^noise: got Laplace, expected one of Gumbel, Exp"),
    ((torch.zeros(3), "normal"), r"^noise: got str, expected one of"),
    ((torch.zeros(3), dist.Normal(torch.zeros(3), 1.0)), r"^noise: got shape \(3,\), expected one that"),
    ((torch.tensor(1.0), NORMAL), r"^utilities: got shape \(\), expected batch \+ \(K,\)"),
    ((torch.zeros(2, 0), NORMAL), r"^utilities: got shape \(2, 0\)"),
    ((torch.tensor([0.0, torch.inf]), NORMAL), r"^utilities: got 1 NaN or infinite"),
    (([0.0, 1.0], NORMAL), r"^utilities: got list, expected a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
@pytest.mark.parametrize(
    "kind", [ArgmaxCategorical, functools.partial(RelaxedArgmaxCategorical, torch.tensor(1.0))]
)
def test_what_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


def test_temperatures_that_are_refused():
    with pytest.raises(
        ValueError, match=r"^temperature: got shape \(2,\), expected one that expands"
    ):
        RelaxedArgmaxCategorical(torch.ones(2), torch.zeros(3), NORMAL)
    with pytest.raises(ValueError, match="temperature"):
        RelaxedArgmaxCategorical(torch.tensor(0.0), torch.zeros(3), NORMAL)
