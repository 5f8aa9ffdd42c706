"""AutoJoint: any sites of a program given any others, against closed forms."""

import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import (
    Bernoulli,
    Delta,
    Dirichlet,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
)
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam

from pyro_diffusion import checkpoint
from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Bound
from pyro_diffusion.infer import AutoJoint, UnreliableWarning
from pyro_diffusion.infer.simulators.dependencies import moral_graph
from pyro_diffusion.infer.simulators.linear_part import LinearPart, markov_covariance
from pyro_diffusion.infer.simulators.random_conditions import check_conditions, draw_conditioned
from pyro_diffusion.nn import MLP, SiteTransformer
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import fit_amortized

DIMS = {"given": 1, "conditioned": 1}
SIZE = torch.Size


def program(x=None):
    """A scale's logarithm a, two numbers z in a plate around it, and a datum x of both: jointly normal."""
    scale = pyro.sample("scale", LogNormal(0.5, 0.8))
    with pyro.plate("rows", 2):
        z = pyro.sample("z", Normal(0.7 * scale.log(), 0.6))
    pyro.sample("x", Normal(z.sum(-1) - 0.4, 0.5), obs=x)


# of (log scale, z_1, z_2, x)
MEAN = torch.tensor([0.5, 0.35, 0.35, 0.3])
MAP = torch.tensor(
    [[0.8, 0.0, 0.0, 0.0], [0.56, 0.6, 0.0, 0.0], [0.56, 0.0, 0.6, 0.0], [1.12, 0.6, 0.6, 0.5]]
)
COVARIANCE = MAP @ MAP.mT
PLACES = {"scale": [0], "z": [1, 2], "x": [3]}


def law_of_free(given, values):
    """The normal of the free unconstrained coordinates, in order, given values of the others."""
    inner = [i for name in PLACES for i in PLACES[name] if name in given]
    free = [i for i in range(4) if i not in inner]
    gain = torch.zeros(len(free), 0)
    if inner:
        block = COVARIANCE[inner][:, inner]
        gain = torch.linalg.solve(block, COVARIANCE[inner][:, free]).mT
    mean = MEAN[free] + (gain @ (values - MEAN[inner]).unsqueeze(-1)).squeeze(-1)
    covariance = COVARIANCE[free][:, free] - gain @ COVARIANCE[inner][:, free]
    return MultivariateNormal(mean, covariance + 1e-7 * torch.eye(len(free)))


class Exact(Denoiser):
    """E[x_0 | noisy free, clean given] of the program, on the scale that ``scales`` holds."""

    point_mass = True

    def forward(self, xt, t, given, conditioned):
        level = self.process.level(t, xt, state="xt")
        mean = (MEAN - self.scales.loc) / self.scales.scale
        covariance = (COVARIANCE / self.scales.scale / self.scales.scale.unsqueeze(1)).to(xt)
        gain = torch.where(conditioned, 1.0, level.alpha)
        noise = torch.where(conditioned, 1e-6, level.sigma**2)
        seen = torch.where(conditioned, given, xt) - gain * mean
        total = gain.unsqueeze(-1) * covariance * gain.unsqueeze(-2) + torch.diag_embed(noise)
        weights = torch.linalg.solve(total.double(), seen.unsqueeze(-1).double()).to(xt)
        return Delta(mean + (covariance @ (gain.unsqueeze(-1) * weights)).squeeze(-1), event_dim=1)

    def context_event_dim(self, name, value):
        return 1


@pytest.fixture
def exact():
    """The joint with the true denoiser: what is left is everything but learning."""
    joint = AutoJoint(
        program,
        observed=["x"],
        denoiser=lambda size, graph: Exact(GaussianProcess(LogLinear(14.0, -12.0))),
        objective=Bound(),
    )
    joint.simulate(200)
    known = joint.posterior.denoiser
    known.denoiser.scales = joint.posterior.latents
    known.linear.covariance.copy_(torch.eye(4))  # the true denoiser has its linear part itself
    return joint


def small(size, graph):
    network = SiteTransformer(size, width=16, depth=2, heads=2, graph=graph)
    process = GaussianProcess(LogLinear(10.0, -8.0))
    return GaussianDenoiser(network, process, context_event_dims=DIMS)


