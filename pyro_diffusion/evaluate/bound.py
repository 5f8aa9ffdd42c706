"""The evidence lower bound of held-out data, per datum and per term."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.distributions import Bound, BoundedDistribution, Diffusion
from pyro_diffusion.estimate import LOWER_BOUND, Likelihood, Terms, concatenate
from pyro_diffusion.evaluate.rows import Rows, batches, check_model, check_rows, checked_seed
from pyro_diffusion.processes import SeededNoise, drawing_from
from pyro_diffusion.schedules import uniform
from pyro_diffusion.validation import check_positive_int

__all__ = ["log_likelihood"]

# Reads of a datum along a path without steps.
DRAWS = 128


def log_likelihood(
    diffusion: TorchDistribution,
    data: Tensor,
    *,
    draws: int | None = None,
    samples: int = 2,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
    progress: bool = False,
    seed: int | None = None,
) -> Likelihood:
    r"""Lower bounds of log p(x), one per datum, with standard errors and the bound's terms.

    By default every one of the chain's K + 1 terms is estimated ``samples`` times. With ``draws``, each
    datum instead gets that many terms at evenly spaced positions :math:`(u + m/M) \bmod 1` along the chain,
    each weighted by K / M (the decoder's term is always estimated, ``samples`` times). Both are unbiased.

    A :class:`~pyro_diffusion.distributions.DiffusionSDE` has no steps: it is always read at M positions, and
    its terms are the integrals over M equal slices of time. Under transforms, the log-determinant of their
    Jacobian is in the values and in the decoder's term, which is then that of the data themselves.

    Args:
        diffusion: the model, a chain or an SDE, batch shape (), perhaps under Pyro's transforms; networks
            should be in ``eval()`` mode.
        data: (n,) + event.
        draws: number M of reverse reads per datum, >= 2; when None, all steps of a chain, 128 of an SDE.
        samples: noise draws per term, >= 2.
        context: the denoiser's context, one row per datum.
        batch_size: data read together.
        progress: whether to show a progress bar.
        seed: of the noise; drawn from torch's global generator if None. A row's noise is a function of the
            seed and of the row's place, so ``batch_size`` changes values by rounding alone.

    Returns:
        Values in nats of kind "lower bound". Their standard error is that of independent draws; evenly
        spaced ones scatter less, so with ``draws`` it is conservative.

    Raises:
        ValueError: for fewer than two draws or samples, bad data, a model with a batch shape or a context
            without exactly one row per datum.
    """
    check_positive_int("samples", samples, at_least=2)
    model = check_model("diffusion", diffusion, BoundedDistribution)
    view, chain = model.base, isinstance(model.base, Diffusion)
    if draws is None and not chain:
        draws = DRAWS
    if draws is not None:
        check_positive_int("draws", draws, at_least=2)
    check_rows("data", data, diffusion.event_shape)
    seed = checked_seed(seed)
    if chain:  # a weighted objective trains; only the bound is reported
        with drawing_from(SeededNoise(seed)):
            view = view.replace(objective=Bound())
    times = view.times if chain else uniform(draws or DRAWS)
    slices = len(times) - 1
    value, variance, tally = [], [], _Tally(slices)
    with torch.no_grad():
        for rows, law in batches(model, view, data, context, batch_size, progress, seed):
            x = rows.x
            with drawing_from(rows.noise):
                prior = law.prior_terms(x)
                decoder = torch.stack([law.decoder_terms(x) - rows.log_det for _ in range(samples)])
                place, cost = _reverse_costs(law, rows, slices, draws, samples)
            if draws is None:  # (samples, K, n): sum over steps, independent samples
                reverse = cost.mean(0).mean(0)
                reverse_variance = (cost / slices).var(0).sum(0) / samples
            else:  # (1, M, n)
                reverse, reverse_variance = cost[0].mean(0), cost[0].var(0) / draws
            tally.add(prior, decoder, reverse, (place * slices).long(), cost / slices)
            value.append(-(prior + decoder.mean(0) + reverse))
            variance.append(decoder.var(0) / samples + reverse_variance)
    return Likelihood(
        value=concatenate(value),
        standard_error=concatenate(variance).sqrt(),
        kind=LOWER_BOUND,
        evaluations=samples + (samples * slices if draws is None else draws),
        dimensions=diffusion.event_shape.numel(),
        terms=tally.terms(view.denoiser.process.schedule.log_snr(times[1:]).detach().cpu()),
    )


def _reverse_costs(
    model: BoundedDistribution, rows: Rows, slices: int, draws: int | None, samples: int
) -> tuple[Tensor, Tensor]:
    """Positions (M, n) that are read, and the reverse term (samples or 1, M, n) as each of them tells it."""
    x, n = rows.x, len(rows.x)
    if draws is None:  # the middle of every step
        middle = (torch.arange(slices, device=x.device) + 0.5) / slices
        place = middle.unsqueeze(-1).expand(slices, n)
    else:
        offset = torch.arange(draws, device=x.device).unsqueeze(-1) / draws
        place = (rows.noise.uniform((n,), offset) + offset) % 1
    repeats = samples if draws is None else 1
    cost = [torch.stack([model.reverse_terms(x, p) for p in place]) for _ in range(repeats)]
    return place, torch.stack(cost)


class _Tally:
    """Running sums of the bound's terms over batches."""

    def __init__(self, slices: int) -> None:
        self.count, self.total, self.square = torch.zeros(3, slices, dtype=torch.float64)
        self.parts: list[Tensor] = []

    def add(
        self, prior: Tensor, decoder: Tensor, reverse: Tensor, index: Tensor, cost: Tensor
    ) -> None:
        """Take in one batch."""
        self.parts.append(torch.stack([prior, decoder.mean(0), reverse]).to("cpu", torch.float64))
        where = index.clamp(max=len(self.count) - 1).expand(cost.shape).reshape(-1).cpu()
        flat = cost.reshape(-1).to("cpu", torch.float64)
        for sums, values in (
            (self.count, torch.ones_like(flat)),
            (self.total, flat),
            (self.square, flat.square()),
        ):
            sums.index_add_(0, where, values)

    def terms(self, log_snr: Tensor) -> Terms:
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
        parts = torch.cat(self.parts, 1)
        prior, decoder, reverse = parts.mean(1).tolist()
        count = parts.shape[1]
        several = (parts.var(1) / count).sqrt() if count > 1 else torch.full((3,), torch.nan)
        errors = several.tolist()
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
