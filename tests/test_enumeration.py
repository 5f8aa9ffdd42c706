"""Enumerated latents over diffusions: what Pyro marginalizes must be the right number."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_diffusion.denoisers import CategoricalDenoiser, Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.infer import ChainReparam, forward_chain
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, Rectified, uniform
from tests.classes import F64, LOCS, WEIGHTS, NormalClass, data, log_joint
from tests.laws import Tiny


def program(view, denoiser: Denoiser, enumerate_: str | None = "parallel"):
    """A class for every datum, and data from the view under the class's context."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": enumerate_})
            return pyro.sample("x", view(denoiser, (2,), context={"loc": LOCS[k]}), obs=x)

    return model


def chain_of(denoiser: Denoiser, steps: int = 4):
    """The mixture's unfolded chain, and its forward process, which does not know the class."""
    times = uniform(steps, F64)

    def view(denoiser, event_shape, context):
        return Diffusion(denoiser, event_shape, times=times, context=context)

    model = poutine.reparam(program(view, denoiser), config={"x": ChainReparam()})

    def guide(x):
        with pyro.plate("data", len(x)):
            forward_chain("x", Diffusion(denoiser, (2,), times=times), x)

    return model, guide


def chain_bound(model, guide, x, particles):
    elbo = TraceEnum_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return -elbo.loss(model, guide, x) / len(x)


def test_the_chain_with_an_enumerated_class_gives_the_mixtures_density():
    # Exact kernels: the path's posterior is the forward process whatever the class, so nothing is random
    # but by what the prior at t = 1 is off.
    x = data(200)
    bound = chain_bound(*chain_of(NormalClass()), x, 10)
    assert bound == pytest.approx(float(log_joint(x).logsumexp(-1).mean()), abs=2e-3)


@pytest.mark.parametrize("kind", ["point", "absorbing", "uniform"])
def test_the_enumerated_chain_is_the_sum_over_classes_of_the_same_paths(kind):
    # Inexact kernels, so that the bound has a gap.
    network = Tiny((2,), 1 if kind == "point" else 4, context=True)
    if kind == "point":
        denoiser, x = GaussianDenoiser(network, GaussianProcess(Cosine())), data(5)
    else:
        process = (Absorbing if kind == "absorbing" else Uniform)(Rectified.full(), 4)
        denoiser, x = CategoricalDenoiser(network, process), torch.randint(4, (5, 2))
    denoiser = denoiser.double()

    def model(x, known=None):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), obs=known)
            law = Diffusion(denoiser, (2,), steps=3, context={"label": k})
            return pyro.sample("x", law, obs=x)

    def guide(x, known=None):
        with pyro.plate("data", len(x)):
            forward_chain("x", Diffusion(denoiser, (2,), steps=3), x)

    def log_prob(trace):
        trace.compute_log_prob()
        return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)

    chain = poutine.reparam(model, config={"x": ChainReparam()})
    pyro.set_rng_seed(0)
    bound = chain_bound(config_enumerate(chain), guide, x, 1)
    pyro.set_rng_seed(0)
    paths = poutine.trace(guide).get_trace(x)
    classes = [
        log_prob(poutine.trace(poutine.replay(chain, paths)).get_trace(x, torch.full((5,), k)))
        for k in range(3)
    ]
    by_hand = (torch.stack(classes).logsumexp(0) - log_prob(paths)).mean()
    assert bound == pytest.approx(by_hand.item(), rel=1e-9)


def test_the_flow_with_an_enumerated_class_gives_the_mixtures_density():
    x = data(50)

    def view(denoiser, event_shape, context):
        return ProbabilityFlow(denoiser, event_shape, context=context)

    model = program(view, NormalClass())
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    truth = float(log_joint(x).logsumexp(-1).mean())
    assert -loss / 50 == pytest.approx(truth, abs=2e-3)
