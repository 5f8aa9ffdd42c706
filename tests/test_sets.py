"""AutoAmortized on plates: sets of any size and groups of any number, against closed forms."""

import functools
import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Delta,
    HalfNormal,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
)
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_diffusion import checkpoint
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.evaluate import importance_posterior
from pyro_diffusion.infer import AutoAmortized, UnreliableWarning
from pyro_diffusion.infer.simulators.hierarchical_flow import HierarchicalFlow
from pyro_diffusion.infer.simulators.hierarchical_posterior import Rows
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import fit_amortized

NOISE = 0.7


def grouped(x=None, mask=None, groups=6, data=4):
    """Means of groups around a common one, each seen through some data."""
    if x is not None:
        groups, data = x.shape[-2:]
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("groups", groups, dim=-2):
        local = pyro.sample("local", Normal(mean, 1.0))
        kept = poutine.mask(mask=True if mask is None else mask)
        with pyro.plate("data", data, dim=-1), kept:
            pyro.sample("x", Normal(local, NOISE), obs=x)


def one_each(x=None, scale=None, rows=8, mask=None):
    """As eight schools: a latent and a datum of known noise for every row."""
    rows = rows if x is None else x.shape[-1]
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    between = pyro.sample("between", HalfNormal(1.0))
    with pyro.plate("schools", rows), poutine.mask(mask=True if mask is None else mask):
        noise = pyro.sample("noise", LogNormal(0.0, 0.5), obs=scale)
        effect = pyro.sample("effect", Normal(mean, between + 0.1))
        pyro.sample("x", Normal(effect, noise), obs=x)


def small(latents, features):
    network = ConditionalMLP(latents, features, width=16, depth=1)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))


def untrained(model, observed=("x",), **options):
    """A guide with scales and a network of random numbers: its draws are arbitrary, not its contract."""
    pyro.set_rng_seed(0)
    options = {"solver": ODESolver("rk4", steps=10), **options}  # whose steps no batch-mate changes
    guide = AutoAmortized(model, observed=list(observed), denoiser=small, **options)
    guide.simulate(100)
    for parameter in guide.posterior.parameters():
        nn.init.normal_(parameter, std=0.2)
    return guide


def levels(model, observed=("x",), **options):
    """Names of plates, latents and observed sites of every level that is found."""
    guide = AutoAmortized(model, observed=list(observed), denoiser=small, **options)
    guide.simulate(30)
    return [(*level.plates[-1:], level.latents, level.observed) for level in guide._levels]


# --- structure ---------------------------------------------------------------------------------------


def test_plates_of_rows_are_found():
    assert levels(grouped) == [
        (("mean",), ()),
        ("groups", ("local",), ()),
        ("data", (), ("x",)),
    ]
    assert levels(one_each, ("noise", "x")) == [
        (("mean", "between"), ()),
        ("schools", ("effect",), ("noise", "x")),
    ]


def test_plates_entered_in_the_other_order():
    def inner_on_the_left(x=None, groups=6, data=4):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("groups", groups):
            local = pyro.sample("local", Normal(mean, 1.0))
            with pyro.plate("data", data):
                pyro.sample("x", Normal(local, NOISE), obs=x)

    found = levels(inner_on_the_left)
    assert [each[0] for each in found[1:]] == ["groups", "data"]


def below_data(w=None, u=None, x=None, mask=None):
    """Latents of rows that depend on data around them."""
    w = pyro.sample("w", Normal(pyro.sample("mean", Normal(0.0, 1.0)), 1.0), obs=w)
    kept = poutine.mask(mask=True if mask is None else mask)
    with pyro.plate("groups", 3, dim=-2):
        with kept:
            u = pyro.sample("u", Normal(w, 1.0), obs=u)
        with pyro.plate("data", 4, dim=-1), kept:
            pyro.sample("x", Normal(pyro.sample("local", Normal(w + u, 1.0)), 1.0), obs=x)


