"""Calibration by simulation and the classifier test: uniform where they must be, alarmed where not."""

import math

import pyro
import pytest
import torch
from matplotlib.axes import Axes
from pyro.distributions import Bernoulli, Normal
from scipy import stats

from pyro_diffusion import plotting
from pyro_diffusion.evaluate import c2st, sbc
from pyro_diffusion.evaluate.calibration import RankStatistics


def program(y=None):
    """A conjugate pair in two dimensions."""
    x = pyro.sample("x", Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", Normal(x, 0.5).to_event(1), obs=torch.zeros(2) if y is None else y)


def posterior(draws=39, shift=0.0, scale=1.0):
    """Its posterior, made wrong on demand."""

    def exact(data):
        mean, spread = data["y"] / 1.25 + shift, scale * math.sqrt(0.2)
        return {"x": Normal(mean, spread).sample((draws,))}

    return exact


def test_exact_posterior_gives_uniform_ranks():
    """Both p-values above 0.005; a right posterior fails one time in a hundred (the seed is fixed)."""
    ranks = sbc(program, posterior(), num_simulations=1000, parallel=True)
    assert set(ranks.ranks) == {"x[0]", "x[1]"}
    assert ranks.num_samples == 39
    for name, values in ranks.ranks.items():
        assert values.shape == (1000,)
        assert values.min() == 0 and values.max() == 39
        assert ranks.p_value(name) > 0.005
    assert ranks.p_value() == min(1, 2 * min(ranks.p_value(n) for n in ranks.ranks))


@pytest.mark.parametrize("wrong", [{"shift": 0.15}, {"scale": 1.3}, {"scale": 0.75}])
def test_wrong_posterior_is_found(wrong):
    ranks = sbc(program, posterior(**wrong), num_simulations=1000, parallel=True)
    assert ranks.p_value() < 1e-4
    low, high = ranks.envelope(0.99, num_simulations=500)
    assert not bool(((ranks.ecdf("x[0]") >= low) & (ranks.ecdf("x[0]") <= high)).all())


def test_prior_passes_unless_a_quantity_reads_the_data():
    """The known blind spot, and its remedy."""

    def prior(data):
        return {"x": torch.randn(39, 2)}

    def fit(sites):
        return Normal(sites["x"], 0.5).log_prob(sites["y"]).sum(-1)

    assert sbc(program, prior, num_simulations=500, parallel=True).p_value() > 0.005
    seen = sbc(program, prior, num_simulations=500, parallel=True, quantities={"fit": fit})
    assert set(seen.ranks) == {"fit"}
    assert seen.p_value() < 1e-6


def test_ties_are_broken_at_random():
    """A coin's posterior: with ties ranked low, 0 and L alone would be hit."""

    def coin():
        x = pyro.sample("x", Bernoulli(0.3))
        pyro.sample("y", Normal(x, 1.0), obs=torch.tensor(0.0))

    def exact(data):
        odds = Normal(1.0, 1.0).log_prob(data["y"]) - Normal(0.0, 1.0).log_prob(data["y"])
        return {"x": Bernoulli(logits=odds + math.log(3 / 7)).sample((19,))}

    ranks = sbc(coin, exact, num_simulations=1000)
    assert len(ranks.ranks["x"].unique()) == 20
    assert ranks.p_value() > 0.005


def test_thinning_and_plates():
    def plated():
        with pyro.plate("n", 3):
            x = pyro.sample("x", Normal(0.0, 1.0))
            pyro.sample("y", Normal(x, 0.5), obs=torch.zeros(3))

    def sticky(data):
        draws = Normal(data["y"] / 1.25, math.sqrt(0.2)).sample((19,))
        return {"x": draws.repeat_interleave(5, 0), "y": torch.zeros(95, 3)}

    ranks = sbc(plated, sticky, num_simulations=400, thin=5)
    assert ranks.num_samples == 19
    assert ranks.p_value() > 0.005
    assert sbc(plated, sticky, num_simulations=400).p_value(bins=32) < 1e-3


def test_chi_square_by_hand():
    """Against scipy, with as many ranks as bins, and uneven bins by their expected counts."""
    ranks = torch.randint(4, (200,))
    table = RankStatistics({"x": ranks}, num_samples=3)
    assert table.p_value("x", bins=4) == pytest.approx(stats.chisquare(ranks.bincount()).pvalue)
    ends = torch.stack([(ranks < 2).sum(), (ranks == 2).sum(), (ranks == 3).sum()])
    expected = stats.chisquare(ends, [100, 50, 50]).pvalue
    assert table.p_value("x", bins=3) == pytest.approx(expected)


def test_envelope_holds_simultaneously():
    """300 sets of uniform ranks: 95% of whole curves inside, within 4 binomial errors (1 in 15 000)."""
    n, size = 200, 20
    low, high = RankStatistics({"x": torch.zeros(n, dtype=torch.long)}, size - 1).envelope(0.95)
    assert low.shape == high.shape == (size - 1,)
    inside = 0
    for _ in range(300):
        curve = RankStatistics({"x": torch.randint(size, (n,))}, size - 1).ecdf("x")
        inside += bool(((curve >= low) & (curve <= high)).all())
    # Discrete limits cover a little more than asked.
    assert -4 * 0.0126 < inside / 300 - 0.95 < 4 * 0.0126


def test_runs_repeat_with_the_seed():
    pyro.set_rng_seed(3)
    first = sbc(program, posterior(), num_simulations=20)
    pyro.set_rng_seed(3)
    again = sbc(program, posterior(), num_simulations=20)
    assert all(torch.equal(first.ranks[k], again.ranks[k]) for k in first.ranks)


def subsampled():
    x = pyro.sample("x", Normal(0.0, 1.0))
    with pyro.plate("data", 20, subsample_size=5):
        pyro.sample("y", Normal(x, 1.0), obs=torch.zeros(5))


def bad_factor():
    x = pyro.sample("x", Normal(0.0, 1.0))
    pyro.sample("y", Normal(x, 1.0), obs=torch.tensor(0.0))
    pyro.factor("tilt", -x)


@pytest.mark.parametrize(
    ("model", "inference", "options", "message"),
    [
        (bad_factor, posterior(), {}, "pyro.factor"),
        (subsampled, posterior(), {}, "plate 'data': got a subsample of 5 of 20"),
        (lambda: pyro.sample("x", Normal(0.0, 1.0)), posterior(), {}, "observed: got"),
        (program, posterior(), {"observed": ["z"]}, "observed: got"),
        (program, lambda data: {"x": torch.zeros(5, 3)}, {}, "posterior: got shapes"),
        (program, lambda data: {}, {}, "posterior: got shapes"),
        (program, lambda data: {"x": torch.full((5, 2), math.nan)}, {}, "posterior: x"),
        (program, lambda data: {"x": torch.zeros(torch.randint(1, 9, ()), 2)}, {}, "same number"),
        (program, posterior(), {"num_simulations": 3}, "num_simulations: got"),
        (program, posterior(), {"thin": 0}, "thin: got"),
    ],
)
def test_bad_calibration_input(model, inference, options, message):
    with pytest.raises(ValueError, match=message):
        sbc(model, inference, **{"num_simulations": 30, **options})


def test_bad_questions():
    table = RankStatistics({"x": torch.arange(10)}, 9)
    with pytest.raises(ValueError, match="name: got"):
        table.p_value("y")
    with pytest.raises(ValueError, match="bins: got"):
        table.p_value("x", bins=11)
    with pytest.raises(ValueError, match="level: got"):
        table.envelope(1.0)


def test_rank_histogram():
    ax = plotting.rank_histogram(torch.randint(100, (500,)), 99)
    assert isinstance(ax, Axes)
    heights = [patch.get_height() for patch in ax.containers[1]]
    assert sum(heights) == 500
    with pytest.raises(ValueError, match="ranks: got"):
        plotting.rank_histogram(torch.tensor([5]), 4)
    with pytest.raises(ValueError, match="bins: got"):
        plotting.rank_histogram(torch.tensor([1]), 4, bins=6)


# --- the classifier test --------------------------------------------------------------------------


def test_alike_samples_are_not_told_apart():
    """40 pairs of one law: p < 0.05 at most six times (exceeded 1 in 70)."""
    alarms = [
        c2st(torch.randn(60, 2), torch.randn(40, 2), iterations=60).p_value < 0.05
        for _ in range(40)
    ]
    assert sum(alarms) <= 6


@pytest.mark.parametrize("event", [(), (1,), (3,), (1, 2, 2)])
def test_different_means_reach_the_bayes_accuracy(event):
    """Two normals 2 apart in one coordinate are told apart with probability Phi(1) = 0.841 at best."""
    x, y = torch.randn(400, *event), torch.randn(400, *event)
    y.view(400, -1)[:, 0] += 2
    test = c2st(x, y, iterations=150)
    assert abs(test.accuracy - 0.841) < 4 * test.standard_error
    assert test.p_value < 1e-6
    assert str(test).startswith("0.")


def test_a_difference_that_no_marginal_shows():
    """Correlation of either sign: only the joint law differs."""
    z = torch.randn(500, 2)
    x = torch.stack([z[:, 0], 0.8 * z[:, 0] + 0.6 * z[:, 1]], -1)
    z = torch.randn(500, 2)
    y = torch.stack([z[:, 0], -0.8 * z[:, 0] + 0.6 * z[:, 1]], -1)
    assert c2st(x, y, iterations=150).accuracy > 0.7


def test_uneven_sizes_do_not_pass_for_skill():
    test = c2st(torch.randn(300, 2), torch.randn(60, 2), iterations=60)
    assert abs(test.accuracy - 0.5) < 4 * test.standard_error


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(20, 2), torch.zeros(20, 3), {}, "x, y: got shapes"),
        (torch.zeros(20, 2), torch.zeros(9, 2), {}, "x, y: got shapes"),
        (torch.full((20, 2), math.nan), torch.zeros(20, 2), {}, "x: got"),
        (torch.zeros(20, 2), torch.zeros(20, 2), {"folds": 1}, "folds: got"),
    ],
)
def test_bad_samples(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        c2st(x, y, **options)
