"""Legal and rare programs as simulators: computed sites, masks, supports, states."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import ConjugateReparam, LocScaleReparam

from pyro_diffusion import evaluate
from pyro_diffusion.infer import AutoAmortized, AutoJoint
from pyro_diffusion.infer.simulators.packed import _check_inside


def centered(x=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    local = pyro.sample("local", dist.Normal(mean, 2.0))
    twice = pyro.deterministic("twice", 2 * local)
    pyro.sample("x", dist.Normal(twice / 2, 1.0), obs=x)


decentered = poutine.reparam(centered, config={"local": LocScaleReparam(0.0)})


@pytest.mark.parametrize("kind", [AutoAmortized, AutoJoint])
def test_what_a_reparametrizer_computed_is_neither_data_nor_latent(kind):
    guide, x = kind(decentered), torch.tensor(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph that could not be read would be told
        simulations = guide.simulate(50, x)
    assert guide.observed == ("x",) and guide.vectorized
    assert set(simulations) == {"mean", "local_decentered", "x"}


def test_computed_sites_leave_simulations_side_by_side():
    guide = AutoAmortized(centered, observed=["x"])
    assert set(guide.simulate(50)) == {"mean", "local", "x"}
    assert guide.vectorized


def test_computed_sites_are_no_data_of_diagnostics():
    """A reference point that knows a function of the latents is next to them: no p-value is uniform then."""

    def exact(data):
        assert set(data) == {"x"}
        return {"mean": dist.Normal(data["x"] / 6, (5 / 6) ** 0.5).sample((19,))}

    for program in (centered, decentered):
        options = {"num_simulations": 100, "num_references": 200, "parallel": True}
        found = evaluate.tarp(program, exact, torch.tensor(0.0), **options)
        assert found.p_value() > 1e-4  # which chance alone fails once in 10,000
        evaluate.sbc(program, exact, torch.tensor(0.0), num_simulations=10, parallel=True)
    draws = {"mean": torch.randn(20), "local_decentered": torch.randn(20)}
    data = evaluate.posterior_to_arviz(draws, decentered, torch.tensor(3.0))
    assert list(data["log_likelihood"].data_vars) == ["x"]
    with pytest.raises(ValueError, match="no observed site"):
        evaluate.importance_posterior(centered, lambda: None)


def test_a_change_of_variables_is_no_simulator():
    def share(x=None):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("x", dist.Binomial(10, p), obs=x)

    guided = poutine.reparam(share, config={"p": ConjugateReparam(dist.Beta(3.0, 2.0))})
    with pytest.raises(ValueError, match=r"at \['p'\], or a change of variables"):
        AutoAmortized(guided, observed=["x"]).simulate(50)


@pytest.mark.parametrize("site", ["latent", "data", "part of an event"])
def test_masks_of_distributions_are_refused_in_simulations(site):
    def model(x=None):
        latent = pyro.sample("latent", dist.Normal(0.0, 1.0).mask(site != "latent"))
        noise = dist.Normal(latent, torch.ones(3))
        if site == "part of an event":
            noise = noise.mask(torch.tensor([True, True, False]))
        pyro.sample("x", noise.to_event(1).mask(site != "data"), obs=x)

    for guide in (AutoAmortized(model, observed=["x"]), AutoJoint(model, observed=["x"])):
        with pytest.raises(ValueError, match="got a mask"):
            guide.simulate(50)


def rows(x=None, mask=None, by_handler=False, size=6):
    size = size if x is None else x.shape[-1]
    mask = torch.ones(size, dtype=torch.bool) if mask is None else mask
    latent = pyro.sample("latent", dist.Normal(0.0, 1.0))
    noise = dist.Normal(latent, 1.0).expand([size])
    with pyro.plate("rows", size), poutine.mask(mask=mask if by_handler else True):
        pyro.sample("x", noise if by_handler else noise.mask(mask), obs=x)


def test_rows_under_the_mask_of_a_distribution_are_left_out():
    guide, theta = AutoAmortized(rows, observed=["x"]), torch.tensor(0.3)
    guide.simulate(50)
    assert guide.in_levels
    x, mask = torch.tensor([1.0, 2.0, 0.5, torch.nan]), torch.tensor([True, True, True, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = guide.log_prob({"latent": theta}, x[:3])
        found = [guide.log_prob({"latent": theta}, x, mask, way) for way in (True, False)]
    torch.testing.assert_close(found, [without, without])


@pytest.mark.parametrize("by_handler", [True, False])
def test_a_mask_of_whole_data_is_refused(by_handler):
    guide = AutoAmortized(rows, observed=["x"], plates=())
    guide.simulate(50)
    guide(torch.ones(6), torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="site 'x': got data under a mask"):
        guide(torch.ones(6), torch.arange(6) < 3, by_handler)


def test_zeros_among_positive_data_are_data():
    def model(x=None):
        latent = pyro.sample("latent", dist.Normal(0.0, 1.0))
        rain = dist.ZeroInflatedDistribution(dist.LogNormal(latent, 0.5), gate=torch.tensor(0.3))
        with pyro.plate("days", 5):
            pyro.sample("x", rain, obs=x)

    guide = AutoAmortized(model, observed=["x"])
    assert len(guide.simulate(50)["x"]) == 50
    guide(torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5]))


def pair(first, second):
    def model(x=None):
        values = {name: pyro.sample(name, prior) for name, prior in (first, second)}
        pyro.sample("x", dist.Normal(values["a"] + values["b"], 1.0), obs=x)

    return model


A, B = ("a", dist.Normal(0.0, 1.0)), ("b", dist.Normal(5.0, 1.0))


@pytest.mark.parametrize("other", [(B, A), (A, ("b", dist.LogNormal(5.0, 1.0)))])
def test_states_are_of_sites_by_name_order_and_support(other):
    """The numbers of a state fit any program with as many latents."""
    guide = AutoAmortized(pair(A, B), observed=["x"])
    guide.simulate(50)
    same, fresh, used = (
        AutoAmortized(pair(*each), observed=["x"]) for each in ((A, B), other, other)
    )
    same.load_state_dict(guide.state_dict())
    torch.manual_seed(0)
    expected = guide(torch.tensor(5.0))
    torch.manual_seed(0)
    assert same(torch.tensor(5.0)) == expected
    fresh.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="as latents, expected"):
        fresh(torch.tensor(5.0))
    used.simulate(50)
    with pytest.raises(RuntimeError, match="as latents, expected"):
        used.load_state_dict(guide.state_dict())


@pytest.mark.parametrize(
    ("support", "wrong"),
    [
        (constraints.simplex, torch.tensor([0.5, 0.5, 0.5])),
        (constraints.corr_cholesky, 2 * torch.eye(3)),
        (constraints.positive, torch.tensor(-1.0)),
        (constraints.ordered_vector, torch.tensor([1.0, 0.0])),
    ],
)
def test_values_that_no_draw_can_be_have_no_density(support, wrong):
    good = torch.distributions.biject_to(support)(torch.randn(50, 3).clamp(-3, 3))
    _check_inside("z", good, support)
    with pytest.raises(ValueError, match="outside of its support"):
        _check_inside("z", wrong, support)
