"""Guidance by the derivative where it is a covariance: what passes, what is caught, what stays bounded."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.denoisers import Denoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import (
    MMPS,
    TMPD,
    CalibratedCovariance,
    DataCovariance,
    DiffPIR,
    calibration,
)
from pyro_diffusion.guidance.calibrated_covariance import CURVATURE, LENGTH, bounded
from pyro_diffusion.guidance.calibration import DRAWS, KNOTS, calibrate, calibrated
from pyro_diffusion.guidance.linear_estimate import LinearEstimate
from pyro_diffusion.infer import AutoGuidance, TwistedSMC
from pyro_diffusion.infer.filtering.twisted_smc import default_guidance
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.likelihoods.linearization import solve
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear, VarianceExploding
from tests.per_coordinate import PerCoordinate, normal

F64 = torch.float64
PROCESS = GaussianProcess(LogLinear(8.0, -8.0))
MEANS = torch.tensor([[-1.0, 0.5, 0.0], [1.0, -0.5, 1.0]], dtype=F64)
MATRIX = torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]], dtype=F64)
OBSERVED = torch.tensor([0.7, 0.9], dtype=F64)


def mixture(process=PROCESS, means=MEANS, variance=0.1):
    weights = torch.ones(len(means), dtype=means.dtype)
    return MixtureDenoiser(process, weights, means, torch.tensor(variance, dtype=means.dtype))


class Wiggling(Denoiser):
    """Nearly the mean of another, with a derivative that is nothing but error below a log-SNR."""

    def __init__(self, inner, below=-1.0, amplitude=0.02, frequency=100.0):
        super().__init__(inner.process)
        self.inner, self.below = inner, below
        self.amplitude = torch.nn.Parameter(torch.tensor(amplitude, dtype=F64), requires_grad=False)
        self.frequency = frequency

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        wiggle = self.amplitude * torch.sin(self.frequency * xt.flip(-1))
        mean = self.inner(xt, level).mean
        wrong = torch.where(level.clock < self.below, wiggle, 0.0)
        return dist.Delta(mean + wrong, event_dim=1)


class Labelled(Denoiser):
    """A mixture for each label."""

    def __init__(self, parts):
        super().__init__(parts[0].process)
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, xt, t, label=None, shift=None):
        level = self.process.level(t, xt)
        means = torch.stack([part(xt, level).mean for part in self.parts])
        if label is None:
            return dist.Delta(means[0] + shift, event_dim=1)
        chosen = torch.stack([label == k for k in range(len(self.parts))]).unsqueeze(-1)
        return dist.Delta((means * chosen).sum(0), event_dim=1)


def program(denoiser, sd=0.05):
    prior = Diffusion(denoiser, (3,), steps=40)

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ MATRIX.mT, sd).to_event(1), obs=OBSERVED)

    return model


def likelihood(denoiser, sd=0.05):
    return ProgramLikelihood(program(denoiser, sd))


@pytest.mark.parametrize(
    "denoiser",
    [
        mixture(),
        mixture(variance=1e-3),
        mixture(means=torch.randn(4, 20, generator=torch.Generator().manual_seed(0))),
        mixture(GaussianProcess(VarianceExploding(1e-2, 300.0)), 8 * MEANS.float(), 1.0),
    ],
    ids=["mixture", "sharp", "20 dimensions", "far modes"],
)
def test_a_closed_form_passes_at_every_level(denoiser):
    """The generator is its own, so this has no false alarms."""
    found = calibrate(denoiser, denoiser.means[0], {})
    assert found.trusted.shape == (KNOTS,) and found.trusted.all()
    assert found.evidence.asymmetry.max() < 1e-3 and found.evidence.negative.max() < 1e-3


def test_scales_of_each_coordinate_pass_as_well():
    denoiser = normal()
    assert isinstance(denoiser.process, PerCoordinate)
    assert calibrate(denoiser, torch.zeros(2, dtype=F64), {}).trusted.all()


def test_a_wrong_derivative_is_caught_at_the_levels_where_it_is_wrong():
    found = calibrate(Wiggling(mixture()), torch.zeros(3, dtype=F64), {})
    assert_close(found.trusted, found.clocks > -1.0)


class Scaled(DataCovariance):
    """The linear estimate times a number."""

    scale = 1.0

    def covariance(self, at, level, v):
        return self.scale * super().covariance(at, level, v)


def test_a_trusted_level_is_mmps_and_another_the_linear_estimate():
    denoiser = Wiggling(mixture())
    guided = CalibratedCovariance(denoiser, likelihood(denoiser))
    x = torch.randn(5, 3, dtype=F64)
    low, high = PROCESS.level_of_clock(torch.tensor([[-4.0], [3.0]], dtype=F64)).t.flatten()
    found = calibrated(denoiser, x[0], {})
    vectors = found.estimate.vectors
    covariance = vectors * found.estimate.values @ vectors.mT
    linear = Scaled(denoiser, guided.likelihood, covariance=covariance)
    linear.scale = found.scale_at(PROCESS.level(low, x))
    # Noise in place of a derivative is out of bounds in each of these states.
    assert_close(guided(x, low).mean, linear(x, low).mean)
    assert_close(guided(x, high).mean, MMPS(denoiser, guided.likelihood)(x, high).mean)
    assert_close(guided.twisted(x, low).log_twist, linear.twisted(x, low).log_twist)


@pytest.mark.parametrize("squares", [False, True], ids=["linear", "squares"])
def test_an_exact_denoiser_gives_mmps_with_its_variance(squares):
    # Between sharp modes a state's own variance has little to do with the average of the linear estimate.
    denoiser = mixture(variance=0.02)

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (3,), steps=40))
        seen = x.square() if squares else x
        pyro.sample("y", dist.Normal(seen @ MATRIX.mT, 0.3).to_event(1), obs=OBSERVED)

    observed, t = ProgramLikelihood(model), torch.tensor(0.5, dtype=F64)
    x = 0.7 * torch.randn(6, 3, dtype=F64)
    own, other = (kind(denoiser, observed)(x, t) for kind in (CalibratedCovariance, MMPS))
    assert_close(own.mean, other.mean)
    assert_close(own.variance, other.variance)


def test_the_scale_of_the_estimate_is_that_of_all_states(monkeypatch):
    # Data of which few are evaluated at once. Fixed draws: no false alarms.
    denoiser = Wiggling(mixture(), amplitude=0.5)
    like = torch.zeros(3, dtype=F64)
    whole = calibrate(denoiser, like, {}).scale
    monkeypatch.setattr(calibration, "AT_ONCE", 3 * 21)  # 21, 21, 21 and 1 of 64 states
    found = calibrate(denoiser, like, {}).scale
    # A mean of 64 squares, of other noise.
    assert ((found - whole).abs() < 0.5 * whole).all()


def test_the_default_draws_the_posterior_under_a_wrong_derivative():
    """Means of 400 draws beside those of the exact denoiser; six standard errors: 1e-8 of false alarms."""
    pyro.set_rng_seed(0)
    draws = []
    for denoiser in (mixture(), Wiggling(mixture())):
        guide = AutoGuidance(program(denoiser, 0.3))
        predictive = pyro.infer.Predictive(
            program(denoiser, 0.3), guide=guide, num_samples=400, parallel=True
        )
        draws.append(predictive()["x"])
    error = sum(x.var(0) / 400 for x in draws).sqrt()
    assert ((draws[0].mean(0) - draws[1].mean(0)).abs() < 6 * error + 0.1).all()
    assert draws[1].abs().max() < 3


def test_the_default_asks_whether_a_mean_is_in_closed_form():
    exact = mixture()
    other = Wiggling(exact)
    assert type(default_guidance(exact, likelihood(exact))) is MMPS
    assert type(default_guidance(other, likelihood(other))) is CalibratedCovariance


def test_calibration_is_kept_until_parameters_change_and_leaves_seeds_alone():
    denoiser, like = Wiggling(mixture()), torch.zeros(3, dtype=F64)
    before = torch.get_rng_state()
    found = calibrated(denoiser, like, {})
    assert torch.equal(torch.get_rng_state(), before)
    assert calibrated(denoiser, like, {}) is found
    assert calibrated(denoiser, like.float(), {}) is not found
    denoiser.amplitude.zero_()
    again = calibrated(denoiser, like, {})
    assert not found.trusted.all() and again.trusted.all()
    assert_close(calibrate(denoiser, like, {}).estimate.values, again.estimate.values)


def test_a_change_that_torch_does_not_count_is_seen_at_the_next_construction():
    denoiser, xt = Wiggling(mixture()), torch.zeros(2, 3, dtype=F64)

    def kept():
        guided = CalibratedCovariance(denoiser, ProgramLikelihood(program(denoiser)))
        return guided._calibrations(xt, {})[0][1]

    found = kept()
    assert kept() is found
    denoiser.amplitude.data.zero_()
    assert not found.trusted.all() and kept().trusted.all()


def test_rows_do_not_depend_on_their_batch():
    """Levels and labels of their own; one label's derivative is wrong at some of them."""
    parts = [Wiggling(mixture()), mixture(means=0.3 * MEANS.flip(-1), variance=0.01)]
    denoiser = Labelled(parts)
    guided = CalibratedCovariance(denoiser, likelihood(denoiser))
    x, times = torch.randn(6, 3, dtype=F64), torch.linspace(0.1, 0.9, 6, dtype=F64)
    label = torch.tensor([0, 1, 0, 1, 1, 0])
    together = guided(x, times, label=label).mean
    for row in range(6):
        alone = guided(x[row], times[row], label=label[row]).mean
        assert_close(together[row], alone, rtol=1e-9, atol=1e-9)
    swapped = guided(x, times, label=1 - label).mean
    assert (swapped - together).abs().amax(-1).min() > 1e-3


