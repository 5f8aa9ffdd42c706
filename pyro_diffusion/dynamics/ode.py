r"""The probability-flow ODE of any Gaussian process, in the angle between signal and noise."""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.pyro_modules import in_this_run
from pyro_diffusion.dynamics.attention import twice_differentiable_attention
from pyro_diffusion.dynamics.ode_solver import ADAPTIVE, FIXED, ODESolver, check_ode_solver
from pyro_diffusion.dynamics.refinement import Refinement, current_refinement, refined
from pyro_diffusion.dynamics.trace_estimators import TraceEstimator
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.noise import NoiseSource
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_number, check_tensor

__all__ = [
    "Endpoint",
    "data_scale",
    "end_angles",
    "level_at",
    "transport",
]


class Endpoint(NamedTuple):
    """Where a path along the ODE ends.

    Attributes:
        z: state, batch + event.
        log_det: log-determinant of the map from start to end, one per estimate of the trace, (columns,) +
            batch; None without a trace.
        evaluations: network evaluations that it took.
    """

    z: Tensor
    log_det: Tensor | None
    evaluations: int


def end_angles(process: ForwardProcess) -> tuple[float, float]:
    r"""The clock's angles :math:`\phi = \arctan(\sigma/\alpha)` at t = 0 and t = 1.

    Raises:
        ValueError: for a process with an infinite end.
    """
    ends = process.finite_clock_ends()
    first, last = (math.atan(math.exp(-log_snr / 2)) for log_snr in ends)
    return first, last


def level_at(process: ForwardProcess, angle: Tensor) -> Level:
    """The level where the clock's arctan(sigma / alpha) is ``angle``, in (0, pi/2), any shape.

    Raises:
        ValueError: for other angles, where a check does not cost a wait (on the CPU).
    """
    check_tensor("angle", angle)
    within = (angle > 0) & (angle < math.pi / 2)
    if angle.device.type == "cpu" and not bool(within.all()):
        raise ValueError(
            f"angle: got {float(angle.min()):g} to {float(angle.max()):g}, expected angles in (0, pi/2)"
        )
    return process.level_of_clock(-2 * torch.log(torch.tan(angle)))


def data_scale(process: ForwardProcess, like: Tensor) -> float | Tensor:
    r"""What the state at t = 0 is multiplied by to be data: :math:`x_{t_0}/\alpha_0 = z/\cos\phi_0`.

    Args:
        process: the forward process.
        like: a state, whose dtype and device the scale takes if it differs by coordinate.
    """
    clock = torch.tensor(process.finite_clock_ends()[0], dtype=torch.float64)
    level = process.level_of_clock(clock)
    if level.log_snr is level.clock:
        return 1 / math.cos(end_angles(process)[0])
    return (torch.hypot(level.alpha, level.sigma) / level.alpha).to(like)


