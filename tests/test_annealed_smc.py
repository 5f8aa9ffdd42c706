"""Particles from a guide to the posterior: against conjugate posteriors and evidence in closed form."""

import itertools
import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Gamma,
    HalfNormal,
    ImproperUniform,
    MixtureSameFamily,
    Multinomial,
    MultivariateNormal,
    Normal,
    Poisson,
    VonMises,
    constraints,
)
from pyro.infer import Predictive
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_diffusion.evaluate import posterior_to_arviz
from pyro_diffusion.infer import AnnealedSMC, PathELBO, UnreliableWarning
from pyro_diffusion.infer.annealing.annealed_chain import AnnealedChain, Stage
from pyro_diffusion.infer.annealing.annealed_particles import mean_gap
from pyro_diffusion.infer.annealing.annealing_pilot import interpolated
from pyro_diffusion.infer.annealing.guide_chart import chart_of
from pyro_diffusion.infer.annealing.local_scales import local_scales
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel

X = torch.tensor([1.0, -0.5, 2.0])
GUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
]


def groups(x=X):
    """Means of three groups, each seen once: the posterior of each is N(x / 2, 1 / 2)."""
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean, 1.0), obs=x)


def wide(guide, model, *args):
    """A guide that is not fitted, and wider than most posteriors here."""
    pyro.clear_param_store()
    made = guide(model) if guide is AutoIAFNormal else guide(model, init_scale=1.0)
    made(*args)
    return made


@pytest.mark.parametrize("kind", GUIDES)
def test_every_guide_reaches_a_conjugate_posterior(kind):
    """50 repeats: mean of Z-hat / Z within 4.5 standard errors, moments within .1 (far above their noise)."""
    found = AnnealedSMC(groups, wide(kind, groups), 64, 50).run()
    exact = Normal(0.0, math.sqrt(2)).log_prob(X).sum()
    ratio = (found.log_evidence_terms - exact).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(50)
    assert abs(found.log_evidence.value - exact) < 4.5 * found.log_evidence.standard_error
    assert found.log_evidence.standard_error < 0.05
    assert (found.mean["mean"] - X / 2).abs().max() < 0.1
    assert (found.std["mean"] - math.sqrt(0.5)).abs().max() < 0.1
    assert found.elbo.value < exact < found.eubo.value
    assert found.verdict.believable
    assert "modes that no particle visited are not seen" in str(found)


def counts():
    rate = pyro.sample("rate", Gamma(2.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("n", Poisson(rate), obs=torch.tensor([1.0, 0.0, 3.0, 2.0]))


def coins():
    p = pyro.sample("p", Beta(2.0, 3.0))
    pyro.sample("n", Multinomial(10, torch.stack([p, 1 - p], -1)), obs=torch.tensor([7.0, 3.0]))


def dice():
    p = pyro.sample("p", Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("n", Multinomial(6, p), obs=torch.tensor([1.0, 2.0, 3.0]))


def log_dirichlet_multinomial(alpha, n):
    alpha, n = torch.tensor(alpha), torch.tensor(n)
    norm = lambda a: a.lgamma().sum() - a.sum().lgamma()  # noqa: E731
    return norm(alpha + n) - norm(alpha) + (n.sum() + 1).lgamma() - (n + 1).lgamma().sum()


def log_gamma_poisson():
    """Gamma(2, 1) and counts of sum 6 in 4 data: Gamma(8, 5), with 1! 0! 3! 2! = 12 below."""
    return math.lgamma(8) - math.lgamma(2) - 8 * math.log(5) - math.log(12)


@pytest.mark.parametrize(
    ("model", "evidence", "site", "mean"),
    [
        (counts, log_gamma_poisson(), "rate", torch.tensor(8 / 5)),
        (coins, log_dirichlet_multinomial([2.0, 3.0], [7.0, 3.0]), "p", torch.tensor(9 / 15)),
        (
            dice,
            log_dirichlet_multinomial([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
            "p",
            torch.tensor([2.0, 4.0, 6.0]) / 12,
        ),
    ],
)
def test_supports_with_their_jacobians(model, evidence, site, mean):
    """Evidence within 4.5 standard errors, below .03 (a Jacobian left out is off by far more)."""
    found = AnnealedSMC(model, wide(AutoMultivariateNormal, model), 128, 32).run()
    assert found.log_evidence.standard_error < 0.03
    assert abs(found.log_evidence.value - float(evidence)) < 4.5 * found.log_evidence.standard_error
    assert (found.mean[site] - mean).abs().max() < 0.05
    assert found.draws[site].shape == (128 * 32, *mean.shape)


ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.7, 0.0], [-0.2, 0.3, 1.2]])
ONE_PART = local_scales(torch.zeros(1), torch.zeros(1, 3), ROOT[None])
THREE_PARTS = local_scales(
    torch.tensor([0.2, 0.5, 0.3]).log(),
    torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5], [-1.0, 0.5, 1.0]]),
    torch.stack([ROOT, 0.3 * ROOT, 0.5 * torch.eye(3)]),
)


