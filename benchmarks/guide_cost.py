"""Network evaluations of `Predictive` with each AutoGuide over those of its walk alone.

Run: python benchmarks/guide_cost.py [--steps 5 50]

Pyro's Predictive runs a guide and a model twice each for their shapes, before it draws and replays. A walk
alone is the guided chain, or one particle filter for each draw of other latents. Evaluations are counted as
calls of the network, and as rows of their batches. Wanted: at most 1.2 in both, in every call; but at first
AutoNormal, in a list, draws its initial values, a chain of one row.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, ChainReparam
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

DRAWS, PARTICLES, WANTED = 20, 64, 1.2
NAMES = (
    "AutoGuidance",
    "AutoGuidance, Diffusion built in the model",
    "AutoGuidance, ChainReparam",
    "AutoGuidance in a list",
    "AutoTwistedSMC",
    "AutoTwistedSMC, Diffusion built in the model",
    "AutoTwistedSMC in a list",
)


class Counting(MixtureDenoiser):
    """A closed-form denoiser that counts its calls and their rows."""

    calls = rows = 0

    def forward(self, xt: Tensor, t: Any, **context: Tensor) -> Any:
        """As its base."""
        self.calls += 1
        self.rows += xt.shape[: xt.dim() - 1].numel()
        return super().forward(xt, t, **context)


def count(denoiser: Counting, call: Callable[[], Any]) -> tuple[int, int]:
    """Calls and rows of what is called."""
    denoiser.calls = denoiser.rows = 0
    call()
    return denoiser.calls, denoiser.rows


def cases(denoiser: Counting, steps: int) -> dict[str, tuple[Any, Callable[..., Any], int, int]]:
    """By name: a program, how its guide is built, how many walks a call takes, and of how many rows."""
    law = functools.partial(Diffusion, denoiser, (2,), steps=steps)
    one = law()

    def model(y: Tensor, fresh: bool = False) -> None:
        x = pyro.sample("x", law() if fresh else one)
        pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True), 0.5).to_event(1), obs=y)

    def noisy(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(-1.0, 0.5)).unsqueeze(-1)
        x = pyro.sample("x", one)
        pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True), s).to_event(1), obs=y)

    def listed(part: Callable[..., Any]) -> AutoGuideList:
        guide = AutoGuideList(noisy)
        guide.append(AutoNormal(poutine.block(noisy, hide=["x"])))
        guide.append(part(noisy))
        return guide

    fresh = functools.partial(model, fresh=True)
    chain = poutine.reparam(model, config={"x": ChainReparam()})
    particles = functools.partial(AutoTwistedSMC, num_particles=PARTICLES)
    return {
        "AutoGuidance": (model, AutoGuidance, 1, DRAWS),
        "AutoGuidance, Diffusion built in the model": (fresh, AutoGuidance, 1, DRAWS),
        "AutoGuidance, ChainReparam": (chain, AutoGuidance, 1, DRAWS),
        "AutoGuidance in a list": (noisy, lambda _: listed(AutoGuidance), 1, DRAWS),
        "AutoTwistedSMC": (model, particles, 1, PARTICLES),
        "AutoTwistedSMC, Diffusion built in the model": (fresh, particles, 1, PARTICLES),
        "AutoTwistedSMC in a list": (noisy, lambda _: listed(particles), DRAWS, PARTICLES),
    }


def table(steps: int) -> bool:
    """Print one row a guide; whether all ratios are as wanted."""
    process = GaussianProcess(LogLinear(10, -10))
    print(f"\n| {steps} steps: guide | calls: first, later | rows: first, later |\n|---|---|---|")
    good = True
    for name in NAMES:
        denoiser = Counting(process, torch.ones(1), torch.zeros(1, 2), 1.0)
        program, build, walks, rows = cases(denoiser, steps)[name]
        predictive = Predictive(program, guide=build(program), num_samples=DRAWS, parallel=True)
        y = torch.ones(1)
        counts = [count(denoiser, functools.partial(predictive, k * y)) for k in range(2)]
        alone = walks * (steps + 1), walks * (steps + 1) * rows
        ratios = [[c[i] / alone[i] for c in counts] for i in range(2)]
        print(f"| {name} | " + " | ".join(f"{a:.2f}, {b:.2f}" for a, b in ratios) + " |")
        initial = "list" in name
        good &= all(max(r[1:] if initial else r) <= WANTED for r in ratios)
    return good


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 50])
    args = parser.parse_args()
    torch.set_num_threads(1)
    good = [table(steps) for steps in args.steps]
    print(f"\nNetwork evaluations over those of the walk alone: <= {WANTED}: {all(good)}")
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
