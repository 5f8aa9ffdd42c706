"""The evidence lower bound of held-out data, per datum and per term."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.distributions import Bound, Diffusion, DiffusionSDE
from pyro_diffusion.distributions.bounded import BoundedDistribution
from pyro_diffusion.estimate import LOWER_BOUND, LogLikelihoodEstimate, Terms, concatenate
from pyro_diffusion.evaluate.batches import shared_seed
from pyro_diffusion.evaluate.rows import Rows, check_model, check_rows, score_rows
from pyro_diffusion.processes import SeededNoise, drawing_from
from pyro_diffusion.ranks import ProcessGroup
from pyro_diffusion.schedules import uniform
from pyro_diffusion.validation import check_positive_int

__all__ = ["log_likelihood"]

# Terms per datum of a bound that is an integral over time.
NUM_TERMS = 128


def log_likelihood(
    diffusion: TorchDistribution,
    data: Tensor,
    *,
    num_terms: int | None = None,
    num_samples: int = 2,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
    progress: bool = False,
    seed: int | None = None,
    process_group: ProcessGroup | None = None,
) -> LogLikelihoodEstimate:
    r"""Lower bounds of log p(x), one per datum, with standard errors and the bound's terms.

    .. math:: -\log p(x) \le L_{prior} + L_{decoder} + \sum_{j=1}^K L_j(x), \qquad
              \sum_{j=1}^K L_j \approx \frac KM \sum_{m=0}^{M-1} L_{j_m}, \quad
              j_m = 1 + \lfloor K\,((u + m/M) \bmod 1) \rfloor, \quad u \sim U(0, 1).

    By default each of the K reverse terms L_j is estimated, from S draws of the noise. With ``num_terms``, M
    of them are instead, at evenly spaced positions along the chain that differ from datum to datum, from one
    draw each. The decoder's term is always estimated from S draws. Both estimates are unbiased.

    A :class:`~pyro_diffusion.distributions.DiffusionSDE` has no steps: its integrand is always evaluated at M
    times, and its terms are the integrals over M equal slices of time.

    Under transforms, the log-determinant of their Jacobian is in the values and in the decoder's term, which
    is then that of the data themselves.

    Args:
        diffusion: the model, a chain or an SDE, batch shape (), perhaps under Pyro's transforms; networks
            should be in ``eval()`` mode.
        data: (n,) + event.
        num_terms: number M of reverse terms evaluated per datum, >= 2; when None, all K of a chain, 128 of an
            SDE.
        num_samples: number S of noise draws per term, >= 2; with ``num_terms``, of the decoder's term only.
        context: the denoiser's context, one row per datum.
        batch_size: data evaluated together.
        progress: whether to show a progress bar.
        seed: of the noise; drawn from torch's global generator if None. A row's noise is a function of the
            seed and of the row's place, so ``batch_size`` changes values by rounding alone.
        process_group: the processes that share the batches, such as ``torch.distributed.group.WORLD``; all of
            them call this with the same arguments, and get the same result. None for this process alone.

    Returns:
        Values in nats of kind "lower bound". Their standard error is that of independent draws; evenly
        spaced ones scatter less, so with ``num_terms`` it is conservative.

    Raises:
        ValueError: for fewer than two terms or samples, bad data, a model with a batch shape or a context
            without exactly one row per datum.
    """
    check_positive_int("num_samples", num_samples, at_least=2)
    model = check_model("diffusion", diffusion, (Diffusion, DiffusionSDE, BoundedDistribution))
    view, chain = model.base, isinstance(model.base, Diffusion)
    if num_terms is None and not chain:
        num_terms = NUM_TERMS
    if num_terms is not None:
        check_positive_int("num_terms", num_terms, at_least=2)
    check_rows("data", data, diffusion.event_shape)
    seed = shared_seed(seed, process_group)
    if chain:  # a weighted objective trains; only the bound is reported
        with drawing_from(SeededNoise(seed)):
            view = view.replace(objective=Bound())
    times = view.times if chain else uniform(num_terms or NUM_TERMS)
    slices = len(times) - 1

    def score(rows: Rows, batch: BoundedDistribution) -> tuple[Tensor, ...]:
        return _score(batch, rows, slices, num_terms, num_samples)

    scores = score_rows(
        score,
        model,
        view,
        data,
        context=context,
        batch_size=batch_size,
        progress=progress,
        seed=seed,
        process_group=process_group,
    )
    value, variance, parts, tallies = zip(*scores, strict=True)
    return LogLikelihoodEstimate(
        value=torch.cat(value),
        standard_error=torch.cat(variance).sqrt(),
        kind=LOWER_BOUND,
        evaluations=num_samples + (num_samples * slices if num_terms is None else num_terms),
        dimensions=diffusion.event_shape.numel(),
        terms=_terms(
            torch.cat(parts, 1),
            torch.stack(tallies).sum(0),
            view.denoiser.process.levels(times[1:]).clock.flatten().detach().cpu(),
        ),
    )


def _score(
    model: BoundedDistribution, rows: Rows, slices: int, num_terms: int | None, num_samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounds (n,), their variances, their parts (3, n), and count, sum and square of each step's costs."""
    x = rows.x
    with drawing_from(rows.noise):
        prior = model.prior_terms(x)
        decoder = torch.stack([model.decoder_terms(x) - rows.log_det for _ in range(num_samples)])
        place, cost = _reverse_costs(model, rows, slices, num_terms, num_samples)
    if num_terms is None:  # (S, K, n): sum over steps, independent samples
        reverse = cost.mean(0).mean(0)
        reverse_variance = (cost / slices).var(0).sum(0) / num_samples
    else:  # (1, M, n)
        reverse, reverse_variance = cost[0].mean(0), cost[0].var(0) / num_terms
    value = -(prior + decoder.mean(0) + reverse)
    variance = decoder.var(0) / num_samples + reverse_variance
    parts = torch.stack([prior, decoder.mean(0), reverse])
    tally = _tally((place * slices).long(), cost / slices, slices)
    return concatenate([value]), concatenate([variance]), concatenate([parts]), tally


