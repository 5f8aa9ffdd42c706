"""Likelihood figures against exact ones.

Statistical checks are z-scores of independent errors. Unless a test says otherwise the limit is 4.5 standard
errors, which a right program exceeds with probability 7e-6 a check. Seeds are fixed: a test passes always or
never.
"""

import inspect
import math

import arviz as az
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.distributions import Dequantization, Diffusion, Simple
from pyro_diffusion.evaluate import LogLikelihoodEstimate
from pyro_diffusion.evaluate.comparison import stacking_weights
from pyro_diffusion.evaluate.importance import from_log_weights
from pyro_diffusion.pareto import pareto_khat
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear, uniform
from tests.exact import mixture

F64 = torch.float64
LIMIT = 4.5


def check_z(error: Tensor, standard_error: Tensor) -> None:
    """Errors are no larger than their standard errors allow."""
    z = error / standard_error
    assert bool((z.abs() < LIMIT).all()), z


def check_mean(draws: Tensor, expected: Tensor | float) -> None:
    """The mean over the first dimension is the expected one."""
    check_z(draws.mean(0) - expected, draws.std(0) / math.sqrt(len(draws)))


def normal(steps: int, point_mass: bool = False, d: int = 3) -> Diffusion:
    """Isotropic normal data and its exact posterior: the bound is log p at any number of steps."""
    means = torch.full((1, d), 0.4, dtype=F64)
    weights = torch.ones(1, dtype=F64)
    denoiser = MixtureDenoiser(GaussianProcess(Cosine()), weights, means, 0.5, point_mass)
    return Diffusion(denoiser, (d,), times=uniform(steps, F64))


# --- the bound --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_samples": 4}, {"num_terms": 5}], ids=["all", "some"])
def test_bound_is_log_p_where_the_posterior_is_exact(options):
    law = normal(12)
    data = law.denoiser.data().sample((20,))
    many = data.repeat(1000, 1)
    result = evaluate.log_likelihood(law, many, batch_size=len(many), **options)
    # The prior is not quite the data's law at t = 1, where log-SNR is -10: a bias below 1e-4 nats.
    check_mean(result.value.view(1000, 20) - law.denoiser.data().log_prob(data), 0.0)


@pytest.mark.parametrize("point_mass", [False, True])
@pytest.mark.parametrize("options", [{"num_samples": 2}, {"num_terms": 3}], ids=["all", "some"])
def test_bound_is_the_mean_log_weight_of_the_chain(point_mass, options):
    """Against Pyro's traces of the chain, which share no arithmetic with the terms."""
    denoiser = mixture(LogLinear(7, -1), point_mass)  # cut early, so that the prior's term counts
    law = Diffusion(denoiser, (2,), times=uniform(8, F64))
    data = denoiser.data().sample((6,))
    many = data.repeat(1500, 1)
    chains = evaluate.log_weights(law, many, batch_size=len(many)).view(1500, 6)
    terms = evaluate.log_likelihood(law, many, batch_size=len(many), **options).value.view(1500, 6)
    difference = terms.mean(0) - chains.mean(0)
    check_z(difference, ((terms.var(0) + chains.var(0)) / 1500).sqrt())
    assert bool((chains.mean(0) < denoiser.data().log_prob(data) + 0.2).all())


@pytest.mark.parametrize("options", [{"num_samples": 3}, {"num_terms": 4}], ids=["all", "some"])
def test_standard_errors_are_calibrated(options):
    denoiser = mixture(LogLinear(6, -6))
    law = Diffusion(denoiser, (2,), times=uniform(10, F64))
    data = denoiser.data().sample((20,))
    many = data.repeat(400, 1)
    result = evaluate.log_likelihood(law, many, batch_size=len(many), **options)
    scatter = result.value.view(400, 20).var(0).mean()
    claimed = result.standard_error.square().mean()
    # A variance from 20 x 399 degrees of freedom is known to some 3 %.
    if "num_terms" in options:
        assert 0.05 < scatter / claimed < 1.15  # conservative: evenly spaced terms scatter less
    else:
        assert 0.85 < scatter / claimed < 1.15


