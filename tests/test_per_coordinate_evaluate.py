"""Likelihoods, their tables and plots, and checkpoints of a process whose scales differ by coordinate.

Data are independent normals, so marginals, divergences and the model's own density are known in closed form.
"""

import pytest
import torch
from per_coordinate import F64, MEAN, VARIANCE, PerCoordinate, alone, normal
from pyro.distributions import Normal

from pyro_diffusion.denoisers import Denoiser, VarianceDenoiser
from pyro_diffusion.evaluate import chain_costs, wasserstein_bound
from pyro_diffusion.schedules import optimal_grid, uniform
from pyro_diffusion.unwrapping import per_coordinate

PAIR = (0, 1)
close = torch.testing.assert_close


def data(count):
    return Normal(torch.tensor(MEAN, dtype=F64), VARIANCE**0.5).sample((count,))


def part(x, i):
    return x[..., i : i + 1]


# --- costs of steps ---------------------------------------------------------------------------------


class Rough(Denoiser):
    """The exact mean with a variance that differs by datum, which leaves no short cut."""

    def __init__(self, denoiser):
        super().__init__(denoiser.process)
        self.denoiser = denoiser

    def forward(self, xt, t, **context):
        exact = per_coordinate(self.denoiser(xt, t))
        return Normal(exact.mean, exact.stddev * (1 + xt.square())).to_event(1)


KINDS = {
    "a point mass": VarianceDenoiser,
    "a variance by coordinate": lambda denoiser: denoiser,
    "a variance by datum": Rough,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_costs_are_the_sum_of_the_costs_of_each_coordinate(make, monkeypatch):
    x, times, draw = data(7), uniform(5, F64), torch.randn
    noise = draw(3, 7, 2, dtype=F64)
    whole = parts = 0.0
    for i in (None, *PAIR):
        with monkeypatch.context() as patch:
            given = noise if i is None else part(noise, i)
            patch.setattr(torch, "randn", lambda *shape, given=given, **_: given)
            denoiser = make(normal() if i is None else alone(i))
            costs = chain_costs(denoiser, x if i is None else part(x, i), times, num_samples=3)
        ahead = costs[torch.ones_like(costs, dtype=torch.bool).triu(1)]
        if i is None:
            whole = ahead
        else:
            parts = parts + ahead
    close(whole, parts)


def test_costs_of_exact_normals_have_a_closed_form():
    """Over data, E m = v, so a step costs log(1 + g v) / 2 a coordinate.

    The mean of m over 20 000 data has the standard error v / 100. 15 numbers within 4.5 standard errors: a
    false alarm in 9000 runs.
    """
    process, times = PerCoordinate(), uniform(5, F64)
    snr = process.levels(times).log_snr.exp()
    variance = 1 / (1 / VARIANCE + snr)
    gain = snr.unsqueeze(1) - snr
    expected = 0.5 * torch.log1p(gain.clamp(min=0) * variance).sum(-1)
    found = chain_costs(normal(), data(20_000), times)
    ahead = torch.ones_like(found, dtype=torch.bool).triu(1)
    share = gain * variance / (1 + gain * variance)
    error = share.square().sum(-1).div(2 * 20_000).sqrt()
    assert ((found - expected).abs() < 4.5 * error)[ahead].all()
    assert len(optimal_grid(times, found, 3)) == 4


def test_a_bound_in_one_norm_asks_for_one_noise_level():
    with pytest.raises(ValueError, match="lacks one noise level for all coordinates"):
        wasserstein_bound(normal(), data(4))
