"""Samplers under a process whose scales differ by coordinate: each coordinate goes its own way.

The two coordinates are independent, so with the same noise the pair's trajectory is that of each coordinate
under a process of one noise level.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.denoisers import Data, EDMPreconditioning, GaussianDenoiser, V
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess, SeededNoise, drawing_from
from pyro_diffusion.samplers import (
    DAPS,
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    Ancestral,
    AnnealedLangevin,
    Heun,
    Langevin,
    PredictorCorrector,
    RePaint,
    UniPC,
    simulate,
)
from pyro_diffusion.samplers.base import recorder
from pyro_diffusion.schedules import LogLinear, uniform
from tests.exact import mixture, slope
from tests.per_coordinate import (
    F64,
    MEAN,
    RATES,
    SHIFTS,
    VARIANCE,
    ColumnNoise,
    PerCoordinate,
    alone,
    normal,
)
from tests.sampler_table import DETERMINISTIC, STOCHASTIC

PAIR = (0, 1)
STEPS = 9
# Uneven in log-SNR, so that weights of multistep methods differ from step to step.
TIMES = torch.linspace(0, 1, STEPS + 1, dtype=F64) ** 1.4
OTHERS = [
    PredictorCorrector(DDIM(), Langevin(moves=2)),
    PredictorCorrector(AdamsMoulton(), Langevin(0.3)),
    AnnealedLangevin(0.3, 3),
    RePaint(jumps=2),
    RePaint(AdamsBashforth(2), jumps=1),
]
RANDOM = [s for s in STOCHASTIC if not isinstance(s, Heun)]


def trajectory(denoiser, x, sampler, noise, times=TIMES):
    states, record = recorder()
    with drawing_from(noise):
        simulate(denoiser, times, x, sampler, callback=record)
    return torch.stack(states)


def check_pair(sampler, each=None, point_mass=True, times=TIMES):
    """The pair's states are those of its coordinates; ``each`` are their samplers, if others."""
    x = torch.randn(5, 2, dtype=F64)
    pair = trajectory(normal(point_mass), x, sampler, SeededNoise(7), times)
    for i in PAIR:
        own = sampler if each is None else each[i]
        column = x[:, i : i + 1]
        one = trajectory(alone(i, point_mass), column, own, ColumnNoise(7, i), times)
        assert_close(pair[..., i : i + 1], one, rtol=1e-10, atol=1e-10)
    return pair


@pytest.mark.parametrize("sampler", DETERMINISTIC + RANDOM + OTHERS, ids=repr)
def test_the_pair_goes_as_each_coordinate(sampler):
    states = check_pair(sampler)
    assert (states[0] - states[-1]).abs().min() > 1e-3


@pytest.mark.parametrize("sampler", [Ancestral(), RePaint(jumps=2)], ids=repr)
def test_reverse_kernels_with_a_posterior_variance(sampler):
    check_pair(sampler, point_mass=False)


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
def test_towards_noise(sampler):
    check_pair(sampler, times=TIMES.flip(0))


@pytest.mark.parametrize("between", [(0.0, math.inf), (0.1, 20.0)])
def test_heun_raises_noise_in_the_clock(between):
    """The clock falls by 2 log(1 + gamma), a coordinate's log-SNR by that times its rate."""
    gamma = 0.2
    sampler = Heun(STEPS * gamma, 1.01, between)

    def alike(rate, shift):
        # rho_i = exp(-(rate clock + shift) / 2) where the clock's is rho.
        ends = tuple(rho**rate * math.exp(-0.5 * shift) for rho in between)
        return Heun(STEPS * ((1 + gamma) ** rate - 1), 1.01, ends)

    each = [alike(rate, shift) for rate, shift in zip(RATES, SHIFTS, strict=True)]
    states = check_pair(sampler, each)
    plain = trajectory(normal(True), states[0], Heun(), SeededNoise(7))
    assert (states[-1] - plain[-1]).abs().min() > 1e-4


def flow(process, x, times):
    """The probability flow of the two normals: x keeps its quantile at every level."""
    start, end = (process.level(t) for t in times)
    mean = torch.tensor(MEAN, dtype=F64)

    def scale(level):
        return torch.hypot(level.alpha * VARIANCE**0.5, level.sigma)

    return end.alpha * mean + scale(end) / scale(start) * (x - start.alpha * mean)


