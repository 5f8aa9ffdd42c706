"""Expected coverage and the local classifier test: right posteriors pass, wrong ones do not."""

import math

import pyro
import pytest
import torch
from matplotlib.axes import Axes
from pyro.distributions import LogNormal, Normal

from pyro_diffusion import plotting
from pyro_diffusion.evaluate import local_c2st, sbc, tarp
from pyro_diffusion.evaluate.calibration import RankStatistics
from pyro_diffusion.infer import AutoAmortized
from tests.test_calibration import posterior, program

AT = {"y": torch.tensor([0.5, -1.0])}


def prior(data):
    return {"x": torch.randn(39, 2)}


def prior_references(data):
    return {"x": torch.randn(2)}


def one_sided(data):
    """Right marginals of a wrong joint: the coordinates of each draw agree."""
    z = torch.randn(39, 1)
    return {"x": data["y"] / 1.25 + math.sqrt(0.2) * z}


def uninformative(y=None):
    """A program whose posterior is its prior."""
    pyro.sample("x", Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", Normal(torch.zeros(2), 0.5).to_event(1), obs=y)


# --- expected coverage ------------------------------------------------------------------------------


@pytest.mark.parametrize("references", [None, prior_references])
def test_exact_posterior_covers(references):
    """p above 0.005, where a right posterior is one time in two hundred (the seed is fixed)."""
    found = tarp(program, posterior(), num_simulations=1000, parallel=True, references=references)
    assert set(found.ranks) == {"distance"}
    assert found.ranks["distance"].shape == (1000,)
    assert found.p_value() > 0.005


@pytest.mark.parametrize("wrong", [{"shift": 0.5}, {"scale": 1.3}, {"scale": 0.75}])
def test_wrong_posterior_does_not_cover(wrong):
    found = tarp(program, posterior(**wrong), num_simulations=1000, parallel=True)
    assert found.p_value() < 1e-4


def test_side_of_the_diagonal():
    """At a credibility of 0.9, 1000 simulations; a binomial error is 0.01."""
    wide = tarp(program, posterior(scale=1.4), num_simulations=1000, parallel=True)
    narrow = tarp(program, posterior(scale=0.7), num_simulations=1000, parallel=True)
    assert wide.ecdf("distance")[35] > 0.95
    assert narrow.ecdf("distance")[35] < 0.85


def test_what_marginals_do_not_show():
    """Ranks of coordinates pass right marginals of a wrong joint; distances do not."""
    assert sbc(program, one_sided, num_simulations=1000, parallel=True).p_value() > 0.005
    assert tarp(program, one_sided, num_simulations=1000, parallel=True).p_value() < 1e-6


def test_the_prior_is_found_out_by_reference_points_that_know_the_data():
    blind = tarp(program, prior, num_simulations=500, parallel=True, references=prior_references)
    assert blind.p_value() > 0.005
    assert tarp(program, prior, num_simulations=500, parallel=True).p_value() < 1e-6
    right = tarp(uninformative, prior, num_simulations=500, parallel=True, observed=["y"])
    assert right.p_value() > 0.005


def test_latents_of_any_scale_and_shape():
    """A scale a million times another's, and a plate: p above 0.005 if exact, far below if one is off."""

    def model(y=None):
        small = pyro.sample("small", Normal(0.0, 1e-3))
        with pyro.plate("n", 3):
            large = pyro.sample("large", Normal(0.0, 1e3))
            pyro.sample("y", Normal(0 * (small + large), 1.0), obs=y)

    def answer(spread):
        def draws(data):
            return {
                "small": Normal(0.0, spread * 1e-3).sample((39,)),
                "large": Normal(0.0, 1e3).sample((39, 3)),
            }

        return draws

    options = {"num_simulations": 500, "observed": ["y"], "parallel": True}
    assert tarp(model, answer(1.0), **options).p_value() > 0.005
    assert tarp(model, answer(3.0), **options).p_value() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": "prior"}, "references: got str"),
        ({"references": lambda data: {}}, "references: got a point of shapes"),
        ({"references": lambda data: torch.zeros(1)}, "references: got Tensor, expected a dict"),
        ({"references": lambda data: {"x": torch.zeros(3)}}, "references: got a point of shapes"),
        ({"num_references": 3}, "num_references: got 3"),
    ],
)
def test_bad_references(options, message):
    with pytest.raises(ValueError, match=message):
        tarp(program, posterior(), num_simulations=20, **options)


