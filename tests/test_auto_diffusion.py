"""A guide that walks to the posterior: weights in closed form, bounds, gradients, and Pyro's uses of it."""

import math
import warnings
import weakref

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Gamma,
    ImproperUniform,
    Multinomial,
    Normal,
    Poisson,
    StudentT,
    constraints,
)
from pyro.infer import (
    SVI,
    Importance,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam
from torch import nn

from pyro_diffusion.evaluate import bracket_evidence
from pyro_diffusion.infer import AnnealedSMC, AutoDiffusion, PathELBO, UnreliableWarning
from pyro_diffusion.infer.annealing import path_kernels
from pyro_diffusion.infer.annealing.annealed_path import AnnealedPath, centred
from pyro_diffusion.infer.annealing.path_kernels import LangevinKernel, Levels, UnderdampedKernel
from pyro_diffusion.nn import MLP

X = torch.tensor([1.0, -0.5, 2.0])
FORMS = [
    {},
    {"kernel": "underdamped"},
    {"control": True},
    {"control": True, "pathwise": False},
]


def zeros(site):
    return torch.zeros(site["fn"].shape())


def groups(x=X):
    """Means of three groups, each seen once: the posterior of each is N(x / 2, 1 / 2)."""
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean, 1.0), obs=x)


def log_z(x=X):
    return Normal(0.0, math.sqrt(2)).log_prob(x).sum()


def normal_base(model=groups, **arguments):
    pyro.clear_param_store()
    base = AutoNormal(model, init_scale=1.0, init_loc_fn=zeros)
    return AutoDiffusion(model, base, **{"steps": 8, **arguments})


def disturbed(guide, *args, by=0.1):
    """A guide whose parameters are none that its making gives."""
    guide(*args)
    for name, p in guide.named_parameters():
        if not name.startswith("base."):
            p.data += by * torch.randn_like(p)
    return guide


def within(values, target, errors=4.5):
    """A mean against what it should be; false alarms 7e-6."""
    return abs(values.mean() - target) < errors * values.std() / math.sqrt(len(values))


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_no_step_is_the_base(kind):
    pyro.clear_param_store()
    base = kind(groups)
    guide = disturbed(AutoDiffusion(groups, base, steps=1))
    path = guide.path()
    empty = Levels(torch.zeros(1), torch.zeros(0), torch.ones(3), torch.zeros(1))
    none = AnnealedPath(path.density, LangevinKernel(), empty).expand((50,))
    pyro.set_rng_seed(0)
    drawn = none.sample()
    pyro.set_rng_seed(0)
    normal = kind is AutoNormal
    law = Normal(*base._get_loc_and_scale("mean")).to_event(1) if normal else base.get_posterior()
    torch.testing.assert_close(drawn, law.sample((50,)))
    torch.testing.assert_close(none.log_prob(drawn), law.log_prob(drawn))
    other = torch.randn(50, 3)
    torch.testing.assert_close(none.log_prob(other), law.log_prob(other))


