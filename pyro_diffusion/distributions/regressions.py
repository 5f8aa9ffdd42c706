"""Objectives that are squared errors of a denoiser: they train mean and variance, and bound nothing."""

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, VarianceDenoiser
from pyro_diffusion.denoisers.variance_heads import HeadNormal, NoiseHead
from pyro_diffusion.distributions.decoders import Decoder
from pyro_diffusion.distributions.objectives import (
    Bound,
    DecoderStep,
    Objective,
    ReverseStep,
    needs_mean,
)
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["FlowMatching", "Hybrid", "MomentRegression", "Regression", "Simple"]


class Regression(Objective):
    r"""One error of the denoiser at every level: :math:`\sum_{j=0}^K \text{error}(x_{t_j})`.

    The error at :math:`t_0` stands in the place of :math:`-\log p(x | x_{t_0})`. Not a bound. A subclass
    implements :meth:`error`, elementwise in the levels' scales, which may differ by coordinate. Processes of
    real numbers only.

    Example:
        >>> class Absolute(Regression):
        ...     '''The mean absolute error of the data.'''
        ...     def error(self, step):
        ...         return (step.x0 - step.posterior.mean).abs().sum(-1) / step.steps
    """

    decoder_share = 0.0

    def check(self, denoiser: Denoiser) -> None:
        """A process of real numbers."""
        needs_mean(self, denoiser)

    def error(self, step: ReverseStep | DecoderStep) -> Tensor:
        """The error at ``step.t``, batch shape."""
        raise NotImplementedError

    def prior_term(
        self, process: ForwardProcess, x0: Tensor, end: Level, prior: TorchDistribution
    ) -> Tensor:
        """That of a chain, batch shape; 0 under processes without bridges that draw, which bound nothing."""
        if not {Ability.INDEPENDENT, Ability.FREE_VARIANCE} <= process.abilities:
            return x0.new_zeros(x0.shape[: x0.dim() - process.event_dim])
        return super().prior_term(process, x0, end, prior)

    def reverse_term(self, step: ReverseStep) -> Tensor:
        """The error at t, batch shape."""
        return self.error(step)

    def decoder_term(self, step: DecoderStep) -> Tensor:
        """The error at t_0, batch shape."""
        return self.error(step)

    def decoder_baseline(
        self, decoder: Decoder, t: Level, event_shape: torch.Size
    ) -> Tensor | float:
        """0: errors are of no known size."""
        return 0.0


class Simple(Regression):
    r"""DDPM's L_simple, the squared error of the noise:

    .. math:: \tfrac1K\sum_{j=0}^K \|\epsilon - \hat\epsilon(x_{t_j})\|^2
              = \tfrac1K\sum_{j=0}^K \sum_i e^{\lambda_{t_j,i}} (x_0 - \hat x_0(x_{t_j}))_i^2 .

    It is the bound's term of a point mass (see :class:`Bound`) under the weight
    :math:`2 / (K (e^{\lambda_s - \lambda_t} - 1))` for each coordinate. Its error at :math:`t_0`
    stands in place of log p(x | x_{t_0}), as in DDPM. Gaussian processes only. The variance,
    if any, is not trained (use :class:`Hybrid`).

    References:
        Ho et al., arXiv 2006.11239, equation 14.
    """

    def check(self, denoiser: Denoiser) -> None:
        """A process of real numbers in states that are linear in the data: a squared error of noise."""
        needs_mean(self, denoiser, Ability.LINEAR)

    def error(self, step: ReverseStep | DecoderStep) -> Tensor:
        """The squared error of the noise at t over the number of steps, batch shape."""
        error = step.t.log_snr.exp() * (step.x0 - step.posterior.mean).square()
        return sum_rightmost(error, step.process.event_dim) / step.steps


class FlowMatching(Regression):
    r"""Flow matching, the squared error of the velocity along straight paths:

    .. math:: \tfrac1K\sum_{j=0}^K \|(\epsilon - x_0) - \hat v(x_{t_j})\|^2
              = \tfrac1K\sum_{j=0}^K \sum_i \big(1 + e^{\lambda_{t_j,i}/2}\big)^2 (x_0 - \hat x_0)_i^2 ,

    for :math:`x_t/(\alpha_t + \sigma_t)`, the straight path under any schedule, and
    :math:`\hat v = \hat\epsilon - \hat x_0`. Unlike :class:`Simple` it keeps the error of the data where
    noise prevails, which decides samples of few steps. For processes x_t = alpha x_0 + sigma eps; the
    variance, if there is one, is not trained. Not a bound. Its error at :math:`t_0` stands in place of
    log p(x | x_{t_0}).

    Example:
        >>> from pyro_diffusion import Diffusion, GaussianDenoiser, MLP, processes, schedules
        >>> from pyro_diffusion.denoisers import Velocity
        >>> process = processes.GaussianProcess(schedules.Rectified())
        >>> denoiser = GaussianDenoiser(MLP(2), process, Velocity())
        >>> site = Diffusion(denoiser, (2,), steps=100, objective=FlowMatching())

    References:
        Lipman et al., arXiv 2210.02747, equation 23; Liu et al. (rectified flow), arXiv 2209.03003.
    """

    def check(self, denoiser: Denoiser) -> None:
        """A process of real numbers in states that are linear in the data."""
        needs_mean(self, denoiser, Ability.LINEAR)

    def error(self, step: ReverseStep | DecoderStep) -> Tensor:
        """The squared error of the velocity at t over the number of steps, batch shape."""
        weight = (1 + (0.5 * step.t.log_snr).exp()).square()
        error = weight * (step.x0 - step.posterior.mean).square()
        return sum_rightmost(error, step.process.event_dim) / step.steps


