"""Chains from stock guides (`AutoDiffusion`), trained for the same seconds as the stock guides alone.

Run: python benchmarks/guide_diffusion.py --data DIR [--targets ...] [--seeds 0 1 2]

Stock guides are fitted as in `benchmarks/guides.py`, for all `--seconds` (of the processor, one thread). A
chain's base is fitted for a share of them, and the chain is trained for the rest by `PathELBO` (`--paths`
paths, Adam at `--lr`, falling a hundredfold), without control, with the control of CMCD, and with a momentum.
Gradients are pathwise, but where `-score` is said. ELBO and evidence are of `--draws` of the guide, EUBO of
up to 5000 exact ones; each with its standard error. Errors of marginals are as there, of draws and of draws
by weight.
"""

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.guide_targets import Target
from benchmarks.guides import (
    DRAWS,
    EVEN,
    WITH_DATA,
    WITHOUT,
    bounds,
    extra,
    fitted,
    load,
    marginals,
    train,
)
from pyro_diffusion.infer import AutoDiffusion, PathELBO

CHAINS: dict[str, dict[str, Any]] = {
    "ula": {},
    "cmcd": {"control": True},
    "cmcd-score": {"control": True, "pathwise": False},
    "cmcd-joint": {"control": True, "train_base": True},
    "uha": {"kernel": "underdamped"},
    "ula-joint": {"train_base": True},
}
AT_ONCE = 2000


@torch.no_grad()
def measured(name: str, target: Target, guide: AutoDiffusion, draws: int) -> dict[str, Any]:
    """Bounds and evidence with standard errors; errors of marginals, with weights and without."""
    path = guide.path().expand(torch.Size([AT_ONCE]))
    parts: list[Tensor] = []
    weights: list[Tensor] = []
    for _ in range(draws // AT_ONCE):
        parts.append(path.sample())
        weights.append(path.path_density(parts[-1]).log_weight)
    u, log_weights = torch.cat(parts), torch.cat(weights)
    model = guide._last_model
    assert model is not None
    values, even = model.constrain(u, None), torch.full_like(log_weights, 1 / len(u))
    share = log_weights.softmax(0)
    ess = float(share.square().sum().reciprocal())
    found = {
        "elbo": (float(log_weights.mean()), float(log_weights.std()) / math.sqrt(len(u))),
        "log_z": (
            float(log_weights.logsumexp(0)) - math.log(len(u)),
            math.sqrt(max(1 / ess - 1 / len(u), 0)),
        ),
        "ess": ess / len(u),
        "marginals": marginals(target, values, even),
        "weighted": marginals(target, values, share),
        "extra": f"{some(name, values, even)} | {some(name, values, share)}",
        "eubo": (math.nan, math.nan),
    }
    if target.exact:
        back = guide.log_weights_back(target.exact(5000))
        found["eubo"] = float(back.mean()), float(back.std()) / math.sqrt(len(back))
    return found


def some(name: str, values: dict[str, Tensor], share: Tensor) -> str:
    """What else a target asks for, of 2000 draws by their shares."""
    index = torch.multinomial(share, DRAWS, replacement=True)
    return extra(name, {site: x[index] for site, x in values.items()}, EVEN)


def show(row: list[Any]) -> None:
    """One line of the table."""
    print(" | ".join(["", *map(str, row), ""]).strip(), flush=True)


def number(found: tuple[float, float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f})"


def pair(found: tuple[float, float]) -> str:
    return f"{found[0]:.2f}, {found[1]:.2f}"


def stock(name: str, kind: str, seed: int, args: argparse.Namespace) -> None:
    """A stock guide, fitted for all seconds."""
    pyro.set_rng_seed(seed)
    target = load(name, args.data)
    guide, steps = fitted(kind, target, args.seconds, args.stock_lr, args.svi_particles)
    elbo, eubo = bounds(target, guide)
    with torch.no_grad():
        drawn = [guide() for _ in range(DRAWS)]
    stacked = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}
    errors = pair(marginals(target, stacked, EVEN))
    show([name, seed, kind, "", f"{args.seconds:.0f}", steps, f"{elbo:.3f}", f"{eubo:.3f}", "", "", errors,
          "", extra(name, stacked, EVEN)])  # fmt: skip


def chain(name: str, kind: str, form: str, seed: int, args: argparse.Namespace) -> None:
    """A chain from a stock guide, for the same seconds in all."""
    pyro.set_rng_seed(seed)
    target = load(name, args.data)
    base = fitted(kind, target, args.seconds * args.base_share, args.stock_lr, args.svi_particles)[
        0
    ]
    guide = AutoDiffusion(target.model, base, args.steps, step_size=args.step_size, **CHAINS[form])
    before = measured(name, target, guide, AT_ONCE)
    steps = train(
        target, guide, PathELBO(args.paths), args.seconds * (1 - args.base_share), args.lr
    )
    row = measured(name, target, guide, args.draws)
    show([name, seed, kind, f"{form} {args.steps}", f"{args.seconds:.0f}", steps, number(row["elbo"]),
          number(row["eubo"]), number(row["log_z"]), f"{row['ess']:.3f}", pair(row["marginals"]),
          pair(row["weighted"]), f"{row['extra']} (untrained {before['elbo'][0]:.2f})"])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--targets", nargs="+", default=["eight_schools", "funnel", "ionosphere", "mixture"],
        choices=[*WITH_DATA, *WITHOUT],
    )  # fmt: skip
    parser.add_argument("--bases", nargs="+", default=["AutoNormal", "AutoIAF"])
    parser.add_argument("--chains", nargs="*", default=["ula", "cmcd"], choices=list(CHAINS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=45.0, help="of the processor, each row")
    parser.add_argument(
        "--base-share", type=float, default=1 / 3, help="of the seconds, a chain's base"
    )
    parser.add_argument("--svi-particles", type=int, default=64, help="a step, of stock guides")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--step-size", type=float, default=0.05)
    parser.add_argument("--paths", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.005, help="of a chain")
    parser.add_argument("--stock-lr", type=float, default=0.01, help="of stock guides")
    parser.add_argument("--draws", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_default_dtype(torch.double)
    warnings.simplefilter("ignore")
    print(vars(args))
    show(["target", "seed", "guide", "chain", "seconds", "SVI steps", "ELBO", "EUBO", "log Z", "ESS share",
          "errors: mean, sd", "weighted", "also"])  # fmt: skip
    show(["---"] * 13)
    for seed in args.seeds:
        for name in args.targets:
            for kind in args.bases:
                stock(name, kind, seed, args)
                for form in args.chains:
                    chain(name, kind, form, seed, args)


if __name__ == "__main__":
    main()
