"""The probability-flow ODE as a Pyro distribution over data."""

import math
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import DenoisedDistribution, broadcast
from pyro_diffusion.distributions.callers import inside_markov_chain
from pyro_diffusion.distributions.flow_transform import FlowTransform
from pyro_diffusion.distributions.linear_use import check_linear_use
from pyro_diffusion.distributions.shape_runs import shapes_only
from pyro_diffusion.dynamics import ODESolver, TraceEstimator
from pyro_diffusion.processes import draw
from pyro_diffusion.processes.noise import NoiseSource
from pyro_diffusion.validation import (
    Shape,
    check_event_shape,
    check_finite,
    check_sizes,
    check_tensor,
)

__all__ = ["LogDensity", "ProbabilityFlow"]


class LogDensity(NamedTuple):
    """Log-densities of data and their standard errors.

    Attributes:
        value: log p(x) in nats, sample + batch; the mean over probes.
        standard_error: over probes, of the same shape; 0 for the exact trace, NaN for a single probe (whose
            error is unknown).
        latent: where the data came from, a point of the base distribution, sample + batch + event.
        evaluations: network evaluations that the whole batch took.
    """

    value: Tensor
    standard_error: Tensor
    latent: Tensor
    evaluations: int


class _Pushforward(TransformedDistribution):
    """A transformed distribution built from its shapes; its parts are set afterwards."""

    def __init__(
        self, batch_shape: Shape, event_shape: Shape, validate_args: bool | None = None
    ) -> None:
        torch.distributions.Distribution.__init__(
            self, torch.Size(batch_shape), torch.Size(event_shape), validate_args=validate_args
        )


