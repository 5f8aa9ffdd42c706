"""Train, score and sample scikit-learn's 8x8 digits with a diffusion model at one Pyro site.

Run: python examples/digits.py
Longer: python examples/digits.py --steps 5000 --dropout 0.4 --weight-decay 0.2 --out results/digits_longer
Others: python examples/digits.py --images glyphs --out results/glyphs, or --images FILE, .npy or of idx

Integers 0..16 are modelled as integers: the denoiser returns a posterior over the 17 levels of each pixel,
the decoder takes them as probabilities. Training is SVI. A run that was killed goes on from its
checkpoint and ends where it would have ended.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import image_data
import pyro
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_diffusion import (
    Cosine,
    Diffusion,
    GaussianProcess,
    LevelsDenoiser,
    QuantizedDecoder,
    Trainer,
    UNet,
    denoisers,
    evaluate,
    plotting,
    samplers,
)

LEVELS, EVENT_SHAPE = 17, (1, 8, 8)  # of the digits


def load(images: str = "digits", side: int = 28) -> dict[str, Tensor]:
    """Integer images (n, 1, 8, 8): 1257 to train on, 180 for all choices, 360 to report. Or others."""
    return image_data.load(images, side)


def build(args: argparse.Namespace, channels: int = 1, levels: int = LEVELS) -> LevelsDenoiser:
    """A U-Net that gives a posterior over the levels of every pixel."""
    process = GaussianProcess(Cosine(log_snr_max=12.0, log_snr_min=-9.0, shift=1.25), event_dim=3)
    network = UNet(
        channels, width=args.width, blocks=args.blocks, outputs=levels, dropout=args.dropout
    )
    return LevelsDenoiser(network, process, denoisers.uniform_levels(levels))


def diffusion(
    denoiser: LevelsDenoiser, steps: int, event_shape: tuple[int, ...] = EVENT_SHAPE
) -> Diffusion:
    """The chain over images."""
    decoder = QuantizedDecoder(len(denoiser.values))
    return Diffusion(denoiser, event_shape, steps, decoder=decoder)


def train(args: argparse.Namespace) -> tuple[LevelsDenoiser, list[float]]:
    """Fit by SVI, or go on from the checkpoint; the denoiser has averaged weights. And the losses."""
    data = load(args.images, args.side)
    levels = 1 + max(int(images.max()) for images in data.values())
    denoiser = build(args, data["train"].shape[1], levels)

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", diffusion(denoiser, args.chain, x.shape[1:]), obs=x)

    trainer = Trainer(
        model,
        optimizer=partial(AdamW, lr=args.lr, weight_decay=args.weight_decay, fused=True),
        schedule=partial(CosineAnnealingLR, T_max=args.steps),
        ema=args.ema,
        unit="bits/dim",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    history = trainer.fit(
        data["train"],
        steps=args.steps,
        batch_size=args.batch,
        checkpoint=args.out / "checkpoint.safetensors",
        save_every=args.save_every,
        description={k: v for k, v in vars(args).items() if k not in ("out", "progress")},
        progress=args.progress,
    )
    return denoiser, history.losses


def trained(out: Path) -> LevelsDenoiser:
    """The denoiser with averaged weights from a folder's checkpoint, or trained now with default settings."""
    args = parse(["--no-progress", "--out", str(out)])
    pyro.set_rng_seed(args.seed)
    return train(args)[0]


def histogram(train: Tensor, test: Tensor, levels: int) -> evaluate.LogLikelihoodEstimate:
    """The baseline of independent pixels: smoothed histograms, an exact likelihood."""
    pixels = torch.arange(test[0].numel())
    cells = train.flatten(1) + levels * pixels
    counts = cells.flatten().bincount(minlength=levels * len(pixels)).view(-1, levels).double()
    pooled = counts.mean(0)
    probs = (counts + levels * pooled / pooled.sum() + 0.05).log()
    probs = probs - probs.logsumexp(-1, keepdim=True)
    value = probs[pixels, test.flatten(1)].sum(1)
    return evaluate.LogLikelihoodEstimate(
        value, torch.zeros_like(value), "exact", 0, test[0].numel()
    )


def score(
    denoiser: LevelsDenoiser, data: dict[str, Tensor], args: argparse.Namespace
) -> dict[str, evaluate.LogLikelihoodEstimate]:
    """Bounds on held-out data and a baseline; importance weighting of few images on a short chain."""
    few = data["test"][: args.weighted_images]
    chain = diffusion(denoiser, args.chain, few.shape[1:])
    short = diffusion(denoiser, args.weighted_steps, few.shape[1:])
    bound = {"num_terms": args.draws, "progress": args.progress}
    return {
        "histogram": histogram(data["train"], data["test"], len(denoiser.values)),
        "validation": evaluate.log_likelihood(chain, data["validation"], **bound),
        "test": evaluate.log_likelihood(chain, data["test"], **bound),
        "test_subset": evaluate.log_likelihood(short, few, progress=args.progress),
        "test_subset_weighted": evaluate.importance_weighted(
            short, few, num_samples=args.weighted_samples, progress=args.progress
        ),
    }


