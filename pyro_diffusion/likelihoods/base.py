"""What a likelihood is: log p(y | x_0) of fixed observations, as a function of x_0."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from pyro_diffusion.likelihoods.linearization import LinearizedLikelihood
from pyro_diffusion.likelihoods.whitening import Whitened

__all__ = ["Likelihood", "check_likelihood"]


class Likelihood(ABC):
    r"""log p(y | x_0) of fixed observations y, as a function of a diffusion's data x_0.

    Guidance, twisted SMC and DAPS ask nothing else of the observations.
    :class:`~pyro_diffusion.likelihoods.ProgramLikelihood` extracts one from a Pyro program.

    **Implementing a likelihood.** Set ``batch_shape`` and ``event_shape``, those of x_0, and implement
    :meth:`log_prob`. That is enough for ``PlugIn``, ``SampledGuidance``, ``SubstitutionGuidance``, twisted
    SMC and DAPS by Langevin moves. What linearizes (``MMPS``, ``PiGDM``, ``TMPD``, ``DiffPIR``,
    ``DataCovariance``, ``Replacement``, DAPS by exact draws) also needs :meth:`whitened`, the log-density as
    a sum of squares. Without a gradient in x_0 set ``differentiable = False``.

    Attributes:
        batch_shape: of x_0, plates included.
        event_shape: of one x_0.
        factorized: whether each datum has observations of its own, so that ``log_prob`` has the batch shape;
            otherwise all data are one joint datum, and the batch dimensions of ``log_prob`` are ones.
        differentiable: whether ``log_prob`` has a gradient in x_0.

    Example:
        >>> class Sum(Likelihood):
        ...     '''Observes y = x_1 + ... + x_d with standard normal noise.'''
        ...     def __init__(self, y, d):
        ...         self.y, self.batch_shape, self.event_shape = y, y.shape, torch.Size((d,))
        ...     def whitened(self, x0):
        ...         r = (self.y - x0.sum(-1)).unsqueeze(-1)
        ...         return Whitened(r, torch.full_like(r[..., 0], -0.9189))
        ...     def log_prob(self, x0):
        ...         r, log_normalizer = self.whitened(x0)
        ...         return log_normalizer - r.square().sum(-1) / 2
        >>> likelihood = Sum(torch.tensor([3.0, 5.0]), 2)
        >>> likelihood.log_prob(torch.ones(2, 2))
        tensor([-1.4189, -5.4189])
        >>> likelihood.residual(torch.ones(2, 2))
        tensor([[1.],
                [3.]])
    """

    batch_shape: torch.Size
    event_shape: torch.Size
    factorized: bool = True
    differentiable: bool = True

    @abstractmethod
    def log_prob(self, x0: Tensor) -> Tensor:
        """log p(y | x_0) in nats.

        Args:
            x0: sample + batch + event.

        Returns:
            sample + batch if the likelihood is ``factorized``, otherwise sample and ones.
        """

    def whitened(self, x0: Tensor) -> Whitened:
        """Residual and log-normalizer, by default refused.

        Args:
            x0: sample + batch + event.

        Raises:
            ValueError: if the likelihood has no such form.
        """
        raise ValueError(
            f"likelihood: got a {type(self).__name__} without residuals, expected one that implements "
            "`whitened` (PlugIn guidance and TwistedSMC take any likelihood)"
        )

    def residual(self, x0: Tensor) -> Tensor:
        r"""Whitened residual :math:`r(x_0)`, sample + batch + (m,), differentiable.

        Args:
            x0: sample + batch + event.

        Raises:
            ValueError: as :meth:`whitened`.
        """
        return self.whitened(x0).residual

    def log_normalizer(self, x0: Tensor) -> Tensor:
        r""":math:`\log p(y | x_0) + |r|^2/2` in nats, sample + batch, without cancellation.

        Args:
            x0: sample + batch + event.

        Raises:
            ValueError: as :meth:`whitened`.
        """
        return self.whitened(x0).log_normalizer

    def linearized(self, x0: Tensor) -> LinearizedLikelihood:
        r"""The residual at x_0 with products of its Jacobian, :math:`r(x) \approx r(x_0) - B(x - x_0)`.

        Args:
            x0: where, batch + event.

        Raises:
            ValueError: if the residual has no gradient, and as :meth:`whitened`.
        """
        return LinearizedLikelihood(self.whitened, x0)

    def sample_near(self, center: Tensor, variance: Tensor) -> Tensor:
        r"""A draw of x_0 from :math:`p(y | x_0)\,\mathcal N(x_0; c, v)`, linearized at the center c.

        Exact where the residual is an affine function of x_0.

        Args:
            center: c, batch + event.
            variance: v, one number or one for each coordinate.

        Raises:
            ValueError: as :meth:`linearized`.
        """
        return self.linearized(center).sample(variance)

    def with_residuals(self, residuals: str) -> Self:
        """The same likelihood with residuals of another kind; itself if it has one kind only.

        Args:
            residuals: ``"normal"`` or ``"deviance"``.
        """
        return self

    def check_gradient(self) -> None:
        """Refuse a likelihood without a gradient in x_0.

        Raises:
            ValueError: if there is none.
        """
        if not self.differentiable:
            raise ValueError(
                f"likelihood: got a {type(self).__name__} without a gradient in x_0, expected a "
                "differentiable one (use twisted SMC with a proposal that asks for no gradient)"
            )

    def site_value(self, x0: Tensor) -> Tensor:
        """x_0 as the user's data: by default itself, in a program the value of the diffusion site."""
        return x0


def check_likelihood(likelihood: object) -> Likelihood:
    """Refuse anything but a likelihood.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(likelihood, Likelihood):
        raise ValueError(
            f"likelihood: got {type(likelihood).__name__}, expected a Likelihood such as ProgramLikelihood"
        )
    return likelihood
