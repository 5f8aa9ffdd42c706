"""Noise of any distribution, for the probability flow and samplers without noise of their own."""

import copy
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.linear import BridgeCoefficients, LinearProcess
from pyro_diffusion.processes.noise import NoiseSource, draw
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape

__all__ = ["AnyNoise"]

_KINDS = (torch.distributions.Distribution, torch.distributions.Transform)
# Attributes of these that say nothing of which they are.
_UNTOLD = {"_validate_args", "_batch_shape", "_event_shape", "_cache_size", "_cached_x_y"}


class AnyNoise(LinearProcess):
    r""":math:`x_t = \alpha_t x_0 + \sigma_t z` with noise z of *any* distribution, whatever its tails.

    The probability flow and what follows it never ask for the distribution of z on the way,

    .. math:: \frac{dx}{dt} = \alpha_t' \hat x_0 + \frac{\sigma_t'}{\sigma_t} (x_t - \alpha_t \hat x_0),
              \qquad \hat x_0 = E[x_0 | x_t],

    as :math:`\sigma_t E[z | x_t] = x_t - \alpha_t \hat x_0`: its paths carry the distribution of :math:`x_t`
    along exactly. The distribution of z is that of the flow's start, and of the noise that training adds. So
    :class:`~pyro_diffusion.distributions.ProbabilityFlow` (densities and samples), ``DDIM()``, ``Heun()`` and
    the multistep samplers without noise run as they are, with a denoiser trained by regression
    (``objective=FlowMatching()`` or ``Simple()``; networks that predict data, noise, v or velocity). Chains'
    bounds and samplers that draw, the SDE and the score need more than that and are refused. For Student-t
    noise :class:`StudentTProcess` has them.

    Args:
        schedule: signal and noise scales.
        noise: distribution of z of batch shape (): of one coordinate, independent of the others, or of a
            whole datum. A scale near 1 keeps the log-SNR, and the inputs of networks, what they say. Its
            numbers are no parameters of the process: they are neither trained nor in its state dict. Where
            its support is bounded, the flow has samples but refuses log-densities.
        start: distribution of :math:`x_1/\sqrt{\alpha_1^2 + \sigma_1^2}`, where it is known better than as
            that of z, likewise. What is left of the data at t = 1 then costs nothing.
        event_dim: number of rightmost dimensions that make one datum.

    Raises:
        ValueError: for a noise or start that is no distribution of real numbers of batch shape () and of 0 or
            ``event_dim`` event dimensions.

    Example:
        >>> from pyro.distributions import Laplace
        >>> from pyro_diffusion.schedules import Cosine
        >>> process = AnyNoise(Cosine(), Laplace(0.0, 0.5**0.5))
        >>> process.marginal(torch.zeros(5, 2), torch.rand(5)).event_shape
        torch.Size([2])

    References:
        Albergo, Boffi & Vanden-Eijnden, Stochastic interpolants, arXiv 2303.08797, section 2 (any base);
        Lipman et al., arXiv 2210.02747.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        {
            *(Ability.NUMBERS, Ability.LINEAR, Ability.INDEPENDENT),
            *(Ability.ISOTROPIC, Ability.ODE),
        }
    )

    def __init__(
        self,
        schedule: Schedule,
        noise: TorchDistribution,
        start: TorchDistribution | None = None,
        event_dim: int = 1,
    ) -> None:
        super().__init__(schedule, event_dim)
        self.noise = self._checked("noise", noise)
        self.start = None if start is None else self._checked("start", start)

    def definition(self) -> dict[str, Any]:
        """With the two distributions and their numbers."""
        return {
            **super().definition(),
            "noise": _described(self.noise),
            "start": _described(self.start),
        }

    def noised(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The noise, scaled and shifted."""
        return Noised(self.noise, loc, scale, self.event_dim)

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The start at the scale of t = 1."""
        zeros = torch.zeros(self.check_event(event_shape), dtype=dtype, device=device)
        end = self._level_at(zeros.new_ones(()))
        scale = torch.hypot(end.alpha, end.sigma)
        return Noised(self.start or self.noise, zeros, scale, self.event_dim)

    def base_distribution(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The start, by default the noise itself."""
        zeros = torch.zeros(self.check_event(event_shape), dtype=dtype, device=device)
        return Noised(self.start or self.noise, zeros, torch.ones_like(zeros), self.event_dim)

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> BridgeCoefficients:
        """Weights of the bridge without noise.

        Raises:
            ValueError: for eta other than 0, which no bridge of a general noise has.
        """
        if eta != 0:
            raise ValueError(
                f"process: got AnyNoise for a bridge of eta={eta:g}, which is known for normal and Student-t "
                "noise alone, expected GaussianProcess or StudentTProcess; or samplers such as DDIM(), "
                "densities by ProbabilityFlow and training by FlowMatching()"
            )
        return super().coefficients(s, t, eta)

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: BridgeCoefficients
    ) -> TorchDistribution:
        """The point that the bridge without noise leads to, for the posterior's mean."""
        c = coefficients
        loc = c.xt * xt + c.x0 * per_coordinate(posterior).mean
        return Delta(loc, event_dim=self.event_dim, validate_args=False)

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """The point."""
        return {"loc": per_coordinate(kernel).mean}

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The point mass."""
        return Delta(tensors["loc"], event_dim=self.event_dim, validate_args=False)

    def _checked(self, name: str, noise: object) -> TorchDistribution:
        if isinstance(noise, TorchDistributionMixin):
            fits = noise.batch_shape == () and noise.event_dim in (0, self.event_dim)
            support: Any = noise.support
            if fits and not support.is_discrete:
                return noise
            shapes = (
                f"batch shape {tuple(noise.batch_shape)}, event shape {tuple(noise.event_shape)}"
            )
            got = f"{type(noise).__name__} of {shapes}, support {support}"
        else:
            got = type(noise).__name__
        raise ValueError(
            f"{name}: got {got}, expected a Pyro distribution of real numbers with batch shape () and 0 or "
            f"{self.event_dim} event dimension(s)"
        )


class Noised(TorchDistribution):
    """loc + scale z for z of any distribution, of one coordinate or of a whole datum.

    Args:
        noise: of z, batch shape ().
        loc: batch + event.
        scale: broadcasts to it.
        event_dim: how many rightmost dimensions make one datum.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self, noise: TorchDistribution, loc: Tensor, scale: Tensor, event_dim: int
    ) -> None:
        self.noise, (self.loc, self.scale) = noise, torch.broadcast_tensors(loc, scale)
        shape = self.loc.shape
        split = len(shape) - event_dim
        if noise.event_shape not in (torch.Size(), shape[split:]):
            raise ValueError(
                f"noise: got event shape {tuple(noise.event_shape)}, expected () or {tuple(shape[split:])}, "
                "that of the data"
            )
        super().__init__(shape[:split], shape[split:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """loc + scale E z, where the noise knows its mean."""
        return self.loc + self.scale * self._standard().mean

    @property
    def variance(self) -> Tensor:
        """Of every coordinate, where the noise knows its own."""
        return self.scale.square() * self._standard().variance

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution at a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        loc, scale = self.loc.expand(shape), self.scale.expand(shape)
        return type(self)(self.noise, loc, scale, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, sample + batch."""
        z = (value - self.loc) / self.scale
        out: Tensor = self._standard().log_prob(z)
        return out - sum_rightmost(self.scale.log(), len(self.event_shape))

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draws, differentiable in location and scale, sample + batch + event."""
        return self.loc + self.scale * draw(self._standard(), sample_shape).detach()

    def draw_from(self, noise: NoiseSource, sample_shape: Shape, event_dim: int) -> Tensor:
        """Draws by a source's numbers, whose rows have ``event_dim`` dimensions."""
        wide = self._standard().to_event(event_dim - len(self.event_shape))
        return self.loc + self.scale * noise.draw(wide, sample_shape).detach()

    def _standard(self) -> TorchDistribution:
        """The distribution of z at this batch and event shape, dtype and device."""
        noise = _like(self.noise, self.loc)
        if noise.event_shape == self.event_shape:
            out: TorchDistribution = noise.expand(self.batch_shape)
        else:
            out = noise.expand(self.loc.shape).to_event(len(self.event_shape))
        return out


def _described(part: Any, seen: tuple[int, ...] = ()) -> str:
    """A distribution, with the numbers of all that it is made of; the same before and after it is used."""
    if isinstance(part, Tensor):
        return str(part.tolist())
    if isinstance(part, list | tuple):
        return f"({', '.join(_described(x, seen) for x in part)})"
    if isinstance(part, bool | int | float | str | None):
        return repr(part)
    name = type(part).__name__
    if not isinstance(part, _KINDS) or id(part) in seen:
        return name
    # Arguments by name, as some are computed when asked for; and what else is no tensor.
    arguments = getattr(part, "arg_constraints", None)
    own = {k: v for k, v in vars(part).items() if arguments is None or not isinstance(v, Tensor)}
    own |= {k: getattr(part, k) for k in arguments or {}}
    told = sorted(k for k in own if k not in _UNTOLD and (k != "_inv" or name[0] == "_"))
    return f"{name}({', '.join(f'{k}={_described(own[k], (*seen, id(part)))}' for k in told)})"


def _like(part: Any, like: Tensor, done: dict[int, Any] | None = None) -> Any:
    """A distribution, with all that it is made of, in another's dtype and on its device, unchecked.

    ``done`` holds the parts that were met: a transform and its inverse know each other.
    """
    done = {} if done is None else done
    if id(part) in done:
        return done[id(part)]
    if isinstance(part, weakref.ref):
        return None  # a transform's memory of its inverse
    if isinstance(part, Tensor):
        return part.to(like) if part.is_floating_point() else part.to(like.device)
    if isinstance(part, list | tuple) and not isinstance(part, torch.Size):
        return type(part)(_like(x, like, done) for x in part)
    if not isinstance(part, _KINDS) or isinstance(part, torch.nn.Module):
        return part
    new = done[id(part)] = copy.copy(part)
    new.__dict__.update({name: _like(value, like, done) for name, value in vars(part).items()})
    if isinstance(new, torch.distributions.Distribution):
        new._validate_args = False  # outside its support the density is 0
    return new
