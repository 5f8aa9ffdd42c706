"""Some rows of every plate of simulations, so that a guide learns of any number of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_diffusion.infer.simulators.level_networks import LevelSizes, Rows

__all__ = ["thinned"]

EMPTY = 0.05  # share of inner sets without rows


def thinned(
    sizes: Sequence[LevelSizes], rows: Rows, latents: Sequence[Tensor] = ()
) -> tuple[Rows, list[Tensor]]:
    """Some rows of every plate, as many as is drawn; rows of inner plates vary within a batch.

    Args:
        sizes: of every level.
        rows: data of whole simulations.
        latents: of every level, if any.

    Returns:
        Data and latents of the same rows.
    """
    orders: dict[int, Tensor] = {}
    present: list[Tensor] = [rows.present[0]]
    kept: list[tuple[Tensor, ...]] = [rows.values[0]]
    lead = present[0].dim()
    left = list(latents)
    for i, each in enumerate(sizes[1:], start=1):
        full = rows.present[i]
        here = full.shape[-1]
        orders[i] = torch.randperm(here)[: _count(min(each.size, here))].to(full.device)
        path = [i]
        while sizes[path[0]].parent > 0:
            path.insert(0, sizes[path[0]].parent)

        def taken(x: Tensor, path: list[int] = path) -> Tensor:
            for axis, j in enumerate(path):
                x = x.index_select(lead + axis, orders[j])
            return x

        inside = taken(full) & present[each.parent].unsqueeze(-1)
        if len(path) > 1:
            inside = inside & _ragged(inside)
        elif each.observed:
            inside = inside & (torch.rand_like(inside, dtype=torch.float) > EMPTY)
        kept.append(tuple(map(taken, rows.values[i])))
        present.append(inside)
        if left and each.latents:
            left[i] = taken(left[i])
    return Rows(tuple(kept), tuple(present)), left


def _count(most: int) -> int:
    """A number of rows from 1 to most, even in its logarithm."""
    return min(most, math.floor((most + 1) ** float(torch.rand(()))))


def _ragged(inside: Tensor) -> Tensor:
    """Sets of different sizes within a batch: full, even in the logarithm of the size, or empty.

    The share of full ones is any, from one simulation to the next: sets of many rows, and of the same number,
    are what guides are asked about most, and were rare if all sizes were drawn.
    """
    most = inside.shape[-1]
    u = torch.rand(inside.shape[:-1], device=inside.device)
    sizes = ((most + 1.0) ** u).floor()
    share = torch.rand_like(u[(slice(None), *(slice(0, 1),) * (u.dim() - 1))])
    sizes = torch.where(torch.rand_like(u) < share, float(most), sizes)
    sizes = torch.where(torch.rand_like(u) < EMPTY, 0.0, sizes)
    return torch.arange(most, device=inside.device) < sizes.unsqueeze(-1)
