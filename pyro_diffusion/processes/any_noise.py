"""Noise of any distribution, for the probability flow and samplers without noise of their own."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.linear import BridgeCoefficients, LinearProcess
from pyro_diffusion.processes.noised import PARTS, Noised
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["AnyNoise"]

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
            its support is bounded, the flow's log-density of what comes from beyond it is -inf.
        start: distribution of :math:`x_1/\sqrt{\alpha_1^2 + \sigma_1^2}`, where it is known better than as
            that of z, likewise. What is left of the data at t = 1 then costs nothing.
        event_dim: number of rightmost dimensions that make one datum.

    Raises:
        ValueError: for a noise or start that is no distribution of real numbers of batch shape () and of 0 or
            ``event_dim`` event dimensions.

    Example:
        >>> import torch
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

    def started(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The start, scaled and shifted; by default the noise."""
        return Noised(self.start or self.noise, loc, scale, self.event_dim)

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


def _described(part: Any, seen: tuple[int, ...] = ()) -> str:
    """A distribution, with the numbers of all that it is made of; the same before and after it is used."""
    if isinstance(part, Tensor):
        return str(part.tolist())
    if isinstance(part, list | tuple):
        return f"({', '.join(_described(x, seen) for x in part)})"
    if isinstance(part, bool | int | float | str | None):
        return repr(part)
    name = type(part).__name__
    if not isinstance(part, PARTS) or id(part) in seen:
        return name
    # Arguments by name, as some are computed when asked for; and what else is no tensor.
    arguments = getattr(part, "arg_constraints", None)
    own = {k: v for k, v in vars(part).items() if arguments is None or not isinstance(v, Tensor)}
    own |= {k: getattr(part, k) for k in arguments or {}}
    told = sorted(k for k in own if k not in _UNTOLD and (k != "_inv" or name[0] == "_"))
    return f"{name}({', '.join(f'{k}={_described(own[k], (*seen, id(part)))}' for k in told)})"
