"""Closed-form statistics of sets of rows, which summaries of sets are given."""

import math

import pytest
import torch
from torch import nn

from pyro_diffusion.infer.simulators.moments import Moments
from pyro_diffusion.nn import SetEncoder
from pyro_diffusion.nn.regressions import (
    PRIOR,
    between,
    regression_size,
    regressions,
    residual_means,
    scatter,
)


def sets_of(slopes, intercepts, rows, noise=0.0):
    """Rows of (x, y) in sets, y linear in x."""
    x = torch.randn(len(intercepts), rows, dtype=torch.float64)
    y = intercepts.unsqueeze(-1) + slopes * x + noise * torch.randn_like(x)
    return torch.stack([x, y], -1)


def test_scatter_is_that_of_the_present_rows():
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    present = torch.arange(6) < torch.tensor([[6], [4], [0]])
    x = torch.where(present.unsqueeze(-1), x, 0.0)
    found, freedom = scatter(x, present.unsqueeze(-1))
    assert freedom.tolist() == [5, 3, 0]
    for k, n in enumerate((6, 4)):
        assert torch.allclose(found[k], torch.cov(x[k, :n].T) * (n - 1))
    assert torch.equal(found[2], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_regressions_are_the_factors_of_the_covariance(size):
    x = torch.randn(4, 20, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    products, freedom = scatter(x, torch.ones(4, 20, 1, dtype=torch.bool))
    found = regressions(products, freedom)
    assert found.shape == (4, regression_size(size))
    shrunk = (products + PRIOR * torch.eye(size)) / (freedom + PRIOR)[:, None, None]
    factor = torch.linalg.cholesky(shrunk)
    sds = factor.diagonal(dim1=-2, dim2=-1)
    unit = factor / sds.unsqueeze(-2)
    below = [unit[:, i, j] for j in range(size) for i in range(j + 1, size)]
    expected = torch.stack([*(b.clamp(-10, 10) for b in below), *sds.log().unbind(-1)], -1)
    assert torch.allclose(found, expected, atol=1e-9)


def test_regressions_find_slope_and_noise():
    x = sets_of(1.7, torch.zeros(1), 4000, noise=0.2)
    slope, _, log_noise = regressions(*scatter(x, torch.ones(1, 4000, 1, dtype=torch.bool)))[0]
    assert abs(slope - 1.7) < 5 * 0.2 / math.sqrt(4000)
    assert abs(log_noise.exp() / 0.2 - 1) < 5 / math.sqrt(8000)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_sets_of_few_rows_have_finite_statistics_and_gradients(rows):
    x = (1e4 * torch.randn(3, 4, 2)).requires_grad_()
    present = (torch.arange(4) < rows).expand(3, 4)
    moments = Moments.of(torch.where(present.unsqueeze(-1), x, 0.0), present)
    pooled = moments.pooled()
    means = residual_means(moments.mean, pooled.scatter, pooled.freedom)
    parts = [moments.features(), between(means, moments.number)]
    assert all(bool(part.isfinite().all()) for part in parts)
    sum(part.sum() for part in parts).backward()
    assert bool(x.grad.isfinite().all())
    assert not bool(x.grad[~present].any())


def test_what_differs_between_sets_is_found():
    """Intercepts of sets whose rows are on lines of one slope, their mean and their sd."""
    intercepts = torch.randn(400, dtype=torch.float64) * 0.6 + 1.0
    x = sets_of(-0.8, intercepts, 5)
    present = torch.arange(5) < torch.randint(2, 6, (400, 1))
    moments = Moments.of(torch.where(present.unsqueeze(-1), x, 0.0), present)
    pooled = moments.pooled()
    means = residual_means(moments.mean, pooled.scatter, pooled.freedom)
    assert torch.allclose(means[:, 1], intercepts, atol=1e-3)
    found = between(means, moments.number)
    alike, by_rows, inverse = found[:4], found[4:8], found[8]
    assert torch.allclose(alike[1], intercepts.mean(), atol=1e-3)
    assert torch.allclose(alike[3], intercepts.std().log(), atol=1e-3)
    count = moments.number
    centre = (count * intercepts).sum() / count.sum()
    freedom = count.sum() - count.square().sum() / count.sum()
    spread = (count * (intercepts - centre).square()).sum() / freedom
    assert torch.allclose(by_rows[1], centre, atol=1e-3)
    assert torch.allclose(by_rows[3], 0.5 * spread.log(), atol=1e-3)
    assert torch.allclose(inverse, (1 / count).mean())


def test_the_summary_of_few_numbers_sees_regressions_and_of_many_none():
    few, many = SetEncoder(8, features=4, width=8), SetEncoder(9, features=4, width=8)
    assert few.skip.in_features == 8 + 16 + 2 + 36
    assert many.skip.in_features == 9 + 16 + 2
    encoder = SetEncoder(2, features=1, width=8)
    nn.init.zeros_(encoder.rho[-1].weight)
    nn.init.zeros_(encoder.rho[-1].bias)
    nn.init.zeros_(encoder.skip.weight)
    nn.init.zeros_(encoder.skip.bias)
    with torch.no_grad():
        encoder.skip.weight[0, -3] = 1.0  # the slope of y on x
    x = sets_of(1.3, torch.randn(6).double(), 30).float()
    assert torch.allclose(encoder(x), torch.full((6, 1), 1.3), atol=5e-3)
