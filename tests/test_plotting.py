"""Figures: panels, labels, data drawn, and wrong input."""

import io
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_diffusion import plotting


def render(drawn):
    """Draws for real, so that layout errors and warnings show."""
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    assert buffer.tell() > 0
    return figure


@pytest.mark.parametrize("shape", [(7, 8, 8), (7, 1, 8, 6), (7, 3, 5, 5), (1, 4, 4), (30, 1, 8, 8)])
@pytest.mark.parametrize("kind", [torch.Tensor.float, torch.Tensor.numpy, torch.Tensor.long])
def test_sample_grid(shape, kind):
    images = kind(torch.arange(float(np.prod(shape))).view(shape))
    ax = plotting.sample_grid(images)
    assert isinstance(ax, Axes)
    render(ax)


def test_sample_grid_draws_the_pixels():
    images = torch.rand(4, 1, 8, 8)
    ax = plotting.sample_grid(images, columns=2, low=0, high=1)
    sheet = ax.get_images()[0].get_array()
    assert sheet.shape == (18, 18, 3)
    np.testing.assert_allclose(sheet[9:17, :8, 0], images[2, 0], atol=1e-6)
    assert (sheet[8] == 1).all() and (sheet[:, 8] == 1).all()


def test_constant_and_clipped_images():
    render(plotting.sample_grid(torch.full((2, 4, 4), 3.0)))
    sheet = plotting.sample_grid(torch.tensor([[[-9.0, 9.0]]]), low=0, high=1).get_images()[0]
    assert sheet.get_array()[0, :2, 0].tolist() == [0, 1]


def test_given_axes_are_used():
    ax = Figure().subplots()
    assert plotting.sample_grid(torch.rand(4, 8, 8), ax=ax) is ax
    ax = Figure().subplots()
    assert plotting.loss_curve([3.0, 2.0, 1.0], ax=ax) is ax
    ax = Figure().subplots()
    assert plotting.bound_per_step([0.1, 0.2], [1.0, 2.0], ax=ax) is ax


@pytest.mark.parametrize("event", [(8, 8), (1, 8, 8), (3, 8, 8), (2,)])
@pytest.mark.parametrize("rising", [True, False])
def test_reverse_trajectory_runs_from_noise_to_data(event, rising):
    times = torch.linspace(0, 1, 11)
    states = times.view(11, 1, *[1] * len(event)) * torch.ones(11, 5, *event)
    if not rising:
        times, states = times.flip(0), states.flip(0)
    figure = render(plotting.reverse_trajectory(states, times, columns=5, low=0, high=1))
    if event == (2,):
        titles = [ax.get_title() for ax in figure.axes]
        assert titles[0] == "t = 1.00" and titles[-1] == "t = 0.00" and len(titles) == 5
        offsets = [ax.collections[0].get_offsets()[0, 0] for ax in figure.axes]
        assert offsets == sorted(offsets, reverse=True) and offsets[0] == 1
    else:
        labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert labels[0] == "1.00" and labels[-1] == "0.00" and len(labels) == 5
        sheet = figure.axes[0].get_images()[0].get_array()
        assert sheet[0, 0, 0] == 1 and sheet[0, -2, 0] == 0


def test_bound_per_step():
    steps, terms = torch.linspace(0.1, 1, 10).flip(0), torch.rand(10)
    ax = plotting.bound_per_step(steps, terms, 0.1 * torch.ones(10), unit="bits/dim")
    render(ax)
    assert "bits/dim" in ax.get_ylabel() and "time" in ax.get_xlabel()
    x, y = ax.lines[-1].get_data()
    np.testing.assert_allclose(x, steps.flip(0))
    np.testing.assert_allclose(y, terms.flip(0))
    band = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(band[:, 1].min(), float(terms.min()) - 0.2, rtol=1e-6)
    np.testing.assert_allclose(band[:, 1].max(), float(terms.max()) + 0.2, rtol=1e-6)
    assert f"{float(terms.double().sum()):.4g} bits/dim" in ax.get_title()
    assert ax.get_legend().get_texts()[0].get_text() == "± 2 standard errors"
    ax = plotting.bound_per_step(steps, terms, axis="log_snr")
    render(ax)
    assert ax.get_xlabel() == "log-SNR (nats)" and ax.get_legend() is None


def fake_schedule(explode=False):
    def level(t):
        return types.SimpleNamespace(
            alpha=torch.ones_like(t) if explode else (1 - t**2).sqrt(),
            sigma=80 * t if explode else t,
            log_snr=-2 * (80 * t).log() if explode else ((1 - t**2) / t**2).log(),
        )

    return types.SimpleNamespace(level=level)


@pytest.mark.parametrize("explode", [False, True])
def test_schedule(explode):
    figure = render(plotting.schedule(fake_schedule(explode)))
    scales, ratio = figure.axes
    assert scales.get_yscale() == ("log" if explode else "linear")
    assert "nats" in ratio.get_ylabel() and "time" in ratio.get_xlabel()
    drawn = np.asarray(ratio.lines[-1].get_ydata())
    assert np.isfinite(drawn[1:-1]).all() and not np.isinf(drawn).any()