class Shift(nn.Module):
    """The control that takes N(0, 1) to N(m, 1) in K steps of size h: m / (K h)."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, z, t):
        return self.by.expand_as(z)


def test_weights_under_the_optimal_control(monkeypatch):
    r"""A target N(m, 1) from N(0, 1): log w = log Z + h / 4 (y_0^2 - y_K^2), y = z - b m, each path."""
    monkeypatch.setattr(path_kernels, "LARGEST", 1e9)  # drifts are bounded otherwise
    m = torch.tensor([1.5, -1.0], dtype=torch.double)

    def shifted():
        z = pyro.sample("z", ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("target", Normal(m, 1.0).log_prob(z).sum() + 0.7)

    pyro.clear_param_store()
    base = AutoNormal(shifted, init_scale=1.0, init_loc_fn=lambda site: torch.zeros_like(m))
    steps, h = 5, 0.1
    guide = AutoDiffusion(shifted, base, steps, control=Shift(m / (steps * h)), step_size=h)
    path = guide.path().expand((20,))
    seen = []
    arrive = path.density.__call__
    monkeypatch.setattr(
        type(path.density),
        "__call__",
        lambda self, z, *a, **k: seen.append(z) or arrive(z, *a, **k),
    )
    weights = path.path_density(path.sample()).log_weight
    first, last = seen[0], seen[-1] - m
    expected = 0.7 + h / 4 * (first.square() - last.square()).sum(-1)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_unbiased_and_bounds_are_bounds(form):
    guide = disturbed(normal_base(**form))
    ratio = (guide.log_weights(4000) - log_z()).exp()
    assert within(ratio, 1) and ratio.std() < 5
    assert (ratio.log().mean() < 0) and ratio.log().std() > 0.05
    with torch.no_grad():
        exact = X / 2 + math.sqrt(0.5) * torch.randn(4000, 3)
        path = guide.path().expand((4000,)).path_density(exact)
    # Walks back from exact draws: w^-1 is unbiased for Z^-1.
    back = path.log_weight - log_z()
    assert back.mean() > 0
    assert within((-back).exp(), 1)
    joint = Normal(0.0, 1.0).log_prob(exact).sum(-1) + Normal(exact, 1.0).log_prob(X).sum(-1)
    torch.testing.assert_close(path.joint, joint)


@pytest.mark.parametrize(("kernel", "left"), [("langevin", 0.2), ("underdamped", 0.1)])
def test_the_bound_rises_to_the_evidence_with_steps(kernel, left):
    gaps = []
    for steps in (2, 8, 32, 128):
        guide = normal_base(steps=steps, kernel=kernel, step_size=0.1)
        gaps.append(float(log_z() - guide.log_weights(2000).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < left < 1 < gaps[0]


def counts():
    rate = pyro.sample("rate", Gamma(2.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("n", Poisson(rate), obs=torch.tensor([1.0, 0.0, 3.0, 2.0]))


def coins():
    with pyro.plate("coins", 2):
        p = pyro.sample("p", Beta(2.0, 3.0))
        n = torch.tensor([[7.0, 3.0], [1.0, 9.0]])
        pyro.sample("n", Multinomial(10, torch.stack([p, 1 - p], -1)), obs=n)


def dice():
    p = pyro.sample("p", Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("n", Multinomial(6, p), obs=torch.tensor([1.0, 2.0, 3.0]))


def log_multinomial(alpha, n):
    alpha, n = torch.tensor(alpha), torch.tensor(n)
    norm = lambda a: a.lgamma().sum() - a.sum().lgamma()  # noqa: E731
    return float(norm(alpha + n) - norm(alpha) + (n.sum() + 1).lgamma() - (n + 1).lgamma().sum())


SUPPORTS = [
    (counts, math.lgamma(8) - math.lgamma(2) - 8 * math.log(5) - math.log(12)),
    (
        coins,
        log_multinomial([2.0, 3.0], [7.0, 3.0]) + log_multinomial([2.0, 3.0], [1.0, 9.0]),
    ),
    (dice, log_multinomial([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])),
]


@pytest.mark.parametrize(("model", "evidence"), SUPPORTS)
def test_constrained_supports_in_plates(model, evidence):
    """By the guide's own weights, and those of Pyro's traces, which run the model with its Jacobians."""
    pyro.clear_param_store()
    guide = AutoDiffusion(model, AutoMultivariateNormal(model, init_scale=0.7), 4)
    assert within((guide.log_weights(3000) - evidence).exp(), 1)
    trace = poutine.trace(guide).get_trace()
    site = trace.nodes["_AutoDiffusion_latent"]
    scored = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    weight = scored.log_prob_sum() - trace.log_prob_sum()
    torch.testing.assert_close(weight, site["fn"].path_density(site["value"]).log_weight)


def in_double(model=groups, **arguments):
    guide = normal_base(model, steps=4, **arguments)
    guide(X)
    return disturbed(guide.double(), X.double())


def parameters(guide):
    return [p for p in guide.parameters() if p.requires_grad]


@pytest.mark.parametrize("form", [*FORMS[:3], {"control": True, "train_base": True}])
@pytest.mark.parametrize("elbo", [PathELBO(3), Trace_ELBO(), TraceMeanField_ELBO()])
def test_pathwise_gradients_against_differences(form, elbo):
    """With the same noise, the loss is a function of the parameters."""
    x = X.double()
    guide = in_double(**form)
    losses = []

    def loss():
        pyro.set_rng_seed(3)
        return elbo.loss(groups, guide, x)

    loss()  # the first call with these arguments looks at the model, and draws
    pyro.set_rng_seed(3)
    guide.zero_grad()
    elbo.loss_and_grads(groups, guide, x)
    trained = [p for p in parameters(guide) if p.grad is not None]
    names = {name for name, p in guide.named_parameters() if p.grad is not None}
    assert any(name.startswith("base.") for name in names) == ("train_base" in form)
    with torch.no_grad():
        for p in trained:
            index = int(p.grad.abs().argmax())
            flat, analytic = p.view(-1), float(p.grad.view(-1)[index])
            kept, ends = float(flat[index]), []
            for sign in (1, -1):
                flat[index] = kept + sign * 1e-5
                ends.append(loss())
            flat[index] = kept
            losses.append((analytic, (ends[0] - ends[1]) / 2e-5))
    assert len(losses) >= 3
    for analytic, numeric in losses:
        assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-7)


def test_leave_one_out():
    """Centred scores under raw signals: each score under its signal less the mean of the others."""
    score, signal = torch.randn(5, 1), torch.randn(5, 1)
    others = (signal.sum() - signal) / 4
    torch.testing.assert_close((signal * centred(score)).sum(), ((signal - others) * score).sum())
    assert torch.equal(centred(score[:1]), score[:1])


@pytest.mark.parametrize("kernel", ["langevin", "underdamped"])
def test_walks_back_have_the_law_of_the_draws(kernel):
    """Three large steps to a posterior on a line: the integral of u^k against walks back from a grid, and
    the mean of u^k over draws, k = 0, 1, 2, within 4.5 errors of both."""

    def line():
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z, 0.5), obs=torch.tensor(2.0))

    pyro.clear_param_store()
    base = AutoNormal(line, init_scale=1.0, init_loc_fn=zeros)
    guide = AutoDiffusion(line, base, 3, kernel=kernel, step_size=0.3, control=kernel == "langevin")
    disturbed(guide, by=0.1 if kernel == "langevin" else 0.3)
    path = guide.path()
    with torch.no_grad():
        drawn = path.expand((40_000,)).sample().double()
        grid = torch.linspace(-6, 8, 71).reshape(-1, 1, 1)
        rows = grid.expand(71, 4000, 1)
        density = path.expand((71, 4000)).log_prob(rows).double().exp() / 5
    for power in (0, 1, 2):
        terms = grid[:, :1].squeeze(-1).double() ** power * density
        error = (terms.var(-1).sum() / 4000 + (drawn**power).var() / 40_000).sqrt()
        assert abs(terms.mean(-1).sum() - (drawn**power).mean()) < 4.5 * error
        assert error < 0.1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_of_a_momentum_by_hand(sign):
    """The same noise: states, and the densities of both refreshments and of their opposites."""
    kernel, scale = UnderdampedKernel(), torch.tensor([0.7, 1.6], dtype=torch.double)
    step, eta = torch.tensor(0.09, dtype=torch.double), torch.tensor(0.6, dtype=torch.double)
    schedule = kernel.schedule(Levels(torch.tensor([0.0, 1.0]), step[None], scale, eta))
    here, there = (0, 1) if sign > 0 else (1, 0)

    def slope_of(z, level):
        return -z if level == 0 else 2 * (1 - z)

    def arrive(z, level):
        return {"z": z, "slope": slope_of(z, level)}

    z = torch.tensor([[0.3, -1.2], [2.0, 0.5]], dtype=torch.double)
    pyro.set_rng_seed(1)
    state = kernel.start(arrive(z, here))
    new, ahead, behind = kernel.step(schedule, arrive, state, here, there, True)
    pyro.set_rng_seed(1)
    first, noise, more = (torch.randn_like(z) for _ in range(3))
    second = eta.sqrt() * first + (1 - eta).sqrt() * noise
    half = sign * second + (0.15 * scale * slope_of(z, here)).tanh()
    end = z + 0.3 * scale * half
    third = sign * (half + (0.15 * scale * slope_of(end, there)).tanh())
    fourth = eta.sqrt() * third + (1 - eta).sqrt() * more

    def law(momentum):
        return Normal(eta.sqrt() * momentum, (1 - eta).sqrt()).to_event(1)

    ratio = law(first).log_prob(second) + law(third).log_prob(fourth)
    ratio = ratio - law(second).log_prob(first) - law(fourth).log_prob(third)
    torch.testing.assert_close(ahead - behind, ratio)
    for at, momentum, place in ((state, first, z), (new, fourth, end)):
        torch.testing.assert_close(at["momentum"], momentum)
        torch.testing.assert_close(at["z"], place)
        torch.testing.assert_close(kernel.edge(at), Normal(0.0, 1.0).log_prob(momentum).sum(-1))


def test_bounds_of_paths_in_a_bracket():
    guide = disturbed(normal_base(control=True))
    exact = {"mean": X / 2 + math.sqrt(0.5) * torch.randn(2000, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        found = bracket_evidence(groups, guide, exact)
    assert found.elbo.value < log_z() < found.eubo.value
    own = guide.log_weights(10_000).mean()
    assert abs(found.elbo.value - own) < 4.5 * math.sqrt(2) * found.elbo.standard_error
    with pytest.raises(ValueError, match=r"guide: got AutoDiffusion, expected"):
        AnnealedSMC(groups, guide)


def test_a_bound_of_another_model_is_refused():
    """Paths score the guide's own program, whatever they are handed."""

    def other():
        with pyro.plate("groups", 3):
            mean = pyro.sample("mean", Normal(0.0, 1.0))
            pyro.sample("x", Normal(mean, 5.0), obs=X)

    guide = normal_base()
    with pytest.raises(ValueError, match="model: got function that is not the guide's own"):
        PathELBO(4).loss(other, guide)
    with pytest.raises(ValueError, match="model: got function that is not the guide's own"):
        bracket_evidence(other, guide, {"mean": torch.zeros(4, 3)})


