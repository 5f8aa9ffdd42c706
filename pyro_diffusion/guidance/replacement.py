r"""Guidance by observations of single coordinates: those observed replace the denoiser's estimates."""

from typing import Any

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import dtype_and_device
from pyro_diffusion.guidance.base import GuidedDenoiser
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.base import check_likelihood
from pyro_diffusion.processes import Ability
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["Replacement"]


class Replacement(GuidedDenoiser):
    r"""Replacement guidance: observed coordinates follow the observations, the others the denoiser.

    For Normal observations of single coordinates of :math:`x_0`, :math:`x_i` at value :math:`y_i` with
    precision :math:`b_i` altogether,

    .. math::
        p(x_{0,i} | x_t, y) \approx \mathcal N\Big(
            \frac{b_i y_i + \alpha x_{t,i}/\sigma^2}{b_i + \alpha^2/\sigma^2},\;
            \frac{1}{b_i + \alpha^2/\sigma^2}\Big),

    the posterior given the observation and x_t, a point mass at :math:`y_i` if there is no noise. So those
    coordinates reverse the forward process of :math:`\mathcal N(y_i, 1/b_i)` exactly, and there is no need
    to noise y apart. The prior of these coordinates is not used, and the others depend on y through x_t
    alone: exact only for noiseless observations of independent coordinates. For dependent ones sample with
    :class:`~pyro_diffusion.samplers.RePaint`. A point-mass denoiser gives a point mass.

    The likelihood is evaluated at construction alone; no gradient of the denoiser is asked for. There is no
    log-twist (:meth:`twisted` refuses): observations without noise have none.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula.
        likelihood: a :class:`~pyro_diffusion.likelihoods.Likelihood` with residuals, each of one coordinate
            of x_0, scaled or shifted at will.

    Raises:
        ValueError: for a process without Tweedie's formula, a likelihood without a gradient, or residuals of
            several coordinates.

    References:
        Song et al., arXiv 2011.13456, appendix I.2; Lugmayr et al., arXiv 2201.09865.
    """

    needs = (Ability.NUMBERS, Ability.TWEEDIE)
    observed: Tensor
    precision: Tensor

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood) -> None:
        super().__init__(denoiser)
        self.likelihood = check_likelihood(likelihood)
        self.likelihood.check_gradient()
        observed, precision = _observed_coordinates(likelihood, *dtype_and_device(denoiser))
        self.register_buffer("observed", observed, persistent=False)
        self.register_buffer("precision", precision, persistent=False)

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Any:
        """Not available.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "guidance: got Replacement where a log-twist is needed, expected MMPS, PiGDM, TMPD, DiffPIR or "
            "PlugIn"
        )

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0 given x_t and y, batch and event shape of xt, detached."""
        level = self.process.level(t, xt, state="xt")
        with torch.no_grad():
            prior = self.denoiser(xt, level, **context)
            base, event_dim = per_coordinate(prior), prior.event_dim
            observed, precision = self.observed.to(xt), self.precision.to(xt)
            noise = level.noise_to_signal.square()
            total = precision + 1 / noise
            mean = (precision * observed + xt / level.tweedie) / total
            known = precision > 0
            mean = torch.where(known, mean, base.mean)
            if isinstance(base, Delta):
                return Delta(mean, event_dim=event_dim, validate_args=False)
            variance = torch.where(known, 1 / total, base.variance)
            return Normal(mean, variance.sqrt(), validate_args=False).to_event(event_dim)


def _observed_coordinates(
    likelihood: Likelihood, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """Value and precision of the observation of every coordinate (0 if there is none), batch + event.

    Raises:
        ValueError: if a residual depends on several coordinates, or not linearly on one.
    """
    shape = (*likelihood.batch_shape, *likelihood.event_shape)
    origin = torch.zeros(shape, dtype=dtype, device=device)
    here = likelihood.linearized(origin)
    residual, rows = here.residual, here.rows()
    # Another place tells whether the residual is linear; its numbers are no round ones.
    elsewhere = 0.7 + torch.arange(origin.numel(), dtype=dtype, device=device).sin().reshape(shape)
    there = likelihood.linearized(elsewhere)
    table = here.flat(rows)
    single = bool(((table != 0).sum(-1) <= 1).all())
    if not (single and torch.allclose(rows, there.rows())):
        raise ValueError(
            "likelihood: got observations that mix coordinates of x_0 or are not linear in them, expected "
            "Normal observations of single coordinates (MMPS or PiGDM take any Normal program)"
        )
    precision = rows.square().sum(0)
    return torch.where(precision > 0, here.combined(rows, residual) / precision, 0.0), precision
