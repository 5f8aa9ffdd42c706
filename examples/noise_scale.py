"""A blurred digit and the unknown scale of its noise, inferred together in three ways.

    s ~ LogNormal(0, 1)
    x ~ Diffusion(...)                 the model of digits.py, integers 0 ... 16
    y ~ Normal(blur(x), s)             32 readings

1. p(s | y) by quadrature: one twisted SMC run gives log p(y | s) on a grid of s, with error bars.
2. An AutoGuideList of Pyro's AutoNormal for s and AutoTwistedSMC for x, trained by plain SVI.
3. Particle Gibbs as a kernel of Pyro's MCMC: conditional SMC for x, NUTS for s.

Run: python examples/noise_scale.py
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.ops.stats import effective_sample_size
from pyro.optim import Adam
from restoration import HIGH, blurring, panels, prior
from torch import Tensor
from tqdm import trange

from pyro_diffusion import AutoTwistedSMC, Diffusion, ProgramLikelihood, TwistedSMC, infer

PRIOR = (0.0, 1.0)  # of log s


def observe(x: Tensor) -> Tensor:
    """Every other column of the blurred image, 32 readings."""
    return blurring()(x.float()).unflatten(-1, (8, 8))[..., ::2].flatten(-2)


def program(diffusion: Diffusion) -> Callable[[Tensor], None]:
    """The generative model of one image's readings y, (32,)."""

    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(*PRIOR))
        x = pyro.sample("x", diffusion)
        pyro.sample("y", dist.Normal(observe(x), s).to_event(1), obs=y)

    return model


def on_a_grid(diffusion: Diffusion, y: Tensor, args: Any) -> tuple[Tensor, infer.Particles]:
    """Scales, and particles of p(x | y, s) for each of them: a plate with a filter for every scale."""
    scales = torch.linspace(math.log(0.5), math.log(8.0), args.grid).exp()

    def model() -> None:
        with pyro.plate("scales", len(scales)):
            x = pyro.sample("x", diffusion)
            reading = dist.Normal(observe(x), scales.unsqueeze(-1)).to_event(1)
            pyro.sample("y", reading, obs=y.expand(len(scales), -1))

    likelihood = ProgramLikelihood(model)
    smc = TwistedSMC(diffusion, likelihood, num_particles=args.particles, progress=args.progress)
    return scales, smc.run()


def quadrature(scales: Tensor, particles: infer.Particles) -> dict[str, Any]:
    """Posterior of log s on the grid: weights, moments, and their Monte-Carlo errors (delta method)."""
    at = scales.log().double()
    log_z = particles.log_evidence_terms.double()
    weights = (log_z + dist.Normal(*PRIOR).log_prob(at)).softmax(0)
    mean = (weights * at).sum()
    sd = (weights * (at - mean).square()).sum().sqrt()
    noise = particles.log_evidence_errors.double().square()
    matters = weights > 1e-6  # an error that is not estimated, infinite, makes one here
    parts = (weights.square() * noise)[matters]
    gap = (at - mean).square()[matters]
    error, spread = ((parts * v).sum().sqrt() for v in (gap, (gap - sd**2).square()))
    found = {"mean": mean, "mean_error": error, "sd": sd, "sd_error": spread / (2 * sd)}
    image = (weights.view(-1, 1, 1, 1) * particles.mean).sum(0)
    return {**{k: float(v) for k, v in found.items()}, "weights": weights, "image": image}


