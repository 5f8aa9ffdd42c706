"""A second network as the likelihood: digits of a class that a classifier names, by a prior that knows none.

    x ~ Diffusion(...)                          the model of digits.py, trained without labels
    label ~ Categorical(classifier(x))          a network trained on clean images, as it is

No guidance is trained, no network sees noise. Twisted SMC draws from p(x | label) and gives p(label), which
must add up to one over the ten labels; guidance alone stands beside. Two references: plain draws of the
prior, weighted by the classifier, and a support vector machine trained on other images than either network.

Run: python examples/second_network.py
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import pyro
import torch
from conditional_digits import labels
from matplotlib.figure import Figure
from pyro.distributions import Categorical
from pyro.infer import SVI, Predictive, Trace_ELBO
from restoration import HIGH, prior
from sklearn.svm import SVC
from torch import Tensor, nn
from tqdm import trange

from pyro_diffusion import (
    AutoGuidance,
    Diffusion,
    ProgramLikelihood,
    TwistedSMC,
    optim,
    plotting,
)

CLASSES = 10


class Classifier(nn.Module):
    """Logits of the label of an image of grey levels, batch + (1, 8, 8)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten()),
            *(nn.Dropout(0.5), nn.Linear(32 * width, CLASSES)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """batch + (10,)."""
        batch = x.shape[:-3]
        return self.layers(x.reshape(-1, *digits.EVENT_SHAPE) / 8 - 1).reshape(*batch, CLASSES)


def train_classifier(args: argparse.Namespace) -> Classifier:
    """Fit the classifier to the training images by SVI."""
    classifier, data = Classifier(args.width), digits.load()["train"].float()
    label = labels()["train"]

    def model(rows: Tensor) -> None:
        pyro.module("classifier", classifier)
        with pyro.plate("data", len(rows)), pyro.poutine.scale(scale=1 / len(rows)):
            pyro.sample("label", Categorical(logits=classifier(data[rows])), obs=label[rows])

    optimizer = optim.JointOptim(torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.1})
    svi = SVI(model, lambda rows: None, optimizer, Trace_ELBO())
    for _ in trange(args.classifier_steps, desc="classifier", disable=not args.progress):
        svi.step(torch.randint(len(data), (64,)))
    return classifier.eval().requires_grad_(False)


def program(diffusion: Diffusion, classifier: Classifier) -> Callable[[Tensor], None]:
    """One image for each label, which is all that is known of it."""

    def model(label: Tensor) -> None:
        with pyro.plate("images", len(label)):
            x = pyro.sample("x", diffusion)
            pyro.sample("label", Categorical(logits=classifier(x.float())), obs=label)

    return model


class Judge:
    """A support vector machine trained on the images that neither network was trained on."""

    def __init__(self) -> None:
        images, known = digits.load(), labels()
        x, label = (
            torch.cat([part[k] for k in ("validation", "test")]) for part in (images, known)
        )
        self.machine = SVC(gamma=0.001, C=10).fit(x.flatten(1).numpy(), label.numpy())
        self.accuracy = float((self(images["train"]) == known["train"]).double().mean())

    def __call__(self, x: Tensor) -> Tensor:
        """Labels of images of grey levels, batch + (1, 8, 8)."""
        found = self.machine.predict(x.reshape(-1, 64).numpy())
        return torch.as_tensor(found).reshape(x.shape[:-3])


def agreement(judge: Judge, x: Tensor) -> tuple[Tensor, float, float]:
    """Shares of draws x, (draws, 10, 1, 8, 8), judged to be of their label; their mean and its error.

    The error takes draws for independent: that of particles which share ancestors is larger.
    """
    right = (judge(x) == torch.arange(CLASSES)).double()
    shares = right.mean(0)
    variance = (shares * (1 - shares)).clamp(min=1 / len(x)) / len(x)
    return shares, float(shares.mean()), float(variance.sum().sqrt()) / CLASSES


def by_prior(
    diffusion: Diffusion, classifier: Classifier, judge: Judge, count: int
) -> dict[str, Tensor]:
    """p(label) and the judge's agreement by plain draws of the prior, each with its standard error."""
    x = torch.cat([diffusion.sample((min(250, count),)) for _ in range(0, count, 250)])
    weights = classifier(x.float()).double().softmax(-1)
    evidence = weights.mean(0)
    right = (judge(x).unsqueeze(-1) == torch.arange(CLASSES)).double()
    share = (weights * right).mean(0) / evidence
    spread = (weights * (right - share)).square().mean(0).sqrt() / evidence
    return {
        "evidence": evidence,
        "evidence_error": weights.std(0) / math.sqrt(len(x)),
        "share": share,
        "share_error": spread / math.sqrt(len(x)),
    }