def test_latents_of_rows_are_given_the_data_around_them():
    """p(local | mean, w, u, x) is no function of its own row's x alone, nor of other groups' u."""
    guide = untrained(below_data, ("w", "u", "x"))
    assert [level.plates[-1:] for level in guide._levels] == [(), ("groups",), ("data",)]

    def context(w, u, mask=None):
        u = torch.tensor(u).unsqueeze(-1)
        data = {"w": torch.tensor(w), "u": u, "x": torch.zeros(3, 4), "mask": mask}
        return guide.posterior.contexts(guide._data((), data)[0])[2]

    before = context(0.0, [0.0, 0.0, 0.0])
    assert before.shape == (3, 4, 5)  # w, u, whether there is a u, x, whether there is an x
    assert bool((context(1.0, [0.0, 0.0, 0.0]) != before).any(-1).all())
    moved = (context(0.0, [0.0, 1.0, 0.0]) != before).any(-1)
    assert bool(moved[1].all()) and int(moved.sum()) == 4
    masked = context(0.0, [0.0, 5.0, 0.0], torch.tensor([[True], [False], [True]]))
    assert torch.equal(masked[1, :, 1:], torch.zeros(4, 4))
    assert torch.equal(masked[::2], before[::2])
    data = {"w": torch.zeros(2), "u": torch.zeros(2, 3, 1), "x": torch.zeros(2, 3, 4)}
    assert guide.draw(5, data)["local"].shape == (5, 2, 3, 4)
    loss = Trace_ELBO().loss(guide.training_model, lambda **_: None, **guide.simulate(5))
    assert math.isfinite(loss)


def rows_of_known_noise(x=None):
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", Normal(mean, torch.tensor([0.1, 1.0, 3.0])), obs=x)


def latents_that_meet(x=None):
    with pyro.plate("parts", 3):
        part = pyro.sample("part", Normal(0.0, 1.0))
        pyro.sample("y", Normal(part, 1.0))
    pyro.sample("x", Normal(part.sum(-1), 1.0), obs=x)


def rows_that_know_each_other(x=None):
    with pyro.plate("data", 3):
        part = pyro.sample("part", Normal(0.0, 1.0))
        pyro.sample("x", Normal(part.mean(-1, keepdim=True), 1.0), obs=x)


def a_walk(x=None):
    with pyro.plate("data", 4):
        part = pyro.sample("part", Normal(0.0, 1.0))
        pyro.sample("x", Delta(part.cumsum(-1)), obs=x)


def without_data(x=None):
    with pyro.plate("parts", 3):
        pyro.sample("part", Normal(0.0, 1.0))
    pyro.sample("x", Normal(0.0, 1.0), obs=x)


def of_one_row(x=None):
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("data", 1):
        pyro.sample("x", Normal(mean, 1.0), obs=x)


def crossed(x=None):
    first, second = pyro.plate("first", 3, dim=-1), pyro.plate("second", 4, dim=-2)
    with first:
        a = pyro.sample("a", Normal(0.0, 1.0))
    with second:
        b = pyro.sample("b", Normal(0.0, 1.0))
    with first, second:
        pyro.sample("x", Normal(a + b, 1.0), obs=x)


@pytest.mark.parametrize(
    "model",
    [
        rows_of_known_noise,
        latents_that_meet,
        rows_that_know_each_other,
        a_walk,
        without_data,
        of_one_row,
        crossed,
    ],
)
def test_plates_whose_rows_are_no_set_are_left_alone(model):
    assert len(levels(model)) == 1


def an_epidemic(x=None):
    """Counts on six days, which are all 0 in three of ten runs and tell nothing of the days there."""
    growth = pyro.sample("growth", Normal(1.0, 2.0))
    with pyro.plate("days", 6):
        pyro.sample("x", Binomial(100, logits=growth * 3 * torch.arange(6.0) - 18), obs=x)


def test_days_are_no_set_where_the_first_run_says_nothing_of_them():
    # eight runs of nothing: one seed of 15 000
    for seed in range(12):
        pyro.set_rng_seed(seed)
        assert len(levels(an_epidemic)) == 1


def test_point_masses_of_rows_alike_are_a_set():
    def model(x=None):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            noise = pyro.sample("noise", Normal(0.0, 1.0))
            pyro.sample("x", Delta(mean + noise.exp()), obs=x)

    assert levels(model, latents=["mean"]) == [(("mean",), ()), ("data", (), ("x",))]


def test_plates_may_be_named():
    assert len(levels(grouped, plates=())) == 1
    assert [each[0] for each in levels(grouped, plates=["groups"])[1:]] == ["groups"]
    for model, names, message in (
        (grouped, ["rooms"], r"plates: got \['rooms'\], expected names of plates out of"),
        (grouped, "groups", "plates: got 'groups'"),
        (without_data, ["parts"], "expected plates with observed sites"),
        (crossed, ["first", "second"], "which cross, expected nested"),
    ):
        with pytest.raises(ValueError, match=message):
            levels(model, plates=names)
    with pytest.raises(ValueError, match="summary: got Flatten for the rows of"):
        AutoAmortized(grouped, nn.Flatten(), plates=["groups"])


