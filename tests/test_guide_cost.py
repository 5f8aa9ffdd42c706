"""What a call of a guide costs beyond its walk: network evaluations, and runs of the program."""

import contextlib
import functools

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import LogNormal, Normal
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_sample
from pyro.infer.autoguide.initialization import InitMessenger

from pyro_diffusion.denoisers import MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import (
    Diffusion,
    DiffusionSDE,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.distributions.deferred import Deferred
from pyro_diffusion.dynamics import SDESolver
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, ChainReparam
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import LogLinear, Rectified

STEPS, PARTICLES, ONE = 5, 16, torch.ones(1)


class Counting(MixtureDenoiser):
    """Counts its evaluations."""

    calls = 0

    def forward(self, xt, t, **context):
        self.calls += 1
        return super().forward(xt, t, **context)


def counting() -> Counting:
    return Counting(GaussianProcess(LogLinear(10, -10)), torch.ones(1), torch.zeros(1, 2), 1.0)


class Program:
    """A program that counts its runs."""

    def __init__(self, fresh=False, noisy=False):
        self.denoiser, self.runs, self.fresh, self.noisy = counting(), 0, fresh, noisy
        self.law = self.new()

    def new(self):
        return Diffusion(self.denoiser, (2,), steps=STEPS)

    def __call__(self, y=ONE):
        self.runs += 1
        s = pyro.sample("s", LogNormal(-1.0, 0.3)).unsqueeze(-1) if self.noisy else 0.5
        x = pyro.sample("x", self.new() if self.fresh else self.law)
        pyro.sample("y", Normal(x.sum(-1, keepdim=True), s).to_event(self.law.event_dim), obs=y)

    def count(self, call):
        self.denoiser.calls = self.runs = 0
        call()
        return self.denoiser.calls, self.runs


GUIDES = {
    "guidance": AutoGuidance,
    "particles": functools.partial(AutoTwistedSMC, num_particles=PARTICLES),
}


@pytest.mark.parametrize("fresh", [False, True], ids=["one instance", "built anew"])
@pytest.mark.parametrize("kind", GUIDES)
def test_predictive_costs_what_the_walk_costs(kind, fresh):
    """In the first call one evaluation more, which shows the network's shape; then none."""
    program = Program(fresh)
    guide = GUIDES[kind](program)
    predictive = Predictive(program, guide=guide, num_samples=7, parallel=True)
    first, _ = program.count(lambda: predictive(ONE))
    assert first <= STEPS + 2
    later, runs = program.count(lambda: predictive(-ONE))
    assert later == STEPS + 1
    # Model and guide for shapes twice each but the guide, the replay, two runs a step of guidance (the
    # second, without gradient, tells whether observations are linear there); and to read the likelihood: its
    # sites, a batch that confirms them, and the choice of guidance. Particles score their draws once more,
    # for the verdict.
    assert runs <= 2 + 1 + 2 * (STEPS + 2) + 3 + 1
    single = Predictive(program, guide=guide, num_samples=3)
    assert program.count(single)[0] == 3 * (STEPS + 1)


@pytest.mark.parametrize("kind", GUIDES)
def test_in_a_list(kind):
    """Particles take a run for each draw of the noise; a walk takes all draws together."""
    program = Program(noisy=True)
    guide = AutoGuideList(program)
    guide.append(AutoNormal(poutine.block(program, hide=["x"])))
    guide.append(GUIDES[kind](program))
    guide()  # AutoNormal draws a chain for its initial values
    predictive = Predictive(program, guide=guide, num_samples=4, parallel=True)
    walks = 4 if kind == "particles" else 1
    assert program.count(predictive)[0] == walks * (STEPS + 1)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_unfolded_chain_costs_its_walk(grouped):
    """The replay of given states reads no kernel; that of a chain without them reads each once."""
    program = Program()
    program.law = program.law.expand((3,)).to_event(1) if grouped else program.law
    chain = poutine.reparam(program, config={"x": ChainReparam()})
    guide = AutoGuidance(chain)
    predictive = Predictive(chain, guide=guide, num_samples=6, parallel=True)
    shape = (6, 3, 2) if grouped else (6, 2)
    assert program.count(predictive)[0] <= STEPS + 2
    assert program.count(predictive)[0] == STEPS + 1
    draws = predictive()
    assert draws["x_t2"].shape == draws["x"].shape == shape
    assert program.count(Predictive(chain, num_samples=6, parallel=True))[0] == STEPS + 1


def test_a_chain_that_is_scored_reads_every_kernel():
    """So does one under a mask that is trained through."""
    program = Program()
    chain = poutine.reparam(program, config={"x": ChainReparam()})
    masked = poutine.mask(chain, mask=False)
    for model in (chain, masked):
        pyro.set_rng_seed(0)
        trace = poutine.trace(model).get_trace()
        with torch.no_grad():
            again = poutine.trace(poutine.condition(model, trace)).get_trace()
        laws = trace.nodes["x_t2"]["fn"], again.nodes["x_t2"]["fn"]
        assert [isinstance(fn, Deferred) for fn in laws] == [False, model is masked]
        values = [fn.log_prob(trace.nodes["x_t2"]["value"]) for fn in laws]
        assert torch.equal(*values)


# --- values for shapes ----------------------------------------------------------------------------


def test_prior_draws_are_what_they_were():
    """Predictive without a guide draws the chain once, and its draws are those of a plain run."""
    program = Program()
    predictive = Predictive(program, num_samples=500, parallel=True)
    calls, _ = program.count(predictive)
    assert calls == STEPS + 2
    x = predictive()["x"]
    assert len(x.unique(dim=0)) == 500
    # z-scores of 2 means and 2 variances below 4.5 (3e-5).
    assert (x.mean(0).abs() < 4.5 / 500**0.5).all()
    assert ((x.var(0) - 1).abs() < 4.5 * (2 / 500) ** 0.5).all()


def test_initial_values_are_draws():
    """A guide that starts from the draws of a program gets draws of the chain."""
    program = Program()
    calls, _ = program.count(InitMessenger(init_to_sample)(program))
    assert calls == STEPS + 1
    guide = AutoNormal(program, init_loc_fn=init_to_sample)
    calls, _ = program.count(guide)
    assert calls == STEPS + 1
    assert program.count(Predictive(program, guide=guide, num_samples=2))[0] <= 1

    guide = AutoNormal(program, init_loc_fn=init_to_sample)
    assert program.count(Predictive(program, guide=guide, num_samples=2))[0] >= STEPS + 1


LAWS = {
    "chain": lambda: Diffusion(counting(), (2,), steps=2),
    "integers": lambda: Diffusion(counting(), (2,), steps=2, decoder=QuantizedDecoder(4)),
    "sde": lambda: DiffusionSDE(counting(), (2,), solver=SDESolver(steps=2)),
    "flow": lambda: ProbabilityFlow(counting(), (2,)),
    "symbols": lambda: Diffusion(
        TableDenoiser(Absorbing(Rectified.full(), 2), torch.full((2, 2), 0.25)), (2,), steps=2
    ),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("size", [None, 3])
def test_values_for_shapes_are_like_draws(name, size):
    """Shape, dtype and support; and the generator stays where it is."""
    law = LAWS[name]()
    law = law if size is None else law.expand((size,))
    seen = []

    def model():
        with pyro.plate("data", size) if size else contextlib.nullcontext():
            x = pyro.sample("x", law)
        seen.append(x)

    plain = law.sample()
    pyro.set_rng_seed(3)
    AutoGuideList(model)._setup_prototype()
    after = torch.rand(())
    pyro.set_rng_seed(3)
    assert torch.equal(after, torch.rand(()))
    assert seen[0].shape == plain.shape
    assert seen[0].dtype == plain.dtype
    assert law.support.check(seen[0]).all()


# --- what is kept of an analysis ------------------------------------------------------------------


def likelihoods(model, *calls):
    """The likelihood of each call, analysed with that of the first as precedent."""
    first = ProgramLikelihood(model, calls[0])
    return first, *(ProgramLikelihood(model, args, precedent=first.analysis) for args in calls[1:])


def test_other_values_keep_the_analysis_and_other_shapes_do_not():
    def model(y, power=1):
        x = pyro.sample("x", Diffusion(counting(), (2,), steps=2))
        pyro.sample(
            "y", Normal(x.pow(power).sum(-1, keepdim=True), 1.0).expand(y.shape).to_event(1), obs=y
        )

    one, two = torch.ones(1), torch.ones(2)
    first, same, shape, number = likelihoods(model, (one,), (-one,), (two,), (one, 2))
    assert same.analysis is first.analysis
    assert shape.analysis is not first.analysis
    assert number.analysis is not first.analysis
    x0 = torch.randn(5, 2)
    assert torch.equal(same.log_prob(x0), ProgramLikelihood(model, (-one,)).log_prob(x0))


CHANGES = ["broadcast", "dependence", "dimension", "operation", "site", "rounding"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_closure_is_noticed(change):
    """Nothing in the arguments tells; the second likelihood is as one that is analysed anew."""
    flags = dict.fromkeys(CHANGES, False)

    def model():
        x = pyro.sample("x", Diffusion(counting(), (2,), steps=2))
        x = x - 0.3 * x.mean(0 if flags["dimension"] else -1, keepdim=True)
        loc = x[0] + x[1] if flags["broadcast"] else x[..., 0] + x[..., 1]
        loc = loc.detach().round() if flags["dependence"] else loc
        loc = loc.exp() if flags["operation"] else loc
        pyro.sample("y", Normal(loc, 1.0), obs=torch.tensor(0.3))
        rounded = x.detach().sum(-1).round()
        pyro.sample(
            "w", Normal(rounded if flags["rounding"] else 0 * rounded, 1.0), obs=torch.tensor(0.2)
        )
        if flags["site"]:
            pyro.sample("z", Normal(loc, 1.0), obs=torch.tensor(0.1))

    first = ProgramLikelihood(model)
    flags[change] = True
    second, anew = ProgramLikelihood(model, precedent=first.analysis), ProgramLikelihood(model)
    assert second.analysis is not first.analysis
    assert second.analysis == anew.analysis
    x0 = torch.randn(7, 2)
    single = torch.stack([anew.log_prob(row) for row in x0])
    assert torch.allclose(second.log_prob(x0), single)
    with (
        pytest.raises(ValueError, match="got no gradient")
        if change in ("dependence", "rounding")
        else poutine.block()
    ):
        second.check_gradient()


def test_a_latent_that_begins_to_matter_is_asked_for():
    """A comparison shows in no gradient; one more run with another value of it does."""
    matters = [False]

    def model():
        s = pyro.sample("s", Normal(0.0, 1.0))
        x = pyro.sample("x", Diffusion(counting(), (2,), steps=2))
        # Its sign, which is another one in the second run of this seed.
        loc = x.sum(-1) + ((s > 0).float() if matters[0] else 0 * (s > 0).float())
        pyro.sample("y", Normal(loc, 1.0), obs=torch.tensor(0.3))

    first = ProgramLikelihood(model)
    matters[0] = True
    refused = 0
    for seed in range(6):
        pyro.set_rng_seed(seed)
        try:
            ProgramLikelihood(model, precedent=first.analysis)
        except ValueError as error:
            refused += "latents: got no value for s" in str(error)
    assert refused > 0
