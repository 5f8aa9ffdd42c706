"""Embedding of the noise level, and the contexts."""

import math

import pytest
import torch

from pyro_diffusion.nn import LabelContext, TensorContext
from pyro_diffusion.nn.context import Conditioning
from pyro_diffusion.nn.embedding import fourier_embedding


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embedding_formula(dtype):
    level = torch.tensor([-15.0, -0.3, 0.0, 7.5], dtype=dtype)
    out = fourier_embedding(level, 4)
    assert out.shape == (4, 4) and out.dtype == dtype
    for row, value in zip(out, level, strict=True):
        slow, fast = 2 * math.pi * float(value) / 80, 2 * math.pi * float(value)
        expected = [math.sin(slow), math.sin(fast), math.cos(slow), math.cos(fast)]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=dtype), atol=1e-5, rtol=1e-5)


def test_embedding_tells_levels_apart():
    level = torch.linspace(-20, 20, 401, dtype=torch.float64)
    distance = torch.cdist(fourier_embedding(level, 64), fourier_embedding(level, 64))
    distance.fill_diagonal_(1)
    assert distance.min() > 0.1


def test_embedding_keeps_shape_and_clamps():
    level = torch.tensor([[float("inf"), 20.0], [-float("inf"), -20.0]])
    out = fourier_embedding(level, 8)
    assert out.shape == (2, 2, 8)
    torch.testing.assert_close(out[:, 0], out[:, 1])
    assert fourier_embedding(level, 2).shape == (2, 2, 2)


@pytest.mark.parametrize("features", [0, -2, 3])
def test_embedding_wants_an_even_number(features):
    with pytest.raises(ValueError, match=f"features: got {features}"):
        fourier_embedding(torch.zeros(1), features)


@pytest.mark.parametrize(
    "context, value",
    [
        (LabelContext(4, 6, dropout=0.3), torch.tensor([0, 3, 1, 2]).repeat(5000)),
        (TensorContext(3, 6, dropout=0.3), torch.randn(20000, 3)),
    ],
)
def test_null_row_and_dropout_rate(context, value):
    assert context(None).shape == (1, 6)
    kept = context.eval()(value)
    assert kept.shape == (20000, 6)
    assert not (kept == context(None)).all(1).any()
    dropped = (context.train()(value) == context(None)).all(1)
    assert abs(dropped.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20000)
    again = (context(value) == context(None)).all(1)
    assert (dropped != again).any()


def test_event_dims():
    assert LabelContext(2, 2).event_dim == 0
    assert TensorContext(2, 2).event_dim == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    context = LabelContext(4, 6).eval()
    label = torch.tensor([3, 0], dtype=dtype)
    torch.testing.assert_close(context(label), context.weight[[3, 0]])


@pytest.mark.parametrize(
    "label, message",
    [
        (torch.tensor([0, -1]), r"label: got -1, expected integers in \[0, 3\]"),
        (torch.tensor([4]), r"label: got 4, expected integers in \[0, 3\]"),
        (torch.tensor([1.0]), "label: got dtype torch.float32, expected integers"),
        (torch.tensor([True]), "label: got dtype torch.bool, expected integers"),
        (torch.tensor([[1]]), r"label: got shape \(1, 1\), expected \(N,\)"),
    ],
)
def test_wrong_labels(label, message):
    with pytest.raises(ValueError, match=message):
        LabelContext(4, 6)(label)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.zeros(2, 4), r"got shape \(2, 4\), expected \(N, 3\)"),
        (torch.zeros(3), r"got shape \(3,\), expected \(N, 3\)"),
        (torch.zeros(2, 3, dtype=torch.long), "got dtype torch.int64, expected floating point"),
    ],
)
def test_wrong_vectors(value, message):
    with pytest.raises(ValueError, match=message):
        TensorContext(3, 6)(value)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: LabelContext(0, 2), "classes: got 0"),
        (lambda: LabelContext(2, 0), "features: got 0"),
        (lambda: TensorContext(0, 2), "in_features: got 0"),
        (lambda: TensorContext(2, 2, dropout=1.5), r"dropout: got 1.5, expected .*\[0, 1\]"),
    ],
)
def test_wrong_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_gradient_of_dropped_rows_goes_to_the_null_row():
    context = LabelContext(4, 6, dropout=1.0)
    context(torch.tensor([0, 1])).sum().backward()
    torch.testing.assert_close(context.null.grad, torch.full((6,), 2.0))
    assert context.weight.grad is None or (context.weight.grad == 0).all()


def test_conditioning_adds_named_contexts():
    conditioning = Conditioning(10, {"label": LabelContext(4, 3, dropout=0.0)})
    level, label = torch.randn(5), torch.tensor([0, 1, 2, 3, 0])
    out = conditioning(level, 5, {"label": label})
    assert out.shape == (5, 10)
    bare = conditioning(level, 5, {})
    assert bare.shape == (5, 10)
    same = conditioning(level[:1].expand(5), 5, {"label": label})
    torch.testing.assert_close(same[0], same[4])
    assert not torch.allclose(same[0], same[1])
