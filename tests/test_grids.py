"""Time grids: ends, order, and the law that spaces each of them."""

import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.schedules import (
    EDM,
    Cosine,
    LogLinear,
    Rectified,
    Schedule,
    VarianceExploding,
    karras,
    quadratic,
    uniform,
    uniform_log_snr,
)
from pyro_diffusion.schedules.grids import check_grid
from tests.exact import DTYPES, SCHEDULES

GRIDS = {
    "uniform": lambda _, steps, dtype=None: uniform(steps, dtype),
    "quadratic": lambda _, steps, dtype=None: quadratic(steps, dtype),
    "uniform log-SNR": lambda s, steps, dtype=None: uniform_log_snr(s, steps, dtype),
    "karras": lambda s, steps, dtype=None: karras(s, steps, dtype=dtype),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_contract(grid, schedule, dtype):
    schedule = schedule()
    for steps in (1, 2, 39, 1000):
        times = grid(schedule, steps, dtype)
        assert times.shape == (steps + 1,)
        assert times.dtype == (dtype or torch.get_default_dtype())
        assert times[0] == 0 and times[-1] == 1
        check_grid(times, schedule)
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"^steps: got"):
            grid(schedule, steps, dtype)


def test_spacing():
    assert_close(uniform(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert_close(quadratic(4), torch.tensor([0, 1, 4, 9, 16]) / 16)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_uniform_log_snr_spacing(schedule):
    schedule = schedule()
    log_snr = schedule.log_snr(uniform_log_snr(schedule, 20, torch.float64))
    expected = torch.linspace(schedule.log_snr_max, schedule.log_snr_min, 21, dtype=torch.float64)
    assert_close(log_snr, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rho", [1.0, 7.0])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_karras_spacing(schedule, rho):
    schedule = schedule()
    level = schedule.level(karras(schedule, 20, rho, torch.float64))
    root = (level.sigma / level.alpha) ** (1 / rho)
    assert_close(root, torch.lerp(root[0], root[-1], uniform(20, torch.float64)))


def test_edm_schedule_is_the_karras_grid():
    grid = karras(VarianceExploding(0.002, 80.0), 18, rho=7.0, dtype=torch.float64)
    sigma = VarianceExploding(0.002, 80.0).sigma(grid)
    assert_close(EDM(0.002, 80.0, rho=7.0).sigma(uniform(18, torch.float64)), sigma)


def test_quadratic_is_denser_near_the_data():
    assert bool((quadratic(9).diff().diff() > 0).all())


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan")])
def test_rho(rho):
    with pytest.raises(ValueError, match=r"^rho: got"):
        karras(Cosine(), 4, rho)


@pytest.mark.parametrize("grid", [karras, uniform_log_snr])
def test_infinite_ends(grid):
    with pytest.raises(ValueError, match=r"^schedule: got log-SNR ends .* expected finite"):
        grid(Rectified.full(), 4)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0], r"^times: got shape \(1,\), expected at least two times"),
        ([[0.0, 1.0]], r"^times: got shape \(1, 2\)"),
        ([0.0, 1.5], r"^times: got values from 0 to 1.5, expected times in \[0, 1\]"),
        ([-0.5, 1.0], r"^times: got values from -0.5 to 1"),
        ([0.0, float("nan"), 1.0], r"^times: got values"),
        ([0.0, 0.5, 0.5, 1.0], "^times: got a grid that is not increasing"),
        ([1.0, 0.0], "^times: got a grid that is not increasing"),
    ],
)
def test_check_grid_refuses_times(times, message):
    with pytest.raises(ValueError, match=message):
        check_grid(torch.tensor(times), Cosine())


class Bump(LogLinear):
    """A user's schedule whose log-SNR goes up for a while."""

    def log_snr(self, t):
        return super().log_snr(t) + 15 * torch.sin(6 * torch.pi * t)


class Flat(LogLinear):
    def log_snr(self, t):
        return torch.zeros_like(t)


class NotANumber(LogLinear):
    def log_snr(self, t):
        return super().log_snr(t) * torch.nan


@pytest.mark.parametrize("schedule", [Bump, Flat, NotANumber])
def test_check_grid_refuses_a_schedule(schedule):
    assert isinstance(schedule(), Schedule)
    with pytest.raises(ValueError, match=rf"^schedule: got a non-monotone .*{schedule.__name__}"):
        check_grid(uniform(20), schedule())


def test_check_grid_accepts_partial_and_infinite_grids():
    check_grid(torch.tensor([0.2, 0.7]), Cosine())
    check_grid(uniform(10), Rectified.full())