def test_score_gradients_are_those_of_the_bound():
    """40 draws of each gradient: means within 4.5 errors of each other in every coordinate; and Pyro's ELBO
    has the same gradient as the path's."""
    found = {}
    for pathwise in (True, False):
        pyro.set_rng_seed(0)
        guide = disturbed(normal_base(steps=4, control=True, pathwise=pathwise))
        rows = []
        for _ in range(40):
            guide.zero_grad()
            PathELBO(400).loss_and_grads(groups, guide)
            rows.append(
                torch.cat([p.grad.flatten() for p in parameters(guide) if p.grad is not None])
            )
        found[pathwise] = torch.stack(rows)
        assert all(p.grad is None for p in guide.base.parameters())
    one, other = found.values()
    error = ((one.var(0) + other.var(0)) / 40).sqrt()
    assert ((one.mean(0) - other.mean(0)).abs() < 5 * error + 1e-6).all()
    pyro.set_rng_seed(1)
    guide.zero_grad()
    PathELBO(5).loss_and_grads(groups, guide)
    grads = [p.grad.clone() for p in parameters(guide) if p.grad is not None]
    pyro.set_rng_seed(1)
    guide.zero_grad()
    Trace_ELBO(5, max_plate_nesting=1, vectorize_particles=True).loss_and_grads(groups, guide)
    for mine, stock in zip(
        grads, [p.grad for p in parameters(guide) if p.grad is not None], strict=True
    ):
        torch.testing.assert_close(mine, stock, rtol=1e-3, atol=1e-4)


