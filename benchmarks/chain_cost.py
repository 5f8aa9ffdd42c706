"""Seconds and memory of annealed chains over those of the gradients that they take.

Run: python benchmarks/chain_cost.py --data DIR [--targets ionosphere funnel]

A chain of K steps visits K + 1 states (`AutoDiffusion.log_weights` without a graph). Its seconds are over
those of K gradients of the model's log density at as many particles: `torch.func.vmap` of `torch.func.grad`,
what a bare loop would do. Autograd of the density under `vmap` is a little faster, and said apart, as are K
gradients of the same density written by hand for a batch, without Pyro: the model's share, no chain's. The
run that `AnnealedSMC` reports is over as many gradients as it took, with the metrics that the pilot found and
with four parts of each. Seconds are of the processor, one thread, all of a target in turn; medians, and
quartiles of the ratios of one turn. Memory is the peak of a process of its own. Wanted: at most 1.2 times the
vectorized gradients, memory with 64 steps at most 1.1 times that with 8.
"""

import argparse
import functools
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import Bernoulli, Normal
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from benchmarks import guide_targets as targets
from benchmarks.guides import load
from pyro_diffusion.infer import AnnealedSMC, AutoDiffusion
from pyro_diffusion.infer.annealing.annealed_chain import Stage
from pyro_diffusion.infer.annealing.guide_chart import chart_of
from pyro_diffusion.infer.annealing.local_scales import local_scales
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel
from pyro_diffusion.likelihoods.run import isolated

CONTROLLED = "Langevin with control"
CHAINS: dict[str, dict[str, Any]] = {
    "Langevin": {},
    CONTROLLED: {"control": True},
    "underdamped": {"kernel": "underdamped"},
}
WANTED, FLAT, PARTS = 1.2, 1.1, 4
PARTICLES, REPEATS = 128, 8


def by_hand(target: targets.Target) -> Callable[[Tensor], Tensor]:
    """The log density of rows, (N, D), as one would write it for a batch."""
    if target.model is targets.funnel_model:
        return lambda x: (
            Normal(0.0, 3.0).log_prob(x[:, 0])
            + Normal(0.0, (x[:, :1] / 2).exp()).log_prob(x[:, 1:]).sum(-1)
        )
    x, y, scale = target.model.args  # type: ignore[attr-defined]
    return lambda w: (
        Bernoulli(logits=w @ x.T).log_prob(y).sum(-1) + Normal(0.0, scale).log_prob(w).sum(-1)
    )


def repeated(gradient: Callable[[Tensor], Any], z: Tensor, count: int) -> Callable[[], None]:
    """That many gradients at the same rows."""

    def call() -> None:
        with isolated(), pyro.validation_enabled(False):
            for _ in range(count):
                gradient(z)

    return call