def untrained(model, **options):
    joint = AutoJoint(model, denoiser=small, **options)
    joint.simulate(100)
    return joint


GIVEN = {
    "nothing": {},
    "datum": {"x": torch.tensor(1.2)},
    "latents": {"scale": torch.tensor(2.0), "z": torch.tensor([0.3, -0.4])},
    "one latent": {"z": torch.tensor([0.3, -0.4])},
    "across": {"scale": torch.tensor(2.0), "x": torch.tensor(-0.5)},
}


def unconstrained(given):
    """Given values in one vector, and those of the free sites from a dictionary."""
    parts = [value.log() if name == "scale" else value for name, value in given.items()]
    return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(0)


# --- the right law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_moments_and_density_of_any_conditional(exact, given):
    """4000 draws: z-scores of at most 4 means and 4 variances below 5 (5e-6 a case)."""
    conditional, law = exact.condition(given), law_of_free(given, unconstrained(given))
    assert conditional.sites == tuple(name for name in PLACES if name not in given)
    draws = conditional.sample((4000,))
    assert all(draws[name].shape == (4000, *exact._simulator.latents[name].shape) for name in draws)
    free = [draws[n].log() if n == "scale" else draws[n] for n in draws]
    packed = torch.cat([part.reshape(4000, -1) for part in free], -1)
    z = (packed.mean(0) - law.mean) / (law.variance / 4000).sqrt()
    assert z.abs().max() < 5
    z = (packed.var(0) / law.variance - 1) / math.sqrt(2 / 4000)
    assert z.abs().max() < 5
    expected = law.log_prob(packed[:6])
    if "scale" in draws:  # of the scale itself, not of its logarithm
        expected = expected - draws["scale"][:6].log()
    found = conditional.log_prob({name: value[:6] for name, value in draws.items()})
    assert torch.allclose(found, expected, atol=1e-2, rtol=3e-3)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_guide_has_the_evidence_in_its_weights(exact, given):
    """Log-density of the model less that of the guide is log p(given) at every draw."""
    model, guide = poutine.condition(program, given), exact.condition(given)
    own = {name: value.log() if name == "scale" else value for name, value in given.items()}
    inner = [i for name in PLACES for i in PLACES[name] if name in given]
    evidence = torch.zeros(())
    if inner:
        block = COVARIANCE[inner][:, inner]
        evidence = MultivariateNormal(MEAN[inner], block).log_prob(unconstrained(given))
        evidence = evidence - (own["scale"] if "scale" in given else 0.0)
    for _ in range(3):
        with torch.no_grad():
            loss = Trace_ELBO().loss(model, guide)
        assert -loss == pytest.approx(float(evidence), abs=0.02)


@pytest.mark.parametrize("given", [(), ("x",), ("z",), ("scale", "x")], ids=str)
def test_training_bounds_the_density_of_what_is_free(exact, given):
    """Below log q(free | given) by what 1000 steps of a point mass lose; the given count for nothing.

    20,000 rows: the mean is known to about .02 nats.
    """
    torch.manual_seed(1)
    law, rows = exact.posterior, 20_000
    values = MEAN + torch.randn(rows, 4) @ MAP.mT
    inner = [i for name in PLACES for i in PLACES[name] if name in given]
    free = [i for i in range(4) if i not in inner]
    conditioned = torch.zeros(rows, 4, dtype=torch.bool)
    conditioned[:, inner] = True
    with torch.no_grad():
        bound = law.diffusion(law.latents(values), conditioned, None).log_prob(law.latents(values))
    expected = law_of_free(given, values[:, inner]).log_prob(values[:, free])
    expected = expected + law.latents.scale[free].log().sum()
    gap = (expected - bound).mean()
    error = (expected - bound).std() / math.sqrt(rows)
    assert -5 * error < gap < 0.06 * len(free) + 5 * error


