"""Posterior draws in ArviZ: groups, shapes, values against closed forms, and both kinds of input."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import HalfNormal, MultivariateNormal, Normal, TransformedDistribution
from pyro.distributions.transforms import AffineTransform
from pyro.infer import Predictive

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import Hutchinson
from pyro_diffusion.evaluate import posterior_to_arviz
from pyro_diffusion.evaluate.arviz_versions import az
from pyro_diffusion.guidance import MMPS
from pyro_diffusion.infer import AutoGuidance, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

Y = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
PRIOR = Diffusion(
    MixtureDenoiser(
        GaussianProcess(LogLinear(10, -10)),
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
        1.0,
    ),
    (2,),
    steps=8,
)


def program(y=Y):
    x = pyro.sample("x", PRIOR)
    pyro.factor("nothing", torch.tensor(0.0))
    with pyro.plate("data", 3):
        pyro.sample("y", Normal(x.sum(-1, keepdim=True), 1.0), obs=y)
    pyro.sample("z", Normal(x, 1.0).to_event(1), obs=torch.zeros(2, dtype=torch.float64))


def particles(count=200):
    likelihood = ProgramLikelihood(program)
    return TwistedSMC(PRIOR, likelihood, MMPS, num_particles=count).run()


def array(data, group, name):
    return torch.as_tensor(data[group][name].values)


def test_draws_of_predictive():
    """The pointwise log-likelihood is that of the draws; predictions of y stay apart from the posterior."""
    draws = Predictive(program, guide=AutoGuidance(program, MMPS), num_samples=12)()
    data = posterior_to_arviz(draws, program, num_chains=2)
    x = array(data, "posterior", "x")
    assert x.shape == (2, 6, 2)
    x = x.reshape(12, 2)
    assert torch.equal(x, draws["x"].reshape(12, 2))
    assert set(data["posterior"].data_vars) == {"x"}
    assert set(data["log_likelihood"].data_vars) == {"y", "z"}
    expected = Normal(x.sum(-1, keepdim=True), 1.0).log_prob(Y).reshape(2, 6, 3)
    torch.testing.assert_close(array(data, "log_likelihood", "y"), expected)
    expected = Normal(x, 1.0).log_prob(torch.zeros(2)).sum(-1).reshape(2, 6)
    torch.testing.assert_close(array(data, "log_likelihood", "z"), expected)
    assert torch.equal(array(data, "observed_data", "y"), Y)


def test_predictions_get_a_group_of_their_own():
    draws = {"x": torch.randn(5, 2).double(), "y": torch.randn(5, 3).double()}
    data = posterior_to_arviz(draws, program)
    assert torch.equal(array(data, "posterior_predictive", "y")[0], draws["y"])
    assert set(data["posterior"].data_vars) == {"x"}


def test_particles():
    run = particles()
    data = posterior_to_arviz(run, program, num_samples=50)
    assert array(data, "posterior", "x").shape == (1, 50, 2)
    assert array(data, "sample_stats", "ess").shape == (1, 50)
    assert float(array(data, "sample_stats", "ess")[0, 0]) == pytest.approx(float(run.ess[-1]))
    assert float(array(data, "sample_stats", "ess_min")[0, 0]) == pytest.approx(
        float(run.ess.min())
    )
    assert float(array(data, "sample_stats", "log_evidence")[0, 7]) == run.log_evidence.value
    attrs = data.attrs or data["posterior"].attrs
    assert attrs["inference_library"] == "pyro_diffusion"
    assert attrs["log_evidence"] == pytest.approx(run.log_evidence.value)
    assert attrs["log_evidence_error"] == pytest.approx(run.log_evidence.standard_error)


def test_runs_are_chains():
    """Three runs: their mean evidence against the closed form, and summaries over chains."""
    runs = [particles() for _ in range(3)]
    data = posterior_to_arviz(runs, program)
    assert array(data, "posterior", "x").shape == (3, 200, 2)
    evidence = array(data, "sample_stats", "log_evidence")[:, 0]
    attrs = data.attrs or data["posterior"].attrs
    assert attrs["log_evidence"] == pytest.approx(float(evidence.exp().mean().log()))
    joint = torch.tensor([[1.0, 1.0]] * 3 + [[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    noise = torch.tensor([1.0] * 5, dtype=torch.float64).diag()
    observed = torch.cat([Y, torch.zeros(2, dtype=torch.float64)])
    exact = MultivariateNormal(torch.zeros(5).double(), joint @ joint.mT + noise).log_prob(observed)
    assert abs(attrs["log_evidence"] - float(exact)) < 5 * attrs["log_evidence_error"]
    summary = az.summary(data, var_names=["x"])
    assert (summary["r_hat"].astype(float) < 1.1).all()


def test_leave_one_out():
    """az.loo reads the log-likelihood of the three observations in the plate."""
    data = posterior_to_arviz(particles(1000), program)
    loo = az.loo(data, var_name="y")
    assert math.isfinite(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)


def test_other_latents_and_no_model():
    def two():
        s = pyro.sample("s", HalfNormal(1.0))
        pyro.sample("y", Normal(s, 1.0), obs=torch.tensor(0.3))

    draws = {"s": torch.rand(8)}
    data = posterior_to_arviz(draws, two, num_chains=2)
    assert array(data, "log_likelihood", "y").shape == (2, 4)
    data = posterior_to_arviz(draws)
    assert array(data, "posterior", "s").shape == (1, 8)


DATA = torch.randn(20, generator=torch.Generator().manual_seed(1)).double() + 0.5


def mean_program(scale=1.0, subsample_size=None, rows=None, tempered=1.0, shuffled=False):
    """A normal mean with a normal prior; its posterior is that of n / scale**2 + 1 unit observations."""
    x = pyro.sample("x", Normal(torch.zeros((), dtype=torch.float64), 1.0))
    plate = pyro.plate("data", 20, subsample_size=subsample_size, subsample=rows)
    with poutine.scale(scale=tempered), plate as index:
        data = DATA[torch.randperm(20)] if shuffled else DATA[index]
        pyro.sample("y", Normal(x, scale), obs=data)


def mean_posterior(scale=1.0, draws=800):
    precision = 1 + 20 / scale**2
    return {"x": DATA.sum() / scale**2 / precision + torch.randn(draws).double() / precision**0.5}


def left_out(scale):
    """Exact leave-one-out log predictive densities."""
    precision = 1 + 19 / scale**2
    mean = (DATA.sum() - DATA) / scale**2 / precision
    return Normal(mean, (scale**2 + 1 / precision) ** 0.5).log_prob(DATA)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3
def test_compare_of_two_exports_is_the_exact_difference():
    exports = {
        str(scale): posterior_to_arviz(
            mean_posterior(scale), mean_program, scale=scale, num_chains=4
        )
        for scale in (1.0, 2.0)
    }
    table = az.compare(exports)
    exact = left_out(1.0) - left_out(2.0)
    assert list(table.index) == ["1.0", "2.0"]
    found = abs(float(table.loc["2.0", "elpd_diff"]))
    # The estimate has an error of its own with 800 draws, about .05; ArviZ 1.x rounds to .1.
    assert found == pytest.approx(abs(float(exact.sum())), abs=0.25)
    assert float(table.loc["2.0", "dse"]) == pytest.approx(
        float((20 * exact.var(unbiased=False)).sqrt()), abs=0.1
    )


NOT_POINTWISE = {
    "subsampled": ({"subsample_size": 5}, "plate 'data': got a subsample of 5 of 20"),
    "scaled": ({"tempered": 2.0}, r"site 'y': got log-densities scaled by 2\.0, expected 1"),
    "shuffled": ({"shuffled": True}, "site 'y': got other data at every run"),
}


@pytest.mark.parametrize("name", NOT_POINTWISE)
def test_columns_that_are_no_observation_s_are_refused(name):
    options, message = NOT_POINTWISE[name]
    with pytest.raises(ValueError, match=message):
        posterior_to_arviz(mean_posterior(draws=6), mean_program, **options)


@pytest.mark.parametrize(
    "rows", [None, torch.arange(20), torch.tensor([3, 1, 7]), torch.tensor([4])]
)
def test_columns_are_the_observations_in_order(rows):
    """Rows that the program names are its data, each for itself: without the factor N / B of the plate."""
    draws = mean_posterior(draws=6)
    data = posterior_to_arviz(draws, mean_program, rows=rows)
    own = DATA if rows is None else DATA[rows]
    expected = Normal(draws["x"].unsqueeze(-1), 1.0).log_prob(own)
    torch.testing.assert_close(array(data, "log_likelihood", "y")[0], expected)
    assert torch.equal(array(data, "observed_data", "y"), own)


def test_rows_of_equal_data_are_refused_all_the_same():
    """What the program drew shows in no value here."""

    def model():
        x = pyro.sample("x", Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5):
            pyro.sample("y", Normal(x, 1.0), obs=torch.zeros(5))

    with pytest.raises(ValueError, match="a subsample of 5 of 20 that is drawn anew"):
        posterior_to_arviz({"x": torch.zeros(1)}, model)


def test_masked_observations_say_nothing():
    def masked():
        x = pyro.sample("x", Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", 20), poutine.mask(mask=torch.arange(20) > 2):
            pyro.sample("y", Normal(x, 1.0), obs=DATA)

    found = array(posterior_to_arviz(mean_posterior(draws=6), masked), "log_likelihood", "y")[0]
    assert bool((found[:, :3] == 0).all())
    assert bool((found[:, 3:] != 0).all())


def test_a_site_that_some_draws_do_not_observe_is_refused():
    def fickle():
        x = pyro.sample("x", Normal(0.0, 1.0))
        if x > 0:
            pyro.sample("y", Normal(x, 1.0), obs=torch.tensor(0.3))
        pyro.sample("z", Normal(x, 1.0), obs=torch.tensor(0.3))

    with pytest.raises(ValueError, match="site 'y': got an observation at 2 of 4 draws"):
        posterior_to_arviz({"x": torch.tensor([1.0, -1.0, 2.0, -2.0])}, fickle)


def test_estimates_are_refused():
    """ArviZ takes the log-mean-exp of them, and an estimate's noise would count as evidence."""

    def observes(build):
        def model():
            shift = pyro.sample("shift", Normal(torch.zeros((), dtype=torch.float64), 1.0))
            law = TransformedDistribution(build(), [AffineTransform(shift, 1.0)])
            pyro.sample("x", law, obs=torch.zeros(2, dtype=torch.float64))

        return model

    draws = {"shift": torch.zeros(3, dtype=torch.float64)}
    for build in (
        lambda: PRIOR,
        lambda: DiffusionSDE(PRIOR.denoiser, (2,)),
        lambda: ProbabilityFlow(PRIOR.denoiser, (2,), trace=Hutchinson(2)),
    ):
        with pytest.raises(ValueError, match="whose log_prob is an estimate"):
            posterior_to_arviz(draws, observes(build))
    exact = posterior_to_arviz(draws, observes(lambda: ProbabilityFlow(PRIOR.denoiser, (2,))))
    expected = Normal(0.0, 1.0).log_prob(torch.zeros(())) * 2
    torch.testing.assert_close(
        array(exact, "log_likelihood", "x"), expected.double().expand(1, 3), atol=1e-3, rtol=0
    )


def wide_program():
    x = pyro.sample("x", Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("y", Normal(x.sum(), 1.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize(
    ("posterior", "options", "message"),
    [
        ({"x": torch.zeros(5, 2)}, {"num_chains": 2}, "posterior: got"),
        ({"x": torch.zeros(5, 2), "s": torch.zeros(4)}, {}, "posterior: got"),
        ({}, {}, "posterior: got"),
        ([], {}, "posterior: got"),
        (["x"], {}, "expected a dict of draws or Particles"),
        (3, {}, r"posterior: got \['int'\], expected a dict of draws or Particles"),
        ({"w": torch.zeros(5, 2)}, {"model": program}, "no draws of x"),
        ({"x": torch.zeros(5, 3)}, {"model": program}, "expected \\(2,\\)"),
        ({"x": torch.zeros(5, 2)}, {"num_chains": 0}, "num_chains: got 0"),
        (
            {"x": torch.zeros(5, 3, 2)},
            {"model": wide_program},
            "shape \\(3, 2\\) for 'x', expected",
        ),
    ],
)
def test_bad_input(posterior, options, message):
    with pytest.raises(ValueError, match=message):
        posterior_to_arviz(posterior, **options)
