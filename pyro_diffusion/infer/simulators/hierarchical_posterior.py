"""What is learned of a program with plates of rows: an encoder of sets and a denoiser for every level."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer.simulators.conditional_posterior import (
    MakeDenoiser,
    check_denoiser,
    default_denoiser,
    flow_posterior,
    observed_diffusion,
)
from pyro_diffusion.infer.simulators.hierarchical_flow import HierarchicalFlow
from pyro_diffusion.infer.simulators.standardized import Familiar, Standardized
from pyro_diffusion.nn import ConditionalMLP, SetEncoder
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

__all__ = [
    "HierarchicalPosterior",
    "LevelSizes",
    "Rows",
    "default_row_denoiser",
    "observe_levels",
]

FEATURES = 32  # of a set
TRAINED = 4  # rows of a plate whose latents one step learns from
EMPTY = 0.05  # share of inner sets without rows, in training


class LevelSizes(NamedTuple):
    """What the networks of one level are made for.

    Attributes:
        plate: name of its innermost plate, empty of the first level.
        parent: number of the level around it, -1 of the first.
        size: rows of its plate in the simulations.
        latents: unconstrained numbers of a row.
        observed: of every observed site, numbers of a row and whether they are positive.
    """

    plate: str
    parent: int
    size: int
    latents: int
    observed: tuple[tuple[int, bool], ...]


class Rows(NamedTuple):
    """Data by level, each batch + rows of its plates.

    Attributes:
        values: of every level and observed site, + (numbers in a row,).
        present: of every level, which rows have data.
    """

    values: tuple[tuple[Tensor, ...], ...]
    present: tuple[Tensor, ...]


def default_row_denoiser(latent_size: int, features: int) -> Denoiser:
    """A smaller perceptron than that of the latents outside of plates: it is run for every row."""
    network = ConditionalMLP(latent_size, features, width=64, depth=2)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(12.0, -8.0)))


class _LevelNetworks(nn.Module):
    """Scales, encoder and denoiser of one level; ``given`` counts the features of latents around it."""

    def __init__(self, sizes: LevelSizes, inner: int, given: int, make: MakeDenoiser) -> None:
        super().__init__()
        self.observed = nn.ModuleList(Standardized((n,), log) for n, log in sizes.observed)
        # whether a row has data of its own is among its features
        self.marked = bool(sizes.plate and sizes.observed and sizes.latents)
        row = sum(n for n, _ in sizes.observed) + inner + self.marked
        self.encoder = SetEncoder(row, FEATURES) if sizes.plate else None
        if sizes.latents:
            self.latents = Standardized((sizes.latents,))
            self.denoiser = make(sizes.latents, given + row)
            check_denoiser(self.denoiser)

    @property
    def has_latents(self) -> bool:
        """Whether the level has latents of its own."""
        return "latents" in self._modules


class HierarchicalPosterior(nn.Module):
    """Scales and networks of all levels.

    Data go up: a set of rows becomes a summary, which is part of the row around it. Latents go down:
    every level's are given those around it, its row's data, and the data of the rows around it that are in no
    inner plate, which it may depend on.

    Args:
        sizes: of every level, outer ones first.
        make_denoiser: of the sizes of latents and context; None for the default.
    """

    count: Tensor
    structure: Tensor
    limits: Tensor

    def __init__(self, sizes: Sequence[LevelSizes], make_denoiser: MakeDenoiser | None) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.levels = nn.ModuleList()
        for i, each in enumerate(self.sizes):
            inner = FEATURES * sum(other.parent == i for other in self.sizes)
            given = sum(self.sizes[j].latents for j in self._around(i))
            for j in self._seen(i):
                data = sum(n for n, _ in self.sizes[j].observed)
                given += data + bool(self.sizes[j].plate)
            make = make_denoiser or (default_row_denoiser if each.plate else default_denoiser)
            self.levels.append(_LevelNetworks(each, inner, given, make))
        numbers = [sum(n for n, _ in each.observed) for each in self.sizes]
        self.familiar = Familiar(numbers[0] + 2 * sum(numbers[1:]))
        # simulations that the scales were taken from
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("structure", _encoded(self.sizes))
        # least and most rows of every plate in training
        self.register_buffer("limits", torch.tensor([[1, each.size] for each in self.sizes]))

    @staticmethod
    def stored(structure: Tensor) -> tuple[LevelSizes, ...]:
        """The sizes in a state."""
        found = json.loads(bytes(structure.tolist()).decode())
        return tuple(
            LevelSizes(
                plate, parent, size, latents, tuple((int(n), bool(log)) for n, log in observed)
            )
            for plate, parent, size, latents, observed in found
        )

    def _level(self, index: int) -> Any:
        return self.levels[index]

    def _outer(self, index: int) -> list[int]:
        """Levels around a level, outermost first."""
        found: list[int] = []
        parent = self.sizes[index].parent
        while parent >= 0:
            found.insert(0, parent)
            parent = self.sizes[parent].parent
        return found

    def _around(self, index: int) -> list[int]:
        """Levels of latents around a level, outermost first."""
        return [j for j in self._outer(index) if self.sizes[j].latents]

    def _seen(self, index: int) -> list[int]:
        """Levels with data around a level of latents, which may depend on these data, too."""
        outer = self._outer(index) if self.sizes[index].latents else []
        return [j for j in outer if self.sizes[j].observed]

    def latent_levels(self) -> list[int]:
        """Levels that have latents."""
        return [i for i, each in enumerate(self.sizes) if each.latents]

    # Scales.

    def fit_scales(self, latents: Sequence[Tensor], rows: Rows) -> None:
        """Take all scales from simulations."""
        for i, level in enumerate(self.levels):
            own: Any = level
            if own.has_latents:
                own.latents.fit(latents[i].flatten(0, -2))
            for scale, x in zip(own.observed, rows.values[i], strict=True):
                scale.fit(x.flatten(0, -2))
        self.familiar.fit(self.moments(self.thinned(rows)))
        self.count.fill_(len(rows.present[0]))

    def standardized(self, rows: Rows) -> list[list[Tensor]]:
        """Data on the scale of the simulations, zero where a row is absent."""
        return [
            [
                torch.where(here.unsqueeze(-1), scale(x), 0.0)
                for scale, x in zip(self._level(i).observed, values, strict=True)
            ]
            for i, (values, here) in enumerate(zip(rows.values, rows.present, strict=True))
        ]

    def moments(self, rows: Rows) -> Tensor:
        """What tells unlike data: those outside of plates; means, and means of squares, over all rows."""
        lead = rows.present[0].dim()
        found = []
        for values, here in zip(self.standardized(rows), rows.present, strict=True):
            for x in values:
                if x.dim() == lead + 1:
                    found.append(x)
                    continue
                count = here.flatten(lead).sum(-1, keepdim=True).clamp(min=1)
                flat = x.flatten(lead, -2)
                found += [flat.sum(-2) / count, (flat.square().sum(-2) / count).log1p()]
        return torch.cat(found, -1)

    # Training on random numbers of rows.

    def _count(self, level: int, most: int) -> int:
        """A number of rows, even in its logarithm."""
        low, high = (int(n) for n in self.limits[level])
        high = min(high, most)
        low = min(low, high)
        u = float(torch.rand(()))
        return min(high, math.floor(low * ((high + 1) / low) ** u))

    def thinned(self, rows: Rows, latents: Sequence[Tensor] = ()) -> Any:
        """Some rows of every plate, as many as is drawn; rows of inner plates vary within a batch.

        Returns:
            Rows; with ``latents`` of every level also these, of the same rows.
        """
        orders: dict[int, Tensor] = {}
        present: list[Tensor] = [rows.present[0]]
        kept: list[tuple[Tensor, ...]] = [rows.values[0]]
        lead = present[0].dim()
        left = list(latents)
        for i, each in enumerate(self.sizes[1:], start=1):
            full = rows.present[i]
            here = full.shape[-1]
            orders[i] = torch.randperm(here)[: self._count(i, here)].to(full.device)
            path = [i]
            while self.sizes[path[0]].parent > 0:
                path.insert(0, self.sizes[path[0]].parent)

            def taken(x: Tensor, path: list[int] = path) -> Tensor:
                for axis, j in enumerate(path):
                    x = x.index_select(lead + axis, orders[j])
                return x

            inside = taken(full) & present[each.parent].unsqueeze(-1)
            if len(path) > 1:
                inside = inside & self._ragged(i, inside)
            elif each.observed:
                inside = inside & (torch.rand_like(inside, dtype=torch.float) > EMPTY)
            kept.append(tuple(map(taken, rows.values[i])))
            present.append(inside)
            if left and each.latents:
                left[i] = taken(left[i])
        thin = Rows(tuple(kept), tuple(present))
        return (thin, left) if latents else thin

    def _ragged(self, level: int, inside: Tensor) -> Tensor:
        """Sets of different sizes within a batch: even in the logarithm of the size, or empty."""
        most = inside.shape[-1]
        low = min(int(self.limits[level][0]), most)
        u = torch.rand(inside.shape[:-1], device=inside.device)
        sizes = (low * ((most + 1) / low) ** u).floor()
        empty = torch.rand_like(u) < EMPTY
        sizes = torch.where(empty, 0.0, sizes) if int(self.limits[level][0]) <= 1 else sizes
        return torch.arange(most, device=inside.device) < sizes.unsqueeze(-1)

    # Summaries and posteriors.

    def contexts(self, rows: Rows) -> list[Tensor]:
        """What every level's rows are given of the data, batch + rows + (features,)."""
        own = self.standardized(rows)
        around = [torch.cat(each, -1) if each else None for each in own]
        for i, here in enumerate(rows.present):
            if self._level(i).marked:
                own[i].append(here.unsqueeze(-1).to(own[i][0].dtype))
        found: list[Tensor] = [rows.present[0].new_zeros(0)] * len(self.sizes)
        parts: list[list[Tensor]] = [list(each) for each in own]
        for i in reversed(range(len(self.sizes))):
            found[i] = torch.cat(parts[i], -1)
            if i:
                here = rows.present[i]
                flat = here.reshape(-1, here.shape[-1])
                encoded = self._level(i).encoder(
                    found[i].reshape(*flat.shape, found[i].shape[-1]), flat
                )
                # the first of a row's parts are its own sites', then those of inner plates, in order
                place = len(own[self.sizes[i].parent])
                parts[self.sizes[i].parent].insert(place, encoded.reshape(*here.shape[:-1], -1))
        return [
            torch.cat([*self._data_around(i, around, rows.present), each], -1)
            for i, each in enumerate(found)
        ]

    def _data_around(
        self, level: int, data: Sequence[Tensor | None], present: Sequence[Tensor]
    ) -> list[Tensor]:
        """Data of the rows that a level's rows are in, and in plates whether there are any."""
        rows, found = present[level].shape, []
        for j in self._seen(level):
            value: Any = data[j]
            if self.sizes[j].plate:
                value = torch.cat([value, present[j].unsqueeze(-1).to(value.dtype)], -1)
            inner = (1,) * (len(rows) - present[j].dim())
            value = value.reshape(*present[j].shape, *inner, value.shape[-1])
            found.append(value.expand(*rows, value.shape[-1]))
        return found

    def given(self, level: int, latents: Sequence[Tensor], context: Tensor) -> Tensor:
        """The context of a level's denoiser: standardized latents around it, and its rows' data."""
        rows = context.shape[:-1]
        parts = []
        for j in self._around(level):
            value = self._level(j).latents(latents[j])
            for axis in range(1, value.dim() - 1):
                value = value.narrow(axis, 0, context.shape[axis])
            value = value.reshape(
                *value.shape[:-1], *(1,) * (context.dim() - value.dim()), value.shape[-1]
            )
            parts.append(value.expand(*rows, value.shape[-1]))
        return torch.cat([*parts, context], -1)

    def flow(
        self, contexts: Sequence[Tensor], places: Sequence[Tensor], solver: ODESolver
    ) -> HierarchicalFlow:
        """The posterior of unconstrained latents in one vector, of whose places every level has its own."""

        def conditional(level: Any) -> Callable[[Tensor], Any]:
            return lambda context: flow_posterior(level.denoiser, level.latents, context, solver)

        levels = [self._level(i) for i in range(len(self.sizes))]
        return HierarchicalFlow(
            [conditional(level) if level.has_latents else None for level in levels],
            contexts,
            places,
            [[(j, levels[j].latents) for j in self._around(i)] for i in range(len(levels))],
        )

    def diffusion(self, level: int, context: Tensor, objective: Objective | None) -> Diffusion:
        """How a level's standardized latents are distributed; simulated ones are observed under it."""
        own = self._level(level)
        return observed_diffusion(own.denoiser, self.sizes[level].latents, context, objective)


