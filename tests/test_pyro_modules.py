"""Denoisers made of Pyro modules: their parameters train, their random weights are sites of the model."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from torch.distributions import constraints

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver, ReverseSDE, SDESolver
from pyro_diffusion.infer import DDPM, AutoGuidance, AutoTwistedSMC
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import Ancestral, simulate
from pyro_diffusion.schedules import Cosine, LearnedSchedule, LogLinear, uniform
from tests.small_diffusions import Tiny

VIEWS = {
    "chain": lambda denoiser: Diffusion(denoiser, (2,), steps=4),
    "sde": lambda denoiser: DiffusionSDE(denoiser, (2,), solver=SDESolver(steps=4)),
    "flow": lambda denoiser: ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4", steps=2)),
    "adjoint": lambda denoiser: ProbabilityFlow(
        denoiser, (2,), solver=ODESolver("rk4", steps=2, adjoint=True)
    ),
}
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


class Model(PyroModule):
    """Data under one view of a denoiser, built outside of the plate."""

    def __init__(self, denoiser, view):
        super().__init__()
        self.denoiser, self.view = denoiser, view

    def forward(self, x=None):
        law = self.view(self.denoiser)
        with pyro.plate("data", 8 if x is None else len(x)):
            return pyro.sample("x", law, obs=x)


def no_guide(x):
    pass


def plain(network=None) -> GaussianDenoiser:
    pyro.set_rng_seed(0)
    return GaussianDenoiser(Tiny((2,)) if network is None else network(), GaussianProcess(Cosine()))


def normal(shape, scale=0.5):
    return PyroSample(dist.Normal(0.0, scale).expand(shape).to_event(len(shape)))


def bayesian(dtype=torch.float32) -> GaussianDenoiser:
    """The last layer's weight has a prior."""
    denoiser = plain().to(dtype)
    to_pyro_module_(denoiser)
    weight = denoiser.network.last.weight
    denoiser.network.last.weight = normal(weight.shape, torch.tensor(0.5, dtype=dtype))
    return denoiser


WEIGHT = "denoiser.network.last.weight"


