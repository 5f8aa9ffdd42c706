"""Guidance that takes p(x_0 | x_t) for a normal or for a point: against conjugate posteriors."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.denoisers import Data, Denoiser, GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import (
    MMPS,
    TMPD,
    DataCovariance,
    DiffPIR,
    DPSStep,
    GuidedDenoiser,
    PiGDM,
    PlugIn,
)
from pyro_diffusion.guidance.krylov import conjugate_gradients, gmres
from pyro_diffusion.likelihoods import Likelihood, ProgramLikelihood, batches
from pyro_diffusion.likelihoods.linearization import solve
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import AdamsMoulton, Ancestral, DPMSolverPP, ancestral, heun, simulate
from pyro_diffusion.schedules import Cosine, LogLinear, uniform_log_snr
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import mixture
from tests.linear_gaussian import F64, NormalDenoiser, Reading, affine_map, isotropic, problem
from tests.sampler_table import DETERMINISTIC, STOCHASTIC
from tests.small_diffusions import Tiny

METHODS = {
    "PiGDM": PiGDM,
    "MMPS": MMPS,
    "MMPS cg": functools.partial(MMPS, solver="cg", iterations=3),
    "MMPS gmres": functools.partial(MMPS, solver="gmres", iterations=3),
    "PiGDM cg": functools.partial(PiGDM, solver="cg", iterations=2),
    "TMPD": TMPD,
    "DiffPIR": DiffPIR,
    "MMPS full": functools.partial(MMPS, full_gradient=True),
    "PiGDM full": functools.partial(PiGDM, full_gradient=True),
    "plug-in": PlugIn,
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
TIME = torch.tensor(0.55, dtype=F64)


def plain(reading):
    """A reading of two numbers as the program of a vector."""

    def model(denoiser, d):
        x = pyro.sample("x", Diffusion(denoiser, (d,), steps=2))
        pyro.sample("y", dist.Normal(x[..., :2].sinh(), 0.5).to_event(1), obs=reading)

    return model


def curved(denoiser, d, reading=(0.3, -1.0)):
    """The likelihood of a non-linear program."""
    return ProgramLikelihood(plain(torch.tensor(reading, dtype=F64)), (denoiser, d))


# Normal priors: the exact posterior.


@pytest.mark.parametrize("options", [{}, {"solver": "cg"}, {"solver": "gmres"}], ids=str)
@pytest.mark.parametrize("method", [PiGDM, MMPS])
@pytest.mark.parametrize(("d", "m"), [(8, 1), (8, 4)])
def test_walk_gives_the_conjugate_posterior(method, options, d, m):
    """Mean and covariance of the walk's end to 1e-3, without a draw: it is affine in its start."""
    mean, _, reading = problem(d, m)
    covariance = 0.7 * torch.eye(d, dtype=F64)
    denoiser = isotropic(mean, 0.7)
    guided = method(denoiser, reading.likelihood(denoiser), **options)
    times = uniform_log_snr(denoiser.process.schedule, 60, F64)
    offset, matrix = affine_map(lambda x: simulate(guided, times, x, AdamsMoulton()), d)
    exact_mean, exact = reading.posterior(mean, covariance)
    # The walk starts from the law of x_1 given y.
    end = denoiser.process.level(times[-1])
    start = end.alpha**2 * exact + end.sigma**2 * torch.eye(d, dtype=F64)
    assert_close(offset + matrix @ (end.alpha * exact_mean), exact_mean, atol=1e-3, rtol=0)
    assert_close(matrix @ start @ matrix.mT, exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("point_mass", [False, True])
@pytest.mark.parametrize("time", [0.1, 0.55, 0.95])
def test_mmps_reads_any_normal_exactly(time, point_mass):
    """Correlated prior: E[x_0 | x_t, y] and log p(y | x_t) to rounding."""
    mean, covariance, reading = problem(5, 3)
    denoiser = NormalDenoiser(mean, covariance, point_mass)
    level = denoiser.process.level(torch.tensor(time, dtype=F64))
    xt = torch.randn(7, 5, dtype=F64)
    found = MMPS(denoiser, reading.likelihood(denoiser)).twisted(xt, level)
    prior, given = denoiser(xt, level), denoiser.given(level)[1]
    assert_close(found.posterior.mean, reading.posterior(prior.mean, given)[0])
    assert_close(found.log_twist, reading.log_evidence(prior.mean, given))
    assert_close(found.prior.mean, prior.mean)
    assert not (found.prior.mean.requires_grad or found.posterior.mean.requires_grad)


@pytest.mark.parametrize(
    "times", [TIME, torch.linspace(0.2, 0.8, 7, dtype=F64)], ids=["one", "rows"]
)
@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_data_covariance_reads_normals_exactly(times, solver):
    """Correlated prior, its covariance given: no derivative of the denoiser, whose mean has none here."""
    mean, covariance, reading = problem(5, 3)
    denoiser = NormalDenoiser(mean, covariance)
    xt = torch.randn(7, 5, dtype=F64)
    exact = [
        reading.posterior(denoiser(x, t).mean, denoiser.given(denoiser.process.level(t))[1])[0]
        for x, t in zip(xt, times.expand(7), strict=True)
    ]
    priors = [denoiser(x, t).mean for x, t in zip(xt, times.expand(7), strict=True)]

    class Plain(NormalDenoiser):
        def forward(self, x, t, **context):
            return dist.Delta(torch.stack(priors).detach(), event_dim=1)

    plain = Plain(mean, covariance)
    guided = DataCovariance(
        plain, reading.likelihood(denoiser), covariance=covariance, solver=solver, iterations=3
    )
    assert_close(guided(xt, times).mean, torch.stack(exact))
    with pytest.raises(ValueError, match=r"covariance: got shape \(4, 4\), expected \(5, 5\)"):
        DataCovariance(plain, guided.likelihood, covariance=torch.eye(4))
    with pytest.raises(ValueError, match="covariance: got a least eigenvalue of -1"):
        DataCovariance(plain, guided.likelihood, covariance=-torch.eye(5))


def test_data_covariance_of_images_is_that_of_vectors():
    """Rows at times of their own, as vectors of four and as images of one by two by two."""
    _, covariance, _ = problem(4, 2)
    xt, times = torch.randn(3, 4, dtype=F64), torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    means = []
    for event in ((4,), (1, 2, 2)):
        n = len(event)

        class Half(Denoiser):
            def forward(self, x, t, n=n, **context):
                return dist.Delta(x / 2, event_dim=n)

        denoiser = Half(GaussianProcess(LogLinear(10.0, -10.0), n))

        def model(denoiser=denoiser, event=event, n=n):
            x = pyro.sample("x", Diffusion(denoiser, event, steps=2))
            pyro.sample("y", dist.Normal(x.flatten(-n)[..., :2], 0.1).to_event(1), obs=xt[0, :2])

        guided = DataCovariance(denoiser, ProgramLikelihood(model), covariance=covariance)
        means.append(guided(xt.reshape(3, *event), times).mean.reshape(3, 4))
    assert_close(means[1], means[0])
    assert (means[0] - xt / 2).abs().max() > 0.1


@pytest.mark.parametrize("variance", [1.0, 0.3])
@pytest.mark.parametrize("time", [0.1, 0.55, 0.95])
def test_pigdm_reads_isotropic_normals_exactly(time, variance):
    """With the denoiser's variance for any, and with a point mass for unit variance."""
    mean, _, reading = problem(5, 3)
    exact = isotropic(mean, variance)
    level = exact.process.level(torch.tensor(time, dtype=F64))
    xt = torch.randn(7, 5, dtype=F64)
    prior = exact(xt, level)
    given = prior.variance[0].diag()
    for denoiser in (exact, NormalDenoiser(mean, torch.eye(5, dtype=F64), point_mass=True)):
        if denoiser is not exact and variance != 1:
            continue
        found = PiGDM(denoiser, reading.likelihood(denoiser)).twisted(xt, level)
        assert_close(found.posterior.mean, reading.posterior(prior.mean, given)[0])
        assert_close(found.log_twist, reading.log_evidence(prior.mean, given))


def test_tmpd_is_exact_for_coordinates_and_sums_rows_otherwise():
    mean, covariance, reading = problem(4, 2)
    level = isotropic(mean, 1.0).process.level(TIME)
    xt = torch.randn(7, 4, dtype=F64)
    picks = Reading(torch.eye(4, dtype=F64)[[2, 0]], reading.y, reading.scale)
    denoiser = NormalDenoiser(mean, covariance.diagonal().diag())
    found = TMPD(denoiser, picks.likelihood(denoiser)).twisted(xt, level)
    prior, given = denoiser(xt, level), denoiser.given(level)[1]
    assert_close(found.posterior.mean, picks.posterior(prior.mean, given)[0])
    assert_close(found.log_twist, picks.log_evidence(prior.mean, given))

    denoiser = NormalDenoiser(mean, covariance)
    shift = TMPD(denoiser, reading.likelihood(denoiser))(xt, level).mean - denoiser(xt, level).mean
    b = reading.matrix / reading.scale[:, None]
    given = denoiser.given(level)[1]
    r = (reading.y - denoiser(xt, level).mean @ reading.matrix.mT) / reading.scale
    sums = (1 + (b @ given @ b.mT).sum(-1)).clamp(min=1)
    assert_close(shift, (r / sums) @ b @ given)


def test_diffpir_solves_its_proximal_problem_without_a_gradient():
    """The minimum of |r|^2 + lam (alpha/sigma)^2 |x - x0_hat|^2; the denoiser is read without a graph."""
    mean, covariance, reading = problem(5, 3)
    denoiser = NormalDenoiser(mean, covariance)
    level, xt = denoiser.process.level(TIME), torch.randn(7, 5, dtype=F64)
    seen = []
    denoiser.register_forward_pre_hook(lambda _, args: seen.append(torch.is_grad_enabled()))
    found = DiffPIR(denoiser, reading.likelihood(denoiser), lam=2.5)(xt, level).mean
    assert seen[-1] is False
    x0 = denoiser(xt, level).mean
    b = reading.matrix / reading.scale[:, None]
    pull = 2.5 * level.alpha**2 / level.sigma**2
    target = (reading.y / reading.scale) @ b + pull * x0
    assert_close(found, target @ torch.linalg.inv(b.mT @ b + pull * torch.eye(5, dtype=F64)))


def test_program_of_a_whole_plate_is_one_row():
    """A sum over the plate: all data of a sample move together, as the joint posterior says."""
    mean, covariance, _ = problem(3, 1)
    denoiser = NormalDenoiser(mean, covariance)
    y, weights = torch.tensor(1.3, dtype=F64), torch.tensor([1.0, -2.0, 0.5], dtype=F64)

    def model():
        with pyro.plate("data", 4):
            x = pyro.sample("x", Diffusion(denoiser, (3,), steps=2))
        total = (x * weights).sum(-1).sum(-1)
        pyro.sample("y", dist.Normal(total, torch.tensor(0.4, dtype=F64)), obs=y)

    level, xt = denoiser.process.level(TIME), torch.randn(6, 4, 3, dtype=F64)
    prior, given = denoiser(xt, level), denoiser.given(level)[1]
    joint = Reading(weights.repeat(4)[None], y[None], 0.4)
    block = torch.block_diag(*[given] * 4)
    for solver in ("direct", "cg"):
        guided = MMPS(denoiser, ProgramLikelihood(model), solver=solver)
        exact = joint.posterior(prior.mean.flatten(-2), block)[0]
        assert_close(guided(xt, level).mean.flatten(-2), exact)
    log_twist = guided.twisted(xt, level).log_twist
    assert log_twist.shape == (6, 1)
    assert_close(log_twist[:, 0], joint.log_evidence(prior.mean.flatten(-2), block))


# The plug-in likelihood.


def test_plug_in_gradient_is_that_of_the_program():
    """Against central differences of log p(y | x0_hat(x_t)), on a mixture and a non-linear program."""
    denoiser = mixture(LogLinear(10.0, -10.0))
    likelihood = curved(denoiser, 2)
    level, xt = denoiser.process.level(TIME), torch.randn(5, 2, dtype=F64)
    found = PlugIn(denoiser, likelihood, scale=0.7, line_search=False).twisted(xt, level)

    def value(x):
        return likelihood.log_prob(denoiser(x, level).mean)

    h = 1e-6
    steps = h * torch.eye(2, dtype=F64)
    gradient = torch.stack([(value(xt + e) - value(xt - e)) / (2 * h) for e in steps], -1)
    shift = found.posterior.mean - denoiser(xt, level).mean
    assert_close(shift, 0.7 * level.sigma**2 / level.alpha * gradient, atol=1e-6, rtol=1e-5)
    assert_close(found.log_twist, value(xt))


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("time", [0.999, 0.5, 0.05])
def test_plug_in_is_exact_for_one_observation(noise, time):
    """The line search finds the posterior's mean that MMPS solves for, where the bare gradient is far off."""
    process = GaussianProcess(LogLinear(10.0, -10.0))
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 2.0)

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,), steps=2))
        read = dist.Normal(x[..., 0] - 0.5 * x[..., 1], noise)
        pyro.sample("y", read, obs=torch.tensor(1.5, dtype=F64))

    likelihood, t = ProgramLikelihood(model), torch.tensor(time, dtype=F64)
    xt = torch.randn(4, 2, dtype=F64)
    found = PlugIn(denoiser, likelihood).twisted(xt, t)
    exact = MMPS(denoiser, likelihood)(xt, t).mean
    assert_close(found.posterior.mean, exact, rtol=1e-6, atol=1e-9)
    assert_close(found.log_twist, likelihood.log_prob(denoiser(xt, t).mean))


