"""Conditional SMC and particle Gibbs: what must stay as it is stays, and joint posteriors come out."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC
from scipy import stats

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import (
    MMPS,
    GuidedDenoiser,
    SampledGuidance,
    Twisted,
)
from pyro_diffusion.infer import ParticleGibbs, TwistedSMC
from pyro_diffusion.infer.filtering.conditional_filter import ConditionalFilter
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified, uniform
from tests.small_diffusions import Tiny

F64 = torch.float64
# A standard normal prior: its chain is exactly the forward process reversed, at any number of steps.
STANDARD = MixtureDenoiser(
    GaussianProcess(LogLinear(10, -10)), torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 1.0
)
Y, NOISE = torch.tensor([1.5, -0.5], dtype=F64), 0.4


class Misguided(GuidedDenoiser):
    """A twist that is wrong, so that weights are uneven all the way."""

    def __init__(self, denoiser, likelihood):
        super().__init__(denoiser)

    def twisted(self, xt, t, **context):
        prior = self.denoiser(xt, t, **context)
        return Twisted(prior, prior, 1.5 * xt.sum(-1).sin())


def chain(steps: int = 4) -> Diffusion:
    return Diffusion(STANDARD, (2,), times=uniform(steps, F64))


def readings(law: Diffusion, count: int) -> ProgramLikelihood:
    def model():
        with pyro.plate("data", count):
            x = pyro.sample("x", law)
            pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=Y.expand(count, 2))

    return ProgramLikelihood(model)


def exact_paths(law: Diffusion, count: int) -> tuple[list[torch.Tensor], dist.Normal]:
    """Draws of x given y with the forward process from them, noise first; and the law of x given y."""
    variance = 1 / (1 + 1 / NOISE**2)
    posterior = dist.Normal(variance * Y / NOISE**2, variance**0.5)
    process, times = law.denoiser.process, law.times
    x = posterior.sample((count,))
    path = [x, process.marginal(x, times[0]).sample()]
    for s, t in itertools.pairwise(times):
        path.append(process.transition(path[-1], s, t).sample())
    return path[::-1], posterior


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("guidance", [Misguided, MMPS], ids=lambda g: g.__name__)
def test_a_sweep_leaves_exact_paths_exact(guidance, threshold):
    # Start at the posterior itself: 4000 chains of six sweeps with three particles must stay there.
    # Each Kolmogorov-Smirnov test alarms falsely in 1e-5 of seeds; there are 16 or so.
    law, count = chain(), 4000
    smc = TwistedSMC(law, readings(law, count), guidance, 3, threshold)
    path, posterior = exact_paths(law, count)
    before, fresh = path, exact_paths(law, count)[0]
    for _ in range(6):
        particles = smc.filter(ConditionalFilter, reference=path, join=smc.chain.join)
        path = smc.drive(particles).path()
    assert len(path) == law.steps + 2
    for i in range(2):
        x = path[-1][:, i].numpy()
        mean, scale = float(posterior.mean[i]), float(posterior.stddev[i])
        assert stats.kstest(x, "norm", args=(mean, scale)).pvalue > 1e-5
        for a, b in zip(path, fresh, strict=True):
            assert stats.ks_2samp(a[:, i].numpy(), b[:, i].numpy()).pvalue > 1e-5
    # Steps keep their correlation: differences along the path too.
    for j in range(law.steps + 1):
        a, b = ((p[j + 1] - p[j]).sum(-1).numpy() for p in (path, fresh))
        assert stats.ks_2samp(a, b).pvalue > 1e-5
    # And it did move, the far past too.
    for a, b in zip(path, before, strict=True):
        assert (a != b).any(-1).double().mean() > 0.3


def test_the_first_particle_walks_the_reference():
    law = chain()
    smc = TwistedSMC(law, readings(law, 5), MMPS, 4, 1.0)
    path = exact_paths(law, 5)[0]
    particles = smc.filter(ConditionalFilter, reference=path, join=smc.chain.join)
    smc.drive(particles)
    for visited, x in zip(particles.visited, path, strict=True):
        assert visited.shape == (4, 5, 2) and visited[0].equal(x)
    for parents in particles.parents[:-1]:
        assert ((parents >= 0) & (parents < 4)).all()
    free = smc.filter(ConditionalFilter, join=smc.chain.join)
    drawn = smc.drive(free).path()
    assert [x.shape for x in drawn] == [(5, 2)] * 6
    assert not any(drawn[-1][i].equal(path[-1][i]) for i in range(5))


def test_the_reference_finds_a_past_of_next_to_no_weight():
    # The others' weights are e^1000 times that of the one past from which the reference goes on.
    start = torch.tensor(3.0)

    class Guide:
        def init(self, state):
            return pyro.sample("x", dist.Normal(torch.zeros(4), 1.0))

    class Model(Guide):
        def init(self, state):
            state["x"] = super().init(state)
            pyro.factor("weight", 1000.0 * (state["x"] != start))

    def join(state, x, place):
        return torch.where(state["x"] == start, 0.0, -2000.0)

    path = [start, start]
    found = ConditionalFilter(Model(), Guide(), 4, reference=path, join=join, ess_threshold=1.0)
    found.init()
    assert found.parents[0][0] == 0 and (found.parents[0][1:] > 0).all()


def scaled(law: Diffusion, data: torch.Tensor):
    def model():
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-0.5, dtype=F64), 0.5))
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=data)

    return model


def within(draws: torch.Tensor, effective: torch.Tensor, truth: torch.Tensor) -> bool:
    """Four and a half standard errors of a chain's mean: a false alarm in 7e-6 of seeds, or some more."""
    return bool((abs(draws.mean(0) - truth) < 4.5 * draws.std(0) / effective.sqrt()).all())