def _encoded(sizes: Sequence[LevelSizes]) -> Tensor:
    """Sizes as a tensor of bytes, which every kind of checkpoint keeps."""
    return torch.tensor(
        list(json.dumps([list(each) for each in sizes]).encode()), dtype=torch.uint8
    )


def observe_levels(
    posterior: HierarchicalPosterior,
    latents: Sequence[Tensor],
    data: Rows,
    objective: Objective | None,
) -> None:
    """Observe simulated latents of every level as the posterior has them, given some of the rows.

    Rows count by their mean, so that the levels' networks learn at the same pace; each has its own optimum.
    """
    rows, some = posterior.thinned(data, latents)
    contexts = posterior.contexts(rows)
    simulations = pyro.plate("simulations", len(data.present[0]), dim=-2)
    for level in posterior.latent_levels():
        context, value = contexts[level], some[level]
        for axis in range(1, context.dim() - 1):
            kept = min(TRAINED, context.shape[axis])
            context, value = context.narrow(axis, 0, kept), value.narrow(axis, 0, kept)
        given = posterior.given(level, some, context)
        given = given.reshape(len(given), -1, given.shape[-1])
        count = given.shape[1]
        diffusion = posterior.diffusion(level, given, objective)
        value = posterior.levels[level].latents(value)  # type: ignore[operator]
        name = posterior.sizes[level].plate
        with simulations, pyro.plate(f"rows_{name}", count, dim=-1), poutine.scale(scale=1 / count):
            pyro.sample(f"latents_{name}", diffusion, obs=value.reshape(len(given), count, -1))
