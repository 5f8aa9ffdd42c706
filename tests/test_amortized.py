"""AutoAmortized: posteriors of programs from their own simulations, against closed forms."""

import functools
import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import (
    Bernoulli,
    Beta,
    Delta,
    Dirichlet,
    Gamma,
    HalfNormal,
    LogNormal,
    Normal,
    ProjectedNormal,
    Uniform,
)
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.distributions import biject_to, constraints

from pyro_diffusion import checkpoint
from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.evaluate import importance_posterior
from pyro_diffusion.infer import AutoAmortized, UnreliableWarning
from pyro_diffusion.infer.simulators.standardized import Familiar
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import Trainer, fit_amortized

NOISE = 0.5
SHRINK, SD = 1 / (1 + NOISE**2), NOISE / math.sqrt(1 + NOISE**2)


def conjugate(x=None):
    """Posterior of each mean: N(SHRINK x, SD^2)."""
    mean = pyro.sample("mean", Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", Normal(mean, NOISE).to_event(1), obs=x)


def small(latents, features):
    network = ConditionalMLP(latents, features, width=32, depth=2)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))


def untrained(model, observed=("x",), **options):
    """A guide with scales and a network of random numbers: its draws are arbitrary, not its contract."""
    guide = AutoAmortized(model, observed=list(observed), denoiser=small, **options)
    guide.simulate(100)
    for name, parameter in guide.posterior.named_parameters():
        if "denoiser" in name:
            nn.init.normal_(parameter, std=0.2)
    return guide


class Exact(Denoiser):
    """p(z | z_t, y) of the conjugate program, z and y standardized by what ``scales`` holds."""

    def forward(self, xt, t, y):
        level = self.process.level(t, xt, state="xt")
        latents, data = self.scales
        x = y * data.scale + data.loc
        mean, variance = (SHRINK * x - latents.loc) / latents.scale, (SD / latents.scale) ** 2
        precision = 1 / variance + level.alpha**2 / level.sigma**2
        centre = (mean / variance + level.alpha / level.sigma**2 * xt) / precision
        return Normal(centre, precision.rsqrt()).to_event(1)


def exact_guide(solver=None):
    """The guide with the true denoiser: what is left is everything but learning."""
    guide = AutoAmortized(
        conjugate,
        observed=["x"],
        denoiser=lambda *sizes: Exact(GaussianProcess(LogLinear(14.0, -12.0))),
        solver=solver,
    )
    guide.simulate(200)
    guide.posterior.denoiser.scales = guide.posterior.latents, guide.posterior.observed[0]
    return guide


@pytest.fixture
def exact():
    return exact_guide()


def in_plate(program):
    """A program for observations side by side."""

    def side_by_side(x):
        with pyro.plate("observations", len(x)):
            return program(x)

    return side_by_side


X = torch.tensor([1.0, -0.5])
MANY = torch.tensor([[1.0, -0.5], [0.0, 0.3], [-1.2, 1.5]])


# --- the right posterior -----------------------------------------------------------------------------


def test_moments_of_many_posteriors_in_one_call(exact):
    """4000 draws for each of 3 observations: z-scores of 6 means and variances below 5 (7e-6 in all)."""
    predictive = Predictive(
        in_plate(conjugate), guide=in_plate(exact), num_samples=4000, parallel=True
    )
    draws = predictive(MANY)
    assert draws["mean"].shape == draws["x"].shape == (4000, 3, 2)
    z = (draws["mean"].mean(0) - SHRINK * MANY) / (SD / math.sqrt(4000))
    assert z.abs().max() < 5
    z = (draws["mean"].var(0) / SD**2 - 1) / math.sqrt(2 / 4000)
    assert z.abs().max() < 5


