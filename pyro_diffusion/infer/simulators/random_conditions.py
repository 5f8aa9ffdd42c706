"""Which sites of a program are given in training, at random."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.validation import check_number

__all__ = ["check_conditions", "draw_conditioned"]

WEIGHTS = {"joint": 0.1, "posterior": 0.1, "likelihood": 0.1, "random": 0.7}


def check_conditions(conditions: Any) -> dict[str, float]:
    """Weights of the kinds of conditions, those that are not named at 0.

    Raises:
        ValueError: for other kinds, and weights that are negative or leave nothing for any program.
    """
    if conditions is None:
        return dict(WEIGHTS)
    if not isinstance(conditions, Mapping) or not set(conditions) <= set(WEIGHTS):
        raise ValueError(f"conditions: got {conditions!r}, expected weights of {list(WEIGHTS)}")
    found = {
        name: check_number(f"conditions[{name!r}]", conditions.get(name, 0.0), at_least=0)
        for name in WEIGHTS
    }
    if not found["joint"] + found["random"] > 0:
        raise ValueError(
            f"conditions: got {conditions!r}, expected a positive weight of joint or random"
        )
    return found


def draw_conditioned(
    weights: Mapping[str, float], data: Sequence[bool], rows: int, device: torch.device
) -> Tensor:
    """Which sites are given in each row, (rows, sites); never all.

    Args:
        weights: of the kinds, from :func:`check_conditions`.
        data: which sites are data. Where all are or none is, there are no posteriors and no likelihoods.
        rows: how many.
        device: of the result.
    """
    is_data = torch.tensor(data, device=device)
    mixed = any(data) and not all(data)
    share = [w if mixed or k in ("joint", "random") else 0.0 for k, w in weights.items()]
    kind = torch.multinomial(torch.tensor(share, device=device), rows, replacement=True)
    # as many rows of every number of given sites: one site is free, each other with a row's probability
    count = len(data)
    random = torch.rand(rows, count, device=device) < torch.rand(rows, 1, device=device)
    random.scatter_(1, torch.randint(count, (rows, 1), device=device), False)
    whole = {"joint": torch.zeros_like(is_data), "posterior": is_data, "likelihood": ~is_data}
    kinds = torch.stack([whole[k].expand(rows, count) if k in whole else random for k in weights])
    return kinds[kind, torch.arange(rows, device=device)]
