"""`PathELBO` of stock guides: `Trace_ELBO`'s bound and gradients, of models that are written for one draw."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Beta, Categorical, Gamma, Normal, Poisson
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import Adam

from pyro_diffusion.infer import AutoDiffusion, PathELBO

GUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    lambda model: AutoIAFNormal(model, hidden_dim=[8], num_transforms=2),
]
START = {"rate": torch.tensor(1.5), "share": torch.tensor([0.3, 0.6])}


def counts():
    """Broadcasts over particles, so that Trace_ELBO may be asked for many at once."""
    rate = pyro.sample("rate", Gamma(2.0, 1.0))
    with pyro.plate("rows", 2):
        share = pyro.sample("share", Beta(2.0, 2.0))
        pyro.sample("y", Poisson(rate * share), obs=torch.tensor([1.0, 3.0]))


def started(kind, model=counts):
    """A guide at the same place every time, its parameters by name."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = kind(poutine.condition(model, data={}))
    if hasattr(guide, "init_loc_fn"):
        guide.init_loc_fn = init_to_value(values=START)
    guide()
    return guide


def gradients(loss, guide, repeats):
    rows, values = [], []
    for _ in range(repeats):
        guide.zero_grad()
        values.append(loss.loss_and_grads(counts, guide))
        rows.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    return torch.tensor(values), torch.stack(rows)


@pytest.mark.parametrize("kind", GUIDES)
def test_bound_and_gradients_are_those_of_trace_elbo(kind):
    """Means over 40 losses of 200 draws each: within 5 standard errors, of each gradient and of the bound.

    False alarms: below 1e-4 in all.
    """
    found = []
    for loss in (
        PathELBO(200),
        Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1),
    ):
        guide = started(kind)
        found.append(gradients(loss, guide, 40))
    for mine, theirs in zip(*found, strict=True):
        error = ((mine.var(0) + theirs.var(0)) / 40).sqrt()
        assert ((mine.mean(0) - theirs.mean(0)).abs() < 5 * error + 1e-6).all()
        assert float(mine.abs().sum()) > 0


def one_draw():
    """A funnel that indexes its latents from the left, as no program for many draws may."""
    x = pyro.sample("x", Normal(torch.zeros(3), torch.tensor([1.5, 1.0, 1.0])).to_event(1))
    pyro.factor("data", Normal(0.0, (x[0] / 2).exp()).log_prob(x[1:]).sum())


def many_draws():
    """The same, for any draws to the left."""
    x = pyro.sample("x", Normal(torch.zeros(3), torch.tensor([1.5, 1.0, 1.0])).to_event(1))
    pyro.factor("data", Normal(0.0, (x[..., :1] / 2).exp()).log_prob(x[..., 1:]).sum(-1))


@pytest.mark.parametrize("local", [False, True])
def test_a_model_for_one_draw_trains_on_many(local):
    """As far as one for many draws under Trace_ELBO: bounds of 20,000 draws alike within .02."""
    many = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    reached = []
    for model, loss in ((one_draw, PathELBO(64)), (many_draws, many)):
        with pyro.settings.context(module_local_params=local):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            guide = AutoNormal(model)
            svi = SVI(model, guide, Adam({"lr": 0.05}), loss)
            before = svi.evaluate_loss()
            for _ in range(200):
                svi.step()
            reached.append(PathELBO(20_000).loss(one_draw, guide))
        assert before > reached[-1] + 0.3
    assert abs(reached[0] - reached[1]) < 0.02


