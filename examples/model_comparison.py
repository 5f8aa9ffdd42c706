"""Which prior explains a half-hidden, noisy digit? Model comparison by evidence.

Eleven priors stand against each other over the same readings: the digits of each class (the labelled network
of conditional_digits.py, one context each), and all digits as one multivariate normal. log p(y) of a
diffusion is estimated by twisted SMC, whose Z is unbiased and has a standard error; that of the normal is
known. Under equal prior odds the evidences are posterior probabilities of the classes, which the true
labels of the test images check.

Run: python examples/model_comparison.py
On a GPU, with more particles: python examples/model_comparison.py --device cuda --particles 512
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conditional_digits
import digits
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from restoration import HIGH, inpainting, reading, visible_half
from torch import Tensor

from pyro_diffusion import LevelsDenoiser, ProgramLikelihood, TwistedSMC, plotting

CLASSES = conditional_digits.CLASSES
SEEN = inpainting()


def program(denoiser: LevelsDenoiser, y: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    """Every reading under every class: two plates, so each pair has particles of its own."""
    classes = torch.arange(CLASSES, device=y.device).unsqueeze(-1).expand(-1, len(y))
    diffusion = conditional_digits.diffusion(denoiser, args.chain, classes)

    def model() -> None:
        with pyro.plate("classes", CLASSES, dim=-2), pyro.plate("images", len(y), dim=-1):
            x = pyro.sample("x", diffusion)
            seen = dist.Normal(SEEN(x.float()), args.sd).to_event(1)
            pyro.sample("y", seen, obs=y.expand(CLASSES, -1, -1))

    return model


def evidences(
    denoiser: LevelsDenoiser, y: Tensor, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y | class), standard errors and least effective sample sizes, each (classes, images)."""
    likelihood = ProgramLikelihood(program(denoiser, y, args))
    smc = TwistedSMC(
        likelihood.prior, likelihood, num_particles=args.particles, progress=args.progress
    )
    values, variances, least = [], [], []
    for _ in range(args.runs):
        done = smc.run()
        print(done.verdict)
        values.append(done.log_evidence_terms.double().cpu())
        variances.append(done.log_evidence_errors.square().cpu())
        least.append(done.ess.amin(0).cpu())
    # Z is unbiased, so runs are averaged as Z; an error of log Z by the delta method.
    stacked = torch.stack(values)
    weights = stacked.softmax(0)
    error = (weights.square() * torch.stack(variances)).sum(0).sqrt()
    return stacked.logsumexp(0) - math.log(args.runs), error, torch.stack(least).amin(0)


def normal(train: Tensor, y: Tensor, args: argparse.Namespace) -> Tensor:
    """log p(y) if digits were one multivariate normal with the moments of the training images."""
    seen = SEEN(train.double())
    covariance = seen.mT.cov() + args.sd**2 * torch.eye(seen.shape[1], dtype=seen.dtype)
    return dist.MultivariateNormal(seen.mean(0), covariance).log_prob(y.double())


