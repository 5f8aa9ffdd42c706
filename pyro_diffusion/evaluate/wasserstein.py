"""Wasserstein-2 distances: measured between samples, and bounded by a denoiser's own error."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.analytic import check_data, check_mean, require_tweedie
from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import check_finite, check_number, check_positive_int, check_tensor

__all__ = ["WassersteinBound", "sliced_wasserstein", "wasserstein", "wasserstein_bound"]


def wasserstein(x: Tensor, y: Tensor) -> float:
    r"""Wasserstein-2 distance of two samples of equal size, by exact assignment.

    :math:`\min_\pi (\tfrac1n \sum_i \|x_i - y_{\pi(i)}\|^2)^{1/2}`, exact for the samples. Its square is
    biased upwards as an estimate of the distributions' own (two samples of one are some way apart):
    compare it with the distance of two samples of the data. O(n^3) time; some thousand points.

    Args:
        x: (n,) + event.
        y: (n,) + event.

    Raises:
        ValueError: for shapes that differ, or values that are not finite.
    """
    _check_pair(x, y)
    cost = torch.cdist(x.flatten(1).double(), y.flatten(1).double()).square().detach().cpu()
    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost[rows, columns].mean().sqrt())


def sliced_wasserstein(x: Tensor, y: Tensor, num_projections: int = 256) -> float:
    r"""Root mean square over random directions of the Wasserstein-2 distance of the projected samples.

    At most :math:`d^{-1/2}` times :func:`wasserstein` in mean square, and cheap for any sample size. A
    Monte-Carlo average over directions.

    Args:
        x: (n,) + event.
        y: (n,) + event.
        num_projections: number of directions.

    Raises:
        ValueError: for shapes that differ, values that are not finite, or no projections.
    """
    _check_pair(x, y)
    check_positive_int("num_projections", num_projections)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    directions = torch.randn(x[0].numel(), num_projections, dtype=x.dtype, device=x.device)
    directions = directions / directions.norm(dim=0)
    gap = (x.flatten(1) @ directions).sort(0).values - (y.flatten(1) @ directions).sort(0).values
    return float(gap.square().mean().sqrt())


@dataclass(frozen=True)
class WassersteinBound:
    r"""An upper bound of W2 between data and model, and its parts (in units of the data).

    Attributes:
        score: what errors of the posterior mean add on the way.
        prior: what the prior's distance from the marginal of x_1 becomes.
        smoothing: :math:`\sqrt d\,\sigma_0/\alpha_0`, from the chain's end at t_0 to data.
        log_snr: levels of the quadrature, from t = 1 to t = 0.
        error: root mean square error of the mean (or its bound) at these levels.
        lipschitz: one-sided Lipschitz constants of the posterior mean that were used there.
    """

    score: float
    prior: float
    smoothing: float
    log_snr: Tensor
    error: Tensor
    lipschitz: Tensor

    @property
    def value(self) -> float:
        """The bound."""
        return self.score + self.prior + self.smoothing


def wasserstein_bound(
    denoiser: Denoiser,
    data: Tensor,
    *,
    reference: Denoiser | None = None,
    lipschitz: Callable[[Level], Tensor] | None = None,
    eta: float = 1.0,
    num_points: int = 200,
) -> WassersteinBound:
    r"""Upper bound of W2(data, model) from the denoising loss along the reverse SDE or ODE.

    With :math:`c = (1 + \eta^2)/2`, :math:`r(\lambda)` the root mean square error of the posterior mean,
    :math:`L(\lambda)` its one-sided Lipschitz constant and
    :math:`I(\lambda) = \exp\big(c \int_\lambda^{\lambda_0} (\alpha L - 1)\,d\lambda'\big)`,

    .. math:: W_2 \le \int_{\lambda_1}^{\lambda_0} c\, r\, I\, d\lambda
              + \frac{I(\lambda_1)}{\alpha_1} W_2(q(x_1), p(x_1)) + \frac{\sqrt d\,\sigma_0}{\alpha_0},

    by Gronwall's inequality on two solutions of :math:`dx = (f x - c g^2 s)\,dt + \eta g\,dw` under one
    noise, one with the exact score and one with the model's: the paper's theorem in terms of the data
    estimate, for :math:`x_{t_0}/\alpha_0` beside data. r^2 is E|x0_hat* - x0_hat|^2 against a
    ``reference``; without one it is the denoising loss E|x_0 - x0_hat|^2, larger by the posterior's
    variance: still a bound, but one that no training brings to zero. The prior's distance is bounded by
    the coupling through x_0 and eps.

    A bound up to three approximations: averages over data, the trapezoidal rule, and L. The last is a
    supremum over states; by default the largest over the data's own x_t is taken, by exact Jacobians (d
    gradients per level: for small d). ``lipschitz`` lifts that reserve where the constant is known.
    Multi-modal data has posterior means so steep between modes that the bound says nothing.

    Needs one noise level for all coordinates: the two solutions' distance is measured in the data's units,
    :math:`|x/\alpha|`, and grows by one scalar rate per unit of :math:`\lambda`. Under scales by coordinate
    the log-SNRs fall at different rates, and errors in one coordinate enter the others' at another.

    Args:
        denoiser: a denoiser under a Gaussian process, in ``eval()`` mode.
        data: real data x_0, (n,) + event, n >= 2.
        reference: the exact denoiser, where it is known.
        lipschitz: ``lipschitz(levels)``, the one-sided Lipschitz constants of x_t -> x0_hat at a vector of
            levels.
        eta: 1 for the reverse SDE, 0 for the probability-flow ODE; at most 1000.
        num_points: levels of the quadrature, even in log-SNR.

    Returns:
        The bound as ``value``, the sum of its parts ``score`` (errors of the posterior mean), ``prior``
        (distance of the prior from the marginal at t = 1) and ``smoothing`` (from t_0 to data); ``error`` and
        ``lipschitz`` at the quadrature's levels ``log_snr``.

    Raises:
        ValueError: for a process that is not Gaussian or whose scales differ by coordinate, bad data,
            eta < 0 or fewer than two points.

    References:
        Kwon, Fan & Lee, arXiv 2212.06359, theorem 1.
    """
    process = require_tweedie(denoiser)
    require(process, Ability.ISOTROPIC, argument="denoiser", by=type(denoiser).__name__)
    if reference is not None:
        require_tweedie(reference)
    check_data(data, process.event_dim)
    check_positive_int("num_points", num_points, at_least=2)
    check_number("eta", eta, at_least=0, at_most=1e3)
    highest, lowest = process.clock_ends
    log_snr = torch.linspace(lowest, highest, num_points, dtype=data.dtype, device=data.device)
    levels = process.level_of_clock(log_snr).map(lambda v: v.flatten())
    error, constant = [], []
    for level in map(levels.at, range(num_points)):
        xt = draw(process.marginal(data, level)).detach()
        with torch.no_grad():
            target = data if reference is None else check_mean(reference(xt, level), data)
            gap = target - check_mean(denoiser(xt, level), data)
        error.append((gap.square().sum() / len(data)).sqrt())
        if lipschitz is None:
            constant.append(_one_sided_constant(denoiser, xt, level))
    slope = torch.stack(constant) if lipschitz is None else lipschitz(levels).expand(num_points)
    rms, c = torch.stack(error), (1 + eta**2) / 2
    # From the data's end: the last level has growth 1.
    steps = _trapezoids(c * (levels.alpha * slope - 1), log_snr)
    growth = torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)]).exp()
    prior = growth[0] / levels.alpha[0] * _prior_distance(process, data, levels.at(0))
    end = levels.at(-1)
    return WassersteinBound(
        score=float(_trapezoids(c * rms * growth, log_snr).sum()),
        prior=float(prior),
        smoothing=float(data[0].numel() ** 0.5 * end.sigma / end.alpha),
        log_snr=log_snr,
        error=rms,
        lipschitz=slope,
    )


def _trapezoids(values: Tensor, at: Tensor) -> Tensor:
    return 0.5 * (values[1:] + values[:-1]) * at.diff()


def _prior_distance(process: ForwardProcess, data: Tensor, end: Level) -> Tensor:
    """Bound of W2(q(x_1), p(x_1)): alpha x_0 + sigma eps beside scale eps."""
    scale = per_coordinate(process.prior(data.shape[1:], data.dtype, data.device)).scale
    signal = end.alpha.square() * data.square().sum() / len(data)
    return (signal + (scale - end.sigma).square().sum()).sqrt()


def _one_sided_constant(denoiser: Denoiser, xt: Tensor, level: Level) -> Tensor:
    """Largest eigenvalue of the symmetric part of the posterior mean's Jacobian over given states."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        mean = denoiser(xt, level).mean.reshape(len(xt), -1)
        rows = [
            torch.autograd.grad(mean[:, i].sum(), xt, retain_graph=True)[0]
            for i in range(mean.shape[1])
        ]
    jacobian = torch.stack(rows, 1).reshape(*mean.shape, -1)
    return torch.linalg.eigvalsh(0.5 * (jacobian + jacobian.mT))[:, -1].max()


def _check_pair(x: Tensor, y: Tensor) -> None:
    check_tensor("x", x)
    check_tensor("y", y)
    if x.shape != y.shape or x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"x, y: got shapes {tuple(x.shape)}, {tuple(y.shape)}, expected one shape (n,) + event"
        )
    check_finite("x", x)
    check_finite("y", y)
