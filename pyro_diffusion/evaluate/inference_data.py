"""Likelihoods as ArviZ data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pyro_diffusion.estimate import Likelihood
from pyro_diffusion.evaluate.arviz_versions import build

__all__ = ["to_arviz"]


def to_arviz(
    likelihood: Likelihood | Sequence[Likelihood],
    *,
    name: str = "x",
    posterior: Mapping[str, Tensor] | None = None,
    chains: int = 1,
) -> Any:
    """Per-datum log-likelihoods as ArviZ ``InferenceData`` (0.23) or ``DataTree`` (1.x).

    Args:
        likelihood: one likelihood of the data, or one per draw of the model's parameters, chain by chain.
        name: name of the variable in the ``log_likelihood`` group.
        posterior: the draws themselves, each (draws,) + shape or (chains * draws,) + shape; with them
            ``az.loo`` works.
        chains: number of chains that the draws come from.

    Returns:
        Groups ``log_likelihood`` (chain, draw, n) in nats, ``sample_stats`` with each value's Monte-Carlo
        ``standard_error`` (and ``ess``, ``khat`` where there are importance weights), and ``posterior`` if
        given. Attributes say what kind of number the values are.

    Raises:
        ValueError: if the draws do not fill the chains, or the likelihoods are of different kinds.
    """
    draws = [likelihood] if isinstance(likelihood, Likelihood) else list(likelihood)
    if not draws or len(draws) % chains:
        raise ValueError(
            f"chains: got {len(draws)} draw(s) for {chains} chain(s), expected a multiple"
        )
    kinds = {draw.kind for draw in draws}
    if len(kinds) > 1:
        raise ValueError(f"likelihood: got kinds {sorted(kinds)}, expected one kind")

    def stack(rows: Sequence[Tensor]) -> np.ndarray:
        array = np.stack([np.asarray(row.detach().cpu()) for row in rows])
        return array.reshape(chains, -1, *array.shape[1:])

    stats = {"standard_error": stack([draw.standard_error for draw in draws])}
    for key in ("ess", "khat"):
        rows = [value for draw in draws if (value := getattr(draw, key)) is not None]
        if rows:
            stats[key] = stack(rows)
    groups = {"log_likelihood": {name: stack([d.value for d in draws])}, "sample_stats": stats}
    if posterior is not None:
        groups["posterior"] = {k: stack(list(v)) for k, v in posterior.items()}
        wrong = {k: len(v) for k, v in posterior.items() if len(v) != len(draws)}
        if wrong:
            raise ValueError(f"posterior: got {wrong} draws, expected {len(draws)} each")
    first = draws[0]
    attrs = {
        "inference_library": "pyro_diffusion",
        "kind": first.kind,
        "unit": first.unit,
        "evaluations_per_datum": float(first.evaluations),
    }
    return build(groups, attrs=attrs)
