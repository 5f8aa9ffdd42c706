"""Transformers on real data: images cut into patches, and sets of vectors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import check_number, check_operand, check_positive_int

from .context import Conditioning
from .definition import DefinedModule
from .embedding import check_frequencies, with_waves
from .images import check_images
from .transformer import Block

__all__ = ["DiT", "SetTransformer"]


class _TokenTransformer(DefinedModule):
    """What is between tokens of real numbers: blocks that the embedding modulates, a last layer of zeros."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float,
        context: Mapping[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        for name, size in {"width": width, "depth": depth, "heads": heads}.items():
            check_positive_int(name, size)
        check_number("dropout", dropout, at_least=0, at_most=1)
        if width % heads:
            raise ValueError(f"width: got {width}, expected a multiple of heads={heads}")
        self.width, self.depth, self.heads = width, depth, heads
        self.conditioning = Conditioning(width, context)
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, outputs)
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def transform(
        self,
        tokens: Tensor,
        log_snr: Tensor,
        context: Mapping[str, Tensor | None],
        places: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Tokens (N, L, inputs) to (N, L, outputs), with ``places`` (L, width) added if tokens have any.

        ``bias`` is added to the logits of attention, (..., L, L), if given.
        """
        condition = self.conditioning(log_snr, len(tokens), context)
        hidden = self.first(tokens.to(self.first.weight.dtype))
        if places is not None:
            hidden = hidden + places
        for block in self.blocks:
            hidden = block(hidden, condition, bias)
        scale, shift = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.last(torch.addcmul(shift, self.norm(hidden), 1 + scale))


class DiT(_TokenTransformer):
    r"""A transformer on images: patches of p by p pixels are the tokens, and all attend to each other.

    Blocks normalize first; scale, shift and gate of each are linear in the embedding of noise level and
    context, as are scale and shift of the last norm. Places are sines and cosines of the patch's row and
    column, so one network takes images of any size that p divides. The last layer starts at zero, so a fresh
    network returns zeros.

    Cost grows with the square of the number of patches: 64 for 32 by 32 pixels at p = 4.

    Args:
        channels: channels C of an image.
        patch: pixels p along an edge of a patch.
        width: features of a patch, a multiple of ``heads`` and of 4.
        depth: number of blocks.
        heads: attention heads.
        outputs: numbers returned for each pixel and channel.
        dropout: probability of zeroing a hidden unit or an attention weight, in training mode only.
        context: named context modules, each a :class:`LabelContext` or :class:`TensorContext`; their
            embeddings are added to that of the noise level.

    Shapes:
        x ``(N, C, H, W)``, log_snr ``(N,)`` -> ``(N, C, H, W)``, or ``(N, C, H, W, outputs)`` if
        ``outputs > 1``. H and W are multiples of ``patch``.

    Raises:
        ValueError: for sizes that do not fit, or when called with a shape that does not.

    References:
        Peebles and Xie 2023, Scalable Diffusion Models with Transformers (adaLN; gates start open here).

    Example:
        >>> network = DiT(1, patch=2, width=32, depth=2)
        >>> network(torch.zeros(3, 1, 8, 6), torch.zeros(3)).shape
        torch.Size([3, 1, 8, 6])
    """

    def __init__(
        self,
        channels: int,
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        outputs: int = 1,
        dropout: float = 0.0,
        context: Mapping[str, nn.Module] | None = None,
    ) -> None:
        for name, size in {"channels": channels, "patch": patch, "outputs": outputs}.items():
            check_positive_int(name, size)
        if check_positive_int("width", width) % 4:
            raise ValueError(f"width: got {width}, expected a multiple of 4")
        size = channels * patch**2
        super().__init__(size, size * outputs, width, depth, heads, dropout, context)
        self.channels, self.patch, self.outputs = channels, patch, outputs

    def forward(self, x: Tensor, log_snr: Tensor, **context: Tensor | None) -> Tensor:
        """Applies the network, see the class."""
        check_images(x, self.channels, self.patch, self.last.weight)
        rows, columns = (size // self.patch for size in x.shape[2:])
        patches = x.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))
        tokens = (
            patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        )  # (N, rows columns, C p p)
        place = _places(rows, columns, self.first.weight)
        out = self.transform(tokens, log_snr, context, place)
        # (N, rows, columns, C, p, p, outputs) back to rows of pixels
        out = out.view(-1, rows, columns, self.channels, self.patch, self.patch, self.outputs)
        out = out.permute(0, 3, 1, 4, 2, 5, 6).reshape(*x.shape, self.outputs)
        return out.squeeze(-1) if self.outputs == 1 else out


class SetTransformer(_TokenTransformer):
    r"""A transformer on sets of vectors: every element sees all others, and their order says nothing.

    For point clouds, particles, or the rows of a group; a permutation of the elements permutes the output.
    Blocks as in :class:`DiT`, without places. One network takes sets of any number L of elements. The last
    layer starts at zero, so a fresh network returns zeros.

    Args:
        event_size: length d of an element.
        width: features of an element inside, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        outputs: numbers returned for each coordinate of an element.
        dropout: probability of zeroing a hidden unit or an attention weight, in training mode only.
        context: named context modules, each a :class:`LabelContext` or :class:`TensorContext`; their
            embeddings are added to that of the noise level.
        frequencies: of the sines and cosines of every coordinate that the network sees beside it, as in
            :class:`MLP`.

    Shapes:
        x ``(N, L, d)``, log_snr ``(N,)`` -> ``(N, L, d)``, or ``(N, L, d, outputs)`` if ``outputs > 1``.

    Raises:
        ValueError: for sizes that do not fit, or when called with a shape that does not.

    References:
        Lee et al. 2019, Set Transformer (self-attention without places; without their inducing points).

    Example:
        >>> network = SetTransformer(3, width=32, depth=2)
        >>> network(torch.zeros(5, 7, 3), torch.zeros(5)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(
        self,
        event_size: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        outputs: int = 1,
        dropout: float = 0.0,
        context: Mapping[str, nn.Module] | None = None,
        *,
        frequencies: Sequence[float] = (),
    ) -> None:
        check_positive_int("event_size", event_size)
        check_positive_int("outputs", outputs)
        waves = check_frequencies(frequencies)
        inputs = event_size * (1 + 2 * len(waves))
        super().__init__(inputs, event_size * outputs, width, depth, heads, dropout, context)
        self.event_size, self.outputs, self.frequencies = event_size, outputs, waves

    def forward(self, x: Tensor, log_snr: Tensor, **context: Tensor | None) -> Tensor:
        """Applies the network, see the class."""
        if check_operand("x", x, self.last.weight).dim() != 3 or x.shape[2] != self.event_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, L, {self.event_size})")
        out = self.transform(with_waves(x, self.frequencies), log_snr, context)
        return out if self.outputs == 1 else out.view(*x.shape, self.outputs)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Sines and cosines of rows and columns, (rows columns, width), of periods 2 pi to 200 pi patches."""
    width = like.shape[0]
    exponent = torch.linspace(0, 1, width // 4, device=like.device)
    frequency = 100.0**-exponent
    row, column = (
        torch.arange(float(size), device=like.device).unsqueeze(-1) * frequency
        for size in (rows, columns)
    )
    down = torch.cat([row.sin(), row.cos()], -1).unsqueeze(1).expand(-1, columns, -1)
    across = torch.cat([column.sin(), column.cos()], -1).unsqueeze(0).expand(rows, -1, -1)
    return torch.cat([down, across], -1).flatten(0, 1).to(like.dtype)
