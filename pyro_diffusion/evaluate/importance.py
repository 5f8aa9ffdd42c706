"""Importance-weighted likelihood on the chain spelled out."""

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.estimate import IMPORTANCE_WEIGHTED, LogLikelihoodEstimate, concatenate
from pyro_diffusion.evaluate.batches import shared_seed
from pyro_diffusion.evaluate.rows import Rows, check_model, check_rows, score_rows
from pyro_diffusion.infer import ChainReparam
from pyro_diffusion.infer.reparam import forward_chain
from pyro_diffusion.pareto import pareto_khat
from pyro_diffusion.processes import draw, drawing_from
from pyro_diffusion.ranks import ProcessGroup
from pyro_diffusion.validation import check_positive_int, check_tensor

__all__ = ["from_log_weights", "importance_weighted", "log_weights"]


def importance_weighted(
    diffusion: TorchDistribution,
    data: Tensor,
    *,
    num_samples: int = 64,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 64,
    progress: bool = False,
    seed: int | None = None,
    process_group: ProcessGroup | None = None,
) -> LogLikelihoodEstimate:
    r"""Log p(x) by S importance samples of the whole chain from the forward process.

    .. math:: \log \tfrac1S \sum_{i=1}^S \frac{p(x, z_i)}{q(z_i | x)}, \qquad z = (x_{t_K}, \dots, x_{t_0}).

    A lower bound in expectation that rises to log p(x) with S; at S = 1 it is the evidence lower bound.
    Weights are those of Pyro's traces of the chain and its guide (see :class:`~pyro_diffusion.infer.DDPM`).

    Args:
        diffusion: the model, batch shape (), perhaps under Pyro's transforms, whose Jacobian is counted; a
            chain of few steps keeps the weights' variance and the cost (S (K + 1) network evaluations
            per datum) low.
        data: (n,) + event.
        num_samples: number S of chains per datum, >= 2. Below about 25 there is no tail to fit and every
            k-hat is infinite.
        context: the denoiser's context, one row per datum.
        batch_size: data evaluated together.
        progress: whether to show a progress bar.
        seed: of the noise; drawn from torch's global generator if None. A row's noise is a function of the
            seed and of the row's place, so ``batch_size`` changes values by rounding alone.
        process_group: the processes that share the batches, such as ``torch.distributed.group.WORLD``; all of
            them call this with the same arguments, and get the same result. None for this process alone.

    Returns:
        Values in nats of kind "importance-weighted", with delta-method standard errors, effective sample
        sizes and the Pareto k-hat of every datum's weights.

    Raises:
        ValueError: for fewer than two samples, bad data, a model with a batch shape or a context without
            exactly one row per datum.

    References:
        Burda et al., arXiv 1509.00519; Vehtari et al., Pareto smoothed importance sampling, arXiv 1507.02646.
    """
    check_positive_int("num_samples", num_samples, at_least=2)
    model = check_model("diffusion", diffusion, Diffusion)
    weights = log_weights(
        diffusion,
        data,
        num_samples=num_samples,
        context=context,
        batch_size=batch_size,
        progress=progress,
        seed=seed,
        process_group=process_group,
    )
    return from_log_weights(
        weights,
        evaluations=num_samples * (model.base.steps + 1),
        dimensions=diffusion.event_shape.numel(),
    )


def log_weights(
    diffusion: TorchDistribution,
    data: Tensor,
    *,
    num_samples: int = 1,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 64,
    progress: bool = False,
    seed: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Log importance weights :math:`\log p(x, z) - \log q(z | x)` of whole chains z drawn given data.

    Their mean is the evidence lower bound. They are constant, and equal to log p(x), exactly when every
    reverse kernel is the true one.

    Args:
        diffusion: the model, batch shape (), perhaps under Pyro's transforms, whose Jacobian is counted.
        data: (n,) + event.
        num_samples: number S of chains per datum.
        context: the denoiser's context, one row per datum.
        batch_size: data evaluated together.
        progress: whether to show a progress bar.
        seed: of the noise; drawn from torch's global generator if None. A row's noise is a function of the
            seed and of the row's place, so ``batch_size`` changes values by rounding alone.
        process_group: the processes that share the batches, such as ``torch.distributed.group.WORLD``; all of
            them call this with the same arguments, and get the same result. None for this process alone.

    Returns:
        (S, n), in nats, float64 on the host.

    Raises:
        ValueError: for bad data, ``num_samples < 1``, a model with a batch shape or a context without exactly
            one row per datum.
    """
    check_positive_int("num_samples", num_samples)
    model = check_model("diffusion", diffusion, Diffusion)
    check_rows("data", data, diffusion.event_shape)

    def score(rows: Rows, chain: Diffusion) -> tuple[Tensor]:
        with drawing_from(rows.noise):
            return (torch.stack([_log_weights(chain, rows) for _ in range(num_samples)]),)

    scores = score_rows(
        score,
        model,
        model.base,
        data,
        context=context,
        batch_size=batch_size,
        progress=progress,
        seed=shared_seed(seed, process_group),
        process_group=process_group,
    )
    return torch.cat([weights for (weights,) in scores], -1)


def from_log_weights(
    log_weights: Tensor, evaluations: float, dimensions: int
) -> LogLikelihoodEstimate:
    """A likelihood from any model's log importance weights (a variational autoencoder's, say).

    Args:
        log_weights: (num_samples, n), log p(x, z) - log q(z | x).
        evaluations: network evaluations per datum, to report.
        dimensions: numbers in one datum.

    Raises:
        ValueError: for weights of another shape, fewer than two samples, NaN, or plus infinity.
    """
    if check_tensor("log_weights", log_weights).dim() != 2 or len(log_weights) < 2:
        raise ValueError(
            f"log_weights: got shape {tuple(log_weights.shape)}, expected (num_samples, n), num_samples >= 2"
        )
    if log_weights.numel() == 0 or not bool((log_weights < math.inf).all()):
        raise ValueError(
            "log_weights: got none, NaN or +inf, expected numbers (-inf for no weight)"
        )
    check_positive_int("dimensions", dimensions)
    log_weights = log_weights.double()
    num_samples = len(log_weights)
    value = log_weights.logsumexp(0) - math.log(num_samples)
    relative = (log_weights - value).exp()
    return LogLikelihoodEstimate(
        value=value,
        standard_error=relative.std(0) / math.sqrt(num_samples),
        kind=IMPORTANCE_WEIGHTED,
        evaluations=evaluations,
        dimensions=dimensions,
        ess=relative.sum(0).square() / relative.square().sum(0),
        khat=pareto_khat(log_weights),
    )


def _log_weights(diffusion: Diffusion, rows: Rows) -> Tensor:
    """One chain per datum: log p(y, z) - log q(z | y), shape (n,)."""
    plate = pyro.plate("x_plate", len(rows.x))

    def model() -> None:
        with plate, poutine.reparam(config={"x": ChainReparam()}):
            pyro.sample("x", diffusion, obs=rows.x)

    def guide() -> None:
        with plate, _Draw():
            forward_chain("x", diffusion, rows.x)

    traces = get_importance_trace("flat", 1, model, guide, (), {})
    p, q = (
        sum(site["log_prob"] for site in trace.nodes.values() if _is_datum_site(site))
        for trace in traces
    )
    return concatenate([p - q + rows.log_det])


class _Draw(Messenger):
    """Has sites drawn from the noise of their rows."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["value"] = draw(msg["fn"])


def _is_datum_site(site: Any) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)
