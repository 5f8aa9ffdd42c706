"""The processes that share a training run: who has which rows, and what they tell each other."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyro_diffusion.processes import global_batch
from pyro_diffusion.processes.noise import fresh_seed
from pyro_diffusion.ranks import ProcessGroup, agree, default_size, place, tell

__all__ = ["Sharing"]


class Sharing:
    """A process group, or this process alone, where nothing needs to be told.

    Args:
        process_group: the processes; None for this one.

    Attributes:
        rank: of this process.
        size: number of processes.
        seed: of the noise of all steps; one for all ranks.

    Raises:
        ValueError: for anything but a group that this process is in; and for none where torch's default group
            has several processes, which would all write the same files.
    """

    def __init__(self, process_group: ProcessGroup | None) -> None:
        self.group = process_group
        self.rank, self.size = place(process_group)
        if process_group is None and default_size() > 1:
            raise ValueError(
                f"process_group: got None in a default group of {default_size()} processes, expected the "
                "group that shares the run (torch.distributed.group.WORLD), or one of this process alone"
            )
        self.seed = 0

    @property
    def first(self) -> bool:
        """Whether this process shows and writes what all of them do."""
        return self.rank == 0

    def agree(self, **numbers: int | None) -> None:
        """Refuse ranks that were called with different numbers.

        Raises:
            ValueError: on all of them, naming the first that differs.
        """
        agree(self.group, **{k: -1 if v is None else int(v) for k, v in numbers.items()})

    def agree_on(self, settings: Mapping[str, Any]) -> None:
        """The same for words and mappings.

        Raises:
            ValueError: naming the first that differs, and what this rank has.
        """
        told = [zlib.crc32(repr(value).encode()) for value in settings.values()]
        everyone = tell(told, self.group)
        for number, (name, value) in enumerate(settings.items()):
            if len({numbers[number] for numbers in everyone}) > 1:
                raise ValueError(
                    f"{name}: got {value} on rank {self.rank} and others elsewhere, expected the same on "
                    "every rank"
                )

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank."""
        return any(number for (number,) in tell([int(value)], self.group))

    def draw_seed(self) -> int:
        """From the global generator of the first rank, for all ranks."""
        return tell([fresh_seed()], self.group)[0][0]

    def wrap(self, program: nn.Module, allow_unused: bool) -> nn.Module:
        """The program with parameters of the first rank, and gradients that are means over ranks."""
        if self.group is None:
            return program
        return nn.parallel.DistributedDataParallel(
            program, process_group=self.group, find_unused_parameters=allow_unused
        )

    @contextmanager
    def part(self, module: nn.Module, rows: int, number: int, last: bool) -> Iterator[None]:
        """Around the loss of a batch, and around its gradient.

        Args:
            module: what :meth:`wrap` returned.
            rows: of this rank's batch.
            number: of the batch, in the whole run.
            last: whether its step ends with it, so that gradients have to be averaged.
        """
        if self.group is None:
            yield
            return
        assert isinstance(module, nn.parallel.DistributedDataParallel)
        averaging: AbstractContextManager[Any] = nullcontext() if last else module.no_sync()
        noise = global_batch(rows, seed=self.seed, step=number, process_group=self.group)
        with noise, averaging:
            yield

    def mean(self, count: int) -> float:
        """Over ranks."""
        return sum(map(sum, tell([count], self.group))) / self.size

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, elementwise."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def of_first(self, value: float) -> float:
        """What the first rank has."""
        bits = int(torch.tensor(value, dtype=torch.float64).view(torch.int64))
        found = tell([bits], self.group)[0][0]
        return float(torch.tensor(found, dtype=torch.int64).view(torch.float64))