class Kinked(Likelihood):
    """No residuals, no curvature, and no density beyond 1e3: the step must find its size by trying."""

    batch_shape, event_shape = torch.Size(), torch.Size((2,))

    def log_prob(self, x0):
        gap = 1e3 * (x0 - 1).abs().sum(-1)
        return torch.where(x0.abs().amax(-1) < 1e3, -gap, math.nan)


def test_plug_in_never_makes_the_observations_less_likely():
    denoiser = mixture(LogLinear(10.0, -10.0))
    for likelihood in (Kinked(), curved(denoiser, 2)):
        for time in (0.999, 0.7, 0.3, 0.01):
            xt, t = 2 * torch.randn(50, 2, dtype=F64), torch.tensor(time, dtype=F64)
            found = PlugIn(denoiser, likelihood).twisted(xt, t)
            after = likelihood.log_prob(found.posterior.mean)
            assert (after > found.log_twist - 1e-9).all()
            assert (found.posterior.mean.abs() < 1e2).all()


def test_plug_in_against_a_negative_derivative_stays():
    """A network whose mean falls with x_t: the shift would go uphill."""

    class Falling(torch.nn.Module):
        def forward(self, x, log_snr):
            return -0.1 * x

    denoiser = GaussianDenoiser(Falling(), GaussianProcess(LogLinear(10.0, -10.0)), Data())

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,), steps=2))
        pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=torch.ones(2))

    likelihood, xt, t = ProgramLikelihood(model), torch.randn(5, 2), torch.tensor(0.9)
    assert_close(PlugIn(denoiser, likelihood)(xt, t).mean, denoiser(xt, t).mean)
    bare = PlugIn(denoiser, likelihood, line_search=False)(xt, t).mean
    assert (likelihood.log_prob(bare) < likelihood.log_prob(denoiser(xt, t).mean)).all()


