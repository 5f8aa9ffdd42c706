"""Reference posteriors of the held-out tasks, from likelihoods in plain torch and double precision.

Exact draws for gaussian_mixture, a grid for sir, a grid of three latents and exact draws of the other two for
slcp. For lotka_volterra particles find the posterior by tempering, and of draws around them some are kept, by
rejection. Nothing of the package is used, and no code of the programs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["reference"]

DRAWS = 4000
SWEEPS, SCALES = 6, (0.8, 0.4, 0.15)  # at every temperature, times the difference of two particles

Density = Callable[[Tensor], Tensor]


def runge_kutta(slope: Density, state: Tensor, days: float, steps: int) -> Tensor:
    """States at ten times, variables first, (variables, n) -> (variables, n, 10)."""
    h, out = days / steps, [state]
    for i in range(9 * steps):
        a = slope(state)
        b = slope(state + h * a / 2)
        c = slope(state + h * b / 2)
        d = slope(state + h * c)
        state = state + h * (a + 2 * b + 2 * c + d) / 6
        if (i + 1) % steps == 0:
            out.append(state)
    return torch.stack(out, -1)


def normal_mixture(x: Tensor, count: int) -> Tensor:
    """Exact: the likelihood is a mixture of normals of theta, cut to the box by rejection."""
    kept: list[Tensor] = []
    while sum(len(each) for each in kept) < count:
        sd = torch.where(torch.rand(count, 1) < 0.5, 1.0, 0.1).double()
        theta = x + sd * torch.randn(count, 2, dtype=torch.float64)
        kept.append(theta[(theta.abs() < 10).all(-1)])
    return torch.cat(kept)[:count]


def epidemic(x: Tensor) -> Density:
    """sir's log-posterior of standardized logarithms of the rates, (n, 2) -> (n,)."""

    def density(z: Tensor) -> Tensor:
        beta = 0.4 * (0.5 * z[:, 0]).exp()
        gamma = 0.125 * (0.2 * z[:, 1]).exp()

        # susceptible, and the logarithm of the infected, as shares
        def slope(state: Tensor) -> Tensor:
            ill = state[1].exp()
            return torch.stack([-beta * state[0] * ill, beta * state[0] - gamma])

        start = torch.tensor([1 - 1e-6, math.log(1e-6)]).double().unsqueeze(-1)
        log_share = runge_kutta(slope, start.expand(2, len(z)), 17.0, 170)[1].clamp(max=-1e-9)
        healthy = torch.log(-torch.expm1(log_share))
        return (x * log_share + (1000 - x) * healthy).sum(-1) - z.square().sum(-1) / 2

    return density


def by_grid(density: Density, count: int, side: int = 160) -> Tensor:
    """Draws from a grid of two standardized latents, narrowed twice to where the mass is, even in cells."""
    low, high = torch.full((2,), -6.0).double(), torch.full((2,), 6.0).double()
    for _ in range(3):
        width = (high - low) / side
        ends = [low[i] + width[i] * (torch.arange(side) + 0.5) for i in range(2)]
        points = torch.cartesian_prod(*ends)
        weights = torch.cat([density(part) for part in points.split(5000)]).softmax(0)
        there = points[weights > 1e-9 * weights.max()]
        last = low.clone(), width
        low, high = there.amin(0) - width, there.amax(0) + width
    chosen = points[weights.multinomial(count, replacement=True)]
    return chosen + (torch.rand(count, 2, dtype=torch.float64) - 0.5) * last[1]


def four_points(x: Tensor, count: int, side: int = 120) -> Tensor:
    """Exact draws for slcp: what is left of the mean is normal, and the other three are on a grid.

    Cells are drawn, then places in them, and draws are weighed by density over the cell's.
    """
    points = x.reshape(4, 2)
    mean = points.mean(0)
    sums = (points - mean).mT @ (points - mean)

    def density(theta: Tensor) -> Tensor:
        """Of the last three latents, the mean integrated out over the plane."""
        first, second = theta[:, 0].square(), theta[:, 1].square()
        rho = theta[:, 2].tanh()
        rest = 1 - rho.square()
        cross = 2 * rho * sums[0, 1] / (first * second)
        square = (sums[0, 0] / first.square() + sums[1, 1] / second.square() - cross) / rest
        return -square / 2 - 3 * (first.log() + second.log() + rest.log() / 2)

    cell = torch.tensor([3.0, 3.0, 6.0]).double() / side
    steps = torch.arange(side) + 0.5
    grid = torch.cartesian_prod(steps * cell[0], steps * cell[1], steps * cell[2] - 3)
    found = density(grid)
    weights = (found - found.max()).exp() + 1e-7  # some of every cell
    kept: list[Tensor] = []
    while sum(len(each) for each in kept) < count:
        chosen = weights.cumsum(0)
        chosen = torch.searchsorted(chosen, torch.rand(20 * count).double() * chosen[-1])
        place = grid[chosen] + (torch.rand(20 * count, 3).double() - 0.5) * cell
        ratio = (density(place) - found.max()).exp() / weights[chosen]
        place = place[ratio.multinomial(2 * count, replacement=True)]
        sign = torch.where(torch.rand(2 * count, 2) < 0.5, -1.0, 1.0)
        first, second, rho = place[:, 0] ** 2, place[:, 1] ** 2, place[:, 2].tanh()
        noise = torch.randn(2 * count, 2).double()
        away = rho * noise[:, 0] + (1 - rho**2).sqrt() * noise[:, 1]
        centre = mean + torch.stack([first * noise[:, 0], second * away], -1) / 2
        theta = torch.cat([centre, sign * place[:, :2], place[:, 2:]], -1)
        kept.append(theta[(theta.abs() < 3).all(-1)])
    return torch.cat(kept)[:count]


