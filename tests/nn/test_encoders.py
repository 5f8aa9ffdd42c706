"""Summaries of sets, time series and images."""

import math

import pytest
import torch

from pyro_diffusion.nn import ImageEncoder, SeriesEncoder, SetEncoder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained_like(encoder):
    """Random weights everywhere, in double precision: layers that start at zero say nothing."""
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.double().eval()


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("rows", [1, 2, 7, 200])
def test_the_order_of_a_set_says_nothing(blocks, rows):
    encoder = trained_like(SetEncoder(3, 5, 16, blocks=blocks))
    x = torch.randn(4, rows, 3, dtype=torch.double)
    mask = torch.rand(4, rows) < 0.6
    order = torch.randperm(rows)
    for m in (None, mask):
        there = None if m is None else m[:, order]
        assert torch.allclose(encoder(x, m), encoder(x[:, order], there), rtol=1e-11, atol=1e-11)
    assert encoder(x).shape == (4, 5)


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("padding", [0.0, 1e6, math.nan, math.inf])
def test_padding_reaches_neither_summary_nor_gradient(blocks, padding):
    encoder = trained_like(SetEncoder(2, 5, 16, blocks=blocks))
    x = torch.randn(3, 4, 2, dtype=torch.double)
    padded = torch.cat([x[:, :2], torch.full((3, 5, 2), padding, dtype=torch.double), x[:, 2:]], 1)
    mask = torch.tensor([1, 1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool).expand(3, 9)
    padded.requires_grad_()
    out = encoder(padded, mask)
    assert torch.allclose(out, encoder(x), rtol=1e-11, atol=1e-11)
    out.square().sum().backward()
    assert (padded.grad[:, 2:7] == 0).all() and (padded.grad[:, [0, 8]] != 0).all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_the_size_of_a_set_and_every_row_matter():
    encoder = trained_like(SetEncoder(1, 4, 16))
    x = torch.randn(1, 3, dtype=torch.double)
    base = encoder(x)
    assert not torch.allclose(base, encoder(x.repeat(1, 2)))  # as many of each
    for i in range(3):
        other = x.clone()
        other[:, i] += 1
        assert not torch.allclose(base, encoder(other))


def test_an_empty_set_has_a_summary_of_its_own():
    encoder = trained_like(SetEncoder(2, 4, 16, blocks=1))
    nothing = torch.zeros(3, dtype=torch.bool).expand(2, 3)
    one, other = encoder(torch.randn(2, 3, 2, dtype=torch.double), nothing)
    assert one.isfinite().all() and torch.equal(one, other)
    assert torch.allclose(one, encoder(torch.zeros(1, 0, 2, dtype=torch.double))[0])


def test_a_row_alone_is_a_row_of_a_batch():
    encoder = trained_like(SetEncoder(2, 4, 16, blocks=1))
    x, mask = torch.randn(6, 5, 2, dtype=torch.double), torch.rand(6, 5) < 0.7
    alone = torch.cat([encoder(x[i : i + 1], mask[i : i + 1]) for i in range(6)])
    assert torch.allclose(encoder(x, mask), alone)
    series = trained_like(SeriesEncoder(2, 3, 8, heads=2))
    x = torch.randn(4, 9, 2, dtype=torch.double)
    assert torch.allclose(series(x), torch.cat([series(x[i : i + 1]) for i in range(4)]))
    images = trained_like(ImageEncoder(1, 3, 8, attention=True))
    x = torch.randn(4, 1, 9, 7, dtype=torch.double)
    assert torch.allclose(images(x), torch.cat([images(x[i : i + 1]) for i in range(4)]))


def test_an_average_by_precision_is_learned():
    """What pooling by attention is for: groups' averages weighed by how many data they are of.

    Of one seed: 1500 steps explain more than 99.5 % of its variance.
    """
    encoder = SetEncoder(2, 1, 32)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)

    def batch(size):
        weight = torch.rand(size, 8) * 4
        x = torch.randn(size, 8)
        return torch.stack([x, weight], -1), (weight * x).sum(-1) / weight.sum(-1)

    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 1500)
        x, y = batch(128)
        optimizer.zero_grad()
        (encoder(x).squeeze(-1) - y).square().mean().backward()
        optimizer.step()
    x, y = batch(2000)
    assert (encoder(x).squeeze(-1) - y).var() < 0.005 * y.var()


