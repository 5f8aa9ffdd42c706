"""Time grids: increasing tensors of steps + 1 times from 0 (data) to 1 (noise)."""

import torch
from torch import Tensor

from pyro_diffusion.schedules.base import Schedule
from pyro_diffusion.validation import check_number, check_positive_int, check_tensor

__all__ = ["check_grid", "karras", "quadratic", "uniform", "uniform_log_snr"]


def uniform(steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Evenly spaced times j / steps.

    Raises:
        ValueError: if ``steps < 1``.
    """
    return torch.linspace(0, 1, check_positive_int("steps", steps) + 1, dtype=dtype)


def quadratic(steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Times (j / steps)^2, denser near the data (the quadratic sub-grid of arXiv 2010.02502).

    Raises:
        ValueError: if ``steps < 1``.
    """
    return uniform(steps, dtype).square()


def uniform_log_snr(schedule: Schedule, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    r"""Times evenly spaced in log-SNR, :math:`\lambda_j = \lambda_0 + \tfrac{j}{K} (\lambda_K - \lambda_0)`.

    Raises:
        ValueError: if ``steps < 1`` or the schedule has an infinite end.
    """
    _check_finite_ends(schedule)
    log_snr = torch.lerp(*_ends(schedule), uniform(steps, torch.float64))
    return _pinned(schedule.time_of_log_snr(log_snr), dtype)


def karras(
    schedule: Schedule, steps: int, rho: float = 7.0, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Times at which :math:`(\sigma/\alpha)^{1/\rho}` is evenly spaced (arXiv 2206.00364, equation 5).

    Raises:
        ValueError: if ``steps < 1``, ``rho < 0.1`` or the schedule has an infinite end.
    """
    check_number("rho", rho, at_least=0.1)
    _check_finite_ends(schedule)
    low, high = (torch.exp(-end / (2 * rho)) for end in _ends(schedule))
    log_snr = -2 * rho * torch.log(torch.lerp(low, high, uniform(steps, torch.float64)))
    return _pinned(schedule.time_of_log_snr(log_snr), dtype)


def check_grid(times: Tensor, schedule: Schedule) -> None:
    """Refuse a grid that is not increasing in time and decreasing in log-SNR.

    Raises:
        ValueError: fewer than two times, times outside [0, 1] or not increasing, or a schedule whose
            log-SNR does not decrease along them.
    """
    if check_tensor("times", times).dim() != 1 or len(times) < 2:
        raise ValueError(
            f"times: got shape {tuple(times.shape)}, expected at least two times (steps >= 1)"
        )
    if not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(
            f"times: got values from {float(times.min()):g} to {float(times.max()):g}, "
            "expected times in [0, 1]"
        )
    if not bool((times.diff() > 0).all()):
        raise ValueError(
            "times: got a grid that is not increasing, expected 0 <= t_0 < ... < t_K <= 1"
        )
    log_snr = schedule.log_snr(times)
    if not bool((log_snr[1:] < log_snr[:-1]).all()):
        raise ValueError(
            f"schedule: got a non-monotone log-SNR over the grid ({type(schedule).__name__}), "
            "expected it to decrease strictly with time"
        )


def _ends(schedule: Schedule) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([schedule.log_snr_max, schedule.log_snr_min], dtype=torch.float64)
    return ends[0], ends[1]


def _check_finite_ends(schedule: Schedule) -> None:
    ends = torch.stack(_ends(schedule))
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(
            f"schedule: got log-SNR ends {ends.tolist()}, expected finite ends for this grid"
        )


def _pinned(times: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Exact ends after a round trip through the inverse curve."""
    times[0], times[-1] = 0.0, 1.0
    return times.to(dtype or torch.get_default_dtype())
