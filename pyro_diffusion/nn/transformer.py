"""A small transformer for sequences of symbols."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_diffusion.validation import check_number, check_operand, check_positive_int

from .context import Conditioning
from .definition import DefinedModule


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rate: float
) -> Tensor:
    """Softmax attention, (N, heads, L, features), with ``bias`` (..., L, L) added to the logits."""
    if query.device.type != "cpu" or (bias is None and query.dtype.itemsize >= 4):
        bias = bias if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=rate)
    # torch's fused kernels are several times slower than this on a CPU in half precision
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    weights = (logits if bias is None else logits + bias.to(logits.dtype)).softmax(-1)
    return F.dropout(weights, rate, rate > 0) @ value


def _kernels(bias: Tensor | None) -> AbstractContextManager[Any]:
    """On a GPU, kernels that differentiate a bias of the logits; cuDNN's, torch's first choice, do not."""
    if bias is None or bias.device.type == "cpu":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Block(nn.Module):
    """Attention and a perceptron, each normalized, modulated and gated by the embedding if there is one."""

    def __init__(self, width: int, heads: int, dropout: float, conditioned: bool) -> None:
        super().__init__()
        self.heads = heads
        self.rate = dropout
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        if not conditioned:
            return
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        # gates open: the last layer of the network is zero already, closed gates only start slower
        nn.init.ones_(self.modulation.bias.data.view(6, width)[2::3])

    def attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Attention alone, of normalized positions (N, L, width)."""
        joint = self.project_in(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = joint.transpose(1, 3).unbind(2)
        rate = self.rate if self.training else 0.0
        mixed = _attention(query, key, value, bias, rate)
        return self.project_out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor | None, bias: Tensor | None) -> Tensor:
        """Positions (N, L, width) to the same, modulated by ``condition`` (N, width) if there is one."""
        if condition is None:
            x = x + self.attend(self.norm_attention(x), bias)
            return x + self.mlp(self.norm_mlp(x))
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = (
            self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        )
        update = self.attend(torch.addcmul(shift, self.norm_attention(x), 1 + scale), bias)
        x = torch.addcmul(x, gate, update)
        update = self.mlp(torch.addcmul(mlp_shift, self.norm_mlp(x), 1 + mlp_scale))
        return torch.addcmul(x, mlp_gate, update)


