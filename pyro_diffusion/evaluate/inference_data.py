"""Likelihoods as ArviZ data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_diffusion.estimate import LogLikelihoodEstimate
from pyro_diffusion.evaluate.arviz_versions import GOOD_K, build, elpd_data
from pyro_diffusion.validation import check_positive_int

__all__ = ["to_arviz", "to_elpd"]


def to_arviz(
    likelihood: LogLikelihoodEstimate | Sequence[LogLikelihoodEstimate],
    *,
    name: str = "x",
    posterior: Mapping[str, Tensor] | None = None,
    num_chains: int = 1,
) -> Any:
    """Per-datum log-likelihoods as ArviZ ``InferenceData`` (0.23) or ``DataTree`` (1.x).

    Args:
        likelihood: one likelihood of the data, or one per draw of the model's parameters, chain by chain.
        name: name of the variable in the ``log_likelihood`` group.
        posterior: the draws themselves, each (number of draws,) + shape, chain by chain; with them
            ``az.loo`` and ``az.compare`` work. A model without draws of parameters is compared by
            :func:`to_elpd`.
        num_chains: number of chains that the draws come from.

    Returns:
        Groups ``log_likelihood`` (chain, draw, n) in nats, ``sample_stats`` with each value's Monte-Carlo
        ``standard_error`` (and ``ess``, ``khat`` where there are importance weights) along the same dimension
        of the data, and ``posterior`` if given. Attributes say what kind of number the values are.

    Raises:
        ValueError: if the draws do not fill the chains, or the likelihoods are of different kinds or numbers
            of data.
    """
    draws = [likelihood] if isinstance(likelihood, LogLikelihoodEstimate) else list(likelihood)
    check_positive_int("num_chains", num_chains)
    if not draws or len(draws) % num_chains:
        raise ValueError(
            f"num_chains: got {len(draws)} draw(s) for {num_chains} chain(s), expected a multiple"
        )
    kinds = {draw.kind for draw in draws}
    if len(kinds) > 1:
        raise ValueError(f"likelihood: got kinds {sorted(kinds)}, expected one kind")
    sizes = {len(draw) for draw in draws}
    if len(sizes) > 1:
        raise ValueError(
            f"likelihood: got {sorted(sizes)} data, expected the same data at every draw"
        )
    wrong = {k: len(v) for k, v in (posterior or {}).items() if len(v) != len(draws)}
    if wrong:
        raise ValueError(f"posterior: got {wrong} draws, expected {len(draws)} each")

    def stack(rows: Sequence[Tensor]) -> np.ndarray:
        array = np.stack([np.asarray(row.detach().cpu()) for row in rows])
        return array.reshape(num_chains, -1, *array.shape[1:])

    stats = {"standard_error": stack([draw.standard_error for draw in draws])}
    for key in ("ess", "khat"):
        rows = [value for draw in draws if (value := getattr(draw, key)) is not None]
        if len(rows) == len(draws):
            stats[key] = stack(rows)
    groups = {"log_likelihood": {name: stack([d.value for d in draws])}, "sample_stats": stats}
    if posterior is not None:
        groups["posterior"] = {k: stack(list(v)) for k, v in posterior.items()}
    first = draws[0]
    attrs = {
        "inference_library": "pyro_diffusion",
        "kind": first.kind,
        "unit": first.unit,
        "evaluations_per_datum": float(first.evaluations),
    }
    # One dimension for the data in all groups: what is said of a value is found beside it.
    dims = {key: [_dimension(name)] for key in (name, *stats)}
    return build(groups, attrs=attrs, dims=dims)


def to_elpd(likelihood: LogLikelihoodEstimate, *, name: str = "x") -> Any:
    r"""Log-likelihoods of held-out data as the ``ELPDData`` that ``az.compare`` takes.

    ``az.compare`` computes leave-one-out figures of draws of parameters. A network at a point estimate has
    none, and needs none: the log-likelihoods of held-out data are the pointwise log predictive densities.

    Args:
        likelihood: of the data, in the same order for all models.
        name: of the dimension of the data, ``f"{name}_dim_0"``.

    Returns:
        Pointwise values (nats), their sum, its standard error :math:`\sqrt{n\,Var(l_i)}` with ArviZ's
        division by n, and no penalty (``p`` 0); with importance weights, their k-hats, and a warning where
        one exceeds 0.7. ArviZ calls the criterion ``loo``.

    Raises:
        ValueError: for fewer than two data.

    Example:
        >>> held_out = torch.tensor([-1.0, -2.0, -1.5])
        >>> elpd = to_elpd(LogLikelihoodEstimate(held_out, torch.zeros(3), "exact", 1, 2))
        >>> elpd.n_data_points  # and then az.compare({"a": elpd, "b": ...})
        3

    References:
        Vehtari et al., arXiv 1507.04544, section 2.
    """
    if len(likelihood) < 2:
        raise ValueError(f"likelihood: got {len(likelihood)} datum, expected two or more")
    khat = likelihood.khat

    def column(values: Tensor) -> xr.DataArray:
        return xr.DataArray(values.detach().double().cpu().numpy(), dims=[_dimension(name)])

    tails = column(torch.zeros_like(likelihood.value) if khat is None else khat)
    return elpd_data(column(likelihood.value), tails, bool((tails > GOOD_K).any()))


def _dimension(name: str) -> str:
    """The dimension that ArviZ gives a variable of its own."""
    return f"{name}_dim_0"
