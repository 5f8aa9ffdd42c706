"""Twists that a small network learns of a problem's simulations, one for all of its observations."""

import time
from collections.abc import Sequence

import pyro
import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance import AmortizedTwist
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.train import fit_amortized
from trained_posteriors.prior import chain
from trained_posteriors.problems import Problem

CLOCKS = (-6.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0, 9.0)


def learned(
    problem: Problem,
    denoiser: Denoiser,
    y: Tensor,
    simulations: int,
    steps: int,
    hidden: Sequence[int] = (256, 256, 256),
) -> AmortizedTwist:
    """A twist of a problem, trained now; the observations give the shape."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    start = time.perf_counter()
    program = problem.program(chain(denoiser, problem.images.shape), y[:1])
    twist = AmortizedTwist(ProgramLikelihood(program), hidden=hidden).to(y.device)
    drawn = twist.simulate(simulations)
    simulated = time.perf_counter() - start
    linear = by_level(twist, drawn, problem, denoiser)
    history = fit_amortized(
        twist, drawn, steps=steps, batch_size=min(1024, simulations // 2), progress=False
    )
    final = by_level(twist, drawn, problem, denoiser)
    print(
        f"  twist of {simulations} simulations ({simulated:.0f} s) and {len(history.losses)} steps "
        f"({time.perf_counter() - start - simulated:.0f} s); nats a datum by log-SNR, before and after: "
        + ", ".join(
            f"{a:.2f} {b:.2f} ({c:.0f})" for a, b, c in zip(linear, final, CLOCKS, strict=True)
        ),
        flush=True,
    )
    return twist.requires_grad_(False)


@torch.no_grad()
def by_level(
    twist: AmortizedTwist, drawn: dict[str, Tensor], problem: Problem, denoiser: Denoiser
) -> list[float]:
    """Mean log-twist of some simulations at :data:`CLOCKS`, nats."""
    process, found = denoiser.process, []
    x0, y = (drawn[name][-2048:] for name in ("x0", "y"))
    data = x0.reshape(len(x0), *problem.images.shape)
    for clock in CLOCKS:
        t = process.level_of_clock(x0.new_full((1,), clock)).t.flatten()
        xt = process.marginal(data, t).sample().flatten(1)
        found.append(float(twist.log_prob(xt, process.level(t, data), y).mean()))
    return found
