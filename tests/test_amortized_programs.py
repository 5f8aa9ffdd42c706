"""What AutoAmortized takes over from its program: supports, precision, and arguments other than data."""

import math
import warnings

import pyro
import pytest
import torch
from pyro.distributions import (
    Bernoulli,
    Categorical,
    Delta,
    Normal,
    Poisson,
    TransformedDistribution,
    Uniform,
    constraints,
)
from torch.distributions import biject_to

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.infer import AutoAmortized, UnreliableWarning
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import fit_amortized


def small(latents, features):
    network = ConditionalMLP(latents, features, width=8, depth=1)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))


def ready(model, **options):
    guide = AutoAmortized(model, observed=["x"], denoiser=small, **options)
    guide.simulate(50)
    return guide


# --- supports ---------------------------------------------------------------------------------------


class On(TransformedDistribution):
    """Normal variables taken to a support."""

    def __init__(self, support, shape):
        self.own = support
        base = Normal(torch.zeros(shape), 0.5)
        super().__init__(base.to_event(len(shape)), biject_to(support))

    @property
    def support(self):
        return self.own


def everything(x):
    return x.reshape(-1)


def all_but_one(x):
    return x[..., :-1].reshape(-1)


def below(x):
    return x[tuple(torch.tril_indices(*x.shape[-2:], offset=-1))]


real, positives = constraints.real, constraints.independent(constraints.positive, 1)
mixed = constraints.cat([constraints.positive, real], -1, [1, 2])
# support, shape of the unconstrained value, and coordinates in which its density is one
SUPPORTS = {
    "_Real": (real, (), everything),
    "_IndependentConstraint": (positives, (3,), everything),
    "_GreaterThanEq": (constraints.greater_than_eq(2.0), (), everything),
    "_GreaterThan": (constraints.greater_than(-1.0), (), everything),
    "_LessThan": (constraints.less_than(3.0), (), everything),
    "_HalfOpenInterval": (constraints.half_open_interval(1.0, 4.0), (), everything),
    "_Interval": (constraints.interval(-2.0, 5.0), (), everything),
    "_Simplex": (constraints.simplex, (3,), all_but_one),
    "_CorrCholesky": (constraints.corr_cholesky, (3,), below),
    "_Cat": (constraints.independent(mixed, 1), (3,), everything),
    "_Stack": (constraints.stack([constraints.positive, constraints.real], -1), (2,), everything),
    "_CorrMatrix": (constraints.corr_matrix, (3,), below),
    "_OrderedVector": (constraints.ordered_vector, (3,), everything),
    "_PositiveOrderedVector": (constraints.positive_ordered_vector, (3,), everything),
    "_SoftplusPositive": (constraints.softplus_positive, (), everything),
}


def test_the_table_has_every_support_that_a_transform_is_known_for():
    known = {kind.__name__ for kind in biject_to._registry} - {"NormalInterval"}  # the guides' own
    assert known == set(SUPPORTS)


@pytest.mark.parametrize("name", SUPPORTS)
def test_density_on_every_support(name):
    """Latents' log-density is the flow's less log |det J| by autograd, for one value and for several."""
    support, shape, chart = SUPPORTS[name]

    def model(x=None):
        z = pyro.sample("z", On(support, shape))
        pyro.sample("x", Normal(z.sum(), 1.0), obs=x)

    guide = ready(model, vectorized=False)
    x = guide.simulate(200)["x"].median()
    transform = biject_to(guide.prototype_trace.nodes["z"]["fn"].support)
    free = 0.5 * torch.randn(3, *shape)
    values = torch.stack([transform(each) for each in free])
    assert bool(support.check(values).all())
    flow = guide.get_posterior(x).log_prob(free.reshape(3, -1))
    expected = []
    for each, density in zip(free, flow, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda u: chart(transform(u)), each)
        size = each.numel()
        expected.append(density - jacobian.reshape(size, size).double().slogdet().logabsdet)
    found = guide.log_prob({"z": values}, x)
    torch.testing.assert_close(found, torch.stack(expected).to(found), atol=2e-3, rtol=1e-3)
    alone = guide.log_prob({"z": values[0]}, x)
    torch.testing.assert_close(alone, found[0], atol=2e-3, rtol=1e-3)
    assert bool(support.check(guide(x)["z"]).all())


