"""What a denoiser is: anything that returns a distribution over x_0 given x_t."""

from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.precision import PreciseModule, at_least_single
from pyro_diffusion.processes import ForwardProcess
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_tensor

__all__ = ["Denoiser", "NetworkDenoiser"]

# Networks are conditioned on log-SNR within these limits; nothing changes beyond them.
MAX_LOG_SNR = 30.0


class Denoiser(DefinedModule, PreciseModule):
    r"""A posterior p(x_0 | x_t) under a forward process.

    ``denoiser(xt, t, **context)`` returns a Pyro distribution over x_0. Samplers, bounds and guidance ask
    nothing else of it. A closed-form posterior is as good a denoiser as a network.

    Args:
        process: the forward process whose states it denoises.

    Raises:
        ValueError: for anything but a process.

    **Implementing a denoiser.** Implement :meth:`forward`. xt has shape batch + event; t is a time (scalar or
    batch shape) or a :class:`~pyro_diffusion.schedules.Level`, and ``self.process.level(t, xt, state="xt")``
    makes the one of the other and checks both. Return a distribution with the batch and event shape of xt.
    A posterior without a variance is a ``Delta``; set ``point_mass = True`` then. Refuse an unsuitable
    process by ``pyro_diffusion.processes.abilities.require``. For a network subclass
    :class:`NetworkDenoiser`, which calls it (:meth:`NetworkDenoiser.network_output`).

    Attributes:
        point_mass: whether its posterior is known to be a point mass, a mean without a variance.
        guided: whether something else than training changes it, so that sampling may leave what it knows.
        is_exact: whether its mean is :math:`E[x_0|x_t]` in closed form, and so its derivative a covariance.
            Set it in a class of your own: guidance then does not check the derivative.

    Example:
        The exact posterior of standard normal data,
        :math:`\mathcal N(\alpha x_t/(\alpha^2 + \sigma^2),\ \sigma^2/(\alpha^2 + \sigma^2))`.

        >>> import torch
        >>> from pyro.distributions import Normal
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> class StandardNormal(Denoiser):
        ...     def forward(self, xt, t, **context):
        ...         level = self.process.level(t, xt, state="xt")
        ...         total = level.alpha**2 + level.sigma**2
        ...         mean, scale = level.alpha * xt / total, level.sigma / total.sqrt()
        ...         return Normal(mean, scale).to_event(self.process.event_dim)
        >>> posterior = StandardNormal(GaussianProcess(Cosine()))(torch.ones(5, 2), 0.5)
        >>> posterior.mean[0], posterior.variance[0]
        (tensor([0.7071, 0.7071]), tensor([0.5000, 0.5000]))
    """

    point_mass: bool = False
    guided: bool = False
    is_exact: bool = False

    def __init__(self, process: ForwardProcess) -> None:
        super().__init__()
        if not isinstance(process, ForwardProcess):
            raise ValueError(f"process: got {type(process).__name__}, expected a ForwardProcess")
        process.check_scales()
        self.process = process

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0."""
        raise NotImplementedError

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """How many rightmost dimensions of a context tensor belong to one datum.

        Labels (integers) have none and vectors (floats) have one, unless a network says otherwise.

        Raises:
            ValueError: for complex numbers and booleans, which are neither (``context_event_dims`` of a
                :class:`NetworkDenoiser` says what they are).
        """
        check_tensor(name, value)
        return 1 if value.is_floating_point() else 0


class NetworkDenoiser(Denoiser):
    """Base of the denoisers that evaluate a network ``network(x, log_snr, **context)``.

    The network sees one batch dimension whatever the plates around it: all batch dimensions are flattened
    before the call and restored after. It is conditioned on the log-SNR, never on time, so the schedule can
    be changed after training: give the network to another denoiser. It returns x's shape, or x's shape and
    a last dimension of several numbers per coordinate.

    A network may be cast, ``denoiser.to(torch.bfloat16)``, or run under autocast. It then gets x in the dtype
    of its parameters, but the log-SNR in at least float32 (embed it first, then round), and what it returns
    is raised to float32: times, levels and the algebra around the network are never in half precision.

    Args:
        network: any module with that signature.
        process: the forward process.
        context_event_dims: event dimensions of context tensors, where integers -> 0, floats -> 1 is wrong.
    """

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        context_event_dims: dict[str, int] | None = None,
    ) -> None:
        super().__init__(process)
        self.network = network
        self._context_event_dims = dict(context_event_dims or {})

    def context_event_dim(self, name: str, value: Tensor) -> int:
        """How many rightmost dimensions of a context tensor belong to one datum."""
        if name in self._context_event_dims:
            return self._context_event_dims[name]
        return super().context_event_dim(name, value)

    def network_output(self, x: Tensor, log_snr: Tensor, context: dict[str, Any]) -> Tensor:
        """Call the network on flattened batch dimensions.

        Args:
            x: scaled state, batch + event.
            log_snr: the level's clock, a scalar or batch shape with singleton event dimensions.
            context: tensors that broadcast to batch + their own event shape, or None.
        """
        event_dim = self.process.event_dim
        batch, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
        if log_snr.dim() >= event_dim:
            log_snr = log_snr.reshape(log_snr.shape[: log_snr.dim() - event_dim])
        # Uncut schedules end at infinite log-SNR, which no embedding survives.
        log_snr = log_snr.clamp(-MAX_LOG_SNR, MAX_LOG_SNR)
        flat = {
            name: self._flatten(name, value, batch)
            for name, value in context.items()
            if value is not None
        }
        rows = _as_parameters(x, self.network).reshape(-1, *event)
        try:
            out: Tensor = self.network(rows, log_snr.expand(batch).reshape(-1), **flat)
        except Exception as error:
            # The network is the user's, so is its error; where it came from is ours to say.
            given = "".join(f", {name} {tuple(value.shape)}" for name, value in flat.items())
            error.add_note(
                f"network: got x of shape {tuple(rows.shape)} ({rows.dtype}){given}, expected a module that "
                "takes them"
            )
            raise
        if out.shape[:1] != rows.shape[:1]:
            raise ValueError(
                f"network: got an output of shape {tuple(out.shape)}, expected a first dimension of "
                f"{len(rows)}, the batch"
            )
        return out.reshape(batch + out.shape[1:]).to(at_least_single(out.dtype))

    def _flatten(self, name: str, value: Tensor, batch: tuple[int, ...]) -> Tensor:
        event = value.shape[value.dim() - self.context_event_dim(name, value) :]
        try:
            return value.expand((*batch, *event)).reshape(-1, *event)
        except RuntimeError as error:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected a shape that broadcasts to "
                f"{tuple(batch)} + {tuple(event)}"
            ) from error


def check_context(
    denoiser: Denoiser, context: dict[str, Tensor] | None, count: int
) -> dict[str, Tensor]:
    """Refuse a context that has not exactly one row for each of ``count`` data.

    Where data are averaged or scored one by one, a context that merely broadcasts pairs every datum with
    every row, or all of them with one.

    Raises:
        ValueError: naming the entry, its shape and what was expected.
    """
    checked = {name: value for name, value in (context or {}).items() if value is not None}
    for name, value in checked.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"context: got {name!r} as {type(value).__name__}, expected a tensor")
        event_dim = denoiser.context_event_dim(name, value)
        if value.dim() != 1 + event_dim or len(value) != count:
            raise ValueError(
                f"context: got {name!r} of shape {tuple(value.shape)}, expected ({count},) and {event_dim} "
                "event dimension(s), one row per datum"
            )
    return checked


def _as_parameters(x: Tensor, network: nn.Module) -> Tensor:
    """Real states in the dtype that a network of half precision computes in."""
    if not x.is_floating_point():
        return x
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), x.dtype)
    return x.to(dtype) if dtype.itemsize < at_least_single(dtype).itemsize else x


def check_outputs(out: Tensor, xt: Tensor, outputs: int) -> Tensor:
    """Give a network's output a last dimension of ``outputs``, or refuse it.

    Raises:
        ValueError: if the network returned another shape than xt's (and ``outputs`` numbers each).
    """
    if outputs == 1 and out.shape == xt.shape:
        return out.unsqueeze(-1)
    if out.shape != (*xt.shape, outputs):
        raise ValueError(
            f"network: got an output of shape {tuple(out.shape)}, expected {(*xt.shape, outputs)} "
            f"({outputs} number(s) per coordinate)"
        )
    return out
