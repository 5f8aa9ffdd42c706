"""A process whose scales differ by coordinate: every part of the package follows its levels.

Its coordinates are independent in data and noise, so each is a process of one noise level: that one's
numbers, which other tests prove, are what is expected here.
"""

import pytest
import torch
from per_coordinate import F64, PerCoordinate, alone, normal
from torch.distributions import kl_divergence

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.processes import Ability, GaussianProcess
from pyro_diffusion.schedules import Cosine, uniform

PAIR = (0, 1)
close = torch.testing.assert_close


def split(x):
    return x[..., :1], x[..., 1:]


def joined(parts):
    return torch.cat(parts, -1)


def test_levels_are_those_of_each_coordinate():
    process, times = PerCoordinate(), uniform(8, F64)
    apart = [alone(i).process for i in PAIR]
    for get in (
        lambda p: p.levels(times),
        lambda p: p.level(times, torch.zeros(9, p.event_dim, dtype=F64)),
        lambda p: p.rates(times).level,
    ):
        level, parts = get(process), [get(p) for p in apart]
        for name in ("log_snr", "alpha", "sigma", "noise_to_signal", "tweedie"):
            close(getattr(level, name), joined([getattr(part, name) for part in parts]))
        assert level.t.shape == level.clock.shape == (9, 1) and level.alpha.shape == (9, 2)
    rates, parts = process.rates(times), [p.rates(times) for p in apart]
    for name in ("log_snr", "log_alpha", "diffusion"):
        close(getattr(rates, name), joined([getattr(part, name) for part in parts]))
    close(rates.clock, torch.full((9, 1), -20.0, dtype=F64))


def test_a_clock_leads_to_its_level():
    process, times = PerCoordinate(), uniform(8, F64)
    level = process.levels(times)
    for mine, theirs in zip(process.level_of_clock(level.clock.flatten()), level, strict=True):
        close(mine, theirs)


def test_levels_of_one_time_have_no_batch():
    assert PerCoordinate().level(0.3).alpha.shape == (2,)


def test_abilities():
    assert Ability.ISOTROPIC in GaussianProcess.abilities
    assert PerCoordinate.abilities == GaussianProcess.abilities - {Ability.ISOTROPIC}


def test_conditionals_are_those_of_each_coordinate():
    x0, xt = torch.randn(2, 5, 2, dtype=F64)
    s, t = torch.rand(2, 5, dtype=F64).sort(0).values
    for call in (
        lambda p, x0, xt: p.marginal(x0, t),
        lambda p, x0, xt: p.transition(xt, s, t),
        lambda p, x0, xt: p.bridge(xt, x0, s, t),
        lambda p, x0, xt: p.bridge(xt, x0, s, t, eta=0.4),
        lambda p, x0, xt: p.prior(x0.shape[-1:], F64),
    ):
        whole = call(PerCoordinate(), x0, xt)
        parts = [
            call(alone(i).process, a, b) for i, a, b in zip(PAIR, split(x0), split(xt), strict=True)
        ]
        close(whole.mean, joined([p.mean for p in parts]))
        close(whole.variance, joined([p.variance for p in parts]))
    values = torch.randn(3, dtype=F64)
    whole = PerCoordinate().coordinate_log_likelihood(xt, values, t)
    parts = [
        alone(i).process.coordinate_log_likelihood(b, values, t)
        for i, b in zip(PAIR, split(xt), strict=True)
    ]
    close(whole, torch.cat(parts, -2))


def test_marginals_of_marginals_are_marginals():
    # Chapman-Kolmogorov in both directions, by the moments of linear Gaussian steps.
    process, x0 = PerCoordinate(), torch.randn(4, 2, dtype=F64)
    s, t = (process.level(v, x0) for v in (0.3, 0.8))
    direct = process.marginal(x0, t)
    step = process.transition(process.marginal(x0, s).mean, s, t)
    ratio = t.alpha / s.alpha
    close(step.mean, direct.mean)
    close(step.variance + ratio**2 * s.sigma**2, direct.variance)
    for eta in (0.0, 0.5, 1.0):
        back = process.bridge(direct.mean, x0, s, t, eta)
        weight = process.coefficients(s, t, eta).xt
        close(back.mean, process.marginal(x0, s).mean)
        close(back.variance + weight**2 * t.sigma**2, process.marginal(x0, s).variance)


def test_the_exact_posterior_and_its_reverse_kernel():
    xt, t = torch.randn(6, 2, dtype=F64), torch.rand(6, dtype=F64)
    posterior = normal()(xt, t)
    parts = [alone(i)(b, t) for i, b in zip(PAIR, split(xt), strict=True)]
    close(posterior.mean, joined([p.mean for p in parts]))
    close(posterior.variance, joined([p.variance for p in parts]))
    whole = normal().process.reverse(xt, posterior, t / 2, t)
    for i, b in zip(PAIR, split(xt), strict=True):
        kernel = alone(i).process.reverse(b, parts[i], t / 2, t)
        close(whole.mean[..., i : i + 1], kernel.mean)
        close(whole.variance[..., i : i + 1], kernel.variance)
    assert kl_divergence(whole, whole).abs().max() < 1e-12


def changed(**changes):
    """A process whose scales are spoilt: functions of the level and the right result, by field."""

    class Spoilt(PerCoordinate):
        def scales(self, level):
            right = super().scales(level)
            return right._replace(**{k: f(level, right) for k, f in changes.items()})

    return Spoilt()


def rising(level, right):
    return torch.stack([right.log_snr[..., 0], -right.log_snr[..., 1]], -1)


SPOILT = {
    "squared noise": (
        {"sigma": lambda _, right: right.sigma**2},
        "off that of its alpha and sigma",
    ),
    "halved signal": ({"alpha": lambda _, right: right.alpha / 2}, "off that of its alpha"),
    "negative signal": (
        {"alpha": lambda _, right: -right.alpha},
        "got alpha from -.* finite numbers >= 0",
    ),
    "shifted log-SNR": ({"log_snr": lambda _, right: right.log_snr + 1}, "1 off that of its alpha"),
    "no event": ({"alpha": lambda level, _: level.alpha.squeeze(-1)}, "got alpha of shape"),
    "NaN": ({"sigma": lambda _, right: right.sigma * torch.nan}, "got sigma from nan"),
    "double": ({"alpha": lambda _, right: right.alpha.double()}, "got alpha in torch.float64"),
    "a number": ({"sigma": lambda *_: 0.5}, "expected a Level of tensors"),
    "rising": (
        {
            "log_snr": rising,
            "alpha": lambda *args: torch.sigmoid(rising(*args)).sqrt(),
            "sigma": lambda *args: torch.sigmoid(-rising(*args)).sqrt(),
        },
        "log-SNR of Spoilt that does not decrease",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_scales_that_are_none_are_refused(name):
    changes, message = SPOILT[name]
    for door in (
        lambda p: p.check_grid(uniform(4, F64)),
        lambda p: p.finite_clock_ends(),
        lambda p: MixtureDenoiser(p, torch.ones(1), torch.zeros(1, 2), 1.0),
        lambda p: p.prior((2,)),
    ):
        with pytest.raises(ValueError, match=message):
            door(changed(**changes))


def test_events_are_those_of_the_scales():
    with pytest.raises(ValueError, match=r"event_shape: got \(3,\), expected one that the scales"):
        PerCoordinate().check_event((3,))
    with pytest.raises(ValueError, match="scales: got an attribute of one process"):
        GaussianProcess(Cosine()).scales = lambda level: level
