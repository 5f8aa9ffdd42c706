"""Draws of any guide, corrected by the model: against a conjugate posterior."""

import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Delta, HalfNormal, Normal, Uniform

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.dynamics.refinement import refined
from pyro_diffusion.evaluate import importance_posterior
from pyro_diffusion.infer import AutoTwistedSMC, UnreliableWarning
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

X = torch.tensor([1.0, -0.5, 2.0])


def model(x=X):
    """Means of three groups, each seen once."""
    scale = pyro.sample("scale", HalfNormal(1.0))
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        pyro.sample("x", Normal(mean, 1.0), obs=x)
        pyro.deterministic("twice", 2 * mean + 0 * scale)


def guide(x=X, shift=0.5, width=1.0):
    """Wider than the posterior N(x / 2, 1 / 2), and beside it; `scale` is left to the prior."""
    with pyro.plate("groups", 3):
        pyro.sample("mean", Normal(x / 2 + shift, width))


def test_weights_correct_a_guide_that_is_wrong():
    """4000 draws: evidence within 4.5 standard errors, weighted means within 5 (4e-6 and 2e-6)."""
    found = importance_posterior(model, guide, num_samples=4000)
    evidence = Normal(0.0, math.sqrt(2.0)).log_prob(X).sum()
    gap = found.log_evidence.value - evidence
    assert abs(gap) < 4.5 * found.log_evidence.standard_error
    assert found.draws["mean"].shape == (4000, 3)
    assert found.draws["scale"].shape == (4000,)
    assert set(found.draws) == {"mean", "scale"}
    mean = (found.weights.unsqueeze(1) * found.draws["mean"]).sum(0)
    error = math.sqrt(0.5 / float(found.log_evidence.ess))
    assert ((mean - X / 2) / error).abs().max() < 5
    assert ((found.draws["mean"].mean(0) - X / 2) > 0.3).all()  # as the guide has it
    resampled = found.sample(500)["mean"]
    assert ((resampled.mean(0) - X / 2) / (error + math.sqrt(0.5 / 500))).abs().max() < 5
    assert "4000 draws: log evidence" in str(found)


def test_a_guide_that_misses_is_not_to_be_believed():
    """Of sd 0.15 where the posterior's is 0.7: no draw is in its tails."""
    with pytest.warns(UnreliableWarning, match="importance weights: got 300 draws"):
        importance_posterior(model, lambda x: guide(x, 0.0, 0.15), X, num_samples=300)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_samples: got 1"):
        importance_posterior(model, guide, num_samples=1)
    blind = lambda x: guide(torch.zeros(3))  # noqa: E731
    with (
        pytest.raises(ValueError, match="log_weights: got none, NaN"),
        pyro.validation_enabled(False),
    ):
        importance_posterior(model, blind, X * math.nan, num_samples=10)


