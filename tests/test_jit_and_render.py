"""Our sites under torch.jit.trace and under Pyro's provenance, which draws a program's graph."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, JitTraceGraph_ELBO
from pyro.infer.inspect import get_dependencies, get_model_relations

from pyro_diffusion.denoisers import GaussianDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import ChainReparam
from pyro_diffusion.infer.reparam import forward_chain
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, Rectified
from tests.classes import F64, LOCS, WEIGHTS, NormalClass, data

traced = pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")


def flow(denoiser, event_shape, context=None):
    return ProbabilityFlow(denoiser, event_shape, solver=ODESolver("rk4", steps=2), context=context)


def chain(denoiser, event_shape, context=None):
    return Diffusion(denoiser, event_shape, 3, context=context)


VIEWS = {"site": chain, "chain": chain, "sde": DiffusionSDE, "flow": flow}


def unfolded(model, view):
    return poutine.reparam(model, config={"x": ChainReparam()}) if view == "chain" else model


@pytest.mark.parametrize("view", VIEWS)
def test_the_graph_of_a_program_has_every_edge(view):
    def model(x):
        shift = pyro.param("shift", torch.zeros(2, dtype=F64))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            z = pyro.sample("x", VIEWS[view](NormalClass(), (2,), context={"loc": LOCS[k] + shift}))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=x)

    model = unfolded(model, view)
    found = get_model_relations(model, (data(3),))
    first = "x_t2" if view == "chain" else "x"  # x_t3 is drawn from the prior
    assert "k" in found["sample_sample"][first]
    assert found["sample_param"][first] == ["shift"]
    assert found["sample_sample"]["y"] == ["x"]
    assert found["observed"] == ["y"]
    assert "y" in get_dependencies(model, (data(3),))["posterior_dependencies"]["x"]


@traced
@pytest.mark.parametrize("elbo", [JitTrace_ELBO, JitTraceGraph_ELBO])
@pytest.mark.parametrize("view", ["site", "chain", "sde"])
def test_compiled_objectives_train(view, elbo):
    denoiser, x = (
        GaussianDenoiser(MLP(2, hidden=(16,)), GaussianProcess(Cosine())),
        torch.randn(64, 2),
    )

    def model(x):
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", VIEWS[view](denoiser, (2,)), obs=x)

    def guide(x):
        if view == "chain":
            with pyro.plate("data", len(x)):
                forward_chain("x", chain(denoiser, (2,)), x)

    before = [p.detach().clone() for p in denoiser.parameters()]
    optimizer = pyro.optim.Adam({"lr": 1e-3})
    svi = SVI(unfolded(model, view), guide, optimizer, elbo(ignore_jit_warnings=True))
    losses = [svi.step(x) for _ in range(4)]
    assert len({*losses}) == 4
    assert not any(torch.equal(a, b) for a, b in zip(before, denoiser.parameters(), strict=True))


def table():
    joint = torch.arange(1.0, 28.0, dtype=F64).reshape(3, 3, 3)
    return TableDenoiser(Absorbing(Rectified.full(), 3).double(), joint)


TABLE, LOCATED = table(), NormalClass()
LAWS = {
    "chain": lambda: Diffusion(LOCATED, (2,), 3, context={"loc": LOCS[0]}),
    "sde": lambda: DiffusionSDE(LOCATED, (2,), context={"loc": LOCS[0]}),
    "symbols": lambda: Diffusion(TABLE, (3,), 3),
}


@traced
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAWS)
def test_a_traced_instance_scores_alike_in_a_run_and_afresh_in_the_next(name):
    x = torch.randint(3, (400, 3)) if name == "symbols" else data(400)

    def twice(x):
        law = LAWS[name]()
        return law.log_prob(x), law.log_prob(x)

    compiled = torch.jit.trace(twice, (x,), check_trace=False)
    runs = [compiled(x) for _ in range(30)]
    assert all(torch.equal(a, b) for a, b in runs)
    assert len({a.sum().item() for a, _ in runs}) == 30
    means = torch.stack([a.mean() for a, _ in runs])
    eager = torch.stack([LAWS[name]().log_prob(x).mean() for _ in range(30)])
    # Two means of thirty runs at 4.5 standard errors of their difference: a false alarm in 3e-5 of seeds.
    error = ((means.var() + eager.var()) / 30).sqrt()
    assert abs(means.mean() - eager.mean()) < 4.5 * error


@traced
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_flow_is_not_traced_where_its_trace_would_be_wrong():
    law = flow(NormalClass(), (2,), {"loc": LOCS[0]})
    with pytest.raises(ValueError, match=r"got a density under torch.jit.trace.*without Jit"):
        torch.jit.trace(law.log_prob, (data(3),), check_trace=False)
    z, other = torch.randn(2, 3, 2, dtype=F64)
    draws = torch.jit.trace(law.decode, (z,), check_trace=False)
    assert draws(other).allclose(law.decode(other))
    adaptive = ProbabilityFlow(NormalClass(), (2,), context={"loc": LOCS[0]})
    with pytest.raises(ValueError, match=r"got the adaptive method 'dopri5' under torch.jit.trace"):
        torch.jit.trace(adaptive.decode, (z,), check_trace=False)