def test_standard_errors_fall_with_the_number_of_terms():
    """Variances of a mean of M terms are as 1 / M, whatever ``num_samples`` the decoder's term has."""
    denoiser = mixture(LogLinear(6, -6))
    law = Diffusion(denoiser, (2,), times=uniform(200, F64))
    data = denoiser.data().sample((2000,))
    few, many = (
        evaluate.log_likelihood(law, data, num_terms=m, num_samples=50, seed=0).standard_error
        for m in (4, 64)
    )
    # The ratio has a standard deviation of 0.85 over seeds: a false alarm in some 10^6.
    assert 12 < few.square().mean() / many.square().mean() < 21


def test_terms_sum_to_minus_the_value_and_say_where():
    law = normal(7)
    data = law.denoiser.data().sample((30,))
    result = evaluate.log_likelihood(law, data, batch_size=11)
    terms = result.terms
    total = terms.prior + terms.decoder + float(terms.steps.sum())
    assert total == pytest.approx(-result.mean.value, abs=1e-9)
    assert terms.steps.shape == terms.steps_standard_error.shape == (7,)
    assert bool((terms.steps_standard_error > 0).all())
    torch.testing.assert_close(
        terms.log_snr, law.denoiser.process.schedule.log_snr(law.times[1:]), check_dtype=False
    )
    few = evaluate.log_likelihood(law, data, num_terms=2)
    assert few.terms.prior == pytest.approx(terms.prior, abs=1e-9)
    assert bool(torch.isfinite(few.terms.steps).all())


def test_terms_are_those_of_the_distribution():
    law = normal(5, point_mass=True)
    data = law.denoiser.data().sample((1000,))
    terms = evaluate.log_likelihood(law, data, num_samples=4).terms
    for j in range(1, 6):
        again = law.bound_terms(data.repeat(4, 1), j)
        error = float(again.std()) / math.sqrt(4000)
        assert abs(float(terms.steps[j - 1] - again.mean())) < LIMIT * math.sqrt(2) * error


def test_terms_visit_long_chains_evenly():
    law = normal(200)
    data = law.denoiser.data().sample((500,))
    result = evaluate.log_likelihood(law, data, num_terms=10)
    assert result.evaluations == 12  # 10 steps, and the decoder's two
    total = result.terms.prior + result.terms.decoder + float(result.terms.steps.sum())
    assert total == pytest.approx(-result.mean.value, abs=6 * result.monte_carlo_error)
    # Fewer terms than steps: gaps are filled from the nearest visited step.
    sparse = evaluate.log_likelihood(law, data[:3], num_terms=2).terms
    assert bool(torch.isfinite(sparse.steps).all())
    assert bool(torch.isinf(sparse.steps_standard_error).any())


def test_a_training_objective_does_not_change_the_figure():
    law = normal(6)
    simple, data = law.replace(objective=Simple()), law.denoiser.data().sample((8,))
    torch.manual_seed(1)
    plain = evaluate.log_likelihood(law, data)
    torch.manual_seed(1)
    weighted = evaluate.log_likelihood(simple, data)
    torch.testing.assert_close(plain.value, weighted.value, rtol=0, atol=0)


class Shifted(Denoiser):
    """The exact posterior of N(shift, 0.5) for a context ``shift``, one vector per datum."""

    def __init__(self) -> None:
        super().__init__(GaussianProcess(Cosine()))

    def forward(self, xt, t, shift):
        level = self.process.level(t)
        gain = level.alpha * 0.5 / (level.alpha**2 * 0.5 + level.sigma**2)
        mean = shift + gain * (xt - level.alpha * shift)
        scale = (0.5 * (1 - gain * level.alpha)).sqrt()
        return dist.Normal(mean, scale, validate_args=False).to_event(1)


