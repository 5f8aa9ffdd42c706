"""Sampling that went wrong: NaN from a network, or guidance that overshoots until states leave the model."""

import functools
import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.processes import Ability
from pyro_diffusion.schedules import Level
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["LARGEST_NOISE", "DivergenceMonitor"]

# Standard deviations: under any exact posterior the root mean square of E[eps | x_t, y] is 1 at most.
LARGEST_NOISE = 1e3
# The least root mean square that is called divergence: what is approximate may exceed 1 a little.
LEAST_EXCESS = 2.0
# Chance that one trajectory of an exact posterior is called divergent at one level.
FALSE_ALARM = 1e-12


@functools.lru_cache
def largest_exact_noise(size: int) -> float:
    r"""Root mean square of E[eps | x_t, y] over d numbers that an exact posterior does not exceed.

    Noise is independent of data and observations, so that by Jensen's inequality
    :math:`E \exp(\lambda |\hat\epsilon|^2) \le E \exp(\lambda |\epsilon|^2)`, and Chernoff's bound is that
    of :math:`\chi^2_d`: with :math:`c = |\hat\epsilon|^2/d > 1`,

    .. math:: \log P(|\hat\epsilon|^2 > c d) \le -\tfrac d2 (c - 1 - \log c) .

    Args:
        size: d.

    Returns:
        Root of the c at which the bound is ``FALSE_ALARM``, but ``LEAST_EXCESS`` at least.
    """
    c = bound = 1 - 2 * math.log(FALSE_ALARM) / max(size, 1)
    for _ in range(50):  # c = bound + log c, a contraction above 1
        c = bound + math.log(c)
    return max(math.sqrt(c), LEAST_EXCESS)


class DivergenceMonitor:
    r"""Signs of failure along one trajectory, kept on the device and checked once, at its end.

    A guided estimate implies a noise :math:`\hat\epsilon = (x_t - \alpha \hat x_0)/\sigma`. Were it exact,
    :math:`E\|\hat\epsilon\|^2 \le d` whatever data, prior and observations are, by Jensen's inequality.
    Guidance that overshoots enlarges it at every step. A trajectory on which some datum's root mean square
    exceeds ``LARGEST_NOISE`` has left the model; data of large scale have not. Errors name the level by its
    clock, one number even where noise differs by coordinate.

    Most that diverge stay finite. A draw whose noise exceeds :func:`largest_exact_noise` at a level of
    log-SNR at most 0, and has not come back at the last of these, has left the model while it still was
    mostly noise: the end warns of such draws and of the level at which they left. At later levels an excess
    is a part of the last details, and approximate guidance makes some.

    Args:
        denoiser: what is evaluated; only one that is ``guided`` is checked for its noise, under a process
            whose states are linear in the data.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.marks: list[Tensor] = []
        self.clocks: list[Tensor] = []
        # Of each draw: noise at the last level of log-SNR <= 0; the level at which it left, NaN for none.
        self.noise: Tensor | None = None
        self.left: Tensor | None = None
        self.limit = LEAST_EXCESS

    def observe(self, xt: Tensor, t: Level, posterior: TorchDistribution) -> None:
        """Mark an evaluation: its largest implied noise, or NaN."""
        if not xt.is_floating_point():
            base = per_coordinate(posterior)
            scores = getattr(base, "logits", None)
            if scores is not None:
                self._mark(torch.where(scores.isnan().any(), torch.nan, 0.0), t)
        elif self.denoiser.guided and Ability.LINEAR in self.denoiser.process.abilities:
            noise = (xt - t.alpha * posterior.mean) / t.sigma
            event = self.denoiser.process.event_dim
            square = noise.detach().square()
            mean = square.flatten(-event).mean(-1) if event else square
            self._mark(mean.amax().sqrt(), t)
            self._count(mean, square.shape[square.dim() - event :].numel(), t)

    def check(self, x: Tensor) -> Tensor:
        """The last state, or what is wrong with it.

        Raises:
            ValueError: for states that are not finite, NaN in an evaluation, or noise beyond
                ``LARGEST_NOISE``.
        """
        finite = torch.where(x.isfinite().all(), 0.0, torch.nan)
        marks = torch.stack([*(m.to(finite) for m in self.marks), finite])
        good = marks <= LARGEST_NOISE
        if bool(good.all()):
            self._warn()
            return x
        first = int((~good).nonzero()[0])
        value, kind = float(marks[first]), type(self.denoiser).__name__
        where = f" at log-SNR {float(self.clocks[first]):.3g}" if first < len(self.marks) else ""
        if self.denoiser.guided and math.isnan(value):
            raise ValueError(
                f"guidance: got NaN or infinite numbers from {kind}{where}, expected a network and a program "
                "whose values and derivatives are finite (those of a root or a norm at 0 are not)"
            )
        if self.denoiser.guided:
            raise ValueError(
                f"guidance: got {kind} whose estimate leaves the model{where}: it takes the state for noise "
                f"of {value:.3g} standard deviations, expected {LARGEST_NOISE:g} at most. It overshoots: use "
                "more steps, a smaller scale, the default guidance, or TwistedSMC"
            )
        raise ValueError(
            f"denoiser: got NaN or infinite numbers from {kind}{where}, expected a network whose output is "
            "finite at every level"
        )

    def _count(self, mean: Tensor, size: int, t: Level) -> None:
        """Keep the noise of each draw, and the level since which it has been too large."""
        if mean.numel() == 0:
            return
        clock = t.clock.detach().amax().to(mean)
        if self.noise is None or self.left is None or self.noise.shape != mean.shape:
            self.noise, self.left = torch.zeros_like(mean), torch.full_like(mean, math.nan)
        self.limit = largest_exact_noise(size)
        rms, early = mean.sqrt(), clock <= 0
        since = torch.where(self.left.isnan(), clock, self.left)
        left = torch.where(rms > self.limit, since, math.nan)
        self.noise = torch.where(early, rms, self.noise)
        self.left = torch.where(early, left, self.left)

    def _warn(self) -> None:
        """Warn of draws that left the model and stayed finite."""
        if self.noise is None or self.left is None:
            return
        far = ~self.left.isnan()
        count = int(far.sum())
        if count:
            kind, first = type(self.denoiser).__name__, float(self.left[far].min())
            most = float(self.noise[far].max())
            warn_unreliable(
                f"guidance: {count} of {far.numel()} draws of {kind} left the model, the first at log-SNR "
                f"{first:.3g}: it takes their states for noise of up to {most:.3g} standard deviations, and "
                f"no exact posterior for over {self.limit:.3g}. They are no draws of the posterior: use the "
                "default guidance, or more steps"
            )

    def _mark(self, value: Tensor, t: Level) -> None:
        if t.clock.numel() == 0:  # a level for each datum, and no data
            return
        self.marks.append(value)
        self.clocks.append(t.clock.detach().amax())