@pytest.mark.parametrize("value", [-0.5, 2.5])
def test_a_value_outside_of_an_interval_has_no_density(value):
    """The inverse of a sigmoid stops at the ends: values beyond had the density of the last one before."""

    def model(x=None):
        a = pyro.sample("a", Uniform(0.0, 2.0).expand([2]).to_event(1))
        pyro.sample("x", Normal(a.sum(-1), 0.5), obs=x)

    guide = ready(model)
    x, inside = torch.tensor(1.0), torch.tensor([1.0, 2.0])
    assert guide.log_prob({"a": inside}, x).isfinite()  # draws may be rounded to an end
    with pytest.raises(ValueError, match=r"^latents\['a'\]: got a value outside of its support"):
        guide.log_prob({"a": torch.tensor([1.0, value])}, x)
    with pytest.raises(ValueError, match="none of which is finite and inside of its support"):
        guide.accept({"a": torch.full((5, 2), value), "x": torch.zeros(5)})


def test_a_support_that_takes_no_batch_is_refused():
    def model(x=None):
        z = pyro.sample("z", On(constraints.stack([constraints.positive, real], 0), (2,)))
        pyro.sample("x", Normal(z.sum(), 1.0), obs=x)

    with pytest.raises(
        ValueError, match=r"site 'z': got a support \(.*\) whose transform takes one value"
    ):
        AutoAmortized(model, observed=["x"]).simulate(50)


# --- precision --------------------------------------------------------------------------------------


def test_draws_have_the_precision_of_the_program():
    def model(x=None):
        with pyro.plate("n", 2):
            double = pyro.sample(
                "double", Normal(torch.zeros((), dtype=torch.float64), 1.0).expand([2])
            )
        single = pyro.sample("single", Normal(0.0, 1.0))
        pyro.sample("x", Normal(double.sum() + single, 1.0), obs=x)

    guide = ready(model, vectorized=False)
    x = torch.tensor(0.5, dtype=torch.float64)
    for found in (
        guide(x),
        guide.draw(3, {"x": x}),
        pyro.infer.Predictive(guide, num_samples=2, parallel=True)(x),
    ):
        assert found["double"].dtype == torch.float64
        assert found["single"].dtype == torch.float32
    with torch.no_grad():
        assert math.isfinite(pyro.infer.Trace_ELBO().loss(model, guide, x))


# --- arguments other than data ------------------------------------------------------------------------


def designed(x=None, design=1.0, name="a"):
    z = pyro.sample("z", Normal(0.0, 1.0))
    pyro.sample("x", Normal(z * design, 1.0), obs=x)