@pytest.mark.parametrize("squared_norm", [True, False])
def test_dps_step_is_the_papers(monkeypatch, squared_norm):
    """x_s differs from the unguided one by -zeta grad E / sqrt(E), at every step of the grid."""
    monkeypatch.setattr(ancestral, "draw", lambda kernel: per_coordinate(kernel).mean)
    denoiser = mixture(LogLinear(10.0, -10.0))
    likelihood = curved(denoiser, 2)
    times = uniform_log_snr(denoiser.process.schedule, 4, F64)
    rule = DPSStep(0.2, times, squared_norm=squared_norm)
    guided = PlugIn(denoiser, likelihood, step_size=rule)
    for j in (1, 3, 4):
        xt = torch.randn(5, 2, dtype=F64).requires_grad_()
        step = times[j - 1 : j + 1]
        x0 = denoiser(xt, times[j]).mean
        r = likelihood.residual(x0)
        energy = r.square().sum(-1) if squared_norm else -likelihood.log_prob(x0)
        (slope,) = torch.autograd.grad(energy.sum(), xt)
        scaled = 0.2 * slope / (energy if squared_norm else energy.clamp(min=1)).sqrt()[:, None]
        xt = xt.detach()
        expected = simulate(denoiser, step, xt, Ancestral()) - scaled.detach()
        assert_close(simulate(guided, step, xt, Ancestral()), expected)
    assert_close(guided(xt, times[0]).mean, denoiser(xt, times[0]).mean)


