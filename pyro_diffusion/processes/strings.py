r"""Strings of variable length as padded tensors, and how often one is a subsequence of another.

A string of n symbols is a row of L >= n integers: its symbols, then L - n times the pad, the integer after
the last symbol. An *embedding* of y in x is a choice of positions of x that spell y; N(x, y) counts them.
Counts are sums of positive terms in float64, so they are right to some 1e-13 of themselves, and below 1e308
for strings of up to ``LONGEST`` symbols.
"""

import torch
from torch import Tensor

__all__ = ["LONGEST", "compress", "embeddings", "insertions", "lengths", "prefixes", "suffixes"]

# The central binomial coefficient of 1000 is 2.7e299, that of 1030 is no double.
LONGEST = 1000


def lengths(x: Tensor, pad: int) -> Tensor:
    """How many symbols come before the pads, batch shape."""
    return (x != pad).sum(-1)


def compress(x: Tensor, keep: Tensor, pad: int) -> Tensor:
    """The symbols of x where ``keep`` is true, in their order, padded to x's length."""
    place = torch.arange(x.shape[-1], device=x.device)
    order = torch.where(keep, place, place + x.shape[-1]).argsort(-1)
    kept = place < keep.sum(-1, keepdim=True)
    return torch.where(kept, x.gather(-1, order), pad)


def prefixes(x: Tensor, y: Tensor, pad: int) -> Tensor:
    r"""Embeddings of every prefix of y in every prefix of x: ``[..., j, i]`` counts y[:i] in x[:j].

    .. math:: F_{j+1,i} = F_{j,i} + [x_j = y_{i-1}]\, F_{j,i-1}, \qquad F_{0,i} = [i = 0]

    Args:
        x: batch + (L,).
        y: batch + (n,), of the same batch shape.
        pad: the pad, which matches nothing.

    Returns:
        batch + (L + 1, n + 1), float64.
    """
    row = torch.zeros((*y.shape[:-1], y.shape[-1] + 1), dtype=torch.float64, device=y.device)
    row[..., 0] = 1
    rows = [row]
    for j in range(x.shape[-1]):
        match = _match(x[..., j : j + 1], y, pad)
        step = torch.nn.functional.pad(match * row[..., :-1], (1, 0))
        row = row + step
        rows.append(row)
    return torch.stack(rows, -2)


def suffixes(x: Tensor, y: Tensor, pad: int) -> Tensor:
    """Embeddings of every suffix of y in every suffix of x: ``[..., j, i]`` counts y[i:] in x[j:].

    Arguments and shape as for :func:`prefixes`.
    """
    count = lengths(y, pad).unsqueeze(-1)
    row = (torch.arange(y.shape[-1] + 1, device=y.device) == count).double()
    rows = [row]
    for j in reversed(range(x.shape[-1])):
        match = _match(x[..., j : j + 1], y, pad)
        row = row + torch.nn.functional.pad(match * row[..., 1:], (0, 1))
        rows.append(row)
    return torch.stack(rows[::-1], -2)


def embeddings(x: Tensor, y: Tensor, pad: int) -> Tensor:
    """N(x, y), how often y is a subsequence of x: float64, of the batch shape that both broadcast to."""
    batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    row = torch.zeros((*batch, y.shape[-1] + 1), dtype=torch.float64, device=y.device)
    row[..., 0] = 1
    for j in range(x.shape[-1]):
        match = _match(x[..., j : j + 1], y, pad)
        # Right to left in effect: the row of before is on the right-hand side.
        row = torch.cat([row[..., :1], row[..., 1:] + match * row[..., :-1]], -1)
    return row.gather(-1, lengths(y, pad).unsqueeze(-1).expand(*batch, 1)).squeeze(-1)


def insertions(x: Tensor, y: Tensor, symbols: int) -> Tensor:
    r"""Expected symbols of x that are missing in y, by gap and symbol, if every embedding is equally likely.

    .. math:: C_{gc} = \frac{N(x,\ y \text{ with c inserted before } y_g)}{N(x, y)}
              = \frac{1}{N(x, y)} \sum_{j:\, x_j = c} F_{jg}\, B_{j+1,g},

    with the counts F of prefixes and B of suffixes: all gaps and symbols at once, in O(L n K).
    The gap n is the end of y. They sum to L - n; where y is no subsequence of x they are 0.

    Args:
        x: batch + (L,).
        y: batch + (n,), of the same batch shape.
        symbols: number of symbols, which is the pad, too.

    Returns:
        batch + (n, symbols), float64: the gaps before each place of y. (A y without pads has a gap more, its
        end, that is left out: a string that fills its row has no room for another symbol.)
    """
    before, after = prefixes(x, y, symbols), suffixes(x, y, symbols)
    hot = torch.nn.functional.one_hot(x, symbols + 1)[..., :-1].to(before.dtype)
    ways = (before[..., :-1, :-1] * after[..., 1:, :-1]).transpose(-1, -2) @ hot
    total = after[..., 0, 0, None, None]
    return torch.where(total > 0, ways / total.clamp(min=1), 0.0)


def _match(symbol: Tensor, y: Tensor, pad: int) -> Tensor:
    return ((symbol == y) & (symbol != pad)).double()
