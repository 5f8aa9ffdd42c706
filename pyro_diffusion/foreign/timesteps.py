"""Networks that are called with a timestep of their own, as networks that are called with the log-SNR."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.precision import PreciseModule

__all__ = ["FlowTime", "LinearBetaTime", "QuarterLogSigma", "Sigma", "TableTime", "TimestepNetwork"]

# Timesteps this close to a whole number are that number: a table's own levels are met exactly.
_ROUNDING = 1e-2


class TableTime(DefinedModule, PreciseModule):
    """Timesteps 0 ... T - 1 of a table of betas; between its levels, linear in the log-SNR.

    Args:
        knots: the log-SNR of the table's levels, decreasing.
    """

    knots: Tensor

    def __init__(self, knots: Tensor) -> None:
        super().__init__()
        self.register_buffer("knots", knots.clone())

    def timestep(self, log_snr: Tensor) -> Tensor:
        """In [0, T - 1], of any shape."""
        knots, where = self.knots.to(log_snr.device), log_snr.detach().to(self.knots.dtype)
        right = torch.searchsorted(-knots, -where.contiguous()).clamp(1, len(knots) - 1)
        low, high = knots[right], knots[right - 1]
        step = right - ((where - low) / (high - low)).clamp(0, 1)
        whole = step.round()
        return torch.where((step - whole).abs() < _ROUNDING, whole, step).to(log_snr.dtype)

    def norm(self, log_snr: Tensor) -> Tensor:
        """Root of alpha^2 + sigma^2."""
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class LinearBetaTime:
    r"""``factor`` times the time of a VP-SDE, of rate from ``beta_min`` to ``beta_max``."""

    beta_min: float
    beta_max: float
    factor: float

    def timestep(self, log_snr: Tensor) -> Tensor:
        """In [0, factor]: u at the decay B = log(1 + exp(-log-SNR))."""
        decay, slope = nn.functional.softplus(-log_snr), self.beta_max - self.beta_min
        u = 2 * decay / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * decay))
        return self.factor * u

    def norm(self, log_snr: Tensor) -> Tensor:
        """Root of alpha^2 + sigma^2."""
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class FlowTime:
    """``factor`` times sigma on the straight path, alpha + sigma = 1."""

    factor: float

    def timestep(self, log_snr: Tensor) -> Tensor:
        """In (0, factor)."""
        return self.factor * torch.sigmoid(-log_snr / 2)

    def norm(self, log_snr: Tensor) -> Tensor:
        """Root of alpha^2 + sigma^2."""
        return torch.hypot(torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2))


@dataclass(frozen=True)
class Sigma:
    """The noise scale sigma itself, at signal scale 1."""

    def timestep(self, log_snr: Tensor) -> Tensor:
        """Sigma."""
        return torch.exp(-log_snr / 2)

    def norm(self, log_snr: Tensor) -> Tensor:
        """Root of 1 + sigma^2."""
        return torch.hypot(torch.ones_like(log_snr), torch.exp(-log_snr / 2))


@dataclass(frozen=True)
class QuarterLogSigma:
    """log(sigma) / 4 at signal scale 1, for networks whose input is scaled to unit variance (EDM)."""

    def timestep(self, log_snr: Tensor) -> Tensor:
        """A quarter of log sigma."""
        return -log_snr / 8

    def norm(self, log_snr: Tensor) -> Tensor:
        """1: the network takes its input scaled."""
        return torch.ones_like(log_snr)


class TimestepNetwork(DefinedModule):
    r"""``network(x, log_snr, **context)`` of a foreign ``network(x_t, timestep, **context)``.

    A :class:`~pyro_diffusion.denoisers.GaussianDenoiser` scales x to unit variance,
    :math:`x = x_t / \sqrt{\alpha^2+\sigma^2}`; this is undone here, and the timestep follows from the
    log-SNR.

    Args:
        network: returns a tensor of x's shape, or an object that has it as ``sample``, or a tuple that starts
            with it. With ``heads = 2`` it has twice the channels, the second half being the variance's.
        time: the meaning of the timestep.
        heads: 1 or 2.
    """

    def __init__(self, network: nn.Module, time: Any, heads: int = 1) -> None:
        super().__init__()
        self.network, self.time, self.heads = network, time, heads

    def forward(self, x: Tensor, log_snr: Tensor, **context: Tensor) -> Tensor:
        """x of shape ``(N, *event)``, log_snr ``(N,)`` -> x's shape, or that and (2,)."""
        norm = self.time.norm(log_snr).reshape(-1, *(1,) * (x.dim() - 1))
        out = self.network((norm * x).to(x.dtype), self.time.timestep(log_snr), **context)
        out = getattr(out, "sample", out)
        out = out[0] if isinstance(out, tuple) else out
        expected = (len(x), self.heads * x.shape[1], *x.shape[2:])
        if tuple(out.shape) != expected:
            raise ValueError(
                f"network: got an output of shape {tuple(out.shape)}, expected {expected} for x of shape "
                f"{tuple(x.shape)} and {self.heads} number(s) per coordinate"
            )
        if self.heads == 1:
            return out
        return out.unflatten(1, (self.heads, x.shape[1])).movedim(1, -1)


def cut_at(sigma: float) -> float:
    """The log-SNR at a noise scale of the straight path."""
    return 2 * math.log((1 - sigma) / sigma)
