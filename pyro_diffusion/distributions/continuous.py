"""What the views in continuous time share: a bound whose reverse term is an integral over time."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import kept_uniform
from pyro_diffusion.distributions.bounded import BoundedDistribution
from pyro_diffusion.distributions.decoders import Decoder
from pyro_diffusion.distributions.objectives import DecoderStep
from pyro_diffusion.processes import Ability, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.levels import Rates
from pyro_diffusion.validation import Shape, check_expands, check_tensor, check_times

__all__ = ["ContinuousDistribution"]


class ContinuousDistribution(BoundedDistribution):
    r"""A latent path in continuous time, whose reverse term is the integral of the process's divergence rate.

    A subclass says what the process has to be (``_needs``), and may say at which times positions evaluate
    the network (``_time``) and how slopes get their gradients (``_rates``).

    Args:
        denoiser: posterior p(x_0 | x_t).
        event_shape: shape of one datum.
        decoder: p(x | x_{t_0}); by default normal for Gaussian processes, categorical otherwise.
        context: tensors for the denoiser.
        validate_args: whether to check arguments and values.
    """

    _needs: ClassVar[Ability]

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        *,
        decoder: Decoder | None,
        context: dict[str, Tensor] | None,
        validate_args: bool | None,
    ) -> None:
        if isinstance(denoiser, Denoiser):
            needs, by = self._needs, type(denoiser).__name__
            require(denoiser.process, needs, argument="denoiser", by=by)
        super().__init__(
            denoiser,
            event_shape,
            times=kept_uniform(1, torch.get_default_dtype()),
            decoder=decoder,
            objective=None,
            context=context,
            validate_args=validate_args,
        )

    def bound_terms(self, value: Tensor, t: Tensor | float) -> Tensor:
        r"""The reverse term's integrand at given times, from a fresh draw of its noise (nats per unit t).

        Args:
            value: data, sample + batch + event.
            t: times in [0, 1], a number or one per datum.

        Returns:
            The process's ``divergence_rate`` at x_t, sample + batch; unbiased. For real numbers it is
            :math:`\tfrac12 (-\lambda'(t)) e^{\lambda(t)} \|x_0 - \hat x_0(x_t)\|^2`. Its integral over t is
            the reverse term.

        Raises:
            ValueError: for data of a wrong shape or outside the support, or times outside [0, 1].
        """
        x0, batch = self._encoded(value)
        if isinstance(t, Tensor):
            check_expands("t", check_tensor("t", t), batch)
        t = torch.as_tensor(t, dtype=self._time_dtype(x0), device=x0.device).expand(batch)
        if self._validate_args:
            check_times("t", t)
        return self._terms_at(value, x0, t)[1]

    def _time(self, position: Tensor) -> tuple[Tensor, Tensor | float]:
        """The time that a position in [0, 1) stands for, and its derivative."""
        return position, 1.0

    def _rates(self, t: Tensor) -> tuple[Rates, Any]:
        """Levels and slopes at times; and what multiplies their gradients by its ``factor``, or None."""
        return self.denoiser.process.rates(t), None

    def _costs(self, value: Tensor, x0: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        t, stretch = self._time(position.clamp(min=0))
        decoding, rate = self._terms_at(value, x0, t)
        return decoding, rate * stretch

    def _terms_at(self, value: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both costs of one evaluation of the network at times: the decoder's and the reverse rate."""
        process, event_dim = self.denoiser.process, len(self.event_shape)
        rates, gradient = self._rates(t.to(self._time_dtype(x0)))
        level = rates.level
        xt = draw(process.marginal(x0, level))
        posterior = self.posterior(xt, level)
        last = DecoderStep(process, x0, xt, posterior, level, 1, self.decoder, value)
        decoding = self.objective.decoder_term(last)
        cost = process.divergence_rate(x0, xt, posterior, rates)
        if gradient is not None:
            gradient.factor = (2 * cost.detach()).reshape(cost.shape + (1,) * event_dim)
        return decoding, cost
