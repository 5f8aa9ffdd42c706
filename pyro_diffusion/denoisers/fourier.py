"""Networks whose output gives a posterior of several modes over real data."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.denoisers.base import NetworkDenoiser, check_outputs
from pyro_diffusion.denoisers.fourier_density import FourierDensity
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_number, check_positive_int

__all__ = ["FourierDenoiser"]


class FourierDenoiser(NetworkDenoiser):
    r"""Posterior with a Fourier density of its own for every coordinate.

    .. math:: x_{0,i} = m_i + b\,v_i \tanh^{-1} u_i, \qquad
              p(u_i) \propto \Big| 1 + F_{i0} + \sum_{k=1}^N F_{ik}\, e^{-ik\pi u_i} \Big|^2,

    with complex outputs F of the network at :math:`c_{in} x_t`. Here
    :math:`m = \alpha x_t / (\alpha^2 + \sigma^2)` and :math:`v = \sigma / \sqrt{\alpha^2 + \sigma^2}` are the
    posterior mean and standard deviation of standard normal data: at any level the density is as fine as the
    noise. Its mean and variance, in closed form, enter the reverse kernel, and at t_0 the whole density is
    the decoder's (:class:`~pyro_diffusion.distributions.NormalDecoder` leaves it as it is). A chain may then
    end at a level where a normal posterior is wrong, because data have modes or atoms that the noise hides.

    Args:
        network: returns ``2 (degree + 1)`` numbers per coordinate on a last dimension. One that returns zeros
            is a logistic distribution, of about the standard deviation .9 b v.
        process: one of real numbers and linear states, such as a Gaussian process.
        degree: the largest frequency N.
        scale: b.
        context_event_dims: see :class:`NetworkDenoiser`.

    Raises:
        ValueError: for a degree below 1, a scale outside (0, 1e6], a process of another kind, or a
            network's output of another shape.

    References:
        De la Fuente, Singh and Ballé, Fourier Basis Density Model, arXiv 2402.15345 (the density).
    """

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        degree: int = 14,
        scale: float = 2.0,
        context_event_dims: dict[str, int] | None = None,
    ) -> None:
        super().__init__(network, process, context_event_dims)
        require(process, Ability.NUMBERS, Ability.LINEAR, argument="process")
        self.degree = check_positive_int("degree", degree)
        self.scale = check_number("scale", scale, above=0, at_most=1e6)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level = self.process.level(t, xt, state="xt")
        total = torch.hypot(level.alpha, level.sigma)
        outputs = 2 * (self.degree + 1)
        out = self.network_output(xt / total, level.clock, context)
        out = check_outputs(out, xt, outputs).unflatten(-1, (self.degree + 1, 2))
        one = torch.zeros_like(out[(0,) * xt.dim()])
        one[0, 0] = 1
        loc, scale = level.alpha / total.square() * xt, self.scale * level.sigma / total
        density = FourierDensity(out + one, loc, scale.expand_as(xt), validate_args=False)
        return density.to_event(self.process.event_dim)
