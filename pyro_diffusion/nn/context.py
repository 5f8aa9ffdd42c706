"""Context of a network: class labels, vectors, and the absence of both."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyro_diffusion.validation import check_operand, check_positive_int

from .definition import DefinedModule
from .embedding import distinct_levels, fourier_embedding

RESERVED = frozenset({"self", "x", "log_snr", "x0", "xt", "t"})


class _Context(DefinedModule):
    """Shared part of the contexts: the learned null row and its dropout."""

    event_dim: int

    def __init__(self, features: int, dropout: float) -> None:
        super().__init__()
        check_positive_int("features", features)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: got {dropout}, expected a probability in [0, 1]")
        self.features = features
        self.dropout = dropout
        self.null = nn.Parameter(torch.randn(features) * features**-0.5)

    def encode(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, value: Tensor | None) -> Tensor:
        if value is None:
            return self.null.unsqueeze(0)
        encoded = self.encode(value)
        if self.training and self.dropout > 0:
            dropped = torch.rand(encoded.shape[0], 1, device=encoded.device) < self.dropout
            encoded = torch.where(dropped, self.null, encoded)
        return encoded


class LabelContext(_Context):
    """Class labels as learned rows, with one more row for 'no label'.

    Called with ``None`` it returns the null row. In training mode each label of a batch is replaced
    by the null row with probability ``dropout``, so that one network learns the conditional and the
    unconditional model, as classifier-free guidance needs.

    Args:
        classes: number of labels; a label is an integer in [0, classes - 1].
        features: width of the embedding.
        dropout: probability of the null row, in training mode only.

    Shapes:
        labels ``(N,)`` of any integer type -> ``(N, features)``; ``None`` -> ``(1, features)``.

    Raises:
        ValueError: when called with labels that are not integers, not one-dimensional, or out of
            range. The check needs the extreme labels, so on a GPU it waits for the device.

    References:
        Ho and Salimans 2022, Classifier-Free Diffusion Guidance, algorithm 1.
    """

    event_dim = 0

    def __init__(self, classes: int, features: int, dropout: float = 0.1) -> None:
        super().__init__(features, dropout)
        check_positive_int("classes", classes)
        self.classes = classes
        self.weight = nn.Parameter(torch.randn(classes, features) * features**-0.5)

    def encode(self, value: Tensor) -> Tensor:
        """Embeds labels, without dropout."""
        if (
            check_operand("label", value, self.weight, boolean=True).is_floating_point()
            or value.dtype == torch.bool
        ):
            raise ValueError(f"label: got dtype {value.dtype}, expected integers")
        if value.dim() != 1:
            raise ValueError(f"label: got shape {tuple(value.shape)}, expected (N,)")
        value = value.long()
        # In a compiled graph the lookup refuses by itself; a look at values would break the graph.
        if value.numel() and not torch.compiler.is_compiling():
            low, high = (int(extreme) for extreme in torch.aminmax(value))
            if low < 0 or high >= self.classes:
                found = low if low < 0 else high
                raise ValueError(
                    f"label: got {found}, expected integers in [0, {self.classes - 1}]"
                )
        return nn.functional.embedding(value, self.weight)


class TensorContext(_Context):
    """Vectors through a linear map, with a learned row for 'no vector'.

    The vectors should be of unit scale. ``None`` and ``dropout`` mean what they mean in
    :class:`LabelContext`.

    Args:
        in_features: size of a vector.
        features: width of the embedding.
        dropout: probability of the null row, in training mode only.

    Shapes:
        vectors ``(N, in_features)`` -> ``(N, features)``; ``None`` -> ``(1, features)``.

    Raises:
        ValueError: when called with a tensor that is not floating or of another shape.
    """

    event_dim = 1

    def __init__(self, in_features: int, features: int, dropout: float = 0.1) -> None:
        super().__init__(features, dropout)
        check_positive_int("in_features", in_features)
        self.in_features = in_features
        self.linear = nn.Linear(in_features, features)

    def encode(self, value: Tensor) -> Tensor:
        """Maps vectors, without dropout."""
        if not check_operand("context", value, self.linear.weight).is_floating_point():
            raise ValueError(f"context: got dtype {value.dtype}, expected floating point")
        if value.dim() != 2 or value.shape[1] != self.in_features:
            raise ValueError(
                f"context: got shape {tuple(value.shape)}, expected (N, {self.in_features})"
            )
        return self.linear(value.to(self.linear.weight.dtype))


class Conditioning(nn.Module):
    r"""Everything a network is conditioned on, the noise level and the context, as one vector a row.

    .. math::

        c = \mathrm{SiLU}\Big(\mathrm{MLP}(e(\lambda)) + \sum_k W_k \, \mathrm{context}_k\Big)

    with :math:`e` of :func:`~pyro_diffusion.nn.embedding.fourier_embedding`.

    Args:
        features: width of :math:`c`.
        context: named modules, each with an attribute ``features``, that map a tensor ``(N, ...)``
            to ``(N, features)`` and ``None`` to ``(1, features)``.

    Raises:
        ValueError: if a name is no identifier or is one of the networks' own argument names.
    """

    def __init__(self, features: int, context: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        check_positive_int("features", features, at_least=2)
        context = dict(context or {})
        for name in context:
            if not name.isidentifier() or name in RESERVED:
                raise ValueError(
                    f"context: got the name {name!r}, expected an identifier "
                    f"other than {', '.join(sorted(RESERVED))}"
                )
        self.features = features
        self.names = tuple(context)
        self.level_in = nn.Linear(2 * (features // 2), features)
        self.level_out = nn.Linear(features, features)
        # lists, because a ModuleDict refuses names such as "type" that are its own attributes
        self.contexts = nn.ModuleList(context.values())
        self.maps = nn.ModuleList(
            nn.Linear(int(module.features), features, bias=False)  # type: ignore[arg-type]
            for module in context.values()
        )

    def forward(self, log_snr: Tensor, count: int, context: Mapping[str, Tensor | None]) -> Tensor:
        """Embeds one batch.

        Args:
            log_snr: levels, shape ``(count,)``, or ``()`` for one that all rows have.
            count: number N of rows.
            context: tensors by name; a missing name means the null context.

        Returns:
            A tensor of shape ``(count, features)``, of the dtype of the weights; ``(1, features)`` for one
            level without context, be it () or expanded.

        Raises:
            ValueError: for an unknown name, or a shape that does not fit.
        """
        unknown = sorted(set(context) - set(self.names))
        if unknown:
            expected = ", ".join(self.names) or "no context"
            raise ValueError(f"context: got {', '.join(unknown)}, expected {expected}")
        if check_operand("log_snr", log_snr, self.level_in.weight).shape not in ((count,), ()):
            raise ValueError(f"log_snr: got shape {tuple(log_snr.shape)}, expected ({count},)")
        log_snr = distinct_levels(log_snr.reshape(-1))
        waves = fourier_embedding(log_snr, self.level_in.in_features)
        hidden = nn.functional.silu(self.level_in(waves.to(self.level_in.weight.dtype)))
        total = self.level_out(hidden)
        for name, module, linear in zip(self.names, self.contexts, self.maps, strict=True):
            encoded = self._encode(name, module, context.get(name), count)
            total = total + linear(encoded.to(self.level_in.weight.dtype))
        return nn.functional.silu(total)

    @staticmethod
    def _encode(name: str, module: nn.Module, value: Tensor | None, count: int) -> Tensor:
        if value is not None and (value.dim() == 0 or value.shape[0] != count):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({count}, ...)")
        try:
            return module(value)
        except ValueError as error:
            raise ValueError(f"context {name!r}: {error}") from error
