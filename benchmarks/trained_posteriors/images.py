"""The images of the benchmark: 8x8 digits, 28x28 glyphs of fonts, or files of the MNIST kind."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the examples stand beside
from examples import image_data

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

    def to(self, device: torch.device | str) -> "Images":
        """The same images on a device."""
        return Images(self.name, self.train.to(device), self.test.to(device))

    @functools.cached_property
    def mean(self) -> Tensor:
        """Of the images to train on, (pixels,), float64."""
        return self.train.flatten(1).double().mean(0)

    @functools.cached_property
    def covariance(self) -> Tensor:
        """Of the images to train on, (pixels, pixels), float64; positive where pixels are constant too."""
        found = self.train.flatten(1).double().T.cov()
        return found + 1e-4 * torch.eye(self.pixels).to(found)


def digits() -> Images:
    """scikit-learn's: 1437 to train on, 360 to test on."""
    images = image_data.digits().float() / 8 - 1
    order = np.random.default_rng(0).permutation(len(images))
    return Images("digits", images[order[:1437]], images[order[1437:]])


def bytes_of(name: str, *parts: Tensor) -> Images:
    """Images of 256 levels, to train on and to test on.

    Raises:
        ValueError: for images that are not square.
    """
    for part in parts:
        if part.shape[-1] != part.shape[-2]:
            raise ValueError(f"{name}: got images of {tuple(part.shape[1:])}, expected square ones")
    return Images(name, *(part.float() / 127.5 - 1 for part in parts))


@functools.cache
def images(kind: str, folder: Path | None = None) -> Images:
    """Images of a kind."""
    if kind == "idx":
        if folder is None:
            raise ValueError("folder: got None, expected the folder of the idx files")
        files = [folder / f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k")]
        return bytes_of(folder.name, *map(image_data.read, files))
    return digits() if kind == "digits" else bytes_of("glyphs", *image_data.glyphs())
