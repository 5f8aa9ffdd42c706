"""Images for the examples: files that are read or refused by name, and demonstrations of any size."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import image_data

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 7)).astype(np.uint8)


def npy(path: Path, array: object) -> Path:
    np.save(path, array)
    return path


def idx(path: Path, pixels: np.ndarray, head: bytes = bytes([0, 0, 8, 3])) -> Path:
    raw = head + np.array(pixels.shape, ">u4").tobytes() + pixels.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_files_of_every_kind_have_the_same_images(tmp_path):
    expected = torch.from_numpy(PIXELS.astype(np.int64)).unsqueeze(1)
    files = [
        npy(tmp_path / "grey.npy", PIXELS),
        npy(tmp_path / "wide.npy", PIXELS.astype(np.int64)),
        npy(tmp_path / "channel.npy", PIXELS[..., None]),
        idx(tmp_path / "images-idx3-ubyte", PIXELS),
        idx(tmp_path / "images-idx3-ubyte.gz", PIXELS),
    ]
    for path in files:
        assert torch.equal(image_data.read(path), expected), path
    colour = np.stack([PIXELS, 255 - PIXELS, PIXELS // 2], -1)
    found = image_data.read(npy(tmp_path / "colour.npy", colour))
    assert found.shape == (5, 3, 6, 7)
    assert torch.equal(found[:, 1], 255 - expected[:, 0])


@pytest.mark.parametrize(
    "array, message",
    [
        (PIXELS / 255, r"got float64, expected integers 0 \.\.\. 255"),
        (PIXELS.astype(np.int64) - 300, r"got values -300 \.\.\. -4\d, expected integers 0"),
        (PIXELS.astype(np.int64) + 1, r"got values \d+ \.\.\. 256, expected integers 0"),
        (PIXELS[0], r"got shape \(6, 7\), expected \(n, height, width\) or"),
        (np.zeros((5, 6, 7), np.uint8), r"got 0 in every pixel, expected images that differ"),
        (PIXELS[:0], r"got shape \(0, 6, 7, 1\), expected"),
        (
            np.zeros((2, 3, 4, 5), np.uint8),
            r"got shape \(2, 3, 4, 5\), expected .* 1 or 3 channels",
        ),
        (np.array([{}]), r"expected a NumPy array of integers"),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path, array, message):
    path = tmp_path / "images.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"images\.npy: {message}"):
        image_data.read(path)


def test_bad_files_are_refused_by_name(tmp_path):
    labels = idx(tmp_path / "labels", PIXELS, bytes([0, 0, 8, 1]))
    with pytest.raises(ValueError, match=r"labels: got first bytes 00000801, expected .*00000803"):
        image_data.read(labels)
    short = idx(tmp_path / "short", PIXELS)
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"short: got 209 pixels, expected \(5, 6, 7\)"):
        image_data.read(short)
    for name in ("text.npy", "text"):
        (tmp_path / name).write_text("no images")
        with pytest.raises(ValueError, match=rf"{name}: .*expected"):
            image_data.read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        image_data.read(tmp_path / "nothing.npy")


def test_parts_of_a_split_are_all_rows_once():
    parts = image_data.split(torch.arange(1797))
    assert {name: len(rows) for name, rows in parts.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    assert torch.equal(torch.cat([*parts.values()]).sort().values, torch.arange(1797))
    assert torch.equal(parts["test"], image_data.split(torch.arange(1797))["test"])


def test_sources_by_name_and_by_file(tmp_path):
    digits = image_data.load()
    assert digits["test"].shape == (360, 1, 8, 8)
    glyphs = image_data.load("glyphs", 16)
    train, test = image_data.glyphs(side=16)
    assert torch.equal(torch.cat([glyphs["validation"], glyphs["train"]]), train)
    assert torch.equal(glyphs["test"], test)
    assert image_data.load("photographs", 40)["train"].shape[1:] == (1, 40, 40)
    path = npy(tmp_path / "own.npy", np.concatenate([PIXELS, PIXELS]))
    assert [len(rows) for rows in image_data.load(str(path)).values()] == [7, 1, 2]
    with pytest.raises(
        ValueError, match="images: got 'digit', expected glyphs, digits, photographs"
    ):
        image_data.load("digit")
    with pytest.raises(ValueError, match="images: got 5, expected 10 or more"):
        image_data.load(str(npy(tmp_path / "few.npy", PIXELS)))


@pytest.mark.parametrize("side", [16, 28])
def test_demonstrations_of_any_size(side):
    train, test = image_data.glyphs(copies=1, side=side)
    photographs = image_data.photographs(side)
    assert len(test) == 62 * len(image_data.TEST_FACES) and len(train) % 62 == 0
    for images in (train, test, photographs):
        assert images.shape[1:] == (1, side, side) and images.dtype == torch.long
        assert images.min() >= 0 and 200 < images.max() <= 255
    # No letter is empty, or cut off at every edge.
    assert bool((train.flatten(1).max(1).values > 100).all())
    edges = torch.cat([train[..., 0], train[..., -1], train[..., 0, :], train[..., -1, :]], -1)
    assert (edges > 128).double().mean() < 0.01
    assert len(photographs) == 2 * (427 // side) * (640 // side)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="side: got 4, expected 8 pixels or more"):
        image_data.glyphs(side=4)
    with pytest.raises(ValueError, match="side: got 428, expected 1 to 427 pixels"):
        image_data.photographs(428)


def test_a_folder_of_the_mnist_kind_has_its_own_test_images(tmp_path):
    """The last tenth of those to train on is kept for choices; what is missing is named."""
    pixels = np.random.default_rng(1).integers(0, 256, (25, 4, 4)).astype(np.uint8)
    idx(tmp_path / "train-images-idx3-ubyte.gz", pixels[:20])
    with pytest.raises(ValueError, match="got no file t10k-images-idx3-ubyte, expected it"):
        image_data.load(str(tmp_path))
    idx(tmp_path / "t10k-images-idx3-ubyte", pixels[20:])
    expected = torch.from_numpy(pixels.astype(np.int64)).unsqueeze(1)
    found = image_data.load(str(tmp_path))
    for name, rows in {"train": (0, 18), "validation": (18, 20), "test": (20, 25)}.items():
        assert torch.equal(found[name], expected[slice(*rows)]), name
