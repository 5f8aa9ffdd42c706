"""Images to train on: files of one's own, and demonstrations of any size that installed packages ship.

Images are integers, (n, channels, height, width), from 0 on. Nothing is downloaded.
"""

import functools
import gzip
import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

# of an idx file's magic number: the type, and the number of dimensions
UNSIGNED_BYTES, IMAGES = 8, 3
SYMBOLS = ("LastResortHE-Regular", "cmex10", "cmsy10")  # fonts without letters in their places
CHARACTERS = string.ascii_letters + string.digits
TEST_FACES = ("cmss10", "DejaVuSans-Oblique", "DejaVuSerif-BoldItalic", "STIXGeneral")


def read(path: Path) -> Tensor:
    """Images of a NumPy file (.npy) or of an idx file (as MNIST has them), which may end in .gz.

    A NumPy file holds integers 0 ... 255, (n, height, width) or (n, height, width, channels), 1 or 3 of them.

    Raises:
        ValueError: naming the file, what is in it and what was expected.
    """
    images = _npy(path) if path.suffix == ".npy" else _idx(path)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{path}: got shape {images.shape}, expected (n, height, width) or (n, height, width, channels) "
            "with 1 or 3 channels"
        )
    if images.dtype.kind not in "iu":
        raise ValueError(f"{path}: got {images.dtype}, expected integers 0 ... 255")
    if images.min() < 0 or images.max() > 255:
        raise ValueError(
            f"{path}: got values {images.min()} ... {images.max()}, expected integers 0 ... 255"
        )
    if images.min() == images.max():
        raise ValueError(f"{path}: got {images.max()} in every pixel, expected images that differ")
    return torch.from_numpy(images.astype(np.int64)).permute(0, 3, 1, 2).contiguous()


def _npy(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except ValueError as error:  # of NumPy: no such file, cut short, or of Python objects
        raise ValueError(f"{path}: expected a NumPy array of integers: {error}") from error
    return found


def _idx(path: Path) -> np.ndarray:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    if len(raw) < 16 or raw[:4] != bytes([0, 0, UNSIGNED_BYTES, IMAGES]):
        raise ValueError(
            f"{path}: got first bytes {raw[:4].hex()}, expected those of idx images, 00000803, or a file .npy"
        )
    shape = tuple(np.frombuffer(raw, ">u4", 3, offset=4).tolist())
    pixels = np.frombuffer(raw, np.uint8, offset=16)
    if pixels.size != np.prod(shape):
        raise ValueError(f"{path}: got {pixels.size} pixels, expected {shape}, as its head says")
    return pixels.reshape(shape)


def load(source: str = "digits", side: int = 28) -> dict[str, Tensor]:
    """Images to train on, for all choices, and to report.

    Args:
        source: ``digits``, ``glyphs``, ``photographs``, or else a file that :func:`read` takes, or a
            folder with images to train on and to report, under the names that MNIST's have.
        side: pixels along an edge of glyphs and photographs.
    """
    if source == "glyphs":  # those to report are of other fonts
        images, test = glyphs(side=side)
        held = len(images) // 8
        return {"train": images[held:], "validation": images[:held], "test": test}
    if source == "digits":
        return split(digits())
    if source == "photographs":
        return split(photographs(side))
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"images: got {source!r}, expected glyphs, digits, photographs, or a file or folder that exists"
        )
    return folder(path) if path.is_dir() else split(read(path))


def folder(path: Path) -> dict[str, Tensor]:
    """Images of a folder with files ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, perhaps .gz.

    The last tenth of those to train on, at most 1000, is for all choices.

    Raises:
        ValueError: if one of them is missing, or is no file of images.
    """
    parts = {}
    for part in ("train", "t10k"):
        found = sorted(path.glob(f"{part}-images*idx3-ubyte*"))
        if not found:
            raise ValueError(
                f"{path}: got no file {part}-images-idx3-ubyte, expected it or its .gz"
            )
        parts[part] = read(found[0])
    images = parts["train"]
    held = min(1000, len(images) // 10)
    return {
        "train": images[: len(images) - held],
        "validation": images[len(images) - held :],
        "test": parts["t10k"],
    }


def split(images: Tensor) -> dict[str, Tensor]:
    """A tenth for all choices, a fifth to report, the rest to train on; the same rows at every call."""
    if len(images) < 10:
        raise ValueError(f"images: got {len(images)}, expected 10 or more, to leave some out")
    order = np.random.default_rng(0).permutation(len(images))
    first, second = len(images) * 7 // 10, len(images) * 8 // 10
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {name: images[rows] for name, rows in parts.items()}


def digits() -> Tensor:
    """scikit-learn's 1797 handwritten digits, 8x8, 17 levels."""
    return torch.tensor(load_digits().images, dtype=torch.long).unsqueeze(1)


@functools.cache
def faces() -> dict[str, Path]:
    """Font files that matplotlib ships, by name, those that have every letter and digit."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = {}
    for path in sorted(folder.glob("*.ttf")):
        known = FT2Font(str(path)).get_charmap()
        if path.stem not in SYMBOLS and all(ord(c) in known for c in CHARACTERS):
            found[path.stem] = path
    return found


@functools.cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(faces()[face]), size)


def glyph(face: str, character: str, shift: tuple[int, int] = (0, 0), side: int = 28) -> Tensor:
    """One character, its ink in the middle but for a shift, (1, side, side), 256 levels."""
    font, picture = _font(face, side * 5 // 7), Image.new("L", (side, side), 0)
    left, top, right, bottom = font.getbbox(character)
    corner = ((side - right - left) / 2 + shift[0], (side - bottom - top) / 2 + shift[1])
    ImageDraw.Draw(picture).text(corner, character, 255, font)
    return torch.tensor(np.array(picture), dtype=torch.long).unsqueeze(0)


def glyphs(copies: int = 9, side: int = 28) -> tuple[Tensor, Tensor]:
    """Images of fonts to train on, each character several times at random places; of other fonts, once."""
    if side < 8:
        raise ValueError(f"side: got {side}, expected 8 pixels or more, to draw a letter in")
    generator, most = torch.Generator().manual_seed(0), side // 14

    def drawn(names: list[str], times: int) -> Tensor:
        every = [(face, c) for face in names for c in CHARACTERS for _ in range(times)]
        moves = torch.randint(-most, most + 1, (len(every), 2), generator=generator).tolist()
        parts = [
            glyph(face, c, (dx, dy), side) for (face, c), (dx, dy) in zip(every, moves, strict=True)
        ]
        return torch.stack(parts)[torch.randperm(len(parts), generator=generator)]

    train = [face for face in faces() if face not in TEST_FACES]
    return drawn(train, copies), drawn(list(TEST_FACES), 1)


def photographs(side: int = 28) -> Tensor:
    """Grey patches of scikit-learn's two photographs, side by side and in no order, 256 levels."""
    patches = []
    for picture in load_sample_images().images:
        if not 0 < side <= min(picture.shape[:2]):
            raise ValueError(f"side: got {side}, expected 1 to {min(picture.shape[:2])} pixels")
        grey = torch.tensor(np.array(Image.fromarray(picture).convert("L")), dtype=torch.long)
        patches.append(grey.unfold(0, side, side).unfold(1, side, side).reshape(-1, 1, side, side))
    found = torch.cat(patches)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
