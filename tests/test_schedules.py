"""Schedules against their published closed forms, and the SDE coefficients against autograd."""

import copy
import math
import pickle

import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.schedules import (
    EDM,
    Cosine,
    Level,
    LinearBeta,
    LogLinear,
    Rectified,
    Schedule,
    TabulatedBetas,
    VarianceExploding,
    VariancePreserving,
    uniform,
)
from pyro_diffusion.schedules.base import Grid, log_expm1
from tests.exact import BETAS, DTYPES, SCHEDULES

# torch's forward-mode machinery compiles some rules of its own when it is first used.
F64 = torch.float64
# Inside, and off the knots of the table, where its slope jumps.
# The middle is where a curve in two pieces has its seam.
INSIDE = torch.cat([torch.linspace(0.003, 0.996, 56, dtype=F64), torch.tensor([0.5], dtype=F64)])
INSIDE = INSIDE.sort().values

each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


# Contract


@each_schedule
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_shapes_and_dtypes(make, dtype, shape):
    schedule, t = make(), torch.rand(shape, dtype=dtype)
    level = schedule.level(t)
    functions = (schedule.log_snr, schedule.alpha, schedule.sigma)
    for value in (*level, *(f(t) for f in functions)):
        assert value.shape == shape and value.dtype == dtype
        assert bool(torch.isfinite(value).all())
    assert level.clock is level.log_snr
    for value, f in zip(level[2:], functions, strict=True):
        assert_close(value, f(t), rtol=0, atol=0)
    assert schedule.time_of_log_snr(level.log_snr).dtype == dtype
    # Elementwise: no entry knows of the others.
    if shape == (2, 3):
        assert_close(schedule.log_snr(t)[1, 2], schedule.log_snr(t[1, 2]))


@each_schedule
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_shapes_and_dtypes_of_the_sde(make, dtype, shape):
    schedule, t = make(), torch.rand(shape, dtype=dtype)
    for f in (schedule.f, schedule.g2, schedule.log_snr_slope):
        assert f(t).shape == shape and f(t).dtype == dtype
        assert bool(torch.isfinite(f(t)).all())
        assert_close(f(t)[0], f(t[:1])[0])
        assert f(t.flatten()[0]).shape == ()


@each_schedule
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_order_and_ratio(make, dtype):
    schedule, t = make(), uniform(1000, dtype)
    level = schedule.level(t)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert float(level.log_snr[0]) == pytest.approx(schedule.log_snr_max, abs=tolerance)
    assert float(level.log_snr[-1]) == pytest.approx(schedule.log_snr_min, abs=tolerance)
    assert bool((level.log_snr.diff() < 0).all())
    assert bool((level.alpha.diff() <= 0).all()) and bool((level.sigma.diff() >= 0).all())
    assert_close(2 * (level.alpha.log() - level.sigma.log()), level.log_snr, rtol=0, atol=2e-5)


@each_schedule
def test_float32_follows_float64(make):
    schedule, t = make(), torch.rand(200)
    low, high = schedule.level(t), schedule.level(t.double())
    assert_close(low.log_snr.double(), high.log_snr, rtol=0, atol=5e-5)
    assert_close(low.sigma.double(), high.sigma, rtol=5e-5, atol=0)