def test_many_given_values_in_one_call(exact):
    """Three data side by side, 4000 draws each: z-scores of 9 means below 5 (5e-6)."""
    data = torch.tensor([1.2, -0.5, 0.0])
    conditional = exact.condition({"x": data})
    assert conditional.batch_shape == (3,)
    draws = conditional.sample((4000,))
    assert draws["scale"].shape == (4000, 3)
    assert draws["z"].shape == (4000, 3, 2)
    packed = torch.cat([draws["scale"].log().unsqueeze(-1), draws["z"]], -1)
    for row, x in enumerate(data):
        law = law_of_free({"x": x}, x.reshape(1))
        z = (packed[:, row].mean(0) - law.mean) / (law.variance / 4000).sqrt()
        assert z.abs().max() < 5
    one = exact.condition({"x": data[1]})
    values = {"scale": torch.tensor(1.3), "z": torch.tensor([0.2, 0.1])}
    side = conditional.log_prob(
        {name: value.expand(3, *value.shape) for name, value in values.items()}
    )
    assert side.shape == (3,)
    assert torch.allclose(side[1], one.log_prob(values), atol=5e-3)


def test_quantiles(exact):
    conditional = exact.condition({"x": torch.tensor(1.2)})
    law = law_of_free({"x": None}, torch.tensor([1.2]))
    found = conditional.quantiles([0.16, 0.5, 0.84], num_samples=4000)
    assert found["z"].shape == (3, 2)
    sd = law.variance[0].sqrt()
    expected = (law.mean[0] + torch.tensor([-0.9945, 0.0, 0.9945]) * sd).exp()
    # quantiles of 4000 draws: relative errors of about .024 sd
    assert torch.allclose(found["scale"].log(), expected.log(), atol=float(0.12 * sd))
    assert conditional.median(num_samples=10)["z"].shape == (2,)


# --- what is learned ----------------------------------------------------------------------------------


def chain():
    a = pyro.sample("a", Normal(0.0, 1.0))
    b = pyro.sample("b", Normal(0.8 * a, 0.6))
    pyro.sample("c", Normal(0.8 * b, 0.6))


def test_normal_sites_are_right_untrained():
    """The linear part of 4000 simulations, with a network of zeros: moments within 5 errors and 6 %."""
    joint = AutoJoint(program, observed=["x"], denoiser=small)
    joint.simulate(4000)
    for given in GIVEN.values():
        law, draws = (
            law_of_free(given, unconstrained(given)),
            joint.condition(given).sample((4000,)),
        )
        free = [draws[n].log() if n == "scale" else draws[n] for n in draws]
        packed = torch.cat([part.reshape(4000, -1) for part in free], -1)
        sd = law.variance.sqrt()
        assert ((packed.mean(0) - law.mean).abs() / sd).max() < 5 / math.sqrt(2000) + 0.06
        assert (packed.std(0) / sd - 1).abs().max() < 5 / math.sqrt(4000) + 0.06


def folded():
    a = pyro.sample("a", Normal(0.0, 1.0))
    b = pyro.sample("b", Normal(a.abs(), 0.3))
    pyro.sample("c", Normal(b, 0.5))


def test_training():
    """A fold, which no covariance sees: c tells a's size and not its sign, as b does; draws have both signs.

    Given b = 1.2 the size of a is near 1.1, of sd .29; untrained it is .8, of sd .6. By four seeds, sizes
    were 1.07 to 1.12, their sds .26 to .36, and means given a 1.27 to 1.48.
    """
    pyro.set_rng_seed(2)
    joint = AutoJoint(folded, denoiser=small)
    fit_amortized(joint, joint.simulate(8000), steps=800, batch_size=128, lr=5e-3, progress=False)
    draws = joint.condition({"b": torch.tensor(1.2)}).sample((1000,))["a"]
    assert abs(float(draws.abs().mean()) - 1.1) < 0.15
    assert float(draws.abs().std()) < 0.4
    assert abs(float((draws > 0).double().mean()) - 0.5) < 0.2
    forward = joint.condition({"a": torch.tensor(-1.5)}).sample((1000,))["b"]
    assert abs(float(forward.mean()) - 1.5) < 0.25