@pytest.mark.parametrize("length", [1, 2, 3, 50, 51])
def test_series_of_any_length(length):
    encoder = trained_like(SeriesEncoder(2, 5, 16))
    x = torch.randn(3, length, 2, dtype=torch.double)
    out = encoder(x)
    assert out.shape == (3, 5)
    if length > 10:  # it is no set, and all of it is seen
        assert not torch.allclose(out, encoder(x.flip(1)))
        for place in (0, length // 2, length - 1):
            other = x.clone()
            other[:, place] += 1
            assert not torch.allclose(out, encoder(other))


def test_one_channel_needs_no_dimension():
    x = torch.randn(3, 20)
    encoder = SeriesEncoder(1, 4, 8, heads=2)
    assert torch.equal(encoder(x), encoder(x.unsqueeze(-1)))
    encoder = ImageEncoder(1, 4, 8)
    x = torch.randn(3, 9, 8)
    assert torch.equal(encoder(x), encoder(x.unsqueeze(1)))
    encoder = SetEncoder(1, 4, 8)
    x = torch.randn(3, 9)
    assert torch.equal(encoder(x), encoder(x.unsqueeze(-1)))


@pytest.mark.parametrize("size", [(1, 1), (7, 12), (16, 16)])
def test_images_of_any_size(size):
    encoder = trained_like(ImageEncoder(2, 5, 8, attention=True))
    x = torch.randn(3, 2, *size, dtype=torch.double)
    out = encoder(x)
    assert out.shape == (3, 5)
    other = x.clone()
    other[:, 1, -1, -1] += 1
    assert not torch.allclose(out, encoder(other))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SetEncoder(0), "event_size: got 0"),
        (lambda: SetEncoder(2, width=10, heads=4), "width: got 10, expected a multiple of heads=4"),
        (lambda: SetEncoder(2)(torch.zeros(3, 4, 3)), r"x: got shape \(3, 4, 3\)"),
        (lambda: SetEncoder(1)(torch.zeros(3)), r"x: got shape \(3,\)"),
        (lambda: SetEncoder(1)(torch.zeros(3, 4), torch.ones(3, 4)), "mask: got torch.float32"),
        (
            lambda: SetEncoder(1)(torch.zeros(3, 4), torch.ones(3, 5, dtype=torch.bool)),
            r"mask: got torch.bool of shape \(3, 5\)",
        ),
        (lambda: SetEncoder(1)(torch.zeros(3, 4), [True]), "mask: got list"),
        (lambda: SeriesEncoder(0), "channels: got 0"),
        (lambda: SeriesEncoder(1, width=6, heads=4), "width: got 6"),
        (lambda: SeriesEncoder(2)(torch.zeros(3, 5)), r"x: got shape \(3, 5\)"),
        (lambda: SeriesEncoder(2)(torch.zeros(3, 0, 2)), r"x: got shape \(3, 0, 2\)"),
        (lambda: ImageEncoder(1, levels=()), "levels: got"),
        (lambda: ImageEncoder(2)(torch.zeros(3, 1, 5, 5)), r"x: got shape \(3, 1, 5, 5\)"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pixels_attend_at_the_coarsest_level_alone():
    """Levels of one width, too, of which only the last is the coarsest."""
    encoder = ImageEncoder(1, width=8, levels=(1, 1, 1), attention=True)
    plain = ImageEncoder(1, width=8, levels=(1, 1, 1))
    extra = [
        sum(p.numel() for p in one.parameters()) - sum(p.numel() for p in other.parameters())
        for one, other in zip(encoder.down, plain.down, strict=True)
    ]
    assert extra[:2] == [0, 0] and extra[2] > 0
