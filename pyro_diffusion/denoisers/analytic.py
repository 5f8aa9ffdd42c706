"""The best variance per noise level, measured on data for a denoiser whose mean is given."""

from collections.abc import Callable, Iterator

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers.base import Denoiser, check_context
from pyro_diffusion.denoisers.variances import TimeVariance, unit_variance
from pyro_diffusion.processes import Ability, ForwardProcess, draw, drawing_from
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.noise import fresh_seed
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_finite, check_positive_int, check_tensor

__all__ = ["EstimatedVariance", "analytic_variance", "residual_variance"]

# Of log(v / unit_variance): a variance of zero is stored as e^-15 of the noise's.
LEAST_LOG_RATIO = -15.0

# Of (x_0, x_t, x0_hat, level), per coordinate.
Moment = Callable[[Tensor, Tensor, Tensor, Level], Tensor]


class EstimatedVariance(TimeVariance):
    r"""One variance per noise level that was measured, not trained: buffers that travel with the model.

    Between knots it is interpolated as a :class:`TimeVariance` is. A checkpoint carries it: build one with
    the same number of knots (``EstimatedVariance(knots)``) and load the state into it.

    Args:
        log_snr: increasing knots.
        variance: v at the knots, >= 0; that of standard normal data by default.
        standard_error: Monte-Carlo standard errors of ``variance`` before clipping; zeros by default.

    Raises:
        ValueError: if the knots do not increase, the shapes differ or a variance is negative.
    """

    standard_error: Tensor

    def __init__(
        self, log_snr: Tensor, variance: Tensor | None = None, standard_error: Tensor | None = None
    ) -> None:
        ratio = None
        check_tensor("log_snr", log_snr)
        for name, value in (("variance", variance), ("standard_error", standard_error)):
            if value is not None and check_tensor(name, value).shape != log_snr.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected {tuple(log_snr.shape)}, that "
                    "of the knots"
                )
        if variance is not None:
            check_finite("variance", variance)
            if bool((variance < 0).any()):
                raise ValueError(f"variance: got {float(variance.min()):g}, expected numbers >= 0")
            # The logarithm of the ratio to unit_variance, without its overflow at low log-SNR.
            ratio = variance.double().log() + torch.nn.functional.softplus(log_snr.double())
            ratio = ratio.clamp(min=LEAST_LOG_RATIO)
        super().__init__(log_snr, ratio, trainable=False)
        error = torch.zeros_like(self.knots) if standard_error is None else standard_error
        self.register_buffer("standard_error", error.to(self.knots).clone())

    @property
    def value(self) -> Tensor:
        """v at the knots."""
        return self.log_ratio.exp() * torch.sigmoid(-self.knots)


