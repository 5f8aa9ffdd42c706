"""Networks of the VP-SDE as in score_sde: noise predictions of labels (N - 1) t."""

import math

from torch import nn

from pyro_diffusion.denoisers import GaussianDenoiser, Noise
from pyro_diffusion.foreign.edm import check_module
from pyro_diffusion.foreign.timesteps import LinearBetaTime, TimestepNetwork
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LinearBeta
from pyro_diffusion.validation import check_number, check_positive_int

__all__ = ["from_score_sde"]


def from_score_sde(
    network: nn.Module,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    scales: int = 1000,
    eps: float = 1e-5,
    event_dim: int = 3,
    context_event_dims: dict[str, int] | None = None,
) -> GaussianDenoiser:
    r"""A network of a continuous VP-SDE, ``network(x_t, labels)``, as a denoiser.

    Its output is the noise, :math:`\epsilon = -\sigma\,\nabla\log q(x_t)`, and its labels are
    :math:`(N - 1)\,u` with the SDE's time u. Models that were trained at N discrete levels are tables of
    betas: :func:`from_diffusers` with ``trained_betas``.

    Args:
        network: called with x of shape ``(N, *event)`` and labels of shape ``(N,)``.
        beta_min: rate of the SDE at u = 0.
        beta_max: rate at u = 1.
        scales: N, the labels of one unit of time, and one more.
        eps: the SDE's time at t = 0, in [1e-7, 0.1]; the least that the network was trained at.
        event_dim: number of dimensions of one datum, 3 for images.
        context_event_dims: event dimensions of context.

    Raises:
        ValueError: as :class:`~pyro_diffusion.schedules.LinearBeta`, for an eps outside, or for anything but
            a module.

    References:
        Song et al., arXiv 2011.13456, appendix C.
    """
    check_module(network)
    check_number("eps", eps, at_least=1e-7, at_most=0.1)
    check_positive_int("scales", scales, at_least=2)
    check_number("beta_min", beta_min, above=0, at_most=1e6)
    check_number("beta_max", beta_max, above=beta_min, at_most=1e6)
    decay = 0.5 * eps**2 * (beta_max - beta_min) + eps * beta_min
    schedule = LinearBeta(beta_min, beta_max, log_snr_max=-math.log(math.expm1(decay)))
    time = LinearBetaTime(float(beta_min), float(beta_max), float(scales - 1))
    return GaussianDenoiser(
        TimestepNetwork(network, time),
        GaussianProcess(schedule, event_dim=event_dim),
        Noise(),
        context_event_dims=context_event_dims,
    )