@each_schedule
def test_copies(make):
    schedule = make()
    loaded = make()
    loaded.load_state_dict(schedule.state_dict())
    for other in (loaded, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        for a, b in zip(schedule.level(INSIDE), other.level(INSIDE), strict=True):
            assert torch.equal(a, b)
    assert schedule.double() is schedule
    assert f"log_snr_max={schedule.log_snr_max:g}" in repr(schedule)


def test_level_accepts_numbers_and_integers():
    schedule = Cosine()
    assert schedule.level(0.5).log_snr.dtype == torch.get_default_dtype()
    assert float(schedule.level(0.5).log_snr) == pytest.approx(0, abs=1e-6)
    assert_close(schedule.level(torch.tensor([0, 1])).log_snr, torch.tensor([10.0, -10.0]))
    for bad in (-0.1, 1.1, math.nan, 500):
        with pytest.raises(ValueError, match=r"^t: got times from"):
            schedule.level(bad)
    schedule.level(torch.tensor(1.1), check=False)


def test_level_indexing():
    level = Cosine().level(torch.rand(5, 4))
    assert [x.shape for x in level.at(2)] == [(4,)] * 5
    assert torch.equal(level.at(slice(1, 3)).alpha, level.alpha[1:3])
    wide = level.unsqueeze(2)
    assert [x.shape for x in wide] == [(5, 4, 1, 1)] * 5
    assert torch.equal(wide.sigma[..., 0, 0], level.sigma)
    assert level.unsqueeze(0) is level
    scalar = Cosine().level(0.5)
    assert scalar.unsqueeze(3) is scalar


# Algebra


@each_schedule
@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse(make, dtype):
    schedule, t = make(), uniform(333, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert_close(schedule.time_of_log_snr(schedule.log_snr(t)), t, rtol=0, atol=tolerance)
    log_snr = torch.linspace(schedule.log_snr_min, schedule.log_snr_max, 99, dtype=dtype)
    back = schedule.log_snr(schedule.time_of_log_snr(log_snr))
    assert_close(back, log_snr, rtol=0, atol=3e-4 if dtype == torch.float32 else 1e-9)
    beyond = torch.tensor([schedule.log_snr_max + 1, schedule.log_snr_min - 1], dtype=dtype)
    assert schedule.time_of_log_snr(beyond).tolist() == [0, 1]


def derivative(function, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad((function(t) + 0 * t).sum(), t)[0]


@each_schedule
def test_sde_coefficients_are_derivatives(make):
    """f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2."""
    schedule = make()
    f = derivative(lambda t: schedule.alpha(t).log(), INSIDE)
    sigma2 = schedule.sigma(INSIDE).square()
    g2 = derivative(lambda t: schedule.sigma(t).square(), INSIDE) - 2 * f * sigma2
    assert_close(schedule.f(INSIDE), f, rtol=1e-9, atol=1e-9)
    assert_close(schedule.g2(INSIDE), g2, rtol=1e-9, atol=1e-9)
    assert_close(schedule.log_snr_slope(INSIDE), derivative(schedule.log_snr, INSIDE))
    assert bool((schedule.g2(INSIDE) > 0).all())


@each_schedule
def test_gradient_is_finite_at_the_ends(make):
    schedule = make()
    for function in (schedule.log_snr, schedule.alpha, schedule.sigma, schedule.f, schedule.g2):
        assert bool(torch.isfinite(derivative(function, uniform(10))).all())


@pytest.mark.parametrize("name", ["cosine", "cosine shifted", "linear beta", "log linear", "table"])
def test_variance_preserving_gauge(name):
    schedule = SCHEDULES[name]()
    assert isinstance(schedule, VariancePreserving)
    level = schedule.level(INSIDE)
    assert_close(level.alpha.square() + level.sigma.square(), torch.ones_like(INSIDE))
    # dx = -beta/2 x dt + sqrt(beta) dw
    assert_close(schedule.g2(INSIDE), -2 * schedule.f(INSIDE))


# Exact: the published closed forms


@pytest.mark.parametrize("shift", [0.0, -math.log(4.0)])
def test_cosine(shift):
    """alpha / sigma = e^shift cot(pi u / 2) at u from start to stop (arXiv 2301.11093)."""
    schedule = Cosine(7.0, -6.0, shift=shift)
    start, stop = (
        2 / math.pi * math.atan(math.exp(shift) / math.exp(end / 2)) for end in (7.0, -6.0)
    )
    u = start + (stop - start) * INSIDE
    ratio = math.exp(shift) * torch.cos(math.pi * u / 2) / torch.sin(math.pi * u / 2)
    level = schedule.level(INSIDE)
    assert_close(level.alpha / level.sigma, ratio)
    if shift == 0:
        assert_close(level.alpha, torch.cos(math.pi * u / 2))
        assert_close(schedule.f(INSIDE), -math.pi / 2 * torch.tan(math.pi * u / 2) * (stop - start))


def test_linear_beta():
    """The VP-SDE: alpha^2 = exp(-integral of beta), f = -beta / 2, g^2 = beta (arXiv 2011.13456)."""
    low, high = 0.2, 15.0
    schedule = LinearBeta(low, high, log_snr_max=8.0)
    decay = math.log1p(math.exp(-8.0))  # -log alpha^2 at the start
    start = (-low + math.sqrt(low**2 + 2 * (high - low) * decay)) / (high - low)
    u = start + (1 - start) * INSIDE
    alpha2 = torch.exp(-(low * u + (high - low) * u**2 / 2))
    level = schedule.level(INSIDE)
    assert_close(level.alpha.square(), alpha2)
    assert_close(level.sigma.square(), 1 - alpha2)
    beta = (low + u * (high - low)) * (1 - start)
    assert_close(schedule.f(INSIDE), -beta / 2)
    assert_close(schedule.g2(INSIDE), beta)


def test_log_linear():
    schedule = LogLinear(5.0, -3.0)
    assert_close(schedule.log_snr(INSIDE), 5 - 8 * INSIDE)
    assert_close(schedule.g2(INSIDE), 8 * torch.sigmoid(8 * INSIDE - 5))
    assert_close(schedule.alpha(INSIDE).square(), torch.sigmoid(5 - 8 * INSIDE))


def test_variance_exploding():
    low, high = 0.02, 30.0
    schedule = VarianceExploding(low, high)
    sigma = low * (high / low) ** INSIDE
    assert torch.equal(schedule.alpha(INSIDE), torch.ones_like(INSIDE))
    assert_close(schedule.sigma(INSIDE), sigma)
    assert torch.equal(schedule.f(INSIDE), torch.zeros_like(INSIDE))
    assert_close(schedule.g2(INSIDE), 2 * sigma**2 * math.log(high / low))


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_edm(rho):
    low, high = 0.002, 80.0
    schedule = EDM(low, high, rho)
    span = high ** (1 / rho) - low ** (1 / rho)
    root = low ** (1 / rho) + INSIDE * span
    assert torch.equal(schedule.alpha(INSIDE), torch.ones_like(INSIDE))
    assert_close(schedule.sigma(INSIDE), root**rho)
    assert torch.equal(schedule.f(INSIDE), torch.zeros_like(INSIDE))
    assert_close(schedule.g2(INSIDE), 2 * rho * span * root ** (2 * rho - 1))


def test_rectified():
    schedule = Rectified(6.0, -4.0)
    start, stop = 1 / (1 + math.exp(3.0)), 1 / (1 + math.exp(-2.0))
    u = start + (stop - start) * INSIDE
    assert_close(schedule.alpha(INSIDE), 1 - u)
    assert_close(schedule.sigma(INSIDE), u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rectified_full(dtype):
    schedule, t = Rectified.full(), uniform(50, dtype)
    level = schedule.level(t)
    assert (level.alpha[0], level.sigma[0], level.alpha[-1], level.sigma[-1]) == (1, 0, 0, 1)
    assert_close(level.alpha, 1 - t)
    assert_close(level.sigma, t)
    assert level.log_snr[0] == torch.inf and level.log_snr[-1] == -torch.inf
    # f = -1 / (1 - t) and g^2 = 2 t / (1 - t)
    t = t[1:-1]
    assert_close(schedule.f(t), -1 / (1 - t), rtol=1e-4, atol=1e-5)
    assert_close(schedule.g2(t), 2 * t / (1 - t), rtol=1e-4, atol=1e-5)
    assert schedule.time_of_log_snr(torch.tensor([torch.inf, -torch.inf])).tolist() == [0, 1]


def test_table_is_the_cumulative_product():
    schedule = TabulatedBetas(BETAS)
    level = schedule.level(uniform(len(BETAS) - 1, F64))
    alpha2 = torch.cumprod(1 - BETAS, 0)
    assert_close(level.alpha.square(), alpha2)
    assert_close(level.sigma.square(), 1 - alpha2)


def test_table_interpolates_the_log_snr():
    schedule = TabulatedBetas([0.1, 0.3, 0.2])
    knots = schedule.log_snr(torch.tensor([0.0, 0.5, 1.0], dtype=F64))
    t = torch.tensor([0.125, 0.25, 0.6, 0.9], dtype=F64)
    expected = torch.stack(
        [
            0.75 * knots[0] + 0.25 * knots[1],
            0.5 * knots[0] + 0.5 * knots[1],
            0.8 * knots[1] + 0.2 * knots[2],
            0.2 * knots[1] + 0.8 * knots[2],
        ]
    )
    assert_close(schedule.log_snr(t), expected)
    assert_close(schedule.time_of_log_snr(expected), t)
    slope = torch.stack([knots[1] - knots[0]] * 2 + [knots[2] - knots[1]] * 2) * 2
    assert_close(schedule.log_snr_slope(t), slope)


def test_table_of_two_and_of_many():
    two = TabulatedBetas(torch.tensor([0.5, 0.5]))
    assert_close(two.alpha(torch.tensor([0.0, 1.0])), torch.tensor([0.5**0.5, 0.5]))
    ddpm = TabulatedBetas(torch.linspace(1e-4, 0.02, 1000))
    assert ddpm.log_snr_max == pytest.approx(math.log((1 - 1e-4) / 1e-4), abs=1e-5)
    level = ddpm.level(uniform(999))
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)
    assert_close(level.alpha.double().square(), expected, rtol=1e-5, atol=0)
    assert_close(level.sigma.double().square(), 1 - expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_expm1(dtype):
    x = torch.tensor([1e-6, 1e-3, 0.5, 1.0, 20.0], dtype=dtype)
    assert_close(log_expm1(x).double(), torch.expm1(x.double()).log(), rtol=1e-6, atol=1e-6)
    assert_close(log_expm1(torch.tensor(500.0)), torch.tensor(500.0))


# A schedule of the user's


class Sigmoid(VariancePreserving):
    """log-SNR = -raw time, raw time cut by the ends."""

    def _curve(self, u):
        return -3 * u

    def _inverse_curve(self, log_snr):
        return -log_snr / 3


def test_a_subclass_needs_only_the_curve():
    mine, theirs = Sigmoid(4.0, -2.0), LogLinear(4.0, -2.0)
    for a, b in zip(mine.level(INSIDE), theirs.level(INSIDE), strict=True):
        assert_close(a, b)
    assert_close(mine.g2(INSIDE), theirs.g2(INSIDE))


def test_the_base_class_is_abstract():
    with pytest.raises(NotImplementedError):
        Schedule(1.0, 0.0)


# Bad input


@pytest.mark.parametrize("make", [Cosine, LogLinear, Rectified])
@pytest.mark.parametrize("ends", [(-1.0, 1.0), (1.0, 1.0), (math.nan, 0.0)])
def test_ends_must_decrease(make, ends):
    with pytest.raises(ValueError, match=r"^log_snr_max, log_snr_min: got"):
        make(*ends)


@pytest.mark.parametrize("make", [VarianceExploding, EDM])
@pytest.mark.parametrize(
    "sigmas", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)]
)
def test_sigmas(make, sigmas):
    with pytest.raises(ValueError, match=r"^sigma_min, sigma_max: got"):
        make(*sigmas)


def test_rho():
    with pytest.raises(ValueError, match=r"^rho: got 0"):
        EDM(rho=0.0)


@pytest.mark.parametrize("betas", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (math.nan, 1.0)])
def test_linear_betas(betas):
    with pytest.raises(ValueError, match=r"^beta_min, beta_max: got"):
        LinearBeta(*betas)


def test_linear_beta_above_its_curve():
    with pytest.raises(ValueError, match=r"^log_snr_max, log_snr_min: got -20"):
        LinearBeta(log_snr_max=-20.0)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1], r"^betas: got shape \(1,\), expected at least two"),
        ([[0.1, 0.2]], r"^betas: got shape \(1, 2\)"),
        ([0.1, 0.0], "^betas: got values from 0 to 0.1, expected numbers strictly between"),
        ([0.1, 1.0], "^betas: got values from 0.1 to 1"),
        ([0.1, -0.2], "^betas: got values from -0.2"),
        ([0.1, math.nan], "^betas: got 1 NaN"),
    ],
)
def test_tabulated_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        TabulatedBetas(betas)


