"""Distances between laws and residuals of their equations, on normals and mixtures where both are known.

Monte-Carlo comparisons state their standard errors; seeds are fixed.
"""

import itertools
import math

import pytest
import torch
from pyro.distributions import Delta, Gumbel, Laplace
from torch import Tensor
from torch.testing import assert_close

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    Denoiser,
    MixtureDenoiser,
    analytic_variance,
    residual_variance,
)
from pyro_diffusion.evaluate import (
    continuity_residual,
    sliced_wasserstein,
    wasserstein,
    wasserstein_bound,
)
from pyro_diffusion.evaluate.continuity import _residual
from pyro_diffusion.processes import Absorbing, AnyNoise, GaussianProcess, StudentTProcess
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified, VarianceExploding
from tests.atoms import AtomsDenoiser
from tests.exact import SCHEDULES, mixture
from tests.small_diffusions import Tiny

F64 = torch.float64
SIZE = 2
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


def normal(mean=0.0, variance=1.0, schedule=None) -> MixtureDenoiser:
    """The exact denoiser of isotropic normal data, as a point mass."""
    process = GaussianProcess(schedule or LogLinear(10, -12))
    means = torch.full((1, SIZE), mean, dtype=F64)
    return MixtureDenoiser(process, torch.ones(1, dtype=F64), means, variance, point_mass=True)


# Distances between samples


def test_assignment_is_the_best_of_all_permutations():
    x, y = torch.randn(2, 6, 3)
    best = min(
        (x - y[list(order)]).square().sum(-1).mean() for order in itertools.permutations(range(6))
    )
    assert_close(wasserstein(x, y), float(best.sqrt()), rtol=1e-5, atol=1e-7)
    assert wasserstein(x, x[torch.randperm(6)]) < 1e-3


def test_a_translation_is_its_length():
    x, shift = torch.randn(300, 2, 2), torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert_close(wasserstein(x, x + shift), 5.0, rtol=1e-5, atol=1e-5)
    # Each direction sees its share: |shift|^2 / d on average; 20 000 directions scatter by under 1%.
    assert abs(sliced_wasserstein(x, x + shift, 20_000) / (5 / math.sqrt(4)) - 1) < 0.04


def test_normals_are_as_far_apart_as_their_moments_say():
    x, y = torch.randn(1000, 2), 0.5 * torch.randn(1000, 2)
    exact = math.sqrt(2) * 0.5
    assert abs(wasserstein(x, y) / exact - 1) < 0.1
    assert abs(sliced_wasserstein(x, y, 4000) / (exact / math.sqrt(2)) - 1) < 0.1


# The bound


