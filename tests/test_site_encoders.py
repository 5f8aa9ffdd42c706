"""Encoders of single sites: series and images in the rows of plates, and outside of them."""

import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import LogNormal, Normal
from pyro.infer import Predictive
from torch import nn

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.nn import ConditionalMLP, ImageEncoder, SeriesEncoder
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear
from pyro_diffusion.train import fit_amortized

T = 12
SOLVER = ODESolver("rk4", steps=10)


def small(latents, features):
    network = ConditionalMLP(latents, features, width=32, depth=1)
    return GaussianDenoiser(network, GaussianProcess(LogLinear(10.0, -8.0)))


def curves(y=None, mask=None, rows=5, noise=0.3):
    """Rows of one series each, of a slope of their own around a common one."""
    rows = rows if y is None else y.shape[-2]
    time = torch.linspace(0.0, 1.0, T)
    slope = pyro.sample("slope", Normal(0.0, 1.0))
    with pyro.plate("rows", rows), poutine.mask(mask=True if mask is None else mask):
        own = pyro.sample("own", Normal(slope, 0.5))
        centre = own.unsqueeze(-1) * time
        pyro.sample("y", Normal(centre, noise).to_event(1), obs=y)


def pictures(x=None, size=None, rows=4):
    """Rows of an image and a number each, and an image outside of them."""
    rows = rows if size is None else size.shape[-1]
    top = pyro.sample("top", LogNormal(0.0, 1.0))
    with pyro.plate("rows", rows):
        own = pyro.sample("own", Normal(0.0, 1.0))
        pyro.sample("size", LogNormal(own, 1.0), obs=size)
        spots = own[..., None, None] + torch.zeros(5, 6)
        pyro.sample("x", Normal(spots, top[..., None, None]).to_event(2), obs=x)


def untrained(model, observed, encoders, **options):
    pyro.set_rng_seed(0)
    options = {"solver": SOLVER, **options}
    guide = AutoAmortized(model, observed=observed, denoiser=small, encoders=encoders, **options)
    guide.simulate(60)
    for parameter in guide.posterior.parameters():
        nn.init.normal_(parameter, std=0.2)
    return guide


def drawn(rows):
    """Series of so many rows."""
    return Predictive(curves, num_samples=1)(rows=rows)["y"][0]


def series():
    return SeriesEncoder(1, features=6, width=8, heads=2)


def image():
    return ImageEncoder(1, features=5, width=8, levels=(1, 2))


@pytest.mark.filterwarnings("ignore::pyro_diffusion.infer.UnreliableWarning")
def test_series_in_rows():
    """Of any number of rows, in any order; the row's latents are given the row's series."""
    guide = untrained(curves, ["y"], {"y": series()})
    assert guide.in_levels
    y = drawn(3)
    draws = guide.get_posterior(y).sample((7,))
    assert draws.shape == (7, 4)
    latents = {"slope": torch.tensor(0.2), "own": torch.randn(3)}
    order = torch.tensor([2, 0, 1])
    one = guide.log_prob(latents, y)
    swapped = {"slope": latents["slope"], "own": latents["own"][order]}
    assert torch.allclose(one, guide.log_prob(swapped, y[order]), atol=1e-4)
    moved = {"slope": latents["slope"], "own": latents["own"] + torch.tensor([0.3, 0.0, 0.0])}
    other = y.clone()
    other[2] = drawn(1)[0]
    gaps = [guide.log_prob(moved, each) - guide.log_prob(latents, each) for each in (y, other)]
    assert torch.allclose(*gaps, atol=1e-4)  # given the common slope, the third row's are not asked
    assert not torch.allclose(one, guide.log_prob(latents, other), atol=1e-3)
    backwards = y.clone()
    backwards[0] = y[0].flip(0)  # the order within a series counts
    assert not torch.allclose(one, guide.log_prob(latents, backwards), atol=1e-3)


def test_what_a_mask_leaves_out_is_not_encoded():
    guide = untrained(curves, ["y"], {"y": series()})
    y, mask = drawn(3), torch.tensor([True, False, True])
    latents = {"slope": torch.tensor(0.2), "own": torch.randn(3)}
    hidden = y.clone()
    hidden[1] = float("nan")
    one = guide.log_prob(latents, y, mask)
    assert one.isfinite() and torch.equal(one, guide.log_prob(latents, hidden, mask))
    assert not torch.allclose(one, guide.log_prob(latents, y), atol=1e-3)