def test_loss_curve():
    losses = np.linspace(10, 1, 200)
    ax = plotting.loss_curve(losses, smooth=20, unit="bits/dim")
    render(ax)
    each, mean = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(each, losses)
    np.testing.assert_allclose(mean[50], losses[31:51].mean())
    np.testing.assert_allclose(mean[3], losses[:4].mean())
    assert "bits/dim" in ax.get_ylabel()
    low, high = ax.get_ylim()
    assert low < 1 and high < 12


def test_loss_curve_leaves_out_what_is_not_finite():
    losses = [3.0, float("nan"), float("inf"), 1.0, 1.0]
    ax = plotting.loss_curve(losses, smooth=2)
    render(ax)
    mean = ax.lines[1].get_ydata()
    np.testing.assert_allclose(mean, [3.0, 3.0, np.nan, 1.0, 1.0])
    render(plotting.loss_curve(torch.tensor([1.0]), smooth=1))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: plotting.sample_grid(torch.zeros(2, 2, 4, 4)),
            r"images: got shape \(2, 2, 4, 4\)",
        ),
        (lambda: plotting.sample_grid(torch.zeros(0, 4, 4)), "images: got .* at least one image"),
        (lambda: plotting.sample_grid(torch.zeros(4, 4)), r"images: got shape \(4, 4\)"),
        (lambda: plotting.sample_grid(torch.zeros(2, 4, 4), columns=-1), "columns: got -1"),
        (
            lambda: plotting.reverse_trajectory(torch.zeros(3, 5, 2), [0.0, 1.0]),
            r"times: got shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: plotting.reverse_trajectory(torch.zeros(2, 5, 3), [0.0, 1.0]),
            r"states: got shape \(2, 5, 3\)",
        ),
        (
            lambda: plotting.bound_per_step([0.1], [1.0, 2.0]),
            r"steps: got shape \(1,\), expected \(2,\)",
        ),
        (
            lambda: plotting.bound_per_step([0.1], [1.0], [1.0, 2.0]),
            r"standard_error: got shape \(2,\), expected \(1,\)",
        ),
        (lambda: plotting.bound_per_step([0.1], [1.0], axis="steps"), "axis: got 'steps'"),
        (lambda: plotting.loss_curve([]), r"losses: got shape \(0,\)"),
        (lambda: plotting.loss_curve([1.0], smooth=0), "smooth: got 0"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_display_and_no_pyplot():
    code = "import sys, pyro_diffusion.plotting; print('matplotlib.pyplot' in sys.modules)"
    environment = {"MPLBACKEND": "", "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_gradients_and_half_precision_are_accepted():
    ax = plotting.loss_curve(torch.ones(60, requires_grad=True))
    render(ax)
    assert np.array_equal(ax.lines[0].get_ydata(), np.ones(60))
    images = torch.rand(2, 4, 4).bfloat16()
    ax = plotting.sample_grid(images, low=0, high=1)
    render(ax)
    drawn = np.asarray(ax.get_images()[0].get_array())[:4, :4, 0]
    assert np.array_equal(drawn, images[0].double().numpy())


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_pair_plot(columns):
    data, samples = torch.randn(30, columns), torch.randn(20, columns)
    for more in ((), (samples,), (samples.numpy(), [f"column {j}" for j in range(columns)])):
        figure = plotting.pair_plot(data, *more)
        assert isinstance(figure, Figure) and len(figure.axes) == columns**2
        render(figure)
    render(plotting.pair_plot(torch.ones(3, columns)))  # nothing varies


def test_pair_plot_draws_data_below_and_samples_above_on_one_scale():
    data, samples = torch.randn(30, 3), 2 * torch.randn(20, 3)
    panels = np.reshape(plotting.pair_plot(data, samples, num_points=10).axes, (3, 3))
    for i, j in np.ndindex(3, 3):
        if i != j:
            (points,) = panels[i, j].collections
            table = (data if i > j else samples)[:10]
            np.testing.assert_allclose(points.get_offsets(), table[:, [j, i]], atol=1e-6)
            assert panels[i, j].get_xlim() == panels[j, i].get_ylim()
        assert panels[i, j].get_xlim() == panels[j, j].get_xlim()
    share = [patch.get_data() for patch in panels[0, 0].patches]
    inside = ((samples[:, 0] > share[2].edges[0]) & (samples[:, 0] < share[2].edges[-1])).double()
    for stairs, part in ((share[0], 1.0), (share[2], float(inside.mean()))):
        area = (stairs.values * np.diff(stairs.edges)).sum()
        assert abs(area - part) < 1e-6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3),), r"data: got shape \(3,\), expected \(rows, columns\)"),
        ((torch.zeros(0, 2),), r"data: got shape \(0, 2\)"),
        ((torch.full((3, 2), float("nan")),), "data: got NaN or infinite"),
        ((torch.zeros(3, 2), torch.zeros(3, 4)), "samples: got 4 columns, .* 2"),
        ((torch.zeros(3, 2), None, ["a"]), "names: got 1, expected one for each of 2"),
    ],
)
def test_pair_plot_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plotting.pair_plot(*arguments)
