"""The picture of noise that changes on the way, in docs/discrete.md.

Run: python docs/pictures/varying_noise.py [--out FILE]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from pyro_diffusion.processes import VaryingNoise
from pyro_diffusion.schedules import Rectified
from pyro_diffusion.unwrapping import per_coordinate

STATES, SYMBOL = 9, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent.parent / "examples" / "figures" / "varying_noise.png"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    mask = torch.eye(STATES + 1, dtype=torch.float64)[STATES]
    early = (1 - mask) / STATES
    process = VaryingNoise(Rectified.full(), STATES, torch.stack([early, mask]))
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    probs = per_coordinate(process.marginal(torch.full((101, 1), SYMBOL), t)).probs[:, 0]
    figure, (image, parts) = plt.subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
    box = (0, 1, -0.5, STATES + 0.5)
    image.imshow(probs.T.sqrt(), aspect="auto", origin="lower", extent=box)
    image.set(title="VaryingNoise", xlabel="t", ylabel="symbol")
    image.set_yticks([0, SYMBOL, STATES - 1, STATES], ["0", "3", "8", "mask"])
    other = probs[:, 0] * STATES
    bands = (probs[:, SYMBOL] - probs[:, 0], other, probs[:, STATES])
    parts.stackplot(t, *bands, labels=("never lost", "any symbol", "mask"), alpha=0.8)
    parts.set(title="what a symbol is", xlabel="t", ylabel="probability", xlim=(0, 1), ylim=(0, 1))
    parts.legend(fontsize=8, loc="lower left")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
