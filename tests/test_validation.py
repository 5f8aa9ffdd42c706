"""Every check lets good input pass and names the argument when it refuses."""

import pytest
import torch

from pyro_diffusion.validation import (
    check_event_shape,
    check_finite,
    check_positive_int,
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
