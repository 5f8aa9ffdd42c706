"""Networks that return NaN, and guidance that explodes, are refused by name and not returned."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import mixture
from pyro.infer import Predictive
from small_diffusions import SMALL_DIFFUSIONS
from torch import nn

from pyro_diffusion.denoisers import Data, Denoiser, GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver, SDESolver
from pyro_diffusion.guidance import (
    MMPS,
    DataCovariance,
    GuidedDenoiser,
    PlugIn,
    SampledGuidance,
    Twisted,
)
from pyro_diffusion.guidance.base import shift_mean
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import DegradedGaussian, GaussianProcess
from pyro_diffusion.samplers import DDIM, Ancestral
from pyro_diffusion.samplers.divergence import largest_exact_noise
from pyro_diffusion.schedules import Cosine
from pyro_diffusion.unreliable import UnreliableWarning

# The gradient's own size.
BARE = functools.partial(PlugIn, line_search=False)


class Broken(nn.Module):
    """A network that returns NaN beyond a log-SNR."""

    def __init__(self, network, above=-100.0):
        super().__init__()
        self.network, self.above = network, above

    def forward(self, x, log_snr, **context):
        out = self.network(x, log_snr, **context)
        broken = (log_snr > self.above).reshape(-1, *(1,) * (out.dim() - 1))
        return torch.where(broken, torch.nan, out)


@pytest.mark.parametrize("above", [-100.0, 9.0])
@pytest.mark.parametrize("small", SMALL_DIFFUSIONS, ids=lambda small: small.name)
def test_chain(small, above):
    denoiser = small.denoiser()
    denoiser.network = Broken(denoiser.network, above)
    message = "denoiser: got NaN or infinite numbers from .*Denoiser"
    with pytest.raises(ValueError, match=message):
        small(denoiser).sample((3,))
    with pytest.raises(ValueError, match=message):
        small(denoiser).log_prob(small.data((64,)))


def test_sde_and_flow():
    network = Broken(nn.Identity())
    network.forward = lambda x, log_snr: x * torch.nan
    denoiser = GaussianDenoiser(network, GaussianProcess(Cosine()))
    views = (
        DiffusionSDE(denoiser, (2,), solver=SDESolver(steps=5)),
        ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4")),
    )
    for law in (*views, ProbabilityFlow(denoiser, (2,))):
        with pytest.raises(ValueError, match="denoiser: got"):
            law.sample((3,))
        with pytest.raises(ValueError, match="denoiser: got"):
            law.log_prob(torch.zeros(3, 2))


def program(denoiser, scale, size=1.0, y=None):
    reading = torch.tensor([1.0, -0.6]) if y is None else y

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,), 50))
        pyro.sample("y", dist.Normal(x, scale * size).to_event(1), obs=reading * size)

    return model


def standard(size=1.0):
    return MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), size**2)


def test_plug_in_that_explodes():
    # Coordinates of 4e6 where the posterior's are of order 1: the implied noise reaches 4e7. (In walks that
    # are let through below it is 12 at most.)
    denoiser = standard()
    guided = BARE(denoiser, ProgramLikelihood(program(denoiser, 0.1)))
    with pytest.raises(ValueError, match="guidance: got PlugIn whose estimate leaves the model"):
        Diffusion(guided, (2,), 50).sample((16,))


def test_plug_in_that_overflows():
    denoiser = standard()
    guided = BARE(denoiser, ProgramLikelihood(program(denoiser, 0.01)))
    with pytest.raises(ValueError, match="guidance: got PlugIn whose estimate leaves the model"):
        Diffusion(guided, (2,), 50).sample((16,))


def test_an_autoguide_that_explodes():
    model = program(standard(), 0.1)
    with pytest.raises(ValueError, match="guidance: got PlugIn"):
        AutoGuidance(model, BARE)()


def test_a_derivative_that_is_not_finite():
    prior = Diffusion(standard(), (2,), 8)

    def model():
        root = pyro.sample("x", prior)[..., 0].clamp(min=0).sqrt()  # infinity times 0 below 0
        pyro.sample("y", dist.Normal(root, 0.1, validate_args=False), obs=torch.tensor(0.5))

    guide = AutoGuidance(model, MMPS)
    expected = (
        "guidance: got NaN or infinite numbers from MMPS at log-SNR .* derivatives are finite"
    )
    with pytest.raises(ValueError, match=expected):
        Predictive(model, guide=guide, num_samples=8, parallel=True)()
    likelihood = ProgramLikelihood(model)
    with pytest.raises(ValueError, match="see that the program's derivatives are finite"):
        TwistedSMC(prior, likelihood, MMPS, num_particles=8).run()


def test_a_program_that_refuses_nan_is_told_where_it_came_from():
    denoiser = standard()
    likelihood = ProgramLikelihood(program(denoiser, 0.1))
    x0 = torch.full((3, 2), math.nan)
    with pytest.raises(ValueError, match="constraint") as caught:
        likelihood.log_prob(x0)
    assert "derivative of the program that is not finite" in "".join(caught.value.__notes__)


class PointMass(Denoiser):
    """The exact mean of standard normal data, without a variance."""

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        weight = level.alpha / (level.alpha.square() + level.sigma.square())
        return dist.Delta(weight * xt, event_dim=1)


def test_draws_of_a_point_mass_are_as_wide_as_the_data_may_be():
    """The twist is that of the exact posterior, where all draws alike would claim to know x_0."""
    denoiser, t = PointMass(GaussianProcess(Cosine())), torch.tensor(0.7)
    guided = SampledGuidance(denoiser, ProgramLikelihood(program(denoiser, 0.5)), 100_000)
    x, seen = torch.tensor([0.3, -0.2]), torch.tensor([1.0, -0.6])
    level = denoiser.process.level(t, x)
    variance = level.sigma.square() / (level.alpha.square() + level.sigma.square()) + 0.5**2
    exact = dist.Normal(denoiser(x, t).mean, variance.sqrt()).log_prob(seen).sum()
    found = guided.twisted(x, t)
    # Weights have a relative variance below 10, so a standard error below .01; fixed seed.
    assert float(found.log_twist) == pytest.approx(float(exact), abs=0.05)
    # A walk follows the observations.
    gap = (guided(x, t).mean - found.prior.mean) * (seen - found.prior.mean)
    assert (gap > 0).all()
    # Particles do not: a chain of few steps between point masses leaves no room for a shift.
    assert found.posterior is found.prior


def test_draws_that_say_nothing_shift_nothing():
    denoiser = standard()

    def model():
        pyro.sample("x", Diffusion(denoiser, (2,), 5))
        pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=torch.tensor(0.3))

    found = SampledGuidance(denoiser, ProgramLikelihood(model)).twisted(torch.ones(2), 0.5)
    torch.testing.assert_close(found.posterior.mean, found.prior.mean, rtol=0, atol=1e-6)


def test_draws_of_a_point_mass_under_a_process_that_is_not_linear_guide_particles_alone():
    process = DegradedGaussian(Cosine(), lambda x, t: x.tanh())
    denoiser = GaussianDenoiser(MLP(2, (4,)), process, Data())
    model = program(denoiser, 0.5)
    with pytest.raises(
        ValueError, match="denoiser: got a GaussianDenoiser whose posterior is a point"
    ):
        AutoGuidance(model, SampledGuidance)()
    with pytest.warns(UnreliableWarning, match="4 particles are too few"):
        assert AutoTwistedSMC(model, SampledGuidance, num_particles=4)()["x"].isfinite().all()


SETTLED = [(0.3, 50, Ancestral()), (0.01, 100, Ancestral()), (0.1, 50, DDIM())]


@pytest.mark.parametrize(("scale", "steps", "sampler"), SETTLED)
def test_plug_in_with_a_line_search_is_let_through(scale, steps, sampler):
    denoiser = standard()
    guided = PlugIn(denoiser, ProgramLikelihood(program(denoiser, scale)))
    x = Diffusion(guided, (2,), steps, sampler=sampler).sample((16,))
    assert x.abs().max() < 5


def test_plug_in_that_swings_and_settles_is_let_through():
    # Its own gradient overshoots at the noise end, by 12 standard deviations, and comes back.
    denoiser = standard()
    guided = BARE(denoiser, ProgramLikelihood(program(denoiser, 0.1)))
    assert Diffusion(guided, (2,), 50, sampler=DDIM()).sample((16,)).abs().max() < 5


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_data_of_any_scale_are_let_through(size):
    # Prior of standard deviation 1000 under the same schedule, read as precisely.
    denoiser = standard(size)
    read = ProgramLikelihood(program(denoiser, 0.1, size))
    for guided in (
        MMPS(denoiser, read),
        DataCovariance(denoiser, read, covariance=size**2 * torch.eye(2)),
    ):
        x = Diffusion(guided, (2,), 50).sample((16,)) / size
        assert float((x - torch.tensor([1.0, -0.6])).abs().max()) < 1.0


def test_observations_far_from_the_prior_are_let_through():
    denoiser = standard()
    read = ProgramLikelihood(program(denoiser, 0.1, y=torch.tensor([100.0, -60.0])))
    x = Diffusion(MMPS(denoiser, read), (2,), 50).sample((16,))
    assert x.isfinite().all()


class Pushed(GuidedDenoiser):
    """The prior's mean pushed away while log-SNR is between two levels, by multiples of sigma / alpha."""

    def __init__(self, denoiser, by, low, high):
        super().__init__(denoiser)
        self.by, self.low, self.high = by, low, high

    def twisted(self, xt, t, **context):
        level = self.process.level(t, xt)
        prior = self.denoiser(xt, level, **context)
        inside = (level.clock > self.low) & (level.clock < self.high)
        # Some draws only: those whose row is even.
        rows = (torch.arange(len(xt)) % 2 == 0).to(xt)[:, None]
        push = torch.where(inside, rows * self.by * level.noise_to_signal, 0.0)
        return Twisted(prior, shift_mean(prior, push), xt.new_zeros(len(xt)))


