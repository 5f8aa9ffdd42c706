"""What a forward process is: a way to destroy data whose bridge is known."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.precision import PreciseModule, at_least_single
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.validation import (
    Shape,
    check_broadcast,
    check_positive_int,
    check_sizes,
    check_tensor,
    check_times,
)

__all__ = ["ForwardProcess", "check_order"]


class ForwardProcess(DefinedModule, PreciseModule):
    r"""A Markov process :math:`q` that destroys data, t = 0 (data) to t = 1 (noise).

    Five conditionals define it; each method returns a Pyro distribution whose batch shape is that of the
    state and whose event dimension is ``event_dim``. Times are floats or tensors of the state's batch
    shape, or :class:`~pyro_diffusion.schedules.Level` objects that a loop evaluated beforehand.

    ============================  =============================================================
    ``marginal(x0, t)``           :math:`q(x_t | x_0)`
    ``transition(xs, s, t)``      :math:`q(x_t | x_s)`, s < t
    ``bridge(xt, x0, s, t)``      :math:`q(x_s | x_t, x_0)`, s < t
    ``reverse(xt, p, s, t)``      :math:`\int q(x_s | x_t, x_0)\, p(x_0 | x_t)\, dx_0`
    ``prior(event_shape)``        a distribution close to :math:`q(x_1)`
    ============================  =============================================================

    The bridge is the reverse kernel of a point mass, so a subclass writes the algebra once: it implements
    ``coefficients`` (all that depends on times alone; loops call it once for all steps) and ``combine``.

    Args:
        schedule: signal and noise scales.
        event_dim: number of rightmost dimensions that make one datum.

    References:
        Sohl-Dickstein et al., arXiv 1503.03585; Ho et al., arXiv 2006.11239.
    """

    def __init__(self, schedule: Schedule, event_dim: int = 1) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule: got {type(schedule).__name__}, expected a Schedule")
        self.schedule = schedule
        self.event_dim = check_positive_int("event_dim", event_dim, at_least=0)

    def check_state(self, name: str, x: Tensor, values: bool = True) -> None:
        """Refuse what cannot be a state: fewer dimensions than a datum has, or the wrong kind of numbers.

        Args:
            name: of the argument, for errors.
            x: the state, batch + event.
            values: whether to look at the numbers, too (a host round trip on GPU).

        Raises:
            ValueError: naming the argument.
        """
        if check_tensor(name, x).dim() < self.event_dim:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected batch dimensions followed by "
                f"{self.event_dim} event dimension(s)"
            )

    def check_event(self, event_shape: Shape) -> torch.Size:
        """The shape of one datum, or a refusal.

        Raises:
            ValueError: for sizes below 1, or another number of dimensions than ``event_dim``.
        """
        sizes = check_sizes("event_shape", event_shape)
        if len(sizes) != self.event_dim:
            raise ValueError(
                f"event_shape: got {tuple(event_shape)}, expected {self.event_dim} "
                "dimension(s), the event_dim of the denoiser's process"
            )
        return sizes

    def check_precision(self, dtype: torch.dtype, times: Tensor) -> None:
        """Refuse a dtype in which the levels at a grid's ends cannot be told from data or pure noise.

        Asked by every model when it computes. It costs nothing unless the schedule reaches that far.

        Args:
            dtype: of the states.
            times: the grid.

        Raises:
            ValueError: naming the schedule, its ends and the range that works.
        """

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The law of x_t given x_0."""
        raise NotImplementedError

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The law of x_t given an earlier x_s, s < t."""
        raise NotImplementedError

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The law that generation starts from, batch shape ()."""
        raise NotImplementedError

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """A posterior that is certain of x_0."""
        raise NotImplementedError

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> Any:
        """Everything the bridge from t to s needs that depends on times alone (a named tuple of tensors)."""
        raise NotImplementedError

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: Any
    ) -> TorchDistribution:
        """The reverse kernel, given its coefficients broadcast against events."""
        raise NotImplementedError

    def log_evidence(self, xt: Tensor, values: Tensor, t: Tensor | Level) -> Tensor:
        """log q(x_t,i | x_0,i = values_k) up to a constant in k, per coordinate; k is a new last dim."""
        raise NotImplementedError

    def reverse(
        self,
        xt: Tensor,
        posterior: TorchDistribution,
        s: Tensor | Level,
        t: Tensor | Level,
        eta: float = 1.0,
    ) -> TorchDistribution:
        """The bridge from t to s integrated over a posterior p(x_0 | x_t), s < t.

        Args:
            xt: state at t, batch + event.
            posterior: a distribution over x_0 of the same batch and event shape.
            s: earlier time(s), scalar or of the batch shape.
            t: later time(s).
            eta: the bridge's free variance, 1 for the Markov process, 0 for the deterministic one (DDIM),
                which may also go from s to a later time.

        Raises:
            ValueError: for times outside [0, 1], s after t, or eta outside [0, 1].
        """
        early, late = self.level(s, xt, "s", "xt"), self.level(t, xt)
        if not isinstance(t, Level):
            check_broadcast("posterior", posterior.batch_shape + posterior.event_shape, xt.shape)
        if eta != 0 and not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        return self.combine(xt, posterior, self.coefficients(early, late, eta))

    def bridge(
        self, xt: Tensor, x0: Tensor, s: Tensor | Level, t: Tensor | Level, eta: float = 1.0
    ) -> TorchDistribution:
        """The law of x_s given x_t and x_0, s < t: the reverse kernel of a point mass at x_0."""
        check_broadcast("x0", x0.shape, xt.shape)
        return self.reverse(xt, self.point_mass(x0), s, t, eta)

    def level(
        self,
        t: Tensor | Level | float,
        like: Tensor | None = None,
        name: str = "t",
        state: str | None = None,
    ) -> Level:
        """The schedule at t, with singleton dimensions where events are.

        Args:
            t: time(s); a Level is handed back as it is, so one of batch shape must come from here.
            like: a state whose device, and dtype if it is real, the level takes.
            name: of the argument t, for errors.
            state: name of the argument ``like`` if it is to be checked as a state.

        Raises:
            ValueError: for times outside [0, 1] or of a shape that does not broadcast with the state's batch,
                and for what is no state. With a Level both are taken as checked.
        """
        if isinstance(t, Level):
            return t
        if isinstance(t, Tensor):
            check_tensor(name, t)
        if like is not None:
            if state is not None:
                self.check_state(state, like)
            batch = like.shape[: like.dim() - self.event_dim]
            if isinstance(t, Tensor):
                check_broadcast(name, t.shape, batch)
            dtype = at_least_single(like.dtype) if like.is_floating_point() else None
            t = torch.as_tensor(t, dtype=dtype, device=like.device)
        t = torch.as_tensor(t)
        check_times(name, t)
        return self.schedule.level(t, check=False).unsqueeze(self.event_dim)


def check_order(s: Level, t: Level) -> None:
    """Refuse an earlier time that is not earlier.

    Raises:
        ValueError: if the log-SNR at s is not above that at t.
    """
    if not bool((s.log_snr > t.log_snr).all()):
        raise ValueError("s, t: got s at or after t, expected s < t")