def transport(
    denoiser: Denoiser,
    z: Tensor,
    start: float,
    stop: float,
    solver: ODESolver,
    context: dict[str, Tensor] | None = None,
    trace: TraceEstimator | None = None,
    noise: NoiseSource | None = None,
) -> Endpoint:
    r"""Integrate the probability-flow ODE from one angle to another.

    With :math:`n = \sqrt{\alpha^2 + \sigma^2}`, :math:`z = x_t / n` and
    :math:`\phi = \arctan(\sigma/\alpha) \in (0, \pi/2)`, the flow of every schedule is one and the same ODE,

    .. math:: \frac{dz}{d\phi} = \cos\phi\;\hat\epsilon - \sin\phi\;\hat x_0
              = \frac{\cos\phi\; z - \hat x_0}{\sin\phi},

    a velocity of about unit size at both ends, zero for normal data of unit variance; the schedule says only
    where the ends are. Where noise differs by coordinate, :math:`\phi` is the angle of the clock and
    coordinate k has its own scale :math:`n_k` and angle :math:`\phi_k`, which moves with the clock's:

    .. math:: \frac{dz_k}{d\phi} = \frac{\cos\phi_k\, z_k - \hat x_{0,k}}{\sin\phi_k}\,
              \frac{d\phi_k}{d\phi}, \qquad
              \frac{d\phi_k}{d\phi} = \frac{\sin\phi_k \cos\phi_k\,\lambda_k'(t)}
              {\sin\phi \cos\phi\,\lambda'(t)} .

    The divergence is the trace of :math:`\partial v / \partial z`, which for data of full
    support vanishes at both ends too, and with it the variance of every estimate.

    Args:
        denoiser: posterior p(x_0 | x_t), whose mean is used.
        z: states at ``start``, batch + event.
        start: angle at the start, in (0, pi/2).
        stop: angle at the end, another.
        solver: the method.
        context: passed to the denoiser, at the batch shape of z.
        trace: of the divergence; None for the states alone.
        noise: of the trace's probes; that of seed 0 if None.

    Raises:
        ValueError: for another process, states of too few dimensions, or angles outside; and under
            ``torch.jit.trace``, for a divergence or an adaptive method: the trace would keep derivatives, and
            numbers of steps, of its first call.

    References:
        Song et al., arXiv 2011.13456, section 4.3 and appendix D; Salimans & Ho, arXiv 2202.00512,
        appendix D (the angle).
    """
    process = getattr(denoiser, "process", None)
    require(process, Ability.ODE, argument="denoiser", by=type(denoiser).__name__)
    process = denoiser.process
    process.check_state("z", z, values=False)
    if not z.is_floating_point() or z.numel() == 0:
        raise ValueError(f"z: got shape {tuple(z.shape)} of {z.dtype}, expected real numbers")
    for name, angle in (("start", start), ("stop", stop)):
        check_number(name, angle, above=0, at_most=math.pi / 2)
    if start == stop:
        raise ValueError(f"stop: got {stop}, the start, expected another angle")
    check_ode_solver(solver)
    refinement = current_refinement()
    if refinement is not None and refinement.share < 1 and not (trace and trace.stochastic):
        return _of_first(refinement, denoiser, z, start, stop, solver, context or {}, trace)
    denoiser = in_this_run(denoiser)
    if trace is not None and torch.is_inference_mode_enabled():
        # Autograd records nothing there, not even the divergence.
        with torch.inference_mode(False), torch.no_grad():
            context = {name: value.clone() for name, value in (context or {}).items()}
            return transport(denoiser, z.clone(), start, stop, solver, context, trace, noise)
    if torch.jit.is_tracing() and (  # type: ignore[attr-defined]
        trace is not None or solver.method in ADAPTIVE
    ):
        what = "a density" if trace is not None else f"the adaptive method {solver.method!r}"
        raise ValueError(
            f"flow: got {what} under torch.jit.trace, which would keep what its first call computed; "
            "expected "
            f"an ELBO or kernel without Jit (or draws by a fixed method, {', '.join(FIXED)})"
        )
    # Pyro's provenance (``render_model``) is lost where a solver writes into tensors of its own.
    inputs: Any = [z, context or {}]
    sources = get_provenance(inputs)
    z, context = detach_provenance(inputs)
    assert context is not None
    # Random weights are buffers; a guide's carry a gradient.
    leaves = [*denoiser.parameters(), *denoiser.buffers(), *context.values()]
    parameters = [p for p in leaves if p.requires_grad]
    field = _Field(denoiser, z.shape, context, trace, noise)
    y = field.rows(z)
    tracked = torch.is_grad_enabled() and (y.requires_grad or bool(parameters))
    with torch.set_grad_enabled(tracked):
        y = solver(field, y, start, stop, parameters)
    d = field.size
    batch = z.shape[: z.dim() - denoiser.process.event_dim]
    log_det = None if trace is None else (d * y[:, d:]).T.reshape(-1, *batch)
    out, log_det = track_provenance((y[:, :d].reshape(z.shape), log_det), sources)
    return Endpoint(out, log_det, field.evaluations)


