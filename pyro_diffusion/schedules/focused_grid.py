"""A grid for few steps: dense in log-SNR where samples are decided."""

import math

import torch
from torch import Tensor

from pyro_diffusion.schedules.base import Schedule
from pyro_diffusion.validation import check_number, check_positive_int

__all__ = ["focused_log_snr"]


def focused_log_snr(
    schedule: Schedule,
    steps: int,
    centre: float = 0.0,
    width: float = 3.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Times with :math:`\lambda = \text{centre} + \text{width}\,\sinh a`, a evenly spaced.

    Steps are even in log-SNR within about ``width`` of the centre and grow with the distance beyond it,
    where the posterior mean hardly moves. For few steps; the limit of a large width is
    :func:`~pyro_diffusion.schedules.uniform_log_snr`.

    Args:
        schedule: with finite ends.
        steps: number of steps.
        centre: log-SNR where steps are smallest; 0 is where unit-variance data and noise are of one size.
        width: of the even part, >= 0.001.
        dtype: of the times, torch's default by default.

    Raises:
        ValueError: if ``steps < 1``, ``width < 0.001``, or an end or the centre is not finite.

    Example:
        >>> from pyro_diffusion.schedules import LogLinear
        >>> schedule = LogLinear(9, -9)
        >>> [round(float(u), 2) for u in schedule.log_snr(focused_log_snr(schedule, 3))]
        [9.0, 1.93, -1.93, -9.0]
    """
    count = check_positive_int("steps", steps)
    check_number("width", width, at_least=1e-3)
    ends = (schedule.log_snr_max, schedule.log_snr_min)
    if not all(map(math.isfinite, (*ends, centre))):
        raise ValueError(
            f"schedule, centre: got log-SNR ends {list(ends)} and centre {centre}, expected finite numbers"
        )
    high, low = (math.asinh((end - centre) / width) for end in ends)
    place = torch.linspace(high, low, count + 1, dtype=torch.float64)
    times = schedule.time_of_log_snr(centre + width * torch.sinh(place))
    times[0], times[-1] = 0.0, 1.0
    return times.to(dtype or torch.get_default_dtype())
