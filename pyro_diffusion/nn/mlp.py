"""A multi-layer perceptron for vectors."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import (
    check_each_size,
    check_number,
    check_operand,
    check_positive_int,
)

from .context import Conditioning
from .definition import DefinedModule
from .embedding import check_frequencies, with_waves


class MLP(DefinedModule):
    r"""A perceptron on vectors, conditioned on the noise level at every layer.

    .. math::

        u_i = \mathrm{SiLU}\big(N(W_i h_{i-1} + b_i)(1 + a_i(c)) + d_i(c)\big), \qquad
        h_i = h_{i-1} + V_i u_i \text{ where the widths agree, else } u_i,

    with :math:`a_i, d_i` linear in the embedding :math:`c` of noise level and context, :math:`h_0` the
    vector, with sines and cosines of it if there are ``frequencies``, N the identity or a layer norm, and
    :math:`V_i` the identity or another linear map. The last layer is linear and starts at zero, so a fresh
    network returns zeros.

    Args:
        event_size: length d of a vector.
        hidden: widths of the hidden layers, at least one.
        outputs: numbers returned for each coordinate.
        context: named context modules, each a :class:`LabelContext` or :class:`TensorContext`; their
            embeddings are added to that of the noise level.
        dropout: probability of zeroing a hidden unit, in training mode only.
        embedding: width of :math:`c`.
        frequencies: of the sines and cosines of every coordinate, in radians per unit of x. Densities with
            detail finer than the data's standard deviation, as tables have, want (1, 2, 4, 8, 16) and
            ``norm``; from few rows of a smooth density they learn by heart, so there are none by default.
        norm: whether N is a layer norm (without weights of its own), which saves steps with ``frequencies``.
        residual: whether :math:`V_i` is a linear map, so that the layers whose widths agree are residual
            blocks of two linear maps each.

    Shapes:
        x ``(N, d)``, log_snr ``(N,)``, or ``()`` for one level of all rows, which is embedded once ->
        ``(N, d)``, or ``(N, d, outputs)`` if ``outputs > 1``, in the dtype of the parameters.

    Raises:
        ValueError: for sizes below 1, frequencies that are not positive, or when called with a shape that
            does not fit.

    References:
        Kingma et al. 2021, Variational Diffusion Models, appendix C (sines and cosines of x); Perez et al.
        2018, FiLM (scale and shift).

    Example:
        >>> network = MLP(2, hidden=(64, 64), outputs=2)
        >>> network(torch.zeros(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2, 2])
    """

    def __init__(
        self,
        event_size: int,
        hidden: Sequence[int] = (256, 256),
        outputs: int = 1,
        context: Mapping[str, nn.Module] | None = None,
        dropout: float = 0.0,
        embedding: int = 64,
        *,
        frequencies: Sequence[float] = (),
        norm: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int("event_size", event_size)
        check_positive_int("outputs", outputs)
        check_positive_int("embedding", embedding, at_least=2)
        if not check_each_size("hidden", hidden):
            raise ValueError(f"hidden: got {hidden}, expected at least one positive width")
        check_number("dropout", dropout, at_least=0, at_most=1)
        self.event_size = event_size
        self.outputs = outputs
        self.frequencies = check_frequencies(frequencies)
        self.norm, self.residual = bool(norm), bool(residual)
        self.conditioning = Conditioning(embedding, context)
        self.widths = [2 * width for width in hidden]
        self.modulation = nn.Linear(embedding, 2 * sum(hidden))
        inputs = event_size * (1 + 2 * len(self.frequencies))
        sizes = list(pairwise((inputs, *hidden)))
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in sizes)
        self.blocks = nn.ModuleList(
            nn.Linear(after, after) if residual and before == after else nn.Identity()
            for before, after in sizes
        )
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden[-1], event_size * outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, log_snr: Tensor, **context: Tensor | None) -> Tensor:
        """Applies the network, see the class."""
        if check_operand("x", x, self.last.weight).dim() != 2 or x.shape[1] != self.event_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, {self.event_size})")
        condition = self.conditioning(log_snr, x.shape[0], context)
        modulations = self.modulation(condition).split(self.widths, dim=1)
        hidden = with_waves(x, self.frequencies).to(self.last.weight.dtype)
        for layer, block, modulation in zip(self.layers, self.blocks, modulations, strict=True):
            scale, shift = modulation.chunk(2, dim=1)
            update = layer(hidden)
            if self.norm:
                update = nn.functional.layer_norm(update, update.shape[-1:])
            update = torch.addcmul(shift, update, 1 + scale)
            update = block(self.dropout(nn.functional.silu(update)))
            hidden = hidden + update if hidden.shape == update.shape else update
        out = self.last(hidden)
        return out if self.outputs == 1 else out.view(*x.shape, self.outputs)
