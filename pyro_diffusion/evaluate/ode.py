"""Likelihoods by the probability-flow ODE."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.distributions import ProbabilityFlow
from pyro_diffusion.estimate import EXACT, UNBIASED, LogLikelihoodEstimate, concatenate
from pyro_diffusion.evaluate.batches import shared_seed
from pyro_diffusion.evaluate.rows import Rows, check_model, check_rows, score_rows
from pyro_diffusion.ranks import ProcessGroup

__all__ = ["flow_log_likelihood"]


def flow_log_likelihood(
    flow: TorchDistribution,
    data: Tensor,
    *,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
    progress: bool = False,
    seed: int | None = None,
    process_group: ProcessGroup | None = None,
) -> LogLikelihoodEstimate:
    r"""Log p(x) by the ODE, one per datum, with standard errors over probes.

    Args:
        flow: the model, batch shape (), perhaps under Pyro's transforms, whose Jacobian is counted; networks
            should be in ``eval()`` mode.
        data: (n,) + event.
        context: the denoiser's context, one row per datum.
        batch_size: data integrated together. Adaptive steps fit the hardest of them, so it changes values
            within the solver's tolerance; with a method of fixed steps, by rounding alone.
        progress: whether to show a progress bar.
        seed: of a stochastic trace's probes, unless the trace has its own; drawn from the global generator
            if None. A row's probes are a function of the seed and of the row's place in the data.
        process_group: the processes that share the batches, such as ``torch.distributed.group.WORLD``; all of
            them call this with the same arguments, and get the same result. None for this process alone.

    Returns:
        Values in nats of kind "exact" (up to the solver's tolerance) with the exact trace, "unbiased" with a
        stochastic one; then their standard errors are over probes, and NaN for a single probe.
        ``evaluations`` counts denoiser calls; each also takes as many vector-Jacobian products as the trace
        has probes (the exact one: d).

    Raises:
        ValueError: for bad data, a model with a batch shape or a context without exactly one row per datum.
    """
    model = check_model("flow", flow, ProbabilityFlow)
    check_rows("data", data, flow.event_shape)
    own = model.base.trace.seed

    def score(rows: Rows, batch: ProbabilityFlow) -> tuple[Tensor, ...]:
        density = batch.score(rows.x, rows.noise)
        evaluations = torch.tensor(density.evaluations * len(rows.x))
        value = density.value + rows.log_det
        return concatenate([value]), concatenate([density.standard_error]), evaluations

    scores = score_rows(
        score,
        model,
        model.base,
        data,
        context=context,
        batch_size=batch_size,
        progress=progress,
        seed=shared_seed(seed if own is None else own, process_group),
        process_group=process_group,
    )
    value, error, evaluations = zip(*scores, strict=True)
    return LogLikelihoodEstimate(
        value=torch.cat(value),
        standard_error=torch.cat(error),
        kind=UNBIASED if model.base.trace.stochastic else EXACT,
        evaluations=int(torch.stack(evaluations).sum()) / len(data),
        dimensions=flow.event_shape.numel(),
    )