def test_latents_of_rows_that_share_an_unknown_are_refused():
    message = r"latents: got \['local'\] in plate 'groups' without 'mean', on which they depend"
    with pytest.raises(ValueError, match=message):
        levels(grouped, latents=["local"])

    def unrelated(x=None):
        pyro.sample("other", Normal(0.0, 1.0))
        mean = pyro.sample("mean", Normal(pyro.sample("above", Normal(0.0, 1.0)), 1.0))
        with pyro.plate("groups", 3):
            kind = pyro.sample("kind", Bernoulli(0.5))
            local = pyro.sample("local", Normal(mean + kind, 1.0))
            pyro.sample("x", Normal(local, 1.0), obs=x)

    found = levels(unrelated, latents=["mean", "local"])
    assert found == [(("mean",), ()), ("groups", ("local",), ("x",))]


# --- the posterior -----------------------------------------------------------------------------------


def toy_flow(batch=()):
    """A normal latent outside, one in each of three rows, in a vector where they are mixed up."""
    contexts = [torch.randn(*batch, 1), torch.randn(*batch, 3, 1)]
    places = [torch.tensor([2]), torch.tensor([[3], [0], [1]])]
    outer = lambda c: Normal(c.sum(-1, keepdim=True), 0.5).to_event(1)  # noqa: E731
    inner = lambda c: Normal(2 * c[..., :1] - c[..., 1:], 0.3).to_event(1)  # noqa: E731
    flow = HierarchicalFlow([outer, inner], contexts, places, [[], [(0, lambda z: z + 1)]])
    return flow, contexts


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_the_density_is_that_of_the_outer_and_of_every_row(batch):
    flow, contexts = toy_flow(batch)
    assert flow.batch_shape == batch and flow.event_shape == (4,)
    z = torch.randn(5, *batch, 4)
    expected = Normal(contexts[0], 0.5).log_prob(z[..., 2:3]).sum(-1)
    centre = 2 * (z[..., 2:3] + 1) - contexts[1].squeeze(-1)
    expected = expected + Normal(centre, 0.3).log_prob(z[..., [3, 0, 1]]).sum(-1)
    assert torch.allclose(flow.log_prob(z), expected, atol=1e-5)
    wide = flow.expand((5, *batch))
    assert wide.batch_shape == (5, *batch) and wide.sample().shape == z.shape
    assert torch.allclose(wide.log_prob(z), expected, atol=1e-5)


def test_draws_are_of_the_density():
    """20,000 draws; z-scores of 4 means and variances, and of a covariance, below 5 (5e-6 in all)."""
    flow, contexts = toy_flow()
    z = flow.sample((20_000,))
    a, rows = float(contexts[0]), contexts[1].squeeze(-1)
    variance = torch.tensor([0.25, *[4 * 0.25 + 0.09] * 3])
    mean = torch.cat([torch.tensor([a]), 2 * (a + 1) - rows])
    z = z[:, [2, 3, 0, 1]]
    assert ((z.mean(0) - mean) / (variance / 20_000).sqrt()).abs().max() < 5
    assert ((z.var(0) / variance - 1) / math.sqrt(2 / 20_000)).abs().max() < 5
    both = ((z[:, 1] - mean[1]) * (z[:, 2] - mean[2])).mean()
    assert abs(both - 1.0) < 5 * math.sqrt((1.09**2 + 1) / 20_000)


def exact_of_groups(x, mask):
    """The closed form: moments of the common mean and of every group's, and the log evidence."""
    here = mask.double()
    count = here.sum(-1)
    average = (x * here).sum(-1) / count.clamp(min=1)
    precision = 1 / (1 + NOISE**2 / count)
    total = 1 + precision.sum()
    centre, own = (precision * average).sum() / total, 1 / (count / NOISE**2 + 1)
    means = own * (count * average / NOISE**2 + centre)
    means, sds = (
        torch.cat([centre[None], means]),
        torch.cat([1 / total[None], own + own**2 / total]).sqrt(),
    )
    group = torch.arange(len(x)).repeat_interleave(x.shape[1])[mask.flatten()]
    covariance = 1.0 + (group[:, None] == group) + NOISE**2 * torch.eye(len(group))
    evidence = MultivariateNormal(torch.zeros(len(group)), covariance).log_prob(x[mask])
    return means, sds, evidence


