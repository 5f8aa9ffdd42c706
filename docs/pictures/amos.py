"""The picture of docs/training.md.

Run: python docs/pictures/amos.py [--out FILE]
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from density_parts import amos  # noqa: E402

STEPS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "docs" / "examples" / "figures" / "amos.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    for ax, name in zip(axes, ("moons", "digits"), strict=True):
        for kind, rates in amos.RATES.items():
            runs = {rate: amos.curve(kind, rate, name, STEPS)[0] for rate in rates}
            rate = max(runs, key=lambda rate: runs[rate][-1])
            steps = range(amos.EVERY, STEPS + 1, amos.EVERY)
            label = f"{'Amos ' if 'with' in kind else ''}{kind}, {rate:g}"
            ax.plot(steps[1:], runs[rate][1:], "o-", markersize=3, label=label)
        ax.set(title=name, xlabel="steps")
        ax.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("held-out bound, nats")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
