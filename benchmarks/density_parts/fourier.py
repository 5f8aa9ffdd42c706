"""Fourier densities: fits of ten-component mixtures, and posteriors of a diffusion of data with modes."""

import warnings

import numpy as np
import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal
from torch import Tensor

from pyro_diffusion.distributions import FourierDensity

from .fourier_limit import least
from .fourier_posteriors import bounds

# Ten components each: weights in hundredths, means, standard deviations.
TARGETS = {
    "comb": ([10] * 10, [0.8 * k - 3.6 for k in range(10)], [0.2] * 10),
    "uneven": (
        [5, 20, 5, 15, 10, 5, 10, 5, 15, 10],
        [-4.0, -3.1, -2.6, -1.5, -0.4, 0.3, 1.0, 1.9, 2.8, 4.1],
        [0.3, 0.2, 0.5, 0.3, 0.15, 0.4, 0.2, 0.3, 0.5, 0.2],
    ),
    "broad and sharp": (
        [30, 4, 4, 4, 4, 4, 15, 15, 10, 10],
        [0.0, -2.0, -1.0, 0.0, 1.0, 2.0, -3.5, 3.5, -1.5, 1.5],
        [1.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.6, 0.6, 0.3, 0.3],
    ),
}
DEGREE, STARTS, ROWS = 14, 20, 2000
# Free numbers: 2 (N + 1), of which length and phase say nothing, a location and a scale; K weights, whose sum
# is 1, means and scales. As arrays hold them, 32 and 30: by either count ten components are the most.
COUNT = 2 * (DEGREE + 1)
COMPONENTS = (COUNT + 1) // 3


def mixture(logits: Tensor, means: Tensor, scales: Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=logits), Normal(means, scales))


def divergences(truth: MixtureSameFamily, log_prob: Tensor, x: Tensor) -> Tensor:
    """KL(truth || fit) of every start, from log-densities on an even grid (nats)."""
    log_p = truth.log_prob(x)
    return (log_p.exp() * (log_p - log_prob)).sum(-1) * (x[1] - x[0])


def by_gradient(
    kind: str, data: Tensor, grid: Tensor, steps: int, degree: int = DEGREE, lr: float = 0.03
) -> Tensor:
    """Log-densities on the grid of every start, fitted together: one optimizer, batches of the start."""
    torch.manual_seed(1)
    if kind == "Fourier":
        # The fit has several optima in location and scale, so that these are drawn, too.
        spread = data.std()
        parts = [
            0.3 * torch.randn(STARTS, degree + 1, 2),
            data.mean() + 0.4 * spread * torch.randn(STARTS),
            (1.6 * spread).log() + 0.2 * torch.randn(STARTS),
        ]
        parts[0][:, 0, 0] += 1
    else:
        index = torch.randint(len(data), (STARTS, COMPONENTS))
        parts = [
            torch.zeros(STARTS, COMPONENTS),
            data[index],
            torch.full((STARTS, COMPONENTS), -0.7),
        ]
    parts = [part.requires_grad_() for part in parts]

    def law(shape: tuple[int, ...] = ()) -> Tensor:
        first, second, third = parts
        if kind == "Fourier":
            return FourierDensity(first, second, third.exp(), validate_args=False)
        return mixture(first, second, third.exp())

    optimizer = torch.optim.Adam(parts, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-law().log_prob(data.unsqueeze(-1)).mean(0).sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return law().log_prob(grid.unsqueeze(-1)).T


def by_em(data: Tensor, grid: Tensor) -> Tensor:
    """Gaussian mixtures by EM from k-means."""
    from sklearn.mixture import GaussianMixture

    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(STARTS):
            fit = GaussianMixture(COMPONENTS, random_state=seed).fit(data.unsqueeze(-1).numpy())
            rows.append(torch.from_numpy(fit.score_samples(grid.unsqueeze(-1).numpy())))
    return torch.stack(rows)


def fits(scale: float) -> bool:
    """Print the fits; whether the Fourier density is no worse than a Gaussian mixture by gradient."""
    steps, behind = max(int(600 * scale), 2), []
    print(
        f"KL of fits in nats, median (quartiles) of {STARTS} starts, {ROWS} rows, {steps} steps; {COUNT} free"
        f" numbers\nat N = {DEGREE}, {3 * COMPONENTS - 1} in {COMPONENTS} components; least: the best"
        " there is for the density itself,\nand by how much at most others of that place and scale are better"
    )
    print(
        f"{'target':>16} {'Fourier, N = 14':>24} {'mixture by gradient':>24} {'mixture by EM':>24}"
        f" {'N = 22':>24} {'N = 14, least':>20}"
    )
    grid = torch.linspace(-9, 9, 4001)
    for name, (weights, means, scales) in TARGETS.items():
        truth = mixture(torch.tensor(weights).log(), torch.tensor(means), torch.tensor(scales))
        torch.manual_seed(0)
        data, row, medians = truth.sample((ROWS,)), f"{name:>16}", []
        for fitted in (
            by_gradient("Fourier", data, grid, steps),
            by_gradient("mixture", data, grid, steps),
            by_em(data, grid),
            by_gradient("Fourier", data, grid, steps // 2, 22, lr=0.1),
        ):
            low, middle, high = np.quantile(divergences(truth, fitted, grid), (0.25, 0.5, 0.75))
            medians.append(middle)
            row += f"   {middle:.4f} ({low:.4f}, {high:.4f})"
        found, gap = least(truth, DEGREE, 1600 if scale >= 1 else 10)
        print(f"{row} {found:>12.4f} ({gap:.0e})", flush=True)
        behind += [name] if medians[0] > medians[1] else []
    if behind:
        print(f"behind the mixture by gradient in the median: {', '.join(behind)}")
    return not behind


def main(scale: float) -> bool:
    """Print both tables; whether they are as wanted."""
    return all([fits(scale), bounds(scale)])