@pytest.mark.parametrize(
    "score", [evaluate.log_likelihood, evaluate.importance_weighted], ids=["bound", "weighted"]
)
def test_every_datum_meets_its_own_context(score):
    shift = torch.linspace(-20, 20, 10, dtype=F64).unsqueeze(-1).expand(10, 2)
    law = Diffusion(Shifted(), (2,), times=uniform(8, F64))
    truth = dist.Normal(shift, math.sqrt(0.5)).to_event(1)
    data = truth.sample()
    result = score(law, data, context={"shift": shift}, num_samples=8, batch_size=4)
    # A shift of 20 is seen by the prior at t = 1: alpha_1^2 20^2 is 0.018 nats. A wrong row costs hundreds.
    assert float((result.value - truth.log_prob(data)).abs().max()) < 2


# --- importance weighting ---------------------------------------------------------------------------


def two_bumps(steps: int, schedule: LogLinear, point_mass: bool = False) -> Diffusion:
    """A bimodal law on the line, whose few-step chain is not the data's law."""
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    means = torch.tensor([[-1.5], [1.0]], dtype=F64)
    denoiser = MixtureDenoiser(GaussianProcess(schedule), weights, means, 0.1, point_mass)
    return Diffusion(denoiser, (1,), times=uniform(steps, F64))


def density(law: Diffusion, data: Tensor) -> Tensor:
    """The model's own density on the line, integrated over its latents one by one."""
    process = law.denoiser.process
    levels = [process.schedule.level(t) for t in law.times]
    grid = torch.linspace(-7, 7, 1401, dtype=F64).unsqueeze(-1)
    weight = process.prior((1,), dtype=F64).log_prob(grid).exp() * float(grid[1] - grid[0])
    for j in range(law.steps, 0, -1):
        kernel = process.reverse(grid, law.denoiser(grid, levels[j]), levels[j - 1], levels[j])
        step = torch.stack([kernel.log_prob(row).exp() for row in grid])  # (to, from)
        weight = step @ weight * float(grid[1] - grid[0])
    decoder = law.decoder(law.denoiser(grid, levels[0]), levels[0], process)
    return torch.stack([decoder.log_prob(row).exp() @ weight for row in data]).log()


@pytest.mark.parametrize("point_mass", [False, True])
def test_weights_average_to_the_density_of_the_model(point_mass):
    law = two_bumps(3, LogLinear(4, -4), point_mass)
    data = torch.tensor([[-1.6], [-1.0], [0.2], [1.0], [1.3]], dtype=F64)
    log_p = density(law, data)
    many = data.repeat(5000, 1)
    weights = evaluate.log_weights(law, many, batch_size=len(many)).view(5000, 5)
    check_mean((weights - log_p).exp(), 1.0)


def test_weighting_rises_to_log_p():
    law = two_bumps(3, LogLinear(4, -4))
    data = torch.tensor([[-1.4], [0.9]], dtype=F64)
    log_p = density(law, data)
    weights = evaluate.log_weights(law, data.repeat(16_384, 1), batch_size=32_768).view(16_384, 2)
    values, errors = [], []
    for samples in (1, 4, 16, 64, 256):
        groups = weights.view(-1, samples, 2)
        each = groups.logsumexp(1) - math.log(samples)
        values.append(each.mean(0))
        errors.append(each.std(0) / math.sqrt(len(each)))
    value, error = torch.stack(values), torch.stack(errors)
    assert bool((value.diff(dim=0) > 0).all())
    assert bool((value < log_p + LIMIT * error).all())
    assert bool(((log_p - value[-1]).abs() < 0.003 + LIMIT * error[-1]).all())
    assert bool((log_p - value[0] > 0.02).all())  # there was a gap to close


def test_weighted_figures_are_calibrated():
    law = two_bumps(3, LogLinear(4, -4))
    data = torch.tensor([[-1.4], [0.9]], dtype=F64)
    result = evaluate.importance_weighted(law, data.repeat(200, 1), num_samples=100, batch_size=400)
    scatter = result.value.view(200, 2).var(0)
    claimed = result.standard_error.view(200, 2).square().mean(0)
    # The delta method at 100 samples; a variance from 199 degrees of freedom is known to some 10 %.
    assert bool(((scatter / claimed - 1).abs() < 0.5).all())
    assert result.kind == "importance-weighted"
    assert result.evaluations == 100 * 4


