"""What is learned of a program with plates of rows: an encoder of sets and a denoiser for every level."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer.simulators.conditional_posterior import (
    MakeDenoiser,
    default_denoiser,
    flow_posterior,
    observed_diffusion,
)
from pyro_diffusion.infer.simulators.hierarchical_flow import HierarchicalFlow
from pyro_diffusion.infer.simulators.level_columns import LevelColumns
from pyro_diffusion.infer.simulators.level_networks import (
    LevelNetworks,
    LevelSizes,
    Rows,
    RowSite,
    default_row_denoiser,
)
from pyro_diffusion.infer.simulators.linear_regression import LinearlyRegressed, regressed
from pyro_diffusion.infer.simulators.moments import Moments
from pyro_diffusion.infer.simulators.standardized import Familiar, shuffled
from pyro_diffusion.infer.simulators.thinned_rows import thinned
from pyro_diffusion.nn.regressions import between, regressions, residual_means

__all__ = ["HierarchicalPosterior", "observe_levels"]

TRAINED = 4  # rows of a plate whose latents one step learns from
REGRESSED, PARTS = 20_000, 64  # simulations in regressions at most; parts, of a number of rows each


class HierarchicalPosterior(nn.Module):
    """Scales and networks of all levels.

    Data go up: a set of rows becomes a summary, which is part of the row around it. Latents go down:
    every level's are given those around it, its row's data, and the data of the rows around it that are in no
    inner plate, which it may depend on. Default denoisers add to the linear regression of a row's latents on
    these and on the moments of its sets.

    Args:
        sizes: of every level, outer ones first.
        make_denoiser: of the sizes of latents and context; None for the default.
        encoders: modules of the observed sites that have one, by name.
    """

    count: Tensor
    structure: Tensor

    def __init__(
        self,
        sizes: Sequence[LevelSizes],
        make_denoiser: MakeDenoiser | None,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        known = {} if encoders is None else dict(encoders)
        self.columns = LevelColumns(self.sizes, known)
        self.levels = nn.ModuleList()
        for i, each in enumerate(self.sizes):
            given, row = self.columns.given(i), self.columns.row(i)
            make = make_denoiser or (default_row_denoiser if each.plate else default_denoiser)
            # a set is summarized for latents around it, and for nothing else
            pooled = self.columns.pooled_size(i) if self.columns.around(i) else None
            own = LevelNetworks(each, known, len(row), pooled, len(given), make)
            if make_denoiser is None and own.has_latents:
                own.denoiser = regressed(own.denoiser, each.latents, given + row)
            self.levels.append(own)
        numbers = [sum(site.size for site in each.observed) for each in self.sizes]
        self.familiar = Familiar(numbers[0] + 2 * sum(numbers[1:]))
        # simulations that the scales were taken from
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("structure", _encoded(self.sizes))

    @staticmethod
    def stored(structure: Tensor) -> tuple[LevelSizes, ...]:
        """The sizes in a state."""
        found = json.loads(bytes(structure.tolist()).decode())
        return tuple(
            LevelSizes(
                plate,
                parent,
                size,
                latents,
                tuple(RowSite(name, tuple(shape), log, own) for name, shape, log, own in observed),
            )
            for plate, parent, size, latents, observed in found
        )

    def _level(self, index: int) -> Any:
        return self.levels[index]

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
        self._fit_regressions(latents, rows)
        self.count.fill_(len(rows.present[0]))

    @torch.no_grad()
    def _fit_regressions(self, latents: Sequence[Tensor], rows: Rows) -> None:
        """Take the denoisers' linear parts from simulations with as many rows as training sees."""
        pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for part in shuffled(len(rows.present[0]))[:REGRESSED].chunk(PARTS):
            index = part.to(rows.present[0].device)
            values = tuple(tuple(x[index] for x in xs) for xs in rows.values)
            some = Rows(values, tuple(here[index] for here in rows.present))
            for level, given, value in self.examples([z[index] for z in latents], some):
                pairs.setdefault(level, []).append((value.flatten(0, 1), given.flatten(0, 1)))
        for level, found in pairs.items():
            denoiser = self._level(level).denoiser
            if isinstance(denoiser, LinearlyRegressed):
                denoiser.fit(*(torch.cat(each) for each in zip(*found, strict=True)))

    def standardized(self, rows: Rows) -> list[list[Tensor]]:
        """Data on the scale of the simulations, zero where a row is absent."""
        data = zip(rows.values, rows.present, strict=True)
        return [self._level(i).standardized(*each) for i, each in enumerate(data)]

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

    def thinned(self, rows: Rows) -> Rows:
        """As training sees data."""
        return thinned(self.sizes, rows)[0]

    # Summaries and posteriors.

    def contexts(self, rows: Rows) -> list[Tensor]:
        """What every level's rows are given of the data, batch + rows + (features,)."""
        data = zip(rows.values, rows.present, strict=True)
        own = [self._level(i).encoded(*each) for i, each in enumerate(data)]
        around = [torch.cat(each, -1) if each else None for each in own]
        for i, here in enumerate(rows.present):
            if self._level(i).marked:
                own[i].append(here.unsqueeze(-1).to(own[i][0].dtype))
        dtype = next(x.dtype for values in rows.values for x in values)
        found = [here.unsqueeze(-1)[..., :0].to(dtype) for here in rows.present]
        parts: list[list[Tensor]] = [list(each) for each in own]
        within: list[list[Moments]] = [[] for _ in self.sizes]
        for i in reversed(range(len(self.sizes))):
            if parts[i]:
                found[i] = torch.cat(parts[i], -1)
            if self.columns.around(i):
                parent, here = self.sizes[i].parent, rows.present[i]
                features = [self._set_features(i, found[i], within[i], here)]
                pooled = [m.pooled() for m in within[i]]
                data_here = around[i]
                if self.columns.regressed(i) and data_here is not None:
                    own_moments = Moments.of(data_here, here)
                    pooled.insert(0, own_moments)
                    features.append(own_moments.features())
                # the first of a row's parts are its own sites', then those of inner plates, in order
                parts[parent].insert(len(own[parent]), torch.cat(features, -1))
                within[parent] = pooled + within[parent]
        return [
            torch.cat([*self._data_around(i, around, rows.present), each], -1)
            for i, each in enumerate(found)
        ]

    def _set_features(
        self, level: int, x: Tensor, within: Sequence[Moments], present: Tensor
    ) -> Tensor:
        """Features of the sets of a level's rows, and regressions of data in plates within them.

        Those of the set itself are among its encoder's statistics. Each inner set has a mean of its own,
        about which its products are taken, and then they are summed: what sets say together of what they
        share. How their means vary once this is taken out tells of latents of the sets.
        """
        common, rows = [], [x]
        for each in within:
            pooled = each.pooled()
            common += [
                regressions(pooled.scatter, pooled.freedom),
                pooled.freedom.log1p().unsqueeze(-1),
            ]
            if each.mean is not None and each.number is not None:
                means = residual_means(each.mean, pooled.scatter, pooled.freedom)
                rows.append(means)
                common.append(between(means, each.number))
        broad = [c.unsqueeze(-2).expand(*present.shape, c.shape[-1]) for c in common]
        row = torch.cat([*rows, *broad], -1)
        flat = present.reshape(-1, present.shape[-1])
        encoded = self._level(level).encoder(row.reshape(*flat.shape, row.shape[-1]), flat)
        return torch.cat([encoded.reshape(*present.shape[:-1], -1), *common], -1)

    def _data_around(
        self, level: int, data: Sequence[Tensor | None], present: Sequence[Tensor]
    ) -> list[Tensor]:
        """Data of the rows that a level's rows are in, and in plates whether there are any."""
        rows, found = present[level].shape, []
        for j in self.columns.seen(level):
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
        for j in self.columns.around(level):
            value = self._level(j).latents(latents[j])
            for axis in range(1, value.dim() - 1):
                value = value.narrow(axis, 0, context.shape[axis])
            value = value.reshape(
                *value.shape[:-1], *(1,) * (context.dim() - value.dim()), value.shape[-1]
            )
            parts.append(value.expand(*rows, value.shape[-1]))
        return torch.cat([*parts, context], -1)

    def examples(
        self, latents: Sequence[Tensor], data: Rows
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of every level with latents, what a step learns from, given some of the rows.

        Returns:
            The level, contexts (simulations, rows, features), standardized latents (simulations, rows,
            latents); at most :data:`TRAINED` rows of a plate.
        """
        rows, some = thinned(self.sizes, data, latents)
        contexts = self.contexts(rows)
        for level in self.latent_levels():
            context, value = contexts[level], some[level]
            for axis in range(1, context.dim() - 1):
                kept = min(TRAINED, context.shape[axis])
                context, value = context.narrow(axis, 0, kept), value.narrow(axis, 0, kept)
            given = self.given(level, some, context)
            given = given.reshape(len(given), -1, given.shape[-1])
            value = self._level(level).latents(value)
            yield level, given, value.reshape(len(given), given.shape[1], -1)

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
            [[(j, levels[j].latents) for j in self.columns.around(i)] for i in range(len(levels))],
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
    simulations = pyro.plate("simulations", len(data.present[0]), dim=-2)
    for level, given, value in posterior.examples(latents, data):
        # few rows at several noise levels each: as good as more of them, and no set is encoded again
        copies = max(TRAINED // given.shape[1], 1)
        given, value = given.repeat(1, copies, 1), value.repeat(1, copies, 1)
        count = given.shape[1]
        diffusion = posterior.diffusion(level, given, objective)
        name = posterior.sizes[level].plate
        with simulations, pyro.plate(f"rows_{name}", count, dim=-1), poutine.scale(scale=1 / count):
            pyro.sample(f"latents_{name}", diffusion, obs=value)
