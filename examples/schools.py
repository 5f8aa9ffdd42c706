"""One guide for a hierarchical regression: any number of schools, each with any number of pupils.

    level, slope ~ Normal(0, 1), between, noise ~ HalfNormal(1), LogNormal(-.5, .5)
    effect_s ~ Normal(level, between)                        of every school
    x_sp ~ Normal(0, 1), y_sp ~ Normal(effect_s + slope x_sp, noise)   of every pupil

The guide is trained on simulations of 20 schools with 15 pupils. Then it is asked about 8 schools and about
15, of 1 to 15 pupils each, beside NUTS, which runs anew for each data set.

Run: python examples/schools.py
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS, Predictive
from torch import Tensor

from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.train import fit_amortized

OUTSIDE = ("level", "slope", "between", "noise")
SCHOOLS, PUPILS = 20, 15  # in the simulations


def model(
    x: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    schools: int = SCHOOLS,
    pupils: int = PUPILS,
) -> None:
    """Scores y of pupils by their earlier scores x, (schools, pupils); a mask says which pupils exist."""
    if y is not None:
        schools, pupils = y.shape[-2:]
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    between = pyro.sample("between", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.LogNormal(-0.5, 0.5))
    there = pyro.poutine.mask(mask=True if mask is None else mask)
    with pyro.plate("schools", schools, dim=-2):
        effect = pyro.sample("effect", dist.Normal(level, between))
        with pyro.plate("pupils", pupils, dim=-1), there:
            x = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(effect + slope * x, noise), obs=y)


def survey(schools: int, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Latents and data of so many schools, of 1 to 15 pupils each."""
    pyro.set_rng_seed(seed)
    drawn = Predictive(model, num_samples=1)(schools=schools)
    sizes = torch.randint(1, PUPILS + 1, (schools, 1))
    truth = {name: drawn[name][0] for name in (*OUTSIDE, "effect")}
    return truth, drawn["x"][0], drawn["y"][0], torch.arange(PUPILS) < sizes


def summary(draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Means and sds of all latents: those outside, then the schools' effects."""
    flat = torch.cat([draws[n].reshape(len(draws[n]), -1) for n in (*OUTSIDE, "effect")], 1)
    return flat.mean(0), flat.std(0)


def by_nuts(data: tuple[Tensor, ...], args: Any) -> dict[str, Tensor]:
    """Draws of the posterior of one data set."""
    kernel = NUTS(model, jit_compile=False)
    mcmc = MCMC(kernel, args.draws, args.warmup, disable_progbar=not args.progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a warm-up of a few steps
        mcmc.run(*data)
    found: dict[str, Tensor] = mcmc.get_samples()
    return found


def compare(guide: AutoAmortized, schools: int, args: Any) -> tuple[dict[str, Any], Any]:
    """Both posteriors of one survey."""
    truth, *data = survey(schools, args.seed + schools)
    start = time.perf_counter()
    with torch.no_grad():
        drawn = Predictive(guide, num_samples=args.draws, parallel=True)(*data)
    guided = time.perf_counter() - start
    nuts = by_nuts(tuple(data), args)
    sampled = time.perf_counter() - start - guided
    (mean, sd), (exact, spread) = summary(drawn), summary(nuts)
    off, wide = (mean - exact).abs() / spread, sd / spread
    found = {
        "outside": {
            n: {"off": float(o), "sd_ratio": float(w)}
            for n, o, w in zip(OUTSIDE, off, wide, strict=False)
        },
        "effects": {
            "off": float(off[len(OUTSIDE) :].mean()),
            "worst": float(off[len(OUTSIDE) :].max()),
            "sd_ratio": float(wide[len(OUTSIDE) :].mean()),
        },
        "seconds_guide": guided,
        "seconds_nuts": sampled,
    }
    print(f"\n{schools} schools, means off by (in NUTS's sds) and ratio of sds:")
    for name, each in found["outside"].items():
        print(f"  {name:<8} {each['off']:>6.2f} {each['sd_ratio']:>6.2f}")
    each = found["effects"]
    print(f"  effects  {each['off']:>6.2f} {each['sd_ratio']:>6.2f}   at worst {each['worst']:.2f}")
    print(f"  seconds: guide {guided:.1f}, NUTS {sampled:.1f}")
    return found, (truth, data, (mean, sd), (exact, spread))


def draw(parts: list[Any]) -> Figure:
    """Effects of the schools by the guide, by NUTS, and by each school's own pupils."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(
        1, len(parts), squeeze=False, width_ratios=[len(p[1][0]) for p in parts], sharey=True
    )[0]
    for ax, (truth, (x, y, mask), (mean, sd), (exact, spread)) in zip(axes, parts, strict=True):
        place = torch.arange(len(x))
        count = mask.sum(-1)
        own = ((y - truth["slope"] * x) * mask).sum(-1) / count
        first = len(OUTSIDE)
        ax.errorbar(place - 0.12, mean[first:], 2 * sd[first:], fmt="o", ms=4, label="guide")
        ax.errorbar(place + 0.12, exact[first:], 2 * spread[first:], fmt="s", ms=4, label="NUTS")
        ax.plot(place, own, "kx", ms=5, label="own pupils' mean")
        ax.plot(place, truth["effect"].squeeze(-1), "_", color="tab:green", ms=12, label="truth")
        ax.set_xticks(place, count.tolist(), fontsize=8)
        ax.set_xlabel("pupils of the school")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("effect, two sds")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/schools"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--schools", type=int, nargs="+", default=[8, 15])
    parser.add_argument("--draws", type=int, default=1000, help="of each posterior")
    parser.add_argument("--warmup", type=int, default=500, help="of NUTS")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    start = time.perf_counter()
    guide = AutoAmortized(model, observed=["x", "y"])
    table = guide.simulate(args.simulations)
    fit_amortized(
        guide,
        table,
        steps=args.steps,
        batch_size=min(128, args.simulations),
        progress=args.progress,
    )
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    metrics, parts = {}, []
    for schools in args.schools:
        metrics[f"{schools} schools"], part = compare(guide, schools, args)
        parts.append(part)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    draw(parts).savefig(args.out / "schools.png", dpi=150)
    print(f"figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
