"""Small densities and discrete distributions beside diffusions: figures of the pages on each.

Run: python benchmarks/densities.py --data DIR [--only PART ...] [--scale SHARE]

Parts are the modules of ``density_parts``. Each prints a table and a verdict; the command fails if any is not
as wanted. DIR has debd_nltcs.npz and debd_plants.npz, arrays train, valid and test of rows of packed bits and
n_vars, how many there are in a row; the longer binarized MNIST is in binarized_mnist.py. ``--scale``
below 1 shortens trainings and draws for a trial, whose verdicts then mean nothing.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

PARTS = ("categoricals", "fourier", "autoregressive", "diagnostics", "amos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps and draws")
    parser.add_argument("--data", type=Path, help="folder of binary sets")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun, failed = time.perf_counter(), []
    for name in args.only:
        start, spent = time.perf_counter(), time.process_time()
        torch.manual_seed(0)
        print(f"\n== {name}")
        main = importlib.import_module(f"density_parts.{name}").main
        more = (args.data,) if name == "autoregressive" else ()
        fine = main(args.scale, *more)
        wall, spent = time.perf_counter() - start, time.process_time() - spent
        print(f"as wanted: {fine} ({spent:.0f} s of the processor, {wall:.0f} s)", flush=True)
        failed += [] if fine else [name]
    print(f"\n{time.perf_counter() - begun:.0f} s; not as wanted: {', '.join(failed) or 'nothing'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
