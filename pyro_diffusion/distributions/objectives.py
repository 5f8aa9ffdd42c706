"""What the terms of a chain are: those of the evidence lower bound, or weights on them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.decoders import Decoder
from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_finite

__all__ = ["Bound", "DecoderStep", "Objective", "ReverseStep", "Weighted", "divergence"]

Weight = Callable[[Tensor, Tensor, int], Tensor]


class ReverseStep(NamedTuple):
    """One step of a chain, from t to s < t, for a batch of data: what an objective's reverse term is of.

    Attributes:
        process: the forward process.
        x0: data as states at t = 0, batch + event.
        xt: a draw of q(x_t | x_0), batch + event.
        posterior: the denoiser's p(x_0 | x_t), of the same batch and event shape.
        s: the level that the step leads to, one per datum.
        t: the level of ``xt``, one per datum.
        steps: number K of steps of the whole chain.
    """

    process: ForwardProcess
    x0: Tensor
    xt: Tensor
    posterior: TorchDistribution
    s: Level
    t: Level
    steps: int


class DecoderStep(NamedTuple):
    """The last step of a chain, from t_0 to data: what an objective's decoder term is of.

    Attributes:
        process: the forward process.
        x0: data as states at t = 0, batch + event.
        xt: a draw of q(x_{t_0} | x_0), batch + event.
        posterior: the denoiser's p(x_0 | x_{t_0}), of the same batch and event shape.
        t: the level at t_0.
        steps: number K of steps of the whole chain.
        decoder: p(x | x_{t_0}).
        value: the data themselves, which broadcast with ``x0``.
    """

    process: ForwardProcess
    x0: Tensor
    xt: Tensor
    posterior: TorchDistribution
    t: Level
    steps: int
    decoder: Decoder
    value: Tensor


def divergence(q: TorchDistribution, p: TorchDistribution) -> Tensor:
    """KL(q || p), in closed form where torch has one, else unbiased from one draw of q."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        x = draw(q)
        return q.log_prob(x) - p.log_prob(x)


