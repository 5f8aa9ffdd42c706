"""A residual perceptron for vectors given vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import check_number, check_operand, check_positive_int

from .definition import DefinedModule
from .embedding import check_frequencies, distinct_levels, fourier_embedding, with_waves


class ConditionalMLP(DefinedModule):
    r"""A residual perceptron on a vector x beside its context y, which it sees at the same door.

    .. math::

        h_0 &= W_0 [x, y], \\
        u_i &= \mathrm{SiLU}\big(N(h_{i-1})(1 + a_i(\lambda)) + d_i(\lambda)\big), \\
        h_i &= h_{i-1} + V_i\, \mathrm{SiLU}(W_i u_i),

    with x and y joined by sines and cosines of their coordinates if there are ``frequencies``, N a layer norm
    without weights, and :math:`a_i, d_i` functions of the noise level. The last layer is linear and starts at
    zero, so a fresh network returns zeros. Where a posterior is narrow and moves with the data, it learns
    faster than an :class:`MLP`, whose context scales and shifts its layers.

    Args:
        event_size: length of x.
        context_size: length of y.
        width: of all hidden layers.
        depth: number of residual blocks.
        dropout: probability of zeroing a hidden unit, in training mode only.
        frequencies: of the sines and cosines of x and y, in radians per unit.

    Shapes:
        x ``(N, event_size)``, log_snr ``(N,)``, y ``(N, context_size)`` -> ``(N, event_size)``, in the dtype
        of the parameters.

    Raises:
        ValueError: for sizes below 1, frequencies that are not positive, or when called with a shape that
            does not fit.

    Example:
        >>> network = ConditionalMLP(2, 3, width=32, depth=2)
        >>> network(torch.zeros(5, 2), torch.zeros(5), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_size: int,
        context_size: int,
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
        *,
        frequencies: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.event_size = check_positive_int("event_size", event_size)
        self.context_size = check_positive_int("context_size", context_size)
        self.width = check_positive_int("width", width, at_least=2)
        self.depth = check_positive_int("depth", depth)
        check_number("dropout", dropout, at_least=0, at_most=1)
        self.frequencies = check_frequencies(frequencies)
        inputs = (event_size + context_size) * (1 + 2 * len(self.frequencies))
        self.first = nn.Linear(inputs, width)
        self.level = nn.Linear(2 * (width // 2), width)
        self.modulation = nn.Linear(width, 2 * width * depth)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, event_size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor) -> Tensor:
        """Applies the network, see the class."""
        weight = self.last.weight
        for name, value, size in (("x", x, self.event_size), ("y", y, self.context_size)):
            if check_operand(name, value, weight).dim() != 2 or value.shape[1] != size:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected (N, {size})")
        if check_operand("log_snr", log_snr, weight).shape != x.shape[:1] or len(y) != len(x):
            raise ValueError(
                f"x, log_snr, y: got {len(x)}, {tuple(log_snr.shape)} and {len(y)} rows, expected as many"
            )
        silu = nn.functional.silu
        waves = fourier_embedding(distinct_levels(log_snr), self.level.in_features).to(weight.dtype)
        modulations = self.modulation(silu(self.level(waves))).chunk(2 * self.depth, dim=1)
        joined = torch.cat([with_waves(v, self.frequencies) for v in (x, y)], -1)
        hidden = self.first(joined.to(weight.dtype))
        for i, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            update = nn.functional.layer_norm(hidden, hidden.shape[-1:])
            update = torch.addcmul(modulations[2 * i + 1], update, 1 + modulations[2 * i])
            hidden = hidden + outer(self.dropout(silu(inner(silu(update)))))
        return self.last(silu(hidden))
