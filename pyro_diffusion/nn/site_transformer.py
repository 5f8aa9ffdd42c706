"""A transformer on the sites of a program, any of which may be given."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import check_operand, check_positive_int

from .embedding import check_frequencies, with_waves
from .tokens import _TokenTransformer

__all__ = ["SiteTransformer"]


class _OwnLinear(nn.Module):
    """A linear layer of its own for every token, (N, L, inputs) -> (N, L, outputs)."""

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(tokens, inputs, outputs).uniform_(-bound, bound))
        # what tells one token from another before it has a value
        self.bias = nn.Parameter(torch.randn(tokens, outputs) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nli,lio->nlo", x, self.weight) + self.bias


class SiteTransformer(_TokenTransformer):
    r"""A transformer on named numbers, each of which is noisy or given, with attention along a graph.

    One token for each coordinate. It embeds, by a layer of its own, the coordinate's value and whether it is
    given; given values come in clean, noisy ones at the noise level that modulates all blocks. So one network
    is a denoiser of *every* conditional of a joint distribution.

    With a ``graph``, undirected edges between coordinates, token i attends to j if they are neighbours and
    **i is not given**; everything attends to itself. A given token says what it is and hears nothing, so what
    token i computes is a function of those coordinates that a path of free ones leads to, and of no other:
    the separation of the graph holds exactly, whatever the weights. A path of d edges takes d blocks. Where
    a row's given tokens leave some free ones further apart than that, its free tokens attend to all that a
    path of free ones leads to, so that nothing is cut off, either.

    Args:
        event_size: number of coordinates, L.
        width: features of a token, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        dropout: probability of zeroing a hidden unit or an attention weight, in training mode only.
        graph: (L, L) booleans, symmetric; every token attends to all, given or not, if None.
        frequencies: of the sines and cosines of every value that the network sees beside it, as in
            :class:`MLP`.

    Shapes:
        x ``(N, L)``, log_snr ``(N,)``, given ``(N, L)``, conditioned ``(N, L)`` booleans -> ``(N, L)``. Where
        ``conditioned`` is False ``given`` is not looked at, and where it is True x is not.

    Raises:
        ValueError: for sizes that do not fit, a graph that is not symmetric, or when called with a shape that
            does not fit.

    References:
        Gloeckler et al., arXiv 2404.09636 (one token for each variable, condition masks, graphs as masks of
        attention); docs/simulators.md says how this mask differs.

    Example:
        >>> chain = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
        >>> network = SiteTransformer(3, width=32, depth=2, graph=chain)
        >>> x, given = torch.zeros(5, 3), torch.ones(5, 3)
        >>> network(x, torch.zeros(5), given, torch.tensor([False, True, False]).expand(5, 3)).shape
        torch.Size([5, 3])
    """

    graph: Tensor | None

    def __init__(
        self,
        event_size: int,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        *,
        graph: Tensor | None = None,
        frequencies: Sequence[float] = (),
    ) -> None:
        check_positive_int("event_size", event_size)
        waves = check_frequencies(frequencies)
        features = 1 + 2 * len(waves)
        super().__init__(1, 1, width, depth, heads, dropout, None)
        self.event_size, self.outputs, self.frequencies = event_size, 1, waves
        # noisy and given values on inputs of their own, and which of them there is
        self.first = _OwnLinear(event_size, 2 * features + 1, width)  # type: ignore[assignment]
        self.last = _OwnLinear(event_size, width, 1)  # type: ignore[assignment]
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if graph is not None:
            graph = _checked_graph(graph, event_size)
        self.register_buffer("graph", graph)

    def forward(self, x: Tensor, log_snr: Tensor, given: Tensor, conditioned: Tensor) -> Tensor:
        """Applies the network, see the class."""
        weight = self.last.weight
        for name, value in {"x": x, "given": given}.items():
            shape = check_operand(name, value, weight).shape
            if len(shape) != 2 or shape[1] != self.event_size or shape[0] != x.shape[0]:
                raise ValueError(
                    f"{name}: got shape {tuple(shape)}, expected ({'N' if x.dim() < 1 else len(x)}, "
                    f"{self.event_size})"
                )
        if conditioned.shape != x.shape or conditioned.dtype != torch.bool:
            raise ValueError(
                f"conditioned: got {tuple(conditioned.shape)} of {conditioned.dtype}, expected booleans of "
                f"shape {tuple(x.shape)}"
            )
        tokens = [conditioned.to(weight.dtype).unsqueeze(-1)]
        for value, present in ((x, ~conditioned), (given, conditioned)):
            seen = with_waves(value.unsqueeze(-1), self.frequencies)
            tokens.append(torch.where(present.unsqueeze(-1), seen, 0.0).to(weight.dtype))
        bias = None
        if self.graph is not None:
            own = torch.eye(self.event_size, dtype=torch.bool, device=x.device)
            hears = (self.graph & ~conditioned.unsqueeze(-1)) | own
            if self.event_size > self.depth + 1:  # or no path is longer than there are blocks
                hears = _within(hears, self.depth)
            bias = torch.zeros(hears.shape, dtype=weight.dtype, device=x.device)
            bias = bias.masked_fill(~hears, -math.inf).unsqueeze(1)
        return self.transform(torch.cat(tokens, -1), log_snr, {}, bias=bias).squeeze(-1)


def _checked_graph(graph: object, size: int) -> Tensor:
    """Edges with those of every node to itself.

    Raises:
        ValueError: for anything but symmetric booleans.
    """
    if not isinstance(graph, Tensor) or graph.shape != (size, size) or graph.dtype != torch.bool:
        shape = tuple(graph.shape) if isinstance(graph, Tensor) else type(graph).__name__
        raise ValueError(f"graph: got {shape}, expected booleans of shape ({size}, {size})")
    if not torch.equal(graph, graph.mT):
        raise ValueError("graph: got edges of one direction, expected a symmetric matrix")
    return graph | torch.eye(size, dtype=torch.bool, device=graph.device)


def _within(hears: Tensor, depth: int) -> Tensor:
    """Who hears whom, (N, L, L): neighbours where so many blocks lead everywhere, else all on a path."""
    found = hears
    for _ in range(depth - 1):
        found = _further(found, hears)
    whole, steps = found, depth
    while steps < hears.shape[-1] - 1:
        whole, steps = _further(whole, whole), 2 * steps
    enough = (found == whole).flatten(1).all(1)
    return torch.where(enough[:, None, None], hears, whole)


def _further(first: Tensor, then: Tensor) -> Tensor:
    return (first.float() @ then.float()) > 0
