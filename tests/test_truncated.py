"""Truncated rounds: simulations from the prior where the posterior of one observation is."""

import math
import warnings

import pyro
import pytest
import torch
from pyro.distributions import Bernoulli, Gamma, Normal, Uniform

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.infer import AutoAmortized, UnreliableWarning
from pyro_diffusion.infer.simulators.simulations import find_sites
from pyro_diffusion.infer.simulators.truncation import Box, draw_prior, simulate_within
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import fit_amortized, fit_truncated

NOISE = 0.01
GAIN = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
X = torch.tensor([0.5, -1.0])
PROCESS = GaussianProcess(LogLinear(12.0, -8.0))
QUIET = {"progress": False}


def narrow(x=None):
    theta = pyro.sample("theta", Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", Normal(theta @ GAIN.mT, NOISE).to_event(1), obs=x)


def tiny(latents, features):
    return GaussianDenoiser(ConditionalMLP(latents, features, width=32, depth=1), PROCESS)


# --- boxes -------------------------------------------------------------------------------------------


def test_a_box_holds_its_draws_and_few_others():
    """New draws outside of an unwidened box of 1000 of 3 coordinates: 2 * 3 / 1001 at most, on average.

    Of 20 boxes with 2000 draws each, within 5 sd of it.
    """
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.99, 0.1, 0.0], [5.0, 0.0, 20.0]])
    shares = []
    for _ in range(20):
        draws, other = ((torch.randn(n, 3) @ factor.mT) for n in (1000, 2000))
        box = Box.around(draws, 0.2)
        assert bool(box.holds(draws, margin=False).all())
        assert bool((box.holds(other) | ~box.holds(other, margin=False)).all())
        shares.append(1 - float(box.holds(other, margin=False).double().mean()))
    expected = 6 / 1001
    assert abs(sum(shares) / 20 - expected) < 5 * expected / math.sqrt(20 * 6)


def test_a_box_turns_with_its_draws():
    """Along the diagonal of two numbers that are nearly one, it is thin."""
    draws = torch.randn(1000, 1) + 0.01 * torch.randn(1000, 2)
    box = Box.around(draws, 0.2)
    assert bool(box.holds(torch.tensor([2.0, 2.0])))
    assert not bool(box.holds(torch.tensor([1.0, -1.0])))


def test_a_box_is_widened():
    draws = torch.linspace(0, 1, 1000).unsqueeze(-1)
    box = Box.around(draws, 0.2)
    inside = box.holds(torch.tensor([[-0.21], [-0.19], [0.5], [1.19], [1.21]]))
    assert inside.tolist() == [False, True, True, True, False]


# --- the cut prior -----------------------------------------------------------------------------------

RUNS = []


def one_by_one(x=None):
    a = pyro.sample("a", Normal(0.0, 1.0))
    shift = 1.0 if float(a) > 0 else -1.0
    RUNS.append(a)
    pyro.sample("x", Normal(a + shift, 0.1), obs=x)


def sites(program, latents):
    return find_sites(program, (), {}, latents, ["x"], None)