def analytic_variance(
    denoiser: Denoiser,
    data: Tensor,
    *,
    knots: Tensor | int = 100,
    num_samples: int = 1,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
) -> EstimatedVariance:
    r"""Analytic-DPM's optimal posterior variance per noise level, from the denoiser's mean alone.

    .. math:: v(\lambda) = \frac{\sigma^2}{\alpha^2}
              \Big(1 - \tfrac1d\,\mathbb E\|\hat\epsilon(x_t)\|^2\Big),
              \qquad \hat\epsilon = (x_t - \alpha \hat x_0)/\sigma.

    For an exact mean it is the average of Var[x_0 | x_t] over x_t and coordinates, the best single number for
    the bound at *any* two times. 1 is replaced by the :math:`\|\epsilon\|^2/d` of the very noise that
    was drawn: the same expectation, and no noise where :math:`\hat\epsilon` follows :math:`\epsilon`.

    The estimate is unbiased before it is clipped to :math:`[0, \min(\sigma^2/\alpha^2, s^2)]`. The first
    limit is where :math:`\hat\epsilon` vanishes. The second, with s^2 the data's variance averaged over
    coordinates, stands in for the paper's :math:`((b-a)/2)^2` of data in [a, b]: no posterior exceeds it on
    average (law of total variance), and it is never looser. Where noise differs by coordinate it is each
    coordinate's own.

    Args:
        denoiser: any denoiser under a Gaussian process, in ``eval()`` mode; only its mean is used.
        data: real data x_0, (n,) + event, n >= 2 (``Diffusion.encode`` makes it from integers). Use training
            data.
        knots: increasing log-SNRs, or how many to space evenly between the schedule's ends.
        num_samples: noise draws per datum and knot.
        context: the denoiser's context, one row per datum.
        batch_size: data per evaluation of the denoiser.

    Returns:
        The variance, with ``standard_error`` at its knots (over data).

    Raises:
        ValueError: for a process that is not Gaussian, bad data, a context without exactly one row per datum,
            or fewer than two knots.

    Example:
        >>> from pyro_diffusion.denoisers import MixtureDenoiser, VarianceDenoiser
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> exact = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(2), torch.eye(2), 0.1)
        >>> variance = analytic_variance(exact, exact.data().sample((100,)), knots=20)
        >>> VarianceDenoiser(exact, variance)(torch.zeros(3, 2), 0.5).variance.shape
        torch.Size([3, 2])

    References:
        Bao et al., Analytic-DPM, arXiv 2201.06503, theorems 1 and 2.
    """

    def cap(level: Level, data_variance: Tensor) -> Tensor:
        return torch.minimum((-level.log_snr).exp(), data_variance)

    return _estimate(_analytic, cap, denoiser, data, knots, num_samples, context, batch_size)


def residual_variance(
    denoiser: Denoiser,
    data: Tensor,
    *,
    knots: Tensor | int = 100,
    num_samples: int = 1,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
) -> EstimatedVariance:
    r"""Mean square residual per noise level, :math:`v(\lambda) = \tfrac1d\,\mathbb E\|x_0 - \hat x_0\|^2`.

    The best single number for the bound whatever the mean: a step's cost
    :math:`\tfrac d2 [\log(1 + g v) + (1 + g m)/(1 + g v) - 1]` is least at v = m, its own mean square
    residual. It exceeds :func:`analytic_variance` by :math:`\tfrac{2\sigma}{\alpha d}
    \mathbb E\langle x_0 - \hat x_0, \hat\epsilon\rangle`, which is zero for an exact mean, and is the
    less noisy of the two. On data the denoiser was trained on it is too small by the overfitting. Unbiased,
    not clipped from above.

    Args:
        denoiser: as for :func:`analytic_variance`, and so are the others.
        data: real data x_0, (n,) + event, n >= 2.
        knots: increasing log-SNRs, or how many to space evenly between the schedule's ends.
        num_samples: noise draws per datum and knot.
        context: the denoiser's context, one row per datum.
        batch_size: data per evaluation of the denoiser.

    Returns:
        The variance, with ``standard_error`` at its knots (over data).

    Raises:
        ValueError: for a process that is not Gaussian, bad data, a context without exactly one row per datum,
            or fewer than two knots.

    References:
        Bao et al., Extended-Analytic-DPM, arXiv 2206.07309, section 3.2 (imperfect means).
    """

    def cap(level: Level, data_variance: Tensor) -> Tensor:
        return torch.full_like(level.log_snr, torch.inf)

    return _estimate(_residual, cap, denoiser, data, knots, num_samples, context, batch_size)


def _analytic(x0: Tensor, xt: Tensor, mean: Tensor, level: Level) -> Tensor:
    """(sigma/alpha)^2 (eps^2 - eps_hat^2), written so that nothing cancels."""
    gap, noise = x0 - mean, (xt - level.alpha * mean) / level.sigma
    return gap.square() - 2 * level.sigma / level.alpha * gap * noise


def _residual(x0: Tensor, xt: Tensor, mean: Tensor, level: Level) -> Tensor:
    return (x0 - mean).square()


