"""Letters and digits in the fonts that matplotlib ships, as 28x28 images; some fonts are for tests alone."""

import functools
import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE, SIZE, SHIFT = 28, 20, 2  # of an image, of a letter, most it is moved: pixels
SYMBOLS = ("LastResortHE-Regular", "cmex10", "cmsy10")  # fonts without letters in their places
CHARACTERS = string.ascii_letters + string.digits
TEST_FACES = ("cmss10", "DejaVuSans-Oblique", "DejaVuSerif-BoldItalic", "STIXGeneral")


@functools.cache
def faces() -> dict[str, Path]:
    """Font files by name, those that have every letter and digit."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = {}
    for path in sorted(folder.glob("*.ttf")):
        known = FT2Font(str(path)).get_charmap()
        if path.stem not in SYMBOLS and all(ord(c) in known for c in CHARACTERS):
            found[path.stem] = path
    return found


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(faces()[face]), SIZE)


def glyph(face: str, character: str, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """One character, its ink in the middle but for a shift, (1, 28, 28) in [-1, 1]."""
    font, picture = _font(face), Image.new("L", (SIDE, SIDE), 0)
    left, top, right, bottom = font.getbbox(character)
    corner = ((SIDE - right - left) / 2 + shift[0], (SIDE - bottom - top) / 2 + shift[1])
    ImageDraw.Draw(picture).text(corner, character, 255, font)
    return torch.tensor(np.array(picture), dtype=torch.float32).unsqueeze(0) / 127.5 - 1


def glyphs(copies: int = 9) -> tuple[Tensor, Tensor]:
    """Images of fonts to train on, each character several times at random places; of other fonts, once."""
    generator = torch.Generator().manual_seed(0)

    def drawn(names: list[str], times: int) -> Tensor:
        every = [(face, c) for face in names for c in CHARACTERS for _ in range(times)]
        moves = torch.randint(-SHIFT, SHIFT + 1, (len(every), 2), generator=generator).tolist()
        parts = [glyph(face, c, (dx, dy)) for (face, c), (dx, dy) in zip(every, moves, strict=True)]
        return torch.stack(parts)[torch.randperm(len(parts), generator=generator)]

    train = [face for face in faces() if face not in TEST_FACES]
    return drawn(train, copies), drawn(list(TEST_FACES), 1)
