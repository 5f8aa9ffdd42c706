"""A small bidirectional transformer for sequences of symbols."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_diffusion.validation import check_number, check_operand, check_positive_int

from .context import Conditioning
from .definition import DefinedModule


class _Block(nn.Module):
    """Attention and a perceptron, each normalized, modulated and gated by the embedding."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.rate = dropout
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        # gates open: the last layer of the network is zero already, closed gates only start slower
        nn.init.ones_(self.modulation.bias.data.view(6, width)[2::3])

    def attend(self, x: Tensor) -> Tensor:
        joint = self.project_in(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = joint.transpose(1, 3).unbind(2)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        return self.project_out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = (
            self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        )
        update = self.attend(torch.addcmul(shift, self.norm_attention(x), 1 + scale))
        x = torch.addcmul(x, gate, update)
        update = self.mlp(torch.addcmul(mlp_shift, self.norm_mlp(x), 1 + mlp_scale))
        return torch.addcmul(x, mlp_gate, update)


class Transformer(DefinedModule):
    """A transformer on sequences of symbols in which every position sees every other.

    Blocks normalize first; scale, shift and gate of each block are linear in the embedding of noise
    level and context. Positions are learned. The last layer starts at zero, so a fresh network
    returns zeros, that is equal probabilities.

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

    Shapes:
        x ``(N, L)`` of any integer type with values in [0, states - 1] (checked by the process,
        not here), log_snr ``(N,)`` -> logits ``(N, L, outputs)``, or ``(N, L)`` if
        ``outputs == 1``.

    Raises:
        ValueError: for sizes that do not fit, or when called with a shape or dtype that does not.

    References:
        Vaswani et al. 2017, Attention Is All You Need; Peebles and Xie 2023, Scalable Diffusion
        Models with Transformers (adaptive norm).

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
    ) -> None:
        super().__init__()
        outputs = states if outputs is None else outputs
        sizes = {"states": states, "length": length, "width": width, "depth": depth}
        for name, size in (sizes | {"heads": heads, "outputs": outputs}).items():
            check_positive_int(name, size)
        check_number("dropout", dropout, at_least=0, at_most=1)
        if width % heads:
            raise ValueError(f"width: got {width}, expected a multiple of heads={heads}")
        self.states = states
        self.length = length
        self.heads = heads
        self.outputs = outputs
        self.conditioning = Conditioning(width, context)
        self.symbols = nn.Parameter(0.1 * torch.randn(states, width))
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
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
        if x.device.type == "cpu" and not bool(((x >= 0) & (x < self.states)).all()):
            # Elsewhere the lookup itself refuses, without a wait for the device.
            raise ValueError(
                f"x: got symbols from {int(x.min())} to {int(x.max())}, expected 0 to {self.states - 1}"
            )
        condition = self.conditioning(log_snr, x.shape[0], context)
        hidden = self.dropout(F.embedding(x.long(), self.symbols) + self.positions)
        for block in self.blocks:
            hidden = block(hidden, condition)
        logits = self.last(self.norm(hidden))
        return logits.squeeze(-1) if self.outputs == 1 else logits