def by_svi(diffusion: Diffusion, y: Tensor, args: Any) -> dict[str, Any]:
    """The normal approximation of log s that maximizes a true ELBO; averages over the last half."""
    model = program(diffusion)
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["x"]), init_scale=0.2))
    guide.append(AutoTwistedSMC(model, num_particles=args.guide_particles))
    svi = SVI(model, guide, Adam({"lr": args.lr}), Trace_ELBO())
    tail, losses = [], []
    for _ in trange(args.svi_steps, desc="SVI", disable=not args.progress):
        losses.append(svi.step(y))
        tail.append([float(v.s.detach()) for v in (guide[0].locs, guide[0].scales)])
    late = torch.tensor(tail[len(tail) // 2 :], dtype=torch.float64)
    # Steps are correlated: batches of ten are taken for independent.
    batches = torch.stack([part.mean(0) for part in late.split(10)])
    error = batches.std(0, correction=min(1, len(batches) - 1)) / math.sqrt(len(batches))
    elbo = -torch.tensor(losses[len(losses) // 2 :], dtype=torch.float64)
    return {
        **{"mean": float(late[:, 0].mean()), "mean_error": float(error[0])},
        **{"sd": float(late[:, 1].mean()), "sd_error": float(error[1])},
        "elbo": float(elbo.mean()),
        "elbo_error": float(elbo.std()) / math.sqrt(len(elbo)),
    }


def by_gibbs(diffusion: Diffusion, y: Tensor, args: Any) -> dict[str, Any]:
    """Draws of the joint posterior by particle Gibbs."""
    kernel = infer.ParticleGibbs(
        program(diffusion), num_particles=args.gibbs_particles, others_steps=2
    )
    mcmc = MCMC(kernel, args.sweeps, args.warmup, disable_progbar=not args.progress)
    mcmc.run(y)
    draws = mcmc.get_samples()
    log_s = draws["s"].double().log()
    size = float(effective_sample_size(log_s.unsqueeze(0))) if len(log_s) > 3 else 1.0
    size = min(max(size, 1.0), float(len(log_s)))
    sd = float(log_s.std())
    moved = (draws["x"].diff(dim=0) != 0).flatten(1).any(1).double().mean()
    return {
        **{"mean": float(log_s.mean()), "mean_error": sd / math.sqrt(size)},
        **{"sd": sd, "sd_error": sd / math.sqrt(2 * size)},
        **{"ess": size, "moved": float(moved)},
        **{"draws": log_s, "image": draws["x"].double().mean(0)},
    }


def report(found: dict[str, dict[str, Any]], x: Tensor, args: Any) -> dict[str, dict[str, float]]:
    """Print the table of log s, and return its figures."""
    print(f"\nlog s, truth {math.log(args.sd):.3f}   mean     s.e.      sd     s.e.")
    for name, each in found.items():
        print(
            f"  {name:<16} {each['mean']:>10.3f} {each['mean_error']:>8.3f} {each['sd']:>7.3f} "
            f"{each['sd_error']:>8.3f}"
        )
    svi, gibbs = found["SVI"], found["particle Gibbs"]
    print(
        f"ELBO {svi['elbo']:.2f} +- {svi['elbo_error']:.2f} nats, a lower bound of log p(y); quadrature "
        f"{found['quadrature']['log_evidence']:.2f} nats\n"
        f"particle Gibbs: effective sample size of log s {gibbs['ess']:.0f} of {args.sweeps}, the image "
        f"moved in {100 * gibbs['moved']:.0f} % of sweeps"
    )
    for name in ("quadrature", "particle Gibbs"):
        error = float((found[name]["image"] - x).square().mean().sqrt())
        print(f"root mean squared error of the image's mean, {name}: {error:.2f} grey levels")
        found[name]["image_rmse"] = error
    return {
        name: {k: v for k, v in each.items() if isinstance(v, float)}
        for name, each in found.items()
    }


def draw(found: dict[str, dict[str, Any]], scales: Tensor, sd: float) -> Figure:
    """Three posteriors of the noise scale."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    ax, at = figure.subplots(), scales.log().double()
    width = at.diff().mean()
    if (draws := found["particle Gibbs"]["draws"]).numel() > 1:
        ax.hist(draws.exp(), bins=20, density=True, color="#cccccc", label="particle Gibbs")
    density = found["quadrature"]["weights"] / width / scales
    ax.plot(scales, density, "o-", ms=3, color="tab:blue", label="quadrature")
    fine = torch.linspace(float(at[0]), float(at[-1]), 300).double()
    fitted = dist.Normal(found["SVI"]["mean"], found["SVI"]["sd"]).log_prob(fine).exp()
    ax.plot(fine.exp(), fitted / fine.exp(), "--", color="tab:orange", label="SVI")
    ax.axvline(sd, color="tab:green", lw=1, label="truth")
    ax.set_xlabel("noise scale s, grey levels")
    ax.set_ylabel("posterior density")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/noise_scale")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    folder = Path("results/digits")
    parser.add_argument("--prior", type=Path, default=folder, help="folder of the digits model")
    parser.add_argument("--prior-settings", default="", help="arguments of digits.py it has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=int, default=1, help="which of the test images")
    parser.add_argument("--sd", type=float, default=2.0, help="the true scale, grey levels")
    parser.add_argument("--steps", type=int, default=30, help="steps of the chain")
    parser.add_argument("--grid", type=int, default=13, help="scales of the quadrature")
    parser.add_argument("--particles", type=int, default=64, help="for each of them")
    parser.add_argument("--svi-steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.05, help="of SVI")
    parser.add_argument("--guide-particles", type=int, default=32, help="in a step of SVI")
    parser.add_argument("--sweeps", type=int, default=80, help="of particle Gibbs")
    parser.add_argument("--warmup", type=int, default=15)
    parser.add_argument("--gibbs-particles", type=int, default=16, help="in a sweep")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    diffusion = digits.diffusion(prior(args), args.steps)
    pyro.set_rng_seed(args.seed)
    data = digits.load()
    x = data["test"][args.image]
    y = observe(x)
    y = y + args.sd * torch.randn_like(y)
    scales, particles = on_a_grid(diffusion, y, args)
    found = {"quadrature": quadrature(scales, particles)}
    log_z, at = particles.log_evidence_terms.double(), scales.log().double()
    joint = log_z + dist.Normal(*PRIOR).log_prob(at)
    found["quadrature"]["log_evidence"] = float(joint.logsumexp(0) + at.diff().mean().log())
    found["SVI"] = by_svi(diffusion, y, args)
    found["particle Gibbs"] = by_gibbs(diffusion, y, args)
    metrics = report(found, x, args)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    draw(found, scales, args.sd).savefig(args.out / "noise_scale.png", dpi=150)
    pictures = {
        "truth": (x, 1, HIGH),
        "reading": (y.view(1, 8, 4).repeat_interleave(2, -1), 1, HIGH),
        "quadrature": (found["quadrature"]["image"], 1, HIGH),
        "Gibbs": (found["particle Gibbs"]["image"], 1, HIGH),
    }
    panels(pictures).savefig(args.out / "image.png", dpi=150, bbox_inches="tight")
    print(f"figures and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
