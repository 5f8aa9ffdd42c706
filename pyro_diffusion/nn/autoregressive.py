"""Autoregressive networks of vectors of symbols: what is shared, and MADE. NADE has a file of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from pyro.nn.auto_reg_nn import create_mask
from torch import Tensor, nn

from pyro_diffusion.validation import (
    check_each_size,
    check_expands,
    check_integers,
    check_positive_int,
    check_tensor,
)

from .definition import DefinedModule

__all__ = ["MADE", "AutoregressiveNetwork", "check_orders"]


def check_orders(orders: object, size: int) -> Tensor:
    """Rows of an (M, size) tensor, each an order of the places 0 ... size - 1; the identity if None.

    Raises:
        ValueError: for a tensor of another shape, and rows that are no permutations.
    """
    if orders is None:
        return torch.arange(size).unsqueeze(0)
    orders = check_tensor("orders", orders)
    if (
        orders.is_floating_point()
        or orders.dim() != 2
        or orders.shape[1] != size
        or not len(orders)
    ):
        raise ValueError(
            f"orders: got {orders.dtype} of shape {tuple(orders.shape)}, expected integers of shape "
            f"(M, {size}), a permutation in each row"
        )
    wanted = torch.arange(size, device=orders.device)
    if not bool((orders.sort(-1).values == wanted).all()):
        raise ValueError(
            f"orders: got rows that are no permutations, expected each of 0 ... {size - 1} once a row"
        )
    return orders.long()


class AutoregressiveNetwork(DefinedModule):
    """Logits of every symbol of a vector, given the symbols before it in an order. A base class.

    A subclass has :meth:`forward`; :meth:`conditional` may be overridden where one place costs less than all.

    Args:
        size: number of symbols D in a vector.
        states: number of values K of a symbol, 0 ... K - 1.
        orders: (M, D), permutations of the places: ``orders[m, k]`` is the place that comes k-th in the m-th
            order. One order, that of the places, if None.
        context_size: numbers in a vector of context; none if 0.

    Raises:
        ValueError: for fewer than two symbols or values, and orders that are none.
    """

    orders: Tensor

    def __init__(
        self, size: int, states: int = 2, orders: Tensor | None = None, context_size: int = 0
    ) -> None:
        super().__init__()
        self.size = check_positive_int("size", size, at_least=2)
        self.states = check_positive_int("states", states, at_least=2)
        self.context_size = check_positive_int("context_size", context_size, at_least=0)
        self.register_buffer("orders", check_orders(orders, size), persistent=False)

    def definition(self) -> dict[str, Any]:
        """As for every defined module, and the orders: weights of other ones mean nothing."""
        return {**super().definition(), "orders": self.orders.tolist()}

    def forward(self, x: Tensor, order: int = 0, context: Tensor | None = None) -> Tensor:
        """Logits, batch + (D, K), of the symbols of x, batch + (D,), in the order of that number."""
        raise NotImplementedError

    def conditional(
        self, x: Tensor, position: int, order: int = 0, context: Tensor | None = None
    ) -> Tensor:
        """Logits, batch + (K,), of the symbol that comes at a position, given those before it."""
        check_below("position", position, self.size)
        return self(x, order, context)[..., self.orders[order, position], :]

    def _encoded(self, x: Tensor, like: Tensor) -> Tensor:
        """One-hot without the first value, batch + (D, K - 1): for bits, the bits themselves."""
        values = torch.arange(1, self.states, device=x.device)
        return (x.unsqueeze(-1) == values).to(like.dtype)

    def _check(self, x: Tensor, order: int, context: Tensor | None) -> None:
        """Refuse vectors and contexts of other sizes, and an order that there is not."""
        check_below("order", order, len(self.orders))
        if check_tensor("x", x).shape[-1:] != (self.size,):
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected batch + ({self.size},)")
        if (context is None) != (self.context_size == 0):
            wanted = f"batch + ({self.context_size},)" if self.context_size else "no context"
            found = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(f"context: got {found}, expected {wanted}")
        if context is not None:
            check_tensor("context", context)
            if context.shape[-1:] != (self.context_size,):
                raise ValueError(
                    f"context: got shape {tuple(context.shape)}, expected batch + ({self.context_size},)"
                )
            check_expands("context", context, (*x.shape[:-1], self.context_size))


def check_below(name: str, value: object, count: int) -> None:
    """Refuse anything but an integer of 0 ... count - 1.

    Raises:
        ValueError: naming what was found.
    """
    if check_positive_int(name, value, at_least=0) >= count:
        raise ValueError(f"{name}: got {value}, expected an integer below {count}")


def with_zero(logits: Tensor) -> Tensor:
    """Logits of all values, the first's being 0, from those of the others."""
    return torch.cat([torch.zeros_like(logits[..., :1]), logits], -1)


