"""Replacement of coordinates that were read, and RePaint: laws of whole walks, mostly without a draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import Replacement
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Ability, Absorbing, GaussianProcess
from pyro_diffusion.samplers import (
    DDIM,
    AdamsBashforth,
    Ancestral,
    RePaint,
    ancestral,
    repaint,
    simulate,
)
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified, uniform_log_snr
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import mixture
from tests.linear_gaussian import F64, Feed, NormalDenoiser, Reading, isotropic
from tests.small_diffusions import Tiny

EYE = torch.eye(3, dtype=F64)


def read(denoiser, matrix, y, scale):
    reading = Reading(matrix, torch.tensor(y, dtype=F64), torch.tensor(scale, dtype=F64))
    return Replacement(denoiser, reading.likelihood(denoiser))


@pytest.fixture
def feed(monkeypatch):
    """A feed of noise in place of all draws of the samplers used here."""

    def build(d, draws):
        feed = Feed(d, d * draws)
        monkeypatch.setattr(ancestral, "draw", feed.draw)
        monkeypatch.setattr(repaint, "draw", feed.draw)
        return feed

    return build


def test_readings_are_found_in_the_program():
    """Scaled, shifted and repeated readings; the rest has precision 0."""
    denoiser = isotropic(torch.zeros(4, dtype=F64), 1.0)

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (4,), steps=2))
        pyro.sample("a", dist.Normal(1 - 2 * x[..., 2], 0.5), obs=torch.tensor(4.0))
        pyro.sample(
            "b", dist.Normal(x[..., [0, 2]], 0.25).to_event(1), obs=torch.tensor([3.0, -1.0])
        )

    found = Replacement(denoiser, ProgramLikelihood(model))
    # x_2 = -1.5 at precision 16 and -1 at 16; x_0 = 3 at 16.
    assert_close(found.precision, torch.tensor([16.0, 0, 32, 0], dtype=F64))
    assert_close(found.observed, torch.tensor([3.0, 0, -1.25, 0], dtype=F64))


@pytest.mark.parametrize("jumps", [0, 2])
def test_independent_coordinates(feed, jumps):
    """Coordinates read get the reading's law, the others keep the prior's, whatever the number of rounds."""
    mean = torch.tensor([0.5, -1.0, 0.3], dtype=F64)
    guided = read(isotropic(mean, 0.4), EYE[[2, 0]], [1.0, 2.0], [1e-4, 0.6])
    times = uniform_log_snr(guided.process.schedule, 12, F64)
    found, covariance = feed(3, 2 * jumps + 1).law(guided, times, RePaint(jumps=jumps))
    assert_close(found, torch.tensor([2.0, -1.0, 1.0], dtype=F64), atol=1e-2, rtol=0)
    assert_close(covariance, torch.tensor([0.36, 0.4, 0.0], dtype=F64).diag(), atol=1e-2, rtol=0)


def test_repaint_mends_replacement(feed):
    """Correlated prior: the more rounds, the nearer to the exact conditional, in mean and variance."""
    mean, rho = torch.tensor([0.2, -0.1], dtype=F64), 0.9
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=F64)
    guided = read(NormalDenoiser(mean, covariance), torch.eye(2, dtype=F64)[:1], [1.5], [1e-4])
    times = uniform_log_snr(guided.process.schedule, 40, F64)
    exact = mean[1] + rho * (1.5 - mean[0])
    errors = []
    for jumps in (0, 3, 15):
        found, spread = feed(2, 2 * jumps + 1).law(guided, times, RePaint(jumps=jumps))
        errors.append((float((found[1] - exact).abs()), float((spread[1, 1] - 1 + rho**2).abs())))
    means, variances = zip(*errors, strict=True)
    assert means[0] > 2 * means[1] > 4 * means[2] and means[0] > 0.1 and means[2] < 0.02
    assert variances[0] > 2 * variances[1] > 4 * variances[2]


def test_rounds_change_nothing_without_observations(feed):
    """An exact denoiser's law of x_s is that after any number of rounds."""
    mean = torch.tensor([0.4, -0.2], dtype=F64)
    covariance = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=F64).diagonal().diag()
    denoiser = NormalDenoiser(mean, covariance)
    times = uniform_log_snr(denoiser.process.schedule, 5, F64)
    late, early = (denoiser.process.level(t) for t in (times[3], times[2]))

    def law(level):
        return level.alpha * mean, level.alpha**2 * covariance + level.sigma**2 * torch.eye(
            2, dtype=F64
        )

    for jumps in (0, 1, 4):
        found = feed(2, 2 * jumps + 1).step(
            lambda x, jumps=jumps: simulate(denoiser, times[2:4], x, RePaint(jumps=jumps)),
            *law(late),
        )
        for value, expected in zip(found, law(early), strict=True):
            assert_close(value, expected)


def test_predictor_remembers_earlier_steps_only():
    """In every round of a step it has the same history: that of the steps before."""
    seen = []

    class Counting(Ancestral):
        def step(self, process, denoise, state, s, t, c):
            seen.append(state.history)
            return (
                super()
                .step(process, denoise, state, s, t, c)
                ._replace(history=(*state.history, float(t.t)))
            )

    denoiser = mixture(LogLinear(10.0, -10.0))
    simulate(denoiser, torch.linspace(0, 1, 3), torch.zeros(1, 2), RePaint(Counting(), jumps=2))
    assert seen == [()] * 3 + [(1.0,)] * 3


