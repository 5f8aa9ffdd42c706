"""The one sampling loop, and what a sampler is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pyro.distributions import TorchDistribution
from torch import Tensor
from tqdm import tqdm

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.pyro_modules import in_this_run
from pyro_diffusion.precision import at_least_single
from pyro_diffusion.processes import ForwardProcess
from pyro_diffusion.samplers.divergence import DivergenceMonitor
from pyro_diffusion.schedules import Level
from pyro_diffusion.schedules.base import Grid, table_row
from pyro_diffusion.validation import check_tensor, check_times

__all__ = ["Sampler", "State", "check_sampler", "simulate"]

Denoise = Callable[[Tensor, Level], TorchDistribution]


class State(NamedTuple):
    """What a sampler carries from step to step.

    Attributes:
        x: the diffusion's state, batch + event.
        history: whatever a multistep method remembers.
    """

    x: Tensor
    history: tuple[Any, ...] = ()


class Sampler:
    r"""One step from a later time t to an earlier time s.

    ``coefficients`` is called once for all steps with vectors of levels; ``step`` gets its rows.
    A step is pure: everything it remembers is in the state it returns.

    **Implementing a sampler.** Implement :meth:`coefficients`, everything that depends on levels alone, and
    :meth:`step`, the arithmetic with the denoiser. Refuse an unsuitable process in ``coefficients`` by
    ``pyro_diffusion.processes.abilities.require``. A sampler that carries more than x from step to step keeps
    it in ``State.history``; one whose start differs implements :meth:`init`. Draw noise by
    :func:`~pyro_diffusion.processes.draw`, and declare the orders and ``evaluations``.

    Attributes:
        order: order of convergence in the number of steps to the probability-flow ODE's solution, or None
            if the sampler draws noise.
        weak_order: order in which the state's distribution converges to that of the reverse SDE, or None
            if it is deterministic or does not converge with the number of steps alone.
        strong_order: order in which its paths converge to those of the SDE on the same Brownian motion,
            or None if it is deterministic or follows no such path.
        evaluations: network evaluations a step.

    All orders are for an exact, smooth denoiser, steps that shrink evenly in log-SNR, and grids that begin
    deep in the noise: the first steps of a multistep method are of lower order, which limits it to order 2
    (3 if it corrects them) on a grid that begins where the posterior mean already moves.

    Example:
        DDIM without noise, :math:`x_s = r\,x_t + k\,\hat x_0`, written out.

        >>> import torch
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.distributions import Diffusion
        >>> from pyro_diffusion.processes import Ability, GaussianProcess
        >>> from pyro_diffusion.processes.abilities import require
        >>> from pyro_diffusion.schedules import Cosine
        >>> class Deterministic(Sampler):
        ...     order = 1
        ...     def coefficients(self, process, s, t):
        ...         require(process, Ability.FREE_VARIANCE, argument="sampler", by="Deterministic()")
        ...         r = s.sigma / t.sigma
        ...         return r, s.alpha - r * t.alpha
        ...     def step(self, process, denoise, state, s, t, c):
        ...         r, k = c
        ...         return State(r * state.x + k * denoise(state.x, t).mean)
        >>> denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(2), torch.eye(2), 0.1)
        >>> Diffusion(denoiser, (2,), steps=20, sampler=Deterministic()).sample((5,)).shape
        torch.Size([5, 2])
    """

    order: int | None = None
    weak_order: int | None = None
    strong_order: int | None = None
    evaluations: int = 1

    def init(self, x: Tensor) -> State:
        """The state at t = 1."""
        return State(x)

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> tuple[Any, ...]:
        """A (named) tuple of tensors whose leading dimension is the step, or of such tuples.

        Row j belongs to the step from ``t[j]`` to ``s[j]``; the step taken before it is row j + 1.
        """
        raise NotImplementedError

    def step(
        self, process: ForwardProcess, denoise: Denoise, state: State, s: Level, t: Level, c: Any
    ) -> State:
        """The state at s.

        Args:
            process: the forward process.
            denoise: ``denoise(x, t)``, the posterior over x_0.
            state: the state at t.
            s: level to go to.
            t: level to come from.
            c: this step's row of the coefficients.
        """
        raise NotImplementedError


def check_sampler(sampler: object) -> Sampler:
    """Refuse anything but a sampler object.

    Raises:
        ValueError: for an unknown sampler.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"sampler: got {sampler!r}, expected a Sampler such as Ancestral() or DDIM(eta=0.0)"
        )
    return sampler


def simulate(
    denoiser: Denoiser,
    times: Tensor,
    x: Tensor,
    sampler: Sampler,
    context: dict[str, Tensor] | None = None,
    progress: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample along a grid of times, from its last to its first.

    Args:
        denoiser: posterior over x_0, on the device of x.
        times: K + 1 times, taken from the last to the first (a decreasing grid goes towards noise, which
            only deterministic samplers can do).
        x: state at ``times[-1]``, batch + event.
        sampler: what one step does.
        context: passed to the denoiser.
        progress: whether to show a progress bar.
        callback: called with (j, state at ``times[j]``) from j = K down to 0.

    Returns:
        The state at ``times[0]``.

    Raises:
        ValueError: for a state of another kind, times outside [0, 1] or out of order, and trajectories that
            end in NaN, or whose guidance overshot (the estimate implies noise of over 1000 standard
            deviations).
    """
    denoiser = in_this_run(denoiser)  # one network for all steps
    process, context = denoiser.process, context or {}
    process.check_state("x", x)
    _check_sequence(times)
    dtype = x.dtype if x.is_floating_point() else times.dtype
    process.check_precision(at_least_single(dtype), times)
    levels = process.levels(times, dtype, x.device)
    early, late = Grid(*levels.at(slice(-1))), Grid(*levels.at(slice(1, None)))
    table = check_sampler(sampler).coefficients(process, early, late)
    count = len(times) - 1
    steps = ((j, early.row(j), late.row(j), table_row(table, j)) for j in reversed(range(count)))
    state = sampler.init(x)
    if callback is not None:
        callback(len(times) - 1, state.x)

    monitor = DivergenceMonitor(denoiser)

    def denoise(xt: Tensor, t: Level) -> TorchDistribution:
        posterior = denoiser(xt, t, **context)
        monitor.observe(xt, t, posterior)
        return posterior

    for j, s, t, c in tqdm(steps, total=count, desc="sampling", disable=not progress):
        try:
            state = sampler.step(process, denoise, state, s, t, c)
        except (RuntimeError, ValueError):
            monitor.check(state.x)  # what broke was perhaps an earlier step
            raise
        if callback is not None:
            callback(j, state.x)
    return monitor.check(state.x)


def _check_sequence(times: Tensor) -> None:
    if check_tensor("times", times).dim() != 1 or len(times) < 2:
        raise ValueError(
            f"times: got shape {tuple(times.shape)}, expected at least two times (steps >= 1)"
        )
    check_times("times", times)
    sign = times.diff().sign()
    if not bool(((sign == sign[0]) & (sign != 0)).all()):
        raise ValueError("times: got a grid that turns or stops, expected times in order")


def recorder() -> tuple[list[Tensor], Callable[[int, Tensor], None]]:
    """A list, and a callback for ``simulate`` that appends every state to it."""
    states: list[Tensor] = []
    return states, lambda _, x: states.append(x.detach().clone())