def test_covariance_of_a_graph():
    """Inverses have zeros where there is no edge, and covariances of edges are those of the sample."""
    torch.manual_seed(0)
    rows = torch.randn(50, 5).double() @ torch.randn(5, 5).double()
    sample = rows.mT @ rows / 50
    graph = torch.ones(5, 5).triu(-1).tril(1).bool()
    graph[0, 4] = graph[4, 0] = True
    found = markov_covariance(sample, graph)
    assert torch.linalg.inv(found)[~graph].abs().max() < 1e-8
    assert torch.allclose(found[graph], sample[graph])
    part = LinearPart(5)
    part.fit(rows.float(), graph)
    level = GaussianProcess(LogLinear(10.0, -8.0)).level(0.5, torch.zeros(2, 5))
    given, conditioned = torch.randn(1, 5).expand(2, 5), torch.tensor([0, 1, 0, 0, 1]).bool()
    xt = torch.stack([torch.zeros(5), torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0])])
    out = part(xt, level, given, conditioned.expand(2, 5))
    # the second and the last separate the first from the third
    assert torch.allclose(out[0, 0], out[1, 0], atol=1e-4)
    assert abs(out[0, 3] - out[1, 3]) > 0.1


def test_stock_svi():
    joint = untrained(folded)
    svi = SVI(joint.training_model, lambda **_: None, Adam({"lr": 1e-2}), Trace_ELBO())
    table = joint.simulate(256)
    losses = []
    for steps in (0, 120):
        for _ in range(steps):
            svi.step(**table)
        pyro.set_rng_seed(4)  # the same levels and noise, ten times: those of one draw may go up
        losses.append(sum(svi.evaluate_loss(**table) for _ in range(10)))
    assert losses[1] < 0.99 * losses[0]


def test_condition_masks():
    """Kinds by their weights, and every number of given sites alike: 20,000 rows within 5 errors."""
    torch.manual_seed(0)
    data = [False, False, True, True]
    rows = draw_conditioned(check_conditions({"random": 1.0}), data, 20_000, torch.device("cpu"))
    counts = rows.sum(1).bincount(minlength=5)
    assert counts[4] == 0
    assert ((counts[:4] - 5000).abs() < 5 * math.sqrt(20_000 * 0.25 * 0.75)).all()
    shares = rows.double().mean(0)  # 1.5 of 4 sites
    assert (shares - 0.375).abs().max() < 5 * math.sqrt(0.375 * 0.625 / 20_000)
    weights = check_conditions({"joint": 1.0, "posterior": 2.0, "likelihood": 1.0})
    rows = draw_conditioned(weights, data, 20_000, torch.device("cpu"))
    kinds = {
        (False, False, False, False): 0.25,
        (False, False, True, True): 0.5,
        (True, True, False, False): 0.25,
    }
    for kind, share in kinds.items():
        found = (rows == torch.tensor(kind)).all(1).double().mean()
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / 20_000)
    # without data among the sites there are no posteriors
    rows = draw_conditioned(weights, [False, False], 100, torch.device("cpu"))
    assert not rows.any()


# --- the graph ----------------------------------------------------------------------------------------


def edges(model, shapes, **options):
    """Pairs of neighbours."""
    graph = moral_graph(model, (), {}, shapes, **options)
    assert torch.equal(graph, graph.mT)
    assert graph.diagonal().all()
    return {(i, j) for i, j in graph.triu(1).nonzero().tolist()}


def test_parents_of_a_child_are_joined():
    def collider(c=None):
        a, b = (pyro.sample(name, Normal(0.0, 1.0)) for name in "ab")
        c = pyro.sample("c", Normal(a * b, 1.0), obs=c)
        pyro.sample("d", Normal(c, 1.0))

    shapes = dict.fromkeys("abcd", SIZE())
    everything = {(0, 1), (0, 2), (1, 2), (2, 3)}
    assert edges(collider, shapes) == everything
    assert edges(lambda: collider(torch.tensor(0.3)), shapes) == everything  # data or not
    # the child integrated out: its neighbours are joined
    assert edges(collider, dict.fromkeys("abd", SIZE())) == {(0, 1), (0, 2), (1, 2)}
    assert edges(collider, shapes, parents={"b": ["a"]}) == {(0, 1)}