@pytest.fixture(scope="module")
def fitted():
    """A guide after some hundred steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoAmortized(grouped, observed=["x"], denoiser=lambda *sizes: medium(*sizes))
    fit_amortized(guide, guide.simulate(2000), steps=500, batch_size=128, lr=5e-3, progress=False)
    return guide


def medium(latents, features):
    network = ConditionalMLP(latents, features, width=32, depth=2)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_one_guide_for_any_number_of_groups_and_data(fitted, groups):
    """Of one seed, four data sets: means within .25 sd on average, sds within a quarter on average.

    The evidence of 2000 weighted draws of one is within 4.5 of its standard errors (7e-6).
    """
    generator = torch.Generator().manual_seed(groups)
    off, wide = [], []
    for _ in range(4):
        x = torch.randn(groups, 4, generator=generator)
        x = x + torch.randn(groups, 1, generator=generator)
        mask = torch.arange(4) < torch.randint(1, 5, (groups, 1), generator=generator)
        means, sds, evidence = exact_of_groups(x, mask)
        unseen = torch.where(
            mask, x, math.nan
        )  # what a mask leaves out may be anything to the guide
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = fitted.get_posterior(unseen, mask).sample((3000,))
        assert draws.shape == (3000, 1 + groups)
        off.append(((draws.mean(0) - means) / sds).abs())
        wide.append((draws.std(0) / sds - 1).abs())
    assert torch.cat(off).mean() < 0.25
    assert torch.cat(wide).mean() < 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)  # of k-hat, where all else is right
        found = importance_posterior(grouped, fitted, x, mask, num_samples=2000)
    assert abs(found.log_evidence.value - evidence) < 4.5 * found.log_evidence.standard_error
    assert found.log_evidence.ess > 200
    assert found.draws["local"].shape == (2000, groups, 1)


def test_the_density_in_the_program_is_that_of_its_parts(fitted):
    x = torch.randn(3, 4)
    trace = poutine.trace(fitted).get_trace(x)
    drawn = {name: trace.nodes[name]["value"] for name in ("mean", "local")}
    assert drawn["local"].shape == (3, 1)
    assert torch.allclose(trace.log_prob_sum(), fitted.log_prob(drawn, x), atol=1e-4)


def test_rows_may_change_places():
    """And take their latents with them."""
    guide = untrained(grouped)
    x, mask = torch.randn(5, 4), torch.rand(5, 4) < 0.7
    order, inner = torch.randperm(5), torch.randperm(4)
    latents = {"mean": torch.randn(7), "local": torch.randn(7, 5, 1)}
    swapped = {"mean": latents["mean"], "local": latents["local"][:, order]}
    one = guide.log_prob(latents, x, mask)
    other = guide.log_prob(swapped, x[order][:, inner], mask[order][:, inner])
    assert torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, guide.log_prob(swapped, x, mask), atol=1e-2)


def test_a_rows_latents_follow_its_own_data():
    """Given the outer latents, no other group's data matter."""
    guide = untrained(grouped)
    x = torch.randn(3, 4)
    other = x.clone()
    other[2] += 1.0
    latents = {"mean": torch.tensor(0.3), "local": torch.randn(3, 1)}
    moved = {"mean": torch.tensor(0.3), "local": latents["local"] + torch.tensor([[0.5], [0], [0]])}
    gaps = [guide.log_prob(moved, y) - guide.log_prob(latents, y) for y in (x, other)]
    assert torch.allclose(*gaps, atol=1e-4)
    changed = x.clone()
    changed[0] += 1.0
    gap = guide.log_prob(moved, changed) - guide.log_prob(latents, changed)
    assert abs(gap - gaps[0]) > 1e-3


def test_rows_without_data_of_their_own():
    """A mask hides data and noise of a school, whose effect is then that of the other rows' hyperlatents."""
    guide = untrained(one_each, ("noise", "x"))
    x, noise = torch.randn(5), torch.rand(5) + 0.5
    mask = torch.tensor([True, True, False, True, True])
    latents = {"mean": torch.tensor(0.1), "between": torch.tensor(1.0), "effect": torch.randn(5)}
    hidden = x.clone()
    hidden[2] = math.nan
    one = guide.log_prob(latents, hidden, noise, mask=mask)
    assert one.isfinite()
    assert torch.equal(one, guide.log_prob(latents, x, noise, mask=mask))
    assert not torch.allclose(one, guide.log_prob(latents, x, noise))


