"""A process whose scales differ by coordinate: every part of the package follows its levels.

Its coordinates are independent in data and noise, so each is a process of one noise level: that one's
numbers, which other tests prove, are what is expected here.
"""

import torch
from per_coordinate import F64, PerCoordinate, alone, normal
from torch.distributions import kl_divergence

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


def test_grids_are_checked_in_every_coordinate():
    class Rising(PerCoordinate):
        def scales(self, level):
            level = super().scales(level)
            flat = torch.stack([level.log_snr[..., 0], -level.log_snr[..., 1]], -1)
            return level._replace(log_snr=flat)

    try:
        Rising(Cosine()).check_grid(uniform(4, F64))
    except ValueError as error:
        assert "log-SNR of Rising that does not decrease" in str(error)
    else:
        raise AssertionError
