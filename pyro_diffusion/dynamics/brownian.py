"""Brownian motion for torchsde, drawn from torch's generators or a source of noise."""

import math

import torch
import torchsde
from torch import Tensor

from pyro_diffusion.processes.noise import joint_seed, normal_like
from pyro_diffusion.validation import check_number, check_sizes

__all__ = ["IndependentIncrements", "brownian_interval"]

# Both the increment and its integral, which methods of strong order 1.5 need.
LEVY_AREA = "space-time"


class IndependentIncrements(torchsde.BaseBrownian):
    r"""Increments drawn on demand: Brownian motion for one integration forward over a fixed grid.

    For an interval of width h it returns :math:`W \sim \mathcal N(0, h)` and, on request, the integral
    :math:`U = \int (W_s - W_{t_a})\,ds = h (W/2 + H)` with :math:`H \sim \mathcal N(0, h/12)`. The
    joint distribution is exact. Nothing is stored: a repeated interval would be drawn again, so going back is
    refused.
    Adaptive steps and adjoints need a path that is remembered, such as ``torchsde.BrownianInterval``.

    Args:
        shape: of the increments, (rows, channels).
        dtype: of the increments.
        device: of the increments.
        generator: when None, torch's default generator of the device, or the source of ``drawing_from``.

    Raises:
        ValueError: for sizes below 1, and for an interval that starts before the last one ended.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._like = torch.empty(check_sizes("shape", shape), dtype=dtype, device=device)
        self._generator, self._reached = generator, -math.inf

    def __call__(
        self,
        ta: Tensor | float,
        tb: Tensor | float | None = None,
        return_U: bool = False,
        return_A: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The increment over [ta, tb], and its integral on request."""
        start, stop = float(ta), math.nan if tb is None else float(tb)
        if not self._reached <= start <= stop or return_A:
            raise ValueError(
                f"ta, tb: got the interval from {start} to {stop} after one that ended at {self._reached}, "
                "expected intervals one after another (take torchsde.BrownianInterval for any other use)"
            )
        self._reached = stop
        width = stop - start
        w = self._normal(width)
        return (w, self._normal(width / 12).add_(w, alpha=0.5).mul_(width)) if return_U else w

    def _normal(self, variance: float) -> Tensor:
        if self._generator is None:
            out = normal_like(self._like, 1)
        else:
            out = torch.empty_like(self._like).normal_(generator=self._generator)
        return out if variance == 1 else out.mul_(math.sqrt(variance))

    def __repr__(self) -> str:
        return f"IndependentIncrements(shape={tuple(self._like.shape)}, reached={self._reached})"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the increments."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Device of the increments."""
        return self._like.device

    @property
    def shape(self) -> torch.Size:
        """Shape of an increment."""
        return self._like.shape

    @property
    def levy_area_approximation(self) -> str:
        """Increments come with their integrals."""
        return LEVY_AREA


def brownian_interval(
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    stop: float = 1.0,
) -> torchsde.BrownianInterval:
    """torchsde's Brownian path over [0, stop], for any interval, in any order and repeatedly.

    Its entropy is drawn from torch's default generator, or for all rows together from the source of
    ``drawing_from``; torchsde's own default is numpy's.

    Args:
        shape: of the increments, (rows, channels).
        dtype: of the increments.
        device: of the increments.
        stop: end of the interval, > 0.

    Raises:
        ValueError: for sizes below 1, or an end that is not positive.
    """
    return torchsde.BrownianInterval(
        t0=0.0,
        t1=check_number("stop", stop, above=0),
        size=tuple(check_sizes("shape", shape)),
        dtype=dtype or torch.get_default_dtype(),
        device=device,
        entropy=joint_seed() % (2**31 - 1),
        levy_area_approximation=LEVY_AREA,
    )
