"""Missing data are absent, not an error: the numbers and gradients are those of what is there."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import mixture
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from small_diffusions import Tiny
from torch import nan

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import SDESolver
from pyro_diffusion.guidance import MMPS, DataCovariance, PlugIn
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.optim import JointOptim
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

Y = torch.tensor([1.0, nan, -0.6, nan])
THERE = Y.isfinite()
FILLED = torch.where(THERE, Y, 0.0)
SCALE = 0.3


def standard():
    process = GaussianProcess(Cosine())
    return MixtureDenoiser(process, torch.ones(1), torch.zeros(1, 4), 1.0)


def whole(y):
    """The observation of the whole datum, complete."""
    return lambda x: pyro.sample("y", dist.Normal(x, SCALE).to_event(1), obs=y)


def elements(x, y):
    """One observation a coordinate, in a plate, under a mask outside or inside."""
    with pyro.plate("coordinates", 4, dim=-1):
        return pyro.sample("y", dist.Normal(x, SCALE).mask(THERE), obs=y)


def handler(x, y):
    with pyro.plate("coordinates", 4, dim=-1), poutine.mask(mask=THERE):
        return pyro.sample("y", dist.Normal(x, SCALE), obs=y)


def inside(x, y):
    return pyro.sample("y", dist.Normal(x, SCALE).mask(THERE).to_event(1), obs=y)


def obs_mask(x, y):
    with pyro.plate("coordinates", 4, dim=-1):
        return pyro.sample("y", dist.Normal(x, SCALE), obs=y, obs_mask=THERE)


def nan_normal(x, y):
    return pyro.sample("y", dist.NanMaskedNormal(x, SCALE).to_event(1), obs=y)


def nan_plate(x, y):
    with pyro.plate("coordinates", 4, dim=-1):
        return pyro.sample("y", dist.NanMaskedNormal(x, SCALE), obs=y)


def multivariate(x, y):
    law = dist.NanMaskedMultivariateNormal(x, SCALE**2 * torch.eye(4))
    return pyro.sample("y", law, obs=y)


def student(x, y):
    with pyro.plate("coordinates", 4, dim=-1):
        return pyro.sample("y", dist.StudentT(4.0, x, SCALE).mask(THERE), obs=y)


def log_normal(x, y):
    with pyro.plate("coordinates", 4, dim=-1):
        return pyro.sample("y", dist.LogNormal(x, SCALE).mask(THERE), obs=y.exp())


PROGRAMS = {
    f.__name__: f
    for f in (elements, handler, inside, obs_mask, nan_normal, nan_plate, multivariate)
}


def likelihood(program, y=Y, **options):
    denoiser = standard()

    def model():
        program(pyro.sample("x", Diffusion(denoiser, (4,))), y)

    return denoiser, ProgramLikelihood(model, **options)


@pytest.mark.parametrize("name", [*PROGRAMS, "student", "log_normal"])
def test_log_density_and_gradient_are_those_of_what_is_there(name):
    program = PROGRAMS.get(name, globals().get(name))
    _, read = likelihood(program)
    x = torch.randn(5, 4).requires_grad_()
    got = read.log_prob(x)
    law = {"log_normal": dist.LogNormal(x, SCALE), "student": dist.StudentT(4.0, x, SCALE)}.get(
        name, dist.Normal(x, SCALE)
    )
    data = FILLED.exp() if name == "log_normal" else FILLED
    expected = (law.log_prob(data) * THERE).sum(-1)
    torch.testing.assert_close(got.squeeze(), expected, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(got.sum(), x)
    (right,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(slope, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_whitened_residual(name):
    _, read = likelihood(PROGRAMS[name])
    x = torch.randn(5, 4).requires_grad_()
    got = read.whitened(x)
    expected = (FILLED - x) / SCALE * THERE
    torch.testing.assert_close(got.residual.reshape(5, 4), expected)
    normalizer = torch.full((5,), -2 * math.log(SCALE) - math.log(2 * math.pi))
    torch.testing.assert_close(got.log_normalizer.reshape(5), normalizer)
    (slope,) = torch.autograd.grad(got.residual.square().sum(), x)
    torch.testing.assert_close(slope, -2 * expected.detach() / SCALE)


@pytest.mark.parametrize("name", PROGRAMS)
def test_posterior_of_a_standard_normal(name):
    denoiser, read = likelihood(PROGRAMS[name])
    # At pure noise the guided mean is that of the posterior, y / 1.09, and 0 where y is missing.
    expected = FILLED / (1 + SCALE**2)
    for guided in (MMPS(denoiser, read), DataCovariance(denoiser, read, covariance=torch.eye(4))):
        mean = guided(torch.zeros(4), torch.tensor(1.0)).mean
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-3)
    # At pure data, by any guidance; and finite in between.
    assert PlugIn(denoiser, read)(torch.zeros(4), torch.tensor(0.5)).mean.isfinite().all()


def test_twisted_smc():
    denoiser, read = likelihood(nan_normal)
    smc = TwistedSMC(Diffusion(denoiser, (4,), 40), read, MMPS, num_particles=256)
    result = smc.run()
    expected = dist.Normal(0.0, math.sqrt(1 + SCALE**2)).log_prob(FILLED[THERE]).sum()
    # The proposal is exact but for the grid: the evidence is within 0.1 nats.
    assert float(result.log_evidence.value) == pytest.approx(float(expected), abs=0.1)


def test_correlated_errors_are_marginalized():
    factor = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.6]])
    y = torch.tensor([[0.4, nan, -1.0], [nan, nan, nan], [0.1, 0.2, 0.3]])
    denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 3), 1.0)

    def model():
        with pyro.plate("data", 3):
            x = pyro.sample("x", Diffusion(denoiser, (3,)))
            law = dist.NanMaskedMultivariateNormal(x, scale_tril=factor)
            pyro.sample("y", law, obs=y)

    read, x = ProgramLikelihood(model), torch.randn(7, 3, 3)
    plain = dist.NanMaskedMultivariateNormal(x, scale_tril=factor)
    expected = torch.stack([plain.log_prob(y.expand(7, 3, 3))]).squeeze(0)
    torch.testing.assert_close(read.log_prob(x), expected, rtol=1e-4, atol=1e-4)
    found = read.whitened(x)
    total = found.log_normalizer - 0.5 * found.residual.square().sum(-1)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_what_no_mask_hides_is_refused():
    def model(law):
        x = pyro.sample("x", Diffusion(standard(), (4,)))
        pyro.sample("y", law(x), obs=Y)

    one = torch.tensor([True, True, True, False])
    for law in (
        lambda x: dist.Normal(x, SCALE).to_event(1),
        lambda x: dist.Normal(x, SCALE).mask(one).to_event(1),
        lambda x: dist.Normal(x, SCALE).to_event(1).mask(torch.tensor(True)),
    ):
        with pytest.raises(ValueError, match=r"site 'y': got \d NaN or infinite"):
            ProgramLikelihood(model, (law,))


ROWS = torch.tensor([True, False, True, False])
VIEWS = {
    "chain": lambda d: Diffusion(d, (2,), 10),
    "sde": lambda d: DiffusionSDE(d, (2,), solver=SDESolver(steps=10)),
    "flow": lambda d: ProbabilityFlow(d, (2,)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_masked_rows_of_the_data_may_be_missing(name):
    x = torch.randn(4, 2)
    broken = torch.where(ROWS[:, None], x, nan)
    network = GaussianDenoiser(Tiny((2,)), GaussianProcess(Cosine()))
    law = VIEWS[name](network)
    got = law.mask(ROWS).log_prob(broken)
    zeros = torch.where(ROWS[:, None], x, 0.0)
    torch.testing.assert_close(got, law.log_prob(zeros) * ROWS)
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    # What is not masked is refused, and so is a mask that the model cannot see.
    with pytest.raises(ValueError, match="value: got"):
        law.mask(~ROWS).log_prob(broken)
    with pytest.raises(ValueError, match="value: got"):
        law.log_prob(broken)


def test_training_on_masked_rows():
    x = torch.where(ROWS[:, None], torch.randn(4, 2), nan)
    network = GaussianDenoiser(Tiny((2,)), GaussianProcess(Cosine()))

    def model():
        pyro.module("denoiser", network)
        with pyro.plate("data", 4):
            pyro.sample("x", Diffusion(network, (2,), 10).mask(ROWS), obs=x)

    svi = SVI(model, lambda: None, JointOptim(torch.optim.Adam, {"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(p.isfinite().all() for p in network.parameters())


def test_a_masked_model_is_a_distribution_as_any_other():
    law = Diffusion(mixture(Cosine()), (2,), 5).expand((4,)).mask(ROWS)
    assert law.expand((3, 4)).log_prob(torch.zeros(3, 4, 2, dtype=torch.float64)).shape == (3, 4)
    assert law.to_event(1).log_prob(torch.zeros(4, 2, dtype=torch.float64)).shape == ()
    assert law.sample().shape == (4, 2)


# A table with a row for each case: holes, nothing missing, nothing there.
TABLE = torch.tensor([[1.0, nan, -0.6, nan], [0.3, 0.1, -1.0, 2.0], [nan, nan, nan, nan]])


def columns(x, y):
    """A site for each column, as a table of different kinds has."""
    for j in range(4):
        seen = y[:, j].isfinite()
        pyro.sample(f"y{j}", dist.Normal(x[..., j], SCALE), obs=y[:, j], obs_mask=seen)


TABLES = {
    "mask": lambda x, y: pyro.sample(
        "y", dist.Normal(x, SCALE).mask(y.isfinite()).to_event(1), obs=y
    ),
    "obs_mask": columns,
    "nan": nan_normal,
}


@pytest.mark.parametrize("guide", [AutoGuidance, AutoTwistedSMC])
@pytest.mark.parametrize("name", TABLES)
def test_rows_of_a_table_in_one_plate(name, guide):
    """Draws of a guide of each row have the moments of its own posterior.

    False alarms: below 1e-4 for 24 means and 24 variances at 4.5 standard errors.
    """
    prior = Diffusion(standard(), (4,), 40)

    def model(y):
        with pyro.plate("rows", len(y)):
            TABLES[name](pyro.sample("x", prior), y)

    sampler = Predictive(model, guide=guide(model), num_samples=1000, parallel=True)
    draws = sampler(TABLE)["x"].squeeze()
    there = TABLE.isfinite()
    mean = torch.where(there, TABLE.nan_to_num() / (1 + SCALE**2), 0.0)
    variance = torch.where(there, SCALE**2 / (1 + SCALE**2), 1.0)
    # The chain of 40 steps is within 0.02 of both.
    room = 4.5 * (variance / 500).sqrt() + 0.02
    assert draws.shape == (1000, 3, 4)
    assert ((draws.mean(0) - mean).abs() < room).all()
    assert ((draws.var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / 500) + 0.1).all()


def test_a_table_with_a_bare_nan_is_refused():
    def model(y):
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", Diffusion(standard(), (4,)))
            pyro.sample("y", dist.Normal(x, SCALE).to_event(1), obs=y)

    for guide in (AutoGuidance(model), AutoTwistedSMC(model)):
        with pytest.raises(ValueError, match=r"site 'y': got 6 NaN .* obs_mask"):
            guide(TABLE)
