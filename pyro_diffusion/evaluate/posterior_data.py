"""Posterior draws of a program as ArviZ data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_diffusion.evaluate.arviz_versions import build
from pyro_diffusion.evaluate.pointwise import Draws, latent_draws, pointwise_log_likelihood
from pyro_diffusion.infer import Particles
from pyro_diffusion.validation import check_positive_int, check_tensor

__all__ = ["posterior_to_arviz"]


def posterior_to_arviz(
    posterior: Draws | Particles | Sequence[Particles],
    model: Callable[..., Any] | None = None,
    *args: Any,
    site: str = "x",
    num_chains: int = 1,
    num_samples: int | None = None,
    **kwargs: Any,
) -> Any:
    """Posterior draws as ArviZ ``InferenceData`` (0.23) or ``DataTree`` (1.x).

    Args:
        posterior: draws {site: (number of draws,) + shape}, as ``Predictive(model, guide=guide)`` and
            ``MCMC.get_samples`` return them (chain by chain); or particles of one or several independent runs
            of twisted SMC, each of which becomes a chain of draws resampled by weight.
        model: the program; with it come the groups ``log_likelihood`` and ``observed_data``.
        args: the model's arguments.
        site: name of the site that particles are values of.
        num_chains: number of chains of a dict of draws.
        num_samples: draws of each particle run; as many as particles by default.
        kwargs: the model's keyword arguments.

    Returns:
        Groups ``posterior``; ``posterior_predictive``, draws of the model's observed sites if a dict has
        them; ``log_likelihood`` per observed site, of its batch shape, in nats (exact, unscaled, 0 where
        masked), so that ``az.loo`` works; ``observed_data``; for particles ``sample_stats`` with ``ess`` (at
        the data), ``ess_min`` (the smallest of all steps), ``log_evidence`` and ``log_evidence_error`` of the
        draw's run, and the evidence of all runs together as attributes. Factors are in none.

    Raises:
        ValueError: if draws do not fill the chains, or the model has a latent site without draws; and where a
            column of ``log_likelihood`` would not be one observation's log-density: in a plate that draws its
            rows, under ``poutine.scale``, for data that change from run to run, and for an observed site
            whose ``log_prob`` is an estimate.

    Example:
        >>> import pyro
        >>> from pyro.distributions import Normal
        >>> def model():
        ...     x = pyro.sample("x", Normal(0.0, 1.0))
        ...     pyro.sample("y", Normal(x, 1.0), obs=torch.tensor(0.5))
        >>> data = posterior_to_arviz({"x": torch.randn(100)}, model)
        >>> data["log_likelihood"]["y"].shape
        (1, 100)
    """
    attrs: dict[str, Any] = {"inference_library": "pyro_diffusion"}
    groups: dict[str, dict[str, Any]] = {}
    dims: dict[str, list[str]] = {}
    if isinstance(posterior, Mapping):
        # A factor's value is empty.
        for name, value in posterior.items():
            check_tensor(f"posterior[{name!r}]", value)
        values = {k: v.detach() for k, v in posterior.items() if v.numel()}
    else:
        runs = list(posterior) if isinstance(posterior, Sequence) else [posterior]
        values, stats, num_chains = *_particle_draws(runs, site, num_samples), len(runs)
        groups["sample_stats"] = stats
        # Filters of one batch, in the same dimensions for every figure.
        dims = {k: [f"{site}_batch_dim_{i}" for i in range(v.ndim - 2)] for k, v in stats.items()}
        attrs |= _evidence(runs)
    count = _check_count(values, check_positive_int("num_chains", num_chains))
    if model is not None:
        latents = latent_draws(model, args, kwargs, values)
        pointwise, observed = pointwise_log_likelihood(model, args, kwargs, latents, count)
        values |= latents
        predicted = {name: values.pop(name) for name in observed if name in values}
        groups["log_likelihood"] = _by_chain(pointwise, num_chains)
        if predicted:
            groups["posterior_predictive"] = _by_chain(predicted, num_chains)
        groups["observed_data"] = {k: _array(v) for k, v in observed.items()}
    groups["posterior"] = _by_chain(values, num_chains)
    return build(groups, attrs=attrs, dims=dims)


def _by_chain(values: Mapping[str, Tensor], num_chains: int) -> dict[str, Any]:
    return {
        name: _array(value).reshape(num_chains, -1, *value.shape[1:])
        for name, value in values.items()
    }


def _array(value: Tensor) -> np.ndarray:
    # NumPy has no bfloat16.
    value = value.float() if value.dtype == torch.bfloat16 else value
    return np.asarray(value.detach().cpu())


def _check_count(values: Draws, num_chains: int) -> int:
    lengths = {name: len(value) if value.dim() else 0 for name, value in values.items()}
    count = next(iter(lengths.values()), 0)
    if count < 1 or count % num_chains or set(lengths.values()) != {count}:
        raise ValueError(
            f"posterior: got {lengths} draws for {num_chains} chain(s), expected one number, a multiple"
        )
    return count


def _particle_draws(
    runs: Sequence[Particles], site: str, num_samples: int | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Equally weighted draws of every run, and what each run says of itself."""
    if not runs or not all(isinstance(run, Particles) for run in runs):
        kinds = [type(run).__name__ for run in runs]
        raise ValueError(
            f"posterior: got {kinds}, expected a dict of draws or Particles (of AnnealedParticles, "
            "sample(n); of Swept, its value by the name of its site)"
        )
    count = check_positive_int("num_samples", len(runs[0]) if num_samples is None else num_samples)
    values = torch.cat([run.sample((count,)) for run in runs])
    stats: dict[str, list[Any]] = {
        "ess": [run.ess[-1].cpu() for run in runs],
        "ess_min": [run.ess.amin(0).cpu() for run in runs],
        "log_evidence": [np.float64(run.log_evidence.value) for run in runs],
        "log_evidence_error": [np.float64(run.log_evidence.standard_error) for run in runs],
    }
    table = {k: np.stack([np.asarray(each) for each in v]) for k, v in stats.items()}
    return {site: values}, {
        k: np.repeat(v.reshape(len(runs), 1, *v.shape[1:]), count, 1) for k, v in table.items()
    }


def _evidence(runs: Sequence[Particles]) -> dict[str, float]:
    """Log of the mean evidence of independent runs, and its standard error (delta method).

    The error is infinite, "not estimated", where that of any run of weight is.
    """
    logs = torch.tensor([run.log_evidence.value for run in runs], dtype=torch.float64)
    errors = torch.tensor([run.log_evidence.standard_error for run in runs], dtype=torch.float64)
    weights = logs.softmax(0)
    return {
        "log_evidence": float(logs.logsumexp(0) - np.log(len(runs))),
        "log_evidence_error": float(torch.where(weights > 0, weights * errors, 0.0).norm()),
    }
