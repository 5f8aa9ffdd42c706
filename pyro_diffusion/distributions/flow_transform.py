"""The probability-flow ODE as a transform."""

import math
from typing import Self

from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import broadcast_context
from pyro_diffusion.dynamics import ExactTrace, ODESolver, TraceEstimator
from pyro_diffusion.dynamics.ode import Endpoint, data_scale, end_angles, transport
from pyro_diffusion.dynamics.ode_solver import check_ode_solver
from pyro_diffusion.dynamics.trace_estimators import check_trace_estimator
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.global_batch import current_shard, scoring_rows
from pyro_diffusion.processes.noise import NoiseSource
from pyro_diffusion.processes.row_noise import RowNoise

__all__ = ["FlowTransform"]


class FlowTransform(TransformModule):
    r"""The bijection from noise :math:`z \sim \mathcal N(0, I)` to data along the probability-flow ODE.

    The ODE runs between the two ends of the process's schedule; its state there is
    :math:`z = x_{t_1} / \sqrt{\alpha_1^2 + \sigma_1^2}` and data are :math:`x = x_{t_0} / \alpha_0`. See
    :func:`~pyro_diffusion.dynamics.ode.transport` for the equation.

    Nothing is cached, so nothing is stale after the denoiser was trained; the inverse and its determinant,
    called one after the other, integrate the ODE twice, ``ProbabilityFlow`` once.

    Args:
        denoiser: posterior of a Gaussian process; a submodule of this transform.
        trace: of the divergence, exact by default.
        solver: how the ODE is integrated.
        context: tensors for the denoiser, which broadcast to the batch.
        seed: of a stochastic trace's probes.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    References:
        Song et al., arXiv 2011.13456; Grathwohl et al. (FFJORD), arXiv 1810.01367.
    """

    bijective = True
    sign = 1

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        trace: TraceEstimator | None = None,
        solver: ODESolver | None = None,
        context: dict[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(cache_size=0)
        process = getattr(denoiser, "process", None)
        require(process, Ability.ODE, argument="denoiser", by=type(denoiser).__name__)
        self.denoiser = denoiser
        self.trace = ExactTrace() if trace is None else check_trace_estimator(trace)
        self.solver = ODESolver() if solver is None else check_ode_solver(solver)
        self.context, self.seed, self._shard = dict(context or {}), seed, current_shard()
        end_angles(denoiser.process)
        self.domain = self.codomain = constraints.independent(
            constraints.real, denoiser.process.event_dim
        )

    @property
    def angles(self) -> tuple[float, float]:
        """Where data and noise are, as the schedule has it now."""
        return end_angles(self.denoiser.process)

    def transport(
        self,
        x: Tensor,
        inverse: bool = False,
        log_det: bool = True,
        noise: NoiseSource | None = None,
    ) -> Endpoint:
        """Noise to data, or back, with log-determinants from the same pass.

        Args:
            x: noise, or data if ``inverse``; batch + event.
            inverse: whether to go from data to noise.
            log_det: whether to integrate the divergence too.
            noise: of the trace's probes; by default the numbers of this transform's seed for each row of x.

        Returns:
            ``z`` is the other end; ``log_det`` are log-determinants of that map, one per probe.
        """
        angles = self.angles
        start, stop = angles if inverse else angles[::-1]
        trace = self.trace if log_det else None
        scale = data_scale(self.denoiser.process, x)
        if inverse:
            scale = 1 / scale
        z = scale * x if inverse else x
        z, context = broadcast_context(self.denoiser, z, self.context)
        noise = self._noise(z) if noise is None else noise
        out = transport(self.denoiser, z, start, stop, self.solver, context, trace, noise)
        if not inverse:
            out = out._replace(z=scale * out.z)
        if out.log_det is None:
            return out
        event = x.shape[x.dim() - self.domain.event_dim :]
        if isinstance(scale, Tensor):
            return out._replace(log_det=out.log_det + scale.log().expand(event).sum())
        return out._replace(log_det=out.log_det + math.prod(event) * math.log(scale))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log \\|dy/dx\\| summed over events, by a pass from y; the mean over probes."""
        log_det = self.transport(y, inverse=True).log_det
        assert log_det is not None
        return -log_det.mean(0)

    def with_cache(self, cache_size: int = 1) -> Self:
        """Itself: a cached pair goes stale as soon as the denoiser is trained."""
        del cache_size
        return self

    def _noise(self, x: Tensor) -> RowNoise:
        batch = x.shape[: x.dim() - self.domain.event_dim]
        seed, rows = scoring_rows(self.seed, self._shard, batch, x.device)
        return RowNoise(seed if self.trace.seed is None else self.trace.seed, rows)

    def _call(self, x: Tensor) -> Tensor:
        return self.transport(x, log_det=False).z

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transport(y, inverse=True, log_det=False).z