def generated(model: MixtureDenoiser, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, a coordinate, of x_{t_0} / alpha_0 by moment equations (RK4)."""
    schedule = model.process.schedule
    c, m, s2 = (1 + eta**2) / 2, model.means[0, 0], model.variances[0]

    def slope(log_snr: Tensor, state: Tensor) -> Tensor:
        alpha, sigma = schedule._signal(log_snr), schedule._noise(log_snr)
        signal, total = schedule._signal_slope(log_snr), alpha**2 * s2 + sigma**2
        pull = c * sigma**2 / total
        mean = signal * state[0] - pull * (state[0] - alpha * m)
        return torch.stack([mean, 2 * (signal - pull) * state[1] + eta**2 * sigma**2])

    grid = torch.linspace(schedule.log_snr_min, schedule.log_snr_max, 301, dtype=F64)
    start = schedule._signal(grid[0]) ** 2 + schedule._noise(grid[0]) ** 2
    state = torch.stack([torch.zeros((), dtype=F64), start])
    for a, b in itertools.pairwise(grid):
        h = b - a
        k1 = slope(a, state)
        k2 = slope(a + h / 2, state + h / 2 * k1)
        k3 = slope(a + h / 2, state + h / 2 * k2)
        k4 = slope(b, state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    alpha = schedule._signal(grid[-1])
    return state[0] / alpha, state[1].sqrt() / alpha


def exact_distance(model: MixtureDenoiser, truth: MixtureDenoiser, eta: float) -> float:
    mean, scale = generated(model, eta)
    gap = (mean - truth.means[0, 0]) ** 2 + (scale - truth.variances[0].sqrt()) ** 2
    return math.sqrt(SIZE * float(gap))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mean, variance", [(0.3, 1.0), (0.0, 0.4), (0.5, 1.7), (-1.0, 0.2)])
def test_the_bound_holds_on_normals(eta, mean, variance):
    truth, model = normal(0.2, 0.7), normal(mean, variance)
    data = truth.data().sample((1000,))
    exact = exact_distance(model, truth, eta)
    near = wasserstein_bound(model, data, reference=truth, eta=eta, num_points=120)
    far = wasserstein_bound(model, data, eta=eta, num_points=120)
    assert exact <= near.value <= far.value
    assert near.value < 12 * exact  # and it says something


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_bound_is_sharp_where_only_the_mean_is_wrong(eta):
    """The errors then all point one way and no inequality of the proof loses anything."""
    truth, model = normal(0.0, 0.6), normal(0.8, 0.6)
    data = truth.data().sample((500,))
    bound = wasserstein_bound(model, data, reference=truth, eta=eta, num_points=800)
    assert_close(bound.score, math.sqrt(SIZE) * 0.8, rtol=2e-3, atol=0)
    assert abs(exact_distance(model, truth, eta) - bound.score) < 2e-2
    assert bound.prior + bound.smoothing < 0.05


def test_an_exact_denoiser_leaves_prior_and_smoothing():
    truth = normal(0.0, 1.0)
    bound = wasserstein_bound(truth, truth.data().sample((100,)), reference=truth)
    assert bound.score == 0 and bound.value == bound.prior + bound.smoothing
    assert_close(bound.smoothing, math.sqrt(2) * math.exp(-5), rtol=1e-6, atol=0)


def test_the_constant_is_that_of_the_jacobian():
    """By autograd and as given agree; for normals it is alpha s^2 / (alpha^2 s^2 + sigma^2)."""
    model, truth = normal(0.1, 0.5), normal()
    data = truth.data().sample((20,))

    def constant(level):
        return level.alpha * 0.5 / (level.alpha**2 * 0.5 + level.sigma**2)

    given, found = (
        wasserstein_bound(model, data, reference=truth, lipschitz=f) for f in (constant, None)
    )
    assert_close(given.lipschitz, found.lipschitz)
    assert_close(given.prior, found.prior, rtol=1e-6, atol=0)


def test_errors_of_the_prior_shrink_as_the_equation_says():
    """Unit normal data: I = ((1 + e^-lambda_0) / (1 + e^-lambda_1))^c in closed form."""
    truth, base = normal(), (1 + math.exp(-10)) / (1 + math.exp(12))
    data = truth.data().sample((50,))
    alpha = 1 / math.sqrt(1 + math.exp(12))
    sigma = math.sqrt(1 - alpha**2)
    square = alpha**2 * float(data.square().sum(-1).mean()) + SIZE * (1 - sigma) ** 2
    for eta in (0.0, 0.6, 1.0):
        bound = wasserstein_bound(truth, data, reference=truth, eta=eta, num_points=1000)
        expected = base ** ((1 + eta**2) / 2) / alpha * math.sqrt(square)
        assert_close(bound.prior, expected, rtol=1e-3, atol=0)


def test_other_gauges():
    truth, model = (normal(m, 0.8, VarianceExploding(0.01, 50.0)) for m in (0.0, 0.5))
    bound = wasserstein_bound(model, truth.data().sample((500,)), reference=truth, num_points=600)
    assert_close(bound.score, math.sqrt(2) * 0.5, rtol=5e-3, atol=0)


# The continuity equation


@each_schedule
def test_an_exact_denoiser_has_no_residual(make):
    denoiser = mixture(make())
    result = continuity_residual(denoiser, denoiser.data().sample((4000,)), num_samples=2)
    assert result.z.shape == (10, 32)
    # 320 correlated standard normals; their largest exceeds 5 in fewer than 2e-4 of seeds.
    assert result.z.abs().max() < 5
    assert 0.5 < result.z.square().mean() < 1.6


OTHER_NOISE = {
    "Student-t": lambda: StudentTProcess(Cosine(), 3.0),
    "Cauchy": lambda: StudentTProcess(Cosine(), 1.0),
    "Laplace": lambda: AnyNoise(Cosine(), Laplace(0.0, 0.5**0.5)),
    "not centred": lambda: AnyNoise(Cosine(), Gumbel(1.0, 0.7)),
}


@pytest.mark.parametrize("process", OTHER_NOISE.values(), ids=OTHER_NOISE)
def test_noise_of_any_distribution(process):
    """None for the exact posterior of three points; for another one that of its flow, d phi - grad phi v."""
    points = torch.tensor([[-1.0, 0.5], [0.3, -1.0], [1.2, 0.8]], dtype=F64)
    exact = AtomsDenoiser(process(), points, torch.tensor([0.2, 0.5, 0.3], dtype=F64))
    data = points[exact.weights.multinomial(4000, replacement=True)]
    result = continuity_residual(exact, data, num_samples=2)
    # 320 correlated standard normals; their largest exceeds 5 in fewer than 2e-4 of seeds.
    assert result.z.abs().max() < 5
    assert 0.5 < result.z.square().mean() < 1.6
    wrong = AtomsDenoiser(process(), points, torch.tensor([0.5, 0.2, 0.3], dtype=F64))
    assert continuity_residual(wrong, data, num_samples=2).z.abs().max() > 8


class Perturbed(MixtureDenoiser):
    """The exact mean under an error."""

    def forward(self, xt, t, **context):
        mean = super().forward(xt, t).mean
        return Delta(self.error(mean, xt), event_dim=1)


ERRORS = {
    "shifted": lambda mean, xt: mean + 0.1,
    "shrunk": lambda mean, xt: 0.9 * mean,
    "rippled": lambda mean, xt: mean + 0.2 * torch.sin(2 * xt),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_wrong_denoiser_has_one(error):
    exact = mixture(Cosine())
    parts = exact.process, exact.weights, exact.means, exact.variances
    denoiser, data = Perturbed(*parts), exact.data().sample((4000,))
    denoiser.error = error
    result = continuity_residual(denoiser, data, num_samples=2)
    assert result.z.abs().max() > 8
    assert (result.rms >= 0).all() and result.rms.max() > 0.01
    assert result.rms.max() > 3 * continuity_residual(exact, data, num_samples=2).rms.max()


@each_schedule
def test_the_residual_is_the_equations(make):
    """d phi/d lambda along the path minus grad phi . v, by differences in time, f, g2 and the score."""
    denoiser, eps = mixture(make()), torch.randn(50, 2, dtype=F64)
    process, x0 = denoiser.process, denoiser.data().sample((50,))
    w, b = torch.randn(2, 5, dtype=F64), torch.rand(5, dtype=F64)
    t, h = torch.tensor(0.4, dtype=F64), 1e-5
    early, level, late = (process.schedule.level(t + d) for d in (-h, 0.0, h))
    before, xt, after = (v.alpha * x0 + v.sigma * eps for v in (early, level, late))
    along = (torch.cos(after @ w + b) - torch.cos(before @ w + b)) / (2 * h)
    mean = denoiser(xt, t).mean
    score = (level.alpha * mean - xt) / level.sigma**2
    v = process.schedule.f(t) * xt - 0.5 * process.schedule.g2(t) * score
    transported = -torch.sin(xt @ w + b) * (v @ w)
    expected = (along - transported) / process.schedule.log_snr_slope(t)
    assert_close(_residual(xt, level.alpha * (x0 - mean), w, b), expected, rtol=1e-5, atol=1e-6)


def test_residuals_of_images_and_float32():
    process = GaussianProcess(Cosine(), event_dim=3)

    class Zero(MixtureDenoiser):
        def forward(self, xt, t, **context):
            return Delta(0 * xt, event_dim=3)

    denoiser = Zero(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 4), 1.0)
    denoiser.process = process
    data = torch.randn(40, 1, 2, 2)
    result = continuity_residual(denoiser, data, levels=torch.tensor([-1.0, 1.0]), num_functions=6)
    assert result.value.shape == (2, 6) and result.value.dtype == torch.float32
    assert_close(result.log_snr, torch.tensor([-1.0, 1.0]), rtol=1e-4, atol=1e-4)


# Bad input


class Shrunk(Denoiser):
    """The posterior mean under standard normal data, shrunk a little."""

    def __init__(self, event_dim):
        super().__init__(GaussianProcess(LogLinear(8.0, -8.0), event_dim=event_dim))

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        gain = 0.9 * level.alpha / (level.alpha.square() + level.sigma.square())
        return Delta(gain * xt, event_dim=self.process.event_dim)


@pytest.mark.parametrize(
    "found",
    [
        lambda d, x: analytic_variance(d, x, knots=4).value,
        lambda d, x: residual_variance(d, x, knots=4).value,
        lambda d, x: continuity_residual(d, x, levels=3).value,
        lambda d, x: vars(wasserstein_bound(d, x, num_points=4)),
    ],
    ids=["analytic", "residual", "continuity", "distance"],
)
def test_data_of_one_number_each_are_as_vectors_of_one(found):
    x = torch.randn(20, dtype=F64)
    torch.manual_seed(0)
    scalars = found(Shrunk(0), x)
    torch.manual_seed(0)
    assert_close(scalars, found(Shrunk(1), x.unsqueeze(-1)))


def categorical():
    return CategoricalDenoiser(Tiny((3,), 5), Absorbing(Rectified.full(), 5))


X = torch.zeros(4, SIZE, dtype=F64)
BAD = {
    "shapes": (lambda: wasserstein(torch.zeros(3, 2), torch.zeros(4, 2)), "x, y: got shapes"),
    "vectors": (lambda: sliced_wasserstein(torch.zeros(3), torch.zeros(3)), "x, y: got shapes"),
    "nan": (lambda: wasserstein(X, X * torch.nan), "y: got 8"),
    "projections": (lambda: sliced_wasserstein(X, X, 0), "num_projections: got 0"),
    "process": (lambda: wasserstein_bound(categorical(), X), "denoiser: got Categorical"),
    "data": (lambda: wasserstein_bound(normal(), X[0]), "data: got shape"),
    "eta": (lambda: wasserstein_bound(normal(), X, eta=-1.0), "eta: got -1"),
    "points": (lambda: wasserstein_bound(normal(), X, num_points=1), "num_points: got 1"),
    "levels": (lambda: continuity_residual(normal(), X, levels=0), "levels: got 0"),
    "functions": (
        lambda: continuity_residual(normal(), X, num_functions=0),
        "num_functions: got 0",
    ),
    "one datum": (lambda: continuity_residual(normal(), X[:1]), "data: got shape"),
    "categorical": (lambda: continuity_residual(categorical(), X), "denoiser: got Categorical"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
