"""The best few times of many: a shortest path over what each step would cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_diffusion.validation import check_broadcast, check_positive_int, check_tensor

__all__ = ["optimal_grid", "optimal_grids", "step_costs"]


def step_costs(gain: Tensor, variance: Tensor, residual: Tensor) -> Tensor:
    r"""Cost of a Gaussian reverse step per coordinate: KL(bridge || reverse kernel), in nats.

    .. math:: L = \tfrac12\Big[\log(1 + g v) + \frac{1 + g m}{1 + g v} - 1\Big], \qquad
              g = e^{\lambda_s} - e^{\lambda_t},

    exact for the step from t to s < t of a posterior with variance v whose mean misses x_0 by a squared error
    m. Linear in m: its mean gives the mean cost where v is one number. Least at v = m.

    Args:
        gain: g > 0.
        variance: v >= 0 at t.
        residual: m >= 0 at t.

    Returns:
        L, of the arguments' broadcast shape.

    Raises:
        ValueError: for negative numbers.

    References:
        Derived from the Gaussian kernels; compare Kingma et al., arXiv 2107.00630, equation 12 (v = 0).
    """
    for name, value in (("gain", gain), ("variance", variance), ("residual", residual)):
        if bool((check_tensor(name, value) < 0).any()):
            raise ValueError(f"{name}: got {float(value.min()):g}, expected numbers >= 0")
    check_broadcast("gain", gain.shape, variance.shape)
    check_broadcast("residual", residual.shape, torch.broadcast_shapes(gain.shape, variance.shape))
    wide = gain * variance
    return 0.5 * (torch.log1p(wide) + (gain * residual - wide) / (1 + wide))


def optimal_grid(times: Tensor, costs: Tensor, steps: int) -> Tensor:
    r"""The ``steps`` + 1 of the ``times``, both ends among them, whose chain has the least total cost.

    Exact: dynamic programming over the number of steps, O(N^2 steps) for N + 1 candidate times.

    Args:
        times: (N + 1,), increasing candidates.
        costs: (N + 1, N + 1), ``costs[i, j]`` the cost of the step from t_j to t_i, i < j; other entries are
            ignored. :func:`~pyro_diffusion.evaluate.chain_costs` estimates them on data.
        steps: number of steps, at most N.

    Returns:
        Increasing times, a grid for ``Diffusion(times=...)``.

    Raises:
        ValueError: for shapes that do not fit, NaN costs, or steps outside 1 ... N.

    Example:
        >>> times = torch.linspace(0, 1, 5)
        >>> costs = (times - times[:, None]).square() * (1 + times)
        >>> optimal_grid(times, costs, 2)
        tensor([0.0000, 0.5000, 1.0000])

    References:
        Watson et al., arXiv 2106.03802, algorithm 1.
    """
    return optimal_grids(times, costs, [steps])[steps]


def optimal_grids(times: Tensor, costs: Tensor, steps: Sequence[int]) -> dict[int, Tensor]:
    """:func:`optimal_grid` for several numbers of steps, in one pass."""
    _check(times, costs)
    count = len(times) - 1
    if not steps:
        raise ValueError(f"steps: got {steps!r}, expected at least one number of steps")
    for each in steps:
        if check_positive_int("steps", each) > count:
            raise ValueError(f"steps: got {each}, expected at most {count}, the candidate steps")
    ahead = torch.ones_like(costs, dtype=torch.bool).triu(1)
    costs = costs.detach().double().masked_fill(~ahead, torch.inf)
    # best[j]: least cost of reaching t_j from t_0 in k steps; came[k][j]: the time before it.
    best = torch.full((count + 1,), torch.inf, dtype=costs.dtype, device=costs.device)
    best[0] = 0.0
    came = []
    for _ in range(max(steps)):
        best, before = (best.unsqueeze(-1) + costs).min(0)
        came.append(before)
    table = torch.stack(came).tolist()  # one trip to the host for all the paths
    grids = {}
    for each in steps:
        path = [count]
        for k in reversed(range(each)):
            path.append(table[k][path[-1]])
        grids[each] = times[path[::-1]]
    return grids


def _check(times: Tensor, costs: Tensor) -> None:
    check_tensor("times", times)
    check_tensor("costs", costs)
    if times.dim() != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
        raise ValueError(
            f"times: got shape {tuple(times.shape)}, expected two or more increasing times"
        )
    if costs.shape != (len(times), len(times)):
        raise ValueError(
            f"costs: got shape {tuple(costs.shape)}, expected {(len(times), len(times))}"
        )
    if bool(costs[torch.ones_like(costs, dtype=torch.bool).triu(1)].isnan().any()):
        raise ValueError("costs: got NaN above the diagonal, expected numbers")
