"""Latents between two ends: by normal quantiles, in guides of simulators."""

import pyro
import pytest
import torch
from pyro.distributions import Beta, Normal, Uniform
from scipy import stats
from torch.distributions import biject_to, constraints

from pyro_diffusion.infer import AutoAmortized, AutoJoint
from pyro_diffusion.infer.simulators.intervals import NormalCdf, NormalInterval
from pyro_diffusion.infer.simulators.linear_regression import LinearlyRegressed
from pyro_diffusion.infer.simulators.packed import pack

F64 = torch.float64
LOW, HIGH = -1.0, torch.tensor([3.0, 5.0])


def model(x=None):
    z = pyro.sample("z", Uniform(LOW, HIGH).to_event(1))
    share = pyro.sample("share", Beta(2.0, 5.0))
    pyro.sample("x", Normal(z.sum(-1) + share, 1.0), obs=x)


def test_the_map_is_the_normal_distribution_function():
    there = NormalCdf()
    u = torch.linspace(-6, 6, 49, dtype=F64, requires_grad=True)
    x = there(u)
    torch.testing.assert_close(x.detach(), torch.from_numpy(stats.norm.cdf(u.detach())))
    torch.testing.assert_close(there.inv(x), u)
    (slope,) = torch.autograd.grad(x.sum(), u)
    torch.testing.assert_close(there.log_abs_det_jacobian(u, x), slope.log())
    assert there == NormalCdf() and there != torch.distributions.SigmoidTransform()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_value_reaches_an_end_and_none_is_infinite(dtype):
    there = NormalCdf()
    x = there(torch.tensor([-50.0, -15.0, 9.0, 50.0], dtype=dtype))
    assert ((x > 0) & (x < 1)).all()
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert there.inv(ends).isfinite().all()


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, -12.5), (F64, -37.0)])
def test_small_places_are_known_by_their_own_size(dtype, least):
    # A rate of 1e-9 between 0 and 1: by differences from 1/2 all below 3e-8 was the least number there is.
    u = torch.linspace(least, 0, 101, dtype=dtype)
    x = NormalCdf()(u)
    exact = torch.from_numpy(stats.norm.cdf(u.double())).to(dtype)
    torch.testing.assert_close(x, exact, rtol=1e-4 if dtype is torch.float32 else 1e-10, atol=0.0)
    torch.testing.assert_close(NormalCdf().inv(x), u, atol=1e-5, rtol=1e-5)


def test_an_interval_has_its_ends_in_their_places():
    there = biject_to(NormalInterval(LOW, HIGH))
    torch.testing.assert_close(there(torch.zeros(2)), (LOW + HIGH) / 2)
    x = torch.tensor([[0.0, 4.9], [2.9, -0.9]])
    torch.testing.assert_close(there(there.inv(x)), x)
    nested = biject_to(constraints.independent(NormalInterval(LOW, HIGH), 1))
    assert nested.log_abs_det_jacobian(nested.inv(x), x).shape == (2,)


@pytest.mark.parametrize("kind", [AutoAmortized, AutoJoint])
def test_uniform_latents_are_standard_normal_to_a_guide(kind):
    # Two tests by Kolmogorov and Smirnov, each wrong in 1e-4 of seeds.
    pyro.set_rng_seed(0)
    guide = kind(model, observed=["x"]) if kind is AutoAmortized else kind(model)
    simulations = guide.simulate(4000)
    names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    packed = pack(guide, {name: simulations[name] for name in names}, torch.Size([4000]))
    for column in (packed[:, 0], packed[:, 1]):
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-4
    # a Beta's are not, and lie in their own interval, too
    assert stats.kstest(packed[:, 2].numpy(), "norm").pvalue < 1e-4


def test_draws_and_densities_of_a_guide_are_inside():
    pyro.set_rng_seed(0)
    guide = AutoAmortized(model, observed=["x"])
    x = guide.simulate(200)["x"].median()
    drawn = guide.draw(500, {"x": x})
    assert (drawn["z"] > LOW).all() and (drawn["z"] < HIGH).all()
    assert ((drawn["share"] > 0) & (drawn["share"] < 1)).all()
    assert set(guide(x)) == {"z", "share"} and bool(((guide(x)["z"] - LOW) < HIGH - LOW).all())
    # The density in the box is the flow's over the slope of the map, by finite differences.
    values = {"z": torch.tensor([0.5, 3.0]), "share": torch.tensor(0.3)}
    free = pack(guide, values, torch.Size())
    slopes = [
        stats.norm.pdf(u) * width for u, width in zip(free.tolist(), (4.0, 6.0, 1.0), strict=True)
    ]
    inner = guide.get_posterior(x).log_prob(free)
    expected = inner - torch.tensor(slopes).log().sum()
    torch.testing.assert_close(guide.log_prob(values, x), expected.float(), atol=1e-4, rtol=1e-4)


def test_conditionals_of_a_joint_have_the_same_map():
    # They are guides with a prototype of their own; by a sigmoid draws and densities were other ones.
    pyro.set_rng_seed(0)
    joint = AutoJoint(model)
    conditional = joint.condition({"x": joint.simulate(400)["x"].median()})
    values = {"z": torch.tensor([0.5, 3.0]), "share": torch.tensor(0.3)}
    free = torch.special.ndtri(torch.tensor([1.5 / 4, 4 / 6, 0.3]))
    slopes = Normal(0.0, 1.0).log_prob(free).exp() * torch.tensor([4.0, 6.0, 1.0])
    expected = conditional.get_posterior().log_prob(free) - slopes.log().sum()
    torch.testing.assert_close(conditional.log_prob(values), expected, atol=1e-4, rtol=1e-4)
    drawn = conditional.sample((500,))
    assert (drawn["z"] > LOW).all() and (drawn["z"] < HIGH).all()


