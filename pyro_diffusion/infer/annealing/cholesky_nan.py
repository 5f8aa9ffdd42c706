"""Cholesky factors that are NaN, and no error, for matrices of a batch that have none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["CholeskyNaN"]


class CholeskyNaN(TorchFunctionMode):
    """Within it ``torch.linalg.cholesky`` fails for one matrix, not for the whole batch that holds it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call it, or what stands for it."""
        if func is torch.linalg.cholesky:
            func = _cholesky
        return func(*args, **(kwargs or {}))


def _cholesky(matrix: Tensor, *, upper: bool = False) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return torch.where(failed.bool()[..., None, None], torch.nan, factor)
