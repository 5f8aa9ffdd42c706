"""Minibatches in an order that a checkpoint can go on with."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_diffusion.ranks import agree_on_values
from pyro_diffusion.train.randomness import rng_state, set_rng_state
from pyro_diffusion.train.sharing import Sharing
from pyro_diffusion.validation import check_positive_int, check_tensor, kind_of

__all__ = ["Arguments", "Batches", "batches_of", "in_order", "rows_of", "to_device"]

SOME = 256
EMPTY = "data: got an empty DataLoader, expected at least one batch"

# Positional and keyword arguments of one run of the program.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Batches(Protocol):
    """An endless sequence of a program's arguments.

    Attributes:
        even: whether ranks have equally many rows in each.
        settings: what is drawn from; the same for a run that goes on.
    """

    even: bool
    settings: dict[str, Any]

    def first(self) -> Arguments:
        """Some batch, which does not count."""

    def next(self) -> Arguments:
        """The next one."""

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence is."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


def batches_of(data: object, batch_size: int | None, sharing: Sharing) -> Batches:
    """Batches of a tensor, of a tuple or dictionary of tensors, of a loader, or of nothing.

    Raises:
        ValueError: naming what was found.
    """
    if data is None or isinstance(data, DataLoader):
        if batch_size is not None:
            check_positive_int("batch_size", batch_size)
            kind = "None" if data is None else "a DataLoader"
            raise ValueError(f"batch_size: got {batch_size} and {kind} as data, expected None")
        return NoBatches() if data is None else LoaderBatches(data, sharing)
    return TensorBatches(data, batch_size, sharing)


class NoBatches:
    """For programs that draw their own minibatches: no arguments."""

    even = True

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"data": None}

    def first(self) -> Arguments:
        """Nothing."""
        return (), {}

    next = first

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""


class TensorBatches:
    """Rows of tensors in random order, each once an epoch but for the last few that do not fill a batch.

    The order is drawn by a generator of its own, whose seed comes from torch's global one. Several processes
    have all data each, and take their batches from one order, side by side.
    """

    even = True

    def __init__(self, data: object, batch_size: int | None, sharing: Sharing) -> None:
        if batch_size is not None:
            check_positive_int("batch_size", batch_size)
        self.data, self.rows, refusal = data, 0, None
        try:
            self.rows = check_data("data", data)
        except ValueError as error:
            refusal = error
        # told before it is raised, or others would wait for a rank without data
        sharing.agree(rows=self.rows, batch_size=batch_size)
        if refusal is not None:
            raise refusal
        # of some rows: enough to notice that each process was given a share of its own
        some = {of: part[:SOME] for of, part in named_parts("data", data).items()}
        agree_on_values(some, sharing.group)
        most = self.rows // sharing.size
        size = most if batch_size is None else batch_size
        if not 0 < size <= most:
            of = f" for each of {sharing.size} processes" if sharing.size > 1 else ""
            raise ValueError(
                f"batch_size: got {size}, expected at most {most}, the data's rows{of}"
            )
        self.size, self.sharing = size, sharing
        self.settings = {"data": "tensors", "rows": self.rows, "batch_size": size * sharing.size}
        self.generator = torch.Generator().manual_seed(sharing.draw_seed())
        self.device = next(iter(named_parts("data", data).values())).device
        self._start()

    def _start(self) -> None:
        """Begin an epoch."""
        self.before = self.generator.get_state()
        # to the data's device once an epoch, not once a step
        order = torch.randperm(self.rows, generator=self.generator, device=self.generator.device)
        self.order = order.to(self.device)
        self.position = 0

    def first(self) -> Arguments:
        """The first rows."""
        return arguments(take(self.data, slice(0, self.size)))

    def next(self) -> Arguments:
        """The next rows of the epoch, or of a new one."""
        together = self.size * self.sharing.size
        if self.position + together > self.rows:
            self._start()
        start = self.position + self.size * self.sharing.rank
        index = self.order[start : start + self.size]
        self.position += together
        return arguments(take(self.data, index))

    def state_dict(self) -> dict[str, Any]:
        """The generator when the epoch began, and how many rows were taken since."""
        return {"generator": self.before, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw that epoch's order again and go on from the row."""
        self.generator.set_state(state["generator"])
        self._start()
        self.position = int(state["position"])


