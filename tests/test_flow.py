"""The ODE view: densities against closed form, and what Pyro asks of a distribution."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.dynamics import ExactTrace, Hutchinson, HutchPlusPlus, ODESolver
from pyro_diffusion.dynamics.ode import end_angles, level_at, transport
from pyro_diffusion.dynamics.refinement import refined
from pyro_diffusion.dynamics.trace_estimators import gaussian, sphere
from pyro_diffusion.evaluate import flow_log_likelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified
from tests.exact import MEANS, SCHEDULES, VARIANCES, WEIGHTS, Gauge, mixture, mixture_law, slope
from tests.small_diffusions import Tiny, conditional

# Ends so far out that neither the noise left in the data nor the prior shows.
WIDE = LogLinear(16, -16)
FINE = {"solver": ODESolver("rk4", steps=32)}


def flow(schedule=WIDE, **arguments) -> ProbabilityFlow:
    return ProbabilityFlow(mixture(schedule), (2,), **arguments)


def many(d: int) -> MixtureDenoiser:
    """25 components; the density that likelihoods by ODE are known for."""
    means = torch.randn(25, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    return MixtureDenoiser(GaussianProcess(WIDE), torch.ones(25).double(), means, 0.05)


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 16])
def test_log_density_of_the_mixture(d):
    denoiser = many(d)
    x = denoiser.data().sample((40,))
    density = ProbabilityFlow(denoiser, (d,)).score(x)
    error = (density.value - denoiser.data().log_prob(x)) / d
    assert error.abs().max() < 1e-3
    assert density.evaluations < 150
    assert (density.standard_error == 0).all()


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])
def test_every_adaptive_method_keeps_its_tolerance(method):
    x = mixture_law().sample((30,))
    with torch.no_grad():
        fine = flow(solver=ODESolver("dopri8", rtol=1e-9, atol=1e-9)).log_prob(x)
        error = flow(solver=ODESolver(method, rtol=1e-4, atol=1e-4)).log_prob(x) - fine
    assert error.abs().max() < 1e-2


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_the_same_ode(name):
    schedule = SCHEDULES[name]()
    x = mixture_law().sample((20,))
    got = flow(schedule, **FINE).log_prob(x)
    plain = LogLinear(schedule.log_snr_max, schedule.log_snr_min)
    torch.testing.assert_close(got, flow(plain, **FINE).log_prob(x), rtol=1e-7, atol=1e-7)
    scaled = Gauge(2.5, schedule.log_snr_max, schedule.log_snr_min)
    torch.testing.assert_close(got, flow(scaled, **FINE).log_prob(x), rtol=1e-7, atol=1e-7)


def test_data_are_blurred_by_the_noise_left_at_the_start():
    # At a low end the law is that of x_0 + (sigma_0 / alpha_0) eps, at any scale of the schedule.
    x = mixture_law().sample((30,))
    blurred = mixture_law(1.0, math.exp(-2)).log_prob(x)
    for schedule in (LogLinear(4, -16), Gauge(3.0, 4, -16), Rectified(4, -16)):
        error = flow(schedule, **FINE).log_prob(x) - blurred
        assert error.abs().max() < 1e-3
    assert (blurred - mixture_law().log_prob(x)).abs().max() > 0.05


def test_levels_at_angles_are_those_of_the_schedule():
    for build in SCHEDULES.values():
        schedule = build()
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        level, process = schedule.level(t), GaussianProcess(schedule, event_dim=0)
        got = level_at(process, torch.atan2(level.sigma, level.alpha))
        for mine, theirs in zip(got, level, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
        first, last = end_angles(process)
        assert math.isclose(math.tan(first), float(level.sigma[0] / level.alpha[0]), rel_tol=1e-6)
        assert math.isclose(math.tan(last), float(level.sigma[-1] / level.alpha[-1]), rel_tol=1e-6)


def test_the_log_determinant_is_that_of_the_whole_map():
    law = flow(solver=ODESolver("dopri8", rtol=1e-8, atol=1e-8))
    x = mixture_law().sample((2,))
    end = law.transform.transport(x, inverse=True)
    for row, log_det, z in zip(x, end.log_det[0], end.z, strict=True):
        jacobian = torch.autograd.functional.jacobian(law.encode, row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            law.transform.log_abs_det_jacobian(z, row), -log_det, rtol=0, atol=1e-6
        )


def test_the_density_integrates_to_one():
    axis = torch.linspace(-4, 4, 90, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_prob = flow(solver=ODESolver("rk4", steps=24)).log_prob(grid)
    assert abs(float(log_prob.exp().sum() * (axis[1] - axis[0]) ** 2) - 1) < 1e-3


def test_samples_have_the_law_of_the_data():
    # Each coordinate and their sum against exact draws; 6 two-sample KS tests at 1e-4.
    from scipy.stats import ks_2samp

    x, exact = (
        flow(solver=ODESolver("rk4", steps=24)).sample((4000,)),
        mixture_law().sample((4000,)),
    )
    latent = flow(solver=ODESolver("rk4", steps=24)).encode(exact)
    normal = torch.randn_like(latent)
    for a, b in ((x, exact), (latent, normal)):
        for u, v in ((a[:, 0], b[:, 0]), (a[:, 1], b[:, 1]), (a.sum(1), b.sum(1))):
            assert ks_2samp(u.numpy(), v.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)]
)
def test_fixed_grids_converge_at_their_order(method, order):
    x = mixture_law().sample((10,))
    with torch.no_grad():
        fine = flow(solver=ODESolver("dopri8", rtol=1e-9, atol=1e-9)).score(x)
        errors = {"state": [], "density": []}
        grid = [32, 64, 128]
        for steps in grid:
            got = flow(solver=ODESolver(method, steps=steps)).score(x)
            errors["state"].append(float((got.latent - fine.latent).abs().mean()))
            errors["density"].append(float((got.value - fine.value).abs().mean()))
            assert (
                got.evaluations == {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}[method] * steps
            )
    for error in errors.values():
        assert abs(slope(grid, error) - order) < 0.25


# --- both ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, FINE, {"solver": ODESolver("dopri8")}])
def test_encode_and_decode_are_inverse(arguments):
    law, x = flow(**arguments), mixture_law().sample((5, 3))
    z = law.encode(x)
    torch.testing.assert_close(law.decode(z), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(law.transform.inv(x), z, rtol=0, atol=0)


@pytest.mark.parametrize("trace", [None, Hutchinson(3), HutchPlusPlus(1)])
def test_sample_and_density_in_one_pass(trace):
    law = flow(trace=trace, **FINE)
    x, log_prob = law.rsample_and_log_prob((7,))
    assert x.shape == (7, 2) and log_prob.shape == (7,)
    torch.testing.assert_close(law.log_prob(x), log_prob, rtol=0, atol=1e-3)


def test_rows_do_not_see_each_other():
    x = mixture_law().sample((8,))
    together = flow(**FINE).log_prob(x)
    torch.testing.assert_close(
        torch.stack([flow(**FINE).log_prob(row) for row in x]), together, rtol=0, atol=1e-10
    )
    # Adaptive steps fit the row that needs the shortest, however many others there are.
    hard = torch.tensor([[-0.5, 0.75]], dtype=torch.float64)
    easy = torch.tensor([[-2.0, 0.0]], dtype=torch.float64).expand(400, 2)
    counts = [flow().score(x).evaluations for x in (easy, hard, torch.cat([easy, hard]))]
    assert counts[0] < counts[1] <= counts[2]
    # So rows agree to the tolerance.
    law = flow()
    alone = torch.stack([law.log_prob(row) for row in x])
    assert (law.log_prob(x) - alone).abs().max() < 2e-3
    far = torch.cat([x, torch.full((1, 2), 60.0, dtype=torch.float64)])
    assert (law.log_prob(far)[:-1] - mixture_law().log_prob(x)).abs().max() < 2e-3


class Torn(MixtureDenoiser):
    """A denoiser that fails for data far off."""

    def forward(self, xt, t, **context):
        posterior = super().forward(xt, t, **context)
        lost = (xt.abs() > 50).any(-1, keepdim=True)
        mean = torch.where(lost, torch.nan, posterior.mean)
        return dist.Delta(mean, event_dim=1, validate_args=False)


def test_a_row_that_is_lost_sets_no_step():
    denoiser, x = Torn(GaussianProcess(WIDE), WEIGHTS, MEANS, VARIANCES), mixture_law().sample((4,))
    ends = end_angles(denoiser.process)
    for estimate in (None, ExactTrace()):
        expected = transport(denoiser, x[1:], *ends, ODESolver(), trace=estimate)
        bad = torch.cat([torch.full((1, 2), 60.0, dtype=torch.float64), x[1:]])
        got = transport(denoiser, bad, *ends, ODESolver(), trace=estimate)
        assert got.z[0].isnan().all()
        assert got.evaluations == expected.evaluations
        torch.testing.assert_close(got.z[1:], expected.z, rtol=1e-10, atol=1e-10)


# --- estimated traces -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace", [Hutchinson(1000), Hutchinson(1000, gaussian), Hutchinson(1000, sphere)]
)
def test_hutchinson_is_unbiased_and_knows_its_error(trace):
    # 12 data, each within 4.5 of its own standard errors: a false alarm in 10 000 runs.
    x = mixture_law().sample((12,))
    exact = flow(solver=ODESolver("rk4", steps=24)).log_prob(x)
    density = flow(solver=ODESolver("rk4", steps=24), trace=trace).score(x)
    assert (density.standard_error > 0).all()
    score = (density.value - exact) / density.standard_error
    assert (score.abs() < 4.5).all()
    # Their mean square is that of 12 normals: outside of this interval once in 10 000 runs.
    assert 0.1 < score.square().mean() < 3.6


def test_hutch_plus_plus_is_exact_with_a_probe_per_dimension():
    x = mixture_law().sample((6,))
    law = flow(trace=HutchPlusPlus(2), **FINE)
    torch.testing.assert_close(law.log_prob(x), flow(**FINE).log_prob(x), rtol=0, atol=1e-6)


def test_one_probe_has_no_error_bar():
    density = flow(trace=Hutchinson(1), **FINE).score(torch.zeros(3, 2))
    assert density.standard_error.isnan().all() and density.value.isfinite().all()


def test_probes_belong_to_the_instance():
    x = mixture_law().sample((4,))
    # Probes of signs are alike too often: in two dimensions all four rows agree in one of 50 pairs.
    first, second = (flow(trace=Hutchinson(2, gaussian), **FINE) for _ in range(2))
    before = torch.get_rng_state()
    assert first.log_prob(x).equal(first.log_prob(x))
    assert first.expand((4,)).log_prob(x).equal(first.log_prob(x))
    assert torch.get_rng_state().equal(before)
    assert not first.log_prob(x).equal(second.log_prob(x))
    assert not first.condition().log_prob(x).equal(first.log_prob(x))
    seeded = [flow(trace=Hutchinson(2, seed=5), **FINE).log_prob(x) for _ in range(2)]
    assert seeded[0].equal(seeded[1])


def test_evaluation_reports_what_it_is():
    data = mixture_law().sample((30,))
    law = flow(solver=ODESolver("rk4", steps=16))
    exact = flow_log_likelihood(law, data, batch_size=16)
    assert exact.kind == "exact" and exact.evaluations == 64 and exact.dimensions == 2
    torch.testing.assert_close(exact.value, law.log_prob(data))
    assert (exact.standard_error == 0).all()
    estimated = flow_log_likelihood(
        law.replace(trace=Hutchinson(32, gaussian)), data, batch_size=16
    )
    assert estimated.kind == estimated.mean.kind == "unbiased"
    # 30 data within 7 standard errors of 32 probes each, and their mean within five: a false alarm in 10^5.
    assert (estimated.value - exact.value).abs().lt(7 * estimated.standard_error + 1e-9).all()
    assert abs(float((estimated.value - exact.value).mean())) < 5 * estimated.monte_carlo_error


# --- gradients ------------------------------------------------------------------------------------


def network() -> GaussianDenoiser:
    return GaussianDenoiser(Tiny((2,)).double(), GaussianProcess(Cosine()))


def gradients(law: ProbabilityFlow, x):
    """Of log_prob with respect to data and parameters, and of samples with respect to parameters."""
    x = x.clone().requires_grad_()
    inputs = [x, *law.denoiser.network.parameters()]
    score = torch.autograd.grad(law.log_prob(x).square().sum(), inputs)
    pyro.set_rng_seed(2)
    path = torch.autograd.grad(law.rsample((3,)).square().sum(), inputs[1:])
    return [*score, *path]


@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(2, seed=0)])
def test_adjoint_gradients_are_plain_gradients(trace):
    denoiser, x = network(), torch.randn(4, 2, dtype=torch.float64)

    def at(**arguments):
        return gradients(ProbabilityFlow(denoiser, (2,), trace=trace, **arguments), x)

    # Gradients are up to 40 in size.
    fine = at(solver=ODESolver("dopri8", rtol=1e-7, atol=1e-7))
    for solver, error in ((FINE["solver"], 4e-3), (ODESolver(), 1e-2)):
        for adjoint in (False, True):
            got = at(solver=replace(solver, adjoint=adjoint))
            for a, b in zip(got, fine, strict=True):
                assert (a - b).abs().max() < error


@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(2, gaussian, seed=0)])
def test_gradients_are_finite_differences(trace):
    denoiser = conditional().double()
    law = ProbabilityFlow(denoiser, (3,), trace=trace, solver=ODESolver("rk4", steps=4))
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    weight = denoiser.network.last.bias
    inputs = (x.requires_grad_(), y.requires_grad_(), weight)
    assert torch.autograd.gradcheck(lambda x, y, w: law.condition(y=y).log_prob(x), inputs)
    z = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, y, w: law.condition(y=y).decode(z), (z, *inputs[1:]))


def test_the_score_of_the_mixture():
    x = mixture_law().sample((10,)).requires_grad_()
    (expected,) = torch.autograd.grad(mixture_law().log_prob(x).sum(), x)
    for adjoint in (False, True):
        (got,) = torch.autograd.grad(
            flow(solver=ODESolver("rk4", steps=32, adjoint=adjoint)).log_prob(x).sum(), x
        )
        assert (got - expected).abs().max() < 5e-3


def test_nothing_is_stale_after_a_step_of_training():
    denoiser = network()
    rough = {"solver": ODESolver("rk4", steps=6)}
    law, x = ProbabilityFlow(denoiser, (2,), **rough), torch.randn(3, 2, dtype=torch.float64)
    plain = dist.TransformedDistribution(law.base_dist, [law.transform.with_cache()])
    before = law.log_prob(x)
    torch.testing.assert_close(plain.log_prob(x), before)
    y = law.sample((3,))
    with torch.no_grad():
        denoiser.network.last.bias += 1
    fresh = ProbabilityFlow(denoiser, (2,), **rough)
    for value in (x, y):
        assert law.log_prob(value).equal(fresh.log_prob(value))
        torch.testing.assert_close(plain.log_prob(value), fresh.log_prob(value))
    assert (law.log_prob(x) - before).abs().min() > 1e-3


# --- other things that hold -----------------------------------------------------------------------


def test_float32_reaches_the_tolerance():
    exact, single = mixture(LogLinear(10, -10)), mixture(LogLinear(10, -10)).float()
    law = mixture_law(1.0, math.exp(-5))
    x = law.sample((30,)).float()
    value = ProbabilityFlow(single, (2,)).log_prob(x)
    # Against float64 on a fine grid: of 40 seeds the largest errors were 1.2e-3 and, in the median, 8e-6.
    error = (value - ProbabilityFlow(exact, (2,), **FINE).log_prob(x.double())).abs()
    assert value.dtype == torch.float32 and error.max() < 5e-3 and error.median() < 5e-5
    # Against the data's law, from which the prior at t = 1 is .009 +- .0015 nats at most.
    assert (value - law.log_prob(x)).abs().max() < 2e-2


def test_the_density_of_a_denoiser_without_a_variance_is_that_of_its_mean():
    x = mixture_law().sample((5,))
    point = ProbabilityFlow(mixture(WIDE, point_mass=True), (2,), **FINE)
    torch.testing.assert_close(point.log_prob(x), flow(**FINE).log_prob(x))


def test_a_chain_and_a_flow_share_a_denoiser():
    denoiser = mixture(LogLinear(9, -9))
    x = mixture_law().sample((400,))
    exact = flow(LogLinear(9, -9), **FINE).log_prob(x)
    bound = Diffusion(denoiser, (2,), 1000).expand((400,)).log_prob(x)
    gap = exact - bound
    # The bound is below on average; 5 standard errors of its noise.
    assert gap.mean() > -5 * gap.std() / len(x) ** 0.5


def test_transport_between_inner_angles_composes():
    denoiser, z = mixture(WIDE), torch.randn(3, 2, dtype=torch.float64)
    solver = ODESolver("rk4", steps=32)
    whole = transport(denoiser, z, 1.4, 0.3, solver, trace=ExactTrace())
    half = transport(denoiser, z, 1.4, 0.8, solver, trace=ExactTrace())
    rest = transport(denoiser, half.z, 0.8, 0.3, solver, trace=ExactTrace())
    torch.testing.assert_close(rest.z, whole.z, rtol=0, atol=1e-4)
    torch.testing.assert_close(half.log_det + rest.log_det, whole.log_det, rtol=0, atol=1e-4)


def test_refined_solvers_are_finer_and_counted():
    """Four times the steps or a hundredth of the tolerances, down to ten roundings; and nothing outside."""
    x, law = torch.tensor([[0.3, -1.0]]), flow(solver=ODESolver("rk4", steps=4))
    plain = law.log_prob(x)
    with refined() as asked:
        finer = law.log_prob(x)
    assert asked.solutions == 1
    assert torch.equal(finer, flow(solver=ODESolver("rk4", steps=16)).log_prob(x))
    with refined(1) as asked:
        assert torch.equal(law.log_prob(x), plain)
    assert asked.solutions == 1
    assert torch.equal(law.log_prob(x), plain) and not torch.equal(finer, plain)
    single = 10 * torch.finfo(torch.float32).eps
    for dtype, own, least in (
        (torch.float64, 1e-3, 1e-5),
        (torch.float64, 1e-5, 1e-7),
        (torch.float32, 1e-5, single),
        (torch.float32, 1e-7, 1e-7),
    ):
        with refined():
            found = ODESolver(rtol=own, atol=own)._refined(dtype)
        assert (found.rtol, found.atol) == pytest.approx((least, least))
