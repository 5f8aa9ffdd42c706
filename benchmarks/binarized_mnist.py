"""Binarized MNIST: autoregressive densities and a masked diffusion, nats of test images.

Run: python benchmarks/binarized_mnist.py --data FILE [--device cuda] [--models NAME ...] [--minutes M] ...

FILE is an archive .npz of the fixed binarization: train, valid and test, rows of packed bits. Every model is
trained for so many minutes (of the processor; on an accelerator, of the clock), at a rate that falls to 0;
the weights are the best on the validation images.
"""

import argparse
from pathlib import Path

import torch
from density_parts.autoregressive import compare
from density_parts.bits import MODELS, Settings, read


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an archive .npz of packed rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, for each")
    parser.add_argument("--hidden", type=int, nargs="*", default=(), help="widths of MADE or NADE")
    parser.add_argument("--images", type=int, default=0, help="width of the diffusion's U-Net")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.0, help="of AdamW")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--half", action="store_true", help="networks in bfloat16")
    parser.add_argument("--log", type=Path, help="a file .csv for the losses of one model")
    return parser.parse_args(argv)


def main() -> None:
    """Print the table."""
    args = parse()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    half = torch.bfloat16 if args.half else None
    settings = Settings(
        60 * args.minutes, args.batch, args.rate, args.decay, args.ema, half, args.log
    )
    data = read(args.data, args.device)
    compare(args.data.stem, data, tuple(args.models), settings, tuple(args.hidden), args.images)


if __name__ == "__main__":
    main()
