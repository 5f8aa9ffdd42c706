"""Particles from stock guides to posteriors: evidence and marginals against gold draws and known values.

Run: python benchmarks/guides.py --data DIR [--targets ...] [--seeds 0 1 2]

Every guide is fitted by SVI (`PathELBO`, 64 particles a step, Adam at `--lr`, falling a hundredfold over its
steps, gradients clipped at 10) for the same seconds; `AutoIAFNormal` has two transforms of width 64.
Particles start at the guides `--from` with the defaults of `AnnealedSMC`; on the two targets of many modes
the base is widened (`widen=3`). ELBOs are of 100,000 draws. Marginal errors are the largest over coordinates:
of means in reference standard deviations, of standard deviations as a ratio less 1. All seconds are of the
processor, one thread.
"""

import argparse
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import ExponentialLR
from torch import Tensor

from benchmarks import guide_targets as targets
from benchmarks.guide_targets import Target
from pyro_diffusion.evaluate import bracket_evidence
from pyro_diffusion.infer import AnnealedSMC, PathELBO

GUIDES = {
    "AutoNormal": lambda model: AutoNormal(model, init_loc_fn=targets.start),
    "AutoMVN": lambda model: AutoMultivariateNormal(model, init_loc_fn=targets.start),
    "AutoLowRank": lambda model: AutoLowRankMultivariateNormal(model, init_loc_fn=targets.start),
    # takes no init_loc_fn: flat priors get their initial value from a handler
    "AutoIAF": lambda model: AutoIAFNormal(
        InitMessenger(targets.start)(model), hidden_dim=[64], num_transforms=2
    ),
}
GOLD = ["eight_schools", "kidiq", "arK", "low_dim_gauss_mix", "gp_pois_regr"]
WITH_DATA = [*GOLD, "centered", "ionosphere", "german_credit", "brownian"]
WITHOUT = ["funnel", "mixture", "wells"]
ELBO_DRAWS = 100_000
DRAWS = 2000
EVEN = torch.full((DRAWS,), 1 / DRAWS, dtype=torch.double)


def load(name: str, folder: Path) -> Target:
    """A target by name."""
    if name in GOLD:
        return targets.gold(folder, name)
    if name == "funnel":
        known = 0.0, 0.1
        return Target(targets.funnel_model, None, known, targets.funnel_draws)
    if name == "mixture":
        return targets.mixture()[0]
    if name == "wells":
        return targets.wells()
    found: Target = getattr(targets, name)(folder)
    return found


def train(target: Target, guide: Any, loss: Any, seconds: float, lr: float) -> int:
    """Steps of SVI in that time of the processor."""
    optimizer = ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": 1.0}, {"clip_norm": 10.0}
    )
    svi = SVI(target.model, guide, optimizer, loss)
    start, steps = time.process_time(), 0
    while (passed := time.process_time() - start) < seconds:
        svi.step()
        steps += 1
        # the rate falls by the time that the others will take
        for scheduler in optimizer.optim_objs.values():
            scheduler.optimizer.param_groups[0]["lr"] = lr * 0.01 ** (passed / seconds)
    return steps


def fitted(
    kind: str, target: Target, seconds: float, lr: float = 0.01, particles: int = 64
) -> tuple[Any, int]:
    """A stock guide after that time of SVI, and its steps."""
    pyro.clear_param_store()
    guide = GUIDES[kind](target.model)
    guide()
    return guide, train(target, guide, PathELBO(particles), seconds, lr)


def marginals(target: Target, draws: dict[str, Tensor], weights: Tensor) -> tuple[float, float]:
    """The largest errors of a mean and of a standard deviation, over coordinates of the reference."""
    if target.reference is None:
        return math.nan, math.nan
    reference, to_columns = target.reference
    found = to_columns(draws)
    mean, sd = weights @ found, (weights @ (found - weights @ found).square()).sqrt()
    means = ((mean - reference.mean(0)) / reference.std(0)).abs().max()
    return float(means), float((sd / reference.std(0) - 1).abs().max())


def bounds(target: Target, guide: Any) -> tuple[float, float]:
    """ELBO of 100,000 draws, and EUBO of up to 5000 exact ones."""
    exact = target.exact(5000) if target.exact else {}
    if not exact:  # the ELBO alone: any draws will do for the other
        with torch.no_grad():
            pair = guide(), guide()
            exact = {k: torch.stack([drawn[k] for drawn in pair]) for k in pair[0]}
    found = bracket_evidence(target.model, guide, exact, num_samples=ELBO_DRAWS)
    return found.elbo.value, found.eubo.value if target.exact else math.nan


def extra(name: str, draws: dict[str, Tensor], weights: Tensor) -> str:
    """What else a target asks for: the funnel's width, the modes that have draws, and their weights."""
    if name == "funnel":
        x = draws["x"][:, 0]
        return f"sd(x_0) {float((weights @ (x - weights @ x).square()).sqrt()):.2f}"
    if name not in ("mixture", "wells"):
        return ""
    x = draws["x"]
    if name == "mixture":
        locs = targets.mixture()[1]
        nearest = torch.cdist(x, locs).argmin(-1)
        right = torch.full((len(locs),), 1 / len(locs))
    else:
        halves = 2 ** torch.arange(5)
        nearest = ((x[:, 0::2] > 0) * halves).sum(-1)
        sample = targets.wells().exact
        assert sample is not None
        true = ((sample(200_000)["x"][:, 0::2] > 0) * halves).sum(-1)
        right = torch.bincount(true, minlength=32) / len(true)
    shares = torch.zeros_like(right).index_add_(0, nearest, weights.to(right))
    distance = float((shares - right).abs().sum() / 2)
    return f"modes {int((shares > 0).sum())} of {len(right)}, TV {distance:.3f}"