class Scalar(Denoiser):
    """Normal data of one number each, in a way that is not known to be in closed form."""

    def __init__(self):
        super().__init__(GaussianProcess(LogLinear(8.0, -8.0), event_dim=0))

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        precision = 2.0 + (level.alpha / level.sigma).square()
        mean = (0.6 + level.alpha / level.sigma.square() * xt) / precision
        return dist.Normal(mean, precision.rsqrt().expand(mean.shape))


def test_data_of_one_number_each():
    """The posterior given x_t and 2 x_0 + noise = 1; the log-evidence of a chain to 5 standard errors."""
    denoiser, sd = Scalar(), 0.5
    prior = Diffusion(denoiser, (), steps=40)

    def model():
        with pyro.plate("data", 3):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(2 * x, sd), obs=torch.ones((), dtype=F64))

    observed = ProgramLikelihood(model)
    x, t = torch.tensor([-1.0, 0.2, 3.0], dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    prior_of, precision = denoiser(x, t), 4 / sd**2
    expected = prior_of.mean + (1 - 2 * prior_of.mean) * (2 / sd**2) / (
        prior_of.variance.reciprocal() + precision
    )
    assert_close(CalibratedCovariance(denoiser, observed)(x, t).mean, expected)
    with pyro.poutine.seed(rng_seed=0):
        found = TwistedSMC(prior, observed, num_particles=128).run().log_evidence
    evidence = 3 * dist.Normal(0.6, (4 * 0.5 + sd**2) ** 0.5).log_prob(torch.tensor(1.0))
    assert abs(found.value - evidence) < 5 * found.standard_error < 0.5


def test_real_numbers_as_context_are_not_calibrated():
    denoiser = Labelled([mixture()])
    context = {"shift": torch.tensor([0.1, 0.2, 0.3], dtype=F64)}
    pair = [
        kind(denoiser, likelihood(denoiser))(MEANS, 0.6, **context).mean
        for kind in (CalibratedCovariance, DiffPIR)
    ]
    assert_close(*pair)


def test_full_gradient_is_refused():
    with pytest.raises(ValueError, match="full_gradient"):
        CalibratedCovariance(mixture(), likelihood(mixture()), full_gradient=True)


@pytest.mark.parametrize("clock", [-4.0, 3.0], ids=["estimate", "derivative"])
def test_variances_are_the_diagonal_of_the_covariance(clock):
    """Where the estimate stands in; a trusted point mass has the estimate's, having none of its own."""
    denoiser = Wiggling(mixture())
    guided = CalibratedCovariance(denoiser, likelihood(denoiser))
    x = torch.randn(2, 3, dtype=F64)
    at, level = guided._linearized(x, PROCESS.level_of_clock(torch.tensor(clock, dtype=F64)), {})
    guided.multiplies_by_jacobian(at)
    base = [part._replace(trusted=False) for part in at.parts]
    at.parts, at.some_trusted = base, False
    columns = [guided.covariance(at, level, e.expand_as(x)) for e in torch.eye(3, dtype=F64)]
    diagonal = torch.stack(columns, -1).diagonal(dim1=-2, dim2=-1)
    assert_close(guided.variances(at, level).expand_as(x), diagonal)


def test_rows_at_trusted_and_other_times_are_those_alone():
    denoiser = Wiggling(mixture(), amplitude=0.3, frequency=0.5)
    guided = CalibratedCovariance(denoiser, likelihood(denoiser, 0.5))
    clocks = torch.tensor([-2.0, 3.0, -1.5, 4.0], dtype=F64)
    x, times = torch.randn(4, 3, dtype=F64), PROCESS.level_of_clock(clocks).t.flatten()
    together = guided(x, times).mean
    for row in range(4):
        assert_close(together[row], guided(x[row], times[row]).mean, rtol=1e-9, atol=1e-9)


class WithoutGradient(Wiggling):
    """A mean that autograd knows nothing of."""

    def forward(self, xt, t, **context):
        with torch.no_grad():
            return super().forward(xt, t)


def test_a_denoiser_without_gradient_has_the_linear_estimate():
    denoiser = WithoutGradient(mixture())
    guided = CalibratedCovariance(denoiser, likelihood(denoiser))
    x, t = torch.randn(5, 3, dtype=F64), torch.tensor(0.5, dtype=F64)
    found = calibrated(denoiser, x[0], {})
    assert not found.differentiable and not found.trusted.any()
    vectors = found.estimate.vectors
    linear = Scaled(
        denoiser, guided.likelihood, covariance=vectors * found.estimate.values @ vectors.mT
    )
    linear.scale = found.scale_at(PROCESS.level(t, x))
    assert_close(guided(x, t).mean, linear(x, t).mean)


def test_the_scale_is_the_share_of_the_linear_estimates_squared_error():
    """Beside 4000 draws of the mixture itself, within a factor of 1.8; 64 states decide: fixed seeds."""
    denoiser = Wiggling(mixture(variance=0.01), amplitude=0.0)
    found = calibrate(denoiser, torch.zeros(3, dtype=F64), {})
    generator = torch.Generator().manual_seed(0)
    x0 = MEANS[torch.randint(2, (4000,), generator=generator)]
    x0 = x0 + 0.1 * torch.randn(4000, 3, generator=generator, dtype=F64)
    shares = []
    for clock in found.clocks:
        level = PROCESS.level_of_clock(clock)
        xt = level.alpha * x0 + level.sigma * torch.randn(4000, 3, generator=generator, dtype=F64)
        error = (denoiser(xt, level).mean - x0).square().sum(-1).mean()
        shares.append(error / found.estimate.diagonal(level, torch.Size((3,))).sum())
    shares = torch.stack(shares).clamp(0.1, 1)
    assert shares.min() < 0.7 and shares.max() > 0.9
    ratio = found.scale / shares
    assert ratio.min() > 1 / 1.8 and ratio.max() < 1.8


# What is taken of a derivative that is no covariance.


def spd(*batch):
    root = torch.randn(*batch, 4, 4, dtype=F64)
    return root @ root.mT + 0.1 * torch.eye(4, dtype=F64)


def test_a_derivative_like_the_estimate_is_followed():
    torch.manual_seed(0)
    z = torch.randn(20, 4, dtype=F64)
    image = (spd(20) @ z.unsqueeze(-1)).squeeze(-1)
    through = 1.5 * image
    assert_close(bounded(z, image, through, 1), through)
    away = torch.randn(20, 4, dtype=F64)
    across = away - z * ((away * z).sum(-1) / (z * z).sum(-1)).unsqueeze(-1)
    far = image + 1e4 * across  # the same curvature, and too long
    assert_close(bounded(z, image, far, 1).norm(dim=-1), LENGTH * image.norm(dim=-1))
    z, image, longest = torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 1e30]])
    assert_close(bounded(z, image, longest, 1), image)  # a length whose square is no number