def bare(log_prob: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient by autograd."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(log_prob(z).sum(), z)[0]


def chain(target: targets.Target, steps: int, form: dict[str, Any]) -> AutoDiffusion:
    """A fresh one, from a normal base."""
    pyro.clear_param_store()
    base = AutoNormal(target.model, init_loc_fn=targets.start)
    guide = AutoDiffusion(target.model, base, steps, step_size=0.01, **form)
    guide()
    return guide


def particles(target: targets.Target, steps: int) -> dict[str, Callable[[], Any]]:
    """Reported runs of `AnnealedSMC`, with the metrics that the pilot found and with more."""
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(target.model, init_loc_fn=targets.start)
    guide()
    smc = AnnealedSMC(target.model, guide, PARTICLES, REPEATS, steps=steps, rounds=1)
    model = UnconstrainedModel(target.model, guide, (), {})
    with torch.no_grad(), isolated(), pyro.validation_enabled(False):
        chart = chart_of(guide, (), {})
        stages = smc.pilot(model, chart)[0]

    def run(stages: list[Stage]) -> Any:
        with isolated(), pyro.validation_enabled(False):
            return smc._once(model, chart, stages)

    sizes = [stage.scales.size for stage in stages]
    return {
        f"{min(sizes)} to {max(sizes)} metrics": functools.partial(run, stages),
        f"{PARTS} metrics": functools.partial(run, [split(stage) for stage in stages]),
    }


def split(stage: Stage) -> Stage:
    """The first metric of a stage, side by side within its width."""
    root = stage.scales.roots[:1]
    locs = stage.scales.locs[:1] + torch.linspace(-1, 1, PARTS)[:, None] * root[0].norm(dim=-1)
    even = torch.full((PARTS,), -math.log(PARTS))
    scales = local_scales(even, locs, root.repeat(PARTS, 1, 1))
    return stage._replace(scales=scales, step_size=stage.step_size[:1].expand(PARTS))


def timed(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, Tensor]:
    """Seconds of the processor of each call, in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):  # the first is not counted
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: torch.tensor(seconds) for name, seconds in found.items()}


def row(name: str, seconds: Tensor, over: Tensor, factor: float, judged: bool = True) -> bool:
    """Print a ratio, by the turn; whether it is as wanted."""
    low, middle, high = (factor * seconds / over).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    verdict = f"  as wanted (<= {WANTED}): {middle <= WANTED}" if judged else ""
    print(
        f"  {name:<66} {float(seconds.median()):8.3f} s  {middle:6.3f} [{low:.3f}, {high:.3f}]{verdict}",
        flush=True,
    )
    return middle <= WANTED or not judged


def table(name: str, args: argparse.Namespace) -> bool:
    """All ratios of a target; whether they are as wanted."""
    pyro.set_rng_seed(0)
    target, steps = load(name, args.data), args.steps
    calls: dict[str, Callable[[], Any]] = {}
    for form, options in CHAINS.items():
        guide = chain(target, steps, options)
        calls[form] = functools.partial(guide.log_weights, args.particles)
    assert guide._last_model is not None
    scored = guide._last_model.scored
    z = 0.1 * torch.randn(args.particles, guide.latent_dim)
    few, vectorized = (
        z[:1].repeat(PARTICLES * REPEATS, 1),
        torch.func.vmap(torch.func.grad(scored._single)),
    )
    calls["gradients"] = repeated(vectorized, z, steps)
    density = torch.func.vmap(scored._single)
    calls["autograd"] = repeated(functools.partial(bare, density), z, steps)
    calls["by hand"] = repeated(functools.partial(bare, by_hand(target)), z, steps)
    smc = {f"AnnealedSMC, {what}": call for what, call in particles(target, steps).items()}
    taken = {kind: call().evaluations for kind, call in smc.items()}
    calls |= smc | {"gradients of particles": repeated(vectorized, few, steps)}
    found = timed(calls, args.turns)
    print(
        f"{name}: D = {guide.latent_dim}, {steps} steps, {args.particles} paths, {len(few)} particles"
    )
    own = found["gradients"]
    good = [row(f"{form}, over {steps} gradients", found[form], own, 1) for form in CHAINS]
    for form in CHAINS:
        row(f"{form}, over {steps + 1} gradients", found[form], own, steps / (steps + 1), False)
    row(
        "Langevin with control, over as many of autograd",
        found[CONTROLLED],
        found["autograd"],
        1,
        False,
    )
    row("gradients, over those by hand", own, found["by hand"], 1, False)
    each = found["gradients of particles"]
    good += [
        row(f"{kind}, {n} gradients", found[kind], each, steps / n) for kind, n in taken.items()
    ]
    return all(good)


def peak(form: str, steps: int, args: argparse.Namespace) -> float:
    """Peak memory of a process of its own, MiB."""
    command = [sys.executable, __file__, "--data", str(args.data), "--targets", args.targets[0]]
    command += ["--particles", str(args.particles), "--steps", str(steps), "--memory", form]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def alone(args: argparse.Namespace) -> None:
    """One run, and the peak memory of its process."""
    target = load(args.targets[0], args.data)
    if args.memory in CHAINS:
        chain(target, args.steps, CHAINS[args.memory]).log_weights(args.particles)
    else:
        next(iter(particles(target, args.steps).values()))()
    # The peak that resource.getrusage knows is also that of the parent that it was forked from.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def memory(args: argparse.Namespace) -> bool:
    """Peaks with 8 and with 64 steps; whether they are alike."""
    print(f"{args.targets[0]}: peak memory with 8 and with 64 steps, MiB")
    good = []
    for form in [*CHAINS, "AnnealedSMC"]:
        few, many = (peak(form, steps, args) for steps in (8, 64))
        good.append(many <= FLAT * few)
        print(
            f"  {form:<66} {few:6.0f} {many:6.0f}  as wanted (<= {FLAT} times): {good[-1]}",
            flush=True,
        )
    return all(good)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of posteriordb and samplers"
    )
    names = ["ionosphere", "german_credit", "funnel"]
    parser.add_argument("--targets", nargs="+", default=["ionosphere", "funnel"], choices=names)
    parser.add_argument("--steps", type=int, default=27)
    parser.add_argument("--particles", type=int, default=1024, help="of chains")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_default_dtype(torch.double)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.memory:
        alone(args)
        return
    good = [table(name, args) for name in args.targets] + [memory(args)]
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