@pytest.mark.parametrize("scales", [ONE_PART, THREE_PARTS])
def test_a_move_keeps_its_law(scales):
    """20 000 draws of q^(1/2) p^(1/2) = N(x / 3, 2 / 3): mean and variance within 4.5 errors after moves."""
    pyro.clear_param_store()
    guide = AutoNormal(groups, init_scale=1.0, init_loc_fn=lambda site: torch.zeros(3))
    guide()
    chain = AnnealedChain(
        UnconstrainedModel(groups, guide, (), {}), chart_of(guide, (), {}), 20_000, 1
    )
    z = X / 3 + math.sqrt(2 / 3) * torch.randn(20_000, 1, 3)
    state = {"z": z, **chain.density(z)}
    sizes = torch.tensor([0.9, 0.6, 1.1])[: scales.size]
    with torch.no_grad():
        for _ in range(3):
            rate = chain.move(state, Stage(0.5, 1.0, scales, sizes, 3))
    moved = state["z"].squeeze(1)
    assert 0.5 < rate < 0.95
    assert (moved - z.squeeze(1)).abs().mean() > 0.3
    assert ((moved.mean(0) - X / 3) / math.sqrt(2 / 3 / 20_000)).abs().max() < 4.5
    assert ((moved.var(0) / (2 / 3) - 1) / math.sqrt(2 / 20_000)).abs().max() < 4.5


