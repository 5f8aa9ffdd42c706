"""The ODE view as a Pyro distribution: contract, inference, bad input."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import TransformReparam

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import ProbabilityFlow
from pyro_diffusion.distributions.flow_transform import FlowTransform
from pyro_diffusion.dynamics import Hutchinson, ODESolver
from pyro_diffusion.evaluate import flow_log_likelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified
from tests.exact import mixture
from tests.small_diffusions import SMALL_DIFFUSIONS, SmallDiffusion, Tiny, conditional

REAL = [small for small in SMALL_DIFFUSIONS if small.name not in ("absorbing", "uniform")]
every_kind = pytest.mark.parametrize("small", REAL, ids=lambda small: small.name)


def flow(schedule=None, **arguments) -> ProbabilityFlow:
    return ProbabilityFlow(mixture(schedule or LogLinear()), (2,), **arguments)


def quick(small: SmallDiffusion, denoiser=None, **arguments) -> ProbabilityFlow:
    """Two steps: for plumbing only."""
    arguments = {"solver": ODESolver("rk4", steps=2), "context": small.context, **arguments}
    return ProbabilityFlow(denoiser or small.denoiser(), small.event_shape, **arguments)


def real(small: SmallDiffusion, batch=(), dtype=None):
    return torch.randn((*batch, *small.event_shape), dtype=dtype)


@every_kind
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_shapes(small: SmallDiffusion, batch):
    density = quick(small).expand(batch)
    assert density.batch_shape == batch and density.event_shape == small.event_shape
    assert density.support.event_dim == density.event_dim == len(small.event_shape)
    assert density.has_rsample
    for sample_shape in ((), (4,)):
        value = density.rsample(sample_shape)
        assert value.shape == sample_shape + batch + small.event_shape
        assert density.sample(sample_shape).requires_grad is False
        assert density.log_prob(value).shape == sample_shape + batch
        assert density.support.check(value).shape == sample_shape + batch
        assert density.encode(value).shape == value.shape
        x, log_prob = density.rsample_and_log_prob(sample_shape)
        assert x.shape == value.shape and log_prob.shape == sample_shape + batch
    assert density.log_prob(real(small)).shape == batch
    assert quick(small).log_prob(real(small, batch)).shape == batch


@every_kind
def test_expand_twice_mask_and_to_event(small: SmallDiffusion):
    density, value = quick(small), real(small, (2, 3))
    twice = density.expand((3,)).expand(torch.Size((2, 3)))
    assert isinstance(twice, ProbabilityFlow) and twice.batch_shape == (2, 3)
    assert twice.denoiser is density.denoiser
    expected = density.log_prob(value)
    torch.testing.assert_close(twice.log_prob(value), expected)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(twice.mask(mask).log_prob(value), expected * mask)
    grouped = twice.to_event(1)
    assert grouped.batch_shape == (2,) and grouped.event_shape == (3, *small.event_shape)
    torch.testing.assert_close(grouped.log_prob(value), expected.sum(-1))
    assert grouped.expand((5, 2)).rsample().shape == (5, 2, 3, *small.event_shape)


@every_kind
def test_pickle_deepcopy_and_float64(small: SmallDiffusion):
    density, value = quick(small).expand((2,)), real(small, (2,))
    density.rsample()
    expected = density.log_prob(value)
    for copied in (pickle.loads(pickle.dumps(density)), copy.deepcopy(density)):
        torch.testing.assert_close(copied.log_prob(value), expected)
        assert copied.expand((3, 2)).sample().shape == (3, 2, *small.event_shape)
    context = {k: v.double() if v.is_floating_point() else v for k, v in small.context.items()}
    double = quick(small, small.denoiser().double(), context=context)
    assert double.log_prob(value).dtype == double.sample().dtype == torch.float64


@every_kind
def test_plates(small: SmallDiffusion):
    denoiser = small.denoiser()

    def model(x=None):
        pyro.module("denoiser", denoiser)
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            return pyro.sample("x", quick(small, denoiser), obs=x)

    for x in (None, real(small, (2, 3))):
        trace = poutine.trace(model).get_trace(x)
        trace.compute_log_prob()
        assert trace.nodes["x"]["value"].shape == (2, 3, *small.event_shape)
        assert trace.nodes["x"]["log_prob"].shape == (2, 3)


def test_context_broadcasts_into_the_batch():
    denoiser = conditional()
    label, y = torch.tensor([[0], [2]]), torch.randn(3, 2)

    def build(**context):
        return ProbabilityFlow(denoiser, (3,), solver=ODESolver("rk4", steps=3), context=context)

    law, value = build(label=label, y=y), torch.randn(2, 3, 3)
    assert law.batch_shape == (2, 3) and law.sample((4,)).shape == (4, 2, 3, 3)
    log_prob = law.log_prob(value)
    for i in range(2):
        for j in range(3):
            one = build(label=label[i, 0], y=y[j])
            torch.testing.assert_close(one.log_prob(value[i, j]), log_prob[i, j])
            torch.testing.assert_close(one.encode(value[i, j]), law.encode(value)[i, j])
    torch.testing.assert_close(build(y=y).condition(label=label).log_prob(value), log_prob)
    assert build(label=None).batch_shape == ()


# --- inference ------------------------------------------------------------------------------------


def normal_prior(**arguments) -> ProbabilityFlow:
    """One component: the posterior under a normal likelihood is known."""
    denoiser = MixtureDenoiser(
        GaussianProcess(LogLinear(12, -12)),
        torch.ones(1).double(),
        torch.tensor([[0.5, -1.0]]).double(),
        0.25,
    )
    return ProbabilityFlow(denoiser, (2,), **{"solver": ODESolver("rk4", steps=4), **arguments})


def posterior_model(build=normal_prior):
    def model():
        x = pyro.sample("x", build())
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.ones(2).double())

    return model


POSTERIOR_MEAN = torch.tensor([0.75, 0.0]).double()  # equal precisions of prior and likelihood


@pytest.mark.parametrize("reparam", [False, True], ids=["direct", "reparam"])
def test_nuts(reparam):
    model = posterior_model()
    if reparam:
        model = poutine.reparam(model, config={"x": TransformReparam()})
    kernel = NUTS(model, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=50, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()
    x = samples["x"] if not reparam else Predictive(model, samples)()["x"]
    # Standard deviation 0.35, some 20 effective draws or more: 5 standard errors.
    assert (x.reshape(-1, 2).mean(0) - POSTERIOR_MEAN).abs().max() < 0.4


@pytest.mark.parametrize("reparam", [False, True], ids=["direct", "reparam"])
def test_auto_normal(reparam):
    model = posterior_model()
    if reparam:
        model = poutine.reparam(model, config={"x": TransformReparam()})
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), Trace_ELBO())
    for _ in range(120):
        svi.step()
    site = "x_base" if reparam else "x"
    loc = guide.median()[site]
    x = normal_prior().decode(loc) if reparam else loc
    assert (x - POSTERIOR_MEAN).abs().max() < 0.25


def test_training_by_exact_likelihood():
    pyro.set_rng_seed(1)
    denoiser = GaussianDenoiser(Tiny((1,)), GaussianProcess(Cosine()))
    data = 0.5 + 0.3 * torch.randn(64, 1)

    def model():
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(data)):
            law = ProbabilityFlow(
                denoiser, (1,), solver=ODESolver("rk4", steps=6), trace=Hutchinson()
            )
            pyro.sample("x", law, obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() / len(data) for _ in range(80)]
    entropy = math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e)
    assert losses[0] > losses[-1] + 0.2 and losses[-1] < entropy + 0.3


def test_markov_chains_want_fixed_probes():
    def run(build):
        kernel = NUTS(posterior_model(build), max_tree_depth=1)
        MCMC(kernel, num_samples=1, warmup_steps=1, disable_progbar=True).run()

    with pytest.raises(ValueError, match=r"trace: got Hutchinson.*Markov chain.*seed"):
        run(lambda: normal_prior(trace=Hutchinson(2)))
    run(lambda: normal_prior(trace=Hutchinson(2, seed=3)))
    # Built once outside, an instance keeps its probes whatever runs it.
    outside = normal_prior(trace=Hutchinson(2))
    run(lambda: outside)
    # A reparameterized site never asks for the density.
    model = posterior_model(lambda: normal_prior(trace=Hutchinson(2)))
    kernel = NUTS(poutine.reparam(model, config={"x": TransformReparam()}), max_tree_depth=1)
    MCMC(kernel, num_samples=1, warmup_steps=1, disable_progbar=True).run()


# --- bad input ------------------------------------------------------------------------------------

SYMBOLS = next(small for small in SMALL_DIFFUSIONS if small.name == "absorbing")

TABLE = {
    "symbols": (
        lambda: ProbabilityFlow(SYMBOLS.denoiser(), (3,)),
        "denoiser: got .* under Absorbing, which lacks a probability-flow ODE .*, expected a process",
    ),
    "no denoiser": (lambda: ProbabilityFlow(Tiny((2,)), (2,)), "denoiser: got Tiny"),
    "no process": (
        lambda: FlowTransform(Tiny((2,))),
        "denoiser: got Tiny under no process, which lacks",
    ),
    "infinite ends": (lambda: flow(Rectified.full()), r"schedule: .*\[inf, -inf\].*finite ends"),
    "event dim": (
        lambda: ProbabilityFlow(mixture(LogLinear()), (1, 2)),
        r"event_shape: got \(1, 2\)",
    ),
    "unknown method": (
        lambda: flow(solver=ODESolver("scipy")),
        "method: got 'scipy', expected one of dopri5",
    ),
    "no tolerance": (
        lambda: flow(solver=ODESolver(rtol=0.0)),
        "rtol: got 0.0, expected a tolerance > 0",
    ),
    "negative tolerance": (lambda: flow(solver=ODESolver(atol=-1e-4)), "atol: got -0.0001"),
    "nan tolerance": (lambda: flow(solver=ODESolver(atol=math.nan)), "atol: got nan"),
    "steps of an adaptive method": (
        lambda: ODESolver("dopri5", steps=5),
        r"steps: got 5 for the adaptive method 'dopri5', expected no steps \(it takes rtol, atol\)",
    ),
    "rtol of a fixed-step method": (
        lambda: ODESolver("rk4", rtol=1e-9),
        r"rtol: got 1e-09 for the fixed-step method 'rk4', expected no rtol \(it takes steps\)",
    ),
    "atol of a fixed-step method": (lambda: ODESolver("rk4", atol=1e-9), "atol: got 1e-09 for the"),
    "no solver": (lambda: flow(solver="rk4"), "solver: got 'rk4', expected an ODESolver"),
    "no steps": (
        lambda: flow(solver=ODESolver("rk4", steps=0)),
        "steps: got 0, expected an integer >= 1",
    ),
    "trace by name": (lambda: flow(trace="exact"), "trace: got 'exact', expected a TraceEstimator"),
    "nan data": (
        lambda: flow().log_prob(torch.tensor([0.0, math.nan])),
        "value: got 1 NaN or infinite",
    ),
    "nan to encode": (lambda: flow().encode(torch.tensor([0.0, math.inf])), "value: got 1 NaN"),
    "wrong event": (lambda: flow().log_prob(torch.zeros(3)), r"value: got shape \(3,\)"),
    "empty": (lambda: flow().log_prob(torch.zeros(0, 2)), "value: .*empty"),
    "batch of another size": (
        lambda: flow().expand((4,)).log_prob(torch.zeros(5, 2)),
        r"value: got shapes value \(5, 2\), distribution \(4, 2\)",
    ),
    "wrong data to evaluate": (
        lambda: flow_log_likelihood(flow(), torch.zeros(4, 3)),
        r"data: got shape \(4, 3\)",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case):
    build, message = TABLE[case]
    with pytest.raises(ValueError, match=message):
        build()
