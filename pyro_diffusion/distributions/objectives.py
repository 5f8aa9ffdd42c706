"""What a chain's reverse terms are summed with: the bound itself, or weights on its terms."""

from collections.abc import Callable

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import Denoiser, VarianceDenoiser
from pyro_diffusion.denoisers.variance_heads import HeadNormal, NoiseHead
from pyro_diffusion.distributions.decoders import Decoder
from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["Bound", "Hybrid", "MomentRegression", "Objective", "Simple", "Weighted", "divergence"]

Weight = Callable[[Tensor, Tensor, int], Tensor]


def divergence(q: TorchDistribution, p: TorchDistribution) -> Tensor:
    """KL(q || p), in closed form where torch has one, else unbiased from one draw of q."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        x = draw(q)
        return q.log_prob(x) - p.log_prob(x)


class Objective:
    """The cost of one reverse step: a number per datum that :class:`Diffusion` sums over the chain.

    Attributes:
        is_bound: whether the sum is minus a lower bound of log p(x).
        decoder_share: least share of a batch whose network read goes to the decoder. A fair share of one
            in steps + 1 would leave the bound's decoder term to rare, enormous draws.
    """

    is_bound = False
    decoder_share = 1 / 16

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a model that the objective is not defined for; asked once, when a distribution is built.

        Args:
            denoiser: what is trained, and its process.

        Raises:
            ValueError: naming the objective and what it needs.
        """

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """Cost of the step from t to s, batch shape."""
        raise NotImplementedError

    def decoding(
        self,
        decoder: Decoder,
        value: Tensor,
        posterior: TorchDistribution,
        t: Level,
        process: ForwardProcess,
        steps: int,
    ) -> Tensor:
        """Cost of the decoder's term, batch shape: -log p(x | x_{t_0}), from the posterior at t_0."""
        return -decoder(posterior, t, process).log_prob(value)

    def baseline(self, decoder: Decoder, t: Level, event_shape: torch.Size) -> Tensor | float:
        """What :meth:`decoding` comes to before any datum is seen; it only lowers the variance."""
        return decoder.baseline(t, event_shape)


class Bound(Objective):
    r"""The evidence lower bound: :math:`KL(q(x_s | x_t, x_0) \,\|\, p(x_s | x_t))` (nats)."""

    is_bound = True

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """The divergence of the step, batch shape."""
        return divergence(process.bridge(xt, x0, s, t), process.reverse(xt, posterior, s, t))


class Weighted(Bound):
    r"""The bound's terms under weights: :math:`\sum_j w(\lambda_{s_j}, \lambda_{t_j}, K)\, KL_j`.

    Not a bound of log p(x) in general. When :math:`w` grows with t (falls with the log-SNR) it is one, up
    to a constant, averaged over noisy copies of the data (arXiv 2303.00848, section 3): weighting that way
    trains a likelihood of augmented data.

    Args:
        weight: ``weight(log_snr_s, log_snr_t, steps)``, a tensor of the levels' shape.
        mean_only: whether the posterior is replaced by a point mass at its mean, so that the weights act on
            squared errors alone.
    """

    is_bound = False

    def __init__(self, weight: Weight, mean_only: bool = False) -> None:
        self.weight, self.mean_only = weight, mean_only

    def check(self, denoiser: Denoiser) -> None:
        """Any process; one of real numbers if only the mean counts."""
        if self.mean_only:
            needs_numbers(self, denoiser)

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """The weighted divergence of the step, batch shape."""
        if self.mean_only:
            posterior = process.point_mass(posterior.mean)
        terms = super().__call__(process, xt, x0, posterior, s, t, steps)
        weight = self.weight(s.clock, t.clock, steps)
        return weight.reshape(weight.shape[: terms.dim()]) * terms


class Simple(Weighted):
    r"""DDPM's L_simple: :math:`\tfrac1K\sum_{j=0}^K \|\epsilon - \hat\epsilon(x_{t_j})\|^2`.

    With a point mass the bound's term is
    :math:`\tfrac12 (e^{\lambda_s - \lambda_t} - 1)\,\|\epsilon - \hat\epsilon\|^2`, so this is the weight
    :math:`2 / (K (e^{\lambda_s - \lambda_t} - 1))` on it. The decoder's read at :math:`t_0` is one of the
    errors, as in DDPM, in place of log p(x | x_{t_0}). Gaussian processes only. The variance, if any, is not
    trained (use :class:`Hybrid`).

    References:
        Ho et al., arXiv 2006.11239, equation 14.
    """

    decoder_share = 0.0

    def __init__(self) -> None:
        super().__init__(_noise_weight, mean_only=True)

    def decoding(
        self,
        decoder: Decoder,
        value: Tensor,
        posterior: TorchDistribution,
        t: Level,
        process: ForwardProcess,
        steps: int,
    ) -> Tensor:
        """The noise error at t_0, batch shape."""
        mean = posterior.mean
        error = (decoder.encode(value, mean.dtype) - mean).square() * t.log_snr.exp()
        return sum_rightmost(error, process.event_dim) / steps

    def baseline(self, decoder: Decoder, t: Level, event_shape: torch.Size) -> Tensor | float:
        """0: noise errors are of no known size."""
        return 0.0


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
        """A process of real numbers, and a denoiser with a variance."""
        needs_numbers(self, denoiser)
        if denoiser.point_mass:
            raise ValueError(
                f"objective: got Hybrid with a point mass, the posterior of {type(denoiser).__name__}, "
                "expected a denoiser with a variance (or Simple(), which trains none)"
            )

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """Both parts, batch shape."""
        fixed = _fixed_mean(posterior, process)
        simple = self._simple(process, xt, x0, posterior, s, t, steps)
        return simple + self.gamma * self._bound(process, xt, x0, fixed, s, t, steps)

    def decoding(
        self,
        decoder: Decoder,
        value: Tensor,
        posterior: TorchDistribution,
        t: Level,
        process: ForwardProcess,
        steps: int,
    ) -> Tensor:
        """Both parts at t_0, batch shape."""
        fixed = _fixed_mean(posterior, process)
        simple = self._simple.decoding(decoder, value, posterior, t, process, steps)
        bound = self._bound.decoding(decoder, value, fixed, t, process, steps)
        return simple + self.gamma * bound

    def baseline(self, decoder: Decoder, t: Level, event_shape: torch.Size) -> Tensor | float:
        """The bound's, in its share."""
        return self.gamma * self._bound.baseline(decoder, t, event_shape)


