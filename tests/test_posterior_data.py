"""Posterior draws in ArviZ: groups, shapes, values against closed forms, and both kinds of input."""

import math

import pyro
import pytest
import torch
from pyro.distributions import HalfNormal, MultivariateNormal, Normal
from pyro.infer import Predictive

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.evaluate import posterior_to_arviz
from pyro_diffusion.evaluate.arviz_versions import az
from pyro_diffusion.guidance import MMPS, ProgramLikelihood
from pyro_diffusion.infer import AutoGuidance, TwistedSMC
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
    data = posterior_to_arviz(draws, program, chains=2)
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
    data = posterior_to_arviz(run, program, draws=50)
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
    data = posterior_to_arviz(draws, two, chains=2)
    assert array(data, "log_likelihood", "y").shape == (2, 4)
    data = posterior_to_arviz(draws)
    assert array(data, "posterior", "s").shape == (1, 8)


@pytest.mark.parametrize(
    ("posterior", "options", "message"),
    [
        ({"x": torch.zeros(5, 2)}, {"chains": 2}, "posterior: got"),
        ({"x": torch.zeros(5, 2), "s": torch.zeros(4)}, {}, "posterior: got"),
        ({}, {}, "posterior: got"),
        ([], {}, "posterior: got"),
        (["x"], {}, "expected a dict of draws or Particles"),
        ({"w": torch.zeros(5, 2)}, {"model": program}, "no draws of x"),
        ({"x": torch.zeros(5, 3)}, {"model": program}, "expected \\(2,\\)"),
        ({"x": torch.zeros(5, 2)}, {"chains": 0}, "chains: got 0"),
    ],
)
def test_bad_input(posterior, options, message):
    with pytest.raises(ValueError, match=message):
        posterior_to_arviz(posterior, **options)
