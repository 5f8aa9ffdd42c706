"""Small diffusions that several test files share: one of each kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    Denoiser,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    uniform_levels,
)
from pyro_diffusion.distributions import Decoder, Diffusion, QuantizedDecoder
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, Rectified


class Tiny(nn.Module):
    """A network of a few random weights, for plumbing only."""

    def __init__(self, event_shape: tuple[int, ...], outputs: int = 1, context: bool = False):
        super().__init__()
        self.event_shape, self.outputs = event_shape, outputs
        size = math.prod(event_shape)
        self.first = nn.Linear(size + 1, 8)
        self.last = nn.Linear(8, size * outputs)
        if context:
            self.label, self.vector = nn.Embedding(3, 8), nn.Linear(2, 8)

    def forward(self, x: Tensor, log_snr: Tensor, label: Tensor = None, y: Tensor = None) -> Tensor:
        dtype = self.first.weight.dtype
        # Finite levels for certain data and pure noise.
        level = 0.1 * log_snr.clamp(-20, 20)[:, None]
        hidden = self.first(torch.cat([x.flatten(1).to(dtype), level], 1))
        if label is not None:
            hidden = hidden + self.label(label)
        if y is not None:
            hidden = hidden + self.vector(y)
        tail = () if self.outputs == 1 else (self.outputs,)
        return self.last(torch.tanh(hidden)).reshape(len(x), *self.event_shape, *tail)


def normal() -> Denoiser:
    return GaussianDenoiser(Tiny((3,), 2), GaussianProcess(Cosine()), variance=LearnedVariance())


def conditional() -> Denoiser:
    network = Tiny((3,), 2, context=True)
    return GaussianDenoiser(network, GaussianProcess(Cosine()), variance=LearnedVariance())


@dataclass(frozen=True)
class SmallDiffusion:
    """How to build a small diffusion and data for it."""

    name: str
    denoiser: Callable[[], Denoiser]
    event_shape: tuple[int, ...]
    levels: int | None = None  # of integer data
    decoder: Decoder | None = None
    context: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, denoiser: Denoiser | None = None, **arguments: object) -> Diffusion:
        arguments = {"steps": 4, "decoder": self.decoder, "context": self.context, **arguments}
        return Diffusion(denoiser or self.denoiser(), self.event_shape, **arguments)

    def data(self, batch_shape: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
        shape = (*batch_shape, *self.event_shape)
        if self.levels is None:
            return torch.randn(shape, dtype=dtype)
        return torch.randint(self.levels, shape)


SMALL_DIFFUSIONS = [
    SmallDiffusion("normal", normal, (3,)),
    SmallDiffusion("point", lambda: GaussianDenoiser(Tiny((3,)), GaussianProcess(Cosine())), (3,)),
    SmallDiffusion(
        "image",
        lambda: GaussianDenoiser(Tiny((1, 2, 2)), GaussianProcess(Cosine(), event_dim=3)),
        (1, 2, 2),
        levels=4,
        decoder=QuantizedDecoder(4),
    ),
    SmallDiffusion(
        "levels",
        lambda: LevelsDenoiser(Tiny((3,), 4), GaussianProcess(Cosine()), uniform_levels(4)),
        (3,),
        levels=4,
        decoder=QuantizedDecoder(4),
    ),
    SmallDiffusion(
        "absorbing",
        lambda: CategoricalDenoiser(Tiny((3,), 5), Absorbing(Rectified.full(), 5)),
        (3,),
        levels=5,
    ),
    SmallDiffusion(
        "uniform",
        lambda: CategoricalDenoiser(Tiny((3,), 5), Uniform(Rectified.full(), 5)),
        (3,),
        levels=5,
    ),
    SmallDiffusion("label", conditional, (3,), context={"label": torch.tensor(1)}),
    SmallDiffusion("vector", conditional, (3,), context={"y": torch.tensor([0.5, -1.0])}),
]