class MomentRegression(Objective):
    r"""Regression of a variance head's moment h on the noise it is the mean of: fits SN and NPR.

    .. math:: \tfrac1K \sum_{j=0}^K \|(h(x_{t_j}) - y)/c\|^2 \quad\text{or}\quad
              \tfrac1K \sum_{j=0}^K \sum_i \Big[\frac{y_i}{h_i} + \log\frac{h_i}{c}\Big],

    y = :math:`(\epsilon - \hat\epsilon)^2` for NPR and :math:`\epsilon^2` for SN, per coordinate; c is the
    head's ``unit`` for errors of h. Both are least at h = E[y | x_t]. The second, the deviance of a gamma
    law, weighs *relative* errors: it suits moments that range over orders of magnitude, as NPR's do on
    data with certain coordinates. Not a bound. The mean gets no gradient. The denoiser is a
    :class:`~pyro_diffusion.denoisers.VarianceDenoiser` with a head, :class:`~pyro_diffusion.denoisers.SN` or
    :class:`~pyro_diffusion.denoisers.NPR`.

    Args:
        deviance: whether to take the second form.

    Raises:
        ValueError: when called, if the posterior comes from another denoiser.

    References:
        Bao et al., arXiv 2206.07309, equations 12 and 15 (the squares).
    """

    decoder_share = 0.0

    def __init__(self, deviance: bool = False) -> None:
        self.deviance = bool(deviance)

    def check(self, denoiser: Denoiser) -> None:
        """A denoiser whose variance is a head that is fitted by regression."""
        needs_numbers(self, denoiser)
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

    def __call__(
        self,
        process: ForwardProcess,
        xt: Tensor,
        x0: Tensor,
        posterior: TorchDistribution,
        s: Level,
        t: Level,
        steps: int,
    ) -> Tensor:
        """The regression at t, batch shape."""
        return self._cost(x0, posterior, t, process.event_dim) / steps

    def decoding(
        self,
        decoder: Decoder,
        value: Tensor,
        posterior: TorchDistribution,
        t: Level,
        process: ForwardProcess,
        steps: int,
    ) -> Tensor:
        """The regression at t_0, batch shape."""
        x0 = decoder.encode(value, posterior.mean.dtype)
        return self._cost(x0, posterior, t, process.event_dim) / steps

    def baseline(self, decoder: Decoder, t: Level, event_shape: torch.Size) -> Tensor | float:
        """0: moments are of no known size."""
        return 0.0

    def _cost(self, x0: Tensor, posterior: TorchDistribution, t: Level, event_dim: int) -> Tensor:
        base = per_coordinate(posterior)
        if not isinstance(base, HeadNormal):
            raise ValueError(
                f"objective: got MomentRegression for a {type(base).__name__}, expected the posterior of a "
                "VarianceDenoiser with an NPR() or SN() head"
            )
        error = (base.mean - x0) * (0.5 * t.log_snr).exp()
        unit = base.head.unit(t)
        target = base.head.target(error.detach(), base.noise.detach())
        if self.deviance:
            cost = target / base.moment + (base.moment / unit).log()
        else:
            cost = ((base.moment - target) / unit).square()
        return sum_rightmost(cost, event_dim)


def needs_numbers(objective: Objective, denoiser: Denoiser) -> None:
    """Refuse symbols: an objective of squared errors needs a mean.

    Raises:
        ValueError: for a process that is not Gaussian.
    """
    require(
        denoiser.process,
        *(Ability.NUMBERS, Ability.LINEAR),
        argument="objective",
        by=type(objective).__name__,
        instead="Bound() or Weighted(weight)",
    )


def check_objective(objective: object, denoiser: Denoiser) -> Objective:
    """Refuse anything but an objective, and one that does not fit the denoiser.

    Raises:
        ValueError: for another object, and as :meth:`Objective.check`.
    """
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective: got {objective!r}, expected an Objective such as Bound() or Simple()"
        )
    objective.check(denoiser)
    return objective


def _noise_weight(s: Tensor, t: Tensor, steps: int) -> Tensor:
    return 2 / (steps * torch.expm1(s - t))


def _fixed_mean(posterior: TorchDistribution, process: ForwardProcess) -> TorchDistribution:
    """The posterior's normal with the mean detached."""
    base = per_coordinate(posterior)
    if isinstance(base, Delta):
        raise ValueError(
            "objective: got Hybrid with a point mass, expected a denoiser with a variance"
        )
    fixed = Normal(base.mean.detach(), base.variance.sqrt(), validate_args=False)
    return fixed.to_event(process.event_dim)
