"""A log-SNR curve that is learned: a monotone spline between two fixed ends."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_diffusion.schedules.variance_preserving import VariancePreserving
from pyro_diffusion.validation import check_positive_int

__all__ = ["LearnedSchedule"]

# Least height of a bin as a fraction of the mean height, and least slope at a knot.
FLOOR = 1e-2


class _Bin(NamedTuple):
    """A piece of the spline: its left knot's value, its height, its mean slope and those at both knots."""

    low: Tensor
    height: Tensor
    slope: Tensor
    left: Tensor
    right: Tensor


class LearnedSchedule(VariancePreserving):
    r"""Log-SNR :math:`\lambda(t) = \lambda_{max} - (\lambda_{max} - \lambda_{min})\,h(t)` with learned h.

    h is a monotone rational-quadratic spline from (0, 0) to (1, 1) on evenly spaced knots; its heights and
    slopes are Parameters, its inverse and derivative closed forms. The scaling is that of
    :class:`~pyro_diffusion.schedules.VariancePreserving`. It starts as the straight line
    (:class:`LogLinear`). As part of a denoiser's process it is trained with it.

    The continuous-time bound does not depend on h, only its estimate's variance does: under
    :class:`~pyro_diffusion.distributions.DiffusionSDE` the parameters get the gradient of that variance
    instead of the bound's. Under :class:`~pyro_diffusion.distributions.Diffusion` they get the bound's, which
    is tighter or looser with the grid that h makes of even times.

    Args:
        bins: number of pieces, >= 1.
        log_snr_max: log-SNR at t = 0, fixed.
        log_snr_min: log-SNR at t = 1, fixed.

    Raises:
        ValueError: if ``bins < 1`` or ``log_snr_max <= log_snr_min``.

    Example:
        >>> schedule = LearnedSchedule()
        >>> schedule.log_snr(torch.tensor([0.0, 0.25, 1.0])).tolist()
        [10.0, 5.0, -10.0]

    References:
        Kingma et al., Variational Diffusion Models, arXiv 2107.00630, appendix H and I.
        Durkan et al., Neural spline flows, arXiv 1906.04032, section 3.1.
    """

    def __init__(
        self, bins: int = 32, log_snr_max: float = 10.0, log_snr_min: float = -10.0
    ) -> None:
        check_positive_int("bins", bins)
        super().__init__(log_snr_max, log_snr_min)
        self.heights = nn.Parameter(torch.zeros(bins))
        self.slopes = nn.Parameter(torch.zeros(bins + 1))

    def _curve(self, u: Tensor) -> Tensor:
        piece, x = self._piece(u)
        mix = x * (1 - x)
        rise = piece.slope * x.square() + piece.left * mix
        h = piece.low + piece.height * rise / self._bend(piece, mix)
        return torch.lerp(*self._ends(u), h)

    def _curve_slope(self, u: Tensor) -> Tensor:
        piece, x = self._piece(u)
        mix = x * (1 - x)
        top = piece.right * x.square() + 2 * piece.slope * mix + piece.left * (1 - x).square()
        slope = piece.slope.square() * top / self._bend(piece, mix).square()
        return slope * (self.log_snr_min - self.log_snr_max)

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        share = (log_snr - self.log_snr_max) / (self.log_snr_min - self.log_snr_max)
        if not hasattr(self, "heights"):  # the base class asks for the two ends
            return share
        knots, heights, slopes = self._spline(share)
        y = share.clamp(0, 1)
        index = (torch.searchsorted(knots.detach(), y.detach().contiguous(), right=True) - 1).clamp(
            0, len(heights) - 1
        )
        piece = self._at(index, knots, heights, slopes)
        above = y - piece.low
        curve = piece.left + piece.right - 2 * piece.slope
        a = piece.height * (piece.slope - piece.left) + above * curve
        b = piece.height * piece.left - above * curve
        c = -piece.slope * above
        x = 2 * c / (-b - torch.sqrt((b.square() - 4 * a * c).clamp(min=0)))
        return (index + x) / len(heights)

    def _piece(self, u: Tensor) -> tuple[_Bin, Tensor]:
        """The bin of each time, and where in it the time lies, in [0, 1]."""
        knots, heights, slopes = self._spline(u)
        place = u * len(heights)
        index = place.detach().long().clamp(0, len(heights) - 1)
        return self._at(index, knots, heights, slopes), place - index

    def _spline(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values at the knots, heights of the bins and slopes at the knots."""
        count = len(self.heights)
        share = self.heights.to(dtype=like.dtype, device=like.device).softmax(0)
        heights = FLOOR / count + (1 - FLOOR) * share
        ends = heights.new_tensor([0.0, 1.0])
        knots = torch.cat([ends[:1], heights.cumsum(0)[:-1], ends[1:]])
        raw = self.slopes.to(dtype=like.dtype, device=like.device)
        # softplus, shifted so that 0 stands for the slope 1
        slopes = FLOOR + (1 - FLOOR) * nn.functional.softplus(raw + math.log(math.e - 1))
        return knots, knots.diff(), slopes

    @staticmethod
    def _at(index: Tensor, knots: Tensor, heights: Tensor, slopes: Tensor) -> _Bin:
        height = heights[index]
        return _Bin(knots[index], height, height * len(heights), slopes[index], slopes[index + 1])

    @staticmethod
    def _bend(piece: _Bin, mix: Tensor) -> Tensor:
        return piece.slope + (piece.left + piece.right - 2 * piece.slope) * mix

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        ends = like.new_tensor([self.log_snr_max, self.log_snr_min])
        return ends[0], ends[1]