def test_density(exact):
    value = torch.randn(4, 2)
    expected = Normal(SHRINK * X, SD).log_prob(value).sum(-1)
    assert torch.allclose(exact.log_prob({"mean": value}, X), expected, atol=5e-3, rtol=2e-3)
    value = torch.randn(4, 3, 2)
    expected = Normal(SHRINK * MANY, SD).log_prob(value).sum(-1)
    assert torch.allclose(exact.log_prob({"mean": value}, MANY), expected, atol=5e-3, rtol=2e-3)
    value.requires_grad_()
    (slope,) = torch.autograd.grad(exact.log_prob({"mean": value}, MANY).sum(), value)
    assert torch.allclose(slope, (SHRINK * MANY - value) / SD**2, atol=0.05)


def test_median_and_quantiles(exact):
    """1000 draws: within 5 standard errors of the median's, 1.25 sd / sqrt(1000) (3e-6 in all)."""
    assert (exact.median(X)["mean"] - SHRINK * X).abs().max() < 5 * 1.25 * SD / math.sqrt(1000)
    low, high = exact.quantiles([0.1, 0.9], MANY)["mean"]
    assert low.shape == (3, 2)
    assert ((high - low) / (2 * 1.2816 * SD) - 1).abs().max() < 0.2


def test_weights_of_the_true_posterior_are_constant(exact):
    evidence = Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X).sum()
    found = importance_posterior(conjugate, exact, X, num_samples=200)
    assert torch.allclose(found.log_weights.float(), evidence.expand(200), atol=1e-2)
    importance = Importance(conjugate, exact, num_samples=3)
    importance.run(X)
    assert torch.allclose(torch.stack([*importance.log_weights]), evidence.expand(3), atol=1e-2)
    with torch.no_grad():
        assert abs(Trace_ELBO().loss(conjugate, exact, X) + evidence) < 1e-2


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_what_a_coarse_solver_leaves_in_the_evidence_is_in_its_error(method):
    """The guide is exact but for its solver, so that all of the gap is the solver's and none of it luck."""
    guide = exact_guide(ODESolver(method, steps=16))
    evidence = Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X).sum()
    found = importance_posterior(conjugate, guide, X, num_samples=500)
    gap = abs(float(found.log_evidence.value - evidence))
    assert found.solver_error / 3 < gap < 2 * found.solver_error
    of_draws = found.log_weights.std() / math.sqrt(500)
    assert gap > 5 * of_draws
    assert found.log_evidence.standard_error == pytest.approx(
        math.hypot(found.solver_error, of_draws), rel=0.02
    )


def test_training_finds_the_posterior():
    """Of one seed: 250 steps bring means within 0.25 sd, sds within a quarter; weights correct the rest.

    The evidence of 2000 weighted draws is within 4.5 of its standard errors (7e-6).
    """
    guide = AutoAmortized(conjugate, observed=["x"], denoiser=small)
    history = fit_amortized(guide, guide.simulate(4000), steps=250, lr=5e-3, progress=False)
    losses = list(history.validations.values())
    assert losses[-1] < losses[0] - 0.5
    assert not guide.training
    found = importance_posterior(conjugate, guide, X, num_samples=2000)
    draws = found.draws["mean"]
    assert ((draws.mean(0) - SHRINK * X) / SD).abs().max() < 0.25
    assert (draws.std(0) / SD - 1).abs().max() < 0.25
    evidence = Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X).sum()
    gap = found.log_evidence.value - evidence
    assert abs(gap) < 4.5 * found.log_evidence.standard_error
    assert found.log_evidence.ess > 1000
    corrected = (found.weights.unsqueeze(1) * draws).sum(0)
    assert ((corrected - SHRINK * X) / SD).abs().max() < 4.5 / math.sqrt(1000)
    assert found.sample(10)["mean"].shape == (10, 2)


