"""Modules that encode the data of one observed site each."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SiteEncoders", "check_encoders", "check_stored"]


class SiteEncoders(nn.Module):
    """A summary of whole data: that of every site by its encoder, or its numbers where it has none.

    Args:
        names: of the observed sites, in the order of the program.
        encoders: of some of them, by name.
    """

    sites: Tensor

    def __init__(self, names: Sequence[str], encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders.get(name, nn.Flatten()) for name in names)
        encoded = [[name, name in encoders] for name in names]
        self.register_buffer(
            "sites", torch.tensor(list(json.dumps(encoded).encode()), dtype=torch.uint8)
        )

    @staticmethod
    def stored(sites: Tensor, encoders: Collection[str]) -> list[str]:
        """The names in a state, which has encoders of the same."""
        found = json.loads(bytes(sites.tolist()).decode())
        check_stored({name for name, encoded in found if encoded}, encoders)
        return [name for name, _ in found]

    def forward(self, *data: Tensor) -> Tensor:
        """(N, features) of standardized data of every site, (N,) + its shape."""
        parts = []
        for module, x in zip(self.encoders, data, strict=True):
            parts.append(
                module(x if x.dim() > 1 or not isinstance(module, nn.Flatten) else x[:, None])
            )
        return torch.cat(parts, -1)


def check_encoders(encoders: Any, summary: nn.Module | None) -> dict[str, nn.Module]:
    """Encoders by name.

    Raises:
        ValueError: for anything but modules by name, and beside a summary of whole data.
    """
    if encoders is None:
        return {}
    if not isinstance(encoders, Mapping) or not all(
        isinstance(name, str) and isinstance(each, nn.Module) for name, each in encoders.items()
    ):
        got = encoders if isinstance(encoders, Mapping) else type(encoders).__name__
        raise ValueError(f"encoders: got {got}, expected modules by the names of observed sites")
    if encoders and summary is not None:
        raise ValueError(
            f"encoders: got {list(encoders)} beside a summary ({type(summary).__name__}), which is of whole "
            "data, expected one of the two"
        )
    return dict(encoders)


def check_stored(stored: Collection[str], encoders: Collection[str]) -> None:
    """Refuse a state whose sites with encoders are others."""
    if set(stored) != set(encoders):
        raise ValueError(
            f"encoders: got {sorted(encoders)}, expected {sorted(stored)}, as in the state that is loaded"
        )
