"""Variances per coordinate from networks of their own, fitted by regression on a frozen mean."""

import math
from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor

from pyro_diffusion.denoisers.analytic import LEAST_LOG_RATIO
from pyro_diffusion.denoisers.variances import Variance, unit_variance
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import Shape, check_number

__all__ = ["NPR", "SN", "HeadNormal", "NoiseHead"]


class NoiseHead(Variance):
    r"""A head F that predicts a second moment h of the noise given x_t, and the variance that follows.

    h is fitted by regression on a frozen mean (:class:`~pyro_diffusion.distributions.MomentRegression`). F is
    clamped to [-``limit``, ``limit``] and enters by its exponential, so h is positive and an untrained head
    (F = 0) is a sensible one.

    Args:
        limit: bound on the absolute value of F, in (0, 80].

    Raises:
        ValueError: for a limit outside.
    """

    outputs = 1

    def __init__(self, limit: float = 15.0) -> None:
        super().__init__()
        self.limit = check_number("limit", limit, above=0, at_most=80)

    def moment(self, head: Tensor, level: Level, noise: Tensor) -> Tensor:
        """h, positive, of the head's shape.

        Args:
            head: F.
            level: the schedule at t, broadcast against events.
            noise: eps_hat.
        """
        raise NotImplementedError

    def target(self, error: Tensor, noise: Tensor) -> Tensor:
        """What h is regressed on.

        Args:
            error: eps - eps_hat.
            noise: eps_hat.
        """
        raise NotImplementedError

    def unit(self, level: Level) -> Tensor:
        """What errors of h are measured in, of the level's shape."""
        raise NotImplementedError

    def forward(self, head: Tensor | None, level: Level, noise: Tensor | None = None) -> Tensor:
        """Per-coordinate variance."""
        if head is None or noise is None:
            raise ValueError(
                f"variance: got {type(self).__name__} in another denoiser, expected "
                "VarianceDenoiser(denoiser, variance, network)"
            )
        return self.posterior_variance(head, level, noise)

    def posterior_variance(self, head: Tensor, level: Level, noise: Tensor) -> Tensor:
        """Per-coordinate variance, from the head and eps_hat."""
        return self._exp(head) * unit_variance(level)

    def _exp(self, head: Tensor) -> Tensor:
        return head.clamp(-self.limit, self.limit).exp()


class NPR(NoiseHead):
    r"""Noise prediction residual: h = E[(eps - eps_hat)^2 | x_t] per coordinate, so

    .. math:: v = \frac{\sigma^2}{\alpha^2}\,h = E[(x_0 - \hat x_0)^2 | x_t], \qquad
              h = e^F \frac{\alpha^2}{\alpha^2 + \sigma^2}.

    The posterior variance where the mean is exact, and the best normal for the bound where it is not.

    Args:
        limit: bound on the absolute value of F.

    References:
        Bao et al., arXiv 2206.07309, section 3.2.
    """

    def moment(self, head: Tensor, level: Level, noise: Tensor) -> Tensor:
        """h, the mean squared residual."""
        return self._exp(head) * self.unit(level)

    def target(self, error: Tensor, noise: Tensor) -> Tensor:
        """The squared residual."""
        return error.square()

    def unit(self, level: Level) -> Tensor:
        """alpha^2 / (alpha^2 + sigma^2)."""
        return torch.sigmoid(level.log_snr)


class SN(NoiseHead):
    r"""Squared noise: h = E[eps^2 | x_t] per coordinate, so

    .. math:: v = \frac{\sigma^2}{\alpha^2}\big(h - \hat\epsilon^2\big),

    clipped to :math:`[e^{-15} \sigma^2/(\alpha^2+\sigma^2),\ \text{largest}]`: the posterior variance where
    the mean is exact.

    As in the paper :math:`h = e^F`. Where h and eps_hat^2 nearly cancel, errors of h are amplified: at low
    log-SNR, and at high log-SNR for data on a lattice. With ``skip`` the network is asked for the
    difference alone, :math:`h = \hat\epsilon^2 + e^F \alpha^2/(\alpha^2+\sigma^2)`: the same regression,
    and a variance that needs no clip. An imperfect mean has an error that h does not see; :class:`NPR` does.

    Args:
        limit: bound on the absolute value of F.
        skip: whether eps_hat^2 is added to what the network says.
        largest: largest posterior variance, :math:`((b-a)/2)^2` of data in [a, b]; no limit by default.

    Raises:
        ValueError: if ``largest`` is not positive.

    References:
        Bao et al., arXiv 2206.07309, section 3.1; the clip of bounded data is arXiv 2201.06503's, theorem 2.
    """

    def __init__(
        self, limit: float = 15.0, skip: bool = False, largest: float | None = None
    ) -> None:
        super().__init__(limit)
        self.skip = bool(skip)
        if largest is not None:
            check_number("largest", largest, above=0)
        self.largest = largest

    def moment(self, head: Tensor, level: Level, noise: Tensor) -> Tensor:
        """h, the mean squared noise."""
        if not self.skip:
            return self._exp(head)
        return noise.detach().square() + self._exp(head) * torch.sigmoid(level.log_snr)

    def target(self, error: Tensor, noise: Tensor) -> Tensor:
        """The squared noise itself."""
        return (error + noise).square()

    def unit(self, level: Level) -> Tensor:
        """1."""
        return torch.ones_like(level.log_snr)

    def posterior_variance(self, head: Tensor, level: Level, noise: Tensor) -> Tensor:
        """Per-coordinate variance, clipped."""
        if self.skip:
            v = super().posterior_variance(head, level, noise)
        else:
            v = (-level.log_snr).exp() * (self.moment(head, level, noise) - noise.square())
            v = torch.maximum(v, math.exp(LEAST_LOG_RATIO) * unit_variance(level))
        return v if self.largest is None else v.clamp(max=self.largest)


class HeadNormal(Normal):
    """The normal of a head, which remembers the network's output so that it can be fitted.

    Args:
        loc: posterior mean.
        scale: posterior standard deviation.
        moment: h.
        noise: eps_hat.
        head: the head that made them.
    """

    def __init__(
        self, loc: Tensor, scale: Tensor, moment: Tensor, noise: Tensor, head: NoiseHead
    ) -> None:
        self.moment, self.noise, self.head = moment, noise, head
        super().__init__(loc, scale, validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Normal:
        """The plain normal at a larger batch shape."""
        return Normal(self.loc, self.scale, validate_args=False).expand(batch_shape)