def test_images_beside_numbers():
    """The encoder sees one row's picture, of its shape, as simulated: the summary has its features."""
    guide = untrained(pictures, ["x", "size"], {"x": image()})
    assert [level.observed for level in guide._levels] == [(), ("size", "x")]
    x, size = torch.randn(2, 5, 6), torch.rand(2) + 0.5
    own = guide.posterior.levels[1]
    contexts = guide.posterior.contexts(guide._data((x, size), {})[0])
    standardized = own.observed[1](x.reshape(2, -1)).reshape(2, 5, 6)
    expected = own.encoders[1](standardized)
    assert contexts[1].shape == (
        2,
        1 + 5 + 1,
    )  # a number, a picture's features, whether there are any
    assert torch.allclose(contexts[1][:, 1:6], expected, atol=1e-6)
    many = guide.draw(3, {"x": torch.randn(6, 4, 5, 6), "size": torch.rand(6, 4) + 0.5})
    assert many["top"].shape == (3, 6) and many["own"].shape == (3, 6, 4)


def test_a_program_without_plates():
    def model(y=None, x=None):
        slope = pyro.sample("slope", Normal(0.0, 1.0))
        pyro.sample("x", Normal(slope, 1.0), obs=x)
        centre = slope.unsqueeze(-1) * torch.linspace(0.0, 1.0, T)
        pyro.sample("y", Normal(centre, 0.3).to_event(1), obs=y)

    guide = untrained(model, ["y", "x"], {"y": series()})
    context = guide.posterior.context([torch.tensor([0.3]), torch.zeros(1, T)], torch.Size([1]))
    assert not guide.in_levels and context.shape == (1, 7)
    assert torch.allclose(context[:, :1], guide.posterior.observed[0](torch.tensor([[0.3]])))
    many = guide.draw(4, {"x": torch.zeros(2), "y": torch.zeros(2, T)})
    assert many["slope"].shape == (4, 2)
    fresh = AutoAmortized(
        model, observed=["y", "x"], denoiser=small, encoders={"y": series()}, solver=SOLVER
    )
    fresh.load_state_dict(guide.state_dict())
    _same_density(guide, fresh, {"slope": torch.tensor(0.1)}, torch.zeros(T), torch.tensor(0.2))


def _same_density(one, other, latents, *args):
    for guide in (one, other):
        guide.eval()
    assert torch.allclose(one.log_prob(latents, *args), other.log_prob(latents, *args), atol=1e-3)


def test_states():
    guide = untrained(curves, ["y"], {"y": series()})
    fresh = AutoAmortized(
        curves, observed=["y"], denoiser=small, encoders={"y": series()}, solver=SOLVER
    )
    fresh.load_state_dict(guide.state_dict())
    latents = {"slope": torch.tensor(0.2), "own": torch.randn(3)}
    _same_density(guide, fresh, latents, drawn(3))
    with pytest.raises(ValueError, match=r"encoders: got \[\], expected \['y'\], as in the state"):
        AutoAmortized(curves, observed=["y"]).load_state_dict(guide.state_dict())


def test_a_posterior_is_learned_through_the_encoder():
    """Against the closed form, given 3 rows: means off by less than .4 sd, sds by less than 35%, on average.

    Of one seed; with an encoder that sees none of the data (its output times zero) means are 2.8 off.
    """
    pyro.set_rng_seed(0)
    guide = AutoAmortized(curves, observed=["y"], denoiser=small, encoders={"y": series()})
    table = guide.simulate(3000)
    fit_amortized(guide, table, steps=600, batch_size=128, lr=4e-3, progress=False)
    time = torch.linspace(0.0, 1.0, T)
    precision = float(time.square().sum()) / 0.3**2
    off, wide = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        own = torch.randn(()) + 0.5 * torch.randn(3)
        y = own.unsqueeze(-1) * time + 0.3 * torch.randn(3, T)
        seen = (y @ time) / 0.3**2 / precision
        weight = 1 / (0.25 + 1 / precision)
        mean, variance = weight * seen.sum() / (1 + 3 * weight), 1 / (1 + 3 * weight)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = guide.get_posterior(y).sample((800,))
        off.append((draws[:, 0].mean() - mean).abs() / variance**0.5)
        wide.append((draws[:, 0].std() / variance**0.5 - 1).abs())
    assert torch.stack(off).mean() < 0.4
    assert torch.stack(wide).mean() < 0.35


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        (
            {"z": series()},
            r"encoders: got \['z'\], expected names of observed sites out of \['y'\]",
        ),
        ({"y": lambda y: y}, "encoders: got {'y': <function"),
        ([series()], "encoders: got list, expected modules by the names"),
        ({"y": nn.Unflatten(-1, (T, 1))}, r"summary: got \(2, 12, 1\) for 2 data"),
        ({"y": ImageEncoder(1)}, "x: got shape"),
    ],
)
def test_what_is_refused(encoders, message):
    with pytest.raises(ValueError, match=message):
        AutoAmortized(curves, observed=["y"], denoiser=small, encoders=encoders).simulate(30)


def test_beside_a_summary():
    with pytest.raises(ValueError, match=r"encoders: got \['y'\] beside a summary \(Flatten\)"):
        AutoAmortized(curves, nn.Flatten(), observed=["y"], encoders={"y": series()})