# Begins deep in the noise of both coordinates.
DEEP = LogLinear(9.0, -24.0)


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(),
        AdamsBashforth(2),
        AdamsBashforth(3, extrapolate=V()),
        AdamsMoulton(3),
        AdamsMoulton(3, extrapolate=EDMPreconditioning(0.9)),
        Heun(),
    ],
    ids=repr,
)
def test_declared_orders_against_the_exact_flow(sampler):
    denoiser = normal(point_mass=True)
    denoiser.process = PerCoordinate(DEEP)
    x = torch.randn(8, 2, dtype=F64)
    steps, errors = [80, 160, 320], []
    for n in steps:
        times = uniform(n, F64)
        exact = flow(denoiser.process, x, times[[-1, 0]])
        errors.append((simulate(denoiser, times, x, sampler) - exact).abs().mean(0))
    for i in PAIR:
        found = slope(steps, [float(error[i]) for error in errors])
        assert found == pytest.approx(sampler.order, abs=0.25)


@pytest.fixture(scope="module")
def fine():
    """Starts of a mixture whose coordinates depend on each other, and where many steps lead them."""
    torch.manual_seed(0)
    denoiser = mixture(DEEP, point_mass=True)
    denoiser.process = PerCoordinate(DEEP)
    x = denoiser.marginal(torch.ones((), dtype=F64)).sample((48,))
    return denoiser, x, simulate(denoiser, uniform(4000, F64), x, AdamsMoulton())


@pytest.mark.parametrize(
    "sampler", [AdamsBashforth(3), AdamsBashforth(4), AdamsMoulton(4), UniPC(3)], ids=repr
)
def test_declared_orders_of_dependent_coordinates(sampler, fine):
    denoiser, x, exact = fine
    steps = [320, 640, 1280] if sampler.order == 4 else [160, 320, 640]
    errors = [
        (simulate(denoiser, uniform(n, F64), x, sampler) - exact).abs().mean(0) for n in steps
    ]
    for i in PAIR:
        found = slope(steps, [float(error[i]) for error in errors])
        assert found == pytest.approx(sampler.order, abs=0.3)


# DAPS.

ERRORS = torch.tensor([0.5, 0.8], dtype=F64)
SEEN = torch.tensor([0.3, 1.1], dtype=F64)


def observed(denoiser, seen, errors):
    """Every coordinate is observed with a normal error of its own."""

    def model():
        x = pyro.sample("x", Diffusion(denoiser, seen.shape, steps=2))
        pyro.sample("y", dist.Normal(x, errors).to_event(seen.dim()), obs=seen)

    return ProgramLikelihood(model)


@pytest.mark.parametrize("inner", [1, 4])
def test_daps_by_exact_draws(inner, monkeypatch):
    def states(denoiser, coordinates, noise):
        likelihood = observed(denoiser, SEEN[coordinates], ERRORS[coordinates])
        monkeypatch.setattr(torch, "randn_like", lambda v: noise.normal(v.shape, v))
        return trajectory(denoiser, x[:, coordinates], DAPS(likelihood, inner=inner), noise)

    x = torch.randn(5, 2, dtype=F64)
    pair = states(normal(True), slice(0, 2), SeededNoise(7))
    for i in PAIR:
        one = states(alone(i, True), slice(i, i + 1), ColumnNoise(7, i))
        assert_close(pair[..., i : i + 1], one, rtol=1e-10, atol=1e-10)


def test_daps_moves_reach_a_normal_of_several_variances():
    """Moments of conjugate normals: four two-sided z-tests at 4.5 errors, false alarms below 3e-5."""
    center, variance = torch.tensor([0.2, -0.4], dtype=F64), torch.tensor([0.9, 0.02], dtype=F64)
    sampler = DAPS(observed(normal(True), SEEN, ERRORS), moves=150)
    x = sampler._langevin(center.expand(4000, 2), variance, 150)
    precision = 1 / variance + 1 / ERRORS**2
    mean = (center / variance + SEEN / ERRORS**2) / precision
    for values, truth in ((x, mean), ((x - mean) ** 2, 1 / precision)):
        z = (values.mean(0) - truth) / (values.std(0) / len(x) ** 0.5)
        assert z.abs().max() < 4.5


def test_daps_moves_of_images_are_those_of_vectors():
    class Half(torch.nn.Module):
        def forward(self, x, log_snr):
            return x / 2

    ends, x = [], torch.randn(3, 1, 2, 2, dtype=F64)
    for shape in ((1, 2, 2), (4,)):
        process = GaussianProcess(LogLinear(6.0, -6.0), event_dim=len(shape))
        denoiser = GaussianDenoiser(Half(), process, Data())
        likelihood = observed(denoiser, torch.ones(shape, dtype=F64), torch.ones(shape, dtype=F64))
        torch.manual_seed(3)
        end = simulate(denoiser, TIMES, x.reshape(3, *shape), DAPS(likelihood, inner=2, moves=4))
        ends.append(end.reshape(3, 4))
    assert_close(*ends)