@pytest.mark.parametrize("factor", [-1.0, 0.9 / CURVATURE, 1.1 * CURVATURE, torch.nan, torch.inf])
def test_a_derivative_far_from_the_estimate_is_left_out(factor):
    z = torch.randn(2, 4, dtype=F64)
    image = (spd(2) @ z.unsqueeze(-1)).squeeze(-1)
    through = torch.stack([factor * image[0], image[1]])
    assert_close(bounded(z, image, through, 1), image)


def test_the_shift_is_the_gradient_of_normal_evidence_under_the_estimate():
    """Followed, it is (sigma^2/alpha) times the gradient of -|r|^2_S / 2 in x_t, S held: by autograd."""
    denoiser = Wiggling(mixture(), amplitude=0.3, frequency=0.5)
    guided = CalibratedCovariance(denoiser, likelihood(denoiser, 0.5))
    level = PROCESS.level_of_clock(torch.tensor(-2.0, dtype=F64))
    x = torch.randn(200, 3, dtype=F64)
    found = calibrated(denoiser, x[0], {})
    assert not found.trusts(PROCESS.level(level.t, x))
    at, _ = guided._linearized(x, level, {})
    v = torch.stack(
        [guided.covariance(at, level, e.expand_as(x)) for e in torch.eye(3, dtype=F64)], -1
    )
    s = torch.eye(2, dtype=F64) + MATRIX @ v @ MATRIX.mT / 0.25
    leaf = x.clone().requires_grad_()
    r = (OBSERVED - denoiser(leaf, level).mean @ MATRIX.mT) / 0.5
    energy = -0.5 * (r * torch.linalg.solve(s, r)).sum()
    (gradient,) = torch.autograd.grad(energy, leaf)
    shift = guided(x, level).mean - denoiser(x, level).mean
    followed = torch.isclose(shift, level.tweedie * gradient, rtol=1e-8).all(-1)
    assert followed.sum() > 100