class Scale(PyroModule[Denoiser]):
    """The exact posterior of normal data whose standard deviation is not known."""

    def __init__(self):
        super().__init__(GaussianProcess(LogLinear(16, -16)))
        self.log_scale = PyroSample(dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        variance = (2 * self.log_scale).exp()
        evidence = level.alpha**2 * variance + level.sigma**2
        spread = (variance * level.sigma**2 / evidence).sqrt().expand(xt.shape)
        return dist.Normal(level.alpha * variance / evidence * xt, spread).to_event(1)


# --- parameters -------------------------------------------------------------------------------------


def trained(how, view):
    """Losses of two steps, and the parameters after them."""
    denoiser = plain(lambda: MLP(2, hidden=(16,)))
    if how == "network":
        to_pyro_module_(denoiser.network)
    if how in ("denoiser", "part of a model"):
        to_pyro_module_(denoiser)

    def model(x):
        if how in ("plain", "network and pyro.module"):
            pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", view(denoiser), obs=x)

    if how == "part of a model":
        model = Model(denoiser, view)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    x = torch.randn(8, 2)
    return [svi.step(x) for _ in range(2)], list(denoiser.parameters())


@views
@pytest.mark.parametrize(
    "how", ["network", "network and pyro.module", "denoiser", "part of a model"]
)
def test_converted_modules_train_as_plain_ones(view, how):
    expected, parameters = trained("plain", view)
    got, converted = trained(how, view)
    assert got == expected
    assert all(torch.equal(a, b) for a, b in zip(parameters, converted, strict=True))
    start = list(plain(lambda: MLP(2, hidden=(16,))).parameters())
    assert not any(torch.equal(a, b) for a, b in zip(start, converted, strict=True))


def test_constrained_parameters_train():
    denoiser = plain()
    to_pyro_module_(denoiser)
    shape = denoiser.network.last.bias.shape
    denoiser.network.last.bias = PyroParam(torch.full(shape, 0.5), constraints.positive)
    model, x = Model(denoiser, VIEWS["flow"]), torch.randn(4, 2)
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(x)
    bias = pyro.param("denoiser.network.last.bias")
    assert (bias != 0.5).all()
    torch.testing.assert_close(denoiser.network.last.bias, bias)
    lifted = poutine.trace(
        poutine.lift(model, {"denoiser.network.last.bias": dist.LogNormal(torch.zeros(shape), 1.0)})
    ).get_trace(x)
    assert lifted.nodes["denoiser.network.last.bias"]["type"] == "sample"
    expected = lifted.nodes["denoiser.network.last.bias"]["value"]
    torch.testing.assert_close(lifted.nodes["x"]["fn"].denoiser.network.last.bias, expected)


def test_modules_without_pyro_are_left_alone():
    denoiser = plain()
    assert Diffusion(denoiser, (2,)).denoiser is denoiser
    converted = plain()
    to_pyro_module_(converted)
    before = dict(converted.named_modules())
    law = Diffusion(converted, (2,))
    assert law.replace(steps=3).denoiser is law.denoiser is not converted
    assert law.denoiser.process is converted.process  # nothing in it to read
    assert dict(converted.named_modules()) == before
    for p, q in zip(law.denoiser.parameters(), converted.parameters(), strict=True):
        assert p is q


# --- random weights ---------------------------------------------------------------------------------


@views
def test_a_site_is_scored_under_the_weights_that_were_drawn(view):
    denoiser = bayesian()
    trace = poutine.trace(Model(denoiser, view)).get_trace(torch.randn(8, 2))
    weight = trace.nodes[WEIGHT]["value"]
    assert weight.shape == (2, 8)
    assert not trace.nodes[WEIGHT]["cond_indep_stack"]
    twin = plain()
    with torch.no_grad():
        twin.network.last.weight.copy_(weight)
    scored, expected = trace.nodes["x"]["fn"], view(twin)
    expected._seed = scored._seed
    x = trace.nodes["x"]["value"]
    torch.testing.assert_close(scored.log_prob(x), expected.expand((8,)).log_prob(x))


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_joint_density_of_data_and_scale(adjoint):
    # Exact: x is normal given its scale. Value and gradient, as NUTS takes them.
    view = functools.partial(
        ProbabilityFlow, event_shape=(2,), solver=ODESolver("rk4", steps=32, adjoint=adjoint)
    )
    model, x = Model(Scale(), view), 0.5 * torch.randn(8, 2, dtype=torch.float64)
    for at in (-0.7, 0.4):
        log_scale = torch.tensor(at, dtype=torch.float64).requires_grad_()
        joint = poutine.trace(
            poutine.condition(model, {"denoiser.log_scale": log_scale})
        ).get_trace(x)
        exact = dist.Normal(0.0, log_scale.exp()).log_prob(x).sum() - log_scale**2 / 2
        exact = exact - math.log(2 * math.pi) / 2
        got = joint.log_prob_sum()
        # The solver's error, 8 data of two dimensions.
        assert abs(float(got.detach() - exact.detach())) < 1e-2
        slopes = [float(torch.autograd.grad(v, log_scale)[0]) for v in (got, exact)]
        assert slopes[0] == pytest.approx(slopes[1], abs=2e-2)


def test_chains_find_the_scale():
    pyro.set_rng_seed(3)
    x = 0.5 * torch.randn(8, 2, dtype=torch.float64)
    model = Model(Scale(), lambda d: ProbabilityFlow(d, (2,), solver=ODESolver("rk4", steps=8)))
    grid = torch.linspace(-2, 1, 400, dtype=torch.float64)
    exact = dist.Normal(0.0, grid.exp()).log_prob(x.reshape(-1, 1)).sum(0) - grid**2 / 2
    mcmc = MCMC(
        NUTS(model, step_size=0.2, adapt_step_size=False, max_tree_depth=3),
        15,
        3,
        disable_progbar=True,
    )
    mcmc.run(x)
    mean = (grid * exact.softmax(0)).sum()
    # 15 draws of sd .18: within 6 standard errors were they independent.
    assert abs(float(mcmc.get_samples()["denoiser.log_scale"].mean() - mean)) < 0.3


@views
@pytest.mark.parametrize("local", [False, True])
def test_a_variational_posterior_of_weights(view, local):
    with pyro.settings.context(module_local_params=local):
        model, x = Model(bayesian(), view), torch.randn(8, 2)
        guide = AutoNormal(model)
        guide(x)
        elbo = Trace_ELBO()(model, guide)
        elbo(x).backward()
        loc = guide.locs.denoiser.network.last.weight_unconstrained
        assert (loc.grad != 0).all()
        names = dict(elbo.named_parameters())
        assert all(p.grad is not None for p in names.values())
        assert {"model.denoiser.network.first.weight", "model.denoiser.network.last.bias"} <= set(
            names
        )
        drawn = Predictive(model, guide=guide, num_samples=3)()
        assert drawn["x"].shape == (3, 8, 2)


def test_predictions_follow_the_weights():
    model = Model(Scale(), lambda d: Diffusion(d, (2,), steps=20))
    for value in (-2.0, 1.0):
        samples = {"denoiser.log_scale": torch.full((4,), value, dtype=torch.float64)}
        x = Predictive(model, samples)()["x"]
        # 64 numbers: 9% standard error of their deviation; 5 of them are allowed.
        assert abs(float(x.std()) / math.exp(value) - 1) < 0.45


def test_sites_that_share_a_denoiser_share_its_weights():
    denoiser = bayesian()

    class Two(Model):
        def forward(self, x=None):
            first, second = (Diffusion(self.denoiser, (2,), steps=4) for _ in range(2))
            return pyro.sample("x", first), pyro.sample("y", second)

    trace = poutine.trace(Two(denoiser, None)).get_trace()
    weights = [trace.nodes[name]["fn"].denoiser.network.last.weight for name in "xy"]
    assert weights[0] is weights[1] is trace.nodes[WEIGHT]["value"]


def test_programs_and_guides_of_other_latents():
    seen = []

    class Watched(GaussianDenoiser):
        def forward(self, xt, t, **context):
            seen.append(self.network.last.weight)
            return super().forward(xt, t, **context)

    denoiser = Watched(Tiny((2,)), GaussianProcess(Cosine()))
    to_pyro_module_(denoiser)
    denoiser.network.last.weight = normal((2, 8))

    class Program(Model):
        def forward(self):
            x = pyro.sample("x", Diffusion(self.denoiser, (2,), steps=3))
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(1.0))

    model = Program(denoiser, None)
    for kind in (AutoTwistedSMC, AutoGuidance):
        with pytest.raises(ValueError, match="got no draws of denoiser"):
            kind(model)()
        guide = AutoGuideList(model)
        guide.append(AutoNormal(poutine.block(model, hide=["x"])))
        guide.append(kind(model))
        guide()
        seen.clear()
        trace = poutine.trace(guide).get_trace()
        assert seen
        assert all(torch.equal(w, trace.nodes[WEIGHT]["value"]) for w in seen)


