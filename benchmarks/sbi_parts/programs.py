"""Four tasks of sbibm that nothing of this package was tuned to, as a user of Pyro writes them."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["HELD_OUT", "LATENTS", "base", "in_program", "observation"]

DAYS_SIR, DAYS_LOTKA = 17.0, 2.1  # between looks, of which there are ten, the first at the start
LOOKS = 10
POPULATION, TESTED = 1e6, 1000
RATES_SIR = (math.log(0.4), 0.5), (math.log(0.125), 0.2)
RATES_LOTKA = (-0.125, 0.5), (-3.0, 0.5)


def looks(
    slope: Callable[[Tensor], Tensor], state: Tensor, days: float, steps: int = 100
) -> Tensor:
    """States, variables first, at ten times by Runge and Kutta's method of order four."""
    size, seen = days / steps, [state]
    for _ in range(LOOKS - 1):
        for _ in range(steps):
            first = slope(state)
            second = slope(state + size / 2 * first)
            third = slope(state + size / 2 * second)
            fourth = slope(state + size * third)
            state = state + size / 6 * (first + 2 * (second + third) + fourth)
        seen.append(state)
    return torch.stack(seen, -1)


def infected(beta: Tensor, gamma: Tensor) -> Tensor:
    """Share of the infected on ten days, the parameters' shape + (10,)."""

    def slope(state: Tensor) -> Tensor:
        new = beta * state[0] * state[1]
        return torch.stack([-new, new - gamma * state[1]])

    first = torch.full_like(beta, 1 / POPULATION)
    return looks(slope, torch.stack([1 - first, first]), DAYS_SIR)[1].clamp(0.0, 1.0)


def animals(alpha: Tensor, beta: Tensor, gamma: Tensor, delta: Tensor) -> Tensor:
    """Logarithms of the numbers of prey and predators on ten days, the parameters' shape + (20,)."""

    def slope(state: Tensor) -> Tensor:
        prey, predators = state.exp()
        return torch.stack([alpha - beta * predators, delta * prey - gamma])

    zero = torch.zeros_like(alpha)
    found = looks(slope, torch.stack([zero + math.log(30.0), zero]), DAYS_LOTKA)
    return torch.cat([found[0], found[1]], -1).clamp(math.log(1e-10), math.log(1e4))


def spread(theta: Tensor) -> Tensor:
    """Cholesky factor of slcp's covariance."""
    first, second, correlation = theta[..., 2] ** 2, theta[..., 3] ** 2, theta[..., 4].tanh()
    rest = second * (1 - correlation**2).clamp(min=1e-6).sqrt()
    rows = [
        torch.stack([first, torch.zeros_like(first)], -1),
        torch.stack([correlation * second, rest], -1),
    ]
    return torch.stack(rows, -2) + 1e-6 * torch.eye(2)


def slcp(x: Tensor | None = None) -> None:
    """Mean and covariance of four points: a simple likelihood and a complex posterior."""
    theta = pyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1))
    points = dist.MultivariateNormal(
        theta[..., None, :2].expand(*theta.shape[:-1], 4, 2),
        scale_tril=spread(theta).unsqueeze(-3),
    )
    pyro.sample("x", points.to_event(1), obs=x)


def slcp_plate(x: Tensor | None = None) -> None:
    """The same with a plate for the points."""
    theta = pyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1))
    with pyro.plate("data", 4):
        points = dist.MultivariateNormal(theta[..., :2], scale_tril=spread(theta))
        pyro.sample("x", points, obs=x)


def gaussian_mixture(x: Tensor | None = None) -> None:
    """A place seen through wide or narrow noise, nobody knows which."""
    theta = pyro.sample("theta", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    narrow = pyro.sample("narrow", dist.Bernoulli(0.5))
    sd = torch.where(narrow > 0, 0.1, 1.0).unsqueeze(-1)
    pyro.sample("x", dist.Normal(theta, sd).to_event(1), obs=x)


def sir(x: Tensor | None = None) -> None:
    """Tests for an epidemic on ten days."""
    beta = pyro.sample("beta", dist.LogNormal(*RATES_SIR[0]))
    gamma = pyro.sample("gamma", dist.LogNormal(*RATES_SIR[1]))
    pyro.sample("x", dist.Binomial(TESTED, infected(beta, gamma)).to_event(1), obs=x)


def sir_plate(x: Tensor | None = None) -> None:
    """The same with a plate for the days, whose rows differ."""
    beta = pyro.sample("beta", dist.LogNormal(*RATES_SIR[0]))
    gamma = pyro.sample("gamma", dist.LogNormal(*RATES_SIR[1]))
    shares = infected(beta, gamma)
    if beta.dim():
        shares = shares.squeeze(-2)  # the plate's own dimension
    with pyro.plate("days", LOOKS):
        pyro.sample("x", dist.Binomial(TESTED, shares), obs=x)


def lotka_volterra(x: Tensor | None = None) -> None:
    """Prey and predators, counted on ten days each."""
    alpha = pyro.sample("alpha", dist.LogNormal(*RATES_LOTKA[0]))
    beta = pyro.sample("beta", dist.LogNormal(*RATES_LOTKA[1]))
    gamma = pyro.sample("gamma", dist.LogNormal(*RATES_LOTKA[0]))
    delta = pyro.sample("delta", dist.LogNormal(*RATES_LOTKA[1]))
    seen = dist.LogNormal(animals(alpha, beta, gamma, delta), 0.1)
    pyro.sample("x", seen.to_event(1), obs=x)


HELD_OUT: dict[str, Callable[..., None]] = {
    program.__name__: program
    for program in (slcp, slcp_plate, gaussian_mixture, sir, sir_plate, lotka_volterra)
}
LATENTS = {
    "sir": ["beta", "gamma"],
    "lotka_volterra": ["alpha", "beta", "gamma", "delta"],
}


def base(name: str) -> str:
    """The task of which a program is a variant."""
    return name.removesuffix("_plate")


def in_program(name: str, x: Tensor) -> Tensor:
    """Observations of a task in the shape that its program has them."""
    return x.reshape(*x.shape[:-1], 4, 2) if base(name) == "slcp" else x


def observation(name: str, seed: int) -> Tensor:
    """What the program returns for a seed, as one vector."""
    pyro.set_rng_seed(seed)
    trace = pyro.poutine.trace(HELD_OUT[base(name)]).get_trace()
    x: Tensor = trace.nodes["x"]["value"]
    return x.reshape(-1)