def test_weighted_is_the_log_mean_of_its_weights():
    law = two_bumps(4, LogLinear(5, -5))
    data = law.sample((7,)).double()
    torch.manual_seed(3)
    weights = evaluate.log_weights(law, data, num_samples=6, batch_size=3)
    torch.manual_seed(3)
    result = evaluate.importance_weighted(law, data, num_samples=6, batch_size=3)
    assert weights.shape == (6, 7)
    torch.testing.assert_close(result.value, weights.exp().mean(0).log())
    expected = weights.exp().sum(0).square() / weights.mul(2).exp().sum(0)
    torch.testing.assert_close(result.ess, expected)


def test_effective_sample_size_and_khat():
    equal = from_log_weights(torch.full((50, 3), -2.0), evaluations=1, dimensions=1)
    torch.testing.assert_close(equal.value, torch.full((3,), -2.0, dtype=F64))
    torch.testing.assert_close(equal.ess, torch.full((3,), 50.0, dtype=F64))
    one = torch.full((50, 1), -1000.0)
    one[7] = 0.0
    torch.testing.assert_close(
        from_log_weights(one, 1, 1).ess, torch.ones(1, dtype=F64), atol=1e-9, rtol=0
    )
    # exp(k E) with E exponential has a Pareto tail of index exactly k.
    tail = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    weights = tail.repeat(20) * torch.empty(20_000, 60, dtype=F64).exponential_()
    result = from_log_weights(weights, 1, 1)
    # One estimate scatters by .06 to .1; the mean of twenty by .022, and its bias is up to .025 (outside in
    # 1e-5 of seeds).
    khat = result.khat.unflatten(0, (20, 3)).mean(0)
    torch.testing.assert_close(khat, tail, atol=0.12, rtol=0)
    assert bool((from_log_weights(-weights, 1, 1).khat < 0).all())  # bounded: it has no tail
    assert bool(((result.ess >= 1) & (result.ess <= 20_000)).all())
    assert bool((result.ess.unflatten(0, (20, 3)).median(0).values.diff() < 0).all())


@pytest.mark.parametrize("samples", [30, 100, 400, 2500])
def test_khat_is_that_of_arviz(samples):
    """To rounding, at sizes of whose tail ArviZ 1.x (rounds down) and 0.23 (rounds up) think alike."""
    shape = torch.tensor([0.1, 0.7, 3.0], dtype=F64)
    weights = shape * torch.empty(samples, 3, dtype=F64).exponential_()
    columns = weights.T.numpy().copy()
    if hasattr(az, "psislw"):
        theirs = az.psislw(columns)[1]
    else:  # of log-likelihoods, which are negative log weights
        from arviz_stats.base import array_stats

        theirs = array_stats.psislw(-columns, axis=-1)[1]
    np.testing.assert_allclose(pareto_khat(weights), theirs, rtol=1e-9)


def test_khat_of_too_few_or_equal_weights_is_infinite():
    for weights in (torch.randn(10, 2), torch.randn(1, 2), torch.full((100, 2), -3.0)):
        assert bool(pareto_khat(weights).isposinf().all())
    some = torch.cat([torch.zeros(95, 1), torch.arange(1.0, 5.0).unsqueeze(1)])  # four in the tail
    assert bool(pareto_khat(some).isposinf().all())
    assert bool(pareto_khat(torch.cat([some, torch.full((1, 1), 9.0)])).isfinite().all())


# --- figures and comparison -------------------------------------------------------------------------


def figure(values: Tensor, kind: str = "exact", **extra: Tensor) -> LogLikelihoodEstimate:
    return LogLikelihoodEstimate(values, torch.zeros(len(values), dtype=F64), kind, 1, 4, **extra)