def trained(guide, elbo, model=groups, steps=40, lr=0.03):
    svi = SVI(model, guide, Adam({"lr": lr}), elbo)
    for _ in range(steps):
        svi.step()
    return float(guide.log_weights(2000).mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("local", [False, True])
def test_svi_trains_it(form, local):
    """In both parameter modes; the base stays as it is, unless it is trained, too."""
    with pyro.settings.context(module_local_params=local):
        guide = normal_base(**form)
        before = float(guide.log_weights(2000).mean())
        base = [p.detach().clone() for p in guide.base.parameters()]
        if local and "control" in form:  # Pyro's SVI takes no module that is none of Pyro's there
            loss = PathELBO(32)(groups, guide)
            optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
            for _ in range(40):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            assert float(guide.log_weights(2000).mean()) > before + 0.2
            assert all(p.grad is None for p in guide.base.parameters())
            return
        kind = Trace_ELBO if "pathwise" in form else TraceMeanField_ELBO
        elbo = kind(num_particles=32, max_plate_nesting=1, vectorize_particles=True)
        assert before + 0.2 < trained(guide, elbo) < log_z()
        assert all(torch.equal(*pair) for pair in zip(base, guide.base.parameters(), strict=True))
        if form.get("pathwise", True):
            joint = normal_base(train_base=True, **form)
            assert trained(joint, PathELBO(32)) > before + 0.2
            assert any(
                not torch.equal(*pair) for pair in zip(base, joint.base.parameters(), strict=True)
            )


def test_control_gains_what_annealing_alone_cannot():
    plain, controlled = (
        trained(normal_base(steps=4, control=control), PathELBO(64), steps=150, lr=0.01)
        for control in (False, True)
    )
    assert controlled > plain + 0.3


def test_predictive_importance_and_quantiles():
    """1000 draws of N(x / 2, 1 / 2), after training: moments within .15."""
    guide = normal_base(control=True)
    trained(guide, PathELBO(32), steps=100)
    drawn = Predictive(groups, guide=guide, num_samples=1000, parallel=True)()["mean"]
    assert drawn.shape == (1000, 1, 3) or drawn.shape == (1000, 3)
    drawn = drawn.reshape(1000, 3)
    assert (drawn.mean(0) - X / 2).abs().max() < 0.15
    assert (drawn.std(0) - math.sqrt(0.5)).abs().max() < 0.15
    with torch.no_grad():
        importance = Importance(groups, guide, num_samples=100).run()
    assert abs(importance.get_log_normalizer() - log_z()) < 0.3
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.9])
    assert (median["mean"] - X / 2).abs().max() < 0.2
    assert quantiles["mean"].shape == (2, 3)
    width = quantiles["mean"][1] - quantiles["mean"][0]
    assert (width - 2 * 1.2816 * math.sqrt(0.5)).abs().max() < 0.3