def test_svi_and_the_trainer_train_the_same_network():
    guide = untrained(conjugate)
    before = {name: p.clone() for name, p in guide.named_parameters()}
    svi = SVI(guide.training_model, lambda **_: None, Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step(**guide.simulate(50)))
    after = dict(guide.named_parameters())
    assert all(not torch.equal(before[name], p) for name, p in after.items())
    before = {name: p.clone() for name, p in guide.named_parameters()}
    trainer = Trainer(guide.training_model, optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    trainer.fit(guide.simulate(50), steps=2, batch_size=20, progress=False)
    assert all(not torch.equal(before[name], p) for name, p in guide.named_parameters())
    with pyro.settings.context(module_local_params=True):
        guide = untrained(conjugate)
        elbo = Trace_ELBO()(guide.training_model, lambda **_: None)
        elbo(**guide.simulate(50)).backward()
        assert all(p.grad is not None for p in guide.parameters())


def test_a_module_summarizes():
    class Moments(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x):
            return self.linear(torch.stack([x.mean(-1), x.std(-1)], -1))

    def model(x=None):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("x", Normal(mean, 1.0), obs=x)

    summary = Moments()
    guide = AutoAmortized(model, summary, observed=["x"], denoiser=small)
    simulations = guide.simulate(100)
    svi = SVI(guide.training_model, lambda **_: None, Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(3):
        svi.step(**simulations)
    assert guide.posterior.summary is summary
    assert guide(torch.randn(8))["mean"].shape == ()
    assert guide(torch.randn(5, 8))["mean"].shape == (5, 1)  # beside the plate
    for wrong in (nn.Flatten(0), nn.Identity()):
        guide = AutoAmortized(conjugate_pair, wrong, observed=["x"], denoiser=small)
        with pytest.raises(ValueError, match="summary: got"):
            guide.simulate(50)


def conjugate_pair(x=None):
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    pyro.sample("x", Normal(mean, 1.0).expand([2, 3]).to_event(2), obs=x)


# --- programs ----------------------------------------------------------------------------------------


def many_supports(x=None):
    low = pyro.sample("low", Uniform(-2.0, -1.0))
    share = pyro.sample("share", Beta(2.0, 2.0))
    mix = pyro.sample("mix", Dirichlet(torch.ones(3)))
    wide = pyro.sample("wide", HalfNormal(1.0))
    with pyro.plate("groups", 2):
        local = pyro.sample("local", Normal(low, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("x", LogNormal(local * share + mix[..., 0].sum(), 1.0 + wide), obs=x)


def test_no_draw_is_outside_of_the_support():
    guide = untrained(many_supports)
    x = LogNormal(0.0, 1.0).sample((3, 2))
    draws = Predictive(guide, num_samples=500, parallel=True)(x)
    nodes = poutine.trace(many_supports).get_trace().nodes
    for name in ("low", "share", "mix", "wide", "local"):
        assert draws[name].numel() == 500 * nodes[name]["value"].numel()
        assert bool(nodes[name]["fn"].support.check(draws[name]).all())
    assert Predictive(many_supports, guide=guide, num_samples=2)(x)["local"].shape[-1] == 2
    with torch.no_grad():
        assert math.isfinite(Trace_ELBO().loss(many_supports, guide, x))


def test_positive_data_are_seen_by_their_logarithms():
    guide = untrained(many_supports, plates=())
    x = LogNormal(0.0, 5.0).sample((1000, 3, 2))
    site = guide.posterior.observed[0]
    assert bool(site.log)
    assert torch.allclose(site(x) * site.scale + site.loc, x.log(), atol=1e-4)


def test_the_density_is_one_in_the_latents_own_space():
    def model(x=None):
        share = pyro.sample("share", Beta(2.0, 3.0))
        pyro.sample("x", Normal(share, 1.0), obs=x)

    guide = untrained(model)
    at = (torch.arange(2000) + 0.5) / 2000
    total = guide.log_prob({"share": at}, torch.tensor(0.4)).exp().mean()
    assert abs(total - 1) < 0.01


def test_data_side_by_side_in_plates():
    guide = untrained(many_supports)
    x = LogNormal(0.0, 1.0).sample((7, 3, 2))
    drawn = guide(x)
    assert drawn["mix"].shape == (7, 1, 1, 3)
    assert drawn["local"].shape == (7, 1, 2)

    def side_by_side(x):
        with pyro.plate("observations", len(x), dim=-3):
            return guide(x)

    draws = Predictive(side_by_side, num_samples=5, parallel=True)(x)
    assert draws["mix"].shape == (5, 7, 1, 1, 3)
    assert draws["local"].shape == (5, 7, 1, 2)


def test_nuisance_latents_are_integrated_out():
    """Of 2000 simulations; discrete ones may be among them."""

    def model(x=None):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        sign = pyro.sample("sign", Bernoulli(0.5))
        noise = pyro.sample("noise", Normal(0.0, 1.0))
        pyro.sample("x", Delta(mean * (2 * sign - 1) + noise), obs=x)

    guide = untrained(model, latents=["mean"])
    assert set(guide(torch.tensor(0.3))) == {"mean"}
    assert set(guide.simulate(20)) == {"mean", "x"}
    with pytest.raises(ValueError, match="site 'sign': got a discrete latent"):
        AutoAmortized(model, observed=["x"]).simulate(20)
    hidden = poutine.block(model, hide=["sign", "noise"])
    assert set(AutoAmortized(hidden, observed=["x"]).simulate(20)) == {"mean", "x"}


@pytest.mark.parametrize("where", ["names", "arguments", "condition"])
def test_observed_sites_are_named_or_found(where):
    names = ["x"] if where == "names" else None
    model = pyro.condition(conjugate, data={"x": X}) if where == "condition" else conjugate
    guide = AutoAmortized(model, observed=names, denoiser=small)
    simulations = guide.simulate(500, *([X] if where == "arguments" else []))
    # simulated, not given: 500 draws of variance 1.25 (more than 5 standard errors from 0)
    assert simulations["x"].var(0).min() > 0.8
    assert guide(*([] if where == "condition" else [X]))["mean"].shape == (2,)


def test_simulations_are_run_at_once_only_if_that_is_the_same():
    def branch(x=None):
        a = pyro.sample("a", Normal(0.0, 1.0))
        pyro.sample("x", Normal(1.0 if a > 0 else -1.0, 1.0), obs=x)

    def mixed(x=None):
        a = pyro.sample("a", Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", Normal(a.mean(), 1.0), obs=x)

    def right(x=None):
        a = pyro.sample("a", Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", Delta(a.exp().sum(-1)), obs=x)

    def rare(x=None):  # no branch of three runs, but one of three hundred side by side
        a = pyro.sample("a", Normal(0.0, 1.0))
        pyro.sample("x", Normal(a if a.abs().max() < 2.5 else 0 * a, 0.1), obs=x)

    def crowded(x=None):  # likewise, and no number is read
        a = pyro.sample("a", Normal(0.0, 1.0))
        pyro.sample("x", Normal(torch.where(a.abs().max() < 2.5, a, a + 5), 0.1), obs=x)

    found = {}
    for model in (branch, mixed, rare, crowded, right):
        guide = AutoAmortized(model, observed=["x"], denoiser=small)
        simulations = guide.simulate(300)
        found[model.__name__] = guide._simulator.vectorized
        if model is mixed:  # as simulated one by one: variance 1/3 + 1 (5 standard errors: 3e-7)
            assert abs(simulations["x"].var() / (4 / 3) - 1) < 5 * math.sqrt(2 / 300)
    assert found.pop("right") and len(found) == 4 and not any(found.values())


def test_many_simulations_are_one_run():
    runs = []

    def model(x=None):
        runs.append(1)
        a = pyro.sample("a", Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", Normal(a, 1.0), obs=x)

    guide = untrained(model)
    runs.clear()
    values = guide.simulate(1000)
    assert len(runs) == 1
    assert values["a"].shape == (1000,) and values["x"].shape == (1000, 3)


def test_among_other_guides():
    def model(x=None, y=None):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        other = pyro.sample("other", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean + other, 1.0), obs=x)

    x = torch.tensor(0.5)
    amortized = untrained(model, latents=["mean"])
    guide = AutoGuideList(model)
    guide.append(amortized)
    guide.append(AutoNormal(poutine.block(model, hide=["mean"])))
    amortized.requires_grad_(False)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    assert math.isfinite(svi.step(x))
    assert set(Predictive(model, guide=guide, num_samples=3)(x)) >= {"mean", "other"}


# --- the trap, seeds and states ----------------------------------------------------------------------


def test_an_elbo_on_the_simulator_is_refused(exact):
    guide = untrained(conjugate)
    for loss in (
        lambda: SVI(conjugate, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step(X),
        lambda: Trace_ELBO()(conjugate, guide)(X),
    ):
        with pytest.raises(
            ValueError, match=r"Trace_ELBO\(\)\(guide.training_model, empty_guide\)"
        ):
            loss()


def test_a_run_repeats_with_the_seed():
    guide = untrained(conjugate)
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        draws.append(guide(X)["mean"])
    assert torch.equal(*draws)
    assert not draws[0].requires_grad


@pytest.mark.parametrize("kind", ["torch", "checkpoint"])
def test_a_fresh_guide_takes_the_state(kind, tmp_path):
    guide = untrained(many_supports)
    if kind == "torch":
        torch.save(guide.state_dict(), tmp_path / "guide.pt")
        state = torch.load(tmp_path / "guide.pt", weights_only=True)
    else:
        checkpoint.save(tmp_path / "guide.safetensors", guide.state_dict())
        state = checkpoint.load(tmp_path / "guide.safetensors")
    fresh = AutoAmortized(many_supports, observed=["x"], denoiser=small)
    fresh.load_state_dict(state)
    x = LogNormal(0.0, 1.0).sample((3, 2))
    drawn = []
    for each in (guide, fresh):
        pyro.set_rng_seed(1)
        drawn.append(each(x))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    other = AutoAmortized(conjugate, observed=["x"], denoiser=small)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="those of the state that was loaded"):
        other(X)


# --- data and simulations that are not as expected ---------------------------------------------------


def test_unlike_data_are_told_at_the_stated_rate():
    """At most 1 in 1000 of 20,000 fresh simulations, with 4.5 standard errors of both samples."""
    guide = AutoAmortized(conjugate, observed=["x"], denoiser=small)
    guide.simulate(20_000)
    familiar = guide.posterior.familiar
    assert 0.0009 < float(familiar.rate) <= 0.001
    x = guide.simulate(20_000)["x"]
    share = (familiar.distance(guide.posterior.rows([x], x.shape[:1])) > familiar.limit).double()
    assert abs(share.mean() - 0.001) < 4.5 * math.sqrt(0.001 * (1 / 20_000 + 1 / 10_000))
    with pytest.warns(UnreliableWarning, match="1 of 3 observations at a Mahalanobis distance"):
        guide(torch.cat([MANY[:2], torch.tensor([[6.0, -6.0]])]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(MANY)


def test_discrete_data_at_the_limit_are_not_unlike():
    """More than 1 of 8 simulations is at the largest distance, one by one or together."""

    def coins(x=None):
        a = pyro.sample("a", Normal(0.0, 1.0))
        pyro.sample("x", Bernoulli(logits=a.unsqueeze(-1).expand(*a.shape, 3)).to_event(1), obs=x)

    guide = AutoAmortized(coins, observed=["x"], denoiser=small)
    for seed in range(5):
        pyro.set_rng_seed(seed)
        x = guide.simulate(1000)["x"]
        guide.posterior.familiar.fit(guide.posterior.rows([x], x.shape[:1]))
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for corner in corners:
                guide.get_posterior(corner)
            guide.get_posterior(corners)


def test_values_that_single_precision_does_not_tell_apart_are_refused():
    def clock(x=None, start=1.6e9, spread=1.0):
        a = pyro.sample("a", Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", Delta(start + spread * a), obs=x)

    guide = AutoAmortized(clock, observed=["x"], denoiser=small)
    with pytest.raises(ValueError, match="site 'x': got values that vary by less than torch"):
        guide.simulate(50)
    guide = AutoAmortized(clock, observed=["x"], denoiser=small)
    guide.simulate(50, start=100.0)
    AutoAmortized(clock, observed=["x"], denoiser=small).simulate(50, start=0.1, spread=1e-16)
    AutoAmortized(clock, observed=["x"], denoiser=small).simulate(50, spread=0.0)


def test_latents_at_the_edge_are_dropped():
    """Many shares, in a plate of two, are nearer to 1 than single precision tells, and rates to 0."""

    def model(x=None):
        with pyro.plate("two", 2):
            share = pyro.sample("share", Beta(2.0, 0.1))
        rate = pyro.sample("rate", Gamma(0.01, 1.0))
        pyro.sample("x", Normal(share.sum(-1) + rate.reshape(share.shape[:-1]), 1.0), obs=x)

    guide = AutoAmortized(model, observed=["x"], denoiser=small, vectorized=False, plates=())
    with pytest.warns(
        UserWarning, match="at the edge of their support or beyond, and were dropped"
    ) as told:
        simulations = guide.simulate(400)
    kept = len(simulations["rate"])
    assert f"; {400 - kept} there, where the prior is cut" in str(told[0].message)
    assert guide.dropped == 400 - kept > 0
    assert float(simulations["share"].max()) < 1 - torch.finfo(torch.float32).eps
    assert float(simulations["rate"].min()) > torch.finfo(torch.float32).tiny


def test_shares_too_small_for_their_stick_are_dropped():
    """Of a sparse Dirichlet what is left beside a share near 1 is less than rounding."""

    def model(x=None):
        share = pyro.sample("share", Dirichlet(torch.full((1, 3), 0.1)).to_event(1))
        pyro.sample("x", Normal(share, 0.5).to_event(2), obs=x)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoAmortized(model, observed=["x"], denoiser=small)
    with pytest.warns(UserWarning, match="there, where the prior is cut"):
        share = guide.simulate(2000)["share"]
    assert guide.dropped == 2000 - len(share) > 100
    there = biject_to(constraints.simplex)
    gap = (there(there.inv(share)).log() - share.log()).abs()
    assert gap.max() < 1  # all that is kept comes back; that of those dropped was up to 88


def test_invalid_simulations_are_dropped():
    def model(x=None, bad=0.0):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        pyro.sample("x", Delta((mean - bad).log()), obs=x)

    guide = AutoAmortized(model, observed=["x"], denoiser=small)
    with pytest.warns(UserWarning, match=r"simulations: \d+ of 400 were NaN, infinite"):
        simulations = guide.simulate(400)
    kept = len(simulations["mean"])
    assert guide.dropped == 400 - kept
    assert (simulations["mean"] > 0).all()
    assert kept == len(simulations["x"])
    with pytest.raises(ValueError, match="400 simulations none of which is finite"):
        guide.simulate(400, bad=100.0)
    with pytest.warns(UserWarning, match="1 of 3 were NaN"):
        table = guide.accept({"mean": torch.tensor([1.0, math.nan, 2.0]), "x": torch.zeros(3)})
    assert table["mean"].tolist() == [1, 2]


def test_bad_data():
    guide = untrained(conjugate)
    with pytest.raises(ValueError, match="site 'x': got no data"):
        guide()
    with pytest.raises(ValueError, match="site 'x': got NoneType, expected a tensor of numbers"):
        guide.draw(2, {"x": None})
    with pytest.raises(ValueError, match=r"site 'x': got data of shape \(3,\), expected \(2,\)"):
        guide(torch.zeros(3))
    with pytest.raises(ValueError, match="site 'x'"):
        guide(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="latents: got no value of"):
        guide.log_prob({}, X)
    guide = untrained(many_supports)
    with pytest.raises(ValueError, match="site 'x': got -1 as least value, expected positive"):
        guide(-torch.ones(3, 2))


def refused(*cases):
    """Each case is a program, the names of its observed sites and the message that it must raise."""
    for model, names, message in cases:
        with pytest.raises(ValueError, match=message):
            AutoAmortized(model, observed=names).simulate(50)


def test_programs_that_change_from_run_to_run_are_refused():
    def growing(x=None):
        size = int(torch.randint(1, 1000, ()))
        a = pyro.sample("a", Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("x", Normal(a.sum(-1), 1.0), obs=x)

    def coming(x=None):
        a = pyro.sample("a", Normal(0.0, 1.0))
        name = f"b{int(torch.randint(1, 1000, ()))}"
        pyro.sample("x", Normal(a + pyro.sample(name, Normal(0.0, 1.0)), 1.0), obs=x)

    def moving(x=None):
        a = pyro.sample("a", Uniform(0.0, 1.0))
        b = pyro.sample("b", Uniform(0.0, a))
        pyro.sample("x", Normal(b, 1.0), obs=x)

    refused(
        (growing, ["x"], "site 'a': got shapes"),
        (coming, ["x"], "in some runs only"),
        (moving, ["x"], "site 'b': got a support that differs"),
    )


def test_programs_with_sites_that_have_no_place_are_refused():
    def nothing(x=None):
        pyro.sample("a", Normal(0.0, 1.0))

    def weighted(x=None):
        a = pyro.sample("a", Normal(0.0, 1.0))
        pyro.factor("f", -a)
        pyro.sample("x", Normal(a, 1.0), obs=x)

    def part(x=None):
        with pyro.plate("data", 10, subsample_size=5):
            a = pyro.sample("a", Normal(0.0, 1.0))
            pyro.sample("x", Normal(a, 1.0), obs=x)

    refused(
        (nothing, None, "observed: got a model without observed sites"),
        (nothing, ["x"], "observed: got .* expected names of sites"),
        (nothing, ["a"], "latents: got"),
        (weighted, ["x"], "pyro.factor sites"),
        (part, ["x"], "plate 'data': got a subsample"),
    )


def test_programs_with_weights_and_odd_supports_are_refused():
    def masked(x=None):
        a = pyro.sample("a", Normal(0.0, 1.0))
        with poutine.mask(mask=torch.tensor([True, False])), pyro.plate("data", 2):
            pyro.sample("x", Normal(a, 1.0), obs=x)

    def scaled(x=None):
        a = pyro.sample("a", Normal(0.0, 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", Normal(a, 1.0), obs=x)

    def computed(x=None):
        pyro.deterministic("x", pyro.sample("a", Normal(0.0, 1.0)))

    def on_a_sphere(x=None):
        a = pyro.sample("a", ProjectedNormal(torch.ones(2)))
        pyro.sample("x", Normal(a[..., 0], 1.0), obs=x)

    refused(
        (masked, ["x"], r"model: got a mask or scale at \['x'\]"),
        (scaled, ["x"], r"model: got a mask or scale at \['x'\]"),
        (computed, ["x"], r"observed: got \['x'\], which the model computes"),
        (on_a_sphere, ["x"], r"site 'a': got a support \(.*Sphere.*\) that no transform"),
    )


def test_fixed_rows_of_a_plate_are_no_scale():
    def rows(x=None):
        a = pyro.sample("a", Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample=torch.arange(5)):
            pyro.sample("x", Normal(a, 1.0), obs=x)

    assert AutoAmortized(rows, observed=["x"]).simulate(50)["x"].shape == (50, 5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="model: got int"):
        AutoAmortized(3)
    with pytest.raises(ValueError, match="summary: got str"):
        AutoAmortized(conjugate, "mean")
    with pytest.raises(ValueError, match="objective: got str"):
        AutoAmortized(conjugate, objective="bound")
    with pytest.raises(ValueError, match="denoiser: got a function that returned Linear"):
        AutoAmortized(conjugate, observed=["x"], denoiser=nn.Linear).simulate(50)
    with pytest.raises(ValueError, match="denoiser: got GaussianDenoiser, expected a function"):
        AutoAmortized(conjugate, denoiser=small(2, 2))
    with pytest.raises(ValueError, match="vectorized: got 'yes'"):
        AutoAmortized(conjugate, vectorized="yes")
    guide = AutoAmortized(conjugate, observed=["x"], denoiser=small)
    with pytest.raises(ValueError, match="guide without simulations"):
        guide(X)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        guide.simulate(0)
    with pytest.raises(ValueError, match="at least 20 the first time"):
        guide.simulate(10)
    simulations = guide.simulate(50)
    with pytest.raises(ValueError, match=r"simulations: got no values of \['x'\]"):
        guide.training_model(mean=simulations["mean"])
    with pytest.raises(ValueError, match="simulations: got shapes"):
        guide.training_model(mean=simulations["mean"], x=simulations["x"][:, :1])
    with pytest.raises(ValueError, match="guide: got AutoNormal"):
        fit_amortized(AutoNormal(conjugate), simulations)
    for wrong in (
        [simulations],
        {"mean": simulations["mean"].numpy()},
        {"mean": torch.tensor(0.0)},
    ):
        with pytest.raises(
            ValueError, match=r"simulations: got (list|dict), expected a dictionary"
        ):
            fit_amortized(guide, wrong)
    with pytest.raises(ValueError, match="held_out: got 1"):
        fit_amortized(guide, simulations, held_out=1)
    with pytest.raises(ValueError, match="rows"):
        fit_amortized(guide, {})


def test_a_sorted_table_has_the_limit_of_a_shuffled_one():
    rows = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).sort(dim=0).values
    limits = []
    for table in (rows, rows[torch.randperm(4000, generator=torch.Generator().manual_seed(1))]):
        familiar = Familiar(1)
        familiar.fit(table)
        limits.append(familiar.limit)
    torch.testing.assert_close(*limits, rtol=0.25, atol=0.0)  # in halves by order, twice as large


@pytest.mark.parametrize("order", ["sorted", "in pairs"])
def test_held_out_simulations_are_like_the_others_in_any_table(order):
    """Not the last of a sorted table, nor every second of one that repeats itself."""
    seen = []

    class Recorded(AutoAmortized):
        def training_model(self, **simulations):
            seen.append((self.training, simulations["theta"]))
            return super().training_model(**simulations)

    theta = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    theta = (
        theta.sort(dim=0).values if order == "sorted" else torch.cat([theta.abs(), -theta.abs()], 1)
    )
    theta = theta.reshape(-1)

    def model(x=None):
        mean = pyro.sample("theta", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean, 0.1), obs=x)

    guide = Recorded(model, observed=["x"])
    table = guide.accept({"theta": theta, "x": theta})
    fit_amortized(guide, table, steps=2, held_out=0.25, progress=False)
    held = torch.cat([value for training, value in seen if not training]).unique()
    assert len(held) == len(theta.unique()) // 4
    # Means of a hundred of four hundred: within five of their standard errors.
    assert abs(held.mean()) < 0.5
    with pytest.raises(ValueError, match=r"^simulations: got \{'theta': .* rows, expected as many"):
        fit_amortized(guide, {"theta": theta, "x": theta[1:]}, progress=False)