def test_units_and_errors_of_a_mean():
    values = torch.tensor([-3.0, -5.0, -4.0, -8.0], dtype=F64)
    result = LogLikelihoodEstimate(values, torch.full((4,), 0.2, dtype=F64), "lower bound", 9, 4)
    assert result.mean.value == pytest.approx(-5.0)
    assert result.mean.standard_error == pytest.approx(values.numpy().std(ddof=1) / 2)
    assert result.bits_per_dim.value == pytest.approx(5.0 / (4 * math.log(2)))
    assert result.bits_per_dim.unit == "bits/dim"
    assert result.bits_per_dim.standard_error == pytest.approx(
        result.mean.standard_error / (4 * math.log(2))
    )
    assert result.monte_carlo_error == pytest.approx(0.2 / 2)
    assert (len(result), result.mean.kind, result.mean.evaluations) == (4, "lower bound", 9)
    assert "lower bound" in str(result)
    alone = LogLikelihoodEstimate(values[:1], torch.full((1,), 0.3, dtype=F64), "lower bound", 9, 4)
    assert alone.mean.standard_error == pytest.approx(0.3)


def test_compare_is_paired_by_hand():
    values = {name: torch.randn(50, dtype=F64) + s for name, s in (("a", 0.0), ("b", 1.0))}
    values["c"] = values["b"] - 0.3 - 0.01 * torch.randn(50, dtype=F64)
    table = evaluate.compare({name: figure(v) for name, v in values.items()})
    assert list(table.index) == ["b", "c", "a"]
    assert table["rank"].tolist() == [0, 1, 2]
    for name, v in values.items():
        gap = (values["b"] - v).numpy()
        row = table.loc[name]
        assert row["elpd"] == pytest.approx(float(v.sum()))
        assert row["se"] == pytest.approx(math.sqrt(50) * v.numpy().std(ddof=1))
        assert row["elpd_diff"] == pytest.approx(gap.sum())
        assert row["dse"] == pytest.approx(math.sqrt(50) * gap.std(ddof=1))
    # Nearly parallel models: far less doubt about the difference than about either.
    assert table.loc["c", "dse"] < 0.1 * table.loc["c", "se"]
    assert not table["warning"].any()
    assert isinstance(table, pd.DataFrame)


