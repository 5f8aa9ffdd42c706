"""The divergence of two jump processes per unit of time, from their rates."""

import torch
from torch import Tensor

__all__ = ["jump_divergence"]


def jump_divergence(known: Tensor, found: Tensor, gap: Tensor) -> Tensor:
    r""":math:`b - a + a \log(a / b)`, elementwise and without cancellation.

    Per unit of time, what a jump process that jumps at rate a costs one that takes the rate to be b.

    Args:
        known: a >= 0.
        found: b, above 0 where a is.
        gap: b - a, computed for itself: where the two are close, its digits count.
    """
    jumps = known > 0
    a, b = torch.where(jumps, known, 1.0), torch.where(jumps, found, 1.0)
    b = b.clamp(min=torch.finfo(b.dtype).tiny)
    ratio = torch.where(jumps, gap, 0.0) / a
    close = ratio.abs() < 0.5
    # Either branch gets numbers that it can take, so that no gradient is NaN.
    log_ratio = torch.where(
        close, torch.log1p(torch.where(close, ratio, 0.0)), torch.where(close, 1.0, b / a).log()
    )
    return gap - torch.where(jumps, known * log_ratio, 0.0)
