"""Summaries of images."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_diffusion.validation import (
    check_each_size,
    check_number,
    check_operand,
    check_positive_int,
)

from .definition import DefinedModule
from .unet import _Level, _norm

__all__ = ["ImageEncoder"]


class ImageEncoder(DefinedModule):
    """A summary of an image of any size: the way down of a :class:`UNet`, and means over what is left.

    Args:
        channels: channels C of an image.
        features: length of the summary.
        width: channels of the first level.
        levels: multiples of ``width``, one for each resolution from fine to coarse.
        blocks: residual blocks at each level.
        attention: whether pixels attend to each other at the coarsest level.
        dropout: probability of zeroing a hidden unit, in training mode only.

    Shapes:
        x ``(N, C, H, W)``, or ``(N, H, W)`` for one channel -> ``(N, features)``.

    Raises:
        ValueError: for sizes below 1, or when called with a shape that does not fit.

    Example:
        >>> ImageEncoder(1, features=8, width=8)(torch.randn(3, 9, 12)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        channels: int = 1,
        features: int = 32,
        width: int = 16,
        levels: tuple[int, ...] = (1, 2, 4),
        blocks: int = 1,
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "features": features, "width": width, "blocks": blocks}
        for name, size in sizes.items():
            check_positive_int(name, size)
        if not check_each_size("levels", levels):
            raise ValueError(f"levels: got {levels}, expected at least one positive multiple")
        check_number("dropout", dropout, at_least=0, at_most=1)
        self.channels, self.features, self.width = channels, features, width
        self.levels = tuple(levels)
        widths = [width * level for level in levels]
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level([(here, here)] * blocks, 1, dropout, attention and i == len(widths) - 1)
            for i, here in enumerate(widths)
        )
        self.shrink = nn.ModuleList(
            nn.Conv2d(above, here, 3, stride=2, padding=1)
            for above, here in itertools.pairwise(widths)
        )
        self.norm = _norm(widths[-1])
        self.last = nn.Linear(2 * widths[-1], features)

    def forward(self, x: Tensor) -> Tensor:
        """The summary, see the class."""
        check_operand("x", x, self.last.weight)
        images = x.unsqueeze(1) if x.dim() == 3 else x
        if images.dim() != 4 or images.shape[1] != self.channels or 0 in images.shape[2:]:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (N, {self.channels}, height, width)"
            )
        hidden = self.first(images.to(self.last.weight.dtype))
        # the blocks' scales and shifts, which follow the noise level in a U-Net, are constants here
        constant = hidden.new_ones(len(x), 1)
        for index, level in enumerate(self.down):
            if index:
                hidden = self.shrink[index - 1](hidden)
            hidden = level.down(hidden, constant, [])  # type: ignore[operator]
        hidden = F.silu(self.norm(hidden)).flatten(2)
        return self.last(torch.cat([hidden.mean(2), hidden.amax(2)], -1))