def report(
    log_z: Tensor, error: Tensor, ess: Tensor, gaussian: Tensor, label: Tensor
) -> dict[str, Any]:
    """Print what the evidences say, and return it."""
    probs = log_z.softmax(0)
    mixture = log_z.logsumexp(0) - math.log(CLASSES)
    # d log p(class) = sum_k (1[k = class] - p_k) d log Z_k
    rows = torch.arange(len(label))
    own = (torch.nn.functional.one_hot(label, CLASSES).mT.double() - probs).square()
    spread = (own * error.square()).sum(0).sqrt()
    noise = (probs.square() * error.square()).sum(0).sqrt()
    print(
        "\nimage  label  most probable  log p(label | y)   s.e.   "
        "log p(y): diffusions   s.e.   normal   ESS >="
    )
    for i in range(len(label)):
        print(
            f"{i:>5} {int(label[i]):>6} {int(probs[:, i].argmax()):>8} ({float(probs[:, i].max()):.2f}) "
            f"{float(probs[label[i], i].log()):>14.2f} {float(spread[i]):>8.2f} {float(mixture[i]):>18.2f} "
            f"{float(noise[i]):>10.2f} {float(gaussian[i]):>8.2f} {float(ess[:, i].min()):>8.1f}"
        )
    found = probs[label, rows].log()
    right = (probs.argmax(0) == label).double()
    factor = mixture - gaussian
    totals = {
        "correct": (right, "share of labels most probable"),
        "log_p_label": (found, "mean log p(label | y), nats; chance is -2.30"),
        "log_bayes_factor": (factor, "mean log Bayes factor, diffusions over normal, nats"),
    }
    metrics: dict[str, Any] = {}
    for name, (each, title) in totals.items():
        mean, s_e = float(each.mean()), float(each.std()) / math.sqrt(len(each))
        print(f"{title:<52} {mean:7.3f} +- {s_e:.3f}")
        metrics[name] = [mean, s_e]
    metrics["log_evidence"] = log_z.tolist()
    metrics["log_evidence_error"] = error.tolist()
    metrics["normal"] = gaussian.tolist()
    return metrics


def draw(log_z: Tensor, error: Tensor, y: Tensor, x: Tensor, label: Tensor) -> Figure:
    """Truth, reading and log-evidence by class of every image."""
    count = len(label)
    figure = Figure(figsize=(7.0, 1.25 * count), layout="constrained")
    axes = figure.subplots(count, 3, width_ratios=[1, 1, 4], squeeze=False)
    pictures = reading(y, visible_half())
    for i, (left, middle, right) in enumerate(axes):
        plotting.sample_grid(x[i : i + 1], low=0, high=HIGH, ax=left)
        plotting.sample_grid(pictures[i : i + 1], low=0, high=HIGH, ax=middle)
        colours = ["tab:orange" if c == label[i] else "tab:blue" for c in range(CLASSES)]
        height = log_z[:, i] - log_z[:, i].max()
        for c in range(CLASSES):
            bar, known = 2 * float(error[c, i]), bool(error[c, i].isfinite())
            style = {} if known else {"mfc": "white"}
            right.errorbar(
                c, float(height[c]), bar, fmt="o", ms=4, color=colours[c], capsize=2, **style
            )
        right.set_ylim(-25, 3)
        right.set_xticks(range(CLASSES), range(CLASSES) if i == count - 1 else [])
        right.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_title("truth", fontsize=9)
    axes[0, 1].set_title("reading", fontsize=9)
    title = "log p(y | class) below the best (orange: true class; hollow: no error estimated)"
    axes[0, 2].set_title(title, fontsize=9)
    axes[-1, 2].set_xlabel("class")
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/model_comparison")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    folder = Path("results/conditional_digits")
    parser.add_argument("--prior", type=Path, default=folder, help="of conditional_digits.py")
    parser.add_argument("--prior-settings", default="", help="arguments of it that the prior has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4, help="test images")
    parser.add_argument("--sd", type=float, default=3.0, help="of the noise, in grey levels")
    parser.add_argument("--chain", type=int, default=40, help="steps of the chain")
    parser.add_argument("--particles", type=int, default=64, help="of each class, image and run")
    parser.add_argument("--runs", type=int, default=2, help="of the particles, averaged")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = ["--no-progress", "--out", str(args.prior), *args.prior_settings.split()]
    denoiser, _ = conditional_digits.trained(conditional_digits.parse(settings))
    pyro.set_rng_seed(args.seed)
    data, label = digits.load(), conditional_digits.labels()["test"][: args.images]
    x = data["test"][: args.images]
    y = SEEN(x.float())
    y = y + args.sd * torch.randn_like(y)
    log_z, error, ess = evidences(denoiser.to(args.device), y.to(args.device), args)
    metrics = report(log_z, error, ess, normal(data["train"], y, args), label)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    figure = draw(log_z, error, y, x, label)
    figure.savefig(args.out / "evidence.png", dpi=120, bbox_inches="tight")
    print(f"the figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