class Hybrid(Objective):
    r"""L_simple for the mean, the bound for the variance: :math:`L_{simple} + \gamma L_{vlb}`.

    The mean is detached inside :math:`L_{vlb}`, decoder's term included, so the bound trains the variance
    head alone. Needs a denoiser with a variance.

    Args:
        gamma: weight of the bound's terms, > 0.

    Raises:
        ValueError: if gamma is not positive or, when called, the posterior is a point mass.

    References:
        Nichol & Dhariwal, arXiv 2102.09672, section 3.1 (gamma = 0.001).
    """

    decoder_share = 0.0

    def __init__(self, gamma: float = 1e-3) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma: got {gamma}, expected a number > 0")
        self.gamma, self._simple, self._bound = float(gamma), Simple(), Bound()

    def check(self, denoiser: Denoiser) -> None:
        """As L_simple, and a denoiser with a variance."""
        needs_mean(self, denoiser, Ability.LINEAR)
        if denoiser.point_mass:
            raise ValueError(
                f"objective: got Hybrid with a point mass, the posterior of {type(denoiser).__name__}, "
                "expected a denoiser with a variance (or Simple(), which trains none)"
            )

    def reverse_term(self, step: ReverseStep) -> Tensor:
        """Both parts, batch shape."""
        bound = self._bound.reverse_term(step._replace(posterior=_fixed_mean(step)))
        return self._simple.error(step) + self.gamma * bound

    def decoder_term(self, step: DecoderStep) -> Tensor:
        """Both parts, batch shape."""
        bound = self._bound.decoder_term(step._replace(posterior=_fixed_mean(step)))
        return self._simple.error(step) + self.gamma * bound

    def decoder_baseline(
        self, decoder: Decoder, t: Level, event_shape: torch.Size
    ) -> Tensor | float:
        """The bound's, in its share."""
        return self.gamma * self._bound.decoder_baseline(decoder, t, event_shape)


class MomentRegression(Regression):
    r"""Regression of a variance head's moment h on the noise it is the mean of: fits SN and NPR.

    .. math:: \tfrac1K \sum_{j=0}^K \|(h(x_{t_j}) - y)/c\|^2 \quad\text{or}\quad
              \tfrac1K \sum_{j=0}^K \sum_i \Big[\frac{y_i}{h_i} + \log\frac{h_i}{c}\Big],

    y = :math:`(\epsilon - \hat\epsilon)^2` for NPR and :math:`\epsilon^2` for SN, per coordinate; c is the
    head's ``unit`` for errors of h. Both are least at h = E[y | x_t]. The second, the deviance of a gamma
    distribution, weighs *relative* errors: it suits moments that range over orders of magnitude, as NPR's do
    on data with certain coordinates. Not a bound. The mean gets no gradient. The denoiser is a
    :class:`~pyro_diffusion.denoisers.VarianceDenoiser` with a head, :class:`~pyro_diffusion.denoisers.SN` or
    :class:`~pyro_diffusion.denoisers.NPR`.

    Args:
        deviance: whether to take the second form.

    Raises:
        ValueError: when called, if the posterior comes from another denoiser.

    References:
        Bao et al., arXiv 2206.07309, equations 12 and 15 (the squares).
    """

    def __init__(self, deviance: bool = False) -> None:
        self.deviance = bool(deviance)

    def check(self, denoiser: Denoiser) -> None:
        """A denoiser whose variance is a head that is fitted by regression."""
        needs_mean(self, denoiser, Ability.LINEAR)
        if not isinstance(denoiser, VarianceDenoiser):
            got = type(denoiser).__name__
        elif not isinstance(denoiser.variance, NoiseHead):
            got = f"VarianceDenoiser of variance {type(denoiser.variance).__name__}"
        else:
            return
        raise ValueError(
            f"objective: got MomentRegression for a {got}, expected a VarianceDenoiser with an NPR() or SN() "
            "head"
        )

    def error(self, step: ReverseStep | DecoderStep) -> Tensor:
        """The regression at t over the number of steps, batch shape."""
        base = per_coordinate(step.posterior)
        if not isinstance(base, HeadNormal):
            raise ValueError(
                f"objective: got MomentRegression for a {type(base).__name__}, expected the posterior of a "
                "VarianceDenoiser with an NPR() or SN() head"
            )
        error = (base.mean - step.x0) * (0.5 * step.t.log_snr).exp()
        unit = base.head.unit(step.t)
        target = base.head.target(error.detach(), base.noise.detach())
        if self.deviance:
            cost = target / base.moment + (base.moment / unit).log()
        else:
            cost = ((base.moment - target) / unit).square()
        return sum_rightmost(cost, step.process.event_dim) / step.steps


def _fixed_mean(step: ReverseStep | DecoderStep) -> TorchDistribution:
    """The posterior's normal with the mean detached."""
    base = per_coordinate(step.posterior)
    if isinstance(base, Delta):
        raise ValueError(
            "objective: got Hybrid with a point mass, expected a denoiser with a variance"
        )
    fixed = Normal(base.mean.detach(), base.variance.sqrt(), validate_args=False)
    return fixed.to_event(step.process.event_dim)