def mixed(y=1.5):
    z = pyro.sample("z", Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
    loc = pyro.sample("loc", Normal(0.0, 1.0))
    pyro.sample("y", Normal(loc + 2.0 * z, 1.0), obs=torch.as_tensor(y))


def test_discrete_latents_are_summed_over():
    """At any parameters: the bound is the mean of log p(y, loc) - log q(loc) with z summed out by hand."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(poutine.block(mixed, hide=["z"]), init_scale=0.7)
    found = [PathELBO(2000).loss(mixed, guide) for _ in range(20)]
    loc = 0.7 * torch.randn(200_000) + guide.median()["loc"].detach()
    shares = torch.tensor([0.3, 0.7]).log()
    joint = Normal(loc[:, None] + torch.tensor([0.0, 2.0]), 1.0).log_prob(torch.tensor(1.5))
    joint = (joint + shares).logsumexp(-1) + Normal(0.0, 1.0).log_prob(loc)
    right = (joint - Normal(guide.median()["loc"].detach(), 0.7).log_prob(loc)).double()
    error = math.hypot(float(right.std()) / 200_000**0.5, torch.tensor(found).std() / 20**0.5)
    assert abs(sum(found) / 20 + float(right.mean())) < 4 * error


def test_other_data_and_models_are_scored_anew():
    pyro.clear_param_store()
    guide = AutoNormal(poutine.block(mixed, hide=["z"]))
    loss = PathELBO(500)
    near, far = (torch.tensor(y) for y in (1.5, 30.0))
    first = loss.loss(mixed, guide, near)
    assert loss.loss(mixed, guide, far) > first + 50
    assert loss.loss(lambda y: mixed(30.0), guide, near) > first + 50
    assert abs(loss.loss(mixed, guide, near) - first) < 1


@pytest.mark.filterwarnings("ignore:model. PathELBO does not train")
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", [AutoNormal, lambda m: AutoDiffusion(m, AutoNormal(m), 3)])
def test_the_models_parameters_keep_no_gradient_for_the_next_loss(kind, local):
    """SVI clears those that it trains: gradients of this loss would be added to those of the next."""

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self):
            z = pyro.sample("z", Normal(self.loc, 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=torch.tensor(2.0))

    with pyro.settings.context(module_local_params=local):
        pyro.clear_param_store()
        model = Model()
        guide = kind(model)
        svi = SVI(model, guide, Adam({"lr": 0.01}), PathELBO(4))
        before = svi.evaluate_loss() and [p.clone() for p in guide.parameters()]
        for _ in range(3):
            svi.step()
        assert model.loc.grad is None and model.loc == 0.3
        assert any(not torch.equal(p, q) for p, q in zip(before, guide.parameters(), strict=True))
        guide.requires_grad_(False)
        assert PathELBO(4).loss_and_grads(model, guide) > 0


def test_all_parameters_of_a_flow_are_trained():
    guide = started(GUIDES[-1])
    svi = SVI(counts, guide, Adam({"lr": 0.01}), PathELBO(16))
    before = [p.clone() for p in guide.parameters()]
    svi.step()
    pairs = list(zip(before, guide.parameters(), strict=True))
    assert len(pairs) > 5 and not any(torch.equal(p, q) for p, q in pairs)


def test_what_has_no_density_and_lists_are_refused():
    pyro.clear_param_store()
    loss = PathELBO(4)
    with pytest.raises(ValueError, match="guide: got AutoDelta, expected an AutoNormal or an Auto"):
        loss.loss(counts, AutoDelta(counts))
    with pytest.raises(ValueError, match="AutoLaplaceApproximation, which is a point until"):
        loss.loss(counts, AutoLaplaceApproximation(counts))
    both = AutoGuideList(counts)
    both.append(AutoNormal(poutine.block(counts, expose=["rate"])))
    both.append(AutoNormal(poutine.block(counts, expose=["share"])))
    with pytest.raises(ValueError, match="guide: got AutoGuideList, expected an AutoNormal"):
        loss.loss(counts, both)
    with pytest.raises(ValueError, match="guide: got AutoNormal of a list, expected one by itself"):
        loss.loss(counts, both[0])


def test_a_loss_without_a_density_warns():
    """Some of 50 draws of the guide are where the model has none."""

    def cut():
        x = pyro.sample("x", Normal(0.0, 1.0))
        pyro.factor("data", torch.where(x > 1.0, -math.inf, 0.0 * x))

    pyro.clear_param_store()
    guide = AutoNormal(
        cut, init_scale=1.0, init_loc_fn=init_to_value(values={"x": torch.zeros(())})
    )
    with pytest.warns(UserWarning, match="Encountered .*inf"):
        assert PathELBO(50).loss_and_grads(cut, guide) == math.inf


def test_parameters_of_the_model_that_stay_are_named():
    """Once, and not where there are none; draws are those without the look."""

    def scaled():
        scale = pyro.param("scale", torch.tensor(1.0))
        z = pyro.sample("z", Normal(0.0, scale))
        pyro.sample("y", Normal(z, 1.0), obs=torch.tensor(3.0))

    pyro.clear_param_store()
    guide, loss = AutoNormal(scaled), PathELBO(4)
    with pytest.warns(
        UserWarning, match="model: PathELBO does not train its parameters, scale; Tr"
    ):
        loss.loss_and_grads(scaled, guide)
    pyro.set_rng_seed(0)
    told = loss.loss_and_grads(scaled, guide), torch.rand(())
    pyro.set_rng_seed(0)
    loss._seen = None
    with pytest.warns(UserWarning, match="scale"):
        assert told == (loss.loss_and_grads(scaled, guide), torch.rand(()))