Y, ROWS = torch.tensor(1.5), torch.tensor([0.5, 2.0])


def chained(y=Y):
    a = pyro.sample("a", Normal(0.0, 1.0))
    b = pyro.sample("b", Normal(a, 1.0))
    pyro.sample("y", Normal(b, 0.5), obs=y)


def test_in_a_list_it_depends_on_what_was_drawn_before():
    """b | a, y is normal in closed form: with the exact law of a first, many steps reach the evidence."""
    pyro.clear_param_store()
    exact = Normal(1.5 * 1.0 / 2.25, math.sqrt(1.25 / 2.25))

    def first(y=None):
        return {"a": pyro.sample("a", exact)}

    guide = AutoGuideList(chained)
    guide.append(first)
    near = AutoNormal(
        poutine.block(chained, hide=["a"]),
        init_scale=0.7,
        init_loc_fn=lambda site: torch.tensor(1.2),
    )
    guide.append(AutoDiffusion(chained, near, 32, step_size=0.1))
    evidence = Normal(0.0, 1.5).log_prob(torch.tensor(1.5))
    elbo = Trace_ELBO(num_particles=2000, max_plate_nesting=0, vectorize_particles=True)
    with torch.no_grad():
        bound = -elbo.loss(chained, guide)
        draws = Predictive(chained, guide=guide, num_samples=4000, parallel=True)()
    assert evidence - 0.2 < bound < evidence
    residual = draws["b"].flatten() - (0.2 * draws["a"].flatten() + 0.8 * 1.5)
    assert abs(residual.mean()) < 0.1
    assert abs(torch.corrcoef(torch.stack([draws["a"].flatten(), residual]))[0, 1]) < 0.1
    assert guide[1].median(num_samples=100)["b"].shape == ()
    guide.zero_grad()
    Trace_ELBO().loss_and_grads(chained, guide)
    assert guide[1].step_sizes_unconstrained.grad is not None


