"""Summaries of time series."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_diffusion.validation import check_number, check_operand, check_positive_int

from .definition import DefinedModule
from .embedding import fourier_embedding
from .transformer import Block

__all__ = ["SeriesEncoder"]


class SeriesEncoder(DefinedModule):
    """A summary of a time series of any length.

    Convolutions of stride 2 shorten the series, a place in time (steps since the start, as sines and cosines)
    is added, ``blocks`` of attention see all of it, and the summary is linear in the mean over time and in
    the last state. Series of one length at a time; they need not be as long as those of training, but what
    the network makes of another length is not known.

    Args:
        channels: numbers at each time.
        features: length of the summary.
        width: of the hidden layers, even and a multiple of ``heads``.
        shrinks: how often the series is halved before attention.
        blocks: layers of attention.
        heads: of attention.
        dropout: probability of zeroing a hidden unit, in training mode only.

    Shapes:
        x ``(N, T, channels)``, or ``(N, T)`` for one channel, T >= 1 -> ``(N, features)``.

    Raises:
        ValueError: for sizes that do not fit, or when called with a shape that does not.

    Example:
        >>> SeriesEncoder(2, features=8)(torch.randn(3, 50, 2)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        channels: int = 1,
        features: int = 32,
        width: int = 64,
        shrinks: int = 2,
        blocks: int = 1,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels = check_positive_int("channels", channels)
        self.features = check_positive_int("features", features)
        check_positive_int("width", width)
        check_positive_int("shrinks", shrinks, at_least=0)
        check_positive_int("blocks", blocks, at_least=0)
        check_number("dropout", dropout, at_least=0, at_most=1)
        if width % check_positive_int("heads", heads) or width % 2:
            raise ValueError(f"width: got {width}, expected an even multiple of heads={heads}")
        self.width, self.heads = width, heads
        self.first = nn.Conv1d(channels, width, 5, padding=2)
        self.shrink = nn.ModuleList(
            nn.Conv1d(width, width, 3, stride=2, padding=1) for _ in range(shrinks)
        )
        self.blocks = nn.ModuleList(Block(width, heads, dropout, False) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(2 * width, features)

    def forward(self, x: Tensor) -> Tensor:
        """The summary, see the class."""
        check_operand("x", x, self.last.weight)
        series = x.unsqueeze(-1) if x.dim() == 2 else x
        if series.dim() != 3 or series.shape[2] != self.channels or not series.shape[1]:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, T, {self.channels})")
        hidden = self.first(series.mT.to(self.last.weight.dtype))
        for layer in self.shrink:
            hidden = layer(F.silu(hidden))
        hidden = hidden.mT
        steps = torch.arange(hidden.shape[1], device=x.device).to(hidden.dtype)
        # on the scale that the embedding resolves: 1 in 200 steps, up to its bound of 20
        hidden = hidden + fourier_embedding(steps / 10, self.width).to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, None, None)
        hidden = self.norm(hidden)
        return self.last(torch.cat([hidden.mean(1), hidden[:, -1]], -1))