def test_the_scale_is_linear_between_knots_and_the_same_for_rows_of_a_grid():
    denoiser = Wiggling(mixture())
    found = calibrated(denoiser, torch.zeros(3, dtype=F64), {})
    found = found._replace(scale=torch.linspace(0.1, 1, KNOTS, dtype=F64))
    grid = PROCESS.levels(torch.linspace(0, 1, 5, dtype=F64))
    middle = (found.clocks[3:4] + found.clocks[4:5]) / 2
    at = found.scale_at(PROCESS.level_of_clock(middle))
    assert_close(at.flatten(), found.scale[3:5].mean().reshape(1))
    for j in range(5):
        row = found.scale_at(grid.at(j))
        alone = found.scale_at(PROCESS.level(grid.at(j).t, torch.zeros(3, dtype=F64)))
        assert_close(torch.as_tensor(row, dtype=F64).reshape(()), alone.reshape(()))


# The linear estimate.


@pytest.mark.parametrize("count", [DRAWS, 5], ids=["complete", "few draws"])
def test_linear_estimate_is_the_inverse(count):
    draws = torch.randn(count, 8, dtype=F64) @ torch.randn(8, 8, dtype=F64)
    estimate = LinearEstimate.of_draws(draws)
    u, eye = estimate.vectors, torch.eye(8, dtype=F64)
    c = u * estimate.values @ u.mT + estimate.rest * (eye - u @ u.mT)
    assert u.shape == (8, min(count - 1, 8)) and torch.linalg.eigvalsh(c).min() > 0
    v = torch.randn(3, 8, dtype=F64)
    for scale in (torch.tensor(0.7, dtype=F64), torch.linspace(0.2, 2, 8, dtype=F64)):
        level = PROCESS.level(torch.tensor(0.5, dtype=F64))
        level = level._replace(alpha=torch.ones_like(scale), sigma=scale)
        precision = torch.linalg.inv(c) + eye * scale**-2
        assert_close(estimate.times(v, level, 1), torch.linalg.solve(precision, v.mT).mT)