def mixture(x, summed=False):
    locs = pyro.sample("locs", Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        if summed:
            weights = Categorical(torch.tensor([0.3, 0.7]))
            pyro.sample("x", MixtureSameFamily(weights, Normal(locs, 1.0)), obs=x)
        else:
            z = pyro.sample("z", Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", Normal(locs[z], 1.0), obs=x)


def test_discrete_latents_are_summed_over():
    x = torch.tensor([-1.0, 2.0, 2.5, 0.0])
    guide = wide(AutoMultivariateNormal, poutine.block(mixture, hide=["z"]), x)
    u = torch.randn(5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        densities = []
        for summed in (False, True):
            model = UnconstrainedModel(mixture, guide, (x,), {"summed": summed})
            model.check(u)
            densities.append(model(u))
    assert torch.allclose(*densities, atol=1e-5)
    assert AnnealedSMC(mixture, guide, 32, 6).run(x).draws["locs"].shape == (192, 2)


def test_an_improper_prior_needs_no_draw_of_it():
    def model():
        z = pyro.sample("z", ImproperUniform(constraints.positive, (), ()))
        pyro.sample("x", Normal(z.log(), 1.0), obs=torch.tensor(0.0))
        pyro.factor("flat", -z.log())

    pyro.clear_param_store()
    guide = AutoNormal(model, init_scale=1.0, init_loc_fn=lambda site: torch.tensor(1.0))
    found = AnnealedSMC(model, guide, 128, 16).run()
    assert abs(found.log_evidence.value) < 4.5 * found.log_evidence.standard_error


def test_a_model_that_cannot_run_at_once_runs_once_a_draw():
    def branching():
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z if z > 0 else 2 * z, 1.0), obs=torch.tensor(1.0))

    guide = wide(AutoNormal, branching)
    model, u = UnconstrainedModel(branching, guide, (), {}), torch.tensor([[1.0], [-1.0]])
    with pytest.warns(UserWarning, match="runs once a draw"):
        model.check(u)
    expected = Normal(0.0, 1.0).log_prob(u) + Normal(torch.tensor([[1.0], [-2.0]]), 1.0).log_prob(
        torch.tensor(1.0)
    )
    assert torch.allclose(model(u), expected.squeeze(-1))


def test_the_reported_run_takes_the_pilots_temperatures():
    """A given number of them lies where the pilot's would; a chain's cost is its leapfrog steps."""
    guide = wide(AutoNormal, groups)
    sampler = AnnealedSMC(groups, guide, 32, 6, steps=5, final_moves=2, rounds=1)
    model, chart = UnconstrainedModel(groups, guide, (), {}), chart_of(guide, (), {})
    stages, _ = sampler.pilot(model, chart)
    assert len(stages) == 6
    assert stages[0].beta == 0 and stages[-2].next_beta == stages[-1].beta == 1
    assert all(a.next_beta == b.beta for a, b in itertools.pairwise(stages))
    pilot = [
        Stage(b, c, ONE_PART, torch.ones(1), 1) for b, c in ((0.0, 0.2), (0.2, 1.0), (1.0, 1.0))
    ]
    spread = interpolated(pilot, 4)
    assert [round(s.beta, 3) for s in spread] == [0, 0.1, 0.2, 0.6, 1.0]
    found = sampler.run()
    assert len(found.betas) == 6 and found.ess.shape == (5, 6)
    assert len(found.acceptance) == 4 + 2


def test_one_step_is_importance_sampling():
    """Evidence of 4000 draws within 4.5 standard errors."""
    found = AnnealedSMC(groups, wide(AutoNormal, groups), 500, 8, steps=1).run()
    exact = Normal(0.0, math.sqrt(2)).log_prob(X).sum()
    assert abs(found.log_evidence.value - exact) < 4.5 * found.log_evidence.standard_error
    assert found.betas.tolist() == [0, 1]


def test_draws_go_to_pyro_and_arviz():
    found = AnnealedSMC(groups, wide(AutoNormal, groups), 64, 6).run()
    draws = found.sample(40)
    assert draws["mean"].shape == (40, 3)
    predicted = Predictive(poutine.uncondition(groups), posterior_samples=draws)()
    assert predicted["x"].shape == (40, 3)
    data = posterior_to_arviz(draws, groups)
    assert data["log_likelihood"]["x"].shape == (1, 40, 3)


def two_modes():
    """Half at -5, half at 5, of sd .5; evidence 1."""
    z = pyro.sample("z", ImproperUniform(constraints.real, (), ()))
    parts = torch.stack([Normal(-5.0, 0.5).log_prob(z), Normal(5.0, 0.5).log_prob(z)])
    pyro.factor("target", parts.logsumexp(0) - math.log(2))


def test_a_base_on_one_mode_of_two_is_no_all_clear():
    """A mode that no particle visits leaves no trace: the evidence is halved, and the words say so."""
    pyro.clear_param_store()
    guide = AutoNormal(two_modes, init_scale=0.5, init_loc_fn=lambda site: torch.tensor(5.0))
    found = AnnealedSMC(two_modes, guide, 64, 8).run()
    assert abs(found.log_evidence.value + math.log(2)) < 0.05
    assert abs(found.eubo.value - found.elbo.value) < 0.05
    assert "blind to modes" in found.eubo.kind
    assert "modes that no particle visited are not seen" in str(found.verdict)


def test_a_base_wide_enough_finds_both():
    """Weights of the modes within .1 of a half: 2048 particles in 8 repeats."""
    pyro.clear_param_store()
    guide = AutoNormal(two_modes, init_scale=8.0, init_loc_fn=lambda site: torch.tensor(3.0))
    found = AnnealedSMC(two_modes, guide, 256, 8).run()
    assert abs(found.log_evidence.value) < 4.5 * found.log_evidence.standard_error
    weight = (found.log_weights.exp() * (found.draws["z"] > 0)).sum()
    assert abs(weight - 0.5) < 0.1


def test_a_narrow_base_finds_both_when_widened():
    """From one of two modes 20 sds apart; weights within .1 of a half."""
    pyro.clear_param_store()
    guide = AutoNormal(two_modes, init_scale=0.5, init_loc_fn=lambda site: torch.tensor(5.0))
    found = AnnealedSMC(two_modes, guide, 256, 8, widen=3).run()
    assert abs(found.log_evidence.value) < 4.5 * found.log_evidence.standard_error
    weight = (found.log_weights.exp() * (found.draws["z"] > 0)).sum()
    assert abs(weight - 0.5) < 0.1


def test_repeats_that_disagree_are_not_to_be_believed():
    """A posterior of 12-d far from a narrow guide, in two steps."""

    def far():
        z = pyro.sample("z", Normal(torch.zeros(12), 1.0).to_event(1))
        pyro.sample("x", Normal(z, 0.05).to_event(1), obs=torch.linspace(-2, 2, 12))

    pyro.clear_param_store()
    guide = AutoNormal(far, init_scale=0.5)
    with pytest.warns(UnreliableWarning, match="AnnealedSMC: "):
        found = AnnealedSMC(far, guide, 16, 8, steps=2, final_moves=0, rounds=1).run()
    assert not found.verdict.believable
    assert "not to be believed" in str(found)


def test_particles_that_the_last_moves_change_are_not_there_yet():
    """Importance sampling by a guide half as wide: moves that keep the posterior widen the cloud."""

    def wider():
        z = pyro.sample("z", Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.factor("none", 0 * z.sum(-1))

    pyro.clear_param_store()
    guide = AutoNormal(wider, init_scale=0.4)
    with pytest.warns(UnreliableWarning, match="still change under moves that keep the posterior"):
        found = AnnealedSMC(wider, guide, 256, 8, steps=1, rounds=1).run()
    assert found.verdict.drift > 6
    assert AnnealedSMC(wider, guide, 256, 8, conditional_ess=0.99, rounds=1).run().verdict.drift < 6


def test_a_matrix_that_has_no_factor_at_some_draws_ends_no_run():
    """Two data of correlation z, N(0, 1) cut to |z| < 1: evidence by quadrature, within 4.5 errors."""
    x = torch.tensor([0.5, -1.0])

    def correlated():
        z = pyro.sample("z", Normal(0.0, 1.0))
        covariance = torch.eye(2) + z * (1 - torch.eye(2))
        pyro.sample("x", MultivariateNormal(torch.zeros(2), covariance), obs=x)

    pyro.clear_param_store()
    with pyro.validation_enabled(False):
        guide = AutoNormal(correlated, init_scale=0.7, init_loc_fn=lambda site: torch.tensor(0.0))
        guide()
    found = AnnealedSMC(correlated, guide, 64, 16).run()
    z = torch.linspace(-1, 1, 20_003, dtype=torch.float64)[1:-1]
    form = (x[0] ** 2 + x[1] ** 2 - 2 * z * x[0] * x[1]) / (1 - z**2)
    density = Normal(0.0, 1.0).log_prob(z) - form / 2 - (1 - z**2).log() / 2 - math.log(2 * math.pi)
    exact = math.log(float(density.exp().sum()) * 1e-4)
    assert abs(found.log_evidence.value - exact) < 4.5 * found.log_evidence.standard_error
    assert found.draws["z"][found.log_weights > -math.inf].abs().max() < 1


def test_a_start_without_a_density_is_not_tried_again():
    """That would leave out its evidence of 0: 60 runs of 12 draws, each allowed with a chance of .036."""

    def rare():
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.factor("cut", torch.where(z > 1.8, 0.0, -math.inf))

    pyro.clear_param_store()
    guide = AutoNormal(rare, init_scale=1.0, init_loc_fn=lambda site: torch.tensor(0.0))
    sampler = AnnealedSMC(rare, guide, 2, 6, steps=1, final_moves=0, pilot_particles=400, rounds=1)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        for _ in range(60):
            try:
                found.append(math.exp(sampler.run().log_evidence.value))
            except ValueError:
                found.append(0.0)
    evidence = torch.tensor(found)
    exact = 1 - Normal(0.0, 1.0).cdf(torch.tensor(1.8))
    assert abs(evidence.mean() - exact) < 4.5 * evidence.std() / math.sqrt(60)


def test_errors_of_mean_gaps():
    """Draws that are all alike within a repeat count once; one draw has no error."""
    gap = torch.tensor([1.0, 2.0, 4.0, 3.0]).expand(5, 4)
    even = torch.full_like(gap, -math.log(20))
    found = mean_gap(gap, even, "", torch.arange(4).expand(5, 4))
    assert found.standard_error == pytest.approx(float(gap[0].std()) / 2)
    assert mean_gap(gap[0], None, "").standard_error == pytest.approx(float(gap[0].std()) / 2)
    assert mean_gap(gap[0, :1], None, "").standard_error == math.inf


# Bad input.


def no_latent():
    pyro.sample("x", Normal(0.0, 1.0), obs=torch.tensor(0.0))


def unbounded():
    n = pyro.sample("n", Poisson(3.0))
    pyro.sample("z", Normal(n, 1.0))


def subsampled():
    scale = pyro.sample("scale", HalfNormal(1.0))
    with pyro.plate("data", 10, subsample_size=3) as i:
        pyro.sample("x", Normal(0.0, scale), obs=torch.zeros(10)[i])


def varying():
    z = pyro.sample("z", Normal(0.0, 1.0))
    rows = int(torch.randint(100, 10_000, ()))
    pyro.sample("x", Normal(z, 1.0).expand([rows]).to_event(1), obs=torch.zeros(rows))


def impossible():
    z = pyro.sample("z", Normal(0.0, 1.0))
    pyro.sample("x", Normal(z * math.nan, 1.0, validate_args=False), obs=torch.tensor(0.0))


def without_data():
    z = pyro.sample("z", Normal(0.0, 1.0))
    data = torch.tensor([0.0, math.nan])
    pyro.sample("x", Normal(z, 1.0, validate_args=False).expand([2]).to_event(1), obs=data)


def noisy():
    z = pyro.sample("z", Normal(0.0, 1.0))
    pyro.factor("noise", z + torch.randn(()))


def angle():
    """Its density is periodic on the reals: the evidence is infinite."""
    with pyro.plate("two", 2):
        pyro.sample("a", VonMises(0.0, 1.0))


def both():
    coins()
    counts()


def guide_of(model, hide=()):
    return AutoNormal(poutine.block(model, hide=list(hide)) if hide else model)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (
            unbounded,
            guide_of(unbounded, ["n"]),
            r"site 'n': got a latent Poisson, which cannot be enum",
        ),
        (coins, guide_of(both), r"model: got no site \['rate'\]"),
        (counts, guide_of(groups), r"site 'rate': got a latent that the guide has not"),
        (subsampled, guide_of(subsampled), r"plate 'data': got a subsample of 3 of 10"),
        (
            varying,
            guide_of(varying),
            r"model: got sites \['x'\] that come, go or change their shape",
        ),
        (angle, guide_of(angle), r"site 'a': got angles \(VonMises\) among all real numbers"),
        (noisy, guide_of(noisy), r"model: got another log density at a second run"),
    ],
)
def test_models_that_cannot_be_scored_are_refused(model, guide, message):
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=message):
        AnnealedSMC(model, guide, 8, 6).run()