def particles(name: str, target: Target, guide: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One run of particles from a fitted guide, as a row of the table."""
    options: dict[str, Any] = {
        "moves": args.moves,
        "conditional_ess": args.conditional_ess,
        "rounds": args.rounds,
    }
    options["widen"] = 3 if name in ("mixture", "wells") else 0
    start = time.process_time()
    found = AnnealedSMC(target.model, guide, args.particles, args.repeats, **options).run()
    seconds = time.process_time() - start
    weights = found.log_weights.exp()
    means, sds = marginals(target, found.draws, weights)
    evidence = found.log_evidence
    return {
        "seconds": seconds,
        "log_z": evidence.value,
        "error": evidence.standard_error,
        "means": means,
        "sds": sds,
        "steps": len(found.betas) - 1,
        "gradients": found.evaluations,
        "believable": found.verdict.believable,
        "rounds": ", ".join(f"{x.value:.3f}" for x in found.verdict.rounds),
        "bound": float(found.log_evidence_terms.mean()),
        "extra": extra(name, found.sample(DRAWS), EVEN),
    }


def judged(target: Target, row: dict[str, Any]) -> str:
    """Whether a row is as wanted: marginals within .1 and 10 %, evidence within its error."""
    wanted = []
    if target.reference is not None:
        wanted.append(row["means"] <= 0.1 and row["sds"] <= 0.1)
    if target.log_z is not None:
        value, limit = target.log_z
        limit = 2 * row["error"] if math.isnan(limit) else limit
        wanted.append(abs(row["log_z"] - value) <= limit)
    return str(all(wanted))


def run(name: str, seed: int, args: argparse.Namespace) -> None:
    """All guides of one target, and particles from each."""
    for kind in args.guides:
        pyro.set_rng_seed(seed)
        target = load(name, args.data)
        guide, steps = fitted(kind, target, args.seconds, args.lr, args.svi_particles)
        elbo, eubo = bounds(target, guide)
        with torch.no_grad():
            draws = [guide() for _ in range(DRAWS)]
        stacked = {k: torch.stack([d[k] for d in draws]) for k in draws[0]}
        means, sds = marginals(target, stacked, EVEN)
        print(
            f"{name:<18} {seed:>4} {kind:<12} {args.seconds:>5.0f} {steps:>6} {elbo:>10.3f} {eubo:>10.3f} "
            f"{means:>6.2f} {sds:>6.2f}  {extra(name, stacked, EVEN)}",
            flush=True,
        )
        if kind not in args.start:
            continue
        row = particles(name, target, guide, args)
        known = math.nan if target.log_z is None else target.log_z[0]
        print(
            f"{'':<18} {'':>4} {'+ particles':<12} {row['seconds']:>5.0f} {row['gradients']:>6} "
            f"{row['log_z']:>10.3f} +- {row['error']:<6.3f} ({known:.3f}) {row['means']:>6.3f} "
            f"{row['sds']:>6.3f}  K {row['steps']}, E log Z-hat {row['bound']:.3f}, believable "
            f"{row['believable']}, rounds {row['rounds']}, {row['extra']}  as wanted: {judged(target, row)}",
            flush=True,
        )


def unbiased(args: argparse.Namespace) -> None:
    """200 repeats on conjugate cases with plates and constrained supports: E Z-hat / Z, and both bounds."""
    from benchmarks.guide_conjugate import CASES

    for name, (model, log_z, exact) in CASES.items():
        pyro.set_rng_seed(0)
        target = Target(model, exact=exact)
        guide, _ = fitted("AutoMVN", target, 5.0)
        found = AnnealedSMC(model, guide, 64, 200).run()
        ratio = (found.log_evidence_terms - log_z).exp()
        mean, error = float(ratio.mean()), float(ratio.std() / math.sqrt(200))
        elbo, eubo = bounds(target, guide)
        right = abs(mean - 1) <= 3 * error and elbo <= log_z <= eubo
        print(
            f"{name:<18} E Z-hat / Z {mean:.4f} +- {error:.4f}, ELBO {elbo:.4f} <= {log_z:.4f} <= EUBO "
            f"{eubo:.4f}  as wanted: {right}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of posteriordb and samplers"
    )
    names = ["conjugate", *WITH_DATA, *WITHOUT]
    parser.add_argument("--targets", nargs="+", default=names, choices=names)
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument(
        "--from", dest="start", nargs="*", default=["AutoMVN"], choices=list(GUIDES)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of SVI, each guide")
    parser.add_argument("--svi-particles", type=int, default=64, help="a step")
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.01, help="of Adam, at the start")
    parser.add_argument("--moves", type=int, default=1, help="at each temperature")
    parser.add_argument("--rounds", type=int, default=6, help="of particles at most")
    parser.add_argument("--conditional-ess", type=float, default=0.97)
    args = parser.parse_args()
    torch.set_default_dtype(torch.double)
    warnings.simplefilter("ignore")
    print(
        f"{'target':<18} {'seed':>4} {'guide':<12} {'s':>5} {'steps':>6} {'ELBO':>10} {'EUBO':>10} "
        f"{'mean':>6} {'sd':>6}\n{'':<23} {'+ particles':<12} {'s':>5} {'grads':>6} {'log Z':>10}"
    )
    for name in args.targets:
        if name == "conjugate":
            unbiased(args)
            continue
        for seed in args.seeds:
            run(name, seed, args)


if __name__ == "__main__":
    main()