class Transformer(DefinedModule):
    r"""A transformer on sequences of symbols in which every position sees every other.

    Blocks normalize first; scale, shift and gate of each block are linear in the embedding of noise
    level and context. The last layer starts at zero, so a fresh network returns zeros, that is equal
    probabilities.

    Positions are learned vectors, or ``relative``: head h adds :math:`b_h(i - j)` to the logits with which
    i attends to j, learned for every distance and common to all blocks. They start at
    :math:`-s_h |i - j|`, with slopes from 1 to 1/32, and half of the heads start out attending to one
    side. Where a position means nothing by itself, as in a window of text, that trains much faster: under
    masking the nearest symbols that are left tell the most.

    Args:
        states: number of input symbols, the mask symbol of an absorbing process included.
        length: length L of a sequence.
        width: features at a position, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        dropout: probability of zeroing a hidden unit or an attention weight, in training mode only.
        context: named context modules, each a :class:`LabelContext` or :class:`TensorContext`; their
            embeddings are added to that of the noise level.
        outputs: logits for each position; ``states`` if not given.
        relative: whether positions are relative; learned vectors otherwise.
        noise_level: whether the network sees the noise level. Without it there is no modulation and no
            context; under masking the number of masks tells the level.
        causal: whether a position sees only itself and those before it, for autoregression.

    Shapes:
        x ``(N, L)`` of any integer type with values in [0, states - 1] (checked by the process,
        not here), log_snr ``(N,)`` -> logits ``(N, L, outputs)``, or ``(N, L)`` if
        ``outputs == 1``.

    Raises:
        ValueError: for sizes that do not fit, or when called with a shape or dtype that does not.

    References:
        Vaswani et al. 2017, Attention Is All You Need; Peebles and Xie 2023, Scalable Diffusion
        Models with Transformers (adaptive norm); Raffel et al. 2020, T5 (learned biases of distances);
        Press et al. 2022, ALiBi (slopes).

    Example:
        >>> network = Transformer(states=28, length=10, width=32, depth=2, outputs=27)
        >>> network(torch.zeros(3, 10, dtype=torch.long), torch.zeros(3)).shape
        torch.Size([3, 10, 27])
    """

    def __init__(
        self,
        states: int,
        length: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        context: Mapping[str, nn.Module] | None = None,
        outputs: int | None = None,
        *,
        relative: bool = False,
        noise_level: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        outputs = states if outputs is None else outputs
        sizes = {"states": states, "length": length, "width": width, "depth": depth}
        for name, size in (sizes | {"heads": heads, "outputs": outputs}).items():
            check_positive_int(name, size)
        check_number("dropout", dropout, at_least=0, at_most=1)
        if width % heads:
            raise ValueError(f"width: got {width}, expected a multiple of heads={heads}")
        if context and not noise_level:
            raise ValueError(
                f"context: got {', '.join(context)}, expected none without noise_level"
            )
        self.states = states
        self.length = length
        self.heads = heads
        self.outputs = outputs
        self.relative, self.noise_level, self.causal = (
            bool(relative),
            bool(noise_level),
            bool(causal),
        )
        self.conditioning = Conditioning(width, context) if noise_level else None
        self.symbols = nn.Parameter(0.1 * torch.randn(states, width))
        self.positions = nn.Parameter(
            _slopes(length, heads, self.causal) if relative else 0.1 * torch.randn(length, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, self.noise_level) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, log_snr: Tensor, **context: Tensor | None) -> Tensor:
        """Applies the network, see the class."""
        if check_operand("x", x, self.symbols).is_floating_point():
            raise ValueError(f"x: got dtype {x.dtype}, expected integers")
        if x.dim() != 2 or x.shape[1] != self.length:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, {self.length})")
        look = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and not bool(((x >= 0) & (x < self.states)).all()):
            # Elsewhere the lookup itself refuses, without a wait for the device or a break of the graph.
            raise ValueError(
                f"x: got symbols from {int(x.min())} to {int(x.max())}, expected 0 to {self.states - 1}"
            )
        condition = None
        if self.conditioning is not None:
            condition = self.conditioning(log_snr, len(x), context)
        elif context:
            raise ValueError(f"context: got {', '.join(sorted(context))}, expected no context")
        hidden = F.embedding(x.long(), self.symbols)
        hidden = self.dropout(hidden if self.relative else hidden + self.positions)
        bias = self._bias()
        with _kernels(bias):
            for block in self.blocks:
                hidden = block(hidden, condition, bias)
        logits = self.last(self.norm(hidden))
        return logits.squeeze(-1) if self.outputs == 1 else logits

    def _bias(self) -> Tensor | None:
        """What is added to the logits with which i attends to j, (heads or 1, L, L), if anything is."""
        place = torch.arange(self.length, device=self.symbols.device)
        gap = place.unsqueeze(-1) - place
        bias = self.positions[:, gap + self.length - 1] if self.relative else None
        if not self.causal:
            return bias
        ahead = torch.zeros(gap.shape, device=gap.device).masked_fill(gap < 0, -torch.inf)
        return ahead.unsqueeze(0) if bias is None else bias + ahead


def _slopes(length: int, heads: int, causal: bool) -> Tensor:
    """Biases to start with, (heads, 2 length - 1), for i - j from 1 - length to length - 1."""
    gap, head = torch.arange(1.0 - length, length), torch.arange(heads).unsqueeze(-1)
    sided = head < heads // 2  # these come in pairs of one slope, for the left and the right
    slope = 2.0 ** (-5 * (head - torch.where(sided, head % 2, 0)) / max(heads - 1, 1))
    behind = gap * (1 - 2 * (head % 2)) < 0
    return -slope * gap.abs() - 3.0 * (sided & behind & (not causal))