def test_no_density_at_the_start_names_the_site():
    pyro.clear_param_store()
    guide = AutoNormal(impossible)
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r"site 'x' \(Normal\): got nan at a draw of the guide"),
    ):
        AnnealedSMC(impossible, guide, 8, 6).run()


def test_data_that_are_nan_are_named_and_not_the_guide():
    pyro.clear_param_store()
    guide, message = AutoNormal(without_data), r"site 'x' \(Independent\): got NaN or infinite data"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        AnnealedSMC(without_data, guide, 8, 6).run()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        PathELBO(8).loss(without_data, guide)


def test_models_without_continuous_latents_are_refused():
    with pytest.raises(ValueError, match="model: got no continuous latents"):
        AnnealedSMC(no_latent, AutoNormal(no_latent), 8, 6).run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"num_particles": 1}, "num_particles: got 1"),
        ({"num_repeats": 5}, "num_repeats: got 5"),
        (
            {"conditional_ess": 1.0},
            "conditional_ess: got 1.0, expected a finite number > 0 and < 1",
        ),
        ({"ess_threshold": 0.0}, "ess_threshold: got 0"),
        ({"max_leapfrog": 0}, "max_leapfrog: got 0"),
        ({"moves": -1}, "moves: got -1"),
        ({"widen": -1}, "widen: got -1"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"guide": AutoDelta(groups)}, "guide: got AutoDelta"),
        ({"guide": groups}, "guide: got function"),
        ({"model": 3}, "model: got int"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnnealedSMC(**{"model": groups, "guide": AutoNormal(groups), **arguments})


def test_a_laplace_approximation_has_to_be_made():
    pyro.clear_param_store()
    guide = AutoLaplaceApproximation(groups)
    with pytest.raises(ValueError, match=r"AutoLaplaceApproximation, which is a point until"):
        AnnealedSMC(groups, guide, 8, 6).run()
    assert AnnealedSMC(groups, guide.laplace_approximation(), 64, 6).run().verdict.believable


def test_without_final_moves_the_verdict_knows_nothing():
    """Nor are figures that are not there printed as NaN."""
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        still = AnnealedSMC(groups, AutoNormal(groups), 32, 6, moves=0, final_moves=0).run()
        moved = AnnealedSMC(groups, AutoNormal(groups), 32, 6).run()
    assert bool(still.verdict.drift.isnan()) and "nan" not in str(still)
    assert "no final moves" in str(still) and "nothing speaks against" not in str(still)
    assert not bool(moved.verdict.drift.isnan()) and "no final moves" not in str(moved)
