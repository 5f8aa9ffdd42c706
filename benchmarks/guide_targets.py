"""Targets of `benchmarks/guides.py`: posteriors with gold draws or known evidence, each a Pyro program."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

ROOMS = 40  # modes of the mixture


class Target(NamedTuple):
    """A program and what is known of its posterior.

    Attributes:
        model: the program, with its data.
        reference: draws of the posterior by column, and the function that takes the program's draws to them.
        log_z: log evidence, and the error that particles are wanted within.
        exact: a function that gives exact draws of the latents, for the upper bound.
    """

    model: Callable[[], Any]
    reference: tuple[Tensor, Callable[[dict[str, Tensor]], Tensor]] | None = None
    log_z: tuple[float, float] | None = None
    exact: Callable[[int], dict[str, Tensor]] | None = None


def improper(name: str, size: int, support: Any = constraints.real) -> Tensor:
    """A flat prior. Guides of it need an initial value: its draws do not exist."""
    value: Tensor = pyro.sample(
        name, dist.ImproperUniform(constraints.independent(support, 1), (), (size,))
    )
    return value


def start(site: Any) -> Tensor:
    """Initial values: 1 where the support is positive, else 0, or what the support makes of it."""
    fn = site["fn"]
    shape = fn.batch_shape + fn.event_shape
    transform = torch.distributions.biject_to(fn.support)
    return transform(torch.zeros(transform.inverse_shape(shape)))


# Posteriors with gold draws.


def eight_schools(y: Tensor, sigma: Tensor, centered: bool) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        if centered:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidiq(x: Tensor, score: Tensor) -> None:
    beta = improper("beta", 4)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=score)


def autoregression(lags: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y)


def poisson_process(x: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    kernel = alpha**2 * (-((x[:, None] - x) ** 2) / (2 * rho**2)).exp() + 1e-10 * torch.eye(len(x))
    raw = pyro.sample("raw", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    f = torch.linalg.cholesky_ex(kernel).L @ raw
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def poisson_process_f(x: Tensor, draws: dict[str, Tensor]) -> Tensor:
    rho, alpha = draws["rho"][:, None, None], draws["alpha"][:, None, None]
    kernel = alpha**2 * (-((x[:, None] - x) ** 2) / (2 * rho**2)).exp() + 1e-10 * torch.eye(len(x))
    f = (torch.linalg.cholesky_ex(kernel).L @ draws["raw"].unsqueeze(-1)).squeeze(-1)
    return torch.cat([rho[:, 0], alpha[:, 0], f], -1)


def two_normals(y: Tensor) -> None:
    # the density of an ordered pair is twice that of two free ones
    mu = improper_ordered("mu")
    pyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(mu).sum() + math.log(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    parts = dist.Normal(mu, sigma).log_prob(y.unsqueeze(-1))
    weights = torch.stack([theta, 1 - theta], -1).log()
    pyro.factor("y", (parts + weights).logsumexp(-1).sum())


def improper_ordered(name: str) -> Tensor:
    value: Tensor = pyro.sample(name, dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    return value


def gold(folder: Path, name: str) -> Target:
    """A posterior of posteriordb."""
    files = {
        path.name.split(".")[0].split("-")[0]: path for path in folder.glob("posteriordb/*.npz")
    }
    with np.load(files[name], allow_pickle=False) as file:
        draws = torch.from_numpy(file["draws"]).double()
    read = json.loads((folder / "posteriordb" / f"{name}.data.json").read_text())
    data = {k: torch.tensor(v, dtype=torch.double) for k, v in read.items()}
    evidence = None
    if name == "eight_schools":
        model = functools.partial(eight_schools, data["y"], data["sigma"], False)

        def to_columns(d: dict[str, Tensor]) -> Tensor:
            mu, tau = d["mu"][:, None], d["tau"][:, None]
            return torch.cat([mu + tau * d["raw"], mu, tau], -1)

        def exact(count: int) -> dict[str, Tensor]:
            mu, tau = draws[:, 8], draws[:, 9]
            raw = (draws[:, :8] - mu[:, None]) / tau[:, None]
            return {"mu": mu, "tau": tau, "raw": raw}

        evidence = -31.3113, math.nan
    elif name == "kidiq":
        hs, iq = data["mom_hs"], data["mom_iq"]
        x = torch.stack([torch.ones_like(hs), hs, iq, hs * iq], -1)
        model = functools.partial(kidiq, x, data["kid_score"])

        def to_columns(d: dict[str, Tensor]) -> Tensor:
            return torch.cat([d["beta"], d["sigma"][:, None]], -1)

        def exact(count: int) -> dict[str, Tensor]:
            return {"beta": draws[:, :4], "sigma": draws[:, 4]}

    elif name == "arK":
        y = data["y"]
        lags = torch.stack([y[5 - k : len(y) - k] for k in range(1, 6)], -1)
        model = functools.partial(autoregression, lags, y[5:])

        def to_columns(d: dict[str, Tensor]) -> Tensor:
            return torch.cat([d["alpha"][:, None], d["beta"], d["sigma"][:, None]], -1)

        def exact(count: int) -> dict[str, Tensor]:
            return {"alpha": draws[:, 0], "beta": draws[:, 1:6], "sigma": draws[:, 6]}

    elif name == "low_dim_gauss_mix":
        model = functools.partial(two_normals, data["y"])

        def to_columns(d: dict[str, Tensor]) -> Tensor:
            return torch.cat([d["mu"], d["sigma"], d["theta"][:, None]], -1)

        def exact(count: int) -> dict[str, Tensor]:
            return {"mu": draws[:, :2], "sigma": draws[:, 2:4], "theta": draws[:, 4]}

    else:
        x = data["x"]
        model = functools.partial(poisson_process, x, data["k"])
        to_columns = functools.partial(poisson_process_f, x)
        evidence = -47.622, math.nan  # a grid over rho and alpha, importance sampling of f at each
        exact = None  # type: ignore[assignment]
    return Target(model, (draws, to_columns), evidence, exact)


def centered(folder: Path) -> Target:
    """Eight schools with the funnel in it; the same posterior."""
    noncentered = gold(folder, "eight_schools")
    assert noncentered.reference is not None
    draws = noncentered.reference[0]
    data = json.loads((folder / "posteriordb" / "eight_schools.data.json").read_text())
    y, sigma = (torch.tensor(data[k], dtype=torch.double) for k in ("y", "sigma"))
    return Target(
        functools.partial(eight_schools, y, sigma, True),
        (draws, lambda d: torch.cat([d["theta"], d["mu"][:, None], d["tau"][:, None]], -1)),
        (-31.3113, math.nan),
        lambda count: {"theta": draws[:, :8], "mu": draws[:, 8], "tau": draws[:, 9]},
    )


# Posteriors with known evidence.


def logistic(x: Tensor, y: Tensor, scale: float) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), scale).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)


def ionosphere(folder: Path) -> Target:
    with np.load(folder / "samplers/ionosphere.npz", allow_pickle=False) as file:
        x, y = (torch.from_numpy(np.asarray(file[k], dtype=np.float64)) for k in ("X", "y"))
    sd = x.std(0, correction=0)
    x = (x - x.mean(0)) / torch.where(sd > 0, sd, 1.0)
    return Target(
        functools.partial(logistic, with_ones(x), (y > 0).double(), 1.0), None, (-111.60, 0.15)
    )


def german_credit(folder: Path) -> Target:
    with np.load(folder / "samplers/german_credit.npz", allow_pickle=False) as file:
        x, y = (torch.from_numpy(np.asarray(file[k], dtype=np.float64)) for k in ("X", "label"))
        draws = torch.from_numpy(np.asarray(file["reference_draws_prior_sd10"], dtype=np.float64))
    x = with_ones(x / x.std(0, correction=0))
    model = functools.partial(logistic, x, (y == 1).double(), 10.0)
    reference = draws, lambda d: d["w"]
    return Target(model, reference, (-585.116, 0.3), lambda count: {"w": draws})


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[:, :1]), x], -1)


def walk(y: Tensor, seen: list[int]) -> None:
    inner = pyro.sample("inner", dist.LogNormal(0.0, 2.0))
    outer = pyro.sample("outer", dist.LogNormal(0.0, 2.0))
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (30,)))
    pyro.factor("walk", dist.Normal(0.0, inner).log_prob(x.diff(prepend=x.new_zeros(1))).sum())
    pyro.sample("y", dist.Normal(x[seen], outer).to_event(1), obs=y)


def brownian(folder: Path) -> Target:
    data = json.loads((folder / "samplers/data.json").read_text())["brownian_motion"][
        "OBSERVED_LOC"
    ]
    seen = [i for i, v in enumerate(data) if v is not None and not math.isnan(v)]
    y = torch.tensor([data[i] for i in seen], dtype=torch.double)
    return Target(functools.partial(walk, y, seen), None, (1.1877, 0.15))


# Targets without data.


def funnel_model() -> None:
    x = improper("x", 10)
    log_prob = dist.Normal(0.0, 3.0).log_prob(x[0])
    pyro.factor("target", log_prob + dist.Normal(0.0, (x[0] / 2).exp()).log_prob(x[1:]).sum())


def funnel_draws(count: int) -> dict[str, Tensor]:
    first = 3 * torch.randn(count, 1)
    return {"x": torch.cat([first, (first / 2).exp() * torch.randn(count, 9)], -1)}


def mixture_model(locs: Tensor) -> None:
    x = improper("x", 2)
    parts = dist.Normal(locs, SCALE).log_prob(x).sum(-1)
    pyro.factor("target", parts.logsumexp(0) - math.log(len(locs)))


SCALE = math.log(1 + math.e)  # softplus of 1, as in the literature


def mixture() -> tuple[Target, Tensor]:
    locs = 80 * torch.rand(ROOMS, 2, generator=torch.Generator().manual_seed(0)) - 40

    def exact(count: int) -> dict[str, Tensor]:
        chosen = locs[torch.randint(ROOMS, (count,))]
        return {"x": chosen + SCALE * torch.randn(count, 2)}

    return Target(functools.partial(mixture_model, locs), None, (0.0, math.nan), exact), locs


def well(x: Tensor) -> Tensor:
    """Log density of one double well, not normalized."""
    return -(x**4) + 6 * x**2 + 0.5 * x


def wells_model() -> None:
    x = improper("x", 10)
    pyro.factor("target", well(x[0::2]).sum() - (x[1::2] ** 2).sum() / 2)


def wells() -> Target:
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.double)
    weights = well(grid).softmax(0)
    log_z = 5 * (
        float(well(grid).logsumexp(0) + (grid[1] - grid[0]).log()) + math.log(2 * math.pi) / 2
    )

    def exact(count: int) -> dict[str, Tensor]:
        deep = grid[torch.multinomial(weights, count * 5, replacement=True)].reshape(count, 5)
        return {"x": torch.stack([deep, torch.randn(count, 5)], -1).reshape(count, 10)}

    return Target(wells_model, None, (log_z, math.nan), exact)