def test_plug_in_takes_any_likelihood():
    denoiser = mixture(LogLinear(10.0, -10.0))

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,), steps=2))
        pyro.sample("counts", dist.Poisson(x.exp()).to_event(1), obs=torch.tensor([3.0, 0.0]))

    likelihood = ProgramLikelihood(model)
    law = Diffusion(PlugIn(denoiser, likelihood), (2,), steps=5)
    assert torch.isfinite(law.sample((4,))).all()
    with pytest.raises(ValueError, match=r"counts.*Normal.*deviance.*PlugIn"):
        MMPS(denoiser, likelihood)(torch.zeros(2, dtype=F64), TIME)


# What every wrapper keeps.


@each_method
def test_row_alone_equals_row_in_a_batch(method):
    """One read and a whole walk; the other rows are wild."""
    denoiser = mixture(LogLinear(10.0, -10.0))
    guided = method(denoiser, curved(denoiser, 2))
    xt = torch.randn(5, 2, dtype=F64) * torch.tensor([1.0, 30, 3, 100, 0.1], dtype=F64)[:, None]
    alone, together = guided.twisted(xt[:1], TIME), guided.twisted(xt, TIME)
    assert_close(alone.posterior.mean, together.posterior.mean[:1])
    assert_close(alone.log_twist, together.log_twist[:1])
    assert_close(guided(xt[:1], TIME).mean, guided(xt, TIME).mean[:1])
    times = uniform_log_snr(denoiser.process.schedule, 6, F64)
    xt = torch.randn(5, 2, dtype=F64)
    if not isinstance(guided, PlugIn):
        assert_close(
            simulate(guided, times, xt[:1], DPMSolverPP()),
            simulate(guided, times, xt, DPMSolverPP())[:1],
        )


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *STOCHASTIC], ids=repr)
def test_row_alone_under_every_sampler(monkeypatch, sampler):
    """Four steps of MMPS, on the same noise."""
    denoiser = mixture(LogLinear(6.0, -6.0))
    guided = MMPS(denoiser, curved(denoiser, 2))
    times = uniform_log_snr(denoiser.process.schedule, 4, F64)
    x, noises = torch.randn(5, 2, dtype=F64), torch.randn(20, 5, 2, dtype=F64)

    def walk(rows):
        feed = iter(noises[:, :rows])

        def draw(kernel):
            base = per_coordinate(kernel)
            return base.mean + base.stddev * next(feed)

        for module in (ancestral, heun):
            monkeypatch.setattr(module, "draw", draw)
        return simulate(guided, times, x[:rows], sampler)

    assert_close(walk(1)[0], walk(5)[0])


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_images_shapes_and_dtypes(method, dtype, batch):
    """A network over images inside a plate, each datum with a time of its own."""
    denoiser = GaussianDenoiser(Tiny((1, 2, 2)), GaussianProcess(Cosine(), event_dim=3)).to(dtype)
    with torch.no_grad():  # small weights: three steps of a random network may leave the model
        for p in denoiser.parameters():
            p.mul_(0.1)
    y = torch.randn(3, 2, dtype=dtype)

    def model():
        with pyro.plate("images", 3):
            x = pyro.sample("x", Diffusion(denoiser, (1, 2, 2), steps=3))
            pyro.sample("y", dist.Normal(x.mean(-2).squeeze(-2), 0.5).to_event(1), obs=y)

    likelihood = ProgramLikelihood(model)
    guided = method(denoiser, likelihood)
    xt = torch.randn(*batch, 3, 1, 2, 2, dtype=dtype)
    found = guided.twisted(xt, torch.rand(*batch, 3, dtype=dtype))
    assert found.posterior.batch_shape == (*batch, 3)
    assert found.posterior.event_shape == (1, 2, 2)
    assert found.log_twist.shape == (*batch, 3)
    assert found.posterior.mean.dtype == found.log_twist.dtype == dtype
    assert not found.posterior.mean.requires_grad
    assert all(p.grad is None for p in denoiser.parameters())
    law = Diffusion(guided, (1, 2, 2), steps=3).expand((3,))
    assert law.sample(batch).shape == xt.shape