def prey(x: Tensor, steps: int = 42) -> Density:
    """lotka_volterra's log-likelihood of standardized logarithms, (n, 4) -> (n,)."""
    seen = x.log().reshape(2, 10)
    centre = torch.tensor([-0.125, -3.0, -0.125, -3.0]).double()

    def density(z: Tensor) -> Tensor:
        alpha, beta, gamma, delta = (centre + 0.5 * z).exp().mT

        def slope(state: Tensor) -> Tensor:
            first, second = state.exp()
            return torch.stack([alpha - beta * second, delta * first - gamma])

        start = torch.tensor([math.log(30.0), 0.0]).double().unsqueeze(-1)
        path = runge_kutta(slope, start.expand(2, len(z)), 2.1, steps)
        path = path.clamp(math.log(1e-10), math.log(1e4)).transpose(0, 1)
        return -((seen - path) / 0.1).square().sum((-2, -1)) / 2

    return density


def cooled(values: Tensor, before: float) -> float:
    """The next inverse temperature: as high as leaves half of the particles effective."""
    low, high = before, 1.0
    for _ in range(40):
        middle = high if low == before and high == 1.0 else (low + high) / 2
        share = ((middle - before) * values).softmax(0).square().sum().reciprocal() / len(values)
        if share >= 0.5 and middle == 1.0:
            return 1.0
        low, high = (middle, high) if share >= 0.5 else (low, middle - 1e-12)
    return low


def tempered(density: Density, size: int, count: int) -> Tensor:
    """Particles from a standard normal prior to the posterior by rising powers of the likelihood.

    Moves are Metropolis steps along the difference of two particles of the other half (ter Braak, Statistics
    and Computing 16, 2006).
    """
    particles, power = torch.randn(10 * count, size).double(), 0.0
    values = torch.cat([density(each) for each in particles.split(count)])
    while power < 1.0:
        after = cooled(values, power)
        chosen = ((after - power) * values).softmax(0).multinomial(count, replacement=True)
        particles, values, power = particles[chosen], values[chosen], after
        for i in range(SWEEPS):
            order = torch.randperm(count)
            particles, values = particles[order], values[order]
            half = count // 2
            at, rest = particles[:half], particles[half:]
            first, second = torch.randint(half, (2, half))
            step = SCALES[i % len(SCALES)] * (rest[first] - rest[second])
            proposed = at + step + 1e-5 * torch.randn_like(at)
            value = density(proposed)
            prior = (at.square() - proposed.square()).sum(-1) / 2
            taken = torch.rand(half).log() < power * (value - values[:half]) + prior
            particles[:half] = torch.where(taken.unsqueeze(-1), proposed, at)
            values[:half] = torch.where(taken, value, values[:half])
    return particles


def accepted(density: Density, particles: Tensor, count: int) -> Tensor:
    """Draws of a Student-t of six degrees around particles, by rejection with the largest ratio seen."""
    size, drawn = particles.shape[1], 5 * count
    centre, factor = particles.mean(0), torch.linalg.cholesky(1.2 * particles.mT.cov())
    rate = torch.distributions.Gamma(3.0, 3.0).sample((drawn, 1)).double()
    noise = torch.randn(drawn, size).double() / rate.sqrt()
    z = centre + noise @ factor.mT
    own = -(6 + size) / 2 * (noise.square().sum(-1) / 6).log1p()
    target = torch.cat([density(each) for each in z.split(1000)]) - z.square().sum(-1) / 2
    weights = target - own
    kept = z[torch.rand(drawn).log() < weights - weights.max()]
    if len(kept) < count:
        raise RuntimeError(
            f"reference: got {len(kept)} of {drawn} draws accepted, expected {count}"
        )
    return kept[:count]


def reference(name: str, x: Tensor, seed: int) -> Tensor:
    """Draws of a task's posterior at one observation, (DRAWS, latents) in their own space."""
    torch.manual_seed(seed)
    x = x.double()
    if name == "gaussian_mixture":
        return normal_mixture(x, DRAWS).float()
    if name == "slcp":
        return four_points(x, DRAWS).float()
    if name == "sir":
        z = by_grid(epidemic(x), DRAWS)
        return (torch.tensor([0.4, 0.125]).log() + torch.tensor([0.5, 0.2]) * z).exp().float()
    z = accepted(prey(x), tempered(prey(x, 14), 4, 1000), DRAWS)
    return (torch.tensor([-0.125, -3.0, -0.125, -3.0]) + 0.5 * z).exp().float()
