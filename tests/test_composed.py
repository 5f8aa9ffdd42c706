"""Composed scores: the posterior of many independent observations from those of single ones."""

import pyro
import pytest
import torch
from pyro.distributions import Delta, Exponential, LogNormal, MultivariateNormal, Normal, Uniform
from torch import Tensor

from pyro_diffusion.denoisers import ComposedDenoiser, Denoiser, NormalDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.guidance import MMPS
from pyro_diffusion.infer import AutoAmortized, ComposedPosterior, TwistedSMC
from pyro_diffusion.infer.simulators.prior_normal import normal_prior
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified, VarianceExploding

D, N = 3, 100
F64 = torch.float64
PROCESS = GaussianProcess(LogLinear(12.0, -8.0))


class Conjugate:
    """A normal prior of any covariance, and n observations of it, each with noise of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
        root = normal(D, D)
        self.mean, self.covariance = normal(D), root @ root.mT + 0.3 * torch.eye(D)
        self.noise = 0.5 + normal(N, D).square()
        self.y = 2 * normal(N, D)
        self.xt = normal(4, D)

    def posterior(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance given some observations."""
        own = self.covariance.inverse()
        precision = own + (1 / self.noise[chosen]).sum(0).diag()
        shift = own @ self.mean + (self.y / self.noise)[chosen].sum(0)
        return torch.linalg.solve(precision, shift), precision.inverse()


TRUTH = Conjugate()


class OfOne(Denoiser):
    """The exact posterior given one observation, whose number is the context."""

    def forward(self, xt, t, y):
        means = []
        for i in y[..., 0].reshape(len(y)).long():
            exact = NormalDenoiser(self.process, *TRUTH.posterior(i[None]))
            means.append(exact(xt[len(means)], t).mean)
        return Delta(torch.stack(means), event_dim=1)


def composed(count: int, process: GaussianProcess = PROCESS, **changed: Tensor) -> ComposedDenoiser:
    numbers = torch.arange(count)
    covariances = torch.stack([TRUTH.posterior(i[None])[1] for i in numbers])
    given = {
        "context": {"y": numbers.to(F64).unsqueeze(-1)},
        "covariances": covariances,
        "prior": NormalDenoiser(process, TRUTH.mean, TRUTH.covariance),
        "prior_covariance": TRUTH.covariance,
    }
    return ComposedDenoiser(OfOne(process), **{**given, **changed})


@pytest.mark.parametrize("schedule", [LogLinear(12.0, -8.0), Cosine(), VarianceExploding()])
@pytest.mark.parametrize("count", [1, 2, 10, N])
def test_normal_posteriors_are_exact(count, schedule):
    """Mean and variances are those of the conjugate posterior of up to 100 data, at all noise levels."""
    process = GaussianProcess(schedule)
    denoiser = composed(count, process)
    exact = NormalDenoiser(process, *TRUTH.posterior(torch.arange(count)))
    for t in (0.01, 0.3, 0.6, 0.99):
        found, expected = (each(TRUTH.xt, torch.tensor(t, dtype=F64)) for each in (denoiser, exact))
        assert torch.allclose(found.mean, expected.mean, atol=1e-9)
        assert torch.allclose(found.stddev, expected.stddev, atol=1e-9)


def test_shapes_and_times_by_row():
    denoiser = composed(3)
    assert denoiser(torch.zeros(D, dtype=F64), 0.5).mean.shape == (D,)
    xt, t = torch.randn(2, 5, D, dtype=F64), torch.rand(2, 5, dtype=F64)
    together = denoiser(xt, t).mean
    assert together.shape == (2, 5, D)
    for i in range(5):
        alone = denoiser(xt[1, i], t[1, i]).mean
        assert torch.allclose(together[1, i], alone)


def test_without_noise_the_state_is_the_mean():
    found = composed(3, GaussianProcess(Rectified.full()))(TRUTH.xt, 0.0)
    assert torch.allclose(found.mean, TRUTH.xt, atol=1e-6)


def test_normal_denoiser_is_the_conditional_of_a_joint_normal():
    """Against the block formula of x_0 and x_t together."""
    exact = NormalDenoiser(PROCESS, TRUTH.mean, TRUTH.covariance)
    level = PROCESS.level(torch.tensor(0.4, dtype=F64), TRUTH.xt)
    alpha, sigma = level.alpha, level.sigma
    cross = alpha * TRUTH.covariance
    total = alpha**2 * TRUTH.covariance + sigma**2 * torch.eye(D)
    gain = torch.linalg.solve(total, cross).mT
    found = exact(TRUTH.xt, torch.tensor(0.4, dtype=F64))
    expected = TRUTH.mean + (TRUTH.xt - alpha * TRUTH.mean) @ gain.mT
    assert torch.allclose(found.mean, expected)
    assert torch.allclose(found.variance[0], (TRUTH.covariance - gain @ cross).diagonal())


def test_chain_draws_the_posterior():
    """4000 draws of the chain given 10 data: z-scores of means and variances below 5 (3e-6 in all)."""
    mean, covariance = TRUTH.posterior(torch.arange(10))
    diffusion = Diffusion(composed(10), (D,), 200)
    draws = diffusion.sample((4000,))
    sd = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean) / sd).abs().max() < 5 / 4000**0.5 + 0.01
    assert (draws.var(0) / sd**2 - 1).abs().max() < 5 * (2 / 4000) ** 0.5 + 0.02


def test_twisted_smc_takes_it_as_prior():
    """A further observation after ten, by twisted SMC: within 5 errors of 2000 particles."""
    pyro.set_rng_seed(0)
    diffusion = Diffusion(composed(10), (D,), 60)

    def program(y):
        x = pyro.sample("x", diffusion)
        pyro.sample("y", Normal(x, TRUTH.noise[10].sqrt()).to_event(1), obs=y)

    likelihood = ProgramLikelihood(program, (TRUTH.y[10],))
    found = TwistedSMC(diffusion, likelihood, MMPS, num_particles=2000).run()
    mean, covariance = TRUTH.posterior(torch.arange(11))
    own = (found.log_weights.exp().unsqueeze(-1) * found.value).sum(0)
    error = ((own - mean) / covariance.diagonal().sqrt()).abs().max()
    assert error < 5 / float(found.ancestors[-1]) ** 0.5


def test_precisions_below_the_priors_are_raised():
    """Estimated covariances may exceed the prior's; a hundred of them leave a posterior all the same."""
    wide = 1.2 * TRUTH.covariance.expand(N, D, D)
    found = composed(N, covariances=wide)
    assert torch.allclose(found.precisions, found.prior_precision.expand(N, D, D))
    assert (found.values > 0).all()
    assert found(TRUTH.xt, 0.5).mean.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"covariances": torch.eye(D)}, "covariances"),
        ({"covariances": torch.zeros(3, D, D)}, "covariances"),
        ({"covariances": torch.ones(3, D, 2)}, "covariances"),
        ({"covariances": torch.full((3, D, D), torch.nan)}, "covariances"),
        ({"prior_covariance": -torch.eye(D)}, "prior_covariance"),
        ({"prior": "normal"}, "prior"),
        ({"context": {"y": torch.zeros(2, 1)}}, "context"),
        (
            {"prior": NormalDenoiser(GaussianProcess(Cosine()), torch.zeros(D), torch.eye(D))},
            "prior",
        ),
    ],
)
def test_refused(changed, named):
    with pytest.raises(ValueError, match=named):
        composed(3, **changed)


# --- from a guide ------------------------------------------------------------------------------------


def model(x=None):
    mean = pyro.sample("mean", Normal(torch.tensor([1.0, -1.0]), 2.0).to_event(1))
    scale = pyro.sample("scale", LogNormal(0.5, 0.3))
    pyro.sample("x", Normal(mean, scale.unsqueeze(-1)).to_event(1), obs=x)


def test_a_normal_prior_is_read_from_the_program():
    guide = AutoAmortized(model, observed=["x"])
    guide.simulate(50)
    mean, covariance = normal_prior(guide, (), {})
    assert torch.allclose(mean, torch.tensor([1.0, -1.0, 0.5], dtype=F64))
    assert torch.allclose(covariance.float(), torch.tensor([4.0, 4.0, 0.09]).diag())


def test_a_correlated_normal_prior_is_read():
    full = torch.tensor([[2.0, 0.5], [0.5, 1.0]])

    def program(x=None):
        with pyro.plate("two", 2):
            z = pyro.sample("z", MultivariateNormal(torch.ones(2), full))
        pyro.sample("x", Normal(z, 1.0).to_event(2), obs=x)

    guide = AutoAmortized(program, observed=["x"], plates=())
    guide.simulate(50)
    mean, covariance = normal_prior(guide, (), {})
    assert torch.allclose(mean.float(), torch.ones(4))
    assert torch.allclose(covariance.float(), torch.block_diag(full, full))


def test_a_uniform_prior_is_normal_by_its_quantiles():
    def program(x=None):
        z = pyro.sample("z", Uniform(-1.0, torch.tensor([3.0, 5.0])).to_event(1))
        pyro.sample("x", Normal(z, 1.0).to_event(1), obs=x)

    guide = AutoAmortized(program, observed=["x"])
    guide.simulate(50)
    mean, covariance = normal_prior(guide, (), {})
    assert mean.equal(torch.zeros(2, dtype=F64)) and covariance.equal(torch.eye(2, dtype=F64))


