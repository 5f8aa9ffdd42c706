"""Every sampler's declared order, measured by regression: of its flow, of its law and of its paths."""

import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    Ancestral,
    DPMSolverPP,
    Heun,
    ancestral,
    heun,
    simulate,
)
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import mixture, mixture_law, slope
from tests.sampler_table import DETERMINISTIC, STOCHASTIC, grid, normal_data, start

F64 = torch.float64
each_deterministic = pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
each_stochastic = pytest.mark.parametrize("sampler", STOCHASTIC, ids=repr)


# It starts where the posterior mean hardly moves, so that the first steps cost nothing.
SMOOTH = LogLinear(9.0, -14.0)


@pytest.fixture(scope="module")
def flow():
    """Starts of the mixture, and the flow's ends by a very fine walk."""
    torch.manual_seed(0)
    denoiser = mixture(SMOOTH, point_mass=True)
    x = start(denoiser, 48)
    return denoiser, x, simulate(denoiser, grid(SMOOTH, 3000), x, AdamsMoulton())


@each_deterministic
def test_declared_order(sampler, flow):
    """Slope of the mean error; high orders show on finer grids."""
    denoiser, x, exact = flow
    steps = [240, 480, 960] if sampler.order == 4 else [80, 160, 320]
    errors = [
        float((simulate(denoiser, grid(SMOOTH, n), x, sampler) - exact).abs().mean()) for n in steps
    ]
    assert slope(steps, errors) == pytest.approx(sampler.order, abs=0.25)


@each_deterministic
def test_there_and_back(sampler):
    """Towards noise and back: what is missing vanishes with the steps, at no less than the order less 0.4."""
    schedule = LogLinear(6.0, -6.0)
    denoiser = mixture(schedule, point_mass=True)
    x = mixture_law().sample((16,))
    steps, errors = [60, 120, 240], []
    for n in steps:
        times = grid(schedule, n)
        noise = simulate(denoiser, times.flip(0), x, sampler)
        errors.append(float((simulate(denoiser, times, noise, sampler) - x).abs().mean()))
    assert errors[-1] < 2e-2
    assert slope(steps, errors) > min(sampler.order, 2) - 0.4


def affine(monkeypatch, sampler, denoiser, times, noises):
    """A walk on normal data is affine in the start and the noise: its constant, gain and noise weights.

    ``noises`` has a row per draw and a column per source; the batch is: zero, one, then a row per source.
    """
    feed = iter(noises)

    def fed(kernel):
        base = per_coordinate(kernel)
        noise = torch.cat([torch.zeros(2, dtype=F64), next(feed)])
        return base.mean + base.stddev * noise[:, None]

    for module in (ancestral, heun):
        monkeypatch.setattr(module, "draw", fed)
    x = torch.zeros(noises.shape[1] + 2, 1, dtype=F64)
    x[1] = 1
    end = simulate(denoiser, times, x, sampler)[:, 0]
    return end[0], end[1] - end[0], end[2:] - end[0]


def weak_errors(sampler, steps, monkeypatch):
    """Normal data: errors of mean and variance of the last state, without a single draw."""
    schedule = LogLinear(8.0, -8.0)
    denoiser = normal_data(schedule)
    errors = []
    for n in steps:
        times = grid(schedule, n)
        constant, gain, weights = affine(
            monkeypatch, sampler, denoiser, times, torch.eye(n, dtype=F64)
        )
        end, first = denoiser.marginal(times[-1]), denoiser.marginal(times[0])
        mean = constant + gain * end.mean
        variance = gain**2 * end.variance + weights.square().sum()
        errors.append(float((mean - first.mean).abs() + (variance - first.variance).abs()))
    return errors


@each_stochastic
def test_declared_weak_order(sampler, monkeypatch):
    """Over three doublings."""
    steps = [64, 128, 256, 512]
    errors = weak_errors(sampler, steps, monkeypatch)
    assert slope(steps, errors) == pytest.approx(sampler.weak_order, abs=0.25)


def test_churn_at_its_limit_has_its_order_on_finer_grids_only(monkeypatch):
    """Noise of a step is raised by its limit, however many steps, while K < 40 / (sqrt(2) - 1) = 97."""
    steps = [24, 48, 96, 192, 384]
    errors = weak_errors(Heun(churn=40.0), steps, monkeypatch)
    assert slope(steps[:3], errors[:3]) < 1.4
    assert slope(steps[3:], errors[3:]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(),
        DDIM(1.0),
        AdamsBashforth(2, 1.0),
        AdamsBashforth(3, 1.0),
        DPMSolverPP(1.0),
        AdamsMoulton(3, 1.0),
    ],
    ids=repr,
)
def test_declared_strong_order(sampler, monkeypatch):
    """Normal data: the root-mean-square distance of paths on one Brownian motion, again without a draw.

    The coarse noise of a step is the fine steps' noise carried to its end by the bridge.
    """
    schedule = LogLinear(6.0, -6.0)
    denoiser = normal_data(schedule)
    fine = 1024
    times = grid(schedule, fine)
    level = schedule.level(times)
    u = 0.5 * level.log_snr
    scale = (
        level.sigma[:-1] * (-torch.expm1(-2 * (u[:-1] - u[1:]))).sqrt()
    )  # of the step j + 1 -> j
    exact = affine(
        monkeypatch, AdamsBashforth(2, 1.0), denoiser, times, torch.eye(fine, dtype=F64).flip(1)
    )
    steps, errors = [16, 32, 64, 128], []
    for n in steps:
        width = fine // n
        noises = torch.zeros(n, fine, dtype=F64)
        for i in range(n):  # walked order: from j + width down to j
            j = fine - (i + 1) * width
            inside = torch.arange(j, j + width)
            carried = level.sigma[j] / level.sigma[inside] * torch.exp(-(u[j] - u[inside]))
            whole = level.sigma[j] * (-torch.expm1(-2 * (u[j] - u[j + width]))).sqrt()
            noises[i, inside] = carried * scale[inside] / whole
        assert_close(noises.square().sum(1), torch.ones(n, dtype=F64))
        coarse = affine(monkeypatch, sampler, denoiser, times[::width], noises)
        end = denoiser.marginal(times[-1])
        shift = coarse[0] - exact[0] + (coarse[1] - exact[1]) * end.mean
        spread = (coarse[1] - exact[1]) ** 2 * end.variance + (coarse[2] - exact[2]).square().sum()
        errors.append(float((shift**2 + spread).sqrt()))
    assert slope(steps, errors) == pytest.approx(sampler.strong_order, abs=0.25)