def report(rows: dict[str, Any], plain: dict[str, Tensor], judge: Judge) -> dict[str, Any]:
    """Print both tables and the verdicts; return the figures."""
    particles = rows["particles"]
    log_p, error = particles.log_evidence_terms.double(), particles.log_evidence_errors.double()
    least = particles.verdict.least_ess
    print("\nlabel  log p(label)   s.e.   by plain draws   s.e.   least ESS")
    for k in range(CLASSES):
        own, own_error = (
            plain["evidence"][k].log(),
            plain["evidence_error"][k] / plain["evidence"][k],
        )
        figures = (float(v) for v in (log_p[k], error[k], own, own_error, least[k]))
        print("{:>5} {:>13.3f} {:>6.3f} {:>16.3f} {:>6.3f} {:>11.1f}".format(k, *figures))
    total = float(log_p.exp().sum())
    spread = float((log_p + error.log()).exp().square().sum().sqrt())  # infinite if one is
    print(f"sum of the evidences {total:.3f} +- {spread:.3f}, expected 1")
    found: dict[str, Any] = {"sum": total, "sum_error": spread, "log_evidence": log_p.tolist()}
    print(
        f"\nof the asked class, judged by a machine that is right on {judge.accuracy:.3f} of real digits"
    )
    for name in ("AutoTwistedSMC", "AutoGuidance"):
        shares, mean, spread = agreement(judge, rows[name])
        print(f"{name:<16} {mean:.3f} +- {spread:.3f}   by label ", end="")
        print(" ".join(f"{float(v):.2f}" for v in shares))
        found[name] = [mean, spread]
    mean = float(plain["share"].mean())
    spread = float(plain["share_error"].square().sum().sqrt()) / CLASSES
    print(f"{'weighted prior':<16} {mean:.3f} +- {spread:.3f}   what an exact posterior has")
    found["weighted_prior"] = [mean, spread]
    print(
        f"evidences sum to one: {'yes' if abs(total - 1) < 2 * found['sum_error'] else 'NO'}; ",
        end="",
    )
    print(f"95 % of the asked class: {'yes' if found['AutoTwistedSMC'][0] >= 0.95 else 'NO'}")
    return found


def draw(rows: dict[str, Any], shown: int) -> Figure:
    """Draws of each label, a column for each."""
    names = ("AutoTwistedSMC", "AutoGuidance")
    figure = Figure(figsize=(9.6, 0.6 + 0.5 * shown), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), names, strict=True):
        x = rows[name][:shown].flatten(0, 1)
        plotting.sample_grid(x, columns=CLASSES, low=0, high=HIGH, ax=ax)
        ax.set_title(f"labels 0 to 9, {name}")
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/second_network")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    folder = Path("results/digits")
    parser.add_argument("--prior", type=Path, default=folder, help="folder of the digits model")
    parser.add_argument("--prior-settings", default="", help="arguments of digits.py it has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=32, help="channels of the classifier")
    parser.add_argument("--classifier-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=40, help="steps of the chain")
    parser.add_argument("--particles", type=int, default=128, help="for each label")
    parser.add_argument("--draws", type=int, default=40, help="of each label")
    parser.add_argument("--prior-draws", type=int, default=1000, help="plain ones, for reference")
    parser.add_argument("--shown", type=int, default=6, help="draws of each label in the figure")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    diffusion = digits.diffusion(prior(args), args.steps)
    pyro.set_rng_seed(args.seed)
    classifier, judge = train_classifier(args), Judge()
    data, known = digits.load()["test"].float(), labels()["test"]
    scored = Categorical(logits=classifier(data))
    right = float((scored.logits.argmax(-1) == known).double().mean())
    print(f"the classifier on test digits: right {right:.3f}, ", end="")
    print(f"mean log-probability of the label {float(scored.log_prob(known).mean()):.3f}")
    model, asked = program(diffusion, classifier), torch.arange(CLASSES)
    likelihood = ProgramLikelihood(model, (asked,))
    smc = TwistedSMC(diffusion, likelihood, num_particles=args.particles, progress=args.progress)
    particles = smc.run()
    print(particles.verdict)
    guided = Predictive(model, guide=AutoGuidance(model), num_samples=args.draws, parallel=True)
    rows = {
        "particles": particles,
        "AutoTwistedSMC": particles.sample((args.draws,)).round().long(),
        "AutoGuidance": guided(asked)["x"].round().long(),
    }
    plain = by_prior(diffusion, classifier, judge, args.prior_draws)
    metrics = report(rows, plain, judge)
    metrics["classifier_accuracy"] = right
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    draw(rows, min(args.shown, args.draws)).savefig(args.out / "second_network.png", dpi=150)
    print(f"the figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