def test_the_prior_is_drawn_without_simulating():
    def program(x=None):
        theta = pyro.sample("theta", Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("two", 2):
            rate = pyro.sample("rate", Gamma(2.0, 1.0))
        RUNS.append(1)
        pyro.sample("x", Normal(theta.sum(-1), rate.sum(-1) + 1), obs=x)

    for vectorized in (True, False):
        simulator = find_sites(program, (), {}, None, ["x"], vectorized)
        RUNS.clear()
        drawn = draw_prior(simulator, 7, (), {})
        assert drawn["theta"].shape == drawn["rate"].shape == (7, 2)
        assert not RUNS


def test_the_cut_prior_is_the_prior_inside():
    """Nuisances before the latent are kept with it: given a, shift is normal around a / 1.01.

    4000 draws, z-scores below 5 (1e-6 in all); the share inside is that of the normal.
    """

    def program(x=None):
        shift = pyro.sample("shift", Normal(0.0, 1.0))
        a = pyro.sample("a", Normal(shift, 0.1))
        x = pyro.sample("x", Normal(torch.stack([shift, a], -1), 1e-3).to_event(1), obs=x)

    simulator = sites(program, ["a"])
    assert simulator.vectorized
    values, tried = simulate_within(
        simulator, 4000, (), {}, lambda v: (v["a"] > 1.0) & (v["a"] < 1.2), 10**6
    )
    a, x = values["a"], values["x"]
    assert a.shape == (4000,)
    assert x.shape == (4000, 2)
    assert float(a.min()) >= 1.0 and float(a.max()) <= 1.2
    assert float((x[:, 1] - a).abs().max()) < 0.01
    residual = x[:, 0] - a / 1.01
    sd = (0.01 / 1.01 + 1e-6) ** 0.5
    assert abs(float(residual.mean())) < 5 * sd / 4000**0.5
    assert abs(float(residual.std()) / sd - 1) < 5 / 8000**0.5
    law = Normal(0.0, 1.01**0.5)
    share = float(law.cdf(torch.tensor(1.2)) - law.cdf(torch.tensor(1.0)))
    assert abs(4000 / tried - share) < 5 * (share * (1 - share) / tried) ** 0.5


def test_programs_that_run_one_by_one():
    simulator = sites(one_by_one, None)
    assert not simulator.vectorized
    RUNS.clear()
    values, tried = simulate_within(simulator, 30, (), {}, lambda v: v["a"] > 0.5, 10_000)
    assert len(values["a"]) == 30
    assert bool((values["a"] > 0.5).all())
    assert float((values["x"] - values["a"] - 1).abs().max()) < 0.6
    assert len(RUNS) == 30  # nothing was simulated for the others
    assert tried > 45


def test_plates_and_events_in_the_cut_prior():
    def program(x=None):
        theta = pyro.sample("theta", Normal(torch.zeros(2), 1.0).to_event(1))
        coin = pyro.sample("coin", Bernoulli(0.5))
        with pyro.plate("two", 2):
            rate = pyro.sample("rate", Uniform(0.0, 1.0).expand([3]).to_event(1))
        mean = theta.sum(-1) + 0 * coin
        with pyro.plate("data", 4):
            pyro.sample(
                "x", Normal(mean.unsqueeze(-1) if mean.dim() else mean, 0.1 + rate.sum()), obs=x
            )

    simulator = find_sites(program, (), {}, ["theta", "rate"], ["x"], False)
    values, _ = simulate_within(simulator, 5, (), {}, lambda v: v["theta"][:, 0] > 0, 1000)
    assert values["rate"].shape == (5, 2, 3)
    assert values["x"].shape == (5, 4)
    assert bool((values["theta"][:, 0] > 0).all())


def test_vectors_outside_of_a_plate_are_each_its_own_simulations():
    """The plate has as many rows as the vector: as its values, every row would see another simulation."""

    def program(x=None):
        theta = pyro.sample("theta", Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("x", Normal(theta.sum(-1), 1e-3), obs=x)

    simulator = sites(program, None)
    assert simulator.vectorized
    for count in (5, 30):
        values, _ = simulate_within(
            simulator, count, (), {}, lambda v: v["theta"][:, 0] > 0, 10_000
        )
        assert values["theta"].shape == values["x"].shape == (count, 5)
        error = values["x"] - values["theta"].sum(-1, keepdim=True)
        assert float(error.abs().max()) < 0.01  # ten standard deviations


def test_it_gives_up():
    values, tried = simulate_within(
        sites(narrow, None), 5, (), {}, lambda v: v["theta"][:, 0] > 100, 30_000
    )
    assert values == {}
    assert tried == 30_000


# --- rounds ------------------------------------------------------------------------------------------


def wavy(x=None):
    theta = pyro.sample("theta", Normal(0.0, 1.0))
    pyro.sample("x", Normal(theta + 0.15 * (6 * theta).sin(), 0.02), obs=x)


def wavy_moments(x):
    """Mean and sd of theta by quadrature."""
    u = torch.linspace(-4, 4, 100_001, dtype=torch.float64)
    weights = (-(u**2) / 2 - ((x - u - 0.15 * (6 * u).sin()) / 0.02) ** 2 / 2).softmax(0)
    mean = (weights * u).sum()
    return float(mean), float((weights * (u - mean) ** 2).sum().sqrt())


def test_rounds_find_a_posterior_that_one_round_of_more_does_not():
    """Of one seed, against quadrature: the mean within .3 sd, the sd within 15%, of 600 simulations.

    As many steps on 1000 simulations in one round leave an sd that is 25% too wide or more.
    """
    mean, sd = wavy_moments(0.5)
    observed = {"x": torch.tensor(0.5)}
    pyro.set_rng_seed(0)
    guide = AutoAmortized(wavy, observed=["x"], denoiser=tiny)
    options = {**QUIET, "steps": 200, "lr": 0.01}
    found = fit_truncated(guide, observed, 200, rounds=3, options=options)
    draws = guide.draw(2000, observed)["theta"]
    assert abs(float(draws.mean()) - mean) < 0.3 * sd
    assert abs(float(draws.std()) / sd - 1) < 0.15
    assert [r.simulations for r in found.rounds] == [200] * 3
    first, second, third = found.rounds
    assert first.acceptance == 1.0
    assert third.acceptance < second.acceptance < 0.6
    assert second.probability > 0.98
    assert third.margin < 0.05
    assert len(found.simulations["x"]) == third.usable > 200
    assert "prior inside" in str(found)
    assert len(str(found).splitlines()) == 4

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    once = AutoAmortized(wavy, observed=["x"], denoiser=tiny)
    fit_amortized(once, once.simulate(1000), steps=600, lr=0.01, progress=False)
    assert float(once.draw(2000, observed)["theta"].std()) / sd > 1.25


def test_simulations_of_all_rounds_are_used():
    """Those of earlier rounds that are inside, and whole: data are still those of their latents."""
    pyro.set_rng_seed(1)
    guide = AutoAmortized(narrow, observed=["x"], denoiser=tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        found = fit_truncated(
            guide, {"x": X}, 400, rounds=2, widen=1.0, options={**QUIET, "steps": 30}
        )
    theta, x = found.simulations["theta"], found.simulations["x"]
    assert len(theta) == found.rounds[-1].usable
    assert float((x - theta @ GAIN.mT).abs().max()) < 6 * NOISE


def test_the_guide_says_that_it_is_for_one_observation():
    guide = AutoAmortized(narrow, observed=["x"], denoiser=tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        fit_truncated(guide, {"x": X}, 100, rounds=2, options={**QUIET, "steps": 5})
    other = torch.stack([X, -X])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreliableWarning)
        guide.draw(3, {"x": X})
        guide.draw(3, {"x": X.double()})
    with pytest.warns(UnreliableWarning, match="1 of 2 observations other than"):
        guide.draw(3, {"x": other})
    fresh = AutoAmortized(narrow, observed=["x"], denoiser=tiny)
    fresh.load_state_dict(guide.state_dict())
    with pytest.warns(UnreliableWarning, match="data other than"):
        fresh(X + 0.1)


def test_a_region_that_cuts_is_noticed(monkeypatch):
    """The first round's posterior is made five times too narrow: the next one lies against the walls."""
    drawn = AutoAmortized.draw
    calls = []

    def overconfident(self, num_samples, observations):
        found = drawn(self, num_samples, observations)
        calls.append(1)
        if len(calls) > 1:
            return found
        mean = found["theta"].mean(0)
        return {"theta": mean + (found["theta"] - mean) / 5}

    monkeypatch.setattr(AutoAmortized, "draw", overconfident)
    pyro.set_rng_seed(2)

    def wide(x=None):
        theta = pyro.sample("theta", Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", Normal(theta, 0.5).to_event(1), obs=x)

    guide = AutoAmortized(wide, observed=["x"], denoiser=tiny)
    x, options = {"x": torch.tensor([0.3])}, {**QUIET, "steps": 150, "lr": 0.01}
    with pytest.warns(UnreliableWarning, match="cuts the posterior"):
        found = fit_truncated(guide, x, 200, rounds=4, options=options)
    assert len(found.rounds) == 2
    assert found.rounds[-1].margin > 0.07


def test_too_small_a_region_ends_the_rounds(monkeypatch):
    """A posterior far out in the prior, and few draws of it: the guide stays that of the first round."""

    def far(self, num_samples, observations):
        return {"theta": 4 + 0.01 * torch.randn(num_samples, 2)}

    monkeypatch.setattr(AutoAmortized, "draw", far)
    monkeypatch.setattr("pyro_diffusion.train.truncated.MOST", 100)
    guide = AutoAmortized(narrow, observed=["x"], denoiser=tiny)
    with pytest.warns(UnreliableWarning, match="got 0 simulations in round 2 out of 10000 draws"):
        found = fit_truncated(guide, {"x": X}, 100, rounds=3, options={**QUIET, "steps": 3})
    assert len(found.rounds) == 1
    assert len(found.simulations["x"]) == 100


def test_simulations_that_fail_do_not_end_the_rounds():
    """A tenth of the runs are NaN: they are dropped, as in the first round, and the second round is there."""

    def failing(x=None):
        theta = pyro.sample("theta", Normal(0.0, 1.0))
        u = pyro.sample("u", Uniform(0.0, 1.0))
        centre = torch.where(u < 0.1, math.nan, theta)
        pyro.sample("x", Normal(centre, 0.1, validate_args=False), obs=x)

    pyro.set_rng_seed(0)
    guide = AutoAmortized(failing, denoiser=tiny, observed=["x"], latents=["theta"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_truncated(
            guide, {"x": torch.tensor(0.5)}, 200, rounds=2, options={**QUIET, "steps": 20}
        )
    assert [each.simulations for each in found.rounds] == [200, 200]
    # of 200 at a rate of .9, within 5 sd
    assert all(abs(len(x) - found.rounds[1].usable) < 1 for x in found.simulations.values())
    assert found.rounds[1].usable > 180 - 22


def test_refused():
    guide = AutoAmortized(narrow, observed=["x"], denoiser=tiny)
    for arguments, named in (
        ({"guide": narrow}, "guide"),
        ({"observations": {"x": torch.zeros(3, 2)}}, "observations"),
        ({"observations": {"y": X}}, "x"),
        ({"observations": {"x": X * math.nan}}, "x"),
        ({"num_simulations": 0}, "num_simulations"),
        ({"rounds": 0}, "rounds"),
        ({"widen": 0.0}, "widen"),
    ):
        given = {"guide": guide, "observations": {"x": X}, "num_simulations": 50, **arguments}
        with pytest.raises(ValueError, match=named):
            fit_truncated(**given)

    def rows(x=None):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", Normal(mean, 1.0), obs=x)

    with pytest.raises(ValueError, match="plates of rows"):
        fit_truncated(AutoAmortized(rows, observed=["x"]), {"x": torch.zeros(3)}, 50)
