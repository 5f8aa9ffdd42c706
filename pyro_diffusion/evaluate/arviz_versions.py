"""The few places where ArviZ 0.23 (Python 3.11) and 1.x (3.12 and later) differ."""

import warnings
from typing import Any

import numpy as np
from torch import Tensor

with warnings.catch_warnings():
    # ArviZ 0.23 announces 1.x at every import; our users did not ask.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor")
    import arviz as az

__all__ = ["build", "pareto_khat"]


def _modern() -> bool:
    return int(az.__version__.split(".")[0]) >= 1


def build(groups: dict[str, dict[str, Any]], **options: Any) -> Any:
    """An ``InferenceData`` (0.23) or ``DataTree`` (1.x) of named groups of arrays."""
    from_dict: Any = az.from_dict
    return from_dict(groups, **options) if _modern() else from_dict(**groups, **options)


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Pareto tail index of every column of (samples, n) log weights.

    Infinite when a column has too few distinct weights to fit a tail.
    """
    columns = np.ascontiguousarray(log_weights.detach().cpu().double().numpy().T)
    if _modern():
        from arviz_stats.base import array_stats

        _, khat = array_stats.psislw(columns, axis=-1)
    else:
        _, khat = az.psislw(columns)
    khat = np.asarray(khat, dtype=float).reshape(-1)
    return log_weights.new_tensor(np.where(np.isnan(khat), np.inf, khat), device="cpu")