class Objective:
    r"""The cost that :class:`Diffusion` sums over a chain: a prior's, a decoder's and K reverse terms.

    .. math:: \text{prior} + \text{decoder}(t_0) + \sum_{j=1}^K \text{reverse}(t_j \to t_{j-1}),

    each a number per datum, at a draw of :math:`x_t \sim q(x_t | x_0)`. ``Diffusion.log_prob`` estimates
    minus this sum from one of its terms.

    **Implementing an objective.** Implement :meth:`reverse_term`. The decoder's term is
    :math:`-\log p(x | x_{t_0})` and the prior's :math:`KL(q(x_{t_K}|x_0) \| p(x_{t_K}))` unless you say
    otherwise. Where you do, implement :meth:`decoder_baseline`, too: what the decoder's term is known to be
    before data are seen is added in full and not drawn. An objective that is the same error at
    every level, :math:`t_0` included, is a ``Regression``. Refuse unsuitable models in :meth:`check`.

    Attributes:
        is_bound: whether the sum is minus a lower bound of log p(x).
        decoder_share: least share of a batch for which the network is evaluated for the decoder's term. A
            fair share of one in K + 1 would leave the bound's decoder term to rare, enormous draws.

    Example:
        >>> from pyro_diffusion.denoisers import GaussianDenoiser
        >>> from pyro_diffusion.distributions import Diffusion
        >>> from pyro_diffusion.nn import MLP
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> class Likeliest(Objective):
        ...     '''The negative log-density of one draw of the bridge, in place of a divergence.'''
        ...     def reverse_term(self, step):
        ...         bridge = step.process.bridge(step.xt, step.x0, step.s, step.t)
        ...         kernel = step.process.reverse(step.xt, step.posterior, step.s, step.t)
        ...         return -kernel.log_prob(draw(bridge))
        >>> denoiser = GaussianDenoiser(MLP(2), GaussianProcess(Cosine()))
        >>> diffusion = Diffusion(denoiser, event_shape=(2,), steps=50, objective=Likeliest())
        >>> diffusion.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
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

    def reverse_term(self, step: ReverseStep) -> Tensor:
        """Cost of the step from t to s, batch shape."""
        raise NotImplementedError

    def decoder_term(self, step: DecoderStep) -> Tensor:
        """Cost of the step from t_0 to data, batch shape: -log p(x | x_{t_0})."""
        decoder = step.decoder(step.posterior, step.t, step.process)
        out: Tensor = decoder.log_prob(step.value)
        return -out

    def decoder_baseline(
        self, decoder: Decoder, t: Level, event_shape: torch.Size
    ) -> Tensor | float:
        """What :meth:`decoder_term` comes to before any datum is seen; it only lowers the variance."""
        return decoder.baseline(t, event_shape)

    def prior_term(
        self, process: ForwardProcess, x0: Tensor, end: Level, prior: TorchDistribution
    ) -> Tensor:
        """Cost of the chain's start, batch shape: KL(q(x_{t_K} | x_0) || p(x_{t_K})).

        Args:
            process: the forward process.
            x0: data as states at t = 0, batch + event.
            end: the level at t_K.
            prior: p(x_{t_K}), at the batch shape of ``x0``.
        """
        return divergence(process.marginal(x0, end), prior)


class Bound(Objective):
    r"""The evidence lower bound: :math:`KL(q(x_s | x_t, x_0) \,\|\, p(x_s | x_t))` per step (nats).

    Under a :class:`~pyro_diffusion.processes.GaussianProcess` the bridge is
    :math:`q(x_s | x_t, x_0) = \mathcal N(r x_t + k x_0, v)`, and the reverse kernel of a point mass at
    :math:`\hat x_0` has the same variance v (``GaussianProcess.coefficients`` and ``combine`` are this
    algebra). The KL of two normals of equal variance is half the squared distance of their means over v,

    .. math:: KL = \sum_i \frac{k_i^2}{2 v_i} (x_0 - \hat x_0)_i^2
              = \sum_i \tfrac12 \big(e^{\lambda_{s,i}} - e^{\lambda_{t,i}}\big) (x_0 - \hat x_0)_i^2 :

    the weight of a squared error is half of the signal-to-noise ratio that is lost between s and t, per
    coordinate i. For a posterior with a variance it is the KL of normals of different variances.

    References:
        Ho et al., arXiv 2006.11239, equation 5; Kingma et al., arXiv 2107.00630, equation 14.
    """

    is_bound = True

    def decoder_term(self, step: DecoderStep) -> Tensor:
        """-log p(x | x_{t_0}), batch shape."""
        step.process.check_density()
        return super().decoder_term(step)

    def prior_term(
        self, process: ForwardProcess, x0: Tensor, end: Level, prior: TorchDistribution
    ) -> Tensor:
        """The divergence of the chain's start, batch shape."""
        process.check_density()
        return super().prior_term(process, x0, end, prior)

    def reverse_term(self, step: ReverseStep) -> Tensor:
        """The divergence of the step, batch shape."""
        process = step.process
        process.check_density()
        bridge = process.bridge(step.xt, step.x0, step.s, step.t)
        return divergence(bridge, process.reverse(step.xt, step.posterior, step.s, step.t))


class Weighted(Bound):
    r"""The bound's terms under weights: :math:`\sum_j w(\lambda_{s_j}, \lambda_{t_j}, K)\, KL_j`.

    Not a bound of log p(x) in general. When :math:`w` grows with t (falls with the log-SNR) it is one, up
    to a constant, averaged over noisy copies of the data (arXiv 2303.00848, section 3): weighting that way
    trains a likelihood of augmented data.

    Args:
        weight: ``weight(log_snr_s, log_snr_t, steps)``, a tensor of the levels' shape. A step has one weight,
            at the log-SNR of the levels' clock, also where noise differs by coordinate.
        mean_only: whether the posterior is replaced by a point mass at its mean, so that the weights act on
            squared errors alone.
    """

    is_bound = False

    def __init__(self, weight: Weight, mean_only: bool = False) -> None:
        self.weight, self.mean_only = weight, mean_only

    def check(self, denoiser: Denoiser) -> None:
        """Any process; one of real numbers if only the mean counts."""
        if self.mean_only:
            needs_mean(self, denoiser)

    def reverse_term(self, step: ReverseStep) -> Tensor:
        """The weighted divergence of the step, batch shape."""
        if self.mean_only:
            step = step._replace(posterior=step.process.point_mass(step.posterior.mean))
        term = super().reverse_term(step)
        weight = self.weight(step.s.clock, step.t.clock, step.steps)
        if weight.device.type == "cpu":  # elsewhere a check would cost a wait
            check_finite("weight", weight)
        return weight.reshape(weight.shape[: term.dim()]) * term


def needs_mean(objective: Objective, denoiser: Denoiser, *further: Ability) -> None:
    """Refuse symbols: an objective of errors of the data needs a mean, and perhaps something else.

    Raises:
        ValueError: for a process that lacks an ability.
    """
    require(
        denoiser.process,
        *(Ability.NUMBERS, *further),
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
