"""Rows in batches, on one process or shared by several, with the results of all of them in order."""

from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from pyro_diffusion.processes.noise import fresh_seed
from pyro_diffusion.ranks import ProcessGroup, agree, gather, place, tell
from pyro_diffusion.validation import check_positive_int, check_seed

__all__ = ["in_batches", "shared_seed"]

Work = Callable[[slice], tuple[Tensor, ...]]


def shared_seed(seed: int | None, process_group: ProcessGroup | None) -> int:
    """A seed that was given, the same on every rank, or else one from the first rank's global generator.

    Raises:
        ValueError: for anything but an integer from 0 to below 2**63, or for ranks that differ.
    """
    if seed is None:
        return tell([fresh_seed()], process_group)[0][0]
    agree(process_group, seed=check_seed("seed", seed))
    return seed


def in_batches(
    work: Work,
    count: int,
    batch_size: int,
    process_group: ProcessGroup | None,
    progress: bool,
    description: str,
) -> list[tuple[Tensor, ...]]:
    """What some work on consecutive rows returns, batch by batch in order, on every rank and on the host.

    Batch k, rows k * batch_size and on, is the business of rank k modulo the number of ranks. It is the same
    batch whoever does it, so results are bitwise those of one process.

    Args:
        work: takes a slice of the rows.
        count: number of rows.
        batch_size: rows worked on together.
        process_group: the processes that share the work; None for this process alone.
        progress: whether the first rank shows a progress bar.
        description: of the work, for the bar.

    Raises:
        ValueError: for a batch size below 1, and on all ranks for one that differs.
        RuntimeError: if another rank failed.
    """
    check_positive_int("batch_size", batch_size)
    rank, size = place(process_group)
    agree(process_group, rows=count, batch_size=batch_size)
    starts = range(0, count, batch_size)
    own = tqdm(range(rank, len(starts), size), desc=description, disable=not progress or rank > 0)
    parts: dict[str, Tensor] = {}
    try:
        for k in own:
            found = work(slice(starts[k], min(starts[k] + batch_size, count)))
            parts |= {f"{k}.{j}": x.detach().cpu() for j, x in enumerate(found)}
    except BaseException:
        gather(None, process_group)
        raise
    parts = gather(parts, process_group)
    fields = [[parts[f"{k}.{j}"] for j in range(_fields(parts, k))] for k in range(len(starts))]
    return [tuple(batch) for batch in fields]


def _fields(parts: dict[str, Tensor], k: int) -> int:
    return next(j for j in range(len(parts) + 1) if f"{k}.{j}" not in parts)