def test_other_priors_are_none():
    def positive(x=None):
        z = pyro.sample("z", Exponential(1.0))
        pyro.sample("x", Normal(z, 1.0), obs=x)

    def dependent(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        w = pyro.sample("w", Normal(z, 1.0))
        pyro.sample("x", Normal(w, 1.0), obs=x)

    def seldom(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        w = pyro.sample("w", Normal(0.0, torch.where(z > 1.5, 5.0, 1.0)))
        pyro.sample("x", Normal(w, 1.0), obs=x)

    pyro.set_rng_seed(1)
    for program in (positive, dependent, seldom):
        guide = AutoAmortized(program, observed=["x"])
        guide.simulate(50)
        assert normal_prior(guide, (), {}) is None
        found = ComposedPosterior(guide, {"x": torch.zeros(2)})
        assert not found.normal


def test_a_uniform_prior_with_other_ends_at_times_is_none():
    # Ends of one run in 18 are others: seen in 100 runs (but for .3 % of seeds) and not in the trial runs of
    # this seed, which raise if they see it.
    def seldom(x=None):
        w = pyro.sample("w", Normal(0.0, 1.0))
        z = pyro.sample("z", Uniform(-1.0, 1.0 if w < 1.6 else 0.5))
        pyro.sample("x", Normal(z, 1.0), obs=x)

    pyro.set_rng_seed(0)
    guide = AutoAmortized(seldom, observed=["x"])
    guide.simulate(50)
    assert normal_prior(guide, (), {}) is None


class Exact(Denoiser):
    """p(z | z_t, y) for z ~ N(0, 1) and x ~ N(z, noise^2), standardized by what ``scales`` holds."""

    noise = 1.0

    def forward(self, xt, t, y):
        latents, data = self.scales
        x, share = y * data.scale + data.loc, 1 / (1 + self.noise**2)
        mean = (x * share - latents.loc) / latents.scale
        variance = self.noise**2 * share / latents.scale**2
        level = self.process.level(t, xt, state="xt")
        ratio = (level.alpha / level.sigma) ** 2
        return Delta(
            (mean / variance + ratio * xt / level.alpha) / (1 / variance + ratio), event_dim=1
        )


def exact_guide(noise: float) -> AutoAmortized:
    def program(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z, noise), obs=x)

    guide = AutoAmortized(
        program,
        observed=["x"],
        denoiser=lambda *sizes: Exact(PROCESS),
        solver=ODESolver("midpoint", steps=40),
    )
    guide.simulate(500)
    denoiser = guide.posterior.denoiser
    denoiser.scales, denoiser.noise = (guide.posterior.latents, guide.posterior.observed[0]), noise
    return guide


# Of a hundred data some are beyond the limit of one in two hundred, which is right to say.
@pytest.mark.filterwarnings("ignore:data.*by chance:pyro_diffusion.unreliable.UnreliableWarning")
@pytest.mark.parametrize(("count", "noise"), [(1, 1.0), (20, 1.0), (100, 3.0), (100, 10.0)])
def test_draws_of_an_exact_guide(count, noise):
    """2000 draws: mean and sd within 4 errors (3e-4 in all) and 3% of the sd, of many weak data too."""
    pyro.set_rng_seed(1)
    x = noise * torch.randn(count) + 0.7
    found = ComposedPosterior(exact_guide(noise), {"x": x})
    assert found.normal
    draws = found.draw(2000)["z"]
    precision = 1 + count / noise**2
    sd = precision**-0.5
    assert draws.shape == (2000,)
    assert abs(float(draws.mean() - x.sum() / noise**2 / precision)) < (4 / 2000**0.5 + 0.03) * sd
    assert abs(float(draws.std()) / sd - 1) < 4 / 4000**0.5 + 0.03


def test_values_and_back():
    guide = AutoAmortized(model, observed=["x"])
    simulations = guide.simulate(50)
    found = ComposedPosterior(guide, {"x": torch.zeros(3, 2)})
    latents = {name: simulations[name] for name in ("mean", "scale")}
    standardized = found.standardized(latents)
    assert standardized.shape == (50, 3)
    again = found.values(standardized)
    assert all(torch.allclose(again[name], value, atol=1e-5) for name, value in latents.items())


def test_bad_observations_and_guides():
    def program(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.sample("x", Normal(z, 1.0), obs=x)

    guide = AutoAmortized(program, observed=["x"])
    with pytest.raises(ValueError, match="without simulations"):
        ComposedPosterior(guide, {"x": torch.zeros(2)})
    guide.simulate(50)
    for x in (torch.tensor(0.0), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="observations"):
            ComposedPosterior(guide, {"x": x})
    with pytest.raises(ValueError, match="num_draws"):
        ComposedPosterior(guide, {"x": torch.zeros(2)}, num_draws=2)
    with pytest.raises(ValueError, match="guide"):
        ComposedPosterior(program, {"x": torch.zeros(2)})


def test_sets_are_refused():
    def program(x=None):
        z = pyro.sample("z", Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", Exponential(z.exp()), obs=x)

    guide = AutoAmortized(program, observed=["x"])
    guide.simulate(50)
    with pytest.raises(ValueError, match="plates of rows"):
        ComposedPosterior(guide, {"x": torch.ones(2, 3)})
