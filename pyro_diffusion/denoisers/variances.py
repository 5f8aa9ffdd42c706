"""How much of x_0 is still unknown given x_t: the variance of a Gaussian posterior."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.precision import PreciseModule
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_finite, check_number, check_tensor

__all__ = ["LearnedVariance", "TimeVariance", "Variance", "unit_variance"]

# Of a variance to that of unit data; its exponential is a number in single precision.
LARGEST_LOG_RATIO = 80.0


def unit_variance(level: Level) -> Tensor:
    r"""Posterior variance :math:`\sigma^2/(\alpha^2 + \sigma^2)` of standard normal data.

    In a variance-preserving chain this is DDPM's upper choice :math:`\beta_t` for the reverse variance;
    a point mass (0) is its lower choice :math:`\tilde\beta_t`.
    """
    return torch.sigmoid(-level.log_snr)


class Variance(DefinedModule, PreciseModule):
    r"""A variance of p(x_0 | x_t) for :class:`~pyro_diffusion.denoisers.GaussianDenoiser`.

    Attributes:
        outputs: network outputs per coordinate that it consumes (0 or 1).
    """

    outputs = 0

    def forward(self, head: Tensor | None, level: Level) -> Tensor:
        """Variance that broadcasts to x_t.

        Args:
            head: the network's extra output, or None.
            level: the schedule at t, broadcast against events.
        """
        raise NotImplementedError


class LearnedVariance(Variance):
    r"""One variance per coordinate from a second head h: :math:`v = e^{h}\,\sigma^2/(\alpha^2+\sigma^2)`.

    h = 0 is the upper fixed choice of DDPM, h to minus infinity the lower one. h is clamped to
    [-``limit``, ``limit``].

    Args:
        limit: bound on the absolute log-ratio, in (0, 80].

    Raises:
        ValueError: for a limit outside.

    References:
        Nichol & Dhariwal, arXiv 2102.09672 (which interpolates the reverse variance instead of the
        posterior's; the range is the same).
    """

    outputs = 1

    def __init__(self, limit: float = 15.0) -> None:
        super().__init__()
        self.limit = check_number("limit", limit, above=0, at_most=80)

    def forward(self, head: Tensor | None, level: Level) -> Tensor:
        """Per-coordinate variance."""
        if head is None:
            raise ValueError("network: got no variance head, expected 2 outputs per coordinate")
        return head.clamp(-self.limit, self.limit).exp() * unit_variance(level)


class TimeVariance(Variance):
    r"""One variance per noise level, :math:`v(\lambda) = e^{h(\lambda)}\,\sigma^2/(\alpha^2+\sigma^2)`.

    h is interpolated linearly in the log-SNR (the clock) between knots, constant beyond. It is a parameter:
    trained with the bound, or set to an estimate.

    Args:
        log_snr: increasing knots.
        log_ratio: h at the knots; zeros, the upper fixed choice of DDPM, by default.
        trainable: whether h is a parameter.

    Raises:
        ValueError: if the knots do not increase or the shapes differ.
    """

    knots: Tensor
    log_ratio: Tensor

    def __init__(
        self,
        log_snr: Tensor | Sequence[float],
        log_ratio: Tensor | Sequence[float] | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(log_snr, Tensor):
            check_tensor("log_snr", log_snr)
        knots = torch.as_tensor(log_snr, dtype=torch.get_default_dtype())
        check_finite("log_snr", knots)
        if knots.dim() != 1 or len(knots) < 2 or not bool((knots.diff() > 0).all()):
            raise ValueError(
                f"log_snr: got {knots.tolist()}, expected at least two increasing knots"
            )
        ratio = torch.zeros_like(knots)
        if log_ratio is not None:
            if isinstance(log_ratio, Tensor):
                check_tensor("log_ratio", log_ratio)
            ratio = torch.as_tensor(log_ratio).to(knots)
        check_finite("log_ratio", ratio)
        if bool((ratio > LARGEST_LOG_RATIO).any()):
            raise ValueError(
                f"log_ratio: got {float(ratio.max()):g}, expected logarithms <= {LARGEST_LOG_RATIO}"
            )
        if ratio.shape != knots.shape:
            raise ValueError(
                f"log_ratio: got shape {tuple(ratio.shape)}, expected {tuple(knots.shape)}"
            )
        self.register_buffer("knots", knots)
        if trainable:
            self.log_ratio = nn.Parameter(ratio.clone())
        else:
            self.register_buffer("log_ratio", ratio.clone())

    def forward(self, head: Tensor | None, level: Level) -> Tensor:
        """Variance of the level's shape."""
        del head
        where = level.clock.detach().contiguous()
        knots, log_ratio = self.knots.to(where.dtype), self.log_ratio.to(where.dtype)
        right = torch.searchsorted(knots, where).clamp(1, len(knots) - 1)
        low, high = knots[right - 1], knots[right]
        weight = ((level.clock - low) / (high - low)).clamp(0, 1)
        ratio = torch.lerp(log_ratio[right - 1], log_ratio[right], weight)
        return ratio.exp() * unit_variance(level)