@pytest.mark.parametrize(
    ("method", "walks"),
    [
        (MMPS, 3),
        (functools.partial(MMPS, solver="cg", iterations=2), 2),
        (functools.partial(MMPS, solver="gmres", iterations=2), 2),
        (PiGDM, 1),
        (TMPD, 2),
        (PlugIn, 1),
    ],
)
def test_cost(monkeypatch, method, walks):
    """One run of program and denoiser; no walk back through the denoiser more than said."""
    mean, covariance, reading = problem(5, 3)
    denoiser = NormalDenoiser(mean, covariance)
    likelihood = reading.likelihood(denoiser)
    guided = method(denoiser, likelihood)
    counts = {"run": 0, "read": 0, "walk": 0}

    def counted(*_):
        counts["walk"] += 1

    def watch(_, __, out):
        counts["read"] += 1
        per_coordinate(out).loc.register_hook(counted)

    def observed(*arguments):
        counts["run"] += 1
        return run(*arguments)

    denoiser.register_forward_hook(watch)
    run = batches.observed
    monkeypatch.setattr(batches, "observed", observed)
    guided(torch.randn(7, 5, dtype=F64), TIME)
    # The line search: all shares in one batch, and the best. Else whether residuals are linear, on three.
    runs = 3 if method is PlugIn else 2
    assert counts == {"run": runs, "read": 1, "walk": walks}


