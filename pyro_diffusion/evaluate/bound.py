"""The evidence lower bound of held-out data, per datum and per term."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_diffusion.distributions import Bound, Diffusion
from pyro_diffusion.evaluate.estimate import LOWER_BOUND, Likelihood, Terms, concatenate
from pyro_diffusion.validation import check_event_shape, check_positive_int

__all__ = ["batches", "log_likelihood"]


def log_likelihood(
    diffusion: Diffusion,
    data: Tensor,
    *,
    draws: int | None = None,
    samples: int = 2,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
    progress: bool = False,
) -> Likelihood:
    r"""Lower bounds of log p(x), one per datum, with standard errors and the bound's terms.

    By default every one of the chain's K + 1 terms is estimated ``samples`` times. With ``draws``, each
    datum instead gets that many terms at evenly spaced positions :math:`(u + m/M) \bmod 1` along the chain,
    each weighted by K / M (the decoder's term is always estimated, ``samples`` times). Both are unbiased.

    Args:
        diffusion: the model, batch shape (); networks should be in ``eval()`` mode.
        data: (n,) + event.
        draws: number M of reverse steps to read per datum, >= 2; all of them when None.
        samples: noise draws per term, >= 2.
        context: the denoiser's context, one row per datum.
        batch_size: data read together.
        progress: whether to show a progress bar.

    Returns:
        Values in nats of kind "lower bound". Their standard error is that of independent draws; evenly
        spaced ones scatter less, so with ``draws`` it is conservative.

    Raises:
        ValueError: for fewer than two draws or samples, or bad data.
    """
    check_positive_int("samples", samples, at_least=2)
    if draws is not None:
        check_positive_int("draws", draws, at_least=2)
    check_event_shape("data", data, diffusion.event_shape)
    # A weighted objective trains; only the bound is reported.
    diffusion = diffusion.replace(objective=Bound())
    value, variance, tally = [], [], _Tally(diffusion)
    with torch.no_grad():
        for rows, model in batches(diffusion, data, context, batch_size, progress):
            prior = model.bound_terms(rows, model.steps + 1)
            decoder = torch.stack([model.bound_terms(rows, 0) for _ in range(samples)])
            index, cost = _step_costs(model, rows, draws, samples)
            tally.add(prior, decoder, index, cost)
            if draws is None:  # (samples, K, n): sum over steps, independent samples
                steps = cost.mean(0).sum(0)
                step_variance = cost.var(0).sum(0) / samples
            else:  # (1, M, n)
                steps = model.steps * cost[0].mean(0)
                step_variance = model.steps**2 * cost[0].var(0) / draws
            value.append(-(prior + decoder.mean(0) + steps))
            variance.append(decoder.var(0) / samples + step_variance)
    evaluations = samples + (samples * diffusion.steps if draws is None else draws)
    return Likelihood(
        value=concatenate(value),
        standard_error=concatenate(variance).sqrt(),
        kind=LOWER_BOUND,
        evaluations=evaluations,
        dimensions=diffusion.event_shape.numel(),
        terms=tally.terms(),
    )


def batches(
    diffusion: Diffusion,
    data: Tensor,
    context: dict[str, Tensor] | None,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Tensor, Diffusion]]:
    """Rows of data with the model conditioned on their rows of the context."""
    check_positive_int("batch_size", batch_size)
    starts = range(0, len(data), batch_size)
    for start in tqdm(starts, desc="scoring", disable=not progress):
        rows = slice(start, start + batch_size)
        yield data[rows], diffusion.condition(**{k: v[rows] for k, v in (context or {}).items()})


def _step_costs(
    model: Diffusion, rows: Tensor, draws: int | None, samples: int
) -> tuple[Tensor, Tensor]:
    """Indices (M, n) and costs (samples or 1, M, n) of the reverse steps that are read."""
    n, steps = len(rows), model.steps
    if draws is None:
        index = torch.arange(1, steps + 1, device=rows.device).unsqueeze(-1).expand(steps, n)
    else:
        place = (
            torch.rand(n, device=rows.device)
            + torch.arange(draws, device=rows.device).unsqueeze(-1) / draws
        )
        index = 1 + (place % 1 * steps).long().clamp(max=steps - 1)
    repeats = samples if draws is None else 1
    cost = [torch.stack([model.bound_terms(rows, j) for j in index]) for _ in range(repeats)]
    return index, torch.stack(cost)


class _Tally:
    """Running sums of the bound's terms over batches."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion
        self.count, self.total, self.square = torch.zeros(3, diffusion.steps, dtype=torch.float64)
        self.prior, self.decoder, self.data = 0.0, 0.0, 0

    def add(self, prior: Tensor, decoder: Tensor, index: Tensor, cost: Tensor) -> None:
        """Take in one batch."""
        self.prior += float(prior.sum())
        self.decoder += float(decoder.mean(0).sum())
        self.data += len(prior)
        where = (index - 1).expand(cost.shape).reshape(-1).cpu()
        flat = cost.reshape(-1).to("cpu", torch.float64)
        for sums, values in (
            (self.count, torch.ones_like(flat)),
            (self.total, flat),
            (self.square, flat.square()),
        ):
            sums.index_add_(0, where, values)

    def terms(self) -> Terms:
        """Means over data; unvisited steps take the nearest visited neighbour's."""
        visited = self.count.nonzero().squeeze(-1)
        everywhere = torch.arange(len(self.count))
        right = torch.searchsorted(visited, everywhere).clamp(max=len(visited) - 1)
        left = (right - 1).clamp(min=0)
        to_left, to_right = ((everywhere - visited[side]).abs() for side in (left, right))
        nearest = visited[torch.where(to_left < to_right, left, right)]
        mean = self.total / self.count.clamp(min=1)
        scatter = (self.square / self.count.clamp(min=1) - mean.square()).clamp(min=0)
        error = (scatter / (self.count - 1).clamp(min=0)).sqrt()
        error = error.masked_fill(self.count < 2, torch.inf)
        schedule, times = self.diffusion.denoiser.process.schedule, self.diffusion.times[1:]
        return Terms(
            prior=self.prior / self.data,
            decoder=self.decoder / self.data,
            steps=mean[nearest],
            steps_standard_error=error,
            log_snr=schedule.log_snr(times).detach().cpu(),
        )
