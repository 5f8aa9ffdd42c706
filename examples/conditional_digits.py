"""Digits of a class that one asks for: classifier guidance beside classifier-free guidance.

One network is trained on digits and their labels by SVI; a tenth of the labels is dropped, so that it
is also evaluated without one. A small classifier is trained on noisy digits. Classifier guidance shifts the
unlabelled mean by the classifier's gradient; classifier-free guidance pushes the labelled mean away from the
unlabelled one. A support vector machine, trained on clean digits, judges what comes out.

Run: python examples/conditional_digits.py
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pyro.distributions import Categorical
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn

from pyro_diffusion import (
    Cosine,
    Diffusion,
    GaussianProcess,
    LevelsDenoiser,
    QuantizedDecoder,
    Trainer,
    UNet,
    checkpoint,
    denoisers,
    guidance,
    plotting,
)
from pyro_diffusion.nn import LabelContext
from pyro_diffusion.nn.embedding import fourier_embedding

CLASSES = 10


def labels() -> dict[str, Tensor]:
    """The labels of the images of digits.py, split as they are."""
    target = torch.tensor(load_digits().target)
    order = np.random.default_rng(0).permutation(1797)
    parts = {"train": order[:1257], "validation": order[1257:1437], "test": order[1437:]}
    return {name: target[rows] for name, rows in parts.items()}


def build(args: argparse.Namespace) -> LevelsDenoiser:
    """The network of digits.py, told the label or not."""
    process = GaussianProcess(Cosine(log_snr_max=12.0, log_snr_min=-9.0, shift=1.25), event_dim=3)
    network = UNet(
        1,
        width=args.width,
        outputs=digits.LEVELS,
        dropout=args.dropout,
        context={"label": LabelContext(CLASSES, 4 * args.width, dropout=args.null)},
    )
    return LevelsDenoiser(network, process, denoisers.uniform_levels(digits.LEVELS))


def diffusion(denoiser: denoisers.Denoiser, steps: int, label: Tensor | None = None) -> Diffusion:
    """The chain over images, of the labels' batch shape if there are any."""
    return Diffusion(
        denoiser,
        digits.EVENT_SHAPE,
        steps,
        decoder=QuantizedDecoder(digits.LEVELS),
        context=None if label is None else {"label": label},
    )


