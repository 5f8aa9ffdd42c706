"""The linear part of an amortized posterior: a regression of latents on data."""

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.infer.simulators.conditional_posterior import default_denoiser
from pyro_diffusion.infer.simulators.linear_regression import Column, LinearlyRegressed
from pyro_diffusion.nn import ConditionalMLP


def linear(x=None):
    """Three latents, correlated, seen through two sums of them."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.5, 2.0]])
    z = pyro.sample("z", MultivariateNormal(torch.ones(3), scale_tril=root))
    sums = torch.stack([z[..., 0] + z[..., 1], z[..., 2] - z[..., 0]], -1)
    pyro.sample("x", Normal(sums, 0.5).to_event(1), obs=x)


def test_the_mean_is_that_of_a_dense_system():
    """E[x_0 | x_t, y] of a joint normal, by one solve of all its coordinates."""
    torch.manual_seed(0)
    y = torch.randn(5000, 2, dtype=torch.float64)
    x0 = y @ torch.randn(2, 3).double() + torch.randn(5000, 3).double() @ torch.randn(3, 3).double()
    denoiser = LinearlyRegressed(default_denoiser(3, 2), 3, [Column.VALUE] * 2).double()
    denoiser.fit(x0, y)
    slopes = denoiser.slopes @ denoiser.basis.mT
    own = denoiser.basis @ denoiser.variances.diag() @ denoiser.basis.mT
    for t in (0.2, 0.5, 0.9):
        level = denoiser.process.level(torch.tensor(t, dtype=torch.float64))
        xt = torch.randn(7, 3, dtype=torch.float64)
        total = level.alpha**2 * own + level.sigma**2 * torch.eye(3)
        prior = y[:7] @ slopes
        gain = level.alpha * own @ torch.linalg.inv(total)
        expected = prior + (xt - level.alpha * prior) @ gain.mT
        # a fresh network is 0, as is its mean less that of independent standard normals
        plain = denoiser.denoiser(xt, level, y=y[:7]).mean
        alone = level.alpha / (level.alpha**2 + level.sigma**2) * xt
        assert_close(denoiser(xt, level, y=y[:7]).mean, expected + plain - alone)


def test_jointly_normal_sites_are_right_without_training():
    """Means within .1 posterior sd and sds within 8%: simulations and draws err by a few percent."""
    pyro.set_rng_seed(0)
    guide = AutoAmortized(linear, observed=["x"])
    sites = guide.simulate(20_000)
    joint = torch.cat([sites["z"], sites["x"]], 1).T.cov()
    gain = joint[:3, 3:] @ torch.linalg.inv(joint[3:, 3:])
    sd = (joint[:3, :3] - gain @ joint[3:, :3]).diagonal().sqrt()
    x = torch.tensor([3.0, -1.0])
    mean = sites["z"].mean(0) + gain @ (x - sites["x"].mean(0))
    draws = guide.draw(4000, {"x": x})["z"]
    assert ((draws.mean(0) - mean).abs() / sd).max() < 0.1
    assert (draws.std(0) / sd - 1).abs().max() < 0.08


def test_few_simulations_another_denoiser_and_a_summary_have_none():
    """A regression on hardly more simulations than data would be noise, and others are left as they are."""
    pyro.set_rng_seed(0)
    guide = AutoAmortized(linear, observed=["x"])
    guide.simulate(25)
    assert not guide.posterior.denoiser.slopes.any()

    def own(latents, features):
        process = default_denoiser(latents, features).process
        return GaussianDenoiser(ConditionalMLP(latents, features, width=16, depth=1), process)

    for options in ({"denoiser": own}, {"summary": torch.nn.Linear(2, 4)}):
        guide = AutoAmortized(linear, observed=["x"], **options)
        guide.simulate(100)
        assert isinstance(guide.posterior.denoiser, GaussianDenoiser)
