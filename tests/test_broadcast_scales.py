"""Scales that only broadcast to an event, one per channel, are those written out for every pixel."""

import pytest
import torch
from pyro.distributions import Delta, Normal

from pyro_diffusion.denoisers import Denoiser, analytic_variance
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ForwardSDE, ODESolver, SDESolver
from pyro_diffusion.evaluate import (
    chain_costs,
    continuity_residual,
    importance_weighted,
    log_likelihood,
    wasserstein_bound,
)
from pyro_diffusion.guidance import MMPS, DataCovariance, DiffPIR, PiGDM, PlugIn
from pyro_diffusion.likelihoods import Likelihood, Whitened
from pyro_diffusion.processes import Ability, GaussianProcess
from pyro_diffusion.samplers import (
    DDIM,
    AdamsMoulton,
    DPMSolverPP,
    Heun,
    Langevin,
    PredictorCorrector,
)
from pyro_diffusion.schedules import Cosine, LogLinear, uniform

F64, EVENT = torch.float64, torch.Size((3, 2, 2))
SHIFT = torch.tensor([0.0, 1.0, -0.5], dtype=F64).reshape(3, 1, 1)


class Channels(GaussianProcess):
    """A shift of the log-SNR for every channel."""

    def __init__(self, shift=SHIFT):
        super().__init__(LogLinear(8.0, -8.0), event_dim=3)
        self.register_buffer("shift", shift)

    def scales(self, level):
        log_snr = level.clock + self.shift.to(level.clock)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        return level._replace(log_snr=log_snr, alpha=alpha, sigma=sigma)


class Exact(Denoiser):
    """The posterior of independent normals of variance 0.5."""

    def __init__(self, process, point_mass=False):
        super().__init__(process)
        self.point_mass = point_mass
        self.register_buffer("spread", torch.tensor(0.5, dtype=F64))

    def forward(self, xt, t, **context):
        level, v = self.process.level(t, xt), self.spread
        total = level.alpha**2 * v + level.sigma**2
        mean = level.alpha * v / total * xt
        if self.point_mass:
            return Delta(mean, event_dim=3)
        scale = (v * level.sigma**2 / total).sqrt()
        return Normal(mean, scale.expand(mean.shape), validate_args=False).to_event(3)


class Sum(Likelihood):
    """The sum of every channel with standard normal noise."""

    batch_shape, event_shape = torch.Size(), EVENT

    def whitened(self, x0):
        r = 1.0 - x0.sum((-1, -2))
        return Whitened(r, torch.zeros_like(r[..., 0]))

    def log_prob(self, x0):
        return -self.whitened(x0).residual.square().sum(-1) / 2


def data(*shape):
    return torch.linspace(-1, 1, 5 * 12, dtype=F64).reshape(5, *EVENT)


def conditioned(build):
    return lambda d: build(d, Sum())(data()[0], 0.4).mean


def drawn(sampler):
    return lambda d: Diffusion(d, EVENT, 6, sampler=sampler).sample((4,))


DOORS = {
    "bound": lambda d: Diffusion(d, EVENT, 5).log_prob(data()),
    "terms": lambda d: Diffusion(d, EVENT, 5).bound_terms(data(), torch.arange(5)),
    "sde bound": lambda d: DiffusionSDE(d, EVENT).log_prob(data()),
    "sde draws": lambda d: DiffusionSDE(d, EVENT, solver=SDESolver("euler", steps=6)).sample((4,)),
    "forward sde": lambda d: ForwardSDE(d.process, EVENT).f(torch.tensor(0.3), data().flatten(1)),
    "flow": lambda d: ProbabilityFlow(d, EVENT, solver=ODESolver("rk4", steps=6)).log_prob(data()),
    "flow draws": lambda d: ProbabilityFlow(d, EVENT, solver=ODESolver("rk4", steps=6)).sample(
        (4,)
    ),
    **{
        repr(s): drawn(s)
        for s in (DDIM(0.5), Heun(churn=2.0), AdamsMoulton(), DPMSolverPP(eta=1.0))
    },
    "langevin": drawn(PredictorCorrector(DDIM(), Langevin())),
    "costs": lambda d: chain_costs(d, data(), uniform(4, F64)).nan_to_num(posinf=0),
    "continuity": lambda d: continuity_residual(d, data(), levels=3).value,
    "variance": lambda d: analytic_variance(d, data(), knots=5).value,
    "likelihood": lambda d: log_likelihood(Diffusion(d, EVENT, 4), data()).value,
    "importance": lambda d: (
        importance_weighted(Diffusion(d, EVENT, 4), data(), num_samples=30).value
    ),
    "MMPS": conditioned(MMPS),
    "PiGDM": conditioned(PiGDM),
    "DiffPIR": conditioned(DiffPIR),
    "PlugIn": conditioned(PlugIn),
    "data covariance": conditioned(
        lambda d, y: DataCovariance(d, y, covariance=torch.eye(12, dtype=F64) + 0.1)
    ),
}


@pytest.mark.parametrize("point_mass", [False, True])
@pytest.mark.parametrize("name", DOORS)
def test_one_number_per_channel_is_one_per_pixel(name, point_mass):
    results = []
    for shift in (SHIFT, SHIFT.expand(EVENT).clone()):
        torch.manual_seed(0)
        results.append(DOORS[name](Exact(Channels(shift), point_mass)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_scales_of_a_mixin_are_a_processs_own():
    class Mixin:
        scales = Channels.scales

    class Mixed(Mixin, GaussianProcess):
        pass

    class Stated(Channels):
        abilities = GaussianProcess.abilities

    class Heir(Stated):
        pass

    assert Ability.ISOTROPIC not in Mixed.abilities
    assert Ability.ISOTROPIC in Heir.abilities
    with pytest.raises(ValueError, match="lacks one noise level for all coordinates"):
        wasserstein_bound(Exact(Channels()), data())


def test_levels_follow_a_second_schedule():
    class Two(GaussianProcess):
        def __init__(self):
            super().__init__(Cosine())
            self.other = Cosine()

        def scales(self, level):
            log_snr = self.other.log_snr(level.t)
            alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
            return level._replace(log_snr=log_snr, alpha=alpha, sigma=sigma)

    process, times = Two(), uniform(4, F64)
    before = process.levels(times)
    assert process.levels(times) is before
    process.other = Cosine(shift=1.0)
    process.levels(times)
    process.other.shift = 2.0
    fresh = Two()
    fresh.other = Cosine(shift=1.0)
    fresh.other.shift = 2.0
    torch.testing.assert_close(process.levels(times).log_snr, fresh.levels(times).log_snr)


def test_precision_is_checked_at_both_ends_of_any_grid():
    process = Channels(torch.tensor([20.0, -20.0, 0.0], dtype=F64).reshape(3, 1, 1))
    for times in (uniform(2, F64), uniform(2, F64).flip(0)):
        with pytest.raises(ValueError, match=r"states in .*float32"):
            process.check_precision(torch.float32, times)
