"""Denoisers of EDM: D(x; sigma), the mean of the data at signal scale 1."""

from torch import nn

from pyro_diffusion.denoisers import Data, GaussianDenoiser
from pyro_diffusion.foreign.timesteps import Sigma, TimestepNetwork
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import EDM

__all__ = ["from_edm"]


def from_edm(
    network: nn.Module,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    event_dim: int = 3,
    context_event_dims: dict[str, int] | None = None,
) -> GaussianDenoiser:
    r"""A preconditioned network ``D(x, sigma, **context)`` as a denoiser: :math:`\hat x_0 = D(x_t; \sigma)`.

    For the modules of Karras et al. and others that return the denoised datum, such as consistency models.
    :math:`x_t = x_0 + \sigma\epsilon`; the preconditioning is the module's own.

    Args:
        network: called with x of shape ``(N, *event)``, sigma of shape ``(N,)`` and context by name.
        sigma_min: noise scale at t = 0.
        sigma_max: noise scale at t = 1.
        rho: of the schedule: uniform times are the paper's grid.
        event_dim: number of dimensions of one datum, 3 for images.
        context_event_dims: event dimensions of context, where integers -> 0, floats -> 1 is wrong (one-hot
            ``class_labels`` have one, so they need no entry).

    Raises:
        ValueError: as :class:`~pyro_diffusion.schedules.EDM`, or for anything but a module.

    Example:
        Standard normal data, :math:`D(x; \sigma) = x/(1 + \sigma^2)`.

        >>> import torch
        >>> class D(nn.Module):
        ...     def forward(self, x, sigma):
        ...         return x / (1 + sigma[:, None] ** 2)
        >>> denoiser = from_edm(D(), event_dim=1)
        >>> t = denoiser.process.schedule.time_of_log_snr(torch.tensor(0.0))  # sigma = 1
        >>> denoiser(torch.ones(1, 2), t).mean
        tensor([[0.5000, 0.5000]])

    References:
        Karras et al., arXiv 2206.00364.
    """
    check_module(network)
    process = GaussianProcess(EDM(sigma_min, sigma_max, rho), event_dim=event_dim)
    return GaussianDenoiser(
        TimestepNetwork(network, Sigma()), process, Data(), context_event_dims=context_event_dims
    )


def check_module(network: object) -> None:
    """Refuse anything but a module.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(network, nn.Module):
        raise ValueError(f"network: got {type(network).__name__}, expected a module")
