"""Whether a denoiser's jumps carry the data's own marginals: the master equation in weak form."""

from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.evaluate.continuity import ContinuityResidual
from pyro_diffusion.processes import Ability, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import (
    check_event_shape,
    check_integers,
    check_positive_int,
    check_tensor,
    check_times,
)

__all__ = ["jump_residual"]


@torch.no_grad()
def jump_residual(
    denoiser: Denoiser,
    data: Tensor,
    *,
    times: Tensor | int = 10,
    num_functions: int = 32,
    num_samples: int = 1,
    batch_size: int = 512,
) -> ContinuityResidual:
    r"""Weak-form residual of the master equation of the reverse jumps, by random test functions.

    Marginals of x_t obey, backwards in time and per unit of :math:`-\log\alpha`,
    :math:`\tfrac{d}{ds} E[\phi(x_t)] = E\big[\sum_y R_y(x_t)\,(\phi(y) - \phi(x_t))\big]` with R the rates of
    the reverse process, and the same equation with :math:`R_y(x_t | x_0)`, those of the reverse process given
    x_0. So there is no difference in time to take:

    .. math:: R_\phi(t) = E\Big[\sum_y \big(\hat R_y(x_t) - R_y(x_t | x_0)\big)\,(\phi(y) - \phi(x_t))\Big],

    with :math:`\hat R` the rates of the denoiser's posterior (``reverse_rates`` of the process), y one jump
    from x_t. Zero for every phi if and only if the denoiser's reverse process carries these marginals, as the
    exact posterior's does. Unbiased; unseen are errors that move no marginal. It is what
    :func:`continuity_residual` is for flows.

    Test functions are :math:`\phi(x) = \cos\big(\sum_i w_{i, x_i} + b\big)`, w normal of variance
    :math:`\omega^2/d` with :math:`\omega` = 1 or 2 (half each), b uniform.

    Args:
        denoiser: a denoiser under a process of symbols, without context, in ``eval()`` mode.
        data: integers, (n,) + event, n >= 2; held out.
        times: strictly between 0 and 1, or how many to space evenly.
        num_functions: number of test functions, the same at all times.
        num_samples: draws of x_t per datum and time.
        batch_size: data evaluated together.

    Returns:
        As :func:`continuity_residual`, at the clocks of the times.

    Raises:
        ValueError: for a process that is not one of symbols (strings of ``Deletion`` are none), bad data
            or counts.

    Example:
        >>> from pyro_diffusion.denoisers import TableDenoiser
        >>> from pyro_diffusion.processes import Absorbing
        >>> from pyro_diffusion.schedules import Rectified
        >>> joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]])
        >>> exact = TableDenoiser(Absorbing(Rectified.full(), states=2), joint)
        >>> x = torch.randint(2, (500, 1)).repeat(1, 2)
        >>> jump_residual(exact, x, times=5).z.shape
        torch.Size([5, 32])

    References:
        Campbell et al., arXiv 2205.14987, proposition 1.
    """
    process: Any = denoiser.process
    require(process, Ability.SYMBOLS, Ability.JUMPS, argument="denoiser")
    check_event_shape("data", data, data.shape[1:])
    if len(data) < 2 or data.dim() != 1 + process.event_dim:
        raise ValueError(
            f"data: got shape {tuple(data.shape)}, expected (n,) + event of {process.event_dim} dimensions, "
            "n >= 2"
        )
    check_integers("data", data, process.states)
    for name, value in (("num_functions", num_functions), ("num_samples", num_samples)):
        check_positive_int(name, value)
    check_positive_int("batch_size", batch_size)
    if not isinstance(times, Tensor):
        count = check_positive_int("times", times)
        times = torch.linspace(0, 1, count + 2, device=data.device)[1:-1]
    check_times("times", check_tensor("times", times))
    if times.dim() != 1 or not times.numel() or not bool(((times > 0) & (times < 1)).all()):
        raise ValueError(f"times: got {tuple(times.shape)}, expected a vector of times in (0, 1)")
    size = data[0].numel()
    octave = 1 + torch.arange(num_functions, device=data.device) % 2
    symbols = len(process.noise)
    w = torch.randn(size, symbols, num_functions, dtype=times.dtype, device=data.device)
    w = w * octave / size**0.5
    b = 2 * torch.pi * torch.rand(num_functions, dtype=times.dtype, device=data.device)
    values, errors, clocks = [], [], []
    for t in times:
        rows = data.long().repeat(num_samples, *[1] * process.event_dim)
        level = process.level(t, rows)
        parts = [_residual(denoiser, x0, level, w, b) for x0 in rows.split(batch_size)]
        per_datum = torch.cat(parts).view(num_samples, len(data), num_functions).mean(0)
        values.append(per_datum.mean(0))
        errors.append(per_datum.std(0) / len(data) ** 0.5)
        clocks.append(level.clock.flatten()[0])
    return ContinuityResidual(torch.stack(values), torch.stack(errors), torch.stack(clocks))


def _residual(denoiser: Denoiser, x0: Tensor, level: Level, w: Tensor, b: Tensor) -> Tensor:
    """Of every row and test function, (n, num_functions)."""
    process: Any = denoiser.process
    xt = draw(process.marginal(x0, level))
    found = process.reverse_rates(xt, denoiser(xt, level), level)
    known = process.reverse_rates(xt, process.point_mass(x0), level)
    gap = (found - known).flatten(1, -2)  # (n, size, symbols)
    places = torch.arange(gap.shape[1], device=xt.device)
    here = w[places, xt.flatten(1)]  # (n, size, num_functions)
    sums = here.sum(1) + b
    # A jump of one symbol changes the sum by the difference of two weights.
    jumped = torch.cos(sums[:, None, None] - here.unsqueeze(2) + w) - sums.cos()[:, None, None]
    return torch.einsum("nis,nisf->nf", gap, jumped)