class ProbabilityFlow(DenoisedDistribution, _Pushforward):
    r"""A diffusion model's distribution of data by its probability-flow ODE: a continuous normalizing flow.

    Data are :math:`x = f(z)` with z of the process's ``base_distribution``, :math:`\mathcal N(0, I)` for
    Gaussian noise, and f the ODE's map from t = 1 to t = 0
    (``FlowTransform``), so with v the velocity in the angle :math:`\phi`

    .. math:: \log p(x) = \log p(z) + \int_{\phi_0}^{\phi_1} tr \frac{\partial v}{\partial z}
              \,d\phi + d \log \cos \phi_0 .

    ``log_prob`` is *exact* for this distribution up to the solver's tolerance with the exact trace, and
    *unbiased* with a stochastic one, whose probes are drawn once per instance and kept along the path: an
    instance always gives one value the same score. ``rsample`` is reparameterized, both are differentiable in
    values, parameters and context. The distribution is that of the ODE: with the true posterior mean,
    data blurred by the noise that is left at t = 0; with a network, in general not quite that of
    :class:`Diffusion`.

    A Markov chain needs one potential: a stochastic trace without a seed is refused by ``log_prob`` when the
    distribution was built inside a model that ``pyro.infer.mcmc`` runs.

    Register the network as for any view: ``pyro.module("denoiser", denoiser)``.

    Args:
        denoiser: posterior p(x_0 | x_t) under a process with a flow, whose mean is used; the schedule has
            finite ends.
        event_shape: shape of one datum; its length is the process's ``event_dim``.
        solver: :class:`~pyro_diffusion.dynamics.ODESolver`: method, tolerances or number of steps, and where
            gradients come from; by default adaptive steps to a tolerance of 1e-5.
        trace: :class:`~pyro_diffusion.dynamics.ExactTrace` by default (d vector-Jacobian products per
            evaluation), else ``Hutchinson`` or ``HutchPlusPlus``.
        context: tensors for the denoiser; their batch shapes broadcast into this distribution's.
        validate_args: whether to check arguments and values; Pyro's global setting by default.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
        >>> flow = ProbabilityFlow(denoiser, event_shape=(2,))
        >>> flow.rsample((3,)).shape
        torch.Size([3, 2])
        >>> round(float(flow.log_prob(torch.zeros(2)) + math.log(2 * math.pi)), 3)
        -0.0

    References:
        Song et al., arXiv 2011.13456, section 4.3; Grathwohl et al. (FFJORD), arXiv 1810.01367.
    """

    has_rsample = True
    _arguments: ClassVar[tuple[str, ...]] = ("solver", "trace", "context")
    _shown: ClassVar[tuple[str, ...]] = ("solver", "trace")

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        *,
        solver: ODESolver | None = None,
        trace: TraceEstimator | None = None,
        context: dict[str, Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(denoiser, event_shape, context=context, validate_args=validate_args)
        transform = FlowTransform(
            self.denoiser, trace=trace, solver=solver, context=self.context, seed=self._seed
        )
        self.solver, self.trace, self.transforms = transform.solver, transform.trace, [transform]
        process = self.denoiser.process
        base = process.base_distribution(self.event_shape, dtype=self.dtype, device=self.device)
        self.base_dist = base.expand(self.batch_shape)
        self._noisy_chain = (
            self.trace.stochastic and self.trace.seed is None and inside_markov_chain()
        )

    @property
    def transform(self) -> FlowTransform:
        """The map from noise to data."""
        return self.transforms[0]

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution, with the same probes, at a larger batch shape."""
        new = super().expand(batch_shape, _instance)
        new.base_dist = self.base_dist.expand(torch.Size(batch_shape))
        return new

    def encode(self, value: Tensor) -> Tensor:
        """The noise z that data come from, sample + batch + event; standard normal under the model."""
        return self.transform.inv(self._checked(value))

    def decode(self, z: Tensor) -> Tensor:
        """Data from noise, the inverse of :meth:`encode`.

        Raises:
            ValueError: for noise of a wrong shape or that is not finite.
        """
        if self._validate_args:
            check_event_shape("z", z, self.event_shape)
            check_finite("z", z)
        return self.transform(z)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, exact up to the solver's tolerance or, with a stochastic trace, unbiased.

        Args:
            value: data, sample + batch + event.

        Returns:
            One number per datum, deterministic for this instance and differentiable; -inf for data that come
            from outside the support of the process's noise.

        Raises:
            ValueError: for data of a wrong shape or that are not finite, and for a stochastic trace without a
                seed inside a Markov chain.
        """
        density = self.score(value)
        log_prob = density.value
        if self._validate_args and not bool(log_prob.detach().isfinite().all()):
            found = sum_rightmost(density.latent, len(self.event_shape)).isfinite()
            self._check_outcome(log_prob.masked_fill(found & (log_prob == -math.inf), 0.0))
        return log_prob

    def score(self, value: Tensor, noise: NoiseSource | None = None) -> LogDensity:
        """Log-density with its standard error over probes, latent and number of evaluations, in one pass.

        Args:
            value: data, sample + batch + event.
            noise: of a stochastic trace's probes; this instance's own by default.
        """
        if self._noisy_chain:
            raise ValueError(
                f"trace: got {self.trace!r} in a distribution built at every run of a Markov chain's model: "
                "the density would change from step to step. Expected ExactTrace(), or fixed probes such as "
                "Hutchinson(..., seed=0)"
            )
        if self.trace.stochastic and self.trace.seed is None:
            check_linear_use(self, chains=False, bound=False)
        end = self.transform.transport(self._checked(value), inverse=True, noise=noise)
        assert end.log_det is not None
        return self._density(end.z, end.log_det, end.evaluations)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Data from one pass of the ODE, sample + batch + event."""
        with torch.no_grad():
            x = self.rsample(sample_shape)
            self._check_outcome(x)
            return x

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Reparameterized data from one pass of the ODE, sample + batch + event."""
        if shapes_only():
            return self._example(sample_shape)
        return self.transform(self._noise(sample_shape))

    def rsample_and_log_prob(self, sample_shape: Shape = torch.Size()) -> tuple[Tensor, Tensor]:
        """Reparameterized data and their log-density, from one pass of the ODE."""
        z = self._noise(sample_shape)
        end = self.transform.transport(z)
        assert end.log_det is not None
        return end.z, self._density(z, -end.log_det, end.evaluations).value

    def _first_guess(self, sample_shape: Shape) -> Tensor:
        x = self._prior_draw(sample_shape)
        return self.posterior(x, self.denoiser.process.level(1.0, x)).mean

    def _noise(self, sample_shape: Shape) -> Tensor:
        z = draw(self.base_dist, check_sizes("sample_shape", sample_shape))
        self._check_precision(z)
        return z

    def _density(self, z: Tensor, log_det: Tensor, evaluations: int) -> LogDensity:
        error = torch.zeros_like(log_det[0])
        if self.trace.stochastic:
            spread = log_det.detach()
            error = spread.std(0) / math.sqrt(len(spread)) if len(spread) > 1 else error + math.nan
        return LogDensity(self.base_dist.log_prob(z) + log_det.mean(0), error, z, evaluations)

    def _checked(self, value: Tensor) -> Tensor:
        """Data at the model's dtype and at the batch shape."""
        check_tensor("value", value)
        if self._validate_args:
            check_event_shape("value", value, self.event_shape)
            check_finite("value", value)
        shape = broadcast(
            "value", {"value": value.shape, "distribution": self.batch_shape + self.event_shape}
        )
        own = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        value = value.to(self.dtype or own).expand(shape)
        self._check_precision(value)
        return value
