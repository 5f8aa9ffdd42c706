"""Symbols in continuous time: the continuous-time Markov chain as a Pyro distribution over data."""

from typing import ClassVar

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import kept_uniform
from pyro_diffusion.distributions.continuous import ContinuousDistribution
from pyro_diffusion.distributions.decoders import Decoder
from pyro_diffusion.distributions.shape_runs import shapes_only
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.levels import Rates
from pyro_diffusion.samplers import Ancestral, Sampler, simulate
from pyro_diffusion.samplers.base import check_sampler
from pyro_diffusion.validation import Shape, check_positive_int

__all__ = ["DiffusionCTMC"]


class DiffusionCTMC(ContinuousDistribution):
    r"""A model of symbols as a continuous-time Markov chain: the limit of :class:`Diffusion` for many steps.

    .. math::
        -\log p(x) \le KL(q(x_{t_1} | x) \| p(x_{t_1})) + \mathbb E_q[-\log p(x | x_{t_0})]
        + \int_0^1 \mathbb E_q \sum_i \sum_{y \ne x_{t,i}}
        \Big[\hat R_y - R_y + R_y \log \frac{R_y}{\hat R_y}\Big] dt .

    :math:`R_y` is the rate at which the reverse process of the datum jumps from :math:`x_{t,i}` to y, and
    :math:`\hat R_y` that of the denoiser's posterior (``divergence_rate`` of the process). Under masking the
    integrand is :math:`\tfrac{-\alpha'}{1 - \alpha} \sum_{i\ \text{masked}} -\log p(x_i | x_t)`, and for a
    network that ignores the level the whole bound is the negative log-likelihood of autoregression, averaged
    over all orders of the symbols.

    ``log_prob`` is an *unbiased estimate of this bound* from one network evaluation per datum, at
    low-discrepancy times; its randomness is drawn once per instance, as in :class:`Diffusion`. The bound is
    tight for the exact posterior, and depends on the schedule through its two ends alone: parameters of a
    schedule get no gradient. Times are the squares of evenly spread numbers: the integrand is like
    :math:`1/(1-\alpha)` with probability :math:`1 - \alpha`, of infinite variance at uniform times.

    What would exponentiate the estimate is refused, as :class:`Diffusion` has it.

    :meth:`sample` goes along a uniform grid of ``steps`` with a sampler and decodes. ``Ancestral()`` takes
    the posterior as constant over each step (tau-leaping of the posterior; several symbols may jump in a
    step, from one posterior, so the result is right as the number of steps grows).
    :class:`~pyro_diffusion.samplers.FirstHitting` is exact under masking, in as many steps as there are
    symbols.

    The network is trained only if Pyro sees it, as with any view: ``pyro.module("denoiser", denoiser)``.

    Args:
        denoiser: posterior p(x_0 | x_t) of a categorical process.
        event_shape: shape of one datum; its length is the process's ``event_dim``.
        steps: number of steps that :meth:`sample` takes; the bound has none.
        sampler: used by :meth:`sample`; ancestral by default.
        decoder: p(x | x_{t_0}); categorical by default.
        context: tensors for the denoiser; their batch shapes broadcast into this distribution's.
        validate_args: whether to check arguments and values; Pyro's global setting by default.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> from pyro_diffusion.denoisers import TableDenoiser
        >>> from pyro_diffusion.processes import Absorbing
        >>> from pyro_diffusion.schedules import Rectified
        >>> joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]])
        >>> denoiser = TableDenoiser(Absorbing(Rectified.full(), states=2), joint)
        >>> diffusion = DiffusionCTMC(denoiser, (2,), steps=10)
        >>> diffusion.log_prob(torch.zeros(7, 2, dtype=torch.int64)).shape
        torch.Size([7])
        >>> diffusion.sample((3,)).shape
        torch.Size([3, 2])

    References:
        Campbell et al., arXiv 2205.14987 (bound, tau-leaping); Lou et al., arXiv 2310.16834; Sahoo et al.
        (MDLM), arXiv 2406.07524; Shi et al. (MD4), arXiv 2406.04329.
    """

    _arguments: ClassVar[tuple[str, ...]] = ("steps", "sampler", "decoder", "context")
    _shown: ClassVar[tuple[str, ...]] = ("steps",)
    _needs = Ability.JUMPS

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        steps: int = 1000,
        *,
        sampler: Sampler | None = None,
        decoder: Decoder | None = None,
        context: dict[str, Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.steps = check_positive_int("steps", steps)
        self.sampler = Ancestral() if sampler is None else check_sampler(sampler)
        super().__init__(
            denoiser, event_shape, decoder=decoder, context=context, validate_args=validate_args
        )

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Data from the model, sample + batch + event, through the sampler and the decoder."""
        if shapes_only():
            return self._example(sample_shape)
        with torch.no_grad():
            x, context = self.with_context(self._prior_draw(sample_shape))
            times = kept_uniform(self.steps, self._time_dtype(x))
            return self._decoded(simulate(self.denoiser, times, x, self.sampler, context))

    def _time(self, position: Tensor) -> tuple[Tensor, Tensor]:
        return position.square(), 2 * position

    def _rates(self, t: Tensor) -> tuple[Rates, None]:
        # Draws of symbols carry no gradient to the schedule, so half of one would be wrong.
        with torch.no_grad():
            return self.denoiser.process.rates(t), None
