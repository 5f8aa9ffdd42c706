r"""Guidance for readings of single coordinates: what was read replaces what the denoiser says."""

from typing import Any

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.analytic import check_gaussian
from pyro_diffusion.distributions.base import home
from pyro_diffusion.guidance.base import GuidedDenoiser, check_denoiser
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.base import check_likelihood
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["Replacement"]


class Replacement(GuidedDenoiser):
    r"""Replacement guidance: coordinates that were read follow the reading, the others the denoiser.

    For a program whose Normal sites read coordinates of :math:`x_0` one by one, :math:`x_i` at value
    :math:`y_i` with precision :math:`b_i` altogether,

    .. math::
        p(x_{0,i} | x_t, y) \approx \mathcal N\Big(
            \frac{b_i y_i + \alpha x_{t,i}/\sigma^2}{b_i + \alpha^2/\sigma^2},\;
            \frac{1}{b_i + \alpha^2/\sigma^2}\Big),

    the posterior of the reading and of x_t's evidence, a point mass at :math:`y_i` if there is no noise.
    So those coordinates walk back along the forward process of :math:`\mathcal N(y_i, 1/b_i)` exactly, and
    there is no need to noise y apart. The prior is not asked about them, nor do the others learn of y other
    than through x_t: exact only for exact readings of independent coordinates. Walk it with
    :class:`~pyro_diffusion.samplers.RePaint` to mend the latter. A point-mass denoiser gives a point mass.

    The program is run at construction alone; no gradient of the denoiser is asked for. There is no log-twist
    (:meth:`twisted` refuses): readings without noise have none.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a Gaussian process.
        likelihood: a :class:`~pyro_diffusion.likelihoods.ProgramLikelihood` of Normal sites, each reading
            coordinates of x_0, scaled or shifted at will.

    Raises:
        ValueError: for a process that is not Gaussian, a likelihood without a gradient, or a program that
            does not read single coordinates.

    References:
        Song et al., arXiv 2011.13456, appendix I.2; Lugmayr et al., arXiv 2201.09865.
    """

    reading: Tensor
    precision: Tensor

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood) -> None:
        check_gaussian(check_denoiser(denoiser))
        super().__init__(denoiser)
        self.likelihood = check_likelihood(likelihood)
        self.likelihood.check_gradient()
        reading, precision = _readings(likelihood, *home(denoiser))
        self.register_buffer("reading", reading, persistent=False)
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
        level = self.process.level(t, xt)
        with torch.no_grad():
            prior = self.denoiser(xt, level, **context)
            base, event_dim = per_coordinate(prior), prior.event_dim
            reading, precision = self.reading.to(xt), self.precision.to(xt)
            total = precision + level.alpha**2 / level.sigma**2
            mean = (precision * reading + level.alpha / level.sigma**2 * xt) / total
            read = precision > 0
            mean = torch.where(read, mean, base.mean)
            if isinstance(base, Delta):
                return Delta(mean, event_dim=event_dim, validate_args=False)
            variance = torch.where(read, 1 / total, base.variance)
            return Normal(mean, variance.sqrt(), validate_args=False).to_event(event_dim)


def _readings(
    likelihood: Likelihood, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """What was read of every coordinate and how precisely (0 if it was not), batch + event.

    Raises:
        ValueError: if a residual depends on several coordinates, or not linearly on one.
    """
    shape = (*likelihood.batch_shape, *likelihood.event_shape)
    origin = torch.zeros(shape, dtype=dtype, device=device)
    here = likelihood.linearized(origin)
    residual, rows = here.residual, here.rows()
    # Another place tells whether the reading is linear; its numbers are no round ones.
    elsewhere = 0.7 + torch.arange(origin.numel(), dtype=dtype, device=device).sin().reshape(shape)
    there = likelihood.linearized(elsewhere)
    table = here.flat(rows)
    single = bool(((table != 0).sum(-1) <= 1).all())
    if not (single and torch.allclose(rows, there.rows())):
        raise ValueError(
            "likelihood: got observations that mix coordinates of x_0 or are not linear in them, expected "
            "Normal readings of single coordinates (MMPS or PiGDM take any Normal program)"
        )
    precision = rows.square().sum(0)
    return torch.where(precision > 0, here.combined(rows, residual) / precision, 0.0), precision
