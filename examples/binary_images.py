"""Masked diffusion of binary images: a bound in nats per image beside exact likelihoods of two baselines.

Run: python examples/binary_images.py
Binarized MNIST: python examples/binary_images.py --data FILE.npz, with arrays train, valid and test of bits
On a GPU: the same with --device cuda --compile --width 128 --blocks 2 --batch 256 --minutes 10

Pixels are symbols that are masked one after another; a U-Net, trained by SVI, says of every masked pixel how
likely it is white. The bound of continuous time is minus the log-likelihood of predicting the pixels one by
one, averaged over all orders. The baselines are independent pixels, and a logistic regression of each pixel
on those before it (a fully visible sigmoid belief network).
"""

import argparse
import json
import math
import zipfile
from functools import partial
from pathlib import Path

import image_data
import numpy as np
import pyro
import pyro.distributions as dist
import timed_training
import torch
from torch import Tensor, nn

from pyro_diffusion import (
    Absorbing,
    CategoricalDenoiser,
    Trainer,
    UNet,
    checkpoint,
    evaluate,
    plotting,
    samplers,
    schedules,
)
from pyro_diffusion.distributions import DiffusionCTMC


@checkpoint.register
class Shades(nn.Module):
    """A network of real images that is shown symbols: black is -1, white 1, and a mask 0.

    Args:
        network: the network.
    """

    values: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("values", torch.tensor([-1.0, 1.0, 0.0]), persistent=False)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Symbols (n, C, H, W) to what the network returns."""
        out: Tensor = self.network(self.values[x], log_snr)
        return out


def read(path: Path) -> dict[str, Tensor]:
    """Square images of a NumPy archive: arrays train, valid and test of rows of 0 and 1, or of packed bits.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"--data: got {path}, which is no NumPy archive (.npz), expected one of train, valid and test"
        )
    with np.load(path, allow_pickle=False) as archive:
        if missing := {"train", "valid", "test"} - {*archive}:
            raise ValueError(
                f"{path}: got no array {sorted(missing)}, expected train, valid and test"
            )
        arrays = {name: archive[name] for name in ("train", "valid", "test")}
    found = {}
    for name, rows in arrays.items():
        packed = rows.dtype == np.uint8 and rows.max() > 1
        bits = torch.from_numpy((np.unpackbits(rows, axis=1) if packed else rows).astype(np.int64))
        side = math.isqrt(bits.shape[1])
        if bits.dim() != 2 or side**2 != bits.shape[1] or not 0 <= bits.min() <= bits.max() <= 1:
            raise ValueError(
                f"{path}: got {name} of shape {tuple(rows.shape)} and values {rows.min()} ... {rows.max()}, "
                "expected rows of square images, 0 or 1 each pixel or eight pixels a byte"
            )
        found["validation" if name == "valid" else name] = bits.view(-1, 1, side, side)
    return found


def load(path: Path | None) -> dict[str, Tensor]:
    """Images of a file, or scikit-learn's digits, white where they are brighter than half."""
    if path is not None:
        return read(path)
    return {name: (images > 8).long() for name, images in image_data.load().items()}


def build(args: argparse.Namespace) -> CategoricalDenoiser:
    """An untrained one."""
    network = UNet(1, args.width, args.levels, args.blocks, outputs=2, dropout=args.dropout)
    process = Absorbing(schedules.Rectified.full(), states=2, event_dim=3)
    return CategoricalDenoiser(Shades(network), process)


def view(denoiser: CategoricalDenoiser, event_shape: torch.Size) -> DiffusionCTMC:
    """The distribution of images; samples are exact: one step for each pixel."""
    return DiffusionCTMC(
        denoiser,
        event_shape,
        steps=event_shape.numel(),
        sampler=samplers.FirstHitting(),
        validate_args=False,
    )


def train(denoiser: CategoricalDenoiser, images: Tensor, args: argparse.Namespace) -> None:
    """SVI on the bound; the denoiser then has averaged weights."""

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("images", len(x)):
            pyro.sample("x", view(denoiser, x.shape[1:]), obs=x)

    timed_training.fit(model, denoiser.network, images, "nats/dim", args)