# ArviZ 1.x rounds its tables unless told otherwise; 0.23 does not know the word.
UNROUNDED = {"round_to": "none"} if "round_to" in inspect.signature(az.compare).parameters else {}


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3
def test_compare_agrees_with_arviz():
    """The same pointwise values through ``az.compare``, whose variances divide by n."""
    n = 60
    values = {name: torch.randn(n, dtype=F64) for name in ("a", "b", "c")}
    figures = {name: figure(v) for name, v in values.items()}
    table = evaluate.compare(figures)
    theirs = az.compare({k: evaluate.to_elpd(v) for k, v in figures.items()}, **UNROUNDED)
    assert list(theirs.index) == list(table.index)
    elpd = "elpd" if "elpd" in theirs else "elpd_loo"
    shrink = math.sqrt((n - 1) / n)
    np.testing.assert_allclose(theirs[elpd].to_numpy(dtype=float), table["elpd"], rtol=1e-6)
    np.testing.assert_allclose(
        theirs["dse"].to_numpy(dtype=float), shrink * table["dse"], rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(theirs["weight"].to_numpy(dtype=float), table["weight"], atol=0.02)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3
def test_held_out_figures_compare_in_arviz():
    """Two exact laws of data from one of them: the difference is their divergence, and ArviZ's is ours."""
    data = 0.3 + torch.randn(2000, 2, dtype=F64)
    right, wrong = (
        dist.Normal(torch.full((2,), m, dtype=F64), 1.0).to_event(1) for m in (0.3, 0.0)
    )
    models = {"right": figure(right.log_prob(data)), "wrong": figure(wrong.log_prob(data))}
    theirs = az.compare({k: evaluate.to_elpd(model) for k, model in models.items()}, **UNROUNDED)
    ours = evaluate.compare(models)
    assert list(theirs.index) == list(ours.index) == ["right", "wrong"]
    elpd = theirs["elpd" if "elpd" in theirs else "elpd_loo"].astype(float)
    np.testing.assert_allclose(elpd, ours["elpd"], atol=0.6)  # 1.x rounds
    np.testing.assert_allclose(theirs["se"].astype(float), ours["se"], rtol=5e-3)
    gap = right.log_prob(data) - wrong.log_prob(data)
    found = abs(float(theirs.loc["wrong", "elpd_diff"]))
    assert found == pytest.approx(float(gap.sum()), rel=1e-9)
    error = math.sqrt(2000) * float(gap.std(unbiased=False))
    assert float(theirs.loc["wrong", "dse"]) == pytest.approx(error, rel=1e-9)
    # 2000 * KL = 2000 * 2 * .3^2 / 2; within 4.5 standard errors of the difference.
    assert abs(found - 180.0) < 4.5 * error


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_heavy_tails_reach_arviz():
    values = torch.randn(2, 10, dtype=F64)
    heavy = figure(values[0], "importance-weighted", khat=torch.full((10,), 0.9))
    light = figure(values[1], "importance-weighted", khat=torch.full((10,), 0.1))
    table = az.compare({"heavy": evaluate.to_elpd(heavy), "light": evaluate.to_elpd(light)})
    told = table["warning"] if "warning" in table else table["diag_elpd"].str.len() > 0
    assert bool(told["heavy"])
    assert not bool(told["light"])


def test_stacking_weights_maximize_the_score():
    values = torch.randn(4, 300, dtype=F64) + torch.tensor([[0.0], [0.1], [-0.1], [-3.0]])
    weights = stacking_weights(values, 5000)
    assert float(weights.sum()) == pytest.approx(1.0)
    # At the maximum the derivative by each weight is 1, or less where the weight is 0.
    slope = (values - (weights.log().unsqueeze(1) + values).logsumexp(0)).exp().mean(1)
    assert bool((slope < 1 + 1e-4).all())
    assert bool(((slope - 1).abs() < 1e-2).logical_or(weights < 1e-3).all())
    others = torch.distributions.Dirichlet(torch.ones(4, dtype=F64)).sample((500,))
    scores = (others.log().unsqueeze(-1) + values).logsumexp(1).mean(1)
    best = (weights.log().unsqueeze(1) + values).logsumexp(0).mean()
    assert bool((scores <= best + 1e-9).all())


def test_compare_warns_of_mixed_kinds_and_heavy_tails():
    values = torch.randn(2, 10, dtype=F64)
    mixed = evaluate.compare({"a": figure(values[0]), "b": figure(values[1], "lower bound")})
    assert mixed["warning"].all()
    heavy = figure(values[0], "importance-weighted", khat=torch.full((10,), 0.9))
    light = figure(values[1], "importance-weighted", khat=torch.full((10,), 0.1))
    table = evaluate.compare({"heavy": heavy, "light": light})
    assert bool(table.loc["heavy", "warning"])
    assert not bool(table.loc["light", "warning"])


# --- ArviZ ------------------------------------------------------------------------------------------


def test_arviz_round_trip(tmp_path):
    law = two_bumps(3, LogLinear(4, -4))
    result = evaluate.importance_weighted(law, law.sample((6,)).double(), num_samples=30)
    path = str(tmp_path / "likelihood.nc")
    evaluate.to_arviz(result, name="y").to_netcdf(path)
    back = az.from_netcdf(path)
    values = back["log_likelihood"]["y"]
    assert values.shape == (1, 1, 6)
    np.testing.assert_array_equal(values.to_numpy()[0, 0], result.value.numpy())
    for key in ("standard_error", "ess", "khat"):
        expected = getattr(result, key).numpy()
        np.testing.assert_array_equal(back["sample_stats"][key].to_numpy()[0, 0], expected)
    attributes = {**back.attrs, **back["log_likelihood"].attrs}
    assert attributes["kind"] == "importance-weighted"
    assert attributes["unit"] == "nats"


def test_arviz_groups_share_the_dimension_of_the_data():
    errors = torch.arange(5, dtype=F64)
    result = LogLikelihoodEstimate(
        torch.randn(5, dtype=F64), errors, "exact", 1, 4, ess=errors, khat=errors
    )
    groups = evaluate.to_arviz(result, name="y")
    for group, keys in (
        ("log_likelihood", ["y"]),
        ("sample_stats", ["standard_error", "ess", "khat"]),
    ):
        for key in keys:
            assert groups[group][key].dims == ("chain", "draw", "y_dim_0")
    assert evaluate.to_elpd(result, name="y").pareto_k.dims == ("y_dim_0",)


def test_arviz_layout_is_chain_by_chain():
    draws = [figure(torch.full((2,), float(k), dtype=F64)) for k in range(6)]
    theta = torch.arange(6, dtype=F64)
    groups = evaluate.to_arviz(draws, posterior={"theta": theta}, num_chains=2)
    expected = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    np.testing.assert_array_equal(groups["posterior"]["theta"].to_numpy(), expected)
    values = groups["log_likelihood"]["x"].to_numpy()
    np.testing.assert_array_equal(values, np.stack([expected, expected], -1))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3
def test_loo_of_parameter_draws():
    """Normal means with conjugate posteriors, whose leave-one-out predictives are known."""
    n, chains, draws = 30, 4, 1000
    data = torch.randn(n, dtype=F64) + 0.5
    groups, exact = {}, {}
    for name, noise in (("unit", 1.0), ("wide", 2.0)):  # the likelihood's scale; prior N(0, 1)
        precision = n / noise**2 + 1
        mean = data.sum() / noise**2 / precision
        theta = mean + torch.randn(chains * draws, dtype=F64) / math.sqrt(precision)
        per_draw = [figure(dist.Normal(value, noise).log_prob(data)) for value in theta]
        groups[name] = evaluate.to_arviz(per_draw, posterior={"theta": theta}, num_chains=chains)
        left = precision - 1 / noise**2
        predictive = dist.Normal(
            (data.sum() - data) / noise**2 / left, math.sqrt(noise**2 + 1 / left)
        )
        exact[name] = predictive.log_prob(data)
    loo = az.loo(groups["unit"])
    found = loo.elpd if hasattr(loo, "elpd") else loo.elpd_loo
    assert float(found) == pytest.approx(float(exact["unit"].sum()), abs=0.2)
    table = az.compare(groups, **UNROUNDED)
    assert list(table.index) == ["unit", "wide"]
    gap = exact["unit"] - exact["wide"]
    assert abs(float(table.loc["wide", "elpd_diff"])) == pytest.approx(float(gap.sum()), abs=0.2)
    error = math.sqrt(n) * float(gap.std(unbiased=False))
    assert float(table.loc["wide", "dse"]) == pytest.approx(error, rel=0.03)


# --- dequantization ---------------------------------------------------------------------------------


def test_dequantization_is_unbiased_for_its_bound():
    base = dist.Normal(torch.tensor(2.3, dtype=F64), 0.8)
    x = torch.arange(-1.0, 6.0, dtype=F64)
    log_p = torch.stack(
        [
            dist.TransformedDistribution(base, [Dequantization()]).log_prob(x.expand(200, 7))
            for _ in range(20)
        ]
    ).view(4000, 7)
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    bound = base.log_prob(x.unsqueeze(-1) + u).mean(-1)
    check_mean(log_p, bound)
    exact = (base.cdf(x + 1) - base.cdf(x)).log()
    assert bool((bound < exact).all())
    # Each estimate is log p at a point of the cell, so its exponential is unbiased for P(x) itself.
    check_mean(log_p.exp(), exact.exp())


def test_dequantization_scales_and_keeps_events():
    scaled = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1),
        [dist.transforms.AffineTransform(8.0, 4.0), Dequantization(event_dim=1)],
    )
    with torch.random.fork_rng():
        real = scaled.base_dist.sample((1000,))
    x = scaled.sample((1000,))
    assert torch.equal(x, (8 + 4 * real).floor())
    assert scaled.log_prob(x).shape == (1000,)
    exact = dist.Normal(torch.tensor(8.0, dtype=F64), 4.0)
    log_p = (exact.cdf(x + 1) - exact.cdf(x)).log().sum(-1)
    # Bins of a quarter standard deviation: the bound is nearly tight, and the Jacobian is in it.
    assert abs(float((scaled.log_prob(x) - log_p).mean())) < 0.05