def test_shrinkage_vanishes_with_draws_and_keeps_the_trace():
    root = torch.randn(6, 6, dtype=F64)
    draws = torch.randn(5000, 6, dtype=F64) @ root
    few, many = LinearEstimate.of_draws(draws[:10]), LinearEstimate.of_draws(draws)
    u = many.vectors
    assert_close(u * many.values @ u.mT, root.mT @ root, rtol=0.1, atol=0.5)
    assert_close(few.values.sum(), 10 / 10 * draws[:10].var(0, correction=0).sum())
    assert few.values.min() > 0


# Derivatives that are no covariances.


class Turned(Denoiser):
    """A linear mean of any derivative."""

    def __init__(self, matrix):
        super().__init__(PROCESS)
        self.register_buffer("matrix", matrix)

    def forward(self, xt, t, **context):
        return dist.Delta(xt @ self.matrix.mT, event_dim=1)


@pytest.mark.parametrize(
    "method",
    [
        MMPS,
        functools.partial(MMPS, solver="cg", iterations=2),
        functools.partial(MMPS, solver="gmres", iterations=2),
        TMPD,
    ],
    ids=["direct", "cg", "gmres", "TMPD"],
)
def test_a_shift_never_passes_the_observations(method):
    """|B shift| <= |r| whatever the derivative; a covariance cannot do otherwise."""
    generator, x = torch.Generator().manual_seed(0), torch.randn(4, 3, dtype=F64)
    for _ in range(20):
        denoiser = Turned(10 * torch.randn(3, 3, generator=generator, dtype=F64))
        guided = method(denoiser, likelihood(denoiser))
        before = denoiser(x, 0.8).mean
        shift = guided(x, 0.8).mean - before
        residual = (OBSERVED - before @ MATRIX.mT).norm(dim=-1)
        assert ((shift @ MATRIX.mT).norm(dim=-1) <= 1.1001 * residual).all()


def test_a_negative_variance_has_no_part_in_the_solution():
    """gap = diag(-5, 3) in turned axes: the first is certain, the second solved."""
    angle = torch.tensor(0.4, dtype=F64)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    gap = turn @ torch.tensor([[-5.0, 0.0], [0.0, 3.0]], dtype=F64) @ turn.mT
    r = torch.tensor([1.0, 2.0], dtype=F64)
    parts = turn.mT @ r
    u, value = solve(gap, r)
    assert_close(turn.mT @ u, torch.stack([torch.zeros((), dtype=F64), parts[1] / 4]))
    energy = parts[0] ** 2 + parts[1] ** 2 / 4
    assert_close(value, -0.5 * energy - torch.tensor(4.0, dtype=F64).log() / 2)