# Precision and checks


def test_uncut_cosine_is_refused():
    with pytest.raises(ValueError, match="expected finite ends for Cosine"):
        Cosine(math.inf, -math.inf)


@each_schedule
def test_sde_of_one_time_keeps_its_dtype(make):
    schedule, t = make(), torch.tensor(0.3)
    assert schedule.log_snr_slope(t).dtype == torch.float32
    assert schedule.f(t).dtype == schedule.g2(t).dtype == torch.float32


def test_sde_at_an_infinite_end():
    t = torch.zeros(1, dtype=F64)
    assert_close(Rectified.full().f(t), torch.full_like(t, -1.0))
    assert_close(Rectified.full().g2(t), torch.zeros_like(t))


def test_log_linear_refuses_infinite_ends():
    with pytest.raises(ValueError, match="log_snr_max"):
        LogLinear(math.inf, -10.0)


def test_loading_a_table_moves_its_ends():
    schedule, other = TabulatedBetas([0.1, 0.2]), TabulatedBetas([0.3, 0.4])
    schedule.load_state_dict(other.state_dict())
    assert schedule.log_snr_max == other.log_snr_max


def test_rows_of_a_grid_share_one_table():
    levels = Cosine().level(torch.linspace(0, 1, 6, dtype=torch.float64))
    grid = Grid(*levels)
    asked = []

    def nested(level):
        asked.append(level.t.shape)
        return level.alpha**2, (level.sigma**2, level.log_snr)

    for j in range(6):
        row = grid.row(j)
        alone = Level(*(v[j] for v in levels)).tabulate(nested)
        alpha2, (sigma2, log_snr) = row.tabulate(nested)
        assert (alpha2, sigma2, log_snr) == (alone[0], *alone[1])
        assert all(torch.equal(a, b[j]) for a, b in zip(row, levels, strict=True))
    assert asked.count(torch.Size([6])) == 1