# Solvers.


@pytest.mark.parametrize("solver", [conjugate_gradients, gmres])
def test_krylov_solvers(solver):
    """Exact in m iterations and unharmed by more of them, by zeros and by wild batch-mates."""
    torch.manual_seed(0)
    root = torch.randn(2, 4, 6, 6, dtype=F64)
    matrix = torch.eye(6, dtype=F64) + root @ root.mT
    if solver is gmres:
        matrix = matrix + torch.randn(6, 6, dtype=F64)
    b = torch.randn(2, 4, 6, dtype=F64)
    b[0, 1] = 0
    b[1, 2] *= 1e8
    half = torch.randn(5, 6, dtype=F64)

    def over(matrix):
        def apply(p):
            return (matrix @ p.unsqueeze(-1)).squeeze(-1), (p @ half.mT,)

        return apply

    exact = torch.linalg.solve(matrix, b)
    for iterations in (6, 40):
        u, (image,) = solver(over(matrix), b, iterations)
        assert_close(u, exact, rtol=1e-6, atol=1e-8)
        assert_close(image, u @ half.mT)
    few = solver(over(matrix), b, 3).u
    assert_close(few[1, 0], solver(over(matrix[1, 0]), b[1, 0], 3).u)
    assert not torch.allclose(few, exact, rtol=1e-3)


def test_bad_jacobian_cannot_enlarge_the_residual():
    """A denoiser that runs backwards: S keeps its eigenvalues at 1 or more."""

    class Backwards(NormalDenoiser):
        def given(self, level):
            gain, covariance = super().given(level)
            return -3 * gain, covariance

    mean, covariance, reading = problem(5, 3)
    denoiser = Backwards(mean, covariance)
    guided = MMPS(denoiser, reading.likelihood(denoiser))
    found = guided.twisted(torch.randn(7, 5, dtype=F64), TIME)
    assert torch.isfinite(found.posterior.mean).all()
    r, log_normalizer = guided.likelihood.whitened(found.prior.mean)
    assert_close(found.log_twist, log_normalizer - 0.5 * r.square().sum(-1))


def test_small_eigenvalues_hide_behind_fair_pivots():
    """S = [[1, 10], [10, 101]] has pivots 1 and 1, and an eigenvalue of 0.0098."""
    gap = torch.tensor([[0.0, 10.0], [10.0, 100.0]], dtype=F64)
    u, _ = solve(gap.repeat(2, 1, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64))
    assert (u.norm(dim=-1) <= 1 + 1e-9).all()


