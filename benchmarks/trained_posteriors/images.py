"""The images of the benchmark: 8x8 digits, 28x28 glyphs of fonts, or files of the MNIST kind."""

import functools
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from trained_posteriors.glyphs import glyphs

KINDS = ("digits", "glyphs", "idx")


@dataclass(frozen=True, eq=False)
class Images:
    """Grey images in [-1, 1], (n, 1, side, side).

    Attributes:
        name: as in files of trained weights.
        train: images to train on.
        test: images that are asked about, in an order of no meaning.
    """

    name: str
    train: Tensor
    test: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return tuple(self.train.shape[1:])

    @property
    def side(self) -> int:
        """Pixels along an edge."""
        return int(self.train.shape[-1])

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.side**2

    @functools.cached_property
    def mean(self) -> Tensor:
        """Of the images to train on, (pixels,), float64."""
        return self.train.flatten(1).double().mean(0)

    @functools.cached_property
    def covariance(self) -> Tensor:
        """Of the images to train on, (pixels, pixels), float64; positive where pixels are constant too."""
        jitter = 1e-4 * torch.eye(self.pixels, dtype=torch.float64)
        return self.train.flatten(1).double().T.cov() + jitter


def digits() -> Images:
    """scikit-learn's: 1437 to train on, 360 to test on."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = np.random.default_rng(0).permutation(len(images))
    return Images("digits", images[order[:1437]], images[order[1437:]])


def idx(folder: Path) -> Images:
    """``train-images-idx3-ubyte.gz`` and ``t10k-images-idx3-ubyte.gz`` of a folder (as MNIST has)."""
    parts = []
    for part in ("train", "t10k"):
        raw = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        magic, count, height, width = np.frombuffer(raw, ">u4", 4)
        if magic != 2051 or height != width:
            raise ValueError(
                f"folder: got magic number {magic}, {height}x{width} in {folder}, expected square idx images"
            )
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(count, 1, height, width)
        parts.append(torch.tensor(pixels, dtype=torch.float32) / 127.5 - 1)
    return Images(folder.name, *parts)


@functools.cache
def images(kind: str, folder: Path | None = None) -> Images:
    """Images of a kind."""
    if kind == "idx":
        if folder is None:
            raise ValueError("folder: got None, expected the folder of the idx files")
        return idx(folder)
    return digits() if kind == "digits" else Images("glyphs", *glyphs())
