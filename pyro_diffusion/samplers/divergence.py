"""Sampling that went wrong: NaN from a network, or guidance that overshoots until states leave the model."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.processes import Ability
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["LARGEST_NOISE", "DivergenceMonitor"]

# Standard deviations: under any exact posterior the root mean square of E[eps | x_t, y] is 1 at most.
LARGEST_NOISE = 1e3


class DivergenceMonitor:
    r"""Signs of failure along one trajectory, kept on the device and checked once, at its end.

    A guided estimate implies a noise :math:`\hat\epsilon = (x_t - \alpha \hat x_0)/\sigma`. Were it exact,
    :math:`E\|\hat\epsilon\|^2 \le d` whatever data, prior and observations are, by Jensen's inequality.
    Guidance that overshoots enlarges it at every step. A trajectory on which some datum's root mean square
    exceeds ``LARGEST_NOISE`` has left the model; data of large scale have not. Errors name the level by its
    clock, one number even where noise differs by coordinate.

    Args:
        denoiser: what is evaluated; only one that is ``guided`` is checked for its noise, under a process
            whose states are linear in the data.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.marks: list[Tensor] = []
        self.clocks: list[Tensor] = []

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
            return x
        first = int((~good).nonzero()[0])
        value, kind = float(marks[first]), type(self.denoiser).__name__
        where = f" at log-SNR {float(self.clocks[first]):.3g}" if first < len(self.marks) else ""
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

    def _mark(self, value: Tensor, t: Level) -> None:
        if t.clock.numel() == 0:  # a level for each datum, and no data
            return
        self.marks.append(value)
        self.clocks.append(t.clock.detach().amax())
