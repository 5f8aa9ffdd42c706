"""Denoisers of azula: a posterior mean, and the schedule that it was made for."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.denoisers import NetworkDenoiser
from pyro_diffusion.foreign.edm import check_module
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Level, Schedule

__all__ = ["AzulaDenoiser", "ScalesSchedule", "from_azula"]

# Halvings of [0, 1] until a time is found to the last digit of double precision.
_HALVINGS = 54


def from_azula(
    denoiser: nn.Module,
    event_dim: int = 3,
    variance: bool = False,
    context_event_dims: dict[str, int] | None = None,
) -> "AzulaDenoiser":
    r"""A denoiser of azula, ``denoiser(x_t, t, **context)``, under its own ``schedule``.

    Its times are ours, 0 for data and 1 for noise, and its :math:`\alpha_t, \sigma_t` those of the process.

    Args:
        denoiser: an ``azula.denoise.Denoiser``, or a module that is called like one and has a ``schedule``,
            a function of times that returns signal and noise scales.
        event_dim: number of dimensions of one datum, 3 for images.
        variance: whether its posteriors are ``GaussianPosterior``, whose variance is used; of others the
            posterior is a point mass at the mean.
        context_event_dims: event dimensions of context.

    Raises:
        ValueError: for a module without a schedule, or one whose scales are not positive with a log-SNR that
            decreases.

    References:
        Rozet, azula (https://github.com/probabilists/azula), version 0.11.
    """
    check_module(denoiser)
    schedule = getattr(denoiser, "schedule", None)
    if not callable(schedule):
        raise ValueError(
            f"denoiser: got a {type(denoiser).__name__} without a schedule, expected a denoiser of azula"
        )
    process = GaussianProcess(ScalesSchedule(schedule), event_dim=event_dim)
    return AzulaDenoiser(denoiser, process, variance, context_event_dims)


class ScalesSchedule(Schedule):
    r"""A schedule whose scales are any function of time: :math:`\lambda = 2\log(\alpha/\sigma)`.

    Computed in double precision; times of a log-SNR are found by bisection.

    Args:
        scales: maps times in [0, 1] to signal and noise scales, both positive.

    Raises:
        ValueError: for scales that are not positive and finite, or a log-SNR that does not decrease.
    """

    def __init__(self, scales: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        torch.nn.Module.__init__(self)
        self.scales = scales
        times = torch.linspace(0, 1, 1001, dtype=torch.float64)
        alpha, sigma = scales(times)
        curve = 2 * (alpha.log() - sigma.log())
        if not bool(curve.isfinite().all() & (curve.diff() < 0).all()):
            raise ValueError(
                f"schedule: got log-SNRs from {float(curve[0]):g} to {float(curve[-1]):g}, expected "
                "positive, finite scales whose log-SNR decreases with time"
            )
        super().__init__(float(curve[0]), float(curve[-1]))
        self._start, self._stop = 0.0, 1.0

    def _curve(self, u: Tensor) -> Tensor:
        alpha, sigma = self.scales(u.double())
        return (2 * (alpha.log() - sigma.log())).to(u.dtype)

    def _inverse_curve(self, log_snr: Tensor) -> Tensor:
        target = log_snr.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            early = self._curve(middle) > target
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return ((low + high) / 2).to(log_snr.dtype)

    def _level_of(self, t: Tensor, log_snr: Tensor) -> Level:
        alpha, sigma = (x.to(t.dtype) for x in self.scales(t.double()))
        return Level(t, log_snr, log_snr, alpha, sigma)

    def _signal(self, log_snr: Tensor) -> Tensor:
        return self.scales(self._inverse_curve(log_snr).double())[0].to(log_snr.dtype)

    def _noise(self, log_snr: Tensor) -> Tensor:
        return self._signal(log_snr) * torch.exp(-log_snr / 2)

    def _signal_slope(self, log_snr: Tensor) -> Tensor:
        with torch.enable_grad():
            u = self._inverse_curve(log_snr.detach().double()).requires_grad_()
            alpha, sigma = self.scales(u)
            (signal,) = torch.autograd.grad(
                alpha.log().sum(), u, retain_graph=True, allow_unused=True
            )
            (noise,) = torch.autograd.grad(sigma.log().sum(), u, allow_unused=True)
        signal, noise = (torch.zeros_like(u) if x is None else x for x in (signal, noise))
        return (signal / (2 * (signal - noise))).detach().to(log_snr.dtype)


class AzulaDenoiser(NetworkDenoiser):
    """The posterior of a denoiser of azula.

    Args:
        network: the denoiser of azula.
        process: of its schedule.
        variance: whether its posteriors have a variance.
        context_event_dims: event dimensions of context.
    """

    def __init__(
        self,
        network: nn.Module,
        process: GaussianProcess,
        variance: bool = False,
        context_event_dims: dict[str, int] | None = None,
    ) -> None:
        super().__init__(network, process, context_event_dims)
        self.variance = bool(variance)

    @property
    def point_mass(self) -> bool:  # type: ignore[override]
        """Whether there is no variance."""
        return not self.variance

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level, event_dim = self.process.level(t, xt, state="xt"), self.process.event_dim
        batch, event = xt.shape[: xt.dim() - event_dim], xt.shape[xt.dim() - event_dim :]
        time = (
            level.t
            if level.t.dim() < event_dim
            else level.t.reshape(level.t.shape[: level.t.dim() - event_dim])
        )
        given: dict[str, Any] = {
            k: self._flatten(k, v, batch) for k, v in context.items() if v is not None
        }
        rows = xt.reshape(-1, *event)
        posterior = self.network(rows, time.to(xt.dtype).expand(batch).reshape(-1), **given)
        if posterior.mean.shape != rows.shape:
            raise ValueError(
                f"denoiser: got a mean of shape {tuple(posterior.mean.shape)}, expected {tuple(rows.shape)}"
            )
        mean = posterior.mean.reshape(xt.shape)
        if not self.variance:
            return Delta(mean, event_dim=event_dim, validate_args=False)
        if not hasattr(posterior, "var"):
            raise ValueError(
                f"denoiser: got a {type(posterior).__name__}, expected one with a variance"
            )
        scale = posterior.var.expand(rows.shape).reshape(xt.shape).sqrt()
        return Normal(mean, scale, validate_args=False).to_event(event_dim)
