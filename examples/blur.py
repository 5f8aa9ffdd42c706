"""Blurring diffusion of images beside plain noise: bits per pixel of equal networks.

Run: python examples/blur.py
Longer: python examples/blur.py --steps 4000 --out results/blur_longer
Others: python examples/blur.py --images glyphs --out results/blur_glyphs, or --images FILE, .npy or of idx

Two forward processes destroy the same integer images: white noise alone, and blur with noise. Network,
training and scoring are the same lines for both.
"""

import argparse
import json
import time
from pathlib import Path

import image_data
import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from tqdm import trange

from pyro_diffusion import EMA, Cosine, Diffusion, QuantizedDecoder, UNet, evaluate, optim
from pyro_diffusion.denoisers import SpectralDenoiser
from pyro_diffusion.distributions import BasisDecoder
from pyro_diffusion.processes import (
    Basis,
    Blurring,
    SeededNoise,
    SpectralGaussian,
    draw,
    drawing_from,
)


def processes(basis: Basis, blur: float) -> dict[str, SpectralGaussian]:
    """Both; without a shift, white noise is white in every basis: this is GaussianProcess."""
    schedule = Cosine(log_snr_max=7.0, log_snr_min=-9.0)
    return {
        "noise": SpectralGaussian(schedule, basis),
        "blur": Blurring(schedule, basis, sigma_max=blur),
    }


def chain(denoiser: SpectralDenoiser, decoder: BasisDecoder, args: argparse.Namespace) -> Diffusion:
    """The distribution of integer images."""
    return Diffusion(denoiser, decoder.basis.event_shape, args.chain, decoder=decoder)


def fit(
    process: SpectralGaussian, decoder: BasisDecoder, train: Tensor, args: argparse.Namespace
) -> SpectralDenoiser:
    """Plain SVI; returns the denoiser with averaged weights."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    network = UNet(train.shape[1], width=args.width, dropout=args.dropout)
    denoiser = SpectralDenoiser(network, process)
    ema = EMA(denoiser, args.ema)

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)), poutine.scale(scale=1 / x.numel()):
            pyro.sample("x", chain(denoiser, decoder, args), obs=x)

    optimizer = optim.JointOptim(
        torch.optim.AdamW,
        {"lr": args.lr, "weight_decay": args.weight_decay},
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {"T_max": args.steps},
    )
    svi = SVI(model, lambda x: None, optimizer, Trace_ELBO())
    denoiser.train()
    for _ in trange(args.steps, disable=not args.progress, leave=False):
        svi.step(train[torch.randint(len(train), (args.batch,))])
        svi.optim.step()
        ema.update()
    denoiser.eval()
    with ema.average_parameters():
        averaged = {k: v.clone() for k, v in denoiser.state_dict().items()}
    denoiser.load_state_dict(averaged)
    return denoiser


def path(
    name: str, process: SpectralGaussian, decoder: BasisDecoder, image: Tensor, times: Tensor
) -> dict[str, Tensor]:
    """The image on its way to noise, in pixels, and its mean; the same draw of noise at all times."""
    u0, states, means = decoder.encode(image, torch.float32), [], []
    for t in times:
        marginal = process.marginal(u0, t)
        with drawing_from(SeededNoise(0)):
            states.append(process.basis.inverse(draw(marginal)))
        means.append(process.basis.inverse(marginal.mean))
    return {name: torch.stack(states), f"{name}, mean": torch.stack(means)}


def show(rows: dict[str, Tensor], titles: list[str], path: Path) -> None:
    """A figure of images, a labelled row each."""
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(0.9 * columns, 1.05 * len(rows)))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, images) in enumerate(rows.items()):
        axes[row][0].set_ylabel(name, fontsize=8)
        for column, axis in enumerate(axes[row]):
            axis.set(xticks=[], yticks=[])
            axis.imshow(images[column, 0].numpy(), cmap="gray")
            if row == 0 and column < len(titles):
                axis.set_title(titles[column], fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/blur"), help="output folder")
    parser.add_argument(
        "--images", default="digits", help="digits, glyphs, photographs, or a file, .npy or of idx"
    )
    parser.add_argument("--side", type=int, default=28, help="pixels of glyphs and photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the weights' average")
    parser.add_argument("--width", type=int, default=16, help="channels of the U-Net")
    parser.add_argument(
        "--blur", type=float, default=4.0, help="width of the blur at t = 1, pixels"
    )
    parser.add_argument("--chain", type=int, default=250, help="steps of the chain")
    parser.add_argument("--draws", type=int, default=24, help="steps evaluated per image")
    parser.add_argument("--samples", type=int, default=9, help="images to draw of each model")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    data, metrics = image_data.load(args.images, args.side), {}
    levels = 1 + max(int(images.max()) for images in data.values())
    decoder = BasisDecoder(Basis.dct(data["train"].shape[1:]), QuantizedDecoder(levels))
    models, images, paths = {}, {}, {}
    times = torch.linspace(0, 1, 9)
    for name, process in processes(decoder.basis, args.blur).items():
        began = time.perf_counter()
        denoiser = fit(process, decoder, data["train"], args)
        seconds = time.perf_counter() - began
        pyro.set_rng_seed(args.seed)
        diffusion = chain(denoiser, decoder, args)
        models[name] = evaluate.log_likelihood(
            diffusion, data["test"], num_terms=args.draws, progress=args.progress
        )
        figure = models[name].bits_per_dim
        metrics[name] = {**vars(figure), "seconds": seconds}
        images[name] = diffusion.sample((args.samples,))
        paths |= path(name, process, decoder, data["test"][0], times)
        print(
            f"{name:<10} {figure.value:.4f} +- {figure.standard_error:.4f} bits/pixel ({figure.kind}), "
            f"trained in {seconds:.0f} s"
        )
    print(f"\npaired (nats):\n{evaluate.compare(models).round(2).to_string()}")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    show(paths, [f"t = {float(t):.2f}" for t in times], args.out / "forward.png")
    show(images, [], args.out / "samples.png")
    print(f"forward.png, samples.png and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
