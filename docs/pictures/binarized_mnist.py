"""The second picture of docs/autoregressive.md: validation by seconds of training, from logs of runs.

Run: python docs/pictures/binarized_mnist.py NAME=LOG ... [--out FILE]
The logs are those of `benchmarks/binarized_mnist.py --log LOG`, one for each model.
"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent.parent
# Test nats of Germain et al., arXiv 1502.03509.
PUBLISHED = {"NADE": 88.33, "MADE, one mask": 88.04, "MADE, 32 masks": 86.64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "docs" / "examples" / "figures" / "binarized_mnist.png"
    parser.add_argument("logs", nargs="+", help="NAME=LOG")
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, path in (log.split("=", 1) for log in args.logs):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        seconds, nats = ([float(row[key]) for row in rows] for key in ("seconds", "validation"))
        ax.plot(seconds, nats, "o-", markersize=3, label=name)
    for (name, nats), style in zip(PUBLISHED.items(), (":", "--", "-."), strict=True):
        ax.axhline(nats, color="0.6", linewidth=1, linestyle=style, label=f"published: {name}")
    ax.set(xlabel="seconds of steps", ylabel="nats of a validation image", ylim=(79, 116))
    ax.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
