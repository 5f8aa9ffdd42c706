"""Every check lets good input pass and names the argument when it refuses."""

import pytest
import torch

from pyro_diffusion.validation import (
    check_each_size,
    check_event_shape,
    check_finite,
    check_number,
    check_positive_int,
    check_sizes,
    check_tensor,
    check_times,
)


def test_finite():
    check_finite("data", torch.zeros(3))
    check_finite("data", torch.zeros(0))
    check_finite("data", torch.tensor([1, 2]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match=r"^data: got 1 NaN or infinite .*\(2,\), expected"):
            check_finite("data", torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match=r"^data: got 3 NaN"):
        check_finite("data", torch.full((3,), torch.nan))


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", None, True])
def test_positive_int_refuses(value):
    with pytest.raises(ValueError, match=rf"^steps: got {value!r}, expected an integer >= 1"):
        check_positive_int("steps", value)


def test_positive_int():
    assert check_positive_int("steps", 1) == 1
    assert check_positive_int("event_dim", 0, at_least=0) == 0
    with pytest.raises(ValueError, match=r"^states: got 1, expected an integer >= 2"):
        check_positive_int("states", 1, at_least=2)


@pytest.mark.parametrize("bad", [-1e-6, 1.000001, torch.nan, torch.inf, -torch.inf])
def test_times_refuse(bad):
    with pytest.raises(
        ValueError, match=r"^t: got times from .* to .*, expected times in \[0, 1\]"
    ):
        check_times("t", torch.tensor([0.5, bad, 0.5]))


def test_times():
    check_times("t", torch.tensor([0.0, 0.5, 1.0]))
    check_times("t", torch.tensor(0))
    check_times("t", torch.zeros(0))


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (3,)])
def test_event_shape(shape):
    check_event_shape("value", torch.zeros(shape), (3,))
    check_event_shape("value", torch.zeros(shape), ())
    check_event_shape("value", torch.zeros(shape), torch.Size([3]))


@pytest.mark.parametrize(
    ("shape", "event"), [((3, 4), (3,)), ((), (3,)), ((3,), (3, 3)), ((2, 1), (3,)), ((3,), (1, 3))]
)
def test_event_shape_refuses(shape, event):
    with pytest.raises(ValueError, match=r"^value: got shape \(.*\), expected batch dimensions"):
        check_event_shape("value", torch.zeros(shape), event)


def test_event_shape_refuses_an_empty_batch():
    with pytest.raises(ValueError, match=r"^value: got an empty batch of shape \(0, 3\)"):
        check_event_shape("value", torch.zeros(0, 3), (3,))


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (torch.zeros(2, 3).to_sparse(), "a sparse tensor"),
        (torch.zeros(2, device="meta"), "a tensor on the device 'meta'"),
        (torch.zeros(2) > 0, "dtype torch.bool"),
        (torch.zeros(2, dtype=torch.complex64), "dtype torch.complex64"),
        ([0.0, 1.0], "list"),
        (None, "NoneType"),
    ],
)
def test_tensor_refuses(bad, got):
    with pytest.raises(ValueError, match=f"^x: got {got}.*, expected"):
        check_tensor("x", bad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_tensor(dtype):
    x = torch.zeros(2, dtype=dtype)
    assert check_tensor("x", x) is x


def test_number():
    assert check_number("eta", 1, at_least=0, at_most=1) == 1.0
    assert check_number("scale", 0.5, above=0) == 0.5
    for bad in (0, -1.0, torch.nan, torch.inf, None, "1", True, 1j):
        with pytest.raises(ValueError, match=r"^scale: got .*, expected a finite number > 0$"):
            check_number("scale", bad, above=0)
    with pytest.raises(ValueError, match=r"^eta: got 2, expected a finite number >= 0 and <= 1$"):
        check_number("eta", 2, at_least=0, at_most=1)


@pytest.mark.parametrize("shape", [(), (3,), [2, 3], torch.Size([1])])
def test_sizes(shape):
    assert check_sizes("sample_shape", shape) == torch.Size(shape)


@pytest.mark.parametrize("shape", [(0,), (-1,), (2, 0), (10**20,), (2.0,), 3, None, "ab", (True,)])
def test_sizes_refuse(shape):
    with pytest.raises(ValueError, match=r"^sample_shape: got .*, expected a tuple of sizes >= 1"):
        check_sizes("sample_shape", shape)


def test_no_count_is_endless():
    with pytest.raises(
        ValueError, match=r"^draws: got 100000000000000000000, expected an integer <="
    ):
        check_positive_int("draws", 10**20)


def test_widths_are_asked_for_each_on_its_own():
    """Three layers of 4096 are no tensor of 4096^3 elements."""
    assert check_each_size("hidden", [4096] * 3) == (4096,) * 3
    for wrong in (3, (2, 0), (True,), (2.0,), "ab"):
        with pytest.raises(ValueError, match=r"^hidden: got .*, expected a tuple of sizes >= 1"):
            check_each_size("hidden", wrong)