class LoaderBatches:
    """Batches of a ``DataLoader``, epoch after epoch.

    A state has the generators at the beginning of the epoch and the number of batches since: going on draws
    the same order again and skips so many.
    """

    even = False

    def __init__(self, loader: DataLoader[Any], sharing: Sharing) -> None:
        if sharing.size > 1 and not isinstance(loader.sampler, DistributedSampler):
            raise ValueError(
                f"data: got a DataLoader with a {kind_of(loader.sampler)} on {sharing.size} ranks, expected "
                "a DistributedSampler, which gives each its share, or data as tensors"
            )
        self.loader, self.epoch, self.sharing = loader, -1, sharing
        self.iterator: Iterator[Any] | None = None
        self.generators = _generators(loader)
        data: Any = loader.dataset
        size = loader.batch_size
        self.settings = {
            "data": "DataLoader",
            "rows": len(data) if hasattr(data, "__len__") else None,
            "batch_size": size and size * sharing.size,
        }

    def first(self) -> Arguments:
        """The first of an epoch that is then forgotten."""
        batch = next(iter(self.loader), None)
        if self.sharing.any(batch is None):
            raise ValueError(EMPTY + " on every rank" * (self.sharing.size > 1))
        return arguments(_checked(batch))

    def _start(self) -> None:
        self.before = {
            "global": rng_state(),
            "own": [generator.get_state() for generator in self.generators],
        }
        self.epoch += 1
        if isinstance(self.loader.sampler, DistributedSampler):
            self.loader.sampler.set_epoch(self.epoch)
        self.iterator, self.position = iter(self.loader), 0

    def next(self) -> Arguments:
        """The next batch of the epoch, or of a new one."""
        if self.iterator is None:
            self._start()
        assert self.iterator is not None
        batch = next(self.iterator, None)
        if batch is None:
            self._start()
            batch = next(self.iterator, None)
        if batch is None:
            raise ValueError(f"{EMPTY} in every epoch; is its dataset an iterator that ends?")
        self.position += 1
        return arguments(batch)

    def state_dict(self) -> dict[str, Any]:
        """The generators when the epoch began, and how many batches were taken since.

        Raises:
            ValueError: for a loader whose order cannot be drawn again.
        """
        check_repeatable(self.loader)
        return {"before": self.before, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw that epoch's order again and skip what was taken; global generators go on, too."""
        set_rng_state(state["before"]["global"])
        for generator, before in zip(self.generators, state["before"]["own"], strict=True):
            generator.set_state(before)
        self.epoch = int(state["epoch"]) - 1
        self._start()
        assert self.iterator is not None
        for _ in range(int(state["position"])):
            next(self.iterator, None)  # shorter on more processes than there were
            self.position += 1


def check_repeatable(loader: DataLoader[Any]) -> None:
    """Refuse a loader whose order cannot be drawn again from the state of generators.

    Raises:
        ValueError: naming its dataset or sampler.
    """
    known = (
        DistributedSampler,
        RandomSampler,
        SequentialSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
    )
    iterable = isinstance(loader.dataset, IterableDataset)
    odd = loader.dataset if iterable else loader.sampler
    if iterable or not isinstance(odd, known):
        raise ValueError(
            f"checkpoint: got a DataLoader with a {kind_of(odd)}, whose order cannot be repeated, expected "
            "one of torch's samplers, or data as tensors"
        )


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    found = [getattr(part, "generator", None) for part in (loader, loader.sampler)]
    return list({id(g): g for g in found if g is not None}.values())


def named_parts(name: str, data: object) -> dict[str, Any]:
    """What data consist of, by how to call it in errors."""
    if isinstance(data, Mapping):
        return {f"{name}[{key!r}]": part for key, part in data.items()}
    if isinstance(data, list | tuple):
        return {f"{name}[{index}]": part for index, part in enumerate(data)}
    return {name: data}


def check_data(name: str, data: object) -> int:
    """Refuse anything but tensors of one number of rows, and return that.

    Raises:
        ValueError: naming what was found.
    """
    lengths = {}
    for of, part in named_parts(name, data).items():
        if check_tensor(of, part, boolean=True).dim() == 0:
            raise ValueError(f"{of}: got a scalar, expected a tensor with rows")
        lengths[of] = len(part)
    if not lengths or 0 in lengths.values():
        raise ValueError(f"{name}: got no rows, expected at least one")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: got tensors of {lengths} rows, expected equally many")
    return next(iter(lengths.values()))


def take(data: Any, index: Any) -> Any:
    """The same rows of every tensor."""
    if isinstance(data, Mapping):
        return {name: part[index] for name, part in data.items()}
    if isinstance(data, list | tuple):
        return tuple(part[index] for part in data)
    return data[index]


def in_order(data: object, batch_size: int) -> Iterator[Arguments]:
    """Every row once, in batches; a loader as it is."""
    if isinstance(data, DataLoader):
        yield from map(arguments, data)
        return
    for start in range(0, check_data("data", data), batch_size):
        yield arguments(take(data, slice(start, start + batch_size)))


def arguments(batch: Any) -> Arguments:
    """A batch as the program takes it: a tuple by position, a dictionary by name."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, list | tuple) else (batch,)), {}


def _checked(batch: Any) -> Any:
    check_data("data", batch)
    return batch


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many rows a program's arguments have: those of the first tensor.

    Raises:
        ValueError: if none is a tensor with rows.
    """
    for part in (*args, *kwargs.values()):
        if isinstance(part, Tensor) and part.dim():
            return len(part)
    raise ValueError("data: got batches without a tensor, expected at least one with rows")


def to_device(batch: Arguments, device: torch.device) -> Arguments:
    """The same on a device."""
    args, kwargs = batch

    def move(part: Any) -> Any:
        return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part

    return tuple(map(move, args)), {name: move(part) for name, part in kwargs.items()}