def _estimate(
    moment: Moment,
    cap: Callable[[Level, Tensor], Tensor],
    denoiser: Denoiser,
    data: Tensor,
    knots: Tensor | int,
    num_samples: int,
    context: dict[str, Tensor] | None,
    batch_size: int,
) -> EstimatedVariance:
    """Averages of a moment over data, noise and coordinates, knot by knot."""
    process = require_tweedie(denoiser)
    check_data(data, process.event_dim)
    check_positive_int("num_samples", num_samples)
    check_positive_int("batch_size", batch_size)
    if not isinstance(knots, Tensor):
        highest, lowest = process.clock_ends
        count = check_positive_int("knots", knots, at_least=2)
        knots = torch.linspace(lowest, highest, count, dtype=data.dtype, device=data.device)
    levels = process.level_of_clock(knots.to(data))
    means, errors = [], []
    with torch.no_grad():
        for level in map(levels.at, range(len(knots))):
            values = [
                _on_clock(moment(x0, xt, mean, level), level).reshape(len(x0), -1).mean(1)
                for x0, xt, mean in denoised_batches(
                    denoiser, data, level, num_samples, context, batch_size
                )
            ]
            # One number per datum: several draws of one datum are not independent.
            per_datum = torch.cat(values).reshape(num_samples, len(data)).mean(0)
            means.append(per_datum.mean())
            errors.append(per_datum.std() / len(data) ** 0.5)
    mean, spread = torch.stack(means), data.var(0)
    if (
        Ability.ISOTROPIC in process.abilities
    ):  # otherwise the average may lie below a coordinate's own
        spread = spread.mean()
    largest = _on_clock(cap(levels, spread), levels).reshape(len(knots), -1).mean(1)
    clipped = torch.minimum(mean.clamp(min=0), largest)
    return EstimatedVariance(knots, clipped, torch.stack(errors)).to(data)


def _on_clock(variance: Tensor, level: Level) -> Tensor:
    """Variances as they would be at the clock's noise level: in the same ratio to that of unit data."""
    if level.log_snr is level.clock:
        return variance
    return variance * (torch.sigmoid(-level.clock) / unit_variance(level))


def denoised_batches(
    denoiser: Denoiser,
    data: Tensor,
    level: Level,
    num_samples: int,
    context: dict[str, Tensor] | None,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of x_0, x_t and x0_hat at one level, draw after draw over the data."""
    context = check_context(denoiser, context, len(data))
    index = torch.arange(len(data), device=data.device)
    for _ in range(num_samples):
        seed = fresh_seed()
        for start in range(0, len(data), batch_size):
            rows = slice(start, start + batch_size)
            x0 = data[rows]
            with drawing_from(RowNoise(seed, index[rows])):
                xt = draw(denoiser.process.marginal(x0, level))
                posterior = denoiser(xt, level, **{k: v[rows] for k, v in context.items()})
            yield x0, xt, check_mean(posterior, x0)


def check_mean(posterior: TorchDistribution, x0: Tensor) -> Tensor:
    """The mean of a posterior, refused where it is not of its data's shape (it would broadcast).

    Raises:
        ValueError: naming what was found.
    """
    mean: Tensor = posterior.mean
    if mean.shape != x0.shape:
        raise ValueError(
            f"denoiser: got a posterior mean of shape {tuple(mean.shape)}, expected {tuple(x0.shape)}, that "
            "of the data"
        )
    return mean


def require_tweedie(denoiser: Denoiser) -> ForwardProcess:
    """Refuse a denoiser under a process without Tweedie's formula.

    Raises:
        ValueError: naming what was found.
    """
    process = getattr(denoiser, "process", None)
    require(process, Ability.TWEEDIE, argument="denoiser", by=type(denoiser).__name__)
    assert isinstance(process, ForwardProcess)
    return process


def check_data(data: Tensor, event_dim: int) -> None:
    """Refuse anything but two or more finite real data, (n,) + event.

    Raises:
        ValueError: naming what was found.
    """
    if check_tensor("data", data).dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"data: got {data.dtype}, expected real x_0 of float32 or float64 (Diffusion.encode makes it "
            "from integers)"
        )
    if data.dim() != 1 + event_dim or len(data) < 2 or data.numel() == 0:
        raise ValueError(
            f"data: got shape {tuple(data.shape)}, expected (n,) and {event_dim} event dimension(s), "
            "n >= 2"
        )
    check_finite("data", data)
