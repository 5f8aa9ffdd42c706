"""Denoisers under a process whose scales differ by coordinate: networks get one clock, formulas the scales.

A network that works on every coordinate by itself gives each coordinate what it gives it under a process of
one noise level, if it is told the same clock there.
"""

import pytest
import torch
from pyro.distributions import Normal
from torch.testing import assert_close

from pyro_diffusion.denoisers import (
    NPR,
    SN,
    Data,
    Denoiser,
    EDMPreconditioning,
    EstimatedVariance,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    Noise,
    Score,
    TimeVariance,
    V,
    VarianceDenoiser,
    Velocity,
    analytic_variance,
    residual_variance,
    uniform_levels,
    unit_variance,
)
from pyro_diffusion.unwrapping import per_coordinate
from tests.per_coordinate import F64, MEAN, RATES, SHIFTS, VARIANCE, PerCoordinate, alone, normal

PAIR = (0, 1)
PARAMETERIZATIONS = [Data(), Noise(), V(), Score(), Velocity(), EDMPreconditioning(0.7)]
each_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=repr)


class Elementwise(torch.nn.Module):
    """Numbers of each coordinate and of the pair's clock, from whichever clock the network is told."""

    def __init__(self, outputs, coordinate=None):
        super().__init__()
        self.outputs, self.coordinate = outputs, coordinate

    def forward(self, x, log_snr, **context):
        clock, gain = log_snr, torch.tensor([0.7, -0.4], dtype=x.dtype)
        if self.coordinate is not None:
            clock = (log_snr - SHIFTS[self.coordinate]) / RATES[self.coordinate]
            gain = gain[self.coordinate]
        shown = context.get("noise", torch.zeros_like(x))
        out = torch.sin(gain * x + 0.1 * clock.unsqueeze(-1) + 0.3 * shown)
        parts = torch.stack([out * (k + 1) for k in range(self.outputs)], -1)
        return parts[..., 0] if self.outputs == 1 else parts


def knots(coordinate=None):
    clock = torch.tensor([-9.0, -2.0, 0.5, 8.0], dtype=F64)
    return clock if coordinate is None else RATES[coordinate] * clock + SHIFTS[coordinate]


LOG_RATIO = torch.tensor([0.3, -1.0, -2.0, 0.1], dtype=F64)
VARIANCES = {
    "none": lambda i: None,
    "learned": lambda i: LearnedVariance(),
    "time": lambda i: TimeVariance(knots(i), LOG_RATIO),
    "estimated": lambda i: EstimatedVariance(
        knots(i), (LOG_RATIO - torch.nn.functional.softplus(knots(i))).exp()
    ),
}


def check_pair(build):
    """``build(process, coordinate)`` makes a denoiser of the pair, and of each coordinate alone."""
    xt, t = torch.randn(6, 2, dtype=F64), torch.linspace(0.02, 1, 6, dtype=F64)
    pair = per_coordinate(build(PerCoordinate(), None)(xt, t))
    for i in PAIR:
        one = per_coordinate(build(alone(i).process, i)(xt[:, i : i + 1], t))
        for name in ("mean", "variance"):
            assert_close(getattr(pair, name)[:, i : i + 1], getattr(one, name))


@each_parameterization
@pytest.mark.parametrize("variance", VARIANCES)
def test_gaussian_denoisers(parameterization, variance):
    def build(process, i):
        own = VARIANCES[variance](i)
        network = Elementwise(1 + (0 if own is None else own.outputs), i)
        return GaussianDenoiser(network, process, parameterization, own)

    check_pair(build)


@each_parameterization
def test_the_target_of_a_network_gives_the_data_back(parameterization):
    process, x0 = PerCoordinate(), torch.randn(6, 2, dtype=F64)
    level = process.level(torch.linspace(0.02, 1, 6, dtype=F64), x0)
    eps = torch.randn_like(x0)
    xt = level.alpha * x0 + level.sigma * eps
    target = parameterization.target(x0, xt, level.alpha, level.sigma)
    skip, out = parameterization.skip_out(level.alpha, level.sigma)
    assert_close(skip * xt + out * target, x0)
    expected = {"Noise": eps, "Score": -eps / level.sigma, "Data": x0, "Velocity": eps - x0}
    if (name := type(parameterization).__name__) in expected:
        assert_close(target, expected[name])


