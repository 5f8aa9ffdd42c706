"""Several processes at work on one set of rows: which rank this is, and what the ranks tell each other."""

from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

__all__ = [
    "ProcessGroup",
    "agree",
    "agree_on_values",
    "default_rank",
    "default_size",
    "gather",
    "place",
    "tell",
]

# `torch.distributed.ProcessGroup`, which a torch built without it does not have.
ProcessGroup = Any


def default_rank() -> int:
    """This process's rank in torch's default group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def default_size() -> int:
    """Number of processes in torch's default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place(process_group: ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in a group and the group's size; (0, 1) for None, this process alone.

    Raises:
        ValueError: for anything but a group that this process is in.
    """
    if process_group is None:
        return 0, 1
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        kind = type(process_group).__name__
        raise ValueError(
            f"process_group: got {kind}, expected a torch.distributed group that this process is in, such as "
            "torch.distributed.group.WORLD, or None"
        )
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def tell(numbers: list[int], process_group: ProcessGroup | None) -> list[list[int]]:
    """What every rank says, rank by rank: as many integers (of at most 63 bits) each."""
    size = place(process_group)[1]
    if size == 1:
        return [numbers]
    own = torch.tensor(numbers, dtype=torch.int64, device=_device(process_group))
    everyone = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(everyone, own, group=process_group)
    return torch.stack(everyone).tolist()


def agree(process_group: ProcessGroup | None, **numbers: int) -> None:
    """Refuse ranks that were called with different arguments, on all of them.

    Raises:
        ValueError: naming the first argument that differs, and what each rank was given.
    """
    everyone = tell(list(numbers.values()), process_group)
    for name, given in zip(numbers, zip(*everyone, strict=True), strict=True):
        if len(set(given)) > 1:
            raise ValueError(
                f"{name}: got {list(given)} on ranks 0 to {len(given) - 1}, expected the same on every rank"
            )


def agree_on_values(tensors: dict[str, Tensor], process_group: ProcessGroup | None) -> None:
    """Refuse ranks that were called with other tensors (of other checksums), on all of them.

    Raises:
        ValueError: naming the first that differs, and on which ranks.
    """
    if process_group is None:
        return
    names = sorted(tensors)
    everyone = tell([_checksum(tensors[name]) for name in names], process_group)
    for name, found in zip(names, zip(*everyone, strict=True), strict=True):
        others = [rank for rank, number in enumerate(found) if number != found[0]]
        if others:
            raise ValueError(
                f"{name}: got other values on rank(s) {others} than on rank 0, expected the same on every "
                "rank (each takes its share of them itself)"
            )


def _checksum(x: Tensor) -> int:
    """Bits of a weighted sum: alike for equal tensors, and hardly ever for others."""
    flat = x.detach().double().flatten().cpu()
    weights = torch.linspace(1, 2, len(flat), dtype=torch.float64)
    return int((flat @ weights + len(flat)).view(torch.int64))


def gather(
    parts: dict[str, Tensor] | None, process_group: ProcessGroup | None
) -> dict[str, Tensor]:
    """The named tensors of all ranks, on the host of each; names are unique over the ranks.

    They travel in the safetensors format, bit by bit. None says that this rank failed.

    Raises:
        RuntimeError: if another rank failed.
    """
    rank, size = place(process_group)
    if size == 1:
        return parts or {}
    device = _device(process_group)
    # A header is never empty, so a rank without tensors has a message, too.
    message = b"" if parts is None else save({k: v.clone() for k, v in parts.items()})
    lengths = [length for (length,) in tell([len(message)], process_group)]
    if parts is None:
        return {}
    if 0 in lengths:
        raise RuntimeError(f"rank {lengths.index(0)} of {size} failed; see what it raised itself")
    merged: dict[str, Tensor] = {}
    for source, length in enumerate(lengths):
        own = source == rank
        buffer = (
            torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
            if own
            else torch.empty(length, dtype=torch.uint8, device=device)
        )
        of_all: Any = process_group
        dist.broadcast(buffer, dist.get_global_rank(of_all, source), group=process_group)
        merged |= parts if own else load(buffer.cpu().numpy().tobytes())
    return merged


def _device(process_group: Any) -> torch.device:
    """Where tensors have to be for a group to carry them: on the host, if it can."""
    devices = dist.get_backend_config(process_group)
    if "cpu" in devices:
        return torch.device("cpu")
    return torch.device(devices.split(":")[0])
