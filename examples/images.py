"""The likelihood of 28x28 images, integers of 256 levels, in a given number of minutes.

Run: python examples/images.py
MNIST: python examples/images.py --data DIR, the folder with its four files
On a GPU: python examples/images.py --data DIR --device cuda --compile --minutes 10 --width 128 --blocks 2
          --batch 256 --dropout 0.1

The bound is that of continuous time. A U-Net says of every pixel, by a few numbers that a linear layer turns
into 256 logits, what the other pixels tell of it; what its own noisy value tells is added by Bayes' rule, in
closed form. So the finest levels of noise, where most of the bits are, need next to no training.
"""

import argparse
import json
from pathlib import Path

import image_data
import pyro
import timed_training
import torch
from digits import histogram
from torch import Tensor, nn

from pyro_diffusion import (
    Diffusion,
    DiffusionSDE,
    GaussianProcess,
    LevelsDenoiser,
    LogLinear,
    QuantizedDecoder,
    UNet,
    checkpoint,
    denoisers,
    evaluate,
    plotting,
    schedules,
)

LEVELS = 256
# The noise is a fifth of a level's width at the one end, and leaves nothing of an image at the other.
LOG_SNR = 13.0, -7.0


@checkpoint.register
class LevelLogits(nn.Module):
    """A network's few numbers for each pixel, as a linear function: logits of all levels.

    Args:
        network: returns ``features`` numbers on a last dimension.
        features: how many.
        levels: how many logits.
    """

    def __init__(self, network: nn.Module, features: int, levels: int = LEVELS) -> None:
        super().__init__()
        self.network = network
        self.last = nn.Linear(features, levels)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Images (n, C, H, W) to logits (n, C, H, W, levels)."""
        logits: Tensor = self.last(self.network(x, log_snr))
        return logits


def load(args: argparse.Namespace) -> dict[str, Tensor]:
    """Images to train on, for all choices, and the first of those to report."""
    data = image_data.load(str(args.data or "glyphs"))
    data["test"] = data["test"][: args.test_images]
    data["validation"] = data["validation"][: args.validation_images]
    return data


def build(channels: int, args: argparse.Namespace) -> LevelsDenoiser:
    """An untrained one."""
    network = UNet(
        channels,
        args.width,
        args.levels,
        args.blocks,
        outputs=args.features,
        dropout=args.dropout,
    )
    process = GaussianProcess(LogLinear(*LOG_SNR), event_dim=3)
    return LevelsDenoiser(
        LevelLogits(network, args.features), process, denoisers.uniform_levels(LEVELS)
    )


def view(denoiser: LevelsDenoiser, event_shape: torch.Size) -> DiffusionSDE:
    """The distribution of images; without checks of values, each of which would wait for the GPU."""
    decoder = QuantizedDecoder(LEVELS)
    return DiffusionSDE(denoiser, event_shape, decoder=decoder, validate_args=False)


def train(denoiser: LevelsDenoiser, images: Tensor, args: argparse.Namespace) -> None:
    """SVI on the bound; the denoiser then has averaged weights."""

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("images", len(x)):
            pyro.sample("x", view(denoiser, x.shape[1:]), obs=x)

    timed_training.fit(model, denoiser.network, images, "bits/dim", args)


def score(
    denoiser: LevelsDenoiser, data: dict[str, Tensor], args: argparse.Namespace
) -> dict[str, evaluate.LogLikelihoodEstimate]:
    """Bounds on held-out images, and independent pixels."""
    sde = view(denoiser, data["test"].shape[1:])
    bound = {"num_terms": args.draws, "batch_size": args.score_batch, "progress": args.progress}
    found = {"independent pixels": histogram(data["train"], data["test"], LEVELS)}
    for name in ("validation", "test"):
        images = data[name].to(args.device)
        found[name] = evaluate.log_likelihood(sde, images, seed=args.seed, **bound)
    return found


def report(
    results: dict[str, evaluate.LogLikelihoodEstimate], args: argparse.Namespace
) -> dict[str, object]:
    """Print bits per pixel, and where they are."""
    print(f"\n{'bits/dim':<30} {'value':>8} {'std. error':>11}  kind")
    for name, result in results.items():
        figure = result.bits_per_dim
        row = f"{f'{name} ({len(result.value)})':<30} {figure.value:>8.4f}"
        print(f"{row} {figure.standard_error:>11.4f}  {figure.kind}")
    terms = results["test"].terms
    total = terms.prior + terms.decoder + terms.reverse
    shares = f"prior {terms.prior / total:.2%}, decoder {terms.decoder / total:.2%}"
    print(f"of the test images' bound: {shares}; the rest is the integral")
    return {name: vars(result.bits_per_dim) for name, result in results.items()}


def samples(denoiser: LevelsDenoiser, event_shape: torch.Size, args: argparse.Namespace) -> Tensor:
    """Images of a chain that is even in log-SNR."""
    schedule = denoiser.process.schedule
    times = schedules.uniform_log_snr(schedule, args.sample_steps)
    chain = Diffusion(denoiser, event_shape, times=times, decoder=QuantizedDecoder(LEVELS))
    return chain.sample((args.samples,))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    timed_training.add_arguments(parser, "results/images")
    parser.add_argument(
        "--data",
        type=Path,
        help="a folder of MNIST's kind, or a file of images, .npy or of idx; glyphs of fonts if not given",
    )
    parser.add_argument("--width", type=int, default=64, help="channels of the U-Net")
    parser.add_argument("--levels", type=int, nargs="*", default=[1, 2, 2], help="its multiples")
    parser.add_argument("--blocks", type=int, default=1, help="blocks a level of the U-Net")
    parser.add_argument("--features", type=int, default=32, help="numbers for each pixel")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--validation-images", type=int, default=200)
    parser.add_argument("--draws", type=int, default=32, help="times evaluated per image")
    parser.add_argument("--score-batch", type=int, default=100, help="images scored together")
    parser.add_argument("--samples", type=int, default=64, help="images to draw")
    parser.add_argument("--sample-steps", type=int, default=250)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pyro.set_rng_seed(args.seed)
    data = load(args)
    shape = data["train"].shape[1:]
    denoiser = build(shape[0], args).to(args.device)
    train(denoiser, data["train"], args)
    checkpoint.save_model(args.out / "model.safetensors", view(denoiser, shape))
    with timed_training.evaluating():
        metrics = report(score(denoiser, data, args), args)
        (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        images = samples(denoiser, shape, args).cpu()
    for name, shown in {"samples": images, "data": data["test"][: args.samples]}.items():
        figure = plotting.sample_grid(shown, low=0, high=LEVELS - 1).figure
        figure.savefig(args.out / f"{name}.png", dpi=100, bbox_inches="tight")
    print(f"samples.png, data.png, metrics.json, log.csv and model.safetensors are in {args.out}")


if __name__ == "__main__":
    main()