class Classifier(nn.Module):
    """p(label | x_t) at any noise level: convolutions and a hidden layer that is told the level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten()),
            nn.Linear(32 * width, 4 * width),
        )
        self.level = nn.Linear(32, 4 * width)
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.2), nn.Linear(4 * width, CLASSES))

    def forward(self, xt: Tensor, log_snr: Tensor) -> Categorical:
        """xt batch + (1, 8, 8), log_snr batch."""
        hidden = self.features(xt.reshape(-1, *digits.EVENT_SHAPE))
        hidden = hidden + self.level(fourier_embedding(log_snr.reshape(-1), 32))
        return Categorical(logits=self.head(hidden).reshape(*log_snr.shape, CLASSES))


def fit(
    module: nn.Module, model: Any, data: tuple[Tensor, ...], steps: int, unit: str, args: Any
) -> None:
    """SVI of an observed program on minibatches; the module keeps its averaged weights."""
    trainer = Trainer(
        model,
        optimizer=partial(torch.optim.AdamW, lr=args.lr, weight_decay=args.weight_decay),
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        ema=0.995,
        unit=unit,
    )
    trainer.fit(data, steps=steps, batch_size=args.batch, progress=args.progress)
    module.requires_grad_(False)


def train(args: argparse.Namespace) -> tuple[LevelsDenoiser, Classifier]:
    """Fit both networks to the training images."""
    denoiser, classifier = build(args), Classifier(args.width)
    process = denoiser.process

    def images(x: Tensor, label: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", diffusion(denoiser, 1000, label), obs=x)

    def noisy_labels(x: Tensor, label: Tensor) -> None:
        pyro.module("classifier", classifier)
        level = process.schedule.level(torch.rand(len(x)))
        x0 = x.float() / 8 - 1
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
        xt = alpha * x0 + sigma * torch.randn_like(x0)
        with pyro.plate("data", len(x)):
            pyro.sample("label", classifier(xt, level.log_snr), obs=label)

    data = digits.load()["train"], labels()["train"]
    fit(denoiser, images, data, args.steps, "bits/dim", args)
    fit(classifier, noisy_labels, data, args.classifier_steps, "nats/datum", args)
    return denoiser, classifier


def trained(args: argparse.Namespace) -> tuple[LevelsDenoiser, Classifier]:
    """Both networks, from the checkpoint of these settings or trained now."""
    path = args.out / "checkpoint.safetensors"
    names = ("seed", "steps", "classifier_steps", "batch", "lr", "weight_decay", "dropout", "null")
    description = {name: vars(args)[name] for name in (*names, "width")}
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    if not path.exists():
        both = train(args)
        state = {type(module).__name__: module.state_dict() for module in both}
        checkpoint.save(path, state, description)
        return both
    both, state = (build(args), Classifier(args.width)), checkpoint.load(path, description)
    for module in both:
        module.load_state_dict(state[type(module).__name__])
        module.eval().requires_grad_(False)
    return both


def accuracy(denoiser: denoisers.Denoiser, classifier: Classifier) -> dict[str, float]:
    """Of the classifier on held-out digits, by noise level."""
    x0, label = digits.load()["test"].float() / 8 - 1, labels()["test"]
    found = {}
    for log_snr in (6.0, 0.0, -3.0, -6.0):
        at = torch.full((len(x0),), log_snr)
        alpha, sigma = at[0].sigmoid().sqrt(), (-at[0]).sigmoid().sqrt()
        guess = classifier(alpha * x0 + sigma * torch.randn_like(x0), at).logits.argmax(-1)
        found[f"{log_snr:.0f}"] = float((guess == label).double().mean())
    return found


class Judge:
    """A support vector machine on clean digits: whether images are of their classes."""

    def __init__(self) -> None:
        self.machine = SVC(gamma=0.001).fit(
            digits.load()["train"].flatten(1).numpy(), labels()["train"].numpy()
        )

    def agreement(self, x: Tensor, label: Tensor) -> tuple[float, float]:
        """Share of images judged to be of their class, and its standard error."""
        guess = torch.as_tensor(self.machine.predict(x.flatten(1).numpy()))
        share = float((guess == label).double().mean())
        return share, math.sqrt(max(share * (1 - share), 1 / len(x)) / len(x))


def diversity(x: Tensor, label: Tensor) -> tuple[float, float]:
    """Root mean squared distance of two images of one class (grey levels a pixel), error over classes."""
    each = []
    for c in label.unique():
        mine = x[label == c].flatten(1).double()
        each.append(mine.var(0).mean().mul(2).sqrt())
    values = torch.stack(each)
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def methods(
    denoiser: LevelsDenoiser, classifier: Classifier, label: Tensor, args: argparse.Namespace
) -> dict[str, Diffusion]:
    """The diffusions to draw from, by title."""
    diffusions = {}
    for scale in args.scales:
        guided = guidance.ClassifierGuidance(denoiser, classifier, label, scale)
        diffusions[f"classifier, w = {scale:g}"] = diffusion(guided, args.chain).expand(label.shape)
    for scale in args.scales:
        free = guidance.ClassifierFreeGuidance(denoiser, scale)
        diffusions[f"classifier-free, w = {scale:g}"] = diffusion(free, args.chain, label)
    return diffusions


def report(rows: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """Print and return the table."""
    judge, metrics = Judge(), {}
    print(f"\n{'':<24} {'of its class':>12} {'s.e.':>6} {'diversity':>10} {'s.e.':>6}")
    for title, (x, label) in rows.items():
        share, spread = judge.agreement(x, label), diversity(x, label)
        print(
            f"{title:<24} {share[0]:>12.3f} {share[1]:>6.3f} {spread[0]:>10.2f} {spread[1]:>6.2f}"
        )
        metrics[title] = {"agreement": list(share), "diversity": list(spread)}
    return metrics


def draw(rows: dict[str, tuple[Tensor, Tensor]], each: int) -> Figure:
    """One panel for each diffusion, one column for each class."""
    figure = Figure(figsize=(9.6, 1.2 + 1.1 * each * len(rows) / 4), layout="constrained")
    axes = figure.subplots(-(-len(rows) // 2), 2, squeeze=False).flatten()
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    for ax, (title, (x, _)) in zip(axes, rows.items(), strict=False):
        plotting.sample_grid(x[: each * CLASSES], columns=CLASSES, low=0, high=16, ax=ax)
        ax.set_title(title)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/conditional_digits")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the denoiser")
    parser.add_argument("--classifier-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--null", type=float, default=0.1, help="share of labels dropped")
    parser.add_argument("--width", type=int, default=32, help="channels of the networks")
    parser.add_argument("--chain", type=int, default=60, help="steps of a sampled chain")
    parser.add_argument(
        "--samples", type=int, default=20, help="images of each class and diffusion"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="w")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    denoiser, classifier = trained(args)
    pyro.set_rng_seed(args.seed)
    found = accuracy(denoiser, classifier)
    print("the classifier's accuracy on test digits, by log-SNR: ", end="")
    print(", ".join(f"{at}: {share:.3f}" for at, share in found.items()))
    label = torch.arange(CLASSES).repeat(args.samples)
    rows = {"test digits": (digits.load()["test"], labels()["test"])}
    drawn = {}
    for title, each in methods(denoiser, classifier, label, args).items():
        drawn[title] = each.sample(), label
    metrics: dict[str, Any] = report({**rows, **drawn})
    metrics["classifier_accuracy"] = found
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    figure = draw(drawn, min(3, args.samples))
    figure.savefig(args.out / "samples.png", dpi=150, bbox_inches="tight")
    print(f"figures, metrics.json and the checkpoint are in {args.out}")


if __name__ == "__main__":
    main()
