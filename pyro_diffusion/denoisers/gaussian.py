"""Networks whose output gives a normal (or certain) posterior over real data."""

from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.denoisers.base import NetworkDenoiser, check_outputs
from pyro_diffusion.denoisers.parameterizations import Coefficients, Data, Parameterization, V
from pyro_diffusion.denoisers.variances import Variance
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_number

__all__ = ["GaussianDenoiser"]


class GaussianDenoiser(NetworkDenoiser):
    r"""Posterior :math:`\mathcal N(\hat x_0, v)`, or a point mass at :math:`\hat x_0` without a variance.

    :math:`\hat x_0 = c_{skip}\,x_t + c_{out}\,F(c_{in}\,x_t, \lambda)`.

    Args:
        network: ``network(x, log_snr, **context)``; one output per coordinate, or two on a last dimension
            when the variance has a head.
        process: one of real numbers, such as a Gaussian process.
        parameterization: the meaning of the output; :class:`V` by default.
        variance: None for a point mass (DDPM), or a :class:`Variance`.
        context_event_dims: see :class:`NetworkDenoiser`.
        clip: largest absolute value of the mean, for data that are known to be within; no limit by default.
            Beyond it the mean's derivative is 0.

    Raises:
        ValueError: if the clip is not positive, the process is of another kind or lacks what the
            parameterization needs (``Data`` needs nothing more, ``Score`` Tweedie's formula, others
            linear states), or the network's output has another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        parameterization: Parameterization | None = None,
        variance: Variance | None = None,
        context_event_dims: dict[str, int] | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__(network, process, context_event_dims)
        self.clip = None if clip is None else check_number("clip", clip, above=0)
        require(process, Ability.NUMBERS, argument="process")
        self.parameterization = V() if parameterization is None else parameterization
        if not isinstance(self.parameterization, Parameterization):
            raise ValueError(
                f"parameterization: got {parameterization!r}, expected one of Noise(), Data(), V(), "
                "Score(), Velocity(), EDMPreconditioning(...)"
            )
        require(
            process,
            *self.parameterization.needs,
            argument="parameterization",
            by=self.parameterization,
            instead=repr(Data()),
        )
        if not isinstance(variance, Variance | None):
            raise ValueError(
                f"variance: got {variance!r}, expected LearnedVariance(), TimeVariance(...), "
                "EstimatedVariance(...) or None"
            )
        self.variance = variance

    @property
    def point_mass(self) -> bool:  # type: ignore[override]
        """Whether there is no variance."""
        return self.variance is None

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level, event_dim = self.process.level(t, xt, state="xt"), self.process.event_dim
        c = level.tabulate(self._coefficients)
        outputs = 1 + (self.variance.outputs if self.variance is not None else 0)
        out = check_outputs(self.network_output(c.c_in * xt, level.clock, context), xt, outputs)
        mean = c.c_skip * xt + c.c_out * out[..., 0]
        if self.clip is not None:
            mean = mean.clamp(-self.clip, self.clip)
        if self.variance is None:
            return Delta(mean, event_dim=event_dim, validate_args=False)
        variance = self.variance(out[..., 1] if outputs == 2 else None, level)
        return Normal(mean, variance.sqrt(), validate_args=False).to_event(event_dim)

    def _coefficients(self, level: Level) -> Coefficients:
        return self.parameterization.coefficients(level.alpha, level.sigma)