def test_training_sees_no_data_of_rows_without():
    """As asking does not: what is left out there is not known."""
    guide = untrained(one_each, ("noise", "x"))
    rows = guide._rows(guide.simulate(20), torch.Size([20]), {})
    here = torch.rand(20, 8) < 0.5
    values = rows.values[1]
    other = tuple(torch.where(here.unsqueeze(-1), v, v + 3) for v in values)
    contexts = [
        guide.posterior.contexts(Rows((rows.values[0], each), (rows.present[0], here)))
        for each in (values, other)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*contexts, strict=True))


def test_observations_side_by_side():
    guide = untrained(grouped)
    x = torch.randn(7, 5, 3)
    drawn = guide(x)
    assert drawn["mean"].shape == (7, 1, 1) and drawn["local"].shape == (7, 5, 1)
    latents = {"mean": torch.randn(7), "local": torch.randn(7, 5, 1)}
    together = guide.log_prob(latents, x)
    alone = [guide.log_prob({n: z[i] for n, z in latents.items()}, x[i]) for i in range(7)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)

    def side_by_side(x):
        with pyro.plate("observations", len(x), dim=-3):
            return guide(x)

    draws = Predictive(side_by_side, num_samples=5, parallel=True)(x)
    assert draws["local"].shape == (5, 7, 5, 1)


def test_predictive_and_quantiles():
    guide = untrained(grouped)
    for groups in (2, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            draws = Predictive(grouped, guide=guide, num_samples=4, parallel=True)(
                torch.randn(groups, 3)
            )
            assert draws["local"].shape == (4, groups, 1)
            low, high = guide.quantiles([0.1, 0.9], torch.randn(groups, 3), num_samples=50)["local"]
        assert low.shape == (groups, 1) and (high > low).all()


def test_supports_of_rows():
    def model(x=None, rows=5):
        rows = rows if x is None else x.shape[-1]
        top = pyro.sample("top", Uniform(1.0, 2.0))
        with pyro.plate("rows", rows):
            share = pyro.sample("share", Uniform(-1.0, 1.0))
            pyro.sample("x", LogNormal(top * share, 1.0), obs=x)

    guide = untrained(model)
    for rows in (5, 2, 3):
        draws = Predictive(guide, num_samples=200, parallel=True)(
            LogNormal(0.0, 1.0).sample((rows,))
        )
        assert draws["share"].shape == (200, rows)
        assert ((draws["share"] > -1) & (draws["share"] < 1)).all()
    guide.training_model(**guide.simulate(20))
    at = torch.cartesian_prod((torch.arange(60) + 0.5) / 60 + 1, (torch.arange(60) + 0.5) / 30 - 1)
    latents = {"top": at[:, 0], "share": at[:, 1:]}
    total = guide.log_prob(latents, torch.tensor([0.8])).exp().mean() * 2
    assert abs(total - 1) < 0.02


def test_svi_trains_every_level():
    """A step that sees one row of every set says nothing of how rows are weighed; of 20, one sees more."""
    guide = untrained(grouped)
    before = {name: p.clone() for name, p in guide.named_parameters()}
    svi = SVI(guide.training_model, lambda **_: None, Adam({"lr": 1e-3}), Trace_ELBO())
    assert all(math.isfinite(svi.step(**guide.simulate(50))) for _ in range(20))
    assert all(not torch.equal(before[name], p) for name, p in guide.named_parameters())


def test_few_rows_are_seen_at_several_noise_levels():
    """Latents outside of plates as often as those of rows, which count by their mean."""
    guide = untrained(grouped)
    trace = poutine.trace(guide.training_model).get_trace(**guide.simulate(20))
    for name in ("latents_", "latents_groups"):
        node = trace.nodes[name]
        rows = node["value"].shape[1]
        assert rows in ((4,) if name == "latents_" else (3, 4))
        assert node["scale"] == 1 / rows
    outside = trace.nodes["latents_"]["value"]
    assert torch.equal(outside, outside[:, :1].expand(outside.shape))


def test_training_sees_all_sizes():
    guide = untrained(grouped)
    data = guide._rows(guide.simulate(200), torch.Size([200]), {})
    groups, counts = set(), set()
    for _ in range(100):
        rows = guide.posterior.thinned(data)
        groups.add(rows.present[1].shape[-1])
        counts |= set(rows.present[2].sum(-1).flatten().tolist())
    assert groups == set(range(1, 7)) and counts == set(range(5))


@pytest.mark.parametrize("kind", ["torch", "checkpoint"])
def test_a_fresh_guide_takes_the_state(kind, tmp_path):
    """Even if its first data are of one row, of which no plate could be found out."""
    guide = untrained(grouped)
    if kind == "torch":
        torch.save(guide.state_dict(), tmp_path / "guide.pt")
        state = torch.load(tmp_path / "guide.pt", weights_only=True)
    else:
        checkpoint.save(tmp_path / "guide.safetensors", guide.state_dict())
        state = checkpoint.load(tmp_path / "guide.safetensors")
    fresh = AutoAmortized(
        grouped, observed=["x"], denoiser=small, solver=ODESolver("rk4", steps=10)
    )
    fresh.load_state_dict(state)
    for x in (torch.randn(1, 1), torch.randn(4, 2)):
        drawn = []
        for each in (guide, fresh):
            pyro.set_rng_seed(1)
            drawn.append(each(x))
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    other = AutoAmortized(one_each, observed=["noise", "x"], denoiser=small)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="those of the state that was loaded"):
        other(torch.randn(3), torch.ones(3))


