"""A diffusion under Pyro's transforms is scored and unfolded with their Jacobian.

The data are normal, and the denoiser is exact: at a schedule that ends at log-SNR 14 and -14, the density of
the transformed data is known to 1e-3 nats. The Jacobian's own size is 7 nats and more.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AffineTransform, ExpTransform
from pyro.infer import Importance, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import (
    Dequantization,
    Diffusion,
    DiffusionSDE,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.infer import ChainReparam
from pyro_diffusion.infer.reparam import forward_chain, reverse_chain
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear, uniform
from tests.exact import Shifted
from tests.small_diffusions import SMALL_DIFFUSIONS

F64 = torch.float64
D = 3
SCALE = torch.tensor([2.0, 50.0, 0.1], dtype=F64)
SHIFT = torch.tensor([1.0, -300.0, 0.0], dtype=F64)
DENOISER = MixtureDenoiser(
    GaussianProcess(LogLinear(14, -14)), torch.ones(1).double(), torch.zeros(1, D).double(), 0.5
)
VIEWS = {
    "chain": lambda: Diffusion(DENOISER, (D,), times=uniform(4, F64)),
    "SDE": lambda: DiffusionSDE(DENOISER, (D,)),
    "flow": lambda: ProbabilityFlow(DENOISER, (D,)),
}
SCORES = {
    "log_likelihood": ("chain", lambda law, y: evaluate.log_likelihood(law, y, num_samples=30)),
    "log_likelihood by draws": (
        "SDE",
        lambda law, y: evaluate.log_likelihood(law, y, num_terms=400),
    ),
    "importance_weighted": (
        "chain",
        lambda law, y: evaluate.importance_weighted(law, y, num_samples=4, batch_size=3),
    ),
    "flow_log_likelihood": ("flow", lambda law, y: evaluate.flow_log_likelihood(law, y)),
}
TRANSFORMS = {
    "affine": [AffineTransform(SHIFT, SCALE)],
    "two": [AffineTransform(SHIFT / 100, SCALE / 10), ExpTransform()],
    "grouped": [AffineTransform(SHIFT, SCALE, event_dim=1)],
    "nested": None,
}


def transformed(name, base):
    if name == "nested":
        inner = dist.TransformedDistribution(base, [AffineTransform(0.0, SCALE)])
        return dist.TransformedDistribution(
            inner.expand(inner.batch_shape), [AffineTransform(SHIFT, 1.0)]
        )
    return dist.TransformedDistribution(base, TRANSFORMS[name])


def exact(name):
    """The transformed law of the data themselves; the Jacobian is Pyro's."""
    return transformed(name, dist.Normal(torch.zeros(D).double(), math.sqrt(0.5)).to_event(1))


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("score", SCORES)
def test_evaluation_has_the_jacobian(score, transforms):
    view, evaluated = SCORES[score]
    truth = exact(transforms)
    y = truth.sample((5,))
    result = evaluated(transformed(transforms, VIEWS[view]()), y)
    error = (result.value - truth.log_prob(y)).abs()
    # 80 values within 6 errors, which are known from as few as 30 draws: outside once in 7,000 seeds.
    assert bool((error < 2e-3 + 6 * result.standard_error.nan_to_num()).all()), error
    assert result.dimensions == D
    if result.terms is not None:
        terms = result.terms
        assert terms.prior + terms.decoder + terms.reverse == pytest.approx(
            -float(result.value.mean())
        )


def test_the_jacobian_is_in_the_decoder_s_term():
    """Scaling by 100 costs log 100 a coordinate, and the decoder's term alone tells."""
    y = exact("affine").sample((50,))
    x = (y - SHIFT) / SCALE
    plain = evaluate.log_likelihood(VIEWS["chain"](), x, num_samples=20).terms
    scaled = evaluate.log_likelihood(
        transformed("affine", VIEWS["chain"]()), y, num_samples=20
    ).terms
    assert scaled.prior == pytest.approx(plain.prior, abs=1e-9)
    assert scaled.reverse == pytest.approx(plain.reverse, abs=6 * plain.reverse_standard_error)
    log_det = float(SCALE.log().sum())
    tolerance = 6 * (plain.decoder_standard_error + scaled.decoder_standard_error)
    assert scaled.decoder - plain.decoder == pytest.approx(log_det, abs=tolerance)


def test_log_weights_have_the_jacobian():
    y = exact("affine").sample((4,))
    weights = evaluate.log_weights(transformed("affine", VIEWS["chain"]()), y, num_samples=3)
    torch.testing.assert_close(weights.mean(0), exact("affine").log_prob(y), atol=2e-3, rtol=0)


def programs(name, data, grouped=False):
    def law():
        base = VIEWS["chain"]().expand((len(data),))
        whole = transformed(name, base)
        return whole.to_event(1) if grouped else whole

    def model():
        with poutine.reparam(config={"y": ChainReparam()}):
            if grouped:
                pyro.sample("y", law(), obs=data)
            else:
                with pyro.plate("data", len(data)):
                    pyro.sample("y", law(), obs=data)

    def guide():
        if grouped:
            forward_chain("y", law(), data)
        else:
            with pyro.plate("data", len(data)):
                forward_chain("y", law(), data)

    return model, guide


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_the_unfolded_chain_has_the_jacobian(transforms, grouped):
    """With exact kernels the weight is the same whatever the chain: log p(y), to the prior's distance."""
    y = exact(transforms).sample((6,))
    log_p = float(exact(transforms).log_prob(y).sum())
    model, guide = programs(transforms, y, grouped)
    assert -Trace_ELBO().loss(model, guide) == pytest.approx(log_p, abs=0.02)
    # The mean field's closed divergences leave the decoder's term alone to chance.
    values = torch.tensor([-TraceMeanField_ELBO().loss(model, guide) for _ in range(10)])
    # Nine degrees of freedom: outside once in 3,600 seeds for each of eight cases.
    assert abs(float(values.mean()) - log_p) < 5.5 * float(values.std()) / math.sqrt(10)
    weights = Importance(model, guide, num_samples=3).run()
    assert float(weights.get_log_normalizer()) == pytest.approx(log_p, abs=0.02)


