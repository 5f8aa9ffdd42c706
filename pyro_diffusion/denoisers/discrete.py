"""Networks whose output gives a posterior over finitely many values: symbols, or quantized real numbers."""

from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_diffusion.denoisers.base import NetworkDenoiser, check_outputs
from pyro_diffusion.precision import at_least_single, matmul
from pyro_diffusion.processes import Ability, CategoricalProcess, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.row_noise import inverted
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import (
    Shape,
    check_broadcast,
    check_finite,
    check_number,
    check_positive_int,
    check_tensor,
)

__all__ = ["CategoricalDenoiser", "LevelsDenoiser", "Quantized", "uniform_levels"]


def uniform_levels(levels: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The real values of the integers 0 ... levels - 1, evenly spaced from ``low`` to ``high``.

    Raises:
        ValueError: for fewer than two levels, or ends that are not finite and increasing.
    """
    check_positive_int("levels", levels, at_least=2)
    check_number("high", high, above=check_number("low", low))
    return torch.linspace(low, high, levels)


class Quantized(TorchDistribution):
    r"""A distribution over real numbers that sits on known ``values``: :math:`\sum_k p_k\,\delta_{v_k}`.

    Args:
        logits: unnormalized log-probabilities, batch + (n,).
        values: the n real values.
        validate_args: whether to check arguments.

    Raises:
        ValueError: for logits that do not fit the values, or that are NaN.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.real_vector
    }
    support = constraints.real
    has_rsample = False

    def __init__(self, logits: Tensor, values: Tensor, validate_args: bool | None = None) -> None:
        count = check_tensor("logits", logits).shape[-1:]
        if check_tensor("values", values).dim() != 1 or count != values.shape or not logits.numel():
            raise ValueError(
                f"logits, values: got shapes {tuple(logits.shape)}, {tuple(values.shape)}, expected batch + "
                "(n,) and (n,)"
            )
        self._unnormalized = logits
        self.values = values
        super().__init__(logits.shape[:-1], torch.Size(), validate_args=validate_args)

    @lazy_property
    def index(self) -> Categorical:
        """The distribution of which of the values it is."""
        return Categorical(logits=self._unnormalized, validate_args=False)

    @property
    def logits(self) -> Tensor:
        """Log-probabilities of the values."""
        return self.index.logits

    @lazy_property
    def probs(self) -> Tensor:
        """Probabilities of the values."""
        # Not by way of the logits: samplers need the moments alone.
        return self._unnormalized.softmax(-1)

    @lazy_property
    def mean(self) -> Tensor:
        """Expected value."""
        return matmul(self.probs, self.values)

    @lazy_property
    def variance(self) -> Tensor:
        """Variance, computed around the mean so that nothing cancels."""
        gap = self.values - self.mean.unsqueeze(-1)
        return (self.probs * gap.square()).sum(-1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "Quantized":
        """The same distribution at a larger batch shape."""
        new = self._get_checked_instance(Quantized, _instance)
        new._unnormalized = self._unnormalized.expand(*batch_shape, len(self.values))
        new.values = self.values
        super(Quantized, new).__init__(torch.Size(batch_shape), torch.Size(), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw values."""
        with torch.no_grad():
            return self.values[self.index.sample(sample_shape)]

    def icdf(self, value: Tensor) -> Tensor:
        """The least of the values whose distribution function exceeds a probability."""
        return self.values[inverted(self.probs, value)]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the nearest of the values; -inf if none is within float error.

        Raises:
            ValueError: for values of a shape that does not broadcast with the batch.
        """
        check_broadcast("value", check_tensor("value", value).shape, self.batch_shape)
        gap = (value.unsqueeze(-1) - self.values).abs()
        distance, index = gap.min(-1)
        logits = self.logits.expand(torch.broadcast_shapes(gap.shape, self.logits.shape))
        index, distance = (v.expand(logits.shape[:-1]) for v in (index, distance))
        logits = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        near = distance <= 1e-5 * self.values.abs().max().clamp(min=1)
        return logits.where(near, torch.full_like(logits, -torch.inf))


class _EvidenceDenoiser(NetworkDenoiser):
    """Bayes' rule per coordinate: a network for the evidence of the *other* coordinates, its own exactly."""

    def _logits(
        self, x: Tensor, xt: Tensor, values: Tensor, level: Level, context: dict[str, Any]
    ) -> Tensor:
        out = check_outputs(self.network_output(x, level.clock, context), xt, len(values))
        return out + self.process.coordinate_log_likelihood(xt, values, level)


class LevelsDenoiser(_EvidenceDenoiser):
    r"""Posterior over quantized data under Gaussian noise, one softmax per coordinate.

    .. math:: p(x_{0,i} = v_k | x_t) \propto e^{F_{ik}(c_{in} x_t, \lambda)}\,
              \mathcal N(x_{t,i};\, \alpha_t v_k,\, \sigma_t^2)

    The network contributes what the other coordinates say, the coordinate's own evidence is added exactly;
    so the posterior is right at high signal-to-noise without any training. Its mean and variance are the
    x_0 estimate and the posterior variance of the reverse kernel.

    Args:
        network: returns ``len(values)`` logits per coordinate on a last dimension.
        process: a Gaussian process.
        values: the increasing real values data may take, see :func:`uniform_levels`.
        context_event_dims: see :class:`NetworkDenoiser`.

    Raises:
        ValueError: if the process is not Gaussian, or the network's output has another shape.
    """

    values: Tensor

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        values: Tensor,
        context_event_dims: dict[str, int] | None = None,
    ) -> None:
        super().__init__(network, process, context_event_dims)
        require(process, Ability.NUMBERS, Ability.FACTORIZED, argument="process")
        check_tensor("values", values)
        if values.dim() != 1 or len(values) < 2 or not bool((values.diff() > 0).all()):
            raise ValueError(
                f"values: got shape {tuple(values.shape)}, expected at least two increasing numbers"
            )
        check_finite("values", values)
        self.register_buffer("values", values)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level = self.process.level(t, xt, state="xt")
        x = xt / torch.hypot(level.alpha, level.sigma)
        values = self.values.to(at_least_single(xt.dtype))
        logits = self._logits(x, xt, values, level, context)
        return Quantized(logits, values, validate_args=False).to_event(self.process.event_dim)


class CategoricalDenoiser(_EvidenceDenoiser):
    r"""Posterior over symbols, one softmax per coordinate.

    .. math:: p(x_{0,i} = k | x_t) \propto e^{F_{ik}(x_t, \lambda)}\, q(x_{t,i} | x_{0,i} = k)

    Under masking this copies every symbol that is not masked; under uniform noise it weighs the visible
    symbol by how likely it survived. This leave-one-out form is the right one for uniform noise: what a
    symbol tells of itself depends on the level alone, is known, and the reverse kernel divides it out again,
    :math:`w_k = p_k / q(x_{t,i} | x_{0,i} = k)`.

    Args:
        network: ``network(x, log_snr)`` on integer symbols; returns ``process.states`` logits each.
        process: a categorical process.
        context_event_dims: see :class:`NetworkDenoiser`.

    Raises:
        ValueError: if the process is not categorical, or the network's output has another shape.

    References:
        Austin et al., arXiv 2107.03006; Sahoo et al., arXiv 2406.07524, section 3.2.
    """

    values: Tensor

    def __init__(
        self,
        network: nn.Module,
        process: CategoricalProcess,
        context_event_dims: dict[str, int] | None = None,
    ) -> None:
        super().__init__(network, process, context_event_dims)
        require(process, Ability.SYMBOLS, Ability.FACTORIZED, argument="process")
        self.register_buffer("values", torch.arange(process.states), persistent=False)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level = self.process.level(t, xt, state="xt")
        logits = self._logits(xt, xt, self.values, level, context)
        return Categorical(logits=logits, validate_args=False).to_event(self.process.event_dim)
