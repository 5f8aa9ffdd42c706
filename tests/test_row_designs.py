"""Arguments other than data, of programs with plates of rows: what the guide did not learn is told."""

import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Delta, Gamma, Normal

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.infer import AutoAmortized, UnreliableWarning
from pyro_diffusion.infer.simulators.designs import rows_alike
from pyro_diffusion.nn import ConditionalMLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

TOLD = "arguments: got others than those of the first simulations"


def small(latents, features):
    network = ConditionalMLP(latents, features, width=8, depth=1)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))


def regression(x=None, covariate=None, mask=None, scale=1.0, groups=6, data=4, name="a"):
    """Groups of data, with known covariates that are ones in the simulations."""
    if x is not None:
        groups, data = x.shape[-2:]
    covariate = torch.ones(groups, data) if covariate is None else covariate
    slope = pyro.sample("slope", Normal(0.0, scale))
    kept = poutine.mask(mask=True if mask is None else mask)
    with pyro.plate("groups", groups, dim=-2):
        local = pyro.sample("local", Normal(0.0, 1.0))
        with pyro.plate("data", data, dim=-1), kept:
            pyro.sample("x", Normal(local + slope * covariate, 0.5), obs=x)


def of_all_rows(x=None, rows=6):
    """A prior that knows how many rows there are."""
    rows = rows if x is None else x.shape[-1]
    mean = pyro.sample("mean", Normal(0.0, 1.0 / rows))
    with pyro.plate("data", rows):
        pyro.sample("x", Normal(mean, 1.0), obs=x)


def with_points(x=None, shift=0.0, rows=6):
    rows = rows if x is None else x.shape[-1]
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("data", rows):
        noise = pyro.sample("noise", Gamma(2.0, 1.0))
        pyro.sample("x", Delta(mean + shift + noise), obs=x)


def guide_of(model, **options):
    guide = AutoAmortized(model, observed=["x"], denoiser=small, **options)
    guide.simulate(50)
    assert guide.in_levels
    return guide


def is_told(guide, *args, **kwargs):
    """Whether the guide warns of arguments, and of nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide.get_posterior(*args, **kwargs)
    assert all(each.category is UnreliableWarning for each in caught)
    assert all(TOLD in str(each.message) for each in caught)
    return bool(caught)


@pytest.mark.parametrize("shape", [(6, 4), (3, 2), (1, 4), (5, 3, 4)])
def test_other_data_and_other_numbers_of_rows_are_no_design(shape):
    guide, x = guide_of(regression), torch.randn(shape)
    assert not is_told(guide, x)
    assert not is_told(guide, x, torch.ones(shape[-2:]), name="b")
    mask = torch.arange(shape[-1]) < torch.randint(1, shape[-1] + 1, (shape[-2], 1))
    assert not is_told(guide, x, mask=mask)
    assert not is_told(guide, x=x, groups=4)


@pytest.mark.parametrize("shape", [(6, 4), (3, 2), (1, 4), (5, 3, 4)])
def test_other_covariates_and_scales_are_told(shape):
    guide, x = guide_of(regression), torch.randn(shape)
    covariate = torch.ones(shape[-2:])
    covariate[-1, -1] = 2.0  # of one datum
    assert is_told(guide, x, covariate)
    assert is_told(guide, x, scale=2.0)
    assert is_told(guide, x, covariate.expand(shape))


def test_a_program_that_knows_how_many_rows_there_are():
    """Is another program for every number of rows, of which one was learned."""
    guide = guide_of(of_all_rows)
    assert not is_told(guide, torch.randn(6))
    assert is_told(guide, torch.randn(3))


def test_points_and_latents_that_are_integrated_out():
    guide = guide_of(with_points, latents=["mean"])
    for rows in (6, 2):
        x = torch.linspace(1.0, 3.0, rows)
        assert not is_told(guide, x)
        assert is_told(guide, x, shift=1.0)
        assert is_told(guide, x, torch.tensor(1.0))


def test_noise_that_is_no_site_is_compared_by_draws():
    """As plates without rows are, and only where there are as many rows as in the simulations."""

    def noisy(x=None, shift=0.0, rows=6):
        rows = rows if x is None else x.shape[-1]
        mean = pyro.sample("mean", Normal(0.0, 1.0))
        with pyro.plate("data", rows):
            pyro.sample("x", Delta(mean + shift + torch.randn(rows)), obs=x)

    guide = guide_of(noisy, plates=["data"])
    assert not is_told(guide, torch.randn(6), torch.tensor(0.0))
    assert is_told(guide, torch.randn(6), 1.0)
    assert not is_told(guide, torch.randn(3), 1.0)


def test_randomness_is_left_as_it_was():
    guide, x = guide_of(regression), torch.randn(3, 2)
    before = torch.get_rng_state()
    calls = [((), {}), ((x,), {"scale": 2.0})]
    assert not rows_alike(guide._simulator, guide._levels, *calls, {"x": x})
    assert torch.equal(torch.get_rng_state(), before)