HEADS = {
    "time": lambda i: TimeVariance(knots(i), LOG_RATIO),
    "learned": lambda i: LearnedVariance(),
    "npr": lambda i: NPR(),
    "sn": lambda i: SN(largest=0.6),
    "sn skip": lambda i: SN(skip=True),
    "function": lambda i: unit_variance,
}


@pytest.mark.parametrize("show_noise", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_variances_of_a_given_mean(head, show_noise):
    def build(process, i):
        variance = HEADS[head](i)
        network = Elementwise(1, i) if getattr(variance, "outputs", 0) else None
        base = normal() if i is None else alone(i)
        return VarianceDenoiser(base, variance, network, show_noise=show_noise)

    check_pair(build)


@pytest.mark.parametrize("head", [NPR(), SN(), SN(skip=True)], ids=["npr", "sn", "sn skip"])
def test_an_exact_head_has_the_posteriors_variance(head):
    """With the exact moment of the noise as its output, the head's variance is Var[x_0 | x_t]."""
    exact, xt = normal(), torch.randn(6, 2, dtype=F64)
    level = exact.process.level(torch.linspace(0.1, 0.9, 6, dtype=F64), xt)
    posterior = exact(xt, level)
    noise = (xt - level.alpha * posterior.mean) / level.sigma
    # Var[eps | x_t] = Var[x_0 | x_t] alpha^2 / sigma^2.
    spread = posterior.variance / level.noise_to_signal**2
    moment = spread if isinstance(head, NPR) or head.skip else spread + noise**2
    output = (moment / (head.unit(level) if isinstance(head, NPR) else 1)).log()
    if getattr(head, "skip", False):
        output = (spread / torch.sigmoid(level.log_snr)).log()
    assert_close(head(output, level, noise), posterior.variance)


def test_levels_denoisers():
    values = uniform_levels(5).double()

    def build(process, i):
        return LevelsDenoiser(Elementwise(5, i), process, values)

    check_pair(build)


# Variances that are measured.


class Normals(Denoiser):
    """The exact posterior of independent normals of mean 0 and of several variances."""

    variances = torch.tensor([4.0, 1.0], dtype=F64)

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        total = level.alpha**2 * self.variances + level.sigma**2
        mean = level.alpha * self.variances / total * xt
        return Normal(mean, (self.variances * level.sigma**2 / total).sqrt()).to_event(1)


class Apart(PerCoordinate):
    """Where the first coordinate is nearly noise, the second is nearly data."""

    def __init__(self):
        super().__init__()
        self.rate, self.shift = (torch.tensor(v, dtype=F64) for v in ((1.0, 1.0), (-6.0, 6.0)))


@pytest.mark.parametrize("estimate", [analytic_variance, residual_variance])
@pytest.mark.parametrize("apart", [False, True])
def test_measured_variances(estimate, apart):
    """In the ratio to unit data's, they are averages of the coordinates' exact variances.

    Of exact means, by z-tests at five standard errors at 7 levels: false alarms below 5e-6 a run.
    """
    denoiser = Normals(Apart()) if apart else normal()
    own = denoiser.variances if apart else torch.tensor(VARIANCE, dtype=F64)
    mean = torch.zeros(2, dtype=F64) if apart else torch.tensor(MEAN, dtype=F64)
    data = mean + own.sqrt() * torch.randn(40_000, 2, dtype=F64)
    clock = torch.linspace(-9, 9, 7, dtype=F64)
    found = estimate(denoiser, data, knots=clock)
    level = denoiser.process.level_of_clock(clock)
    exact = own * level.sigma**2 / (own * level.alpha**2 + level.sigma**2)
    truth = (exact / unit_variance(level)).mean(-1) * torch.sigmoid(-clock)
    assert ((found.value - truth).abs() < 5 * found.standard_error).all()
    # The variance of each coordinate is the same multiple of that of unit data.
    wrapped = VarianceDenoiser(denoiser, found)(torch.zeros(7, 2, dtype=F64), level).variance
    multiple = (found.value / torch.sigmoid(-clock))[:, None]
    assert_close(wrapped, multiple * unit_variance(level), rtol=1e-5, atol=0)
