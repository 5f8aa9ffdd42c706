"""Student-t noise: Poisson flows and heavy-tailed diffusion."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from pyro.distributions import Delta, TorchDistribution
from torch import Tensor

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.linear import LinearProcess
from pyro_diffusion.processes.multivariate_t import DiagonalStudentT
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import check_number

__all__ = ["StudentTProcess"]


class StudentTCoefficients(NamedTuple):
    r"""What the bridge needs of its times; weights and variance are those of normal noise.

    Attributes:
        xt: r, the weight of the state.
        x0: k, the weight of the data.
        variance: v.
        alpha: signal scale at t.
        sigma: noise scale at t.
    """

    xt: Tensor
    x0: Tensor
    variance: Tensor
    alpha: Tensor
    sigma: Tensor


class StudentTProcess(LinearProcess):
    r""":math:`x_t = \alpha_t x_0 + \sigma_t \epsilon/\sqrt\kappa`, one
    :math:`\kappa \sim \Gamma(\frac\nu2, \frac\nu2)` for a datum.

    Noise of heavy tails, the multivariate t distribution of :math:`\nu` degrees of freedom. With N
    coordinates of a datum, :math:`d = |x_t - \alpha_t x_0|^2/\sigma_t^2` and the weights r, k and variance v
    of :class:`GaussianProcess`,

    .. math::
        q(x_t | x_0) &= t_\nu(\alpha_t x_0,\ \sigma_t^2), \\
        q_\eta(x_s | x_t, x_0) &= t_{\nu + N}\Big(r\,x_t + k\,x_0,\ v\,\frac{\nu + d}{\nu + N}\Big),

    (squared scales). It is PFGM++ with :math:`D = \nu` further dimensions (:math:`r = \sigma\sqrt D`), PFGM
    for :math:`\nu = 1`, t-EDM, and :class:`GaussianProcess` as :math:`\nu \to \infty`.

    Given :math:`x_s`, :math:`x_t` still depends on :math:`x_0`, for both tell of :math:`\kappa`: there is
    no Markov transition, hence no SDE, and no Tweedie's formula, so no score, Langevin step or guidance by
    gradients. A chain's bound is valid but *loosens* with its number of steps, by what each step forgets of
    :math:`\kappa`: for the exact posterior of three atoms on a line by 0.1, 1 and 9 nats at 10, 100 and 1000
    steps with :math:`\nu = 3` (``benchmarks/processes.py``). For likelihoods use few steps or
    :class:`~pyro_diffusion.distributions.ProbabilityFlow`, which is exact.

    Reverse kernel: exact for point masses; of a posterior with variance w, the t distribution of
    :math:`\nu + N` degrees of freedom with the mean and variances of the integral, squared scale
    :math:`v (\nu + \mathbb E d)/(\nu + N) + k^2 w (\nu + N - 2)/(\nu + N)` (a valid reverse model, hence a
    valid bound). Divergences of kernels are exact, by a one-dimensional integral. Scales may differ by
    coordinate.

    Args:
        schedule: signal and noise scales; chains need finite log-SNR at their ends.
        degrees_of_freedom: :math:`\nu`, from 0.5 to 1e30.
        event_dim: number of rightmost dimensions that make one datum.

    Raises:
        ValueError: for degrees of freedom outside, or when called, for a posterior with a variance where
            :math:`\nu + N \le 2`, whose reverse kernel has none.

    Example:
        >>> import torch
        >>> from pyro_diffusion.schedules import Cosine
        >>> process = StudentTProcess(Cosine(), degrees_of_freedom=4.0)
        >>> process.marginal(torch.zeros(5, 2), torch.rand(5)).event_shape
        torch.Size([2])

    References:
        Xu et al. (PFGM++), arXiv 2302.04265; Pandey et al. (t-EDM), arXiv 2410.14171.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        {
            *(Ability.NUMBERS, Ability.LINEAR, Ability.INDEPENDENT, Ability.FREE_VARIANCE),
            *(Ability.ISOTROPIC, Ability.ODE),
        }
    )

    def __init__(self, schedule: Schedule, degrees_of_freedom: float, event_dim: int = 1) -> None:
        super().__init__(schedule, event_dim)
        self.degrees_of_freedom = check_number(
            "degrees_of_freedom", degrees_of_freedom, at_least=0.5, at_most=1e30
        )

    def noised(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        r""":math:`t_\nu` of location and scale."""
        return DiagonalStudentT(self.degrees_of_freedom, loc, scale, self.event_dim)

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> StudentTCoefficients:  # type: ignore[override]
        """Weights and variance of the bridge for normal noise, and the scales at t."""
        return StudentTCoefficients(*super().coefficients(s, t, eta), t.alpha, t.sigma)

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: StudentTCoefficients
    ) -> TorchDistribution:
        """Bridge integrated over the posterior's first two moments."""
        c, base, events = coefficients, per_coordinate(posterior), tuple(range(-self.event_dim, 0))
        nu, count = self.degrees_of_freedom, xt.shape[xt.dim() - self.event_dim :].numel()
        mean, certain = base.mean, isinstance(base, Delta)
        misfit = ((xt - c.alpha * mean) / c.sigma).square()
        if not certain:
            if nu + count <= 2:
                raise ValueError(
                    f"posterior: got {type(base).__name__} under degrees_of_freedom={nu:g} and {count} "
                    "coordinate, whose reverse kernel has no variance, expected a point mass (or more "
                    "degrees of freedom)"
                )
            misfit = misfit + (c.alpha / c.sigma).square() * base.variance
        total = misfit.sum(events, keepdim=True) if events else misfit
        variance = c.variance * ((nu + total) / (nu + count))
        if not certain:
            share = (nu + count - 2) / (nu + count)
            variance = variance + share * c.x0.square() * base.variance
        loc = c.xt * xt + c.x0 * mean
        return DiagonalStudentT(nu + count, loc, variance.sqrt(), self.event_dim)

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Location and scale of every coordinate."""
        base = per_coordinate(kernel)
        return {"loc": base.loc, "scale": base.scale}

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The t distribution of them."""
        loc = tensors["loc"]
        count = loc.shape[loc.dim() - self.event_dim :].numel()
        df = self.degrees_of_freedom + count
        return DiagonalStudentT(df, loc, tensors["scale"], self.event_dim)
