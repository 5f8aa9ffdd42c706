"""What every step between candidate times would cost the bound."""

import torch
from pyro.distributions import Delta
from torch import Tensor
from tqdm import tqdm

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.analytic import check_data, check_mean, require_tweedie
from pyro_diffusion.denoisers.base import check_context
from pyro_diffusion.schedules import Level
from pyro_diffusion.schedules.optimal_grid import step_costs
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import check_positive_int

__all__ = ["chain_costs"]

# Numbers held at once while the costs from one posterior to all earlier times are computed.
BLOCK = 2**22


def chain_costs(
    denoiser: Denoiser,
    data: Tensor,
    times: Tensor,
    *,
    num_samples: int = 1,
    context: dict[str, Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    r"""The bound's cost of the step from t_j to t_i for every pair i < j of candidate times (nats per datum).

    A step's cost is a sum over coordinates of a function of the posterior at t_j and of the coordinate's own
    :math:`e^{\lambda_i} - e^{\lambda_j}`, so one network evaluation per datum and time gives the costs of all
    steps that start there. Unbiased for *any* variance of the posterior: none, one number, or one per
    coordinate. The decoder's and the prior's terms are the same for all grids with the same ends.

    Args:
        denoiser: any denoiser under a Gaussian process, in ``eval()`` mode.
        data: real data x_0, (n,) + event, n >= 2; some hundred will do.
        times: (N + 1,), increasing candidates from t_0 to 1.
        num_samples: noise draws per datum and time.
        context: the denoiser's context, one row per datum.
        progress: whether to show a progress bar.

    Returns:
        The ``costs`` of :func:`~pyro_diffusion.schedules.optimal_grid`, (N + 1, N + 1) in float64, infinite
        on and below the diagonal.

    Raises:
        ValueError: for a process that is not Gaussian, bad data, a context without exactly one row per
            datum, or a bad grid.

    References:
        Watson et al., arXiv 2106.03802, section 4; there the variance is fixed, here it is the posterior's.
    """
    process = require_tweedie(denoiser)
    check_data(data, process.event_dim)
    check_positive_int("num_samples", num_samples)
    context = check_context(denoiser, context, len(data))
    process.check_grid(times)
    levels = process.levels(times.to(data))
    snr = levels.log_snr.double().exp()
    costs = torch.full((len(times), len(times)), torch.inf, dtype=torch.float64, device=data.device)
    # One noise for all times: costs then vary smoothly along the chain, and no time is chosen for its luck.
    noise = torch.randn(num_samples, *data.shape, dtype=data.dtype, device=data.device)
    with torch.no_grad():
        for j in tqdm(range(1, len(times)), desc="costs of steps", disable=not progress):
            gain = snr[:j] - snr[j]
            parts = [_costs(denoiser, data, e, levels.at(j), gain, context) for e in noise]
            costs[:j, j] = torch.stack(parts).sum(0) / (num_samples * len(data))
    return costs


def _costs(
    denoiser: Denoiser,
    data: Tensor,
    noise: Tensor,
    level: Level,
    gain: Tensor,
    context: dict[str, Tensor],
) -> Tensor:
    """Costs of going from one level to each earlier one, summed over data and coordinates.

    Gains have a row for each earlier level and singleton dimensions where coordinates have the same.
    """
    q = per_coordinate(denoiser.process.marginal(data, level))
    posterior = per_coordinate(denoiser(q.mean + q.stddev * noise, level, **context))
    residual = (data - check_mean(posterior, data)).square().double()
    # Over data, and over coordinates of one gain.
    alike = (0, *(dim for dim, size in enumerate(gain.shape[1:], 1) if size == 1))
    if isinstance(posterior, Delta):
        variance = least = torch.zeros_like(gain[0])
    else:
        variance = posterior.variance.double().expand_as(residual)
        least = variance.amin(alike, keepdim=True)[0]
    if bool((variance == least).all()):  # then the cost is linear in the residual
        mean = residual.mean(alike, keepdim=True)[0]
        blocks = [step_costs(gain, least, mean) * (residual.numel() // mean.numel())]
    else:
        rows = gain.unsqueeze(1).split(max(1, BLOCK // residual.numel()))
        blocks = [step_costs(each, variance, residual) for each in rows]
    return torch.cat([block.reshape(len(block), -1).sum(1) for block in blocks])