def test_more_sharp_readings_than_uncertain_numbers_in_single_precision():
    # The eigenvalues of eight directions are 1, those of the others 1e8: rounding makes them negative.
    a = torch.randn(24, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    r, gap = 1e4 * a.sum(1), 1e8 * a @ a.mT
    u, log_evidence = solve(gap.float()[None], r.float()[None])
    exact, exactly = solve(gap[None], r[None])
    assert u.dtype == torch.float32
    size = 1e4 * a.mT @ exact[0]  # the shift
    assert (1e4 * a.mT @ u[0].double() - size).norm() < 1e-3 * size.norm()
    # Eigenvalues of 1 that are lost in rounding of 10: some nats of a determinant, not NaN.
    assert abs(float(log_evidence - exactly)) < 30


def test_rows_that_are_not_finite_stay_alone():
    gap, r = torch.eye(2, dtype=F64).repeat(3, 1, 1), torch.ones(3, 2, dtype=F64)
    gap[1, 0, 1] = torch.inf
    u, log_evidence = solve(gap, r)
    assert u[1].isnan().all() and log_evidence[1].isnan()
    assert_close(u[[0, 2]], torch.full((2, 2), 0.5, dtype=F64))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e200])
@pytest.mark.parametrize("solver", [conjugate_gradients, gmres])
def test_a_system_that_overflows_leaves_the_others_alone(solver, bad):
    torch.manual_seed(0)
    root = torch.randn(4, 6, 6, dtype=F64)
    matrix, b = torch.eye(6, dtype=F64) + root @ root.mT, torch.randn(4, 6, dtype=F64)
    rows = [0, 2, 3]

    def over(matrix):
        return lambda p: (product := (matrix @ p.unsqueeze(-1)).squeeze(-1), (product,))

    expected = solver(over(matrix[rows]), b[rows], 4)
    matrix[1, 2, 3] = bad
    u, (image,) = solver(over(matrix), b, 4)
    assert_close(u[rows], expected.u, rtol=1e-12, atol=1e-12)
    assert_close(image[rows], expected.images[0], rtol=1e-12, atol=1e-12)
    if bad != 1e200:
        assert not image[1].isfinite().any()


@each_method
@pytest.mark.parametrize("full", [False, True], ids=["walk", "twist"])
def test_a_program_that_overflows_for_one_row_leaves_the_others_alone(method, full):
    denoiser = mixture(LogLinear(10.0, -10.0))
    guided = method(denoiser, curved(denoiser, 2))
    read = (lambda x: guided.twisted(x, TIME).posterior) if full else (lambda x: guided(x, TIME))
    xt, rows = torch.randn(4, 2, dtype=F64), [0, 2, 3]
    expected = read(xt[rows]).mean
    xt[1] = 1e4  # sinh of it is infinite
    assert_close(read(xt).mean[rows], expected, rtol=1e-10, atol=1e-10)


# At the door.


@pytest.mark.parametrize("method", [MMPS, PiGDM, TMPD])
def test_full_gradient_is_that_of_the_log_twist(method):
    """Against central differences of the log-twist, under a mixture and a program that bends."""
    denoiser = mixture(LogLinear(10.0, -10.0))
    guided = method(denoiser, curved(denoiser, 2), full_gradient=True)
    level = guided.process.level(TIME)
    x = torch.tensor([[0.3, -0.4], [-0.8, 0.9], [0.1, 0.2]], dtype=F64)
    found = guided.twisted(x, TIME)
    slopes = []
    for step in 1e-5 * torch.eye(2, dtype=F64):
        up, down = (guided.twisted(x + sign * step, TIME).log_twist for sign in (1, -1))
        slopes.append((up - down) / 2e-5)
    shift = level.sigma**2 / level.alpha * torch.stack(slopes, -1)
    assert_close(found.posterior.mean - found.prior.mean, shift, rtol=1e-5, atol=1e-7)
    once = method(denoiser, guided.likelihood, relinearizations=0)
    assert_close(found.log_twist, once.twisted(x, TIME).log_twist)
    assert_close(guided(x, TIME).mean, found.posterior.mean)


def test_full_gradient_of_a_normal_prior_is_the_papers():
    mean, covariance, reading = problem(5, 3)
    denoiser = NormalDenoiser(mean, covariance)
    x = torch.randn(7, 5, dtype=F64)
    likelihood = reading.likelihood(denoiser)
    plain, full = (MMPS(denoiser, likelihood, full_gradient=f)(x, TIME) for f in (False, True))
    assert_close(full.mean, plain.mean)


