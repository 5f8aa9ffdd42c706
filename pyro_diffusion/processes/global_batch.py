"""Noise of a training step whose batch is spread over several processes."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.processes.noise import (
    NoiseSource,
    SeededNoise,
    ambient_noise,
    drawing_from,
    keyed,
)
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.ranks import ProcessGroup, default_rank, default_size, place, tell
from pyro_diffusion.validation import Shape, check_positive_int, check_seed

__all__ = ["BatchNoise", "Shard", "current_shard", "global_batch", "scoring_noise", "scoring_rows"]


@dataclass(frozen=True)
class Shard:
    """Which rows of a batch this process has: ``start`` to ``start + rows``, of ``size``."""

    rows: int
    start: int
    size: int

    def spans(self, batch: torch.Size) -> bool:
        """Whether the last dimension of a batch shape is that of the rows."""
        return len(batch) > 0 and batch[-1] == self.rows

    def index(self, batch: torch.Size, device: torch.device) -> Tensor:
        """Numbers of this process's elements among those of the whole batch, of a batch shape."""
        lead = torch.arange(math.prod(batch[:-1]), device=device).reshape(*batch[:-1], 1)
        return lead * self.size + self.start + torch.arange(self.rows, device=device)


@contextlib.contextmanager
def global_batch(
    rows: int, *, seed: int, step: int = 0, process_group: ProcessGroup | None = None
) -> Iterator[None]:
    r"""A training step on a batch that several processes share: one stratified set of times, noise by row.

    With :math:`B_r` rows on rank r and B of them in all, row i of rank r is row
    :math:`b = B_0 + \dots + B_{r-1} + i` of the whole batch. A distribution that is built inside, and whose
    last batch dimension is these rows, scores it at the position :math:`(u + b/B) \bmod 1` with one u for all
    ranks, and by noise that is a function of ``seed``, ``step`` and b. So ranks never share noise, the
    positions of all of them are one low-discrepancy set, and the sum of their losses is, up to rounding, that
    of one process with the whole batch, however it is divided.

    Everything else is drawn rank by rank: scores of other batch shapes, Pyro's sample sites, dropout. For
    that torch's global generators (those of the host and of the current CUDA device) are seeded from
    ``seed``, ``step`` and the rank, and put back on leaving, so that ranks which shuffled alike still do.
    Nothing needs to be saved for a run to resume exactly but the number of the step.

    The ranks tell each other the number of their rows on entering: one collective of three integers.

    Args:
        rows: how many this process has, >= 1; ranks may differ.
        seed: of the run, the same on all ranks.
        step: number of the step, the same on all ranks.
        process_group: the processes that share the batch, such as ``torch.distributed.group.WORLD`` (which
            is None before ``init_process_group``) or the data-parallel group of a mesh; None for this
            process alone.

    Raises:
        ValueError: on all ranks, for one without rows and for seeds or steps that differ; and for no group
            where torch's default group has several processes, which would then share their noise.

    Example:
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.distributions import Diffusion
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
        >>> x = torch.zeros(4, 2)
        >>> with global_batch(len(x), seed=0, step=7):
        ...     first = Diffusion(denoiser, (2,), steps=50).log_prob(x)
        >>> with global_batch(len(x), seed=0, step=7):
        ...     again = Diffusion(denoiser, (2,), steps=50).log_prob(x)
        >>> first.equal(again)
        True

    References:
        Kingma et al., arXiv 2107.00630, appendix I.1 (low-discrepancy times).
    """
    check_positive_int("rows", rows, at_least=0)
    check_seed("seed", seed)
    check_positive_int("step", step, at_least=0)
    rank, size = place(process_group)
    if process_group is None and default_size() > 1:
        raise ValueError(
            f"process_group: got None in a default group of {default_size()} processes, which would share "
            "their noise, expected the group that shares the batch (torch.distributed.group.WORLD)"
        )
    counts, *same = zip(*tell([rows, seed, step], process_group), strict=True)
    for name, given in zip(("seed", "step"), same, strict=True):
        if len(set(given)) > 1:
            raise ValueError(f"{name}: got {list(given)} on {size} ranks, expected one for all")
    if min(counts) < 1:
        raise ValueError(f"rows: got {list(counts)} on {size} ranks, expected at least one on each")
    starts = list(itertools.accumulate(counts, initial=0))
    noise = BatchNoise(keyed(seed, step), Shard(rows, starts[rank], starts[-1]))
    # Not by the seed of `noise.own`, whose numbers are those of a global generator of that seed.
    with _seeded_generators(noise.own.fresh_seed()), drawing_from(noise):
        yield


class BatchNoise(NoiseSource):
    """This process's noise in a step: seeds of distributions are the same on all ranks, draws its own.

    Args:
        seed: of the step, the same on all ranks.
        shard: the rows that this process has.
    """

    def __init__(self, seed: int, shard: Shard) -> None:
        super().__init__(seed)
        self.shard = shard
        self.own = SeededNoise(_of_rank(seed, shard.start))

    def normal(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Standard normal numbers of this process's own; rows play no part."""
        return self.own.normal(shape, like, event_dim)

    def uniform(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Numbers from 0 to below 1 of this process's own; rows play no part."""
        return self.own.uniform(shape, like, event_dim)

    def joint_seed(self) -> int:
        """A seed for draws of this process's rows together: unlike those of distributions, its own."""
        return self.own.joint_seed()

    def _other(
        self, distribution: TorchDistribution, base: object, sample_shape: torch.Size
    ) -> Tensor:
        return self.own.draw(distribution, sample_shape)


def current_shard() -> Shard | None:
    """The rows of the step that this thread is in; None outside of :func:`global_batch`."""
    return getattr(ambient_noise(), "shard", None)


def scoring_noise(
    seed: int, shard: Shard | None, batch: torch.Size, device: torch.device
) -> NoiseSource:
    """What a distribution of this seed, built in a step or outside, scores a batch with.

    Outside of a step, processes of torch's default group have noise of their own.

    Args:
        seed: of the distribution.
        shard: the step's rows.
        batch: batch shape of the data.
        device: of the draws.
    """
    if shard is not None and shard.spans(batch):
        return RowNoise(seed, shard.start + torch.arange(shard.rows, device=device))
    return SeededNoise(_own_seed(seed, shard))


def scoring_rows(
    seed: int, shard: Shard | None, batch: torch.Size, device: torch.device
) -> tuple[int, Tensor]:
    """The same where noise is keyed by row in any case: a seed, and a name for each datum of the batch."""
    if shard is not None and shard.spans(batch):
        return seed, shard.index(batch, device).flatten()
    return _own_seed(seed, shard), torch.arange(math.prod(batch), device=device)


def _own_seed(seed: int, shard: Shard | None) -> int:
    if shard is not None:
        return _of_rank(seed, shard.start)
    rank = default_rank()
    return _of_rank(seed, rank) if rank else seed


def _of_rank(seed: int, place: int) -> int:
    # Not the keys of `fresh_seed`, which count from 1.
    return keyed(seed, -1 - place)


@contextlib.contextmanager
def _seeded_generators(seed: int) -> Iterator[None]:
    """Seed torch's global generators, of the host and the current CUDA device, and put them back after."""
    cuda = torch.cuda.is_initialized()
    devices = [torch.cuda.current_device()] if cuda else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield
