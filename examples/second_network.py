"""A second network as the likelihood: digits of a class that a classifier names, by a prior that knows none.

    x ~ Diffusion(...)                          the model of digits.py, trained without labels
    label ~ Categorical(classifier(x))          0 to 9, or "no digit": networks trained on clean images

A prior also draws what is between digits, and a classifier of ten labels must call that one of them. So half
of what this one is trained on are draws of the prior, under an eleventh label, and who asks it for a digit
asks for one that does not look drawn. No guidance is trained, no network sees noise. Twisted SMC draws from
p(x | label) and gives p(label), which must add up to one over the eleven labels; guidance alone stands
beside. Two references: other plain draws of the prior, weighted by the classifier, and a support vector
machine trained on other images than either network.

Run: python examples/second_network.py
On a GPU: python examples/second_network.py --device cuda
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
    infer,
    optim,
    plotting,
)
from pyro_diffusion.infer import Particles

DIGITS = 10
LABELS = DIGITS + 1  # the last is "no digit"


class Classifier(nn.Module):
    """Logits of the label of an image of grey levels, batch + (1, 8, 8): the average of some networks."""

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(self.network(width) for _ in range(members))

    @staticmethod
    def network(width: int) -> nn.Sequential:
        """One of them."""
        return nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten()),
            *(nn.Dropout(0.5), nn.Linear(32 * width, LABELS)),
        )

    def each(self, x: Tensor) -> Tensor:
        """Logits of every network, (members,) + batch + (11,)."""
        flat = x.reshape(-1, *digits.EVENT_SHAPE) / 8 - 1
        logits = torch.stack([member(flat) for member in self.members])
        return logits.reshape(-1, *x.shape[:-3], LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """Of the mean of their probabilities, batch + (11,)."""
        return self.each(x).log_softmax(-1).logsumexp(0) - math.log(len(self.members))


def plain_draws(diffusion: Diffusion, count: int) -> Tensor:
    """So many images of the prior."""
    return torch.cat([diffusion.sample((min(250, count - i),)) for i in range(0, count, 250)])


def train_classifier(drawn: Tensor, args: argparse.Namespace) -> Classifier:
    """Fit every network by SVI: half of a batch are training images, half are drawn ones, no digits."""
    classifier = Classifier(args.width, args.members).to(args.device)
    data, drawn = digits.load()["train"].to(args.device).float(), drawn.float()
    known = labels()["train"].to(args.device)

    def model(real: Tensor, other: Tensor) -> None:
        pyro.module("classifier", classifier)
        x = torch.cat([data[real], drawn[other]])
        label = torch.cat([known[real], torch.full_like(other, DIGITS)])
        members = pyro.plate("members", args.members, dim=-2)
        images = pyro.plate("images", len(x), dim=-1)
        with members, images, pyro.poutine.scale(scale=1 / len(x)):
            pyro.sample("label", Categorical(logits=classifier.each(x)), obs=label)

    optimizer = optim.JointOptim(torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.1})
    svi = SVI(model, lambda *rows: None, optimizer, Trace_ELBO())
    for _ in trange(args.classifier_steps, desc="classifier", disable=not args.progress):
        svi.step(*(torch.randint(len(part), (64,), device=args.device) for part in (data, drawn)))
    return classifier.eval().requires_grad_(False)


def program(diffusion: Diffusion, classifier: Classifier) -> Callable[[Tensor], None]:
    """One image for each label, which is all that is known of it."""

    def model(label: Tensor) -> None:
        with pyro.plate("images", len(label)):
            x = pyro.sample("x", diffusion)
            pyro.sample("label", Categorical(logits=classifier(x.float())), obs=label)

    return model


class Judge:
    """A support vector machine trained on the images that no network was trained on."""

    def __init__(self) -> None:
        images, known = digits.load(), labels()
        x, label = (
            torch.cat([part[k] for k in ("validation", "test")]) for part in (images, known)
        )
        self.machine = SVC(gamma=0.001, C=10).fit(x.flatten(1).numpy(), label.numpy())
        self.accuracy = float((self(images["train"]) == known["train"]).double().mean())

    def __call__(self, x: Tensor) -> Tensor:
        """Labels of images of grey levels, batch + (1, 8, 8), one of the ten."""
        found = self.machine.predict(x.reshape(-1, 64).cpu().numpy())
        return torch.as_tensor(found).reshape(x.shape[:-3])


def agreement(
    judge: Judge, x: Tensor, particles: Particles | None = None
) -> tuple[Tensor, float, float]:
    """Shares of draws x, (draws, 11, 1, 8, 8), judged to be of their digit; their mean and its error.

    Independent draws, or all particles, by their weights; the error of theirs knows shared ancestors.
    """
    right = (judge(x).to(x.device) == torch.arange(LABELS, device=x.device)).double()
    if particles is None:
        shares = right.mean(0)
        variance = (shares * (1 - shares)).clamp(min=1 / len(x)) / len(x)
    else:
        shares = (particles.log_weights.exp() * right).sum(0)
        variance = infer.filtering.resampling.genealogical_variance(
            particles.log_weights, particles.root, particles.correction, right - shares
        )
    shares, variance = shares[:DIGITS].cpu(), variance[:DIGITS].cpu()
    return shares, float(shares.mean()), float(variance.sum().sqrt()) / DIGITS


def by_prior(x: Tensor, classifier: Classifier, judge: Judge) -> dict[str, Tensor]:
    """p(label) and the judge's agreement by plain draws x of the prior, each with its standard error."""
    weights = classifier(x.float()).double().softmax(-1).cpu()
    evidence = weights.mean(0)
    right = (judge(x).unsqueeze(-1) == torch.arange(LABELS)).double()
    share = (weights * right).mean(0) / evidence
    spread = (weights * (right - share)).square().mean(0).sqrt() / evidence
    return {
        "evidence": evidence,
        "evidence_error": weights.std(0) / math.sqrt(len(x)),
        "share": share[:DIGITS],
        "share_error": spread[:DIGITS] / math.sqrt(len(x)),
    }