def test_what_the_full_gradient_adds_is_limited():
    """Far modes, a sharp reading and a state between them: the gradient of S alone would throw it away."""
    schedule = LogLinear(10.0, -10.0)
    means = torch.tensor([[-40.0], [0.0], [41.0]], dtype=F64)
    denoiser = MixtureDenoiser(
        GaussianProcess(schedule), torch.ones(3, dtype=F64), means, torch.tensor(1e-4, dtype=F64)
    )
    reading = Reading(torch.ones(1, 1, dtype=F64), torch.tensor([41.0], dtype=F64), 1e-2)
    likelihood, time = reading.likelihood(denoiser), torch.tensor(0.85, dtype=F64)
    level = denoiser.process.level(time)
    x = torch.linspace(-50, 50, 801, dtype=F64).unsqueeze(-1) * level.alpha
    plain, full = (MMPS(denoiser, likelihood, full_gradient=f)(x, time) for f in (False, True))
    kept = (plain.mean - denoiser(x, time).mean).abs()
    added = (full.mean - plain.mean).abs()
    limit = kept + level.sigma / level.alpha
    assert (added <= limit * (1 + 1e-9)).all()
    assert (added > 0.999 * limit).any()


def test_data_variance_stands_in_for_the_denoisers():
    mean, _, reading = problem(5, 3)
    denoiser = isotropic(mean, 0.7)
    likelihood, x = reading.likelihood(denoiser), torch.randn(7, 5, dtype=F64)
    own = PiGDM(denoiser, likelihood).twisted(x, TIME)
    same = PiGDM(denoiser, likelihood, data_variance=0.7).twisted(x, TIME)
    assert_close(same.posterior.mean, own.posterior.mean)
    assert_close(same.log_twist, own.log_twist)
    other = PiGDM(denoiser, likelihood, data_variance=2.0).twisted(x, TIME)
    assert (other.log_twist - own.log_twist).abs().min() > 1e-3
    with pytest.raises(ValueError, match="data_variance: got -1"):
        PiGDM(denoiser, likelihood, data_variance=-1.0)
    with pytest.raises(ValueError, match="full_gradient: got True for MMPS, solver='cg'"):
        MMPS(denoiser, likelihood, solver="cg", full_gradient=True)


def test_bad_arguments():
    denoiser = mixture(LogLinear(10.0, -10.0))
    likelihood = curved(denoiser, 2)
    times = torch.linspace(0, 1, 5)
    with pytest.raises(ValueError, match="denoiser: got str"):
        MMPS("denoiser", likelihood)
    with pytest.raises(ValueError, match="solver: got 'lu', expected 'direct', 'cg' or 'gmres'"):
        MMPS(denoiser, likelihood, solver="lu")
    with pytest.raises(ValueError, match="iterations: got 0"):
        MMPS(denoiser, likelihood, iterations=0)
    with pytest.raises(ValueError, match="lam: got 0"):
        DiffPIR(denoiser, likelihood, lam=0)
    with pytest.raises(ValueError, match="scale: got -1"):
        PlugIn(denoiser, likelihood, scale=-1)
    with pytest.raises(ValueError, match=r"step_size: got 0.5, expected DPSStep"):
        PlugIn(denoiser, likelihood, step_size=0.5)
    with pytest.raises(ValueError, match="zeta: got 0"):
        DPSStep(0, times)
    with pytest.raises(ValueError, match=r"times: .*increase"):
        DPSStep(1, times.flip(0))
    with pytest.raises(ValueError, match="eta: got 2"):
        DPSStep(1, times, eta=2)

    class Blind(MixtureDenoiser):
        def forward(self, xt, t, **context):
            return super().forward(xt.detach(), t, **context)

    blind = Blind(denoiser.process, denoiser.weights, denoiser.means, denoiser.variances)
    with pytest.raises(ValueError, match=r"Blind whose mean has no gradient.*DiffPIR"):
        MMPS(blind, likelihood)(torch.zeros(2, dtype=F64), TIME)
    assert isinstance(MMPS(denoiser, likelihood), GuidedDenoiser)
