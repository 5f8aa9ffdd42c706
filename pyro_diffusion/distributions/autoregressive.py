"""Vectors of symbols, one after another, as a Pyro distribution of exact probabilities."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import dtype_and_device
from pyro_diffusion.nn.autoregressive import AutoregressiveNetwork, check_below
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import (
    Shape,
    check_event_shape,
    check_finite,
    check_integers,
    kind_of,
)

__all__ = ["Autoregressive", "OrderAgnostic"]


class Autoregressive(TorchDistribution):
    r"""Vectors of symbols, each drawn given those before it in an order; of several orders, their mixture.

    .. math:: p(x | y) = \frac1M \sum_{m=1}^M \prod_k
              p\big(x_{o_{mk}} \,\big|\, x_{o_{m1}}, \dots, x_{o_{m,k-1}}, y\big)

    ``log_prob`` is exact. Under one order it costs a pass of the network; a mixture costs M, so train on an
    order drawn afresh each step: the mean of the orders' log-probabilities, a lower bound of the mixture's.
    Draws take as many steps as there are symbols.

    The network is trained only if Pyro sees it: ``pyro.module("network", network)``.

    Args:
        network: a :class:`~pyro_diffusion.nn.MADE`, a :class:`~pyro_diffusion.nn.NADE`, an
            :class:`OrderAgnostic`, or another
            :class:`~pyro_diffusion.nn.autoregressive.AutoregressiveNetwork`.
        order: number of the order; None for the mixture of all.
        context: y, batch + (context_size,) of the network; its batch is this distribution's.
        validate_args: whether to check values; Pyro's global setting by default.

    Shapes:
        event (D,) of integers 0 ... K - 1 (as floats, too).

    Raises:
        ValueError: for another network, an order that it has not, and a context that does not fit it.

    Example:
        >>> from pyro_diffusion.nn import MADE
        >>> bits = Autoregressive(MADE(3, hidden=(16,)))
        >>> every = torch.cartesian_prod(*[torch.arange(2)] * 3)
        >>> round(float(bits.log_prob(every).exp().sum().detach()), 4)
        1.0

    References:
        Larochelle and Murray 2011; Germain et al., arXiv 1502.03509, section 4.2 (mixtures of orders).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        network: AutoregressiveNetwork,
        order: int | None = None,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(network, AutoregressiveNetwork):
            raise ValueError(
                f"network: got {type(network).__name__}, expected an AutoregressiveNetwork"
            )
        if order is not None:
            check_below("order", order, len(network.orders))
        self.network, self.order, self.context = network, order, context
        if (context is None) != (network.context_size == 0):
            wanted = f"batch + ({network.context_size},)" if network.context_size else "None"
            found = "none" if context is None else kind_of(context)
            raise ValueError(f"context: got {found}, expected {wanted}, as the network has it")
        batch = torch.Size()
        if context is not None:
            check_event_shape("context", context, (network.context_size,))
            check_finite("context", context)
            batch = context.shape[:-1]
        super().__init__(batch, torch.Size([network.size]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Vectors of integers 0 ... K - 1."""
        return constraints.independent(constraints.integer_interval(0, self.network.states - 1), 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "Autoregressive":
        """The same distribution at a larger batch shape."""
        new = self._get_checked_instance(Autoregressive, _instance)
        new.network, new.order, new.context = self.network, self.order, self.context
        if self.context is not None:
            new.context = self.context.expand(*batch_shape, -1)
        super(Autoregressive, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats, exact, sample + batch."""
        if self._validate_args:
            self._validate_sample(value)
        else:
            check_event_shape("value", value, self.event_shape)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.long().expand(*shape, -1)
        if self.order is not None:
            return self._log_prob(value, self.order)
        each = [self._log_prob(value, m) for m in range(len(self.network.orders))]
        return torch.stack(each).logsumexp(0) - math.log(len(each))

    def _log_prob(self, value: Tensor, order: int) -> Tensor:
        logits = self.network(value, order, self._context(value.shape[:-1]))
        return Categorical(logits=logits, validate_args=False).log_prob(value).sum(-1)

    def _context(self, shape: Shape) -> Tensor | None:
        return None if self.context is None else self.context.expand(*shape, -1)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Integers, sample + batch + (D,): each vector in one order, drawn among all if none is given."""
        shape = self._extended_shape(sample_shape)
        device, count = self.network.orders.device, len(self.network.orders)
        x = torch.zeros(math.prod(shape[:-1]), shape[-1], dtype=torch.int64, device=device)
        context = self._context(shape[:-1])
        context = None if context is None else context.reshape(len(x), -1)
        which = torch.full((len(x),), self.order or 0)
        if self.order is None:
            which = torch.randint(count, (len(x),))
        for m in which.unique().tolist():
            rows = torch.nonzero(which == m).squeeze(-1).to(device)
            given = None if context is None else context[rows]
            x[rows] = self._completed(x[rows], m, given)
        return x.reshape(shape)

    def _completed(self, x: Tensor, order: int, context: Tensor | None) -> Tensor:
        for position in range(self.network.size):
            logits = self.network.conditional(x, position, order, context)
            draws = Categorical(logits=logits, validate_args=False).sample()
            x[:, self.network.orders[order, position]] = draws
        return x


class OrderAgnostic(AutoregressiveNetwork):
    r"""A masked diffusion's denoiser as an autoregressive network, in orders that are chosen afterwards.

    The k-th symbol's logits are those of the denoiser where the symbols from the k-th on are masked. Training
    the diffusion is training over all orders at once: for a network that ignores the level, the
    continuous-time bound of :class:`DiffusionCTMC` is exactly the log-probability averaged over all orders,
    and the mixture of orders is above it by Jensen's inequality. A network that uses the level is asked for
    the k-th symbol (k = 0 ... D - 1) at time :math:`1 - (k + 1/2)/D`: a model like any other, whose average
    is not that bound.

    :meth:`forward` makes D evaluations a vector, :meth:`conditional` one.

    Args:
        denoiser: under an absorbing process of vectors (``event_dim`` 1), without context.
        size: number of symbols D.
        orders: (M, D), see :class:`~pyro_diffusion.nn.autoregressive.AutoregressiveNetwork`.

    Raises:
        ValueError: for a process without a mask or of other events, and orders that are none.

    References:
        Uria, Murray and Larochelle, arXiv 1310.1757; Hoogeboom et al., arXiv 2110.02037 (the bound).
    """

    def __init__(self, denoiser: Denoiser, size: int, orders: Tensor | None = None) -> None:
        if not isinstance(denoiser, Denoiser):
            raise ValueError(f"denoiser: got {type(denoiser).__name__}, expected a Denoiser")
        process: Any = denoiser.process
        require(process, Ability.MASK, argument="denoiser")
        if process.event_dim != 1:
            raise ValueError(
                f"denoiser: got a process of event_dim {process.event_dim}, expected one of vectors (1)"
            )
        super().__init__(size, process.states, orders)
        self.denoiser, self.mask = denoiser, int(process.mask)

    def forward(self, x: Tensor, order: int = 0, context: Tensor | None = None) -> Tensor:
        """Logits of every symbol given those before it, from D evaluations a vector."""
        self._check(x, order, context)
        check_integers("x", x, self.states)
        places = self.orders[order]
        position = torch.arange(self.size, device=places.device)
        # At which position a place comes: the k-th evaluation sees the places of positions below k.
        hidden = places.argsort() >= position.unsqueeze(-1)
        masked = torch.where(hidden, self.mask, x.long().unsqueeze(-2))
        logits = self._logits(masked, position.expand(masked.shape[:-1]))
        index = places.view(-1, 1, 1).expand(*logits.shape[:-2], 1, self.states)
        return logits.gather(-2, index).squeeze(-2)[..., places.argsort(), :]

    def conditional(
        self, x: Tensor, position: int, order: int = 0, context: Tensor | None = None
    ) -> Tensor:
        """Logits of the symbol that comes at a position, from one evaluation."""
        self._check(x, order, context)
        check_below("position", position, self.size)
        hidden = self.orders[order].argsort() >= position
        masked = torch.where(hidden, self.mask, x.long())
        at = torch.full(x.shape[:-1], position, device=x.device)
        return self._logits(masked, at)[..., self.orders[order, position], :]

    def _logits(self, masked: Tensor, position: Tensor) -> Tensor:
        dtype = dtype_and_device(self.denoiser)[0] or torch.get_default_dtype()
        time = 1 - (position.to(dtype) + 0.5) / self.size
        return per_coordinate(self.denoiser(masked, time)).logits