def report_evidence(particles: Particles, plain: dict[str, Tensor]) -> dict[str, Any]:
    """Print the evidence of each label and its sums."""
    least = particles.verdict.least_ess
    log_p, error = particles.log_evidence_terms.double(), particles.log_evidence_errors.double()
    log_p, error, least = log_p.cpu(), error.cpu(), least.cpu()
    own, own_error = plain["evidence"].log(), plain["evidence_error"] / plain["evidence"]
    print("\nlabel  log p(label)   s.e.   by plain draws   s.e.   least ESS")
    for k in range(LABELS):
        name = "none" if k == DIGITS else k
        figures = (float(v[k]) for v in (log_p, error, own, own_error, least))
        print("{:>5} {:>13.3f} {:>6.3f} {:>16.3f} {:>6.3f} {:>11.1f}".format(name, *figures))
    found: dict[str, Any] = {"log_evidence": log_p.tolist(), "log_evidence_error": error.tolist()}
    for name, count, expected in (
        ("sum", LABELS, "expected 1"),
        ("digits", DIGITS, "by plain draws {:.3f}".format(plain["evidence"][:DIGITS].sum())),
    ):
        total = float(log_p[:count].exp().sum())
        spread = float((log_p + error.log())[:count].exp().square().sum().sqrt())
        print(f"evidences of {count} labels add up to {total:.3f} +- {spread:.3f}, {expected}")
        found[name], found[f"{name}_error"] = total, spread
    return found


def report_agreement(
    particles: Particles, guided: Tensor, plain: dict[str, Tensor], judge: Judge
) -> dict[str, Any]:
    """Print which share of the draws of a digit is one."""
    print(f"\nof the digit asked for, by a judge right on {judge.accuracy:.3f} of real ones")
    found = {}
    for name, x, by in (("TwistedSMC", particles.value, particles), ("AutoGuidance", guided, None)):
        shares, mean, spread = agreement(judge, x.round().long(), by)
        each = " ".join(f"{float(v):.2f}" for v in shares)
        print(f"{name:<14} {mean:.3f} +- {spread:.3f}   by label {each}")
        found[name], found[f"{name}_error"] = mean, spread
    mean = float(plain["share"].mean())
    spread = float(plain["share_error"].square().sum().sqrt()) / DIGITS
    print(f"weighted prior {mean:.3f} +- {spread:.3f}   what an exact posterior has")
    return found | {"weighted_prior": mean, "weighted_prior_error": spread}


def draw(rows: dict[str, Tensor]) -> Figure:
    """Draws of each label, a column for each."""
    count = max(len(x) for x in rows.values())
    figure = Figure(figsize=(10.2, 0.4 + 0.45 * count), layout="constrained")
    for ax, (name, x) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        grid = x.round().long().flatten(0, 1).cpu()
        plotting.sample_grid(grid, columns=LABELS, low=0, high=HIGH, ax=ax)
        ax.set_title(f"digits 0 to 9, no digit: {name}")
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--members", type=int, default=3, help="networks of the classifier")
    parser.add_argument("--width", type=int, default=32, help="channels of each")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--drawn", type=int, default=4000, help='"no digit" to train on')
    parser.add_argument("--steps", type=int, default=40, help="steps of the chain")
    parser.add_argument("--particles", type=int, default=256, help="for each label")
    parser.add_argument("--draws", type=int, default=40, help="of guidance alone")
    parser.add_argument("--prior-draws", type=int, default=2000, help="plain ones, for reference")
    parser.add_argument("--shown", type=int, default=6, help="draws of each label in the figure")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    diffusion = digits.diffusion(prior(args).to(args.device), args.steps)
    pyro.set_rng_seed(args.seed)
    classifier = train_classifier(plain_draws(diffusion, args.drawn), args)
    judge = Judge()
    x, known = digits.load()["test"].float().to(args.device), labels()["test"].to(args.device)
    logits = classifier(x)
    right = float((logits[:, :DIGITS].argmax(-1) == known).double().mean())
    drawn = float(logits.softmax(-1)[:, DIGITS].mean())
    print(f"the classifier on test digits: right {right:.3f}, takes {drawn:.3f} of them for drawn")
    plain = by_prior(plain_draws(diffusion, args.prior_draws), classifier, judge)
    model, asked = program(diffusion, classifier), torch.arange(LABELS, device=args.device)
    likelihood = ProgramLikelihood(model, (asked,))
    smc = TwistedSMC(diffusion, likelihood, num_particles=args.particles, progress=args.progress)
    particles = smc.run()
    print(particles.verdict)
    guided = Predictive(model, guide=AutoGuidance(model), num_samples=args.draws, parallel=True)
    alone = guided(asked)["x"]
    metrics = report_evidence(particles, plain)
    metrics |= report_agreement(particles, alone, plain, judge)
    metrics |= {"classifier_accuracy": right, "taken_for_drawn": drawn}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    rows = {"TwistedSMC": particles.sample((args.shown,)), "AutoGuidance": alone[: args.shown]}
    draw(rows).savefig(args.out / "second_network.png", dpi=150)
    print(f"the figure and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
