"""The picture of docs/diagnostics.md.

Run: python docs/pictures/diagnostics.py [--out FILE]
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from density_parts import diagnostics  # noqa: E402

CHECKS = (20, 50, 100, 200, 500, 1000)


def residuals(ax: Axes, flow: list[tuple[float, ...]]) -> None:
    """Root mean squares by steps, each over the first of its kind."""
    curves = {"flow: continuity": [row[2] for row in flow]}
    for name, process in zip(("masks", "uniform"), diagnostics.jump_processes(), strict=True):
        rows = diagnostics.jump_rows(process, CHECKS)
        curves[f"{name}: master equation"] = [rms for _, rms in rows]
    for name, values in curves.items():
        ax.loglog(CHECKS, [v / values[0] for v in values], "o-", markersize=3, label=name)
    ax.set(title="residuals over the first", xlabel="steps")
    ax.legend(fontsize=8, frameon=False)


def distances(ax: Axes, floor: float, flow: list[tuple[float, ...]]) -> None:
    """Measured distance and its bound."""
    ax.loglog(CHECKS, [row[4] for row in flow], "o-", markersize=3, label="bound")
    ax.loglog(CHECKS, [row[3] for row in flow], "o-", markersize=3, label="measured")
    ax.axhline(floor, color="0.6", linestyle="--", label="two samples of data")
    ax.set(title="Wasserstein-2 distance of draws from data", xlabel="steps", ylim=(0.07, None))
    ax.legend(fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "docs" / "examples" / "figures" / "diagnostics.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (_, _, _, floor, _), *flow = diagnostics.flow_rows(CHECKS)
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    residuals(axes[0], flow)
    distances(axes[1], floor, flow)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