# --- the local test ---------------------------------------------------------------------------------

QUICK = {"num_simulations": 300, "num_permutations": 49, "iterations": 40, "hidden": 16}


def test_false_alarms_of_the_local_test():
    """40 exact posteriors: p <= 0.1 at most ten times (binomial: exceeded 1 in 680)."""
    quick = {"num_simulations": 60, "num_permutations": 19, "iterations": 15, "hidden": 8}
    found = [
        local_c2st(program, posterior(), AT, parallel=True, **quick).p_value for _ in range(40)
    ]
    assert min(found) >= 1 / 20
    assert sum(p <= 0.1 for p in found) <= 10


@pytest.mark.parametrize("wrong", [{"shift": 0.4}, {"scale": 0.5}, {"scale": 1.8}])
def test_the_local_test_finds_a_wrong_posterior(wrong):
    found = local_c2st(program, posterior(400, **wrong), AT, parallel=True, **QUICK)
    assert found.p_value == 1 / 50
    assert found.statistic > found.null.max()
    assert str(found).endswith("(p = 0.02)")


def test_scales_know_no_label(monkeypatch):
    """Exact and proposed latents that change places leave the rows that classifiers see as they are."""
    seen = []

    def note(told, *_):
        seen.append(torch.cat(told))
        return torch.zeros(20)

    monkeypatch.setattr("pyro_diffusion.evaluate.local_two_sample._statistics", note)
    far = {"x": torch.arange(80.0).reshape(40, 2)}
    local_c2st(program, lambda data: far, AT, parallel=True, num_simulations=100)
    latents = seen[0][:, :2]
    low, middle, high = latents.quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
    assert torch.allclose(middle, torch.zeros(2).double(), atol=1e-6)
    assert torch.allclose(high - low, torch.ones(2).double(), atol=1e-6)


def test_the_local_test_is_local():
    """Wrong where y_0 > 0 alone: the statistic there is several times that on the other side."""

    def half(data):
        shift = 0.8 * (data["y"][0] > 0).float()
        return {"x": Normal(data["y"] / 1.25 + shift, math.sqrt(0.2)).sample((400,))}

    options = {**QUICK, "num_simulations": 1000, "num_permutations": 10, "iterations": 100}
    there, here = (
        local_c2st(program, half, {"y": torch.tensor([at, 0.0])}, parallel=True, **options)
        for at in (1.5, -1.5)
    )
    assert there.statistic > 5 * here.statistic
    assert there.p_value == 1 / 11


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        ({}, r"observations: got no value of \['y'\]"),
        ({"y": torch.zeros(3)}, r"observations\['y'\]: got shape \(3,\)"),
        ({"y": 3.0}, r"observations\['y'\]"),
        ({"y": torch.full((2,), math.nan)}, r"observations\['y'\]: got 2 NaN"),
        (torch.tensor(3.0), "observations: got Tensor, expected a dictionary"),
    ],
)
def test_bad_observations(observations, message):
    with pytest.raises(ValueError, match=message):
        local_c2st(program, posterior(), observations, **QUICK)


# --- an amortized guide, asked itself ---------------------------------------------------------------


