"""Networks and scales of one level of a program with plates of rows."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser
from pyro_diffusion.infer.simulators.conditional_posterior import (
    MakeDenoiser,
    check_denoiser,
    check_summary,
    encoded_size,
)
from pyro_diffusion.infer.simulators.standardized import Standardized
from pyro_diffusion.nn import ConditionalMLP, SetEncoder
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

__all__ = [
    "FEATURES",
    "LevelNetworks",
    "LevelSizes",
    "RowSite",
    "Rows",
    "default_row_denoiser",
    "row_widths",
]

FEATURES = 32  # of a set


class RowSite(NamedTuple):
    """An observed site of one level.

    Attributes:
        name: the site's.
        shape: of one row's value.
        positive: whether it is positive.
        encoded: whether a module encodes it.
    """

    name: str
    shape: tuple[int, ...]
    positive: bool
    encoded: bool

    @property
    def size(self) -> int:
        """Numbers of a row."""
        return math.prod(self.shape)


class LevelSizes(NamedTuple):
    """What the networks of one level are made for.

    Attributes:
        plate: name of its innermost plate, empty of the first level.
        parent: number of the level around it, -1 of the first.
        size: rows of its plate in the simulations.
        latents: unconstrained numbers of a row.
        observed: the observed sites.
    """

    plate: str
    parent: int
    size: int
    latents: int
    observed: tuple[RowSite, ...]

    @property
    def marked(self) -> bool:
        """Whether a row says if it has data of its own."""
        return bool(self.plate and self.observed and self.latents)


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


class LevelNetworks(nn.Module):
    """Scales, encoders and denoiser of one level.

    Args:
        sizes: what they are made for.
        encoders: modules of the observed sites that have one, by name.
        row: numbers of one of its rows, those of sets within it among them.
        pooled: features of all its rows together that each is encoded with; None where no set of them is
            encoded.
        given: features of latents and data around it.
        make: of the denoiser.
    """

    def __init__(
        self,
        sizes: LevelSizes,
        encoders: Mapping[str, nn.Module],
        row: int,
        pooled: int | None,
        given: int,
        make: MakeDenoiser,
    ) -> None:
        super().__init__()
        self.shapes = [site.shape for site in sizes.observed]
        self.observed = nn.ModuleList(
            Standardized((site.size,), site.positive) for site in sizes.observed
        )
        self.encoders = nn.ModuleList(
            encoders[site.name] if site.encoded else nn.Identity() for site in sizes.observed
        )
        self.marked = sizes.marked
        self.encoder = None if pooled is None else SetEncoder(row + pooled, FEATURES)
        if sizes.latents:
            self.latents = Standardized((sizes.latents,))
            self.denoiser = make(sizes.latents, given + row)
            check_denoiser(self.denoiser)

    @property
    def has_latents(self) -> bool:
        """Whether the level has latents of its own."""
        return "latents" in self._modules

    def standardized(self, values: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """Data on the scale of the simulations, zero where a row is absent."""
        here = present.unsqueeze(-1)
        scales = zip(self.observed, values, strict=True)
        return [torch.where(here, scale(x), 0.0) for scale, x in scales]

    def encoded(self, values: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """What encoders make of every row's standardized data, zero where a row is absent."""
        found = self.standardized(values, present)
        for k, (module, shape) in enumerate(zip(self.encoders, self.shapes, strict=True)):
            if not isinstance(module, nn.Identity):
                x = found[k]
                out = check_summary(module(x.reshape(-1, *shape)), x.shape[:-1].numel())
                out = out.reshape(*x.shape[:-1], out.shape[-1]).to(x.dtype)
                found[k] = torch.where(present.unsqueeze(-1), out, 0.0)
        return found


def row_widths(sizes: LevelSizes, encoders: Mapping[str, nn.Module]) -> list[int]:
    """Features of every observed site of a level.

    Raises:
        ValueError: for an encoder that does not return (N, features).
    """
    return [
        encoded_size(encoders[site.name], site.shape) if site.encoded else site.size
        for site in sizes.observed
    ]