def test_rows_of_a_plate_are_apart():
    def rows():
        top = pyro.sample("top", Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            z = pyro.sample("z", Normal(top, 1.0))
            pyro.sample("pair", Normal(z.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1))

    shapes = {"top": SIZE(), "z": SIZE([2]), "pair": SIZE([2, 2])}
    across = {(0, 1), (0, 2)}
    first, second = {(1, 3), (1, 4), (3, 4)}, {(2, 5), (2, 6), (5, 6)}
    assert edges(rows, shapes) == across | first | second
    # the row's number integrated out: its datum is joined to the top, not to the other row
    del shapes["z"]
    assert edges(rows, shapes) == {(0, i) for i in (1, 2, 3, 4)} | {(1, 2), (3, 4)}

    def summed():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z.sum(-1), 1.0))

    assert edges(summed, {"z": SIZE([2]), "x": SIZE()}) == {(0, 1), (0, 2), (1, 2)}


def test_point_masses_have_parents_and_children():
    def computed():
        a = pyro.sample("a", Normal(0.0, 1.0))
        b = pyro.sample("b", Delta(a**2))
        pyro.sample("c", Normal(b, 1.0))

    assert {(0, 1), (1, 2)} <= edges(computed, dict.fromkeys("abc", SIZE()))


def branch(a):
    return 1.0 if a > 0 else 0.0


def written(a):
    out = torch.zeros(2)
    out[0] = a
    return out.sum()


@pytest.mark.parametrize(
    "lost",
    [float, branch, written, torch.Tensor.item, lambda a: torch.tensor([a, a]).sum()],
    ids=["float", "branch", "written", "item", "tensor"],
)
def test_no_mask_where_dependencies_cannot_be_read(lost):
    def model():
        a = pyro.sample("a", Normal(0.0, 1.0))
        pyro.sample("b", Normal(torch.as_tensor(lost(a)), 1.0))

    with warnings.catch_warnings(), pytest.warns(UserWarning, match="model: takes drawn numbers"):
        warnings.filterwarnings("ignore", "To copy construct")
        assert moral_graph(model, (), {}, {"a": SIZE(), "b": SIZE()}) is None
    found = moral_graph(model, (), {}, {"a": SIZE(), "b": SIZE()}, {"b": ["a"]})
    assert found.all()


@pytest.mark.parametrize(("which", "edges"), [("sums", 36), ("pairs", 36), ("own", 12)])
def test_rows_that_know_each_other(which, edges):
    """A plate that joins rows all the same is no plate: by running sums, or the third to the second."""

    def model():
        with pyro.plate("rows", 3):
            a = pyro.sample("a", Normal(0.0, 1.0))
            mean = {"sums": a.flip(-1).cumsum(-1), "pairs": a[[0, 2, 2]], "own": a}[which]
            pyro.sample("b", Normal(mean, 1.0))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = moral_graph(model, (), {}, {"a": SIZE((3,)), "b": SIZE((3,))})
    assert int(found.sum()) == edges
    assert ["rows of plates ['rows']" in str(w.message) for w in caught] == [True] * (
        which != "own"
    )


def random_network(size, graph, depth):
    network = SiteTransformer(size, width=8, depth=depth, heads=2, graph=graph)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return network


def influence(network, conditioned):
    """Which outputs (rows) change with which inputs (columns)."""
    size = network.event_size
    values = torch.randn(size)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[conditioned] = True
    inputs = values + 0.7 * torch.cat([torch.zeros(1, size), torch.eye(size)])
    with torch.no_grad():
        out = network(inputs, torch.zeros(size + 1), inputs, mask.expand(size + 1, size))
    return (out[1:] != out[0]).mT


def test_given_sites_separate():
    """In a chain with a given link, neither side hears of the other, and each hears the link."""
    graph = torch.ones(5, 5).triu(-1).tril(1).bool()
    network = random_network(5, graph, depth=4)
    assert influence(network, []).all()
    found = influence(network, [2])
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[:2, :3] = expected[3:, 2:] = True
    expected[2, 2] = True
    assert torch.equal(found, expected)
    full = influence(random_network(5, None, depth=1), [2])
    assert full.all()