def test_noise_scale_and_data_jointly():
    data = torch.tensor([2.0, -1.0], dtype=F64)
    kernel = ParticleGibbs(scaled(chain(2), data), num_particles=12, others_steps=2)
    mcmc = MCMC(kernel, 400, 80, disable_progbar=True)
    mcmc.run()
    draws, found = mcmc.get_samples(), mcmc.diagnostics()
    assert draws["x"].shape == (400, 2) and draws["scale"].shape == (400,)
    log_scale = torch.linspace(-4, 3, 2001, dtype=F64)
    scale = log_scale.exp()[:, None]
    log_posterior = dist.Normal(-0.5, 0.5).log_prob(log_scale) + dist.Normal(
        torch.zeros((), dtype=F64), (1 + scale**2).sqrt()
    ).log_prob(data).sum(-1)
    weights = log_posterior.softmax(0)
    effective = found["scale"]["n_eff"]
    assert effective > 25 and found["update rate"]["chain 0"] > 0.8
    assert within(draws["scale"].log(), effective, (weights * log_scale).sum())
    second = (weights * log_scale.square()).sum()
    assert within(draws["scale"].log().square(), effective, second)
    mean = (weights[:, None] * data / (1 + scale**2)).sum(0)
    assert within(draws["x"], found["x"]["n_eff"].clamp(max=400), mean)


def test_another_kernel_for_the_others():
    data = torch.tensor([2.0, -1.0], dtype=F64)
    kernel = ParticleGibbs(
        scaled(chain(2), data),
        site="x",
        guidance=SampledGuidance,
        num_particles=4,
        others=lambda model: HMC(model, step_size=0.3, num_steps=3),
    )
    mcmc = MCMC(kernel, 4, 3, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    assert (draws["scale"] > 0).all() and len(draws["x"].unique(dim=0)) > 1
    assert set(mcmc.diagnostics()) >= {"scale", "x", "update rate", "acceptance rate"}


def test_the_other_kernel_never_uses_the_potential_of_an_old_x():
    def stubborn(model):
        return HMC(model, step_size=20.0, num_steps=1, adapt_step_size=False)

    kernel = ParticleGibbs(scaled(chain(2), Y), num_particles=4, others=stubborn)
    with pyro.validation_enabled(False):  # as MCMC does
        kernel.setup(0)
        params = kernel.initial_params
        for _ in range(5):
            params = kernel.sample(params)
            z, potential, _ = kernel.others._fetch_from_cache()
            torch.testing.assert_close(potential, kernel.others.potential_fn(z))
    assert params["scale"].equal(kernel.initial_params["scale"])  # every proposal was refused


def test_no_other_latents_and_symbols():
    process = Absorbing(Rectified.full(), 3).double()
    denoiser = TableDenoiser(process, torch.rand(3, 3, dtype=F64))
    law = Diffusion(denoiser, (2,), times=uniform(3, F64))

    def model(y):
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x.sum(-1).to(F64), 0.5), obs=y)

    mcmc = MCMC(ParticleGibbs(model, num_particles=8), 30, 2, disable_progbar=True)
    mcmc.run(torch.tensor(4.0, dtype=F64))
    draws = mcmc.get_samples()["x"]
    assert draws.shape == (30, 2) and (draws.sum(-1) >= 3).double().mean() > 0.7


def test_a_plate_of_data_shares_its_latents():
    law, data = chain(2), torch.randn(3, 2, dtype=F64)

    def model():
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", 3):
            x = pyro.sample("x", law)
            pyro.sample("y", dist.Normal(x + shift, 0.5).to_event(1), obs=data)

    mcmc = MCMC(ParticleGibbs(model, num_particles=4), 5, 5, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    assert draws["x"].shape == (5, 3, 2) and draws["shift"].shape == (5,)


def test_bad_input():
    law = chain(2)

    def none():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def two():
        a, b = pyro.sample("a", law), pyro.sample("b", law)
        pyro.sample("y", dist.Normal(a + b, 1.0).to_event(1), obs=Y)

    for model, site, message in (
        (none, None, "diffusion sites \\[\\]"),
        (two, None, "'a', 'b'"),
        (two, "a", "condition the model"),
        (scaled(law, Y), "scale", "expected one that is not observed"),
    ):
        with pytest.raises(ValueError, match=message):
            ParticleGibbs(model, site=site).setup(1)
    for arguments in ({"num_particles": 1}, {"others_steps": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}: got"):
            ParticleGibbs(scaled(law, Y), **arguments)
    with pytest.raises(ValueError, match="model: got int"):
        ParticleGibbs(3)


@pytest.mark.parametrize("how", ["context", "transform"])
def test_a_diffusion_that_depends_on_a_latent_is_refused(how):
    conditional = GaussianDenoiser(Tiny((2,), context=True), GaussianProcess(Cosine()))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if how == "context":
            law = Diffusion(conditional, (2,), steps=2, context={"y": z})
        else:
            shift = dist.transforms.AffineTransform(z, torch.ones(2), event_dim=1)
            law = dist.TransformedDistribution(chain(2), [shift])
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=Y)

    with pytest.raises(ValueError, match="depends on z"):
        ParticleGibbs(model).setup(1)
