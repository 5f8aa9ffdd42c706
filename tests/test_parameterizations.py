"""What a network's output means: each target against its definition, each scale against its variance."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_diffusion.denoisers import (
    Data,
    EDMPreconditioning,
    GaussianDenoiser,
    Noise,
    Parameterization,
    Score,
    V,
    Velocity,
)
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import EDM as KarrasSchedule
from pyro_diffusion.schedules import LogLinear, Rectified, VarianceExploding, uniform
from tests.exact import DTYPES, SCHEDULES, Gauge

F64 = torch.float64

PARAMETERIZATIONS = {
    "noise": Noise(),
    "data": Data(),
    "v": V(),
    "score": Score(),
    "velocity": Velocity(),
    "edm": EDMPreconditioning(),
    "edm 2": EDMPreconditioning(sigma_data=2.0),
}
# The definition of each target in x_0 and eps, without x_t.
DEFINITIONS = {
    "noise": lambda x0, eps, a, s: eps,
    "data": lambda x0, eps, a, s: x0,
    "v": lambda x0, eps, a, s: (a * eps - s * x0) / (a**2 + s**2).sqrt(),
    "score": lambda x0, eps, a, s: -eps / s,  # grad log N(x_t; alpha x_0, sigma^2)
    "velocity": lambda x0, eps, a, s: eps - x0,
    "edm": lambda x0, eps, a, s: edm_target(x0, eps, a, s, 0.5),
    "edm 2": lambda x0, eps, a, s: edm_target(x0, eps, a, s, 2.0),
}

each = pytest.mark.parametrize("name", PARAMETERIZATIONS)
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


def edm_target(x0, eps, alpha, sigma, sigma_data):
    """Table 1 of arXiv 2206.00364 at the noise level sigma / alpha of x_t / alpha."""
    noise = sigma / alpha
    total = (noise**2 + sigma_data**2).sqrt()
    skip, out = sigma_data**2 / total**2, noise * sigma_data / total
    return (x0 - skip * (x0 + noise * eps)) / out


def draw(schedule, event=(3, 4, 5), batch=6):
    """Data, noise, state and scales at (B,) times, as images."""
    level = schedule.level(torch.rand(batch, dtype=F64)).unsqueeze(len(event))
    x0, eps = torch.randn(2, batch, *event, dtype=F64)
    return x0, eps, level.alpha * x0 + level.sigma * eps, level


@each
@each_schedule
def test_target_is_its_definition(make, name):
    x0, eps, xt, level = draw(make())
    target = PARAMETERIZATIONS[name].target(x0, xt, level.alpha, level.sigma)
    expected = DEFINITIONS[name](x0, eps, level.alpha, level.sigma)
    assert_close(target, expected, rtol=1e-7, atol=1e-7)


@each
@each_schedule
def test_round_trip(make, name):
    """The estimate of the target is the data; through it any output converts to any other."""
    x0, eps, xt, level = draw(make())
    c = PARAMETERIZATIONS[name].coefficients(level.alpha, level.sigma)
    output = DEFINITIONS[name](x0, eps, level.alpha, level.sigma)
    estimate = c.c_skip * xt + c.c_out * output
    assert_close(estimate, x0, rtol=1e-7, atol=1e-7)
    for other, parameterization in PARAMETERIZATIONS.items():
        converted = parameterization.target(estimate, xt, level.alpha, level.sigma)
        expected = DEFINITIONS[other](x0, eps, level.alpha, level.sigma)
        assert_close(converted, expected, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5, 1), (5, 1, 1, 1)])
def test_coefficients_have_the_shape_of_the_times(name, dtype, shape):
    level = LogLinear().level(torch.rand(shape, dtype=dtype))
    for c in PARAMETERIZATIONS[name].coefficients(level.alpha, level.sigma):
        assert c.shape == shape and c.dtype == dtype


@each_schedule
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_has_unit_variance(make, sigma_data):
    """Input and target, at every t, for independent data of variance sigma_data^2."""
    level = make().level(uniform(50, F64))
    c = EDMPreconditioning(sigma_data).coefficients(level.alpha, level.sigma)
    ones = torch.ones_like(level.t)
    variance = level.alpha.square() * sigma_data**2 + level.sigma.square()
    assert_close(c.c_in.square() * variance, ones)
    # Var[(x_0 - c_skip (alpha x_0 + sigma eps)) / c_out]
    from_data = (1 - c.c_skip * level.alpha) * sigma_data
    from_noise = c.c_skip * level.sigma
    assert_close((from_data.square() + from_noise.square()) / c.c_out.square(), ones)
    # c_skip minimizes c_out: the target is uncorrelated with the state.
    covariance = sigma_data**2 * level.alpha - c.c_skip * variance
    assert_close(covariance, 0 * ones, rtol=0, atol=1e-9)


def test_edm_table():
    """c_in, c_skip and c_out of the paper at three noise levels."""
    sigma, data = torch.tensor([0.002, 1.0, 80.0], dtype=F64), 0.5
    c = EDMPreconditioning(data).coefficients(torch.ones_like(sigma), sigma)
    assert_close(c.c_in, 1 / (sigma**2 + data**2).sqrt())
    assert_close(c.c_skip, data**2 / (sigma**2 + data**2))
    assert_close(c.c_out, sigma * data / (data**2 + sigma**2).sqrt())


@each_schedule
@pytest.mark.parametrize("name", ["noise", "data", "v", "velocity", "score"])
def test_input_has_unit_variance(make, name):
    """For unit-variance data; the target of v has it too."""
    level = make().level(uniform(50, F64))
    c = PARAMETERIZATIONS[name].coefficients(level.alpha, level.sigma)
    ones = torch.ones_like(level.t)
    assert_close(c.c_in.square() * (level.alpha.square() + level.sigma.square()), ones)
    if name == "v":
        # v is the preconditioning of unit-variance data, up to the sign of the output.
        skip, out = EDMPreconditioning(1.0).skip_out(level.alpha, level.sigma)
        assert_close((c.c_skip, c.c_out), (skip, -out))


class Recorder(nn.Module):
    """An arbitrary smooth network that remembers what it was given."""

    def forward(self, x, log_snr):
        self.seen = x, log_snr
        return torch.tanh(x + 0.1 * log_snr[:, None]) + x.roll(1, -1)


@pytest.mark.parametrize("name", [n for n in PARAMETERIZATIONS if n != "score"])
@pytest.mark.parametrize(
    "other",
    [
        lambda: VarianceExploding(0.01, 50.0),
        lambda: KarrasSchedule(0.02, 60.0),
        lambda: Rectified(9.0, -9.0),
        lambda: Gauge(3.0),
    ],
    ids=["exploding", "karras", "rectified", "scaled"],
)
def test_backbone_sees_the_same_numbers_under_another_schedule(name, other):
    """A trained network changes schedule: only the log-SNR and the state in units of its scale matter.

    (Not so for the score, whose unit is that of the state.)
    """
    network, first, second = Recorder(), LogLinear(7.0, -7.0), other()
    t = torch.tensor([0.1, 0.4, 0.95], dtype=F64)
    u = second.time_of_log_snr(first.log_snr(t))
    scale = second.sigma(u) / first.sigma(t)
    x = torch.randn(3, 4, dtype=F64)
    results = []
    for schedule, xt, time in ((first, x, t), (second, scale[:, None] * x, u)):
        denoiser = GaussianDenoiser(network, GaussianProcess(schedule), PARAMETERIZATIONS[name])
        results.append((denoiser(xt, time).mean, *network.seen))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


@each
def test_coefficients_are_finite_over_every_schedule(name):
    for make in SCHEDULES.values():
        level = make().level(uniform(20).requires_grad_())
        for c in PARAMETERIZATIONS[name].coefficients(level.alpha, level.sigma):
            assert bool(torch.isfinite(c).all())
            if c.requires_grad:
                (gradient,) = torch.autograd.grad(c.sum(), level.t, retain_graph=True)
                assert bool(torch.isfinite(gradient).all())


@each
def test_value_objects(name):
    parameterization = PARAMETERIZATIONS[name]
    assert isinstance(parameterization, Parameterization)
    assert parameterization == dataclasses.replace(parameterization)
    assert type(parameterization).__name__ in repr(parameterization)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, 1e7, float("nan")])
def test_sigma_data(sigma_data):
    with pytest.raises(ValueError, match=r"^sigma_data: got .*expected a finite number >= 1e-06"):
        EDMPreconditioning(sigma_data)