def test_dequantization_scores_alike_per_instance():
    base = dist.Normal(torch.zeros(5), 1.0)
    x = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0])
    one, other = (dist.TransformedDistribution(base, [Dequantization()]) for _ in range(2))
    before = torch.get_rng_state()
    first = one.log_prob(x)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    assert torch.equal(first, one.log_prob(x))
    assert not torch.equal(first, other.log_prob(x))
    assert one.log_prob(x.long()).dtype == torch.get_default_dtype()


# --- errors at the door -----------------------------------------------------------------------------

DATA = torch.zeros(4, 3, dtype=F64)
BAD = {
    "one sample": (lambda: evaluate.log_likelihood(normal(3), DATA, num_samples=1), "num_samples"),
    "one term": (lambda: evaluate.log_likelihood(normal(3), DATA, num_terms=1), "num_terms"),
    "shape": (lambda: evaluate.log_likelihood(normal(3), DATA[:, :2]), "data"),
    "empty": (lambda: evaluate.log_likelihood(normal(3), DATA[:0]), "data"),
    "nan": (lambda: evaluate.log_likelihood(normal(3), DATA * math.nan), "NaN"),
    "batch": (lambda: evaluate.log_likelihood(normal(3), DATA, batch_size=0), "batch_size"),
    "weighted, one sample": (
        lambda: evaluate.importance_weighted(normal(3), DATA, num_samples=1),
        "num_samples",
    ),
    "weighted, shape": (lambda: evaluate.importance_weighted(normal(3), DATA[:, :2]), "data"),
    "weights, none": (lambda: evaluate.log_weights(normal(3), DATA, num_samples=0), "num_samples"),
    "compare one": (lambda: evaluate.compare({"a": figure(torch.zeros(3))}), "likelihoods"),
    "compare sizes": (
        lambda: evaluate.compare({"a": figure(torch.zeros(3)), "b": figure(torch.zeros(4))}),
        "likelihoods",
    ),
    "arviz chains": (
        lambda: evaluate.to_arviz([figure(torch.zeros(3))] * 3, num_chains=2),
        "num_chains",
    ),
    "arviz uneven chains": (
        lambda: evaluate.to_arviz(
            [figure(torch.zeros(3))] * 4, posterior={"theta": torch.zeros(3)}, num_chains=2
        ),
        "posterior: got",
    ),
    "arviz sizes": (
        lambda: evaluate.to_arviz([figure(torch.zeros(3)), figure(torch.zeros(4))]),
        "likelihood: got",
    ),
    "weights of one datum": (
        lambda: from_log_weights(torch.zeros(5), 1, 1),
        "log_weights: got shape",
    ),
    "no values": (lambda: figure(torch.zeros(0)), "value: got shape"),
    "no tensor": (lambda: figure([0.0, 1.0]), "value: got list"),
    "a table of values": (lambda: figure(torch.zeros(4, 4)), "value: got shape"),
    "elpd of one": (lambda: evaluate.to_elpd(figure(torch.zeros(1))), "likelihood: got 1"),
    "arviz kinds": (
        lambda: evaluate.to_arviz([figure(torch.zeros(3)), figure(torch.zeros(3), "lower bound")]),
        "likelihood",
    ),
    "arviz posterior": (
        lambda: evaluate.to_arviz(
            [figure(torch.zeros(3))] * 2, posterior={"theta": torch.zeros(3)}
        ),
        "posterior",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_at_the_door(name):
    call, expected = BAD[name]
    with pytest.raises(ValueError, match=expected):
        call()
