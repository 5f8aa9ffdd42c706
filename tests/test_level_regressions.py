"""The linear parts of guides of plates of rows: what they regress on, and what they know without training."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Normal
from torch import nn

from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.infer.simulators.conditional_posterior import default_denoiser
from pyro_diffusion.infer.simulators.linear_regression import Column, LinearlyRegressed
from pyro_diffusion.infer.simulators.thinned_rows import _ragged

NOISE, GROUPS, DATA = 0.7, 20, 10


def grouped(x=None, mask=None, groups=GROUPS, data=DATA):
    """Means of groups around a common one, each seen through some data."""
    if x is not None:
        groups, data = x.shape[-2:]
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    with pyro.plate("groups", groups, dim=-2):
        local = pyro.sample("local", Normal(mean, 1.0))
        kept = poutine.mask(mask=True if mask is None else mask)
        with pyro.plate("data", data, dim=-1), kept:
            pyro.sample("x", Normal(local, NOISE), obs=x)


def deep(curve=None, y=None, x=None):
    """Three plates of rows in each other, with data of every level; curves have an encoder."""
    mean = pyro.sample("mean", Normal(0.0, 1.0))
    pyro.sample("whole", Normal(mean, 1.0))
    with pyro.plate("a", 5, dim=-3):
        first = pyro.sample("first", Normal(mean, 1.0))
        pyro.sample("curve", Normal(first.unsqueeze(-1), torch.ones(4)).to_event(1), obs=curve)
        with pyro.plate("b", 4, dim=-2):
            second = pyro.sample("second", Normal(first, 1.0))
            pyro.sample("y", Normal(second, 1.0), obs=y)
            with pyro.plate("c", 3, dim=-1):
                pyro.sample("x", Normal(second.unsqueeze(-1), torch.ones(2)).to_event(1), obs=x)


def test_columns_are_what_the_contexts_have():
    """Counts change with masks alone, values with data but not with weights, learned features with both."""
    pyro.set_rng_seed(0)
    encoders = {"curve": nn.Sequential(nn.Flatten(), nn.Linear(4, 3))}
    guide = AutoAmortized(deep, observed=["whole", "curve", "y", "x"], encoders=encoders)
    table = guide.simulate(200)
    posterior, batch = guide.posterior, torch.Size([200])
    rows, latents = guide._rows(table, batch, {}), guide._latent_rows(table, batch)
    table = {name: x[torch.randperm(200)] for name, x in table.items()}
    other = guide._rows(table, batch, {})
    other_latents = guide._latent_rows(table, batch)
    for i in posterior.latent_levels():
        columns = posterior.columns.given(i) + posterior.columns.row(i)
        assert isinstance(posterior.levels[i].denoiser, LinearlyRegressed)
        with torch.no_grad():
            given = posterior.given(i, latents, posterior.contexts(rows)[i])
            changed = posterior.given(i, other_latents, posterior.contexts(other)[i])
            for parameter in posterior.parameters():
                nn.init.normal_(parameter, std=0.2)
            relearned = posterior.given(i, latents, posterior.contexts(rows)[i])
        assert given.shape[-1] == len(columns)
        for k, column in enumerate(columns):
            same = torch.equal(given[..., k], changed[..., k])
            relearns = not torch.equal(given[..., k], relearned[..., k])
            assert same == (column is Column.COUNT)
            assert relearns == (column is Column.LEARNED)


def test_values_weigh_by_counts_and_variances_follow_them():
    """A mean of n data drawn to another: E[z] = (n m + u) / (n + 1), Var[z] = 1 / (n + 1), of every n.

    Regressions on 40,000 rows err by .02 of the sd at most here, and the least rows are the surest.
    """
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(0, 11, (40_000,), generator=generator).double()
    u, z = torch.randn(2, 40_000, generator=generator).double()
    z = u + z
    noise = torch.randn(40_000, generator=generator).double()
    m = torch.where(n > 0, z + noise / n.clamp(min=1).sqrt(), 0.0)
    columns = [Column.VALUE, Column.LEARNED, Column.VALUE, Column.COUNT, Column.COUNT]
    y = torch.stack([u, torch.full_like(u, math.nan), m, n.log1p(), 1 / (1 + n)], -1)
    denoiser = LinearlyRegressed(default_denoiser(1, 5), 1, columns).double()
    denoiser.fit(z.unsqueeze(-1), y)
    n = torch.arange(1.0, 11.0).double()
    for u, m in ((0.0, 0.0), (1.0, 3.0), (-2.0, 1.0)):
        y = torch.stack([u + 0 * n, 0 * n, m + 0 * n, n.log1p(), 1 / (1 + n)], -1)
        counts = denoiser._counts(y)
        mean = (denoiser._features(y, counts) @ denoiser.slopes * denoiser.basis).squeeze(-1)
        variance = denoiser.variances * (counts @ denoiser.widths).exp().squeeze(-1)
        assert ((mean - (n * m + u) / (n + 1)).abs() * (n + 1).sqrt()).max() < 0.1
        assert (variance * (n + 1) - 1).abs().max() < 0.05


def test_values_need_not_be_centred():
    """As logarithms of sds are not: z is normal about v + 2, of v with mean -2.

    Errors of the mean on 4000 rows are .016 of the sd times less than 2 at these values, bounds 5 times that.
    """
    generator = torch.Generator().manual_seed(0)
    v, noise = torch.randn(2, 4000, generator=generator).double()
    n = torch.randint(0, 11, (4000,), generator=generator).double()
    denoiser = LinearlyRegressed(default_denoiser(1, 2), 1, [Column.VALUE, Column.COUNT]).double()
    denoiser.fit((v + noise).unsqueeze(-1), torch.stack([v - 2, n.log1p()], -1))
    y = torch.cartesian_prod(torch.tensor([-2.0, -1.0]), torch.arange(11.0).log1p()).double()
    mean = denoiser._features(y, denoiser._counts(y)) @ denoiser.slopes @ denoiser.basis.mT
    assert (mean.squeeze(-1) - y[:, 0] - 2).abs().max() < 0.16


def test_rows_weigh_by_their_variances():
    """Of sds exp(c), c a standard normal, of 4000 rows: coefficients are off by (5 / (4000 e^2))^1/2 = .013
    without c, by .006 with it; bounds are 5 times that.

    Rows that count alike make them e^2 times larger and more, and what is left of the surest looks heavy.
    """
    generator = torch.Generator().manual_seed(0)
    v, c, noise = torch.randn(3, 4000, generator=generator).double()
    denoiser = LinearlyRegressed(default_denoiser(1, 2), 1, [Column.VALUE, Column.COUNT]).double()
    denoiser.fit((v + c.exp() * noise).unsqueeze(-1), torch.stack([v, c], -1))
    wrong = (denoiser.slopes @ denoiser.basis.mT).squeeze(-1) - torch.tensor([1.0, 0, 0, 0])
    assert (wrong.abs() < torch.tensor([0.065, 0.03, 0.03, 0.065])).all()


def test_variances_that_depend_on_more_than_counts_have_no_linear_part():
    """Of sds that vary by half the kurtosis is 3 exp(4 .5^2) = 8; of one, 3 within .1 (4 standard errors)."""
    generator = torch.Generator().manual_seed(0)
    m, noise, spread = torch.randn(3, 40_000, generator=generator).double()
    n = torch.randint(0, 11, (40_000,), generator=generator).double()
    for width in (0.0, 0.5):
        denoiser = LinearlyRegressed(default_denoiser(1, 2), 1, [Column.VALUE, Column.COUNT])
        z = m + (width * spread).exp() * noise
        denoiser.double().fit(z.unsqueeze(-1), torch.stack([m, n.log1p()], -1))
        assert bool(denoiser.slopes.any()) == (width == 0)
        assert width == 0 or not denoiser.widths.any()


@pytest.mark.parametrize("groups", [1, 7, 20])
def test_normal_groups_are_right_without_training(groups):
    """Groups' means three predictive sds and more from the others, within .3 posterior sd, sds 10%."""
    pyro.set_rng_seed(groups)
    guide = AutoAmortized(grouped, observed=["x"], solver=ODESolver("midpoint", steps=32))
    guide.simulate(4000)
    x = torch.randn(groups, 1) + NOISE * torch.randn(groups, DATA)
    x[0] += 3.0
    mask = torch.arange(DATA) < torch.linspace(DATA, 1, groups).round().unsqueeze(-1)
    posterior = guide.get_posterior(x, mask)
    draws = posterior.sample((2000,)).double()
    count = mask.sum(-1).double()
    average = (x * mask).sum(-1) / count
    centre, own = draws[:, :1], 1 / (count / NOISE**2 + 1)
    # given the common mean as it was drawn, so that only the rows' law is looked at
    off = (draws[:, 1:] - own * (count * average / NOISE**2 + centre)) / own.sqrt()
    assert off.mean(0).abs().max() < 0.3
    assert (off.std(0) - 1).abs().max() < 0.1


def test_half_of_the_sets_in_training_are_full():
    """Of 2000 simulations of 30 sets: 1/2 + 1/2 P(full | drawn), less empty ones, within 5 errors (6e-7).

    A size drawn evenly in its logarithm from 1 to 9 is 9 by log(10/9) / log(10).
    """
    pyro.set_rng_seed(0)
    share = _ragged(torch.ones(2000, 30, 9, dtype=torch.bool)).all(-1).double().mean(-1)
    expected = 0.95 * (1 + math.log(10 / 9) / math.log(10)) / 2
    assert abs(share.mean() - expected) < 5 * share.std() / math.sqrt(2000)
    assert share.min() < 0.2 and share.max() == 1