def test_an_enumerated_context_leaves_the_jacobian_alone():
    """The same noise with and without transforms: losses differ by log det alone, 4 D log 3."""
    means = torch.tensor([[-2.0] * D, [2.0] * D], dtype=F64)
    x = torch.randn(4, D, dtype=F64)

    def loss(transforms, y):
        def law(k):
            base = Diffusion(Shifted(), (D,), times=uniform(4, F64), context={"c": means[k]})
            return dist.TransformedDistribution(base, transforms) if transforms else base

        def model():
            with poutine.reparam(config={"y": ChainReparam()}), pyro.plate("data", 4):
                half = dist.Categorical(torch.ones(2, dtype=F64))
                k = pyro.sample("k", half, infer={"enumerate": "parallel"})
                pyro.sample("y", law(k), obs=y)

        def guide():
            with pyro.plate("data", 4):
                forward_chain("y", law(torch.tensor(0)), y)

        torch.manual_seed(0)
        return TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide)

    difference = loss([AffineTransform(1.0, 3.0)], 1 + 3 * x) - loss([], x)
    assert difference == pytest.approx(4 * D * math.log(3), abs=1e-6)


@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_the_unfolded_chain_draws_transformed_data(transforms):
    def model():
        with pyro.plate("data", 4000):
            return pyro.sample("y", transformed(transforms, VIEWS["chain"]()))

    y = poutine.reparam(model, config={"y": ChainReparam()})()
    x = exact(transforms)
    for transform in reversed(x.transforms):
        y = transform.inv(y)
    base = x.base_dist
    while isinstance(base, dist.TransformedDistribution):  # "nested"
        for transform in reversed(base.transforms):
            y = transform.inv(y)
        base = base.base_dist
    # Means and standard deviations within 5 errors (sqrt(.5 / 4000) = .011; .0079): chance 3e-6.
    assert bool((y.mean(0).abs() < 5 * 0.0112).all())
    assert bool(((y.std(0) - math.sqrt(0.5)).abs() < 5 * 0.0079).all())


def test_the_single_site_and_the_chain_agree():
    """One estimate of the bound per instance; their mean is the chain's value."""
    y = exact("two").sample((3,))
    many = y.expand(4000, 3, D)
    estimate = transformed("two", VIEWS["chain"]()).log_prob(many)
    error = estimate.std(0) / math.sqrt(4000)
    assert bool(((estimate.mean(0) - exact("two").log_prob(y)).abs() < 4.5 * error + 2e-3).all())


def test_dequantization_is_not_unfolded():
    """A guide that is built apart would have other noise, and the bound would be 1e5 nats too low."""
    law = dist.TransformedDistribution(VIEWS["chain"](), [Dequantization(1)])
    for call in (
        lambda: reverse_chain("y", law),
        lambda: forward_chain("y", law, torch.zeros(D, dtype=F64)),
        lambda: poutine.reparam(lambda: pyro.sample("y", law), config={"y": ChainReparam()})(),
    ):
        with pytest.raises(
            ValueError, match="got the transform Dequantization, expected bijective"
        ):
            call()


def discrete():
    small = SMALL_DIFFUSIONS[2]
    return Diffusion(
        small.denoiser(), small.event_shape, steps=3, decoder=QuantizedDecoder(4)
    ), small.data((4,))


def test_discrete_data_have_no_jacobian():
    base, data = discrete()
    whole = dist.TransformedDistribution(base, [AffineTransform(0.0, 2.0)])
    symbols = SMALL_DIFFUSIONS[4]()
    calls = [
        lambda: evaluate.log_likelihood(whole, 2.0 * data),
        lambda: evaluate.importance_weighted(whole, 2.0 * data),
        lambda: reverse_chain("x", whole),
        lambda: forward_chain("x", whole, 2.0 * data),
        lambda: poutine.reparam(lambda: pyro.sample("x", whole), config={"x": ChainReparam()})(),
        lambda: reverse_chain(
            "x", dist.TransformedDistribution(symbols, [AffineTransform(0.0, 2.0)])
        ),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match="diffusion: got a Diffusion of discrete data under transforms"
        ):
            call()


@pytest.mark.parametrize("view", VIEWS)
def test_what_cannot_be_scored_is_refused(view):
    base = VIEWS[view]()
    score = evaluate.flow_log_likelihood if view == "flow" else evaluate.log_likelihood
    y = torch.ones(4, D, dtype=F64)
    with pytest.raises(ValueError, match="got a MaskedDistribution around"):
        score(transformed("affine", base.mask(torch.tensor(True))), y)
    with pytest.raises(ValueError, match="got the transform Dequantization, expected bijective"):
        score(dist.TransformedDistribution(base, [Dequantization(1)]), y)
    with pytest.raises(ValueError, match="batch shape"):
        score(dist.TransformedDistribution(base, [AffineTransform(y, 1.0)]), y)
    mixture = dist.MaskedMixture(torch.tensor(True), base, base)
    with pytest.raises(ValueError, match="got MaskedMixture, expected"):
        score(dist.TransformedDistribution(mixture, [AffineTransform(0.0, 2.0)]), y)
    with pytest.raises(ValueError, match=r"finite|support"):
        score(transformed("two", base), -y)
