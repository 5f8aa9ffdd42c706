"""The data end: probabilities of integers, encodings, and what a decoder refuses.

A chi-square test that rejects at p < 1e-4 raises a false alarm in one of ten thousand seeds; seeds are fixed.
"""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_diffusion.denoisers import uniform_levels
from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.distributions import CategoricalDecoder, NormalDecoder, QuantizedDecoder
from pyro_diffusion.distributions.decoders import default_decoder
from pyro_diffusion.distributions.discretized import DiscretizedNormal
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, Rectified

F64 = torch.float64
PROCESS = GaussianProcess(Cosine())


def reference(loc: float, scale: float, levels: int) -> torch.Tensor:
    """Probabilities by scipy, on whichever side of the mean nothing cancels."""
    edges = torch.arange(levels + 1, dtype=F64) - 0.5
    edges[0], edges[-1] = -torch.inf, torch.inf
    z = (edges - loc) / scale
    lower = torch.from_numpy(stats.norm.cdf(z.numpy())).diff()
    upper = -torch.from_numpy(stats.norm.sf(z.numpy())).diff()
    return torch.where(z[:-1] > 0, upper, lower)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("loc", [-3.0, 0.0, 0.5, 6.3, 300.0])
@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 40.0])
def test_probabilities(levels, loc, scale):
    value = torch.arange(levels)
    law = DiscretizedNormal(torch.tensor(loc, dtype=F64), torch.tensor(scale, dtype=F64), levels)
    probs = law.log_prob(value).exp()
    assert probs.sum() == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(probs, reference(loc, scale, levels), rtol=1e-9, atol=1e-14)
    single = DiscretizedNormal(torch.tensor(loc), torch.tensor(scale), levels)
    assert single.log_prob(value).exp().sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, 50.0, 1e3])
@pytest.mark.parametrize("distance", [0.0, 30.0, 300.0, 1e4, 1e6])
@pytest.mark.parametrize("side", [-1, 1])
def test_far_tails_in_float32(scale, distance, side):
    locs = [torch.full((5,), side * distance + 7, requires_grad=True, dtype=t) for t in (None, F64)]
    scales = [torch.full((5,), scale, requires_grad=True, dtype=t) for t in (None, F64)]
    value = torch.tensor([0, 1, 7, 14, 15])
    pair = []
    for loc, spread in zip(locs, scales, strict=True):
        log_prob = DiscretizedNormal(loc, spread, 16).log_prob(value)
        log_prob.sum().backward()
        assert log_prob.isfinite().all() and (log_prob <= 0).all()
        assert loc.grad.isfinite().all() and spread.grad.isfinite().all()
        pair.append(log_prob.detach().double())
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-3)
    # The slope that pulls loc back keeps its digits wherever float32 can hold the quantity.
    gap = (locs[0].grad.double() - locs[1].grad).abs()
    assert (gap <= 1e-3 * locs[1].grad.abs() + 1e-4).all()


def test_tail_slope_is_that_of_the_nearest_edge():
    loc = torch.tensor(1007.0, requires_grad=True)
    DiscretizedNormal(loc, torch.tensor(0.1), 16).log_prob(torch.tensor(7)).backward()
    # d/dloc of -(loc - 7.5)^2 / (2 * 0.01), the leading term of the log-tail.
    assert float(loc.grad) == pytest.approx(-999.5 / 0.01, rel=1e-4)


def test_gradient_against_finite_differences():
    value = torch.tensor([0, 1, 4, 6, 7])
    loc = torch.linspace(-3, 9, 5, dtype=F64, requires_grad=True)
    scale = torch.linspace(0.3, 2, 5, dtype=F64, requires_grad=True)

    def log_prob(loc, scale):
        return DiscretizedNormal(loc, scale, 8).log_prob(value)

    assert torch.autograd.gradcheck(log_prob, (loc, scale))
    assert torch.autograd.gradgradcheck(log_prob, (loc, scale))


@pytest.mark.parametrize(("loc", "scale"), [(1.3, 0.8), (-0.7, 1.5), (4.9, 0.4), (2.0, 30.0)])
def test_draws_follow_the_probabilities(loc, scale):
    law = DiscretizedNormal(torch.tensor(loc), torch.tensor(scale), 6)
    draws = law.sample((20000,))
    assert draws.dtype == torch.int64
    expected = reference(loc, scale, 6).numpy() * 20000
    counts = draws.bincount(minlength=6).numpy()
    kept = expected >= 5
    rest = (counts[~kept].sum(), expected[~kept].sum())
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert stats.chi2.sf(statistic, max(kept.sum() - 1, 1)) > 1e-4
    assert rest[0] <= rest[1] + 5 * rest[1] ** 0.5 + 3


