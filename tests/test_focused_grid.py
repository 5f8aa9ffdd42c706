"""The grid that is dense around one log-SNR."""

import math

import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.schedules import Cosine, Rectified, focused_log_snr, uniform_log_snr
from pyro_diffusion.schedules.grids import check_grid
from tests.exact import SCHEDULES

F64 = torch.float64


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 11])
def test_it_is_a_grid(name, steps):
    schedule = SCHEDULES[name]()
    times = focused_log_snr(schedule, steps, dtype=F64)
    check_grid(times, schedule)
    assert len(times) == steps + 1 and times[0] == 0 and times[-1] == 1


def test_steps_follow_the_formula():
    schedule = Cosine(9.0, -7.0)
    log_snr = schedule.log_snr(focused_log_snr(schedule, 12, centre=1.0, width=2.0, dtype=F64))
    place = torch.asinh((log_snr - 1.0) / 2.0)
    assert_close(place.diff(), place.diff().mean().expand(12), rtol=1e-6, atol=0)


def test_a_large_width_is_uniform():
    schedule = Cosine()
    wide = focused_log_snr(schedule, 7, width=1e6, dtype=F64)
    assert_close(wide, uniform_log_snr(schedule, 7, F64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: focused_log_snr(Cosine(), 0), r"^steps: got 0"),
        (lambda: focused_log_snr(Cosine(), 4, width=0.0), r"^width: got 0.0"),
        (lambda: focused_log_snr(Cosine(), 4, centre=math.nan), r"^schedule, centre: got"),
        (lambda: focused_log_snr(Rectified.full(), 4), r"^schedule, centre: got .*finite"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
