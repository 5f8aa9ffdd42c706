"""A small U-Net for images."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_diffusion.validation import check_each_size, check_number, check_positive_int

from .context import Conditioning
from .definition import DefinedModule
from .images import check_images


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _zero(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, modulated between by the embedding."""

    def __init__(self, before: int, after: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = _norm(before)
        self.conv_in = nn.Conv2d(before, after, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * after)
        self.norm_out = _norm(after)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = _zero(nn.Conv2d(after, after, 3, padding=1))
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        hidden = torch.addcmul(shift, self.norm_out(hidden), 1 + scale)
        return self.shortcut(x) + self.conv_out(self.dropout(F.silu(hidden)))


class _Attention(nn.Module):
    """Self-attention over the pixels, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 32))
        self.norm = _norm(channels)
        self.project_in = nn.Conv2d(channels, 3 * channels, 1)
        self.project_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        joint = self.project_in(self.norm(x)).flatten(2)
        joint = joint.unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        query, key, value = joint.unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.project_out(mixed.transpose(-1, -2).reshape(x.shape))


class _Level(nn.Module):
    """The blocks at one resolution."""

    def __init__(
        self, widths: Sequence[tuple[int, int]], embedding: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _ResidualBlock(before, after, embedding, dropout) for before, after in widths
        )
        self.attentions = nn.ModuleList(
            _Attention(after) if attention else nn.Identity() for _, after in widths
        )

    def down(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x, condition))
            skips.append(x)
        return x

    def up(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(torch.cat([x, skips.pop()], dim=1), condition))
        return x


class UNet(DefinedModule):
    """A convolutional network on images that works at several resolutions.

    Residual blocks (group norm, SiLU, 3x3 convolution) whose second norm is scaled and shifted by
    the embedding of noise level and context; a convolution of stride 2 between levels on the way
    down, nearest-neighbour up-sampling and a convolution on the way up; the output of each block on
    the way down is concatenated to the input of its counterpart on the way up. The last layer of
    the network starts at zero, so a fresh network returns zeros.

    Args:
        channels: channels C of an image.
        width: channels of the first level.
        levels: multiples of ``width``, one for each resolution from fine to coarse.
        blocks: residual blocks at each level, each way.
        attention: whether pixels attend to each other at the coarsest level; or the numbers of the levels
            where they do, 0 for the finest. In the middle they do if they do anywhere. Its cost grows
            with the square of the number of pixels at the level.
        outputs: numbers returned for each pixel and channel.
        dropout: probability of zeroing a hidden unit, in training mode only.
        context: named context modules, each a :class:`LabelContext` or :class:`TensorContext`; their
            embeddings are added to that of the noise level.

    Shapes:
        x ``(N, C, H, W)``, log_snr ``(N,)`` -> ``(N, C, H, W)``, or ``(N, C, H, W, outputs)`` if
        ``outputs > 1``. H and W are multiples of ``2 ** (len(levels) - 1)``; pad other images.

    Raises:
        ValueError: for sizes below 1, levels of attention that do not exist, or when called with a shape
            that does not fit; the error names sizes that do.

    References:
        Ronneberger et al. 2015, U-Net; Ho et al. 2020, Denoising Diffusion Probabilistic Models,
        appendix B; Perez et al. 2018, FiLM.

    Example:
        >>> network = UNet(1, width=16)
        >>> network(torch.zeros(3, 1, 8, 8), torch.zeros(3)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        width: int = 32,
        levels: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: bool | Sequence[int] = True,
        outputs: int = 1,
        dropout: float = 0.0,
        context: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "width": width, "blocks": blocks, "outputs": outputs}
        for name, size in sizes.items():
            check_positive_int(name, size)
        check_number("dropout", dropout, at_least=0, at_most=1)
        if not check_each_size("levels", levels):
            raise ValueError(f"levels: got {levels}, expected at least one positive multiple")
        attending = _attending(attention, len(levels))
        self.channels, self.width, self.outputs = channels, width, outputs
        self.levels, self.attention = tuple(levels), attending
        self.factor = 2 ** (len(levels) - 1)
        embedding = 4 * width
        self.conditioning = Conditioning(embedding, context)
        self.first = nn.Conv2d(channels, width, 3, padding=1)

        widths = [width * level for level in levels]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for index, (before, here) in enumerate(pairwise([width, *widths])):
            focus = index in attending
            ladder = [(before, here)] + [(here, here)] * (blocks - 1)
            self.down.append(_Level(ladder, embedding, dropout, focus))
            # on the way up a level receives its own width from below and one skip a block
            self.up.append(_Level([(2 * here, here)] * blocks, embedding, dropout, focus))
        self.shrink = nn.ModuleList(
            nn.Conv2d(here, here, 3, stride=2, padding=1) for here in widths[:-1]
        )
        self.grow = nn.ModuleList(
            nn.Conv2d(below, here, 3, padding=1) for here, below in pairwise(widths)
        )
        self.middle = _Level([(widths[-1], widths[-1])], embedding, dropout, bool(attending))
        self.norm = _norm(width * levels[0])
        self.last = _zero(nn.Conv2d(width * levels[0], channels * outputs, 3, padding=1))

    def forward(self, x: Tensor, log_snr: Tensor, **context: Tensor | None) -> Tensor:
        """Applies the network, see the class."""
        check_images(x, self.channels, self.factor, self.last.weight)
        condition = self.conditioning(log_snr, x.shape[0], context)
        skips: list[Tensor] = []
        hidden = self.first(x.to(self.first.weight.dtype))
        for index, level in enumerate(self.down):
            if index:
                hidden = self.shrink[index - 1](hidden)
            hidden = level.down(hidden, condition, skips)  # type: ignore[operator]
        hidden = self.middle.down(hidden, condition, [])
        for index in reversed(range(len(self.up))):
            hidden = self.up[index].up(hidden, condition, skips)  # type: ignore[operator]
            if index:
                hidden = self.grow[index - 1](F.interpolate(hidden, scale_factor=2.0))
        out = self.last(F.silu(self.norm(hidden)))
        if self.outputs == 1:
            return out
        return out.unflatten(1, (self.channels, self.outputs)).movedim(2, -1)


def _attending(attention: bool | Sequence[int], levels: int) -> tuple[int, ...]:
    """The levels at which pixels attend to each other."""
    if isinstance(attention, bool):
        return (levels - 1,) if attention else ()
    numbers = isinstance(attention, list | tuple) and all(
        isinstance(each, int) and not isinstance(each, bool) and 0 <= each < levels
        for each in attention
    )
    if not numbers:
        raise ValueError(
            f"attention: got {attention!r}, expected True, False or levels from 0 to {levels - 1}"
        )
    return tuple(sorted(set(attention)))