def test_a_program_that_is_another_in_a_plate_is_told():
    """Its mean is over all draws there; weights would be constant, the evidence off by a third of a nat."""

    def mixed(x):
        z = pyro.sample("z", Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", Normal(z.mean(), 1.0), obs=x)

    def prior(x):
        pyro.sample("z", Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.warns(UnreliableWarning, match=r"model: got a log-density of .* by itself"):
        importance_posterior(mixed, prior, torch.tensor(2.0), num_samples=100)


def test_estimated_densities_are_no_fault_of_the_program():
    """A chain's density is another estimate at every call, and its guide's has the same noise."""
    process = GaussianProcess(LogLinear(10, -10))
    denoiser = MixtureDenoiser(process, torch.ones(8), torch.eye(8), 0.1)
    prior = Diffusion(denoiser, (8,), steps=32)

    def observed(y):
        x = pyro.sample("x", prior)
        pyro.sample("y", Normal(x, 0.5).to_event(1), obs=y)

    guide = AutoTwistedSMC(observed, num_particles=16, sweeps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreliableWarning)
        importance_posterior(observed, guide, torch.full((8,), 0.1), num_samples=100)


def test_weights_that_are_all_alike_are_believed():
    def exact(x):
        pyro.sample("z", Normal(0.0, 1.0))

    def empty(x):
        exact(x)
        pyro.sample("x", Normal(0.0, 1.0), obs=x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importance_posterior(empty, exact, torch.tensor(0.5), num_samples=100)
    assert float(found.log_evidence.ess) == pytest.approx(100)


def test_programs_without_a_likelihood():
    def simulator(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Delta(z), obs=x)

    def part(x):
        z = pyro.sample("z", Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=3) as index:
            pyro.sample("x", Normal(z, 1.0), obs=x[index])

    def prior(x=None):
        pyro.sample("z", Normal(0.0, 1.0))

    for model, args, message in (
        (simulator, (torch.tensor(0.5),), r"site 'x': got a density of 0 \(.*Delta"),
        (simulator, (), r"model: got no observed site .* \['z', 'x'\]"),
        (part, (torch.zeros(10),), "plate 'data': got a subsample of 3 of 10"),
    ):
        with pytest.raises(ValueError, match=message):
            importance_posterior(model, prior, *args, num_samples=50)


PROCESS = GaussianProcess(LogLinear(12, -10))
CLUSTERS = MixtureDenoiser(PROCESS, torch.ones(2), torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.3)
SEEN = torch.tensor([0.0, 0.25])


def of_flow(steps, noise=0.4):
    """A flow that few steps of Euler's make another one, seen with noise."""
    flow = ProbabilityFlow(CLUSTERS, (2,), solver=ODESolver("euler", steps=steps))

    def program():
        x = pyro.sample("x", flow)
        pyro.sample("y", Normal(x, noise).to_event(1), obs=SEEN)

    return flow, program


def test_draws_of_a_coarse_flow_are_in_the_error():
    """Prior and guide share it, so that it leaves nothing in the weights, and the draws are off.

    By .29 (.03): a false alarm in 1e-9 of seeds.
    """
    (fine, program), (flow, coarse) = of_flow(256), of_flow(2)
    left = importance_posterior(program, lambda: pyro.sample("x", fine), num_samples=4000)
    assert left.solver_error < 0.01
    for guide in (lambda: pyro.sample("x", flow), lambda: None):
        found = importance_posterior(coarse, guide, num_samples=4000)
        gap = abs(float(found.log_evidence.value - left.log_evidence.value))
        assert 0.1 < gap < found.solver_error < 1.0  # a bound
        assert found.solver_error <= float(found.log_evidence.standard_error)


def test_what_is_no_solver_is_not_in_the_solvers_error():
    """A likelihood that is an unbiased estimate; weights of 0; a guide that knows its last draw only."""
    flow, _ = of_flow(64)
    prior = Diffusion(CLUSTERS, (2,), steps=8)

    def seen():
        x = pyro.sample("x", prior)
        pyro.sample("y", Normal(x, 0.5).to_event(1), obs=SEEN)

    def program():
        seen()
        z = pyro.sample("z", flow)
        noisy = z + 0.4 * torch.randn(64, *z.shape)
        estimate = Normal(noisy, 0.3).log_prob(SEEN).sum(-1).logsumexp(0) - math.log(64)
        pyro.factor("estimate", estimate)
        cut = Uniform(z[..., 0] - 1, z[..., 0] + 1, validate_args=False)
        pyro.sample("cut", cut, obs=torch.tensor(0.5))

    particles = AutoTwistedSMC(seen, num_particles=8, sweeps=1)

    def guide():
        pyro.sample("z", flow)
        particles()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        found = importance_posterior(program, guide, num_samples=100)
    assert bool((found.log_weights == -math.inf).any())
    assert 0 < found.solver_error < 0.1 < float(found.log_evidence.standard_error)


def test_of_a_share_of_rows_the_first_are_solved():
    flow, _ = of_flow(8)
    x = torch.randn(10, 3, 2)
    with refined():
        whole = flow.log_prob(x)
    with refined(share=0.4) as asked:
        first = flow.log_prob(x)
    assert asked.solutions == 1
    assert torch.allclose(first[:4], whole[:4]) and not torch.isclose(first[4:], whole[4:]).any()


def test_draws_of_one_run_of_particles_tell_no_error():
    prior = Diffusion(CLUSTERS, (2,), steps=8)

    def seen():
        x = pyro.sample("x", prior)
        pyro.sample("y", Normal(x, 0.5).to_event(1), obs=SEEN)

    with pytest.warns(UnreliableWarning, match="guide: got draws of one run of particles"):
        found = importance_posterior(seen, AutoTwistedSMC(seen, num_particles=8), num_samples=50)
    assert float(found.log_evidence.standard_error) == math.inf
    assert "(error not estimated)" in str(found)
    own = AutoTwistedSMC(seen, num_particles=8, sweeps=1)
    found = importance_posterior(seen, own, num_samples=50)
    assert 0 < float(found.log_evidence.standard_error) < 1


def test_a_scaled_density_has_its_solvers_error_scaled():
    """The flow is in the model alone, so that draws are exact, and all of it is the densities'."""
    flow, program = of_flow(4)
    scaled = poutine.scale(program, 3.0)
    guide = lambda: pyro.sample("x", Normal(torch.zeros(2), 0.8).to_event(1))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        found = importance_posterior(scaled, guide, num_samples=64)
    with refined():
        finer = flow.log_prob(found.draws["x"])
    change = 3 * (finer - flow.log_prob(found.draws["x"]))
    assert found.solver_error == pytest.approx(abs(float((found.weights * change).sum())), rel=1e-3)