class Heavy(AutoContinuous):
    """A guide that is its own base."""

    def get_posterior(self, *args, **kwargs):
        return StudentT(3.0, self.loc, torch.ones_like(self.loc)).to_event(1)

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        self.loc = nn.Parameter(self._init_loc())


def test_a_base_that_no_chart_gives_is_not_trained():
    """Its draws are constants: gradients would leave out their part."""
    pyro.clear_param_store()
    assert AutoDiffusion(groups, Heavy(groups), 2).log_weights(10).shape == (10,)
    with pytest.raises(ValueError, match="train_base: got True with Heavy, whose posterior"):
        PathELBO(4).loss(groups, AutoDiffusion(groups, Heavy(groups), 2, train_base=True))


def test_scores_in_a_list_are_refused_where_they_would_be_biased():
    """Gradients of draws before, and densities of draws after, are none that scores have."""
    pyro.clear_param_store()
    bases = {name: AutoNormal(poutine.block(chained, expose=[name])) for name in "ab"}
    guide = AutoGuideList(chained)
    guide.append(bases["a"])
    guide.append(AutoDiffusion(chained, bases["b"], 2, pathwise=False))
    elbo = Trace_ELBO(num_particles=4, max_plate_nesting=0, vectorize_particles=True)
    with torch.no_grad():
        assert math.isfinite(elbo.loss(chained, guide))
    with pytest.raises(ValueError, match="pathwise: got False after guides of a list whose draws"):
        elbo.loss_and_grads(chained, guide)
    guide[0].requires_grad_(False)
    elbo.loss_and_grads(chained, guide)
    assert guide[1].step_sizes_unconstrained.grad is not None

    def alone():
        pyro.sample("a", Normal(0.0, 1.0))

    guide = AutoGuideList(chained)
    guide.append(AutoDiffusion(alone, AutoNormal(alone), 2, pathwise=False))
    with pytest.raises(ValueError, match="pathwise: got False in a AutoDiffusion that a AutoDiff"):
        guide.append(AutoDiffusion(chained, AutoNormal(poutine.block(chained, expose=["b"])), 2))


def mixed(y=ROWS):
    loc = pyro.sample("loc", Normal(0.0, 1.0))
    with pyro.plate("rows", 2):
        z = pyro.sample("z", Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
        pyro.sample("y", Normal(loc + 2.0 * z, 1.0), obs=y)


def test_discrete_latents_are_summed_over():
    pyro.clear_param_store()
    base = AutoNormal(poutine.block(mixed, hide=["z"]), init_scale=1.0)
    guide = AutoDiffusion(mixed, base, 16, step_size=0.1)
    grid = torch.linspace(-8, 8, 4001)
    log_p = Normal(0.0, 1.0).log_prob(grid)
    for y in (0.5, 2.0):
        parts = [Normal(grid + 2.0 * z, 1.0).log_prob(torch.tensor(y)) for z in (0, 1)]
        log_p = log_p + torch.stack(parts).logsumexp(0) - math.log(2)
    evidence = float(log_p.logsumexp(0) + math.log(16 / 4000))
    assert within((guide.log_weights(3000) - evidence).exp(), 1)
    elbo = TraceEnum_ELBO(num_particles=500, max_plate_nesting=1, vectorize_particles=True)
    with torch.no_grad():
        bound = -elbo.loss(mixed, guide)
    assert abs(bound - float(guide.log_weights(3000).mean())) < 0.3
    SVI(mixed, guide, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1)).step()


