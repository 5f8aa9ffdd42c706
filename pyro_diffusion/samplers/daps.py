r"""Decoupled annealing: a draw of x_0 given x_t and y at every level, noised again for the next."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.linear import BridgeCoefficients
from pyro_diffusion.processes.noise import normal_like, uniform_like
from pyro_diffusion.samplers.ancestral import DDIM
from pyro_diffusion.samplers.base import Denoise, Sampler, State
from pyro_diffusion.schedules import Level
from pyro_diffusion.schedules.base import table_row
from pyro_diffusion.validation import check_positive_int

__all__ = ["DAPS"]


@runtime_checkable
class Observations(Protocol):
    """What the sampler asks of a likelihood; see :class:`~pyro_diffusion.likelihoods.Likelihood`."""

    def check_gradient(self) -> None:
        """Refuse a likelihood without a gradient in x_0."""

    def log_prob(self, x0: Tensor) -> Tensor:
        """log p(y | x_0) in nats, one number for each row."""
        ...

    def sample_near(self, center: Tensor, variance: Tensor) -> Tensor:
        """A draw of x_0 from p(y | x_0) N(x_0; center, variance), linearized at the center."""
        ...


class DAPSCoefficients(NamedTuple):
    """Rows of the path to x_0 within each step.

    Attributes:
        levels: where the denoiser is evaluated, rows + (inner,).
        bridges: from each to the next, rows + (inner - 1,).
        variance: r^2, rows.
    """

    levels: Level
    bridges: BridgeCoefficients
    variance: Tensor


class DAPS(Sampler):
    r"""Decoupled annealing posterior sampling. At each level t:

    1. :math:`\tilde x_0` from x_t by ``inner`` deterministic steps (DDIM), evenly in log-SNR (the clock);
    2. a draw of :math:`x_0` from :math:`p(y | x_0)\,\mathcal N(x_0; \tilde x_0, r_t^2)`;
    3. :math:`x_s \sim q(x_s | x_0)`, whatever x_t was.

    A sampler, not a guidance: it takes the *prior's* denoiser. Step 2 is one exact draw for linear Normal
    observations (for others that of the likelihood linearized at :math:`\tilde x_0`; the likelihood's own
    ``sample_near`` makes it), or ``moves`` of Metropolis-adjusted Langevin dynamics for any differentiable
    likelihood, started at :math:`\tilde x_0` with a step size of its own for each row that adapts in the
    first half of the moves:

    .. math:: x' = x + h\, g(x) + \sqrt{2 h}\, \epsilon, \qquad
              g(x) = \nabla \log p(y | x) - (x - \tilde x_0) / r_t^2 .

    Approximate, as :math:`p(x_0|x_t)` is no such normal. Exact in distribution for isotropic normal data with
    ``inner=1`` (then :math:`\tilde x_0` is the posterior mean) and ``variance`` the posterior's. Gaussian
    processes only. ``inner`` network evaluations a step.

    Args:
        likelihood: a :class:`~pyro_diffusion.likelihoods.Likelihood`.
        inner: evaluations of the denoiser in step 1.
        variance: a function of the level, :math:`r_t^2`, one number or one for each coordinate; by default
            the paper's :math:`\sigma^2/\alpha^2`.
        moves: Langevin moves in step 2, each one gradient of the likelihood; None for the exact draw.

    Raises:
        ValueError: for what is no likelihood or has no gradient, inner or moves < 1, or a variance that is
            not callable; when called, for a process that is not Gaussian, or observations that are not
            Normal and no moves.

    References:
        Zhang et al., arXiv 2407.01521, algorithm 1 (unadjusted there, with tuned steps).
    """

    def __init__(
        self,
        likelihood: Observations,
        *,
        inner: int = 5,
        variance: Callable[[Level], Tensor] | None = None,
        moves: int | None = None,
    ) -> None:
        if not isinstance(likelihood, Observations):
            raise ValueError(
                f"likelihood: got {type(likelihood).__name__}, expected a Likelihood such as "
                "ProgramLikelihood"
            )
        likelihood.check_gradient()
        self.likelihood = likelihood
        self.inner = self.evaluations = check_positive_int("inner", inner)
        if not (variance is None or callable(variance)):
            raise ValueError(f"variance: got {variance!r}, expected a function of the level")
        self.variance = variance
        self.moves = None if moves is None else check_positive_int("moves", moves)
        self._flow = DDIM()

    def __repr__(self) -> str:
        return f"DAPS(inner={self.inner}, moves={self.moves})"

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> DAPSCoefficients:
        """The inner steps: from t towards the grid's first time, where no more than the mean remains.

        Raises:
            ValueError: for a process that is not Gaussian.
        """
        # Noise is drawn anew around x_0 at every step.
        require(process, Ability.INDEPENDENT, argument="sampler", by=self)
        share = torch.arange(self.inner, dtype=t.t.dtype, device=t.t.device) / self.inner
        late, end = t.clock.reshape(-1, 1), s.clock[0].reshape(())
        levels = process.level_of_clock(late + share * (end - late))
        early, before = levels.map(lambda v: v[:, 1:]), levels.map(lambda v: v[:, :-1])
        bridges = self._flow.coefficients(process, early, before)
        require(process, Ability.LINEAR, argument="sampler", by=self, instead="Ancestral()")
        variance = t.noise_to_signal**2 if self.variance is None else self.variance(t)
        return DAPSCoefficients(levels, bridges, variance)

    def step(
        self,
        process: ForwardProcess,
        denoise: Denoise,
        state: State,
        s: Level,
        t: Level,
        c: DAPSCoefficients,
    ) -> State:
        r"""Follow the flow to x_0, draw it given y, noise it to s.

        .. math::
            \tilde x_0 &= \hat x_0(x_{t_n}), \quad x_{t_{i+1}} = r_i\,x_{t_i} + k_i\,\hat x_0(x_{t_i}), \\
            x_0 &\sim p(y | x_0)\,\mathcal N(x_0;\, \tilde x_0, r_t^2), \\
            x_s &= \alpha_s x_0 + \sigma_s z, \qquad z \sim \mathcal N(0, I) ,

        from :math:`x_{t_1} = x_t` on, with DDIM's weights r and k (see :meth:`DDIM.step`).
        """
        x = state.x
        for i in range(self.inner):
            x0 = denoise(x, c.levels.at(i)).mean
            if i < self.inner - 1:
                x = self._flow.bridge_step(process, x, x0, table_row(c.bridges, i))
        if self.moves is None:
            x0 = self.likelihood.sample_near(x0, c.variance)
        else:
            x0 = self._langevin(x0, c.variance, self.moves)
        return State(draw(process.marginal(x0, s)).detach())

    def _langevin(self, center: Tensor, variance: Tensor, moves: int) -> Tensor:
        """Metropolis-adjusted Langevin moves, with steps adapted towards the acceptance 0.574.

        A coordinate's step is its variance times a number that each row adapts.
        """

        def target(x0: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x0 = x0.detach().requires_grad_()
                value = self.likelihood.log_prob(x0)
                near = (x0 - center).square() / (2 * variance)
                value = value - near.reshape(*value.shape, -1).sum(-1)
                (slope,) = torch.autograd.grad(value.sum(), x0)
            return value.detach(), slope

        x = center.detach()
        value, slope = target(x)
        lead, size = value.shape, torch.full_like(value, 0.5)
        for i in range(moves):
            step = _spread(size, x) * variance
            ahead = x + step * slope + (2 * step).sqrt() * normal_like(x, x.dim() - len(lead))
            there, back = target(ahead)
            gap = _misfit(x, ahead, back, step, lead) - _misfit(ahead, x, slope, step, lead)
            chance = torch.nan_to_num(there - value - gap, nan=-torch.inf).clamp(max=0).exp()
            taken = uniform_like(chance) < chance
            x = torch.where(_spread(taken, x), ahead, x)
            slope = torch.where(_spread(taken, x), back, slope)
            value = torch.where(taken, there, value)
            if i < moves // 2:
                size = size * torch.exp(2 * (chance - 0.574) / (i + 1) ** 0.5)
        return x


def _spread(row: Tensor, x: Tensor) -> Tensor:
    """A number per row, against data space."""
    return row.reshape(row.shape + (1,) * (x.dim() - row.dim()))


def _misfit(end: Tensor, start: Tensor, slope: Tensor, step: Tensor, lead: torch.Size) -> Tensor:
    """Minus the log-density of a Langevin move, up to what both directions share."""
    gap = (end - start - step * slope).square() / (4 * step)
    return gap.reshape(*lead, -1).sum(-1)