class MADE(AutoregressiveNetwork):
    r"""A masked autoencoder: all conditionals of a vector of symbols in one pass of Pyro's network.

    .. math:: p(x) = \prod_k p\big(x_{o_k} \,\big|\, x_{o_1}, \dots, x_{o_{k-1}}, y\big)

    The network is Pyro's ``AutoRegressiveNN`` (with a context y, ``ConditionalAutoRegressiveNN``). Values
    beyond two are one-hot: all K - 1 inputs of a symbol share its place in the order. With several orders
    the weights are shared and the masks differ: train on one drawn at random each step, and score by their
    mixture (:class:`~pyro_diffusion.distributions.Autoregressive`).

    Args:
        size: number of symbols D.
        hidden: widths of the hidden layers, each at least D (K - 1).
        states: number of values K.
        orders: (M, D), see ``AutoregressiveNetwork``; one, that of the places, if None.
        context_size: numbers in a vector of context.
        skip: whether inputs have a (masked) linear way to the logits, too.

    Shapes:
        x batch + (D,) of integers, context batch + (context_size,) -> logits batch + (D, K).

    Raises:
        ValueError: for sizes that are too small, orders that are none, and inputs of other shapes.

    Example:
        >>> made = MADE(4, hidden=(32,), orders=torch.stack([torch.arange(4), torch.randperm(4)]))
        >>> made(torch.zeros(3, 4, dtype=torch.int64), order=1).shape
        torch.Size([3, 4, 2])

    References:
        Germain et al., arXiv 1502.03509; Paige and Wood, arXiv 1602.06701 (context).
    """

    def __init__(
        self,
        size: int,
        hidden: Sequence[int] = (500,),
        states: int = 2,
        orders: Tensor | None = None,
        context_size: int = 0,
        skip: bool = False,
    ) -> None:
        super().__init__(size, states, orders, context_size)
        self.hidden, self.skip = check_each_size("hidden", hidden), bool(skip)
        values, inputs = states - 1, size * (states - 1)
        if not self.hidden or min(self.hidden) < inputs:
            raise ValueError(f"hidden: got {self.hidden}, expected one or more widths >= {inputs}")
        # Whether two inputs are of one symbol is no business of Pyro's masks: theirs come one after another,
        # and the first of a symbol's outputs sees none of its own inputs.
        places = self.orders.unsqueeze(-1) * values + torch.arange(
            values, device=self.orders.device
        )
        kind: Any = ConditionalAutoRegressiveNN if context_size else AutoRegressiveNN
        extra = (context_size,) if context_size else ()
        self.network: nn.Module = kind(
            inputs,
            *extra,
            list(self.hidden),
            param_dims=[values],
            permutation=places[0].flatten(),
            skip_connections=self.skip,
        )
        for m, place in enumerate(places[1:], start=1):
            masks, skips = create_mask(
                inputs, context_size, list(self.hidden), place.flatten(), values
            )
            for i, mask in enumerate([*masks, skips]):
                self.register_buffer(f"_mask_{m}_{i}", mask.bool(), persistent=False)

    def forward(self, x: Tensor, order: int = 0, context: Tensor | None = None) -> Tensor:
        """Logits of every symbol given those before it."""
        self._check(x, order, context)
        check_integers("x", x, self.states)
        layers: Any = self.network.layers
        encoded = self._encoded(x, layers[0].weight).flatten(-2)
        inputs = (encoded,) if context is None else (encoded, context.to(encoded))
        names = [f"layers.{i}.mask" for i in range(len(layers))]
        names += ["skip_layer.mask"] if self.skip else []
        masks = {name: getattr(self, f"_mask_{order}_{i}") for i, name in enumerate(names) if order}
        out = torch.func.functional_call(self.network, masks, inputs)
        out = out.unsqueeze(-2) if self.states == 2 else out
        return with_zero(out[..., :: self.states - 1].mT)
