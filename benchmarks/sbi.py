"""Posteriors of simulators: AutoAmortized beside reference posteriors, by a classifier two-sample test.

Run: python benchmarks/sbi.py --data DIR     (NAME.npz with `observations`, `reference_posterior_samples`)
     python benchmarks/sbi.py --task hierarchical            groups and sets of any size, beside closed forms

The tasks are those of sbibm (Lueckmann et al., arXiv 2101.04653), each a Pyro program below. C2ST is the mean
over ten observations of `evaluate.c2st` between 2000 draws of the guide and 2000 of the reference: 0.5 is
right, 1 is told apart always. Every task is trained with the defaults of `train.fit_amortized`. Published
figures at 1000 / 10,000 simulations (sbibm's NPE; NPSE and Simformer as read from the papers' plots, within
0.003), by another classifier:

    two_moons        NPE .725/.606   NPSE .570/.513   Simformer .611/.525
    gaussian_linear  NPE .694/.552   NPSE .705/.572   Simformer .732/.635
    bernoulli_glm    NPE .863/.678

The task `subsets` has no data and its own table: any sites of two programs given any others (sbi_subsets.py).
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import sbi_hierarchical
import sbi_subsets
import torch
from pyro.infer import Predictive
from torch import Tensor

from pyro_diffusion import evaluate
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.train import fit_amortized

DRAWS = 2000


def two_moons(x: Tensor | None = None) -> None:
    """A crescent whose place only tells |theta_1 + theta_2|."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    angle = pyro.sample("angle", dist.Uniform(-math.pi / 2, math.pi / 2))
    radius = pyro.sample("radius", dist.Normal(0.1, 0.01))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    place = torch.stack([-theta.sum(-1).abs(), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)
    pyro.sample("x", dist.Delta(crescent + place, event_dim=1), obs=x)


def gaussian_linear(x: Tensor | None = None) -> None:
    """Ten numbers, each seen through noise as wide as its prior."""
    sd = math.sqrt(0.1)
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), sd).to_event(1))
    pyro.sample("x", dist.Normal(theta, sd).to_event(1), obs=x)


def bernoulli_glm(design: Tensor) -> Callable[..., None]:
    """A generalized linear model, seen through its sufficient statistic."""
    steps = torch.eye(9) - torch.ones(8).diag(-1)
    factor = steps @ steps + (torch.arange(9) / 9).sqrt().diag()
    precision = torch.block_diag(torch.tensor([[0.5]]), factor.mT @ factor)

    def model(x: Tensor | None = None) -> None:
        prior = dist.MultivariateNormal(torch.zeros(10), precision_matrix=precision)
        theta = pyro.sample("theta", prior)
        spikes = pyro.sample("spikes", dist.Bernoulli(logits=theta @ design.mT).to_event(1))
        pyro.sample("x", dist.Delta(spikes @ design, event_dim=1), obs=x)

    return model


def task(name: str, folder: Path) -> tuple[Callable[..., None], dict[str, Tensor]]:
    """A program and its reference posteriors."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        data = {k: torch.from_numpy(file[k]) for k in file}
    if name == "bernoulli_glm":
        return bernoulli_glm(data["design_matrix"]), data
    return {"two_moons": two_moons, "gaussian_linear": gaussian_linear}[name], data


def run(name: str, count: int, seed: int, args: argparse.Namespace) -> list[float]:
    """Train one guide and compare it at every observation."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data = task(name, args.data)
    start = time.perf_counter()
    guide = AutoAmortized(model, observed=["x"], latents=["theta"])
    simulations = guide.simulate(count)
    simulated = time.perf_counter() - start
    options: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    history = fit_amortized(guide, simulations, progress=args.progress, **options)
    trained = time.perf_counter() - start
    accuracies = []
    predictive = Predictive(guide, num_samples=DRAWS, parallel=True)
    for x, reference in zip(data["observations"], data["reference_posterior_samples"], strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of observations at the edge: one in a thousand
            draws = predictive(x)["theta"]
        chosen = reference[torch.randperm(len(reference))[:DRAWS]]
        accuracies.append(evaluate.c2st(draws, chosen).accuracy)
    mean = float(np.mean(accuracies))
    print(
        f"{name:<16} {count:>7} {seed:>4} {mean:>7.3f} {min(accuracies):>6.3f} {max(accuracies):>6.3f} "
        f"{len(history.losses):>6} {simulated:>7.1f} {(trained - simulated) / 60:>7.1f} "
        f"{(time.perf_counter() - start) / 60:>7.1f}",
        flush=True,
    )
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the tasks; the last two need none")
    tasks = ["two_moons", "gaussian_linear", "bernoulli_glm"]
    alone = {"hierarchical": sbi_hierarchical.main, "subsets": sbi_subsets.main}
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=[*tasks, *alone])
    parser.add_argument("--programs", nargs="+", default=["gaussian", "tree"], help="of `subsets`")
    parser.add_argument("--simulations", nargs="+", type=int, default=[1000, 10_000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=None, help="those of the recipe by default")
    parser.add_argument(
        "--lr", type=float, default=None, help="of `subsets`; the recipe's by default"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if len(args.tasks) == 1 and args.tasks[0] in alone:
        alone[args.tasks[0]](args)
        return
    if args.data is None or set(alone) & set(args.tasks):
        parser.error(f"--data: expected a folder for tasks of sbibm, and each of {[*alone]} alone")
    print(
        f"{'task':<16} {'n':>7} {'seed':>4} {'C2ST':>7} {'min':>6} {'max':>6} {'steps':>6} {'sim s':>7} "
        f"{'fit min':>7} {'all min':>7}"
    )
    for name in args.tasks:
        for count in args.simulations:
            for seed in args.seeds:
                run(name, count, seed, args)


if __name__ == "__main__":
    main()