# --- data that are not as expected -------------------------------------------------------------------


def test_bad_data():
    guide = untrained(grouped)
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"site 'x'.*NaN"):
        guide(x.masked_fill(torch.rand(5, 4) < 0.5, math.nan))
    with pytest.raises(ValueError, match="site 'x': got no data"):
        guide()
    guide = untrained(functools.partial(fixed_size, size=3))
    with pytest.raises(ValueError, match=r"site 'x': got data of shape \(4,\), expected \(3,\)"):
        guide(torch.randn(4))

    def positive(x=None):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", LogNormal(mean, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'x': got -1 as least value, expected positive"):
        untrained(positive)(-torch.ones(3))


def fixed_size(x=None, size=3):
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", Normal(mean, 1.0), obs=x)


def test_more_rows_than_in_training_are_told():
    guide = untrained(grouped)
    with pytest.warns(UnreliableWarning, match="plate 'groups': got 7 rows, expected at most 6"):
        guide(torch.randn(7, 4) * 0.5)
    with pytest.warns(UnreliableWarning, match="plate 'data': got 5 rows, expected at most 4"):
        guide(torch.randn(3, 5) * 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(torch.randn(6, 4) * 0.5)
        guide(torch.randn(6, 5) * 0.5, torch.arange(5).expand(6, 5) < 4)  # four data, one pad


def test_unlike_data_are_told():
    guide = AutoAmortized(grouped, observed=["x"], denoiser=small)
    guide.simulate(4000)
    with pytest.warns(UnreliableWarning, match="data: got data at a Mahalanobis distance"):
        guide.get_posterior(torch.randn(3, 4) + 30)
    with pytest.warns(UnreliableWarning, match="data: got 1 of 2 observations"):
        guide.get_posterior(torch.stack([torch.randn(3, 4), 40 * torch.randn(3, 4)]))


def test_latents_of_varying_dimension_outside_of_plates_are_refused():
    def growing(x=None):
        size = int(torch.randint(2, 1000, ()))
        with pyro.plate("parts", size):
            pyro.sample("part", Categorical(torch.ones(2)))
            value = pyro.sample("value", Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", Normal(value.sum(-1, keepdim=True), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site '(part|value)': got shapes"):
        AutoAmortized(growing, observed=["x"], latents=["value"]).simulate(30)


def test_masks_are_of_whole_rows():
    def pairs(x=None, mask=None, rows=4):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("data", rows):
            with poutine.mask(mask=True if mask is None else mask):
                pyro.sample("x", Normal(mean, 1.0), obs=None if x is None else x[0])
            pyro.sample("y", Normal(mean, 1.0), obs=None if x is None else x[1])

    guide = untrained(pairs, ("x", "y"))
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="site 'y': got a mask that leaves out part of a row"):
        guide(x, torch.tensor([True, False, True, True]))
