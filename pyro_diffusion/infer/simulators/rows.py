"""Between a program's sites and the levels of its plates: data, masks, places in a vector."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pyro_diffusion.infer.simulators.level_networks import LevelSizes, Rows, RowSite
from pyro_diffusion.infer.simulators.plates import Level, in_rows
from pyro_diffusion.infer.simulators.simulations import SimulatedSite, Simulator
from pyro_diffusion.likelihoods.run import Message
from pyro_diffusion.unreliable import warn_unreliable

__all__ = [
    "check_sizes_seen",
    "data_rows",
    "expected_shape",
    "latent_places",
    "latent_rows",
    "level_sizes",
    "without_masked",
]

Shapes = Mapping[str, Size]
Levels = Sequence[Level]


def _free_event_dim(site: Any, free: Size) -> int:
    """Dimensions of the event of an unconstrained value."""
    return int(site["fn"].event_dim) + len(free) - site["value"].dim()


def latent_places(levels: Levels, trace: Any, shapes: Shapes) -> list[Tensor]:
    """Of every level, where its rows' latents are in the packed vector, rows + (latents,)."""
    found: dict[str, Tensor] = {}
    start = 0
    for name, _site in trace.iter_stochastic_nodes():
        size = shapes[name].numel()
        found[name] = torch.arange(start, start + size).reshape(shapes[name])
        start += size
    return [
        torch.cat(
            [
                in_rows(found[n], _free_event_dim(trace.nodes[n], shapes[n]), level.dims, 0)
                for n in level.latents
            ]
            or [torch.zeros(0, dtype=torch.long)],  # of no level's rows
            -1,
        )
        for level in levels
    ]


def latent_rows(packed: Tensor, places: list[Tensor]) -> list[Tensor]:
    """Of every level, batch + rows + (latents,), of packed unconstrained latents."""
    return [packed[..., place] for place in places]


def data_rows(
    simulator: Simulator,
    levels: Levels,
    values: Mapping[str, Tensor],
    masks: Mapping[str, Any],
    batch: Size,
) -> Rows:
    """Data by level, and which rows of every plate have any.

    Raises:
        ValueError: for masks that leave out part of a row, or differ within it.
    """
    found: list[tuple[Tensor, ...]] = []
    present: list[Tensor] = []
    for level in levels:
        own, here = [], None
        for name in level.observed:
            site, value = simulator.observed[name], values[name]
            own.append(in_rows(value, site.event_dim, level.dims, len(batch)))
            mask = torch.as_tensor(True if masks.get(name) is None else masks[name])
            shape = value.shape[: value.dim() - site.event_dim]
            each = in_rows(mask.to(value.device).expand(shape), 0, level.dims, len(batch))
            one = each.all(-1)
            if not torch.equal(one, each.any(-1)) or (
                here is not None and not torch.equal(one, here)
            ):
                raise ValueError(
                    f"site {name!r}: got a mask that leaves out part of a row, expected one for all data "
                    f"of a row of {level.plates or 'the program'}"
                )
            here = one
        if not level.dims and here is not None and not bool(here.all()):
            raise ValueError(
                f"site {level.observed[0]!r}: got a mask, expected data outside of plates"
            )
        if here is None:
            rows = _rows_of(simulator, levels, values, level, batch)
            here = torch.ones(rows, dtype=torch.bool, device=next(iter(values.values())).device)
        elif level.dims:
            outer = present[level.parent].unsqueeze(-1)
            if bool((here & ~outer).any()):
                raise ValueError(
                    f"site {level.observed[0]!r}: got data in rows of {level.plates[:-1]} that a mask "
                    "left out, expected them to be left out, too"
                )
        found.append(tuple(own))
        present.append(here)
    return Rows(tuple(found), tuple(present))


def _rows_of(
    simulator: Simulator, levels: Levels, values: Mapping[str, Tensor], level: Level, batch: Size
) -> Size:
    """Batch and rows of a level without data of its own: those of data in plates within."""
    if not level.dims:
        return batch
    inner = next(
        other
        for other in levels
        if other.observed and other.plates[: len(level.plates)] == level.plates
    )
    name = inner.observed[0]
    event = simulator.observed[name].event_dim
    shape = in_rows(values[name], event, inner.dims, len(batch)).shape
    return shape[: len(batch) + len(level.dims)]


def level_sizes(
    simulator: Simulator,
    levels: Levels,
    rows: Rows,
    places: list[Tensor],
    encoded: Collection[str],
) -> tuple[LevelSizes, ...]:
    """What networks are to be made for, from the shapes of simulations."""
    return tuple(
        LevelSizes(
            level.plates[-1] if level.plates else "",
            level.parent,
            here.shape[-1] if level.plates else 1,
            place.shape[-1] if level.latents else 0,
            tuple(
                _row_site(n, simulator.observed[n], level.dims, n in encoded)
                for n in level.observed
            ),
        )
        for level, here, place in zip(levels, rows.present, places, strict=True)
    )


def _row_site(name: str, site: SimulatedSite, dims: tuple[int, ...], encoded: bool) -> RowSite:
    """A site with the shape of its values in one row of plates of these dimensions."""
    taken = {len(site.shape) - site.event_dim + dim for dim in dims}
    shape = tuple(n for i, n in enumerate(site.shape) if i not in taken)
    return RowSite(name, shape, site.positive, encoded)


def expected_shape(site: SimulatedSite, levels: Levels, node: Message) -> Size:
    """The shape of a site's value with as many rows as the plates of this run have."""
    sets = {n: d for level in levels for n, d in zip(level.plates, level.dims, strict=True)}
    shape = list(site.shape)
    for frame in node["cond_indep_stack"]:
        if frame.name in sets and frame.dim == sets[frame.name]:
            shape[len(shape) - site.event_dim + frame.dim] = frame.size
    return Size(shape)


def without_masked(value: Tensor, mask: Any, event_dim: int) -> Tensor:
    """A value whose masked parts, which may be anything, are ones."""
    if mask is None or mask is True:
        return value
    kept = torch.as_tensor(mask, device=value.device)
    kept = kept.reshape(kept.shape + (1,) * event_dim)
    return torch.where(kept, value, torch.ones_like(value))


def check_sizes_seen(sizes: tuple[LevelSizes, ...], present: tuple[Tensor, ...]) -> None:
    """Warn of more rows than in training."""
    for each, here in zip(sizes, present, strict=True):
        if not each.plate:
            continue
        most = int(here.sum(-1).max()) if here.numel() else 0
        if most > each.size:
            warn_unreliable(
                f"plate {each.plate!r}: got {most} rows, expected at most {each.size}, as in the "
                "simulations: the posterior is extrapolated there"
            )