def test_a_guide_is_a_posterior(monkeypatch):
    """Its draws are those of its flow, many observations a call, ranked as any others."""

    def model(x=None):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            scale = pyro.sample("scale", LogNormal(0.0, 1.0))
            pyro.sample("x", Normal(mean, scale), obs=x)

    guide = AutoAmortized(model, observed=["x"])
    guide.simulate(100)
    calls = []
    drawn = AutoAmortized.draw

    def recorded(self, num_samples, data):
        out = drawn(self, num_samples, data)
        assert bool((out["scale"] > 0).all())
        calls.append({name: tuple(value.shape) for name, value in out.items()})
        return out

    monkeypatch.setattr(AutoAmortized, "draw", recorded)
    ranks = sbc(model, guide, num_simulations=20, num_samples=9)
    assert ranks.num_samples == 9
    assert set(ranks.ranks) == {"mean", "scale[0]", "scale[1]", "scale[2]"}
    assert calls == [{"mean": (9, 20), "scale": (9, 20, 3)}]
    assert set(tarp(model, guide, num_simulations=20, num_references=20).ranks) == {"distance"}
    x = torch.zeros(3)
    quick = {"num_simulations": 20, "num_permutations": 10, "iterations": 2, "num_samples": 7}
    assert 0 < local_c2st(model, guide, {"x": x}, **quick).p_value <= 1
    pyro.set_rng_seed(0)
    first = drawn(guide, 5, {"x": x})
    pyro.set_rng_seed(0)
    with torch.no_grad():
        data, batch = guide._data_of({"x": x})
        flow = guide._posterior(data, batch, batch).sample((5,))
    torch.testing.assert_close(first["mean"], flow[..., 0])
    torch.testing.assert_close(first["scale"], flow[..., 1:].exp())
    with pytest.raises(ValueError, match="site 'x': got no data"):
        guide.draw(5, {})
    with pytest.raises(ValueError, match="observations: got Tensor, expected a dictionary"):
        guide.draw(5, x)
    with pytest.raises(ValueError, match=r"site 'x': got data of shape \(0,.*one observation"):
        guide.draw(5, {"x": x.new_zeros(0, *x.shape)})
    with pytest.raises(ValueError, match="draw: got a guide without simulations"):
        AutoAmortized(model).draw(5, {"x": x})


# --- pictures and ArviZ -----------------------------------------------------------------------------


def test_coverage_curve():
    ranks = torch.randint(100, (300,))
    ax = plotting.coverage_curve(ranks, 99)
    assert isinstance(ax, Axes)
    curve = ax.lines[1].get_ydata()
    assert len(curve) == 99
    assert curve[-1] == pytest.approx(float((ranks < 99).double().mean()))
    ax.figure.draw_without_rendering()
    with pytest.raises(ValueError, match="ranks"):
        plotting.coverage_curve(torch.tensor([5]), 4)
    with pytest.raises(ValueError, match="ranks: got values that are not whole"):
        plotting.coverage_curve(torch.tensor([0.5]), 4)


def test_null_histogram():
    ax = plotting.null_histogram(0.3, torch.rand(50), bins=5)
    assert sum(patch.get_height() for patch in ax.patches) == 50
    ax.figure.draw_without_rendering()
    with pytest.raises(ValueError, match="null: got shape"):
        plotting.null_histogram(0.3, torch.zeros(0))
    with pytest.raises(ValueError, match="statistic: got nan"):
        plotting.null_histogram(math.nan, torch.rand(5))


def test_ranks_for_arviz():
    data = RankStatistics({"x[0]": torch.arange(40) % 10}, 9).to_arviz()
    values = data["prior_sbc"]["x[0]"].values
    assert values.shape == (1, 40)
    assert values[0, :10] == pytest.approx([0.05 + k / 10 for k in range(10)])


@pytest.mark.parametrize("answer", [torch.zeros(99), {"x": torch.tensor(0.0)}])
def test_posteriors_that_return_no_draws(answer):
    with pytest.raises(ValueError, match=r"posterior: got .*expected a dictionary of draws"):
        sbc(program, lambda data: answer, num_simulations=10, observed=["y"])