def test_new_data_and_an_amortized_control():
    """One control for all data: trained on many, its bound is near the evidence of each."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 3))

        def forward(self, z, t, x):
            return self.net(torch.cat([z, t.unsqueeze(-1) / 10, x], -1))

    guide = normal_base(steps=4, control=Net(), context=lambda x: {"x": x.unsqueeze(0)})
    guide(X)
    svi = SVI(groups, guide, Adam({"lr": 0.01}), PathELBO(64))
    for _ in range(200):
        svi.step(torch.randn(3) * math.sqrt(2))
    for x in (X, -X):
        gap = log_z(x) - guide.log_weights(2000, x).mean()
        alone = normal_base(steps=4)
        plain = log_z(x) - alone.log_weights(2000, x).mean()
        assert 0 < gap < plain - 0.2


def test_save_and_load(tmp_path):
    guide = disturbed(normal_base(control=True))
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    pyro.set_rng_seed(5)
    drawn = guide()["mean"]
    again = normal_base(control=True)
    again()
    again.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    again.median(num_samples=2)
    pyro.set_rng_seed(5)
    torch.testing.assert_close(again()["mean"], drawn)


def test_save_and_load_by_pyros_store(tmp_path):
    guide = normal_base(control=True)
    svi = SVI(groups, guide, Adam({"lr": 0.05}), PathELBO(8))
    for _ in range(5):
        svi.step(X)
    pyro.set_rng_seed(5)
    drawn = guide.log_weights(4, X)
    pyro.get_param_store().save(tmp_path / "store.pt")
    again = normal_base(control=True)  # its store is empty
    pyro.get_param_store().load(tmp_path / "store.pt")
    again.log_weights(2, X)  # makes its parameters, and so draws numbers
    pyro.set_rng_seed(5)
    torch.testing.assert_close(again.log_weights(4, X), drawn)
    SVI(groups, again, Adam({"lr": 0.05}), PathELBO(8)).step(X)
    assert not torch.equal(again.log_weights(4, X), drawn)
    moved = dict(again.control.named_parameters())
    assert all(not torch.equal(p, moved[n]) for n, p in guide.control.named_parameters())
    other = normal_base(control=MLP(3, (8, 8), embedding=32))
    pyro.get_param_store().load(tmp_path / "store.pt")
    with pytest.raises(ValueError, match=r"control: got .* of shape .* in Pyro's store"):
        other.log_weights(2, X)


@pytest.mark.parametrize("steps", [2, 8])
def test_another_number_of_steps_in_pyros_store_is_refused(steps):
    """It would silently walk as many steps as the guide before it."""
    guide = normal_base(steps=4)
    guide()
    with pytest.raises(ValueError, match=rf"steps: got {steps} and 3 latents, and 4 and 3 in"):
        AutoDiffusion(groups, guide.base, steps).log_weights(2)
    pyro.clear_param_store()
    assert len(AutoDiffusion(groups, guide.base, steps).path().levels.step_sizes) == steps


def test_masked_nan_is_refused_by_name():
    """Its density is finite and its gradient is not: parameters would be NaN after a step."""
    x = torch.tensor([1.0, math.nan, 2.0])

    def model(x, mask):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            pyro.sample("x", Normal(mean, 1.0, validate_args=False), obs=x)

    guide = AutoDiffusion(model, AutoNormal(model), 2)
    with pytest.raises(ValueError, match="site 'x': got NaN under a mask"):
        guide.log_weights(4, x, x == x)
    with pytest.raises(ValueError, match="site 'x': got NaN under a mask"):
        AnnealedSMC(model, AutoNormal(model), 8, 6, rounds=1).run(x, x == x)
    assert bool(guide.log_weights(4, x.nan_to_num(), x == x).isfinite().all())


def test_masked_latents_without_a_density_are_refused_by_name():
    """Observations under ``obs_mask`` leave latents beside them that are flat: an infinite evidence."""
    seen = torch.tensor([True, False, True])

    def model(mask):
        with pyro.plate("data", 3):
            pyro.sample("x", Normal(0.0, 1.0), obs=X, obs_mask=mask)

    def needed():
        """The mask takes the prior away, but data remain."""
        with pyro.plate("data", 3):
            with poutine.mask(mask=seen):
                z = pyro.sample("z", Normal(0.0, 1.0))
            pyro.sample("y", Normal(z, 1.0), obs=X)

    with pytest.raises(ValueError, match="site 'x_unobserved': got 2 latents without a density"):
        AutoDiffusion(model, AutoNormal(model), 2).log_weights(4, seen)
    with pytest.raises(ValueError, match="site 'x_unobserved': got 2 latents without a density"):
        AnnealedSMC(model, AutoNormal(model), 8, 6, rounds=1).run(seen)
    nothing = AutoDiffusion(model, AutoNormal(model), 2)
    pyro.clear_param_store()
    assert bool(nothing.log_weights(4, torch.zeros(3, dtype=torch.bool)).isfinite().all())
    pyro.clear_param_store()
    assert bool(AutoDiffusion(needed, AutoNormal(needed), 2).log_weights(4).isfinite().all())


def test_memory_is_flat_and_gradients_are_few():
    """K + 1 gradients of the model; without a graph no more than a few states are alive at once."""
    alive, most = [], []
    guide = normal_base(steps=30, control=True)
    path = guide.path().expand((10,))
    call = type(path.density).__call__

    def counted(self, z, *args, **kwargs):
        out = call(self, z, *args, **kwargs)
        alive.append(weakref.ref(out["grad_gap"]))
        most.append(sum(ref() is not None for ref in alive))
        return out

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(path.density), "__call__", counted)
        before = path.density.evaluations
        path.log_prob(path.sample())
    assert path.density.evaluations - before == 31
    assert max(most) <= 3


def subsampled(x=X):
    with pyro.plate("groups", 3, subsample_size=2) as index:
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean, 1.0), obs=x[index])


def unsupported():
    z = pyro.sample("z", Normal(0.0, 1.0))
    pyro.sample("x", Gamma(2.0, 1.0), obs=torch.where(z > -9, -1.0, -1.0))


def counted():
    pyro.sample("z", Normal(0.0, 1.0))
    pyro.sample("n", Poisson(3.0))


def varying():
    size = 2 + int(torch.randint(2, ()))
    pyro.sample("z", Normal(torch.zeros(size), 1.0).to_event(1))
    pyro.sample("w", Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoDiffusion(None, AutoNormal(groups)), r"model: got None"),
        (lambda: AutoDiffusion(groups, AutoDelta(groups)), r"base: got .*AutoDelta"),
        (lambda: normal_base(steps=0), r"steps: got 0"),
        (lambda: normal_base(kernel="nuts"), r"kernel: got 'nuts', expected one of"),
        (lambda: normal_base(control=3), r"control: got "),
        (lambda: normal_base(control=True, kernel="underdamped"), r"control: got one with kernel"),
        (lambda: normal_base(pathwise=False, kernel="underdamped"), r"pathwise: got False"),
        (lambda: normal_base(pathwise=False, train_base=True), r"train_base: got True"),
        (lambda: normal_base(step_size=-1.0), r"step_size: got -1"),
        (lambda: normal_base(context=lambda: {}), r"context: got "),
        (lambda: PathELBO(0), r"num_particles: got 0"),
        (lambda: PathELBO(1).loss(groups, normal_base(pathwise=False)), r"num_particles: got 1"),
        (lambda: PathELBO().loss(groups, AutoDelta(groups)), r"guide: got AutoDelta"),
        (lambda: normal_base().quantiles([2.0]), r"quantiles: got \[2.0\]"),
        (lambda: normal_base(subsampled)(), r"plate 'groups': got a subsample of 2 of 3"),
        (
            lambda: AutoDiffusion(counted, AutoNormal(poutine.block(counted, hide=["n"])))(),
            r"site 'n': got a latent Poisson, which cannot be enumerated",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_start_without_density_names_the_site():
    with pyro.validation_enabled(False):
        guide = AutoDiffusion(unsupported, AutoNormal(unsupported))
        with pytest.raises(ValueError, match=r"site 'x' \(Gamma\): got .* at a draw of the base"):
            guide()
