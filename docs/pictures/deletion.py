"""The picture of docs/deletion.md.

Run: python docs/pictures/deletion.py [--out FILE]
"""

import argparse
import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_diffusion.denoisers import StringTableDenoiser
from pyro_diffusion.processes import Deletion
from pyro_diffusion.processes.strings import compress
from pyro_diffusion.schedules import Rectified, quadratic

LETTERS = "aelnpst"
WORDS = ("planes", "panel", "pleats", "late")
PROCESS = Deletion(Rectified.full(), len(LETTERS))


def encode(word: str, length: int) -> Tensor:
    return torch.tensor([*map(LETTERS.index, word), *[PROCESS.pad] * (length - len(word))])


def decode(x: Tensor) -> str:
    return "".join((LETTERS + "_")[i] for i in x.tolist()).rstrip("_")


def losses(ax: Axes) -> None:
    """One path of the forward process."""
    word, times = "planes", torch.linspace(0, 1, 9)
    lost_at = torch.tensor([0.8, 0.55, 0.95, 0.3, 0.7, 0.15])
    for t in times:
        left = compress(encode(word, len(word)), lost_at > t, PROCESS.pad)
        for place, letter in enumerate(decode(left)):
            ax.text(place, float(t), letter, ha="center", va="center", family="monospace", size=13)
    ax.set(xlim=(-0.6, len(word) - 0.4), ylim=(1.06, -0.06), ylabel="t", title="a word is lost")
    ax.set_xticks([])


def expected(ax: Axes) -> None:
    """Counts that the table of words expects to be missing in what is left."""
    length, left = 6, "ae"
    joint = torch.zeros([len(LETTERS) + 1] * length)
    for word in WORDS:
        joint[tuple(encode(word, length))] = 1 / len(WORDS)
    denoiser = StringTableDenoiser(PROCESS, joint)
    counts = denoiser(encode(left, length), torch.tensor(0.5)).counts[: len(left) + 1]
    image = ax.imshow(counts, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(LETTERS)), list(LETTERS))
    ax.set_yticks(range(len(left) + 1), ["before a", "a | e", "after e"])
    ax.set(title=f'missing in "{left}"\n({", ".join(WORDS)})')
    ax.figure.colorbar(image, ax=ax, shrink=0.8)


def gaps(ax: Axes) -> None:
    """log p less the bound of chains, averaged over data, by enumeration of their states."""
    process = Deletion(Rectified.full(), 2)
    rows = torch.cartesian_prod(*[torch.arange(3)] * 3)
    rows = rows[~((rows[:, :-1] == 2) & (rows[:, 1:] != 2)).any(-1)]
    probs = torch.rand(len(rows), dtype=torch.float64) ** 3
    joint = torch.zeros(3, 3, 3, dtype=torch.float64)
    joint[tuple(rows.T)] = probs = probs / probs.sum()
    denoiser = StringTableDenoiser(process, joint)
    steps = (1, 2, 4, 8, 16, 32, 64)
    found = [chain_gap(denoiser, rows, probs, quadratic(k, torch.float64)) for k in steps]
    ax.plot(steps, found, "o-")
    ax.set(xscale="log", yscale="log", xlabel="steps", title="log p less the bound (nats)")
    ax.set_xticks(steps, [str(k) for k in steps])
    ax.minorticks_off()


def chain_gap(denoiser: StringTableDenoiser, rows: Tensor, probs: Tensor, times: Tensor) -> float:
    """Mean divergence of a chain's steps less the entropy of the data."""
    process, total = denoiser.process, float((probs * probs.log()).sum())
    for s, t in itertools.pairwise(process.level(time) for time in times):
        x0, xt = rows[:, None, None], rows[:, None].expand(len(rows), len(rows), 1, -1)
        weight = probs[:, None, None] * process.marginal(x0, t).log_prob(rows[:, None]).exp()
        bridge = process.bridge(xt, x0.expand_as(xt), s, t).log_prob(rows)
        kernel = process.reverse(rows[:, None], denoiser(rows[:, None], t), s, t)
        gap = torch.where(bridge > -math.inf, bridge.exp() * (bridge - kernel.log_prob(rows)), 0.0)
        total += float((weight * gap.sum(-1, keepdim=True)).nan_to_num(nan=0.0).sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default="docs/examples/figures/deletion.png")
    out = parser.parse_args().out
    torch.manual_seed(4)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for part, ax in zip((losses, expected, gaps), axes, strict=True):
        part(ax)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
