"""Whether a denoiser's flow carries the data's own marginals: the continuity equation in weak form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.analytic import check_data, denoised_batches
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.validation import check_positive_int

__all__ = ["ContinuityResidual", "continuity_residual"]


@dataclass(frozen=True)
class ContinuityResidual:
    """Residuals of the continuity equation, one per level and test function.

    Attributes:
        value: (levels, num_functions), per unit of log-SNR.
        standard_error: the same shape, over data.
        log_snr: (levels,).
    """

    value: Tensor
    standard_error: Tensor
    log_snr: Tensor

    @property
    def z(self) -> Tensor:
        """Residuals in standard errors, near standard normal each for an exact denoiser; 0 for one of 0."""
        return torch.where(self.value == 0, self.value, self.value / self.standard_error)

    @property
    def rms(self) -> Tensor:
        """Root mean square over test functions, the Monte-Carlo variance taken off, (levels,)."""
        square = self.value.square() - self.standard_error.square()
        return square.mean(-1).clamp(min=0).sqrt()


def continuity_residual(
    denoiser: Denoiser,
    data: Tensor,
    *,
    levels: Tensor | int = 10,
    num_functions: int = 32,
    num_samples: int = 1,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
) -> ContinuityResidual:
    r"""Weak-form residual of the continuity equation along the forward process, by random test functions.

    Marginals of x_t obey :math:`\tfrac{d}{d\lambda} E[\phi(x_t)] = E[\nabla\phi(x_t) \cdot v(x_t, \lambda)]`
    with v the velocity of the probability-flow ODE. Along :math:`x_t = \alpha x_0 + \sigma\epsilon` the
    left side is an average too, of the velocity given x_0 and eps, so no finite difference in time is needed:

    .. math:: R_\phi(\lambda) = E\big[\nabla\phi(x_t)\cdot(\dot\alpha x_0 + \dot\sigma\epsilon - v(x_t))\big]
              = \tfrac{\alpha}{2}\, E\big[\nabla\phi(x_t) \cdot (x_0 - \hat x_0(x_t))\big],

    for :math:`v = \dot\alpha\hat x_0 + \tfrac{\dot\sigma}{\sigma}(x_t - \alpha\hat x_0)`, whatever
    distribution eps has.

    Where noise differs by coordinate, each is per unit of the clock: its :math:`\alpha_k` comes with
    :math:`d\lambda_k/d\lambda`, and n is its own.

    Zero for every phi if and only if the denoiser's flow carries these marginals, as the exact posterior
    mean's does. The Fokker-Planck equations of the reverse SDEs have the same residual times
    :math:`1 + \eta^2`. An error whose density-weighted divergence vanishes changes no marginal and goes
    unseen.

    Test functions are :math:`\phi(x) = \cos(w \cdot x/n + b)`, n the root mean square of a coordinate of x_t,
    w normal of covariance :math:`\omega^2 I/d` with :math:`\omega` = 1 or 2 (half each), b uniform.
    Unbiased. The data should be held out: an overfitted denoiser flatters itself on its own.

    Args:
        denoiser: a denoiser under a process of real data whose noise is independent of them (Gaussian
            of any kind, Student-t, ``AnyNoise``), in ``eval()`` mode.
        data: real data x_0, (n,) + event, n >= 2.
        levels: log-SNRs, or how many to space evenly between the schedule's ends.
        num_functions: number of test functions, the same at all levels.
        num_samples: noise draws per datum and level.
        context: the denoiser's context, one row per datum.
        batch_size: data evaluated together.

    Returns:
        Residuals ``value`` (levels, num_functions) per unit of log-SNR, their ``standard_error`` over data,
        their z-scores ``z``, near standard normal for an exact denoiser, and ``rms`` (levels,), the root mean
        square over test functions without the Monte-Carlo variance; at the levels ``log_snr``.

    Raises:
        ValueError: for a process without such a flow (symbols, strings, noise that depends on the data), bad
            data or counts, or a context without exactly one row per datum.

    Example:
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> exact = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(2), torch.eye(2), 0.1)
        >>> continuity_residual(exact, exact.data().sample((500,)), levels=5).z.shape
        torch.Size([5, 32])

    References:
        Song et al., arXiv 2011.13456, appendix D.1; Lipman et al., arXiv 2210.02747, theorem 1 (velocities
        given the ends average to the marginal one).
    """
    process = getattr(denoiser, "process", None)
    abilities = (Ability.LINEAR, Ability.INDEPENDENT, Ability.ODE)
    require(process, *abilities, argument="denoiser", by=type(denoiser).__name__)
    assert isinstance(process, ForwardProcess)
    check_data(data, process.event_dim)
    check_positive_int("num_functions", num_functions)
    check_positive_int("num_samples", num_samples)
    check_positive_int("batch_size", batch_size)
    if not isinstance(levels, Tensor):
        highest, lowest = process.clock_ends
        count = check_positive_int("levels", levels)
        levels = torch.linspace(lowest, highest, count + 2, dtype=data.dtype, device=data.device)[
            1:-1
        ]
    size = data[0].numel()
    octave = 1 + torch.arange(num_functions, device=data.device) % 2
    w = torch.randn(size, num_functions, dtype=data.dtype, device=data.device) * octave / size**0.5
    b = 2 * torch.pi * torch.rand(num_functions, dtype=data.dtype, device=data.device)
    spread = data.square().mean()
    at = process.level_of_clock(levels.to(data))
    rates = process.rates(at.t.flatten())
    relative_rate = rates.log_snr / rates.clock
    values, errors = [], []
    with torch.no_grad():
        for level, speed in zip(map(at.at, range(len(levels))), relative_rate, strict=True):
            width = (level.alpha.square() * spread + level.sigma.square()).sqrt()
            parts = [
                _residual(xt / width, level.alpha * speed / width * (x0 - mean), w, b)
                for x0, xt, mean in denoised_batches(
                    denoiser, data, level, num_samples, context, batch_size
                )
            ]
            per_datum = torch.cat(parts).reshape(num_samples, len(data), num_functions).mean(0)
            values.append(per_datum.mean(0))
            errors.append(per_datum.std(0) / len(data) ** 0.5)
    return ContinuityResidual(torch.stack(values), torch.stack(errors), at.clock.flatten())


def _residual(x: Tensor, gap: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Half the derivative of cos(w . x + b) in the direction of a gap, (n, num_functions)."""
    x, gap = (v.reshape(len(v), -1) for v in (x, gap))
    return -0.5 * torch.sin(x @ w + b) * (gap @ w)