def test_one_network_for_all_steps():
    denoiser = bayesian()
    x = torch.randn(5, 2)

    def walk():
        simulate(denoiser, uniform(4), x, Ancestral())

    def path():
        return ReverseSDE(denoiser, (2,))

    for program in (walk, path):
        trace = poutine.trace(program).get_trace()
        assert [n for n, site in trace.nodes.items() if site["type"] == "sample"] == [
            "network.last.weight"
        ]


class Declared(PyroModule):
    """Random and trained attributes by decorators, a deterministic one, and a plain part."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Linear(2, 2)

    @PyroSample
    def gain(self):
        return dist.Normal(self.base, 0.1)

    @PyroSample
    def twice(self):
        return 2 * self.gain

    @PyroParam
    def base(self):
        return torch.tensor(1.0)

    def forward(self, x, log_snr):
        return self.twice * self.part(x)


def test_declared_attributes_and_plain_parts():
    denoiser = GaussianDenoiser(Declared(), GaussianProcess(Cosine()))

    def model(x):
        law = ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4", steps=2))
        pyro.sample("x", law.expand((3,)).to_event(1), obs=x)

    trace = poutine.trace(model).get_trace(torch.randn(3, 2))
    kinds = {name: site["type"] for name, site in trace.nodes.items() if site["name"][0] != "_"}
    assert kinds == {
        "part$$$weight": "param",
        "part$$$bias": "param",
        "base": "param",
        "gain": "sample",
        "twice": "sample",
        "x": "sample",
    }
    (gradient,) = torch.autograd.grad(
        trace.nodes["x"]["fn"].log_prob(trace.nodes["x"]["value"]),
        denoiser.network.base_unconstrained,
    )
    assert gradient != 0


def test_random_schedules_are_evaluated_at_every_run():
    schedule = LearnedSchedule(3, 8.0, -8.0)
    denoiser = GaussianDenoiser(Tiny((2,)), GaussianProcess(schedule))
    to_pyro_module_(denoiser)
    schedule.heights = normal((3,))
    model, x = Model(denoiser, VIEWS["chain"]), torch.randn(8, 2)
    for at in (torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0])):
        at.requires_grad_()
        site = "denoiser.process.schedule.heights"
        law = poutine.trace(poutine.condition(model, {site: at})).get_trace(x).nodes["x"]["fn"]
        twin = LearnedSchedule(3, 8.0, -8.0)
        with torch.no_grad():
            twin.heights.copy_(at)
        middle = torch.tensor([0.4])
        got = law.denoiser.process.schedule
        torch.testing.assert_close(got.log_snr(middle), twin.log_snr(middle))
        torch.testing.assert_close(
            got.time_of_log_snr(got.log_snr(middle)), middle, rtol=1e-4, atol=1e-4
        )
        for _ in range(2):
            (gradient,) = torch.autograd.grad(law.log_prob(x).sum(), at)
            assert (gradient != 0).all()


# --- refusals ---------------------------------------------------------------------------------------


def in_plate(denoiser):
    with pyro.plate("data", 8):
        pyro.sample("x", Diffusion(denoiser, (2,), steps=4), obs=torch.zeros(8, 2))


OUTSIDE = r"got random weights \(PyroSample\) in a PyroLinear with no model around"
INSIDE = r"got random weights '.*last.weight' inside the plate\(s\) {}, expected them outside"
REFUSED = {
    "outside": (lambda d: Diffusion(d, (2,)), OUTSIDE),
    "flow outside": (lambda d: ProbabilityFlow(d, (2,)), OUTSIDE),
    "steps outside": (lambda d: simulate(d, uniform(4), torch.zeros(2), Ancestral()), OUTSIDE),
    "spelled out": (lambda d: DDPM(d, (2,), steps=3), OUTSIDE),
    "plate": (lambda d: poutine.trace(in_plate).get_trace(d), INSIDE.format("data")),
    "particles": (
        lambda d: Trace_ELBO(2, 1, vectorize_particles=True).loss(
            *(m := Model(d, VIEWS["chain"]), AutoNormal(m)), torch.zeros(3, 2)
        ),
        INSIDE.format("num_particles_vectorized"),
    ),
    "parallel": (
        lambda d: Predictive(Model(d, VIEWS["chain"]), num_samples=2, parallel=True)(),
        INSIDE.format("_num_predictive_samples"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    ask, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ask(bayesian())