def test_another_design_is_told():
    guide = AutoAmortized(designed, observed=["x"], denoiser=small)
    guide.simulate(50, design=torch.tensor(2.0))
    x = torch.tensor(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(x, torch.tensor(2.0))
        guide(x=torch.zeros(7), design=torch.tensor(2.0))
        guide(x, design=2.0)  # the same simulations
        guide(x, torch.tensor(2.0), name="b")
    for args, kwargs in (((x, 3.0), {}), ((x,), {}), ((x,), {"design": torch.full((4,), 2.0)})):
        with pytest.warns(UnreliableWarning, match="arguments: got others than those of the first"):
            guide(*args, **kwargs)


def test_data_that_the_program_transforms_are_no_design():
    def model(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z, 1.0), obs=None if x is None else x.log())

    guide = ready(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.get_posterior(torch.tensor(1.5))


# --- data that may be missing -------------------------------------------------------------------------


def test_data_that_may_be_missing_are_part_of_the_program():
    """Two of unit noise, each missing one time in three: means within 0.2 sd, sds within a fifth.

    Of five seeds the largest were .14 and .17.
    """

    def model(x=None, seen=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        whole = pyro.sample("whole", Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1))
        mask = pyro.sample("seen", Bernoulli(torch.full((2,), 2 / 3)).to_event(1), obs=seen)
        pyro.sample("x", Delta(torch.where(mask > 0, whole, 0.0), event_dim=1), obs=x)

    guide = AutoAmortized(model, observed=["x", "seen"], latents=["z"], denoiser=small)
    options = {"steps": 1000, "batch_size": 512, "lr": 5e-3}
    fit_amortized(guide, guide.simulate(30_000), **options, progress=False)
    seen = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    x = torch.tensor([1.0, -1.6]) * seen
    draws = guide.draw(2000, {"x": x, "seen": seen})["z"]
    precision = 1 + seen.sum(1)
    mean, sd = x.sum(1) / precision, precision.rsqrt()
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.2
    assert (draws.std(0) / sd - 1).abs().max() < 0.2


def test_a_latent_that_is_constant_is_refused():
    """It has no density: a guide would draw it around its value."""

    def model(x=None):
        fixed = pyro.sample("fixed", Delta(torch.tensor(1.0)))
        pyro.sample("x", Normal(fixed + pyro.sample("z", Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'fixed': got a latent that is the same in all"):
        ready(model)
    ready(model, latents=["z"])


# --- plates without latents around them -------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_a_plate_that_no_latent_is_around_is_trained_by_the_recipe(grouped):
    """Its set is summarized for nobody: a network that no loss reaches was made, and refused in training."""

    def model(x=None, rows=4):
        rows = rows if x is None else x.shape[-1]
        with pyro.plate("groups", 3, dim=-2):
            center = pyro.sample("center", Normal(0.0, 1.0)) if grouped else torch.zeros(3, 1)
            with pyro.plate("data", rows, dim=-1):
                local = pyro.sample("local", Normal(center, 1.0))
                pyro.sample("x", Normal(local, 0.5), obs=x)

    pyro.clear_param_store()
    guide = ready(model)
    fit_amortized(guide, guide.simulate(50), steps=2, progress=False)
    assert guide(torch.zeros(3, 2))["local"].shape == (3, 2)
    # rows are independent: what one holds is nothing to the others
    values = {name: torch.zeros_like(value) for name, value in guide(torch.zeros(3, 4)).items()}
    x = torch.zeros(3, 4)
    before = guide.log_prob(values, x)
    x[0, 0] = 1.0
    one = guide.log_prob(values, x)
    x[1, 0] = 1.0
    torch.testing.assert_close(guide.log_prob(values, x) - one, one - before, rtol=1e-3, atol=1e-4)


# --- counts ------------------------------------------------------------------------------------------


def counted(x=None):
    """Counts whose rate is spread over five orders of magnitude."""
    level = pyro.sample("level", Normal(2.0, 2.0))
    pyro.sample(
        "x",
        Poisson(level.clamp(max=12.0).exp().unsqueeze(-1)).expand([*level.shape, 3]).to_event(1),
        obs=x,
    )


def labelled(x=None):
    level = pyro.sample("level", Normal(0.0, 1.0))
    weights = torch.stack([level, -level, 0 * level], -1).unsqueeze(-2)
    labels = Categorical(logits=weights.expand(*level.shape, 4, 3))
    pyro.sample("x", labels.to_event(1), obs=x)


def test_counts_are_seen_by_the_logarithm_of_one_more():
    guide = AutoAmortized(counted, observed=["x"])
    x = guide.simulate(200)["x"]
    u = x.log1p()
    seen = guide.posterior.standardized([x])[0]
    torch.testing.assert_close(seen, (u - u.mean(0)) / u.std(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="site 'x': got -1 as least value, expected 0 or more"):
        guide.draw(2, {"x": torch.tensor([0.0, -1.0, 2.0])})
    assert guide.draw(2, {"x": torch.zeros(3)})["level"].isfinite().all()


def test_labels_are_seen_as_they_are():
    guide = AutoAmortized(labelled, observed=["x"])
    x = guide.simulate(200)["x"].float()
    seen = guide.posterior.standardized([x])[0]
    torch.testing.assert_close(seen, (x - x.mean(0)) / x.std(0), rtol=1e-4, atol=1e-4)


def test_a_regression_finds_rates_of_any_magnitude():
    # Untrained, the guide is the regression of latents on data: of level on its logarithm, all but linear.
    # Counts as they are explain a fifth of it.
    guide = AutoAmortized(counted, observed=["x"])
    table = guide.simulate(2000)
    drawn = guide.draw(20, {"x": table["x"][:200]})["level"].mean(0)
    left = (drawn - table["level"][:200]).var() / table["level"][:200].var()
    assert left < 0.3


def test_a_state_of_counts_as_they_are_goes_on_seeing_them_so():
    guide = AutoAmortized(counted, observed=["x"])
    x = guide.simulate(50)["x"]
    state = {
        k: v.bool() & False if k.endswith("observed.0.log") else v
        for k, v in guide.state_dict().items()
    }
    other = AutoAmortized(counted, observed=["x"])
    other.load_state_dict(state)
    other.simulate(20)
    torch.testing.assert_close(
        other.posterior.standardized([x])[0],
        (x - guide.posterior.observed[0].loc) / guide.posterior.observed[0].scale,
    )

    def measured(x=None):
        level = pyro.sample("level", Normal(2.0, 2.0))
        pyro.sample("x", Normal(level, 1.0).expand([3]).to_event(1), obs=x)

    wrong = AutoAmortized(measured, observed=["x"])
    wrong.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="site 'x': got one of other data, expected counts"):
        wrong.simulate(20)