class Autoregression(nn.Module):
    """Each pixel's log-odds are linear in the pixels before it, row by row."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(pixels, pixels))
        self.bias = nn.Parameter(torch.zeros(pixels))

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """Of flat images (n, pixels) of 0 and 1."""
        logits = nn.functional.linear(x, self.weight.tril(-1), self.bias)
        return dist.Bernoulli(logits=logits).to_event(1)


def baselines(data: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Tensor]:
    """log p of every test image: independent pixels, and the regressions, stopped early."""
    rows = {name: images.flatten(1).float().to(args.device) for name, images in data.items()}
    probs = (rows["train"].sum(0) + 0.5) / (len(rows["train"]) + 1)
    alone = dist.Bernoulli(probs).to_event(1).log_prob(rows["test"])
    regression = Autoregression(rows["train"].shape[1]).to(args.device)

    def model(x: Tensor) -> None:
        pyro.module("regression", regression)
        with pyro.plate("images", len(x)):
            pyro.sample("x", regression(x), obs=x)

    trainer = Trainer(model, optimizer=partial(torch.optim.Adam, lr=1e-3), ema=0.99)
    trainer.fit(
        rows["train"],
        steps=args.baseline_steps,
        batch_size=min(200, len(rows["train"])),
        validation=rows["validation"],
        patience=3,
        progress=False,
    )
    with torch.no_grad():
        one_by_one = regression(rows["test"]).log_prob(rows["test"])
    return {"independent pixels": alone, "logistic autoregression": one_by_one}


def report(
    denoiser: CategoricalDenoiser,
    data: dict[str, Tensor],
    exact: dict[str, Tensor],
    args: argparse.Namespace,
) -> dict[str, dict[str, float | str]]:
    """Print nats per image, with errors over images and the bound's own draws, and return them."""
    bound = evaluate.log_likelihood(
        view(denoiser, data["test"].shape[1:]),
        data["test"].to(args.device),
        num_terms=args.draws,
        batch_size=args.score_batch,
        progress=args.progress,
        seed=args.seed,
    )
    table = {name: (value, "exact") for name, value in exact.items()}
    table["masked diffusion"] = bound.value, "lower bound"
    print(
        f"\n{len(bound.value)} test images\n{'nats per image':<26}{'-log p':>9}{'error':>8}  kind"
    )
    metrics = {}
    for name, (value, kind) in table.items():
        nats, error = -float(value.mean()), float(value.std()) / math.sqrt(len(value))
        metrics[name] = {"nats": nats, "standard_error": error, "kind": kind}
        print(f"{name:<26}{nats:>9.2f}{error:>8.2f}  {kind}")
    draws = float(bound.standard_error.square().mean() / len(bound.value)) ** 0.5
    metrics["masked diffusion"]["error_of_draws"] = draws
    print(f"of the bound's error {draws:.2f} is that of its {args.draws} draws an image, or less")
    return metrics


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    timed_training.add_arguments(parser, "results/binary_images")
    parser.add_argument("--data", type=Path, help="an archive .npz; scikit-learn's digits if none")
    parser.add_argument("--width", type=int, default=32, help="channels of the U-Net")
    parser.add_argument("--levels", type=int, nargs="*", default=[1, 2], help="its multiples")
    parser.add_argument("--blocks", type=int, default=1, help="blocks a level of the U-Net")
    parser.add_argument("--test-images", type=int, default=10_000, help="to report on, at most")
    parser.add_argument("--draws", type=int, default=64, help="times evaluated per image")
    parser.add_argument("--score-batch", type=int, default=250, help="images scored together")
    parser.add_argument("--baseline-steps", type=int, default=10_000, help="at most")
    parser.add_argument("--samples", type=int, default=64, help="images to draw")
    parser.set_defaults(minutes=3.0, batch=64, dropout=0.2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pyro.set_rng_seed(args.seed)
    data = load(args.data)
    data["test"] = data["test"][: args.test_images]
    shape = data["train"].shape[1:]
    denoiser = build(args).to(args.device)
    train(denoiser, data["train"], args)
    checkpoint.save_model(args.out / "model.safetensors", view(denoiser, shape))
    exact = baselines(data, args)
    with timed_training.evaluating():
        metrics = report(denoiser, data, exact, args)
        images = view(denoiser, shape).sample((args.samples,)).cpu()
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for name, shown in {"samples": images, "data": data["test"][: args.samples]}.items():
        figure = plotting.sample_grid(shown, low=0, high=1).figure
        figure.savefig(args.out / f"{name}.png", dpi=100, bbox_inches="tight")
    print(f"samples.png, data.png, metrics.json, log.csv and model.safetensors are in {args.out}")


if __name__ == "__main__":
    main()