def pushed(*arguments):
    torch.manual_seed(0)
    return Diffusion(Pushed(standard(), *arguments), (2,), 50).sample((16,))


def test_draws_that_leave_and_stay_finite_are_counted():
    with pytest.warns(UnreliableWarning, match="8 of 16 draws of Pushed left the model") as caught:
        x = pushed(40.0, -3.5, 0.5)
    first = float(str(caught[0].message).split("log-SNR ")[1].split(":")[0])
    assert -3.5 < first <= 0 and x.isfinite().all()


def test_draws_that_come_back_are_let_through():
    pushed(10.0, -6.0, -4.0)  # at levels that the rest of the way forgets
    pushed(20.0, 1.0, 20.0)  # details at the end


def test_no_exact_posterior_is_called_divergent():
    # The limit holds for noise itself, and E[eps | x_t] varies no more: 1e-12 of draws exceed it.
    for size in (1, 2, 16):
        limit = largest_exact_noise(size)
        rms = torch.randn(300_000, size).square().mean(-1).sqrt()
        assert rms.max() < limit
        if limit > 2:
            c = limit**2  # Chernoff's bound, at the limit
            assert math.exp(-size / 2 * (c - 1 - math.log(c))) == pytest.approx(1e-12, rel=1e-3)
    assert largest_exact_noise(100_000) == 2.0


def test_an_unguided_walk_is_not_judged():
    far = 1e6 * torch.ones(3, 2, dtype=torch.float64)
    law = Diffusion(mixture(Cosine()), (2,), 10)
    assert law.decode(far).mean.isfinite().all()
