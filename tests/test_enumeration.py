"""Enumerated latents over diffusions: what Pyro marginalizes must be the right number."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate, infer_discrete

from pyro_diffusion.denoisers import CategoricalDenoiser, Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import ChainReparam
from pyro_diffusion.infer.reparam import forward_chain
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, Rectified, uniform
from tests.classes import F64, LOCS, WEIGHTS, NormalClass, data, log_joint
from tests.small_diffusions import Tiny


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


@pytest.mark.parametrize("view", ["chain", "flow"])
def test_infer_discrete_finds_the_classes_probabilities(view):
    x, repeats = data(6), 4000
    rows = x.repeat_interleave(repeats, 0)
    if view == "chain":
        chain, guide = chain_of(NormalClass())
        paths = poutine.trace(guide).get_trace(rows)
        model = poutine.condition(chain, data=paths)
    else:

        def flow(denoiser, event_shape, context):
            return ProbabilityFlow(
                denoiser, event_shape, solver=ODESolver("rk4", steps=8), context=context
            )

        model = program(flow, NormalClass())
    with torch.no_grad():
        drawn = infer_discrete(model, first_available_dim=-2)
        k = poutine.trace(drawn).get_trace(rows).nodes["k"]["value"]
    shares = torch.nn.functional.one_hot(k.reshape(6, repeats), 3).to(F64).mean(1)
    exact = log_joint(x).softmax(-1)
    # Eighteen shares at 4.5 standard errors: a false alarm in 1e-4 of seeds.
    assert ((shares - exact).abs() <= 4.5 * (exact * (1 - exact) / repeats).sqrt() + 1e-3).all()


def test_a_class_enumerated_in_the_guide_gives_the_bound_and_its_gradient():
    # The bound of a guide q over classes is E_q[log p(k, x) - log q(k)], linear in each class's estimate.
    denoiser, x, particles = NormalClass(0.0, -6.0), data(10), 2000
    logits = torch.zeros(10, 3, dtype=F64, requires_grad=True)

    def view(denoiser, event_shape, context):
        return Diffusion(denoiser, event_shape, steps=1, context=context)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    q = logits.softmax(-1)
    exact = (q * (log_joint(x) - q.log())).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    elbo = TraceEnum_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    model = program(view, denoiser, None)
    values, gradients = [], []
    for _ in range(20):
        loss = elbo.differentiable_loss(model, guide, x)
        values.append(-loss.detach())
        gradients.append(-torch.autograd.grad(loss, logits)[0])
    assert denoiser.calls == 20  # one evaluation of the network a run, for all classes
    for found, truth in ((values, exact), (gradients, exact_gradient)):
        found = torch.stack(found)
        error = found.std(0) / 20**0.5
        # Thirty-one numbers at 5 standard errors of 20 runs (t, 19 degrees): a false alarm in 2e-3 of seeds.
        assert ((found.mean(0) - truth.detach()).abs() <= 5 * error + 5e-3).all()
    assert torch.stack(values).std() / 20**0.5 / 10 < 0.01