def report(results: dict[str, evaluate.LogLikelihoodEstimate], args: argparse.Namespace) -> None:
    """Print the table, write metrics.json and the ArviZ file."""
    titles = {
        "histogram": "test, independent pixels",
        "validation": f"validation, {args.chain} steps",
        "test": f"test, {args.chain} steps",
        "test_subset": f"first {args.weighted_images} test images, {args.weighted_steps} steps",
        "test_subset_weighted": f"the same, {args.weighted_samples} weighted chains",
    }
    print(f"\n{'bits/dim':<38} {'value':>8} {'std. error':>11}  kind")
    for name, result in results.items():
        figure = result.bits_per_dim
        print(
            f"{titles[name]:<38} {figure.value:>8.4f} {figure.standard_error:>11.4f}  {figure.kind}"
        )
    weighted = results["test_subset_weighted"]
    print(
        f"\nmedian effective sample size {weighted.ess.median():.1f} of {args.weighted_samples} chains"
        "\n\ntest images, paired (nats):"
    )
    pair = {"diffusion": results["test"], "independent pixels": results["histogram"]}
    print(evaluate.compare(pair).round(1).to_string())
    metrics = {name: vars(result.bits_per_dim) for name, result in results.items()}
    metrics["test_terms_nats"] = {
        "prior": results["test"].terms.prior,
        "decoder": results["test"].terms.decoder,
        "steps": float(results["test"].terms.steps.sum()),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    evaluate.to_arviz(results["test"]).to_netcdf(str(args.out / "log_likelihood.nc"))


def draw(
    denoiser: LevelsDenoiser,
    losses: list[float],
    result: evaluate.LogLikelihoodEstimate,
    data: dict[str, Tensor],
    args: argparse.Namespace,
) -> None:
    """Every figure, into the output folder."""
    chain = diffusion(denoiser, args.chain, data["test"].shape[1:])
    grey = {"low": 0, "high": len(denoiser.values) - 1}
    with torch.no_grad():
        noise = denoiser.process.prior(chain.event_shape).expand((args.samples,)).sample()
        states, record = samplers.base.recorder()
        samplers.simulate(
            denoiser, chain.times, noise, chain.sampler, progress=args.progress, callback=record
        )
        images = chain.decode(states[-1]).sample()
    shown = torch.linspace(0, args.chain, 8).long()
    path = torch.stack([states[j] for j in shown])[:, :6]
    figures = {
        "samples": plotting.sample_grid(images, **grey).figure,
        "data": plotting.sample_grid(data["test"][: args.samples], **grey).figure,
        "trajectory": plotting.reverse_trajectory(path, chain.times.flip(0)[shown]),
        "bound_per_step": plotting.bound_per_step(
            result.terms.log_snr,
            result.terms.steps,
            result.terms.steps_standard_error,
            axis="log_snr",
        ).figure,
        "loss": plotting.loss_curve(losses, unit="bits/dim").figure,
        "schedule": plotting.schedule(denoiser.process),
    }
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=150, bbox_inches="tight")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/digits"), help="output folder")
    parser.add_argument(
        "--images",
        default="digits",
        help="digits, glyphs, photographs, a file, .npy or of idx, or a folder as MNIST's",
    )
    parser.add_argument("--side", type=int, default=28, help="pixels of glyphs and photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400, help="training steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the weights' average")
    parser.add_argument("--width", type=int, default=32, help="channels of the U-Net")
    parser.add_argument("--blocks", type=int, default=1, help="blocks a level of the U-Net")
    parser.add_argument("--chain", type=int, default=1000, help="steps of the chain")
    parser.add_argument(
        "--draws", type=int, default=96, help="steps evaluated per image when scoring"
    )
    parser.add_argument("--weighted-images", type=int, default=36)
    parser.add_argument("--weighted-steps", type=int, default=100)
    parser.add_argument("--weighted-samples", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64, help="images to draw")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pyro.set_rng_seed(args.seed)
    denoiser, losses = train(args)
    pyro.set_rng_seed(args.seed)
    data = load(args.images, args.side)
    results = score(denoiser, data, args)
    report(results, args)
    draw(denoiser, losses, results["test"], data, args)
    print(f"figures, metrics.json, log_likelihood.nc and the checkpoint are in {args.out}")


if __name__ == "__main__":
    main()
