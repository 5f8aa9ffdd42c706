"""The neural autoregressive distribution estimator."""

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import check_integers, check_positive_int

from .autoregressive import AutoregressiveNetwork, check_below, with_zero

__all__ = ["NADE"]


class NADE(AutoregressiveNetwork):
    r"""Conditionals of a vector of symbols by one hidden layer each, whose inputs are summed up on the way.

    .. math:: h_i = s\Big(c + U y + \sum_{j < i} W_j x_j\Big), \qquad
              \operatorname{logits}_i = b_i + B_i y + V_i h_i

    with s the sigmoid, i and j positions in the order, x one-hot without its first value (bits as they are).
    A pass over all D conditionals of H hidden units costs O(D H) a vector.

    Args:
        size: number of symbols D.
        hidden: number H of hidden units.
        states: number of values K.
        orders: (M, D), as MADE's; one, that of the places, if None. Several share
            all weights.
        context_size: numbers in a vector of context y.

    Shapes:
        x batch + (D,) of integers, context batch + (context_size,) -> logits batch + (D, K).

    Raises:
        ValueError: for sizes that are too small, orders that are none, and inputs of other shapes.

    Example:
        >>> NADE(4, hidden=8)(torch.zeros(3, 4, dtype=torch.int64)).shape
        torch.Size([3, 4, 2])

    References:
        Larochelle and Murray 2011, The neural autoregressive distribution estimator; Uria et al.,
        arXiv 1605.02226.
    """

    def __init__(
        self,
        size: int,
        hidden: int = 500,
        states: int = 2,
        orders: Tensor | None = None,
        context_size: int = 0,
    ) -> None:
        super().__init__(size, states, orders, context_size)
        self.hidden = check_positive_int("hidden", hidden)
        shape = (size, states - 1, hidden)
        self.inputs = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / size**0.5)
        self.outputs = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / hidden**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(shape[:2]))
        self.context: nn.Module | None = None
        if context_size:
            self.context = nn.Linear(context_size, hidden + size * (states - 1), bias=False)

    def forward(self, x: Tensor, order: int = 0, context: Tensor | None = None) -> Tensor:
        """Logits of every symbol given those before it."""
        self._check(x, order, context)
        check_integers("x", x, self.states)
        places = self.orders[order]
        parts = torch.einsum(
            "...dk,dkh->...dh",
            self._encoded(x, self.inputs)[..., places[:-1], :],
            self.inputs[places[:-1]],
        )
        first, bias = self._biases(context)
        # A sum of what comes before: taking the own part from a sum of all would leave its rounding.
        first = first.expand(*parts.shape[:-2], -1).unsqueeze(-2)
        hidden = torch.cat([first, parts], -2).cumsum(-2).sigmoid()
        out = torch.einsum("...dh,dkh->...dk", hidden, self.outputs[places])
        return with_zero(out[..., places.argsort(), :] + bias)

    def conditional(
        self, x: Tensor, position: int, order: int = 0, context: Tensor | None = None
    ) -> Tensor:
        """Logits of the symbol that comes at a position, O(position H) a vector."""
        self._check(x, order, context)
        check_below("position", position, self.size)
        before, place = self.orders[order, :position], self.orders[order, position]
        encoded = self._encoded(x, self.inputs)[..., before, :].flatten(-2)
        first, bias = self._biases(context)
        hidden = (first + encoded @ self.inputs[before].flatten(0, 1)).sigmoid()
        return with_zero(hidden @ self.outputs[place].mT + bias[..., place, :])

    def _biases(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the hidden units and of the logits."""
        if self.context is None or context is None:
            return self.hidden_bias, self.bias
        hidden, logits = self.context(context.to(self.bias)).split(
            (self.hidden, self.bias.numel()), -1
        )
        return self.hidden_bias + hidden, self.bias + logits.unflatten(-1, self.bias.shape)