def _of_first(
    refinement: Refinement,
    denoiser: Denoiser,
    z: Tensor,
    start: float,
    stop: float,
    solver: ODESolver,
    context: dict[str, Tensor],
    trace: TraceEstimator | None,
) -> Endpoint:
    """The path of the first rows, with 0 for all others."""
    lead = z.dim() - denoiser.process.event_dim
    batch, event = z.shape[:lead], z.shape[lead:]
    count = math.ceil(refinement.share * batch.numel())
    flat = {name: v.reshape(-1, *v.shape[lead:])[:count] for name, v in context.items()}
    with refined(refinement.factor) as whole:
        first = z.reshape(-1, *event)[:count]
        found = transport(denoiser, first, start, stop, solver, flat, trace)
    refinement.solutions += whole.solutions
    out = z.new_zeros(batch.numel(), *event)
    out[:count] = found.z
    log_det = found.log_det
    if log_det is not None:
        rows = log_det.new_zeros(len(log_det), batch.numel())
        rows[:, :count] = log_det
        log_det = rows.reshape(-1, *batch)
    return Endpoint(out.reshape(z.shape), log_det, found.evaluations)


class _Field:
    r"""The velocity of rows (z, log-det per dimension, one per column of the trace).

    For z it is :math:`(\cos\phi\,z - \hat x_0) / \sin\phi`, or by coordinate as :func:`transport` has it; for
    the log-determinants :math:`tr(\partial v / \partial z) / d`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: torch.Size,
        context: dict[str, Tensor],
        trace: TraceEstimator | None,
        noise: NoiseSource | None,
    ) -> None:
        self.denoiser, self.shape, self.context = denoiser, shape, context
        self.trace, self.noise = trace, noise
        self.size = math.prod(shape[len(shape) - denoiser.process.event_dim :])
        self.evaluations = 0

    def rows(self, z: Tensor) -> Tensor:
        """The state that the solver sees, and the probes for its path."""
        rows = z.reshape(-1, self.size)
        if self.trace is None:
            return rows
        noise = self.noise or RowNoise(0, torch.arange(len(rows), device=rows.device))
        self.probes = self.trace.probes(rows.detach(), noise)
        return torch.cat([rows, rows.new_zeros(len(rows), self.trace.columns)], 1)

    def __call__(self, angle: Tensor, y: Tensor) -> Tensor:
        """Their velocity."""
        self.evaluations += 1
        rows = y[:, : self.size]
        if self.trace is None:
            return self._velocity(angle, rows)
        differentiable = torch.is_grad_enabled()
        twice = twice_differentiable_attention() if differentiable else contextlib.nullcontext()
        with torch.enable_grad(), twice:
            if not (differentiable and rows.requires_grad):
                rows = rows.detach().requires_grad_()
            velocity = self._velocity(angle, rows)
            divergence = self.trace(velocity, rows, self.probes, differentiable).T
        out = torch.cat([velocity, divergence / self.size], 1)
        return out if differentiable else out.detach()

    def _velocity(self, angle: Tensor, rows: Tensor) -> Tensor:
        level, half_rate = self._level(angle, rows)
        z = rows.reshape(self.shape)
        xt = torch.hypot(level.alpha, level.sigma) * z
        mean: Tensor = self.denoiser(xt, level, **self.context).mean
        if rows.requires_grad and not mean.requires_grad:
            raise ValueError(
                f"denoiser: got a {type(self.denoiser).__name__} whose mean has no gradient in x_t, expected "
                "a differentiable one (guidance by observations gives samples; for densities use the prior's)"
            )
        if half_rate is None:
            return (torch.cos(angle) * rows - mean.reshape(rows.shape)) / torch.sin(angle)
        cosine = level.alpha / torch.hypot(level.alpha, level.sigma)
        return (half_rate * cosine * (cosine * z - mean)).reshape(rows.shape)

    def _level(self, angle: Tensor, rows: Tensor) -> tuple[Level, Tensor | None]:
        r"""The level at an angle of the clock and, where coordinates have their own angles, a rate for each.

        It is :math:`h_k = -\tfrac12 d\lambda_k/d\phi = \lambda_k' / (\lambda' \sin\phi \cos\phi)`, so that
        :math:`dz_k/d\phi = h_k \cos\phi_k\,(\cos\phi_k\,z_k - \hat x_{0,k})`.
        """
        level = level_at(self.denoiser.process, angle)
        if level.log_snr is level.clock:
            return level, None
        rates = self.denoiser.process.rates(level.t)
        half_rate = rates.log_snr / (rates.clock * torch.sin(angle) * torch.cos(angle))
        return rates.level.map(lambda v: v.to(rows.dtype)), half_rate.to(rows.dtype)