def test_discretized_normal_is_a_pyro_distribution():
    law = DiscretizedNormal(torch.zeros(3), torch.ones(2, 1), 4)
    assert law.batch_shape == (2, 3) and law.event_shape == ()
    twice = law.expand((2, 3)).expand((5, 2, 3))
    assert twice.sample((4,)).shape == (4, 5, 2, 3)
    assert twice.to_event(1).log_prob(torch.ones(3)).shape == (5, 2)
    assert law.support.check(law.sample((50,))).all()
    assert pickle.loads(pickle.dumps(law)).levels == 4
    with pyro.plate("data", 3, dim=-1):
        assert pyro.sample(
            "k", DiscretizedNormal(torch.tensor(0.0), torch.tensor(1.0), 4)
        ).shape == (3,)
    with pytest.raises(ValueError, match="within the support"):
        law.log_prob(torch.tensor(4))
    with pytest.raises(ValueError, match="loc"):
        DiscretizedNormal(torch.tensor(torch.nan), torch.tensor(1.0), 4)


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_encoding_round_trip_at_every_bit_depth(bits):
    levels = 2**bits
    decoder, value = QuantizedDecoder(levels), torch.arange(levels)
    x0 = decoder.encode(value, torch.float32)
    assert x0[0] == -1 and x0[-1] == pytest.approx(1, abs=1e-6) and (x0.diff() > 0).all()
    t = PROCESS.level(torch.zeros(()))
    exact = dist.Normal(x0, decoder.width * 1e-2).to_event(1)
    assert decoder(exact, t, PROCESS).sample().equal(value)
    assert decoder(exact, t, PROCESS).log_prob(value).abs() < 1e-3
    # Probabilities over all integers sum to one from any posterior.
    law = decoder(dist.Normal(0.37, 0.2).expand((1,)).to_event(1), t, PROCESS)
    assert law.log_prob(value.unsqueeze(-1)).exp().sum() == pytest.approx(1.0, abs=1e-4)
    assert decoder.support(1).check(value[:, None]).all() and decoder.support(1).event_dim == 1
    assert not decoder.support(1).check(torch.tensor([levels]))


def test_encoding_has_the_range_it_is_given():
    decoder = QuantizedDecoder(5, low=0.0, high=8.0)
    assert decoder.encode(torch.arange(5), F64).tolist() == [0, 2, 4, 6, 8]
    torch.testing.assert_close(
        QuantizedDecoder(17).encode(torch.arange(17), torch.float32), uniform_levels(17)
    )


def test_a_point_mass_is_widened_by_the_noise():
    level = PROCESS.level(torch.tensor([0.0, 0.2]))
    mean = torch.randn(2, 3)
    scale = (level.sigma / level.alpha).expand(2, 3)
    value = mean + 0.1
    law = NormalDecoder()(dist.Delta(mean, event_dim=1), level, PROCESS)
    torch.testing.assert_close(
        law.log_prob(value), dist.Normal(mean, scale).log_prob(value).sum(-1)
    )
    law = QuantizedDecoder(4)(dist.Delta(mean, event_dim=1), level, PROCESS)
    bins = DiscretizedNormal((mean + 1) * 1.5, scale * 1.5, 4)
    value = torch.randint(4, (2, 3))
    torch.testing.assert_close(law.log_prob(value), bins.log_prob(value).sum(-1))


def test_a_posterior_on_values_is_used_as_it_is():
    logits = torch.randn(2, 3, 4)
    posterior = Quantized(logits, uniform_levels(4)).to_event(1)
    level = PROCESS.level(torch.zeros(()))
    value = torch.randint(4, (2, 3))
    law = QuantizedDecoder(4)(posterior, level, PROCESS)
    expected = dist.Categorical(logits=logits).to_event(1)
    torch.testing.assert_close(law.log_prob(value), expected.log_prob(value))
    with pytest.raises(ValueError, match="decoder: got 5 levels and a posterior over 4 values"):
        QuantizedDecoder(5)(posterior, level, PROCESS)
    with pytest.raises(
        ValueError, match="decoder: got NormalDecoder and a posterior over 4 values"
    ):
        NormalDecoder()(posterior, level, PROCESS)


def test_normal_posterior_is_the_normal_decoder():
    posterior = dist.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1).to_event(1)
    law = NormalDecoder()(posterior, PROCESS.level(torch.zeros(())), PROCESS)
    value = torch.randn(5, 3)
    torch.testing.assert_close(law.log_prob(value), posterior.log_prob(value))


def test_defaults():
    assert isinstance(default_decoder(PROCESS), NormalDecoder)
    for process in (Absorbing(Rectified.full(), 7), Uniform(Rectified.full(), 7)):
        decoder = default_decoder(process)
        assert isinstance(decoder, CategoricalDecoder) and decoder.states == 7
        assert decoder.encode(torch.tensor([3.0, 6.0]), torch.float32).dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuantizedDecoder(1), "levels: got 1"),
        (lambda: QuantizedDecoder(4.0), "levels: got 4.0"),
        (lambda: QuantizedDecoder(4, low=1, high=1), "low, high: got 1, 1"),
        (lambda: CategoricalDecoder(1), "states: got 1"),
        (
            lambda: QuantizedDecoder(4).check(torch.tensor([0, 4])),
            r"value: got .* 0 to 4, .*\[0, 3\]",
        ),
        (lambda: QuantizedDecoder(4).check(torch.tensor([-1, 2])), r"value: got .* -1 to 2"),
        (lambda: QuantizedDecoder(4).check(torch.tensor([0.5])), "value: got fractional"),
        (lambda: QuantizedDecoder(4).check(torch.tensor([torch.nan])), "value: got 1 NaN"),
        (lambda: CategoricalDecoder(3).check(torch.tensor([3])), r"value: .*\[0, 2\]"),
        (lambda: NormalDecoder().check(torch.tensor([torch.inf])), "value: got 1 NaN or inf"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_whole_floats_are_integers():
    QuantizedDecoder(4).check(torch.tensor([0.0, 3.0]))
