"""Summaries of sets: any number of rows, in any order."""

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import check_number, check_operand, check_positive_int

from .definition import DefinedModule
from .regressions import MOMENTS, regression_size, regressions, scatter
from .transformer import Block

__all__ = ["SetEncoder"]


class SetEncoder(DefinedModule):
    r"""A summary of a set of vectors, whose order says nothing and whose number may be any.

    .. math::

        h_i &= \phi(x_i), \qquad w_{ki} = \mathrm{softmax}_i\, a_k(h_i), \\
        s &= \rho\Big(\tfrac{1}{n} \sum_i [x_i, h_i],\; \sum_i w_{ki} V_k [x_i, h_i],\; \log(1 + n),\;
            \tfrac{1}{1 + n},\; \beta, \tfrac12 \log v\Big),

    with perceptrons :math:`\phi` and :math:`\rho` and attention :math:`a_k` of every head k, preceded by
    ``blocks`` in which rows attend to each other, if any. Weights that differ by row are what a mean over
    groups of different precision needs. Means of rows as they are, not only of their features, and, of rows
    of up to 8 numbers, each number's linear regression on the numbers before it in the set,
    :math:`\beta, v` (``regressions``), let a summary be as exact as the sufficient statistics of a normal
    program. Cost is linear in the number of rows without blocks, quadratic with.

    Rows that a mask leaves out may hold any values, NaN too: they reach neither the summary nor a gradient.
    The summary of a permuted set is the same up to the rounding of sums; that of an empty set is of no row.

    Args:
        event_size: length d of a row.
        features: length of the summary.
        width: of the hidden layers, a multiple of ``heads``.
        heads: of the attention that pools.
        blocks: layers in which rows attend to each other.
        dropout: probability of zeroing a hidden unit of these layers, in training mode only.

    Shapes:
        x ``(N, n, d)``, or ``(N, n)`` for d = 1, or ``(N, n, ...)`` with d numbers in a row; mask
        ``(N, n)``, true for rows of the set, all if None -> ``(N, features)``.

    Raises:
        ValueError: for sizes below 1, or when called with a shape that does not fit.

    References:
        Zaheer et al. 2017, Deep Sets; Lee et al. 2019, Set Transformer (pooling by attention).

    Example:
        >>> encoder = SetEncoder(2, features=8)
        >>> x = torch.randn(3, 5, 2)
        >>> torch.allclose(encoder(x), encoder(x[:, torch.tensor([4, 2, 0, 1, 3])]), atol=1e-6)
        True
    """

    def __init__(
        self,
        event_size: int,
        features: int = 32,
        width: int = 64,
        heads: int = 4,
        blocks: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.event_size = check_positive_int("event_size", event_size)
        self.features = check_positive_int("features", features)
        self.width, self.heads = check_positive_int("width", width), heads
        if width % check_positive_int("heads", heads):
            raise ValueError(f"width: got {width}, expected a multiple of heads={heads}")
        check_positive_int("blocks", blocks, at_least=0)
        check_number("dropout", dropout, at_least=0, at_most=1)
        self.phi = nn.Sequential(
            nn.Linear(event_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.blocks = nn.ModuleList(Block(width, heads, dropout, False) for _ in range(blocks))
        self.logits = nn.Linear(width, heads, bias=False)
        self.values = nn.Linear(event_size + width, width)
        inputs = event_size + 2 * width + 2 + regression_size(event_size)
        self.rho = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, features))
        self.skip = nn.Linear(inputs, features)
        nn.init.zeros_(self.logits.weight)  # at first every row counts alike

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The summary, see the class."""
        weight = self.skip.weight
        check_operand("x", x, weight)
        if x.dim() < 2 or x.shape[2:].numel() != self.event_size:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (N, rows, {self.event_size})"
            )
        present = _present(mask, x)
        # by `where`, as NaN times zero is NaN, of a value and of a gradient
        rows = torch.where(present, x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), 0.0)
        rows = rows.to(weight.dtype)
        hidden = self.phi(rows)
        none = torch.finfo(weight.dtype).min
        if len(self.blocks):
            bias = torch.zeros_like(present, dtype=weight.dtype).masked_fill(~present, none)
            for block in self.blocks:
                hidden = block(hidden, None, bias.mT.unsqueeze(1))
        joined = torch.cat([rows, hidden], -1)
        count = present.sum(1, dtype=weight.dtype)
        mean = (joined * present).sum(1) / count.clamp(min=1)
        share = self.logits(hidden).masked_fill(~present, none).softmax(1) * present
        values = self.values(joined).unflatten(-1, (self.heads, -1))
        pooled = (share.unsqueeze(-1) * values).sum(1).flatten(1)
        parts = [mean, pooled, count.log1p(), 1 / (1 + count)]
        if self.event_size <= MOMENTS:
            parts.append(regressions(*scatter(rows, present)))
        whole = torch.cat(parts, -1)
        return self.skip(whole) + self.rho(whole)


def _present(mask: Tensor | None, x: Tensor) -> Tensor:
    """Which rows are of the set, (N, n, 1)."""
    if mask is None:
        return torch.ones_like(x[:, :, None].flatten(2)[..., :1], dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        got = (
            f"{mask.dtype} of shape {tuple(mask.shape)}"
            if isinstance(mask, Tensor)
            else type(mask).__name__
        )
        raise ValueError(f"mask: got {got}, expected torch.bool of shape {tuple(x.shape[:2])}")
    check_operand("mask", mask, x, boolean=True)
    return mask.unsqueeze(-1)