def test_few_blocks_reach_across_a_long_graph_and_no_further():
    graph = torch.ones(9, 9).triu(-1).tril(1).bool()
    network = random_network(9, graph, depth=3)
    assert influence(network, []).all()
    found = influence(network, [5])
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[:5, :6] = expected[6:, 5:] = True
    expected[5, 5] = True
    assert torch.equal(found, expected)


def test_detours_around_what_is_given():
    """A walk with a common parameter: two steps across, and all of the walk when the parameter is given."""
    graph = torch.ones(9, 9).triu(-1).tril(1).bool()
    graph[0], graph[:, 0] = True, True
    network = random_network(9, graph, depth=3)
    expected = torch.ones(9, 9, dtype=torch.bool)
    expected[0, 1:] = False
    assert torch.equal(influence(network, [0]), expected)
    assert influence(network, []).all()


def test_what_is_not_looked_at():
    network = random_network(3, None, 2)
    x, given = torch.randn(4, 3), torch.randn(4, 3)
    conditioned = torch.tensor([True, False, False]).expand(4, 3)
    nan = torch.tensor(math.nan)
    out = network(x, torch.zeros(4), given, conditioned)
    same = network(
        torch.where(conditioned, nan, x),
        torch.zeros(4),
        torch.where(conditioned, given, nan),
        conditioned,
    )
    assert torch.equal(out, same)


# --- programs, states, doors --------------------------------------------------------------------------


def mixed(x=None):
    share = pyro.sample("share", Dirichlet(torch.ones(3)))
    low = pyro.sample("low", Uniform(-1.0, 2.0))
    kind = pyro.sample("kind", Bernoulli(0.5))
    with pyro.plate("rows", 2):
        pyro.sample("x", Normal(low + kind + share[..., 0].unsqueeze(-1), 0.3), obs=x)


def test_supports_and_predictive():
    joint = untrained(mixed, observed=["x"], sites=["share", "low", "x"])
    given = {"x": torch.tensor([0.3, 0.9])}
    conditional = joint.condition(given)
    draws = conditional.sample((50,))
    assert torch.allclose(draws["share"].sum(-1), torch.ones(50))
    assert ((draws["low"] > -1) & (draws["low"] < 2)).all()
    assert conditional.log_prob(draws).isfinite().all()
    model = poutine.condition(mixed, given)
    found = Predictive(model, guide=conditional, num_samples=7, parallel=True)()
    assert found["low"].numel() == 7
    likelihood = joint.condition({"share": torch.tensor([0.2, 0.3, 0.5]), "low": torch.tensor(0.1)})
    assert likelihood.sample((5,))["x"].shape == (5, 2)
    everything = joint.condition({}).sample((5,))
    assert list(everything) == ["share", "low", "x"]
    assert joint()["x"].shape == (2,)