def place(x=None):
    z = pyro.sample("z", Uniform(-10.0, torch.tensor([10.0, 20.0])).to_event(1))
    pyro.sample("x", Normal(z, 0.5).to_event(1), obs=x)


def test_a_regression_in_their_own_space_predicts_bounded_latents():
    pyro.set_rng_seed(0)
    guide = AutoAmortized(place, observed=["x"])
    guide.simulate(4000)
    posterior = guide.posterior
    z = torch.tensor([[-9.0, 19.0], [0.0, -5.0], [6.0, 12.0]])
    features = posterior.context([z], torch.Size([3]))
    assert features.shape == (3, 4)
    torch.testing.assert_close(features[:, :2], posterior.observed[0](z))
    # of all but noise, which takes .25 of 33 or 75 from slopes
    u = torch.special.ndtri((z + 10) / torch.tensor([20.0, 30.0]))
    torch.testing.assert_close(features[:, 2:], posterior.latents(u), atol=0.05, rtol=0.05)
    # Beyond an end, and so far that all would be 1, a prediction is that of the thousandth next to it.
    far = posterior.context([torch.tensor([30.0, -40.0])], torch.Size())[2:]
    ends = torch.tensor([1.0, -1.0]) * stats.norm.ppf(0.999)
    torch.testing.assert_close(far, posterior.latents(ends.float()))
    # What is left of standardized latents, without training: .1 (5 %) and more if linear in u alone.
    assert (posterior.denoiser.variances < 0.03).all()


def test_few_simulations_and_other_summaries_have_no_such_prediction():
    pyro.set_rng_seed(0)
    guide = AutoAmortized(place, observed=["x"])
    guide.simulate(25)
    assert (guide.posterior.context([torch.ones(2)], torch.Size())[2:].abs() < 1).all()
    own = AutoAmortized(place, torch.nn.Linear(2, 5), observed=["x"])
    own.simulate(200)
    assert own.posterior.context([torch.ones(2)], torch.Size()).shape == (5,)


def test_a_state_brings_its_prediction():
    pyro.set_rng_seed(0)
    first = AutoAmortized(place, observed=["x"])
    first.simulate(500)
    fresh = AutoAmortized(place, observed=["x"])
    fresh.load_state_dict(first.state_dict())
    x = torch.tensor([3.0, 3.0])
    assert fresh.posterior.context([x], torch.Size()).equal(
        first.posterior.context([x], torch.Size())
    )


def test_many_data_keep_their_linear_part():
    # up to 64 data and latents have one: with a prediction of each latent these would be 68
    def many(x=None):
        z = pyro.sample("z", Uniform(-1.0, torch.ones(8)).to_event(1))
        loc = z.sum(-1, keepdim=True).expand(*z.shape[:-1], 60)
        pyro.sample("x", Normal(loc, 0.5).to_event(1), obs=x)

    guide = AutoAmortized(many, observed=["x"])
    guide.simulate(50)
    assert isinstance(guide.posterior.denoiser, LinearlyRegressed)
    assert guide.posterior.context([torch.ones(60)], torch.Size()).shape == (60,)

    def pixels(x=None):
        z = pyro.sample("z", Uniform(-1.0, torch.ones(65)).to_event(1))
        pyro.sample("x", Normal(z.sum(-1), 0.5), obs=x)

    guide = AutoAmortized(pixels, observed=["x"])
    guide.simulate(50)
    assert guide.posterior.context([torch.tensor(1.0)], torch.Size()).shape == (1,)


def test_a_state_without_intervals_has_nothing_of_them():
    # and so states from before there were any are still read
    def unbounded(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z, 1.0), obs=x)

    guide = AutoAmortized(unbounded, observed=["x"])
    guide.simulate(50)
    assert not [key for key in guide.state_dict() if "prediction" in key]


def test_messages_name_an_interval():
    guide = AutoAmortized(model, observed=["x"])
    guide.simulate(50)
    values = {"z": torch.zeros(2), "share": torch.tensor(2.0)}
    with pytest.raises(ValueError, match=r"expected Interval\(lower_bound=0.0, upper_bound=1.0\)"):
        guide.log_prob(values, torch.tensor(0.0))


def rows(count, x=None):
    m = pyro.sample("m", Uniform(-3.0, 3.0))
    with pyro.plate("rows", count):
        z = pyro.sample("z", Uniform(-1.0, 1.0))
        pyro.sample("x", Normal(m + z, 0.3), obs=x)


def test_other_numbers_of_rows_keep_the_map():
    pyro.set_rng_seed(0)
    guide = AutoAmortized(rows, observed=["x"])
    guide.simulate(100, 6)
    for count in (6, 3, 6):
        guide(count, torch.zeros(count))
        values = {"m": torch.tensor(1.5), "z": torch.full((count,), 0.5)}
        free = pack(guide, values, torch.Size())
        torch.testing.assert_close(free, torch.full((count + 1,), stats.norm.ppf(0.75)).float())