def test_point_mass_and_row_alone(monkeypatch):
    """A point mass stays one; row 0 of a batch is row 0 alone on the same noise."""
    denoiser = mixture(LogLinear(10.0, -10.0), point_mass=True)
    guided = read(denoiser, torch.eye(2, dtype=F64)[:1], [1.0], [0.3])
    posterior = guided(torch.randn(5, 2, dtype=F64), torch.tensor(0.4, dtype=F64))
    assert isinstance(per_coordinate(posterior), dist.Delta)
    guided = read(mixture(LogLinear(10.0, -10.0)), torch.eye(2, dtype=F64)[:1], [1.0], [0.3])
    times = uniform_log_snr(guided.process.schedule, 6, F64)
    x, noises = torch.randn(5, 2, dtype=F64), torch.randn(100, 5, 2, dtype=F64)

    def walk(rows, sampler):
        feed = iter(noises[:, :rows])

        def draw(kernel):
            base = per_coordinate(kernel)
            return base.mean + base.stddev * next(feed)

        monkeypatch.setattr(ancestral, "draw", draw)
        monkeypatch.setattr(repaint, "draw", draw)
        return simulate(guided, times, x[:rows], sampler)

    for sampler in (RePaint(jumps=2), RePaint(AdamsBashforth(2, 1.0), 1), RePaint(DDIM(), 1)):
        assert_close(walk(1, sampler)[0], walk(5, sampler)[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_images_in_plates(dtype):
    """A masked image per datum: what was seen comes out, in the denoiser's dtype."""
    denoiser = GaussianDenoiser(Tiny((1, 2, 2)), GaussianProcess(Cosine(), event_dim=3)).to(dtype)
    images, seen = torch.randn(3, 1, 2, 2, dtype=dtype), torch.rand(3, 1, 2, 2) < 0.5

    def model():
        with pyro.plate("images", 3):
            x = pyro.sample("x", Diffusion(denoiser, (1, 2, 2), steps=3))
            pyro.sample("y", dist.Normal(x, 0.01).mask(seen).to_event(3), obs=images)

    guided = Replacement(denoiser, ProgramLikelihood(model))
    law = Diffusion(guided, (1, 2, 2), steps=5, sampler=RePaint(jumps=1)).expand((3,))
    draws = law.sample((7,))
    assert draws.shape == (7, 3, 1, 2, 2) and draws.dtype == dtype
    assert_close(draws[:, seen], images[seen].expand(7, -1), atol=0.1, rtol=0)
    posterior = guided(torch.randn(2, 3, 1, 2, 2, dtype=dtype), torch.rand(2, 3, dtype=dtype))
    assert posterior.batch_shape == (2, 3)


def test_repaint_any_process():
    """Symbols are noised back by their own transition."""
    law = [1 / 3] * 3
    process = Absorbing(Rectified.full(), 3)
    denoiser = TableDenoiser(process, torch.tensor(law)[:, None] * torch.tensor(law))
    found = Diffusion(denoiser, (2,), steps=4, sampler=RePaint(jumps=2)).sample((11,))
    assert found.shape == (11, 2) and bool(((found >= 0) & (found < 3)).all())


def test_bad_arguments():
    denoiser = isotropic(torch.zeros(3, dtype=F64), 1.0)
    with pytest.raises(ValueError, match=r"mix coordinates.*MMPS or PiGDM"):
        read(denoiser, torch.ones(1, 3, dtype=F64), [1.0], [0.3])

    def bent():
        x = pyro.sample("x", Diffusion(denoiser, (3,), steps=2))
        pyro.sample("y", dist.Normal(x.exp(), 0.25).to_event(1), obs=torch.ones(3))

    with pytest.raises(ValueError, match="not linear"):
        Replacement(denoiser, ProgramLikelihood(bent))
    guided = read(denoiser, EYE[:1], [1.0], [0.3])
    with pytest.raises(
        ValueError, match="got Replacement where a log-twist is needed, expected MMPS"
    ):
        guided.twisted(torch.zeros(3, dtype=F64), torch.tensor(0.5))
    with pytest.raises(ValueError, match="sampler: got 'ancestral'"):
        RePaint("ancestral")
    with pytest.raises(ValueError, match="jumps: got -1"):
        RePaint(Ancestral(), jumps=-1)
    assert repr(RePaint()) == "RePaint(Ancestral(), jumps=9)"


def test_repaint_needs_transitions():
    class Unlinked(GaussianProcess):
        abilities = GaussianProcess.abilities - {Ability.MARKOV}

    denoiser = MixtureDenoiser(Unlinked(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
    simulate(denoiser, torch.linspace(0, 1, 3), torch.zeros(1, 2), DDIM())
    with pytest.raises(ValueError, match=r"sampler: got RePaint.* lacks a Markov transition"):
        simulate(denoiser, torch.linspace(0, 1, 3), torch.zeros(1, 2), RePaint())