def test_state(tmp_path):
    joint = untrained(mixed, observed=["x"], sites=["share", "low", "x"])
    given = {"x": torch.tensor([0.3, 0.9])}
    checkpoint.save(tmp_path / "joint.safetensors", joint.state_dict())
    fresh = AutoJoint(mixed, observed=["x"], sites=["share", "low", "x"], denoiser=small)
    fresh.load_state_dict(checkpoint.load(tmp_path / "joint.safetensors"))
    assert torch.equal(fresh.graph, joint.graph)
    found = []
    for each in (joint, fresh):
        pyro.set_rng_seed(3)
        found.append(each.condition(given).sample((3,)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    other = AutoJoint(chain, denoiser=small)
    other.load_state_dict(joint.state_dict())
    with pytest.raises(ValueError, match="model: got 3 unconstrained coordinates, expected 5"):
        other.condition({"a": torch.tensor(0.0)})


def test_unlike_simulations(exact):
    with pytest.warns(UnreliableWarning, match="values: got values at a Mahalanobis distance"):
        exact.condition({"x": torch.tensor(60.0)})


def with_a_constant():
    fixed = pyro.sample("fixed", Delta(torch.tensor(2.0)))
    pyro.sample("a", Normal(fixed, 1.0))


def test_draws_have_the_precision_of_the_program():
    def double():
        a = pyro.sample("a", Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("b", Normal(a, 1.0))

    given = untrained(double).condition({"b": torch.tensor(1.0, dtype=torch.float64)})
    assert given.sample((2,))["a"].dtype == given()["a"].dtype == torch.float64


def test_bad_arguments():
    with pytest.raises(ValueError, match="model: got int"):
        AutoJoint(3)
    with pytest.raises(ValueError, match="graph: got 'yes'"):
        AutoJoint(chain, graph="yes")
    with pytest.raises(ValueError, match="conditions: got"):
        AutoJoint(chain, conditions={"prior": 1.0})
    with pytest.raises(ValueError, match=r"conditions: got .*joint or random"):
        AutoJoint(chain, conditions={"posterior": 1.0})
    with pytest.raises(ValueError, match=r"conditions\['joint'\]: got -1"):
        AutoJoint(chain, conditions={"joint": -1.0})
    with pytest.raises(ValueError, match="objective: got str"):
        AutoJoint(chain, objective="bound")
    with pytest.raises(ValueError, match=r"sites: got .*two or more"):
        AutoJoint(chain, sites=["a"]).simulate(50)
    with pytest.raises(ValueError, match=r"sites: got .*expected names"):
        AutoJoint(chain, sites=["a", "q"]).simulate(50)
    with pytest.raises(ValueError, match="site 'kind': got a discrete site"):
        AutoJoint(mixed).simulate(50)
    with pytest.raises(ValueError, match="denoiser: got a function that returned MLP"):
        AutoJoint(chain, denoiser=lambda size, graph: MLP(size)).simulate(50)
    with pytest.raises(ValueError, match="without simulations"):
        AutoJoint(chain).condition({"a": torch.tensor(0.0)})
    with pytest.raises(ValueError, match=r"graph: got sites \['q'\], expected names out of"):
        AutoJoint(chain, graph={"b": ["q"], "c": ["b"]}).simulate(50)
    with pytest.raises(ValueError, match="site 'fixed': got a latent that is the same in all"):
        untrained(with_a_constant)
    joint = untrained(chain)
    for wrong in ({"q": torch.tensor(0.0)}, dict.fromkeys("abc", torch.tensor(0.0))):
        with pytest.raises(ValueError, match="values: got sites"):
            joint.condition(wrong)
    with pytest.raises(ValueError, match="values: got list"):
        joint.condition([1.0])
    with pytest.raises(ValueError, match="site 'a': got 1 NaN"):
        joint.condition({"a": torch.tensor(math.nan)})
    positive = untrained(program, observed=["x"])
    with pytest.raises(ValueError, match="site 'scale': got a value outside of its support"):
        positive.condition({"scale": torch.tensor(-1.0)})
    with pytest.raises(ValueError, match=r"site 'z': got a value of shape \(3,\), expected \(2,\)"):
        positive.condition({"z": torch.zeros(3)})
    conditional = positive.condition({"x": torch.tensor(0.0)})
    with pytest.raises(ValueError, match=r"latents: got no value of \['z'\]"):
        conditional.log_prob({"scale": torch.tensor(1.0)})


def test_bad_networks():
    with pytest.raises(ValueError, match=r"graph: got .* symmetric"):
        SiteTransformer(2, width=8, heads=2, graph=torch.tensor([[True, True], [False, True]]))
    with pytest.raises(ValueError, match=r"graph: got \(3, 3\)"):
        SiteTransformer(2, width=8, heads=2, graph=torch.eye(3).bool())
    network = SiteTransformer(2, width=8, heads=2)
    x, level = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 4\)"):
        network(torch.zeros(3, 4), level, x, x.bool())
    with pytest.raises(ValueError, match=r"given: got shape \(1, 2\)"):
        network(x, level, x[:1], x.bool())
    with pytest.raises(ValueError, match="conditioned: got"):
        network(x, level, x, x)


def test_data_are_given_by_condition_and_not_by_a_call():
    """The call would draw from the joint distribution, whatever the data."""

    def model(x=None):
        pyro.sample("x", Normal(pyro.sample("z", Normal(0.0, 1.0)), 1.0), obs=x)

    joint = untrained(model, observed=["x"])
    with pytest.raises(ValueError, match=r"guide: got data of \['x'\], expected none"):
        joint(torch.tensor(1.0))
    assert set(joint()) == set(joint(None)) == {"x", "z"}
