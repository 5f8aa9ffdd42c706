"""Posteriors of i.i.d. data by composed scores of a guide of single data, and by a guide of sets."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import AutoAmortized, ComposedPosterior
from pyro_diffusion.train import fit_amortized

SOLVER = ODESolver("midpoint", steps=16)
DRAWS = 500  # which leave noise of .045 sd in a mean, of 3% in an sd
SIZES = {1: 20, 10: 10, 100: 3}  # data sets of so many data
MOST = 100


def normal(x: Tensor | None = None) -> None:
    """A mean, seen through one datum of its own width: normal everywhere."""
    mean = pyro.sample("latent", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def skewed(x: Tensor | None = None) -> None:
    """A rate, seen through one waiting time: its logarithm's posterior is skewed."""
    rate = pyro.sample("latent", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Exponential(rate), obs=x)


def in_sets(model: Callable[..., None]) -> Callable[..., None]:
    """The same latents, seen through many data in a plate."""

    def program(x: Tensor | None = None, data: int = MOST) -> None:
        if model is normal:
            latent = pyro.sample("latent", dist.Normal(0.0, 1.0))
        else:
            latent = pyro.sample("latent", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", data if x is None else x.shape[-1]):
            law = dist.Normal(latent, 1.0) if model is normal else dist.Exponential(latent)
            pyro.sample("x", law, obs=x)

    return program


def exact(model: Callable[..., None], x: Tensor) -> tuple[float, float]:
    """Mean and sd of the unconstrained latent, by quadrature."""
    u = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    x = x.double().unsqueeze(-1)
    law = dist.Normal(u, 1.0) if model is normal else dist.Exponential(u.exp())
    weights = (law.log_prob(x).sum(0) - u.square() / 2).softmax(0)
    mean = (weights * u).sum()
    return float(mean), float((weights * (u - mean).square()).sum().sqrt())


def trained(model: Any, args: argparse.Namespace) -> AutoAmortized:
    """A guide by the recipe."""
    pyro.clear_param_store()
    guide = AutoAmortized(model, observed=["x"], solver=SOLVER)
    table = guide.simulate(args.simulations[-1])
    fit_amortized(guide, table, steps=args.steps, batch_size=128, progress=args.progress)
    return guide


def main(args: argparse.Namespace) -> None:
    """Both ways, for both programs and some numbers of data."""
    print(
        "\ncomposed scores of a guide of single data, and a guide of sets: errors of means in posterior sds "
        "(average, worst) and of sds"
    )
    for seed in args.seeds:
        for model in (normal, skewed):
            pyro.set_rng_seed(seed)
            start = time.process_time()
            single = trained(model, args)
            middle = time.process_time()
            sets = trained(in_sets(model), args)
            end = time.process_time()
            print(
                f"{model.__name__}, seed {seed}: trained in {(middle - start) / 60:.1f} and "
                f"{(end - middle) / 60:.1f} cpu min",
                flush=True,
            )
            for count, repeats in SIZES.items():
                compare(model, single, sets, count, repeats)


def compare(model: Any, single: Any, sets: Any, count: int, repeats: int) -> None:
    """Data sets of one size."""
    found: dict[str, list[tuple[float, float]]] = {"composed": [], "sets": []}
    took = dict.fromkeys(found, 0.0)
    generator = torch.Generator().manual_seed(count)
    for _ in range(repeats):
        latent = torch.randn((), generator=generator)
        noise = torch.randn(count, generator=generator)
        x = latent + noise
        if model is skewed:
            uniform = torch.rand(count, generator=generator).clamp(min=1e-6)
            x = -uniform.log() / latent.exp()
        mean, sd = exact(model, x)
        start = time.process_time()
        draws = {"composed": ComposedPosterior(single, {"x": x}).draw(DRAWS)["latent"]}
        middle = time.process_time()
        with torch.no_grad():
            draws["sets"] = sets.get_posterior(x).sample((DRAWS,)).squeeze(-1)
        took["composed"] += middle - start
        took["sets"] += time.process_time() - middle
        if model is skewed:
            draws["composed"] = draws["composed"].log()
        for name, values in draws.items():
            values = values.double().reshape(-1)
            off = abs(float(values.mean()) - mean) / sd
            found[name].append((off, abs(float(values.std()) / sd - 1)))
    for name, pairs in found.items():
        off, wide = torch.tensor(pairs).unbind(-1)
        print(
            f"  {count:>4} data, {name:<9} mean {float(off.mean()):.3f} {float(off.max()):.3f}  sd "
            f"{100 * float(wide.mean()):.1f}%  {took[name] / repeats:.1f} cpu s each",
            flush=True,
        )
