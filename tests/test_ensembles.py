"""Ensembles of amortized posteriors: their mixture, against its parts."""

import math

import pyro
import pytest
import torch
from pyro.distributions import (
    Categorical,
    HalfNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)
from pyro.infer import Predictive

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import AutoAmortized, AutoEnsemble, ComposedPosterior
from pyro_diffusion.infer.simulators.mixture import EqualMixture
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import fit_amortized

SOLVER = ODESolver("rk4", steps=8)
X = torch.tensor([1.0, -0.5])


def small(latents, features):
    network = ConditionalMLP(latents, features, width=8, depth=1)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))


def model(x=None):
    mean = pyro.sample("mean", Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", HalfNormal(1.0))
    pyro.sample("x", Normal(mean, scale.unsqueeze(-1)).to_event(1), obs=x)


def member(program=model, **options):
    return AutoAmortized(program, observed=["x"], denoiser=small, solver=SOLVER, **options)


def shaken(guide):
    """Members that differ as trained ones do."""
    for i, each in enumerate(guide.members):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter += 0.1 * (i + 1) * torch.randn_like(parameter)
    return guide.eval()


@pytest.fixture
def guide():
    found = AutoEnsemble([member() for _ in range(3)])
    found.simulate(100)
    return shaken(found)


# --- the mixture -------------------------------------------------------------------------------------


def parts(batch=()):
    means = torch.arange(3.0).reshape(3, 1) * torch.tensor([4.0, -4.0])
    return [MultivariateNormal(m, torch.eye(2)).expand(batch) for m in means]


def test_density_is_that_of_a_mixture():
    exact = MixtureSameFamily(
        Categorical(torch.ones(3)),
        MultivariateNormal(torch.stack([p.loc for p in parts()]), torch.eye(2)),
    )
    value = 4 * torch.randn(50, 2)
    assert torch.allclose(EqualMixture(parts()).log_prob(value), exact.log_prob(value))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_draws_are_shared_out(count):
    draws = EqualMixture(parts()).sample((count,))
    of = (draws[:, 0] / 4).round().clamp(0, 2).long().bincount(minlength=3)
    assert draws.shape == (count, 2)
    assert of.max() - of.min() <= 1 + (count < 10)


def test_a_single_draw_is_of_any_part():
    """900 single draws: counts within 5 sd (14 each) of 300 (2e-6 in all)."""
    mixture = EqualMixture(parts())
    of = torch.stack([mixture.sample() for _ in range(900)])[:, 0].div(4).round().clamp(0, 2)
    assert (of.long().bincount(minlength=3) - 300).abs().max() < 5 * math.sqrt(900 * 2 / 9)


def test_order_says_nothing_of_the_part():
    """Of 600 draws each place has each part alike: correlation of neighbours below 5 / sqrt(600)."""
    draws = EqualMixture(parts()).sample((600,))[:, 0]
    both = torch.stack([draws[:-1], draws[1:]])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(600)


def test_shapes_of_expanded_mixtures():
    for batch in ((), (4,)):
        mixture = EqualMixture(parts(batch))
        for shape in ((5, *batch), (5, 2, *batch)):
            new = mixture.expand(shape)
            assert new.sample().shape == (*shape, 2)
            assert new.sample((3,)).shape == (3, *shape, 2)
            assert new.log_prob(torch.zeros(2)).shape == shape
    rows = EqualMixture(parts()).expand((300,)).sample()[:, 0]  # each row has a part of its own
    assert rows.div(4).round().unique().numel() >= 3
    broadcast = EqualMixture(parts((1,))).expand((4,))
    assert broadcast.sample().shape == (4, 2)


# --- the guide ---------------------------------------------------------------------------------------


def test_density_of_the_guide_is_the_mean_of_its_members(guide):
    latents = {"mean": torch.randn(6, 2), "scale": torch.rand(6) + 0.1}
    for x in (X, torch.randn(6, 2)):
        each = torch.stack([m.log_prob(latents, x) for m in guide.members])
        assert not torch.allclose(each[0], each[1], atol=0.01)
        expected = each.logsumexp(0) - math.log(3)
        assert torch.allclose(guide.log_prob(latents, x), expected, atol=1e-5)


def test_draws_are_those_of_the_members(guide):
    """3000 draws: means and sds are the members' pooled, z-scores below 5 (2e-6 in all)."""
    pooled = torch.cat([m.draw(3000, {"x": X})["mean"] for m in guide.members])
    draws = guide.draw(3000, {"x": X})["mean"]
    assert draws.shape == (3000, 2)
    error = pooled.std(0) * math.sqrt(1 / 3000 + 1 / 9000)
    assert ((draws.mean(0) - pooled.mean(0)) / error).abs().max() < 5
    assert (draws.std(0) / pooled.std(0) - 1).abs().max() < 0.15


def test_it_is_a_guide(guide):
    def side_by_side(program):
        def inner(x):
            with pyro.plate("observations", len(x)):
                return program(x)

        return inner

    many = torch.randn(4, 2)
    assert guide(X)["mean"].shape == (2,)
    assert guide(many)["scale"].shape == (4,)
    found = Predictive(model, guide=guide, num_samples=8, parallel=True)(X)
    assert found["x"].shape == (8, 2)
    found = Predictive(side_by_side(guide), num_samples=8, parallel=True)(many)
    assert found["mean"].shape == (8, 4, 2)
    assert guide.quantiles([0.1, 0.9], many, num_samples=20)["scale"].shape == (2, 4)
    assert bool((guide.draw(50, {"x": many})["scale"] > 0).all())
    assert evaluate.sbc(model, guide, num_simulations=20, num_samples=9).p_value("scale") > 0


def test_weights_are_of_the_mixtures_density(guide):
    found = evaluate.importance_posterior(model, guide, X, num_samples=50)
    trace = pyro.poutine.trace(pyro.poutine.condition(model, found.draws)).get_trace(X)
    del trace.nodes["x"]
    with torch.no_grad():
        own = guide.log_prob(found.draws, X)
    joint = Normal(0.0, 1.0).log_prob(found.draws["mean"]).sum(-1)
    joint += HalfNormal(1.0).log_prob(found.draws["scale"])
    joint += Normal(found.draws["mean"], found.draws["scale"].unsqueeze(-1)).log_prob(X).sum(-1)
    assert torch.allclose(found.log_weights.float(), joint - own, atol=1e-3)


def test_states(guide):
    fresh = AutoEnsemble([member() for _ in range(3)])
    fresh.load_state_dict(guide.state_dict())
    latents = {"mean": torch.randn(6, 2), "scale": torch.rand(6) + 0.1}
    assert torch.equal(fresh.eval().log_prob(latents, X), guide.log_prob(latents, X))
    with pytest.raises(RuntimeError, match="members"):
        AutoEnsemble([member() for _ in range(2)]).load_state_dict(guide.state_dict())


def test_members_are_trained_apart():
    guide = AutoEnsemble([member() for _ in range(2)])
    simulations = guide.simulate(60)
    before = [[p.clone() for p in m.parameters()] for m in guide.members]
    fit_amortized(guide.members[0], simulations, steps=3, progress=False)
    changed = [
        any(not torch.equal(p, q) for p, q in zip(old, m.parameters(), strict=True))
        for old, m in zip(before, guide.members, strict=True)
    ]
    assert changed == [True, False]
    fit_amortized(guide.members[1], simulations, steps=3, progress=False)
    with pytest.raises(ValueError, match="members"):
        fit_amortized(guide, simulations, steps=3, progress=False)


def test_members_of_sets():
    """A program with rows in a plate, asked with other numbers of them; one datum in 1000 warns."""

    def groups(x=None, rows=6):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("rows", rows if x is None else x.shape[-1]):
            local = pyro.sample("local", Normal(mean, 1.0))
            pyro.sample("x", Normal(local, 1.0), obs=x)

    guide = AutoEnsemble([AutoAmortized(groups, observed=["x"], solver=SOLVER) for _ in range(2)])
    guide.simulate(2000)
    assert guide.in_levels
    for rows in (3, 5):
        found = guide(torch.randn(rows))
        assert found["local"].shape == (rows,)
    latents = {"mean": torch.zeros(4), "local": torch.zeros(4, 3)}
    x = torch.randn(3)
    each = torch.stack([m.log_prob(latents, x) for m in guide.members])
    assert torch.allclose(guide.log_prob(latents, x), each.logsumexp(0) - math.log(2), atol=1e-5)


def test_refused(guide):
    one = member()
    other = member(lambda x=None: model(x))
    summary = torch.nn.Flatten()
    shared = [member(summary=summary) for _ in range(2)]
    for members in ([], one, [one, one], [one, other], [model], [guide], shared):
        with pytest.raises(ValueError, match="members"):
            AutoEnsemble(members)
    with pytest.raises(ValueError, match="several latents"):
        AutoEnsemble([member(), member(latents=["mean"])]).simulate(50)
    with pytest.raises(ValueError, match="without simulations"):
        AutoEnsemble([member()]).draw(3, {"x": X})
    with pytest.raises(ValueError, match="guide"):
        ComposedPosterior(guide, {"x": torch.zeros(3, 2)})