def _reverse_costs(
    model: BoundedDistribution, rows: Rows, slices: int, num_terms: int | None, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Positions (M, n) along the chain, and the estimates (S or 1, M, n) of the reverse term there."""
    x, n = rows.x, len(rows.x)
    if num_terms is None:  # the middle of every step
        middle = (torch.arange(slices, device=x.device) + 0.5) / slices
        place = middle.unsqueeze(-1).expand(slices, n)
    else:
        offset = torch.arange(num_terms, device=x.device).unsqueeze(-1) / num_terms
        place = (rows.noise.uniform((n,), offset) + offset) % 1
    repeats = num_samples if num_terms is None else 1
    cost = [torch.stack([model.reverse_terms(x, p) for p in place]) for _ in range(repeats)]
    return place, torch.stack(cost)


def _tally(index: Tensor, cost: Tensor, slices: int) -> Tensor:
    """How many costs each step has, their sum, and that of their squares, (3, slices)."""
    where = index.clamp(max=slices - 1).expand(cost.shape).reshape(-1).cpu()
    flat = cost.reshape(-1).to("cpu", torch.float64)
    sums = flat.new_zeros(3, slices)
    return sums.index_add_(1, where, torch.stack([torch.ones_like(flat), flat, flat.square()]))


def _terms(parts: Tensor, tally: Tensor, log_snr: Tensor) -> Terms:
    """Means over data; unvisited steps take the nearest visited neighbour's."""
    count, total, square = tally
    visited = count.nonzero().squeeze(-1)
    everywhere = torch.arange(len(count), device=count.device)
    right = torch.searchsorted(visited, everywhere).clamp(max=len(visited) - 1)
    left = (right - 1).clamp(min=0)
    to_left, to_right = ((everywhere - visited[side]).abs() for side in (left, right))
    nearest = visited[torch.where(to_left < to_right, left, right)]
    mean = total / count.clamp(min=1)
    scatter = (square / count.clamp(min=1) - mean.square()).clamp(min=0)
    error = (scatter / (count - 1).clamp(min=0)).sqrt()
    error = error.masked_fill(count < 2, torch.inf)
    prior, decoder, reverse = parts.mean(1).tolist()
    n = parts.shape[1]
    errors = ((parts.var(1) / n).sqrt() if n > 1 else torch.full((3,), torch.nan)).tolist()
    return Terms(
        prior=prior,
        decoder=decoder,
        steps=mean[nearest],
        steps_standard_error=error,
        log_snr=log_snr,
        reverse=reverse,
        prior_standard_error=errors[0],
        decoder_standard_error=errors[1],
        reverse_standard_error=errors[2],
    )
