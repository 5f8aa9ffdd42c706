"""The few places where ArviZ 0.23 and 1.x (Python 3.12 and later) differ."""

import warnings
from functools import partial
from typing import Any

with warnings.catch_warnings():
    # ArviZ 0.23 announces 1.x at every import; our users did not ask.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor")
    import arviz as az

__all__ = ["build", "elpd_data"]


# Above it a Pareto tail makes the mean of importance weights unreliable.
GOOD_K = 0.7
# Groups of other tools, which ArviZ plots and does not define.
CUSTOM_GROUPS = ("prior_sbc",)


def _modern() -> bool:
    return int(az.__version__.split(".")[0]) >= 1


def build(groups: dict[str, dict[str, Any]], attrs: dict[str, Any], **options: Any) -> Any:
    """An ``InferenceData`` (0.23) or ``DataTree`` (1.x) of named groups of arrays, and its attributes."""
    from_dict: Any = az.from_dict
    if not _modern():
        # it silently leaves out groups that it does not know
        own = {name: groups[name] for name in groups if name in CUSTOM_GROUPS}
        known = {name: groups[name] for name in groups if name not in CUSTOM_GROUPS}
        data = from_dict(**known, attrs=attrs, **options)
        if own:
            data.add_groups({n: az.dict_to_dataset(g, attrs=attrs) for n, g in own.items()})
        return data
    # There attributes are given by group; these are of the whole.
    return from_dict(groups, attrs={"/": attrs}, **options)


def elpd_data(pointwise: Any, pareto_k: Any, warning: bool) -> Any:
    """Pointwise log predictive densities as the ``ELPDData`` that ``az.compare`` takes as they are.

    Args:
        pointwise: an xarray ``DataArray`` of one value per datum.
        pareto_k: another, of their Pareto tail indices.
        warning: whether the values are to be doubted.
    """
    values = pointwise.values
    common = {
        "se": float((values.size * values.var()) ** 0.5),
        "n_samples": 1,
        "n_data_points": values.size,
        "warning": warning,
        "scale": "log",
        "good_k": GOOD_K,
        "pareto_k": pareto_k,
    }
    if _modern():
        # a class for each kind of estimate; before 1.3 the kind was a field
        loo = getattr(az, "ELPDDataLOO", None) or partial(az.ELPDData, kind="loo")
        return loo(elpd=float(values.sum()), p=0.0, elpd_i=pointwise, **common)
    # Its methods go by position: the criterion and its two companions come first.
    elpd = {"elpd_loo": float(values.sum()), "se": common.pop("se"), "p_loo": 0.0}
    rows = {**elpd, **common, "loo_i": pointwise}
    return az.ELPDData(data=list(rows.values()), index=list(rows))
