"""Small runs: their evidence in closed form, weighted draws, and runs that die and are made again."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Importance, Predictive, Trace_ELBO
from pyro.infer.smcfilter import SMCFailed
from scipy import stats

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import MMPS, SampledGuidance
from pyro_diffusion.infer import AutoTwistedSMC, TwistedSMC
from pyro_diffusion.infer.filtering import small_runs
from pyro_diffusion.infer.filtering.independent_runs import (
    independent_variance,
    log_mean_square_error,
)
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.schedules import Rectified, uniform
from pyro_diffusion.unreliable import UnreliableWarning
from tests.test_particle_gibbs import F64, NOISE, Misguided, Y, chain, readings

LOG_Z = float(dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(Y).sum())
MEAN, SD = Y / (1 + NOISE**2), NOISE / math.sqrt(1 + NOISE**2)
WIDTH = 0.5


def within(law: Diffusion, *centres: float) -> ProgramLikelihood:
    """Readings that a first coordinate is within WIDTH of, each of a datum of its own, and 0 elsewhere."""
    y = torch.tensor(centres, dtype=F64)

    def model():
        with pyro.plate("data", len(y)):
            x = pyro.sample("x", law)[..., 0]
            near = dist.Uniform(x - WIDTH, x + WIDTH, validate_args=False)
            pyro.sample("y", near, obs=y)

    return ProgramLikelihood(model)


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
@pytest.mark.parametrize("sweeps", [1, 3])
def test_the_evidence_is_unbiased_and_weights_are_proper(sweeps):
    # Eight particles under a bad twist: draws are wrong by many errors, weighted ones and the evidence by
    # none. Three z-tests, each of 7e-6 of seeds but for what the tail of weights adds.
    law = chain()
    found = TwistedSMC(law, readings(law, 1), Misguided, 8).draws(1500, sweeps=sweeps)
    assert found.log_evidence_runs.shape == (1500, 1) and found.log_evidence.kind == "unbiased"
    assert found.log_evidence.evaluations == 1500 * 8 * 5
    assert abs(found.log_evidence.value - LOG_Z) < 4.5 * found.log_evidence.standard_error
    assert found.log_evidence.standard_error < 0.2
    weights, x = found.log_weights.exp(), found.value[:, 0]
    assert float(weights.sum()) == pytest.approx(1)
    effective = float(found.verdict.effective_runs)
    assert effective == pytest.approx(float(1 / weights.square().sum())) and 50 < effective < 1400
    z = ((weights * x).sum(0) - MEAN) / SD * math.sqrt(effective)
    assert (z.abs() < 4.5).all()
    if sweeps == 1:
        assert ((x.mean(0) - MEAN) / SD * math.sqrt(1500)).abs().max() > 6
    assert "effective runs of evidence" in str(found.verdict)
    assert "runs that died" in str(found.verdict)


def test_the_error_is_that_of_independent_runs():
    # 200 data side by side, 40 runs each: squares of (log Z - exact) / error have mean 1, as a chi^2 of 200
    # within 1e-6 to either side were it normal; bounds are wider by a quarter.
    law = chain()
    found = TwistedSMC(law, readings(law, 200), Misguided, 16).draws(40)
    assert found.log_evidence_terms.shape == found.log_evidence_errors.shape == (200,)
    z = (found.log_evidence_terms - LOG_Z) / found.log_evidence_errors
    low, high = stats.chi2(200).ppf([1e-6, 1 - 1e-6])
    assert 0.75 * low < float(z.square().sum()) < 1.25 * high
    total = found.log_evidence
    assert total.value == pytest.approx(float(found.log_evidence_terms.sum()))
    assert total.standard_error == pytest.approx(
        float(found.log_evidence_errors.square().sum().sqrt())
    )
    few = TwistedSMC(law, readings(law, 2), Misguided, 16).draws(15)
    assert few.log_evidence.standard_error == math.inf
    assert "error not estimated" in str(few.verdict)


@pytest.mark.parametrize("sd", [0.1, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("count", "beyond"), [(16, 0.14), (64, 0.055)])
def test_errors_of_log_normal_weights(sd, count, beyond):
    # Means of 2000 sets of weights: how many are off by more than three errors (.114 and .037 at most, known
    # to .007 and .004, one standard error), and errors as large as what they are errors of: both root mean
    # squares are known to 2 % but for heavy tails at sd 3 and 16.
    log_z = sd * torch.randn(count, 2000, dtype=F64) - sd**2 / 2
    off = log_z.logsumexp(0) - math.log(count)
    variance = independent_variance(log_z)
    assert (off.square() > 9 * variance).double().mean() < beyond
    assert 0.95 < float((variance.mean() / off.square().mean()).sqrt()) < 1.35


def test_the_mean_square_of_the_log_of_a_mean():
    # Of one, in closed form; of many alike, to first order; else by simulation, of which a mean of 40 000 is
    # known to 1 % (a false alarm in 1e-6 of seeds, five errors of at most .7 %).
    for s, p in ((0.0, 1.0), (0.3, 1.0), (2.0, 1.0), (8.0, 1.0), (0.7, 0.2)):
        exact = s**2 + (s**2 / 2 + math.log(p)) ** 2
        found = log_mean_square_error(torch.tensor(s), torch.tensor(p), 1)
        assert float(found) == pytest.approx(exact, rel=1e-7, abs=1e-7)
    alike = log_mean_square_error(torch.tensor(0.1), torch.tensor(1.0), 1000)
    assert float(alike) == pytest.approx(math.expm1(0.01) / 1000, rel=5e-3)
    sd, share = torch.tensor([1.0, 2.5]), torch.tensor([0.6, 1.0])
    found = log_mean_square_error(sd, share, 32)
    for s, p, mine in zip(sd.tolist(), share.tolist(), found.tolist(), strict=True):
        log_z = s * torch.randn(32, 40_000, dtype=F64) - s**2 / 2 - math.log(p)
        log_z[torch.rand(log_z.shape) > p] = -math.inf
        simulated = (log_z.logsumexp(0) - math.log(32)).square().mean()
        assert mine == pytest.approx(float(simulated), rel=0.05)


def test_runs_that_all_but_agree_have_as_small_an_error():
    # The sample variance of the mean: a quadrature of single precision had 3e-8 as the least, 1.7e-4 nats.
    log_z = 1e-4 * torch.randn(64, 3, dtype=F64)
    torch.testing.assert_close(independent_variance(log_z), log_z.var(0) / 64, rtol=1e-3, atol=0.0)


def test_evidences_of_zero_and_of_nothing_to_speak_of():
    # Half of 64 runs that agree otherwise leave the share's own error.
    half = torch.zeros(64, 1, dtype=F64)
    half[::2] = -math.inf
    assert float(independent_variance(half)) == pytest.approx(1 / 63, rel=0.03)
    spread = half + 2 * torch.linspace(-1, 1, 64, dtype=F64)[:, None]
    square = 2 * (spread[33::2] - spread[1::2].quantile(0.5)).square().sum() / 31
    log_normal = log_mean_square_error(square.sqrt(), torch.tensor(0.5), 64)
    assert float(independent_variance(spread)) == pytest.approx(float(log_normal))
    half[1:40] = -math.inf
    assert float(independent_variance(half)) == math.inf  # of twelve that are left
    apart = 19 * (torch.arange(33)[:, None] < 16).to(F64)
    assert float(independent_variance(apart)) == math.inf  # 16 of 33 are 19 nats above their median


def test_runs_far_below_the_mean_are_as_if_they_had_died():
    # 40 of 64 runs miss by 40 nats: their distance was taken for a spread, and the error for 20 nats or none.
    log_z = 0.5 * torch.randn(64, 1, dtype=F64)
    missed = torch.arange(64)[:, None] < 40
    far, gone = log_z - 40 * missed, log_z.masked_fill(missed, -math.inf)
    assert float(independent_variance(far)) == pytest.approx(float(independent_variance(gone)))
    assert float(independent_variance(far)) < 0.1
    log_z[12:] -= 40
    assert float(independent_variance(log_z)) == math.inf  # of twelve that say something


def test_first_runs_that_all_died_have_no_weights(monkeypatch):
    law, tries, side_by_side = chain(), [], small_runs._side_by_side

    def at_first_dead(smc, count, most):
        path, log_evidence, why = side_by_side(smc, count, most)
        tries.append(count)
        if len(tries) == 1:
            log_evidence = torch.full_like(log_evidence, -math.inf)
        return path, log_evidence, why

    monkeypatch.setattr(small_runs, "_side_by_side", at_first_dead)
    with pytest.warns(UnreliableWarning, match=r"100 % of 20 .*all died, log_weights are NaN"):
        found = TwistedSMC(law, within(law, 0.0), SampledGuidance, 64).draws(20)
    assert (found.value[..., 0].abs() <= WIDTH).all() and not found.verdict.dead.any()
    assert float(found.verdict.effective_runs) == 0 and found.log_evidence.value == -math.inf


def test_runs_that_die_are_made_again():
    # y = x +- 1/2: x is a normal cut to an interval. A quarter of runs of two particles die; 5 z-tests, a
    # false alarm in 7e-6 of seeds each; the bias of runs that survive is .13 (.03) sds of 1000 draws.
    law = chain()
    smc = TwistedSMC(law, within(law, 1.0, 0.0), SampledGuidance, 2)
    with pytest.warns(
        UnreliableWarning, match=r"\d\d % of 1000 runs were left without a particle in"
    ):
        found = smc.draws(1000)
    died, runs = found.verdict.died, found.log_evidence_runs
    assert (
        died.equal((runs == -math.inf).double().mean(0))
        and (died > 0.15).all()
        and (died < 0.35).all()
    )
    assert (found.verdict.copied < 0.35**5 + 4.5 * math.sqrt(0.35**5 / 1000)).all()
    for i, y in enumerate((1.0, 0.0)):
        exact = stats.truncnorm(y - WIDTH, y + WIDTH)
        mass = stats.norm.cdf(y + WIDTH) - stats.norm.cdf(y - WIDTH)
        x = found.value[:, i, 0]
        assert ((x - y).abs() <= WIDTH).all() and len(x.unique()) > 0.99 * 1000
        error = float(found.log_evidence_errors[i])
        assert abs(float(found.log_evidence_terms[i]) - math.log(mass / (2 * WIDTH))) < 4.5 * error
        effective = float(found.verdict.effective_runs[i])
        z = (float((found.log_weights[:, i].exp() * x).sum()) - exact.mean()) / exact.std()
        assert abs(z) * math.sqrt(effective) < 4.5
        assert abs(float(x.mean()) - exact.mean()) < 0.3 * exact.std()


def test_runs_take_what_survived_in_order():
    left = torch.tensor([[True, False], [True, True], [False, True], [True, True]])
    alive = torch.tensor([[False, True], [True, False], [True, False]])
    path = [torch.arange(8.0).reshape(4, 2), torch.arange(16).reshape(4, 2, 2)]
    again = [-torch.arange(6.0).reshape(3, 2) - 1, -torch.arange(12).reshape(3, 2, 2) - 1]
    filled, rest = small_runs._filled(path, left, again, alive)
    # Of the first datum runs 0 and 1 take the new runs 1 and 2, of the second run 1 takes the new run 0.
    assert filled[0].tolist() == [[-3, 1], [-5, -2], [4, 5], [6, 7]]
    assert filled[1][:, 0, 0].tolist() == [-5, -9, 8, 12]
    assert rest.tolist() == [[False, False], [False, False], [False, True], [True, True]]


def test_a_run_that_died_each_time_copies_another(monkeypatch):
    monkeypatch.setattr(small_runs, "REPEATS", 0)
    law = chain()
    with pytest.warns(UnreliableWarning, match=r"\(in vain \d+ %, which copy others\)"):
        found = TwistedSMC(law, within(law, 1.0), SampledGuidance, 2).draws(500)
    x = found.value[:, 0, 0]
    assert ((x - 1).abs() <= WIDTH).all()
    assert len(x.unique()) == 500 - round(500 * float(found.verdict.copied))
    assert found.verdict.copied.equal(found.verdict.died) and 0.1 < float(found.verdict.died) < 0.5


def test_a_datum_that_no_run_explains_leaves_the_others_alone():
    law = chain()
    smc = TwistedSMC(law, within(law, 0.0, 50.0, 0.0), SampledGuidance, 8)
    told = r"none of 20 runs of 8 particles that explains them in 1 of 3 rows \(1\), neither"
    for sweeps in (1, 3):
        with pytest.warns(UnreliableWarning, match=told):
            found = smc.draws(20, sweeps=sweeps)
        assert found.value[:, 1].isnan().all() and found.value[:, ::2].isfinite().all()
        assert (found.value[:, ::2, 0].abs() <= WIDTH).all()
        assert found.verdict.dead.tolist() == [False, True, False]
        assert found.log_evidence_terms[1] == -math.inf == found.log_evidence.value
        assert found.log_evidence_terms[::2].isfinite().all()
        assert found.log_evidence_errors[1] == math.inf and found.verdict.effective_runs[1] == 0
    with pytest.raises(SMCFailed, match=f"^observations: got {told}"):
        smc.draws(20, keep_others=False)
    with pytest.raises(
        SMCFailed, match=r"^observations: got none of 5 runs of 8 particles.*use more"
    ):
        TwistedSMC(law, within(law, 50.0), SampledGuidance, 8).draws(5)


def test_symbols_that_no_run_explains_raise():
    process = Absorbing(Rectified.full(), 3).double()
    table = TableDenoiser(process, torch.rand(3, 3, dtype=F64))
    law = Diffusion(table, (2,), times=uniform(3, F64))

    def model(y):
        with pyro.plate("data", len(y)):
            total = pyro.sample("x", law).sum(-1).to(F64)
            pyro.sample("y", dist.Uniform(total - 0.1, total + 0.1, validate_args=False), obs=y)

    def of(*y):
        return TwistedSMC(
            law, ProgramLikelihood(model, (torch.tensor(y, dtype=F64),)), SampledGuidance, 2
        )

    found = of(2.0, 2.0).draws(15)
    assert (found.value.sum(-1) == 2).all() and found.log_evidence_terms.isfinite().all()
    with pytest.raises(SMCFailed, match=r"^observations: got none of .* in 1 of 2 rows \(1\)"):
        of(2.0, 9.0).draws(15)


def test_a_joint_likelihood_has_one_filter_for_all():
    law = chain()

    def joint():
        with pyro.plate("data", 2):
            x = pyro.sample("x", law)
        total = x.sum((-2, -1))
        pyro.sample(
            "y", dist.Uniform(total - 1, total + 1, validate_args=False), obs=torch.tensor(2.0)
        )

    found = TwistedSMC(law, ProgramLikelihood(joint), SampledGuidance, num_particles=4).draws(400)
    assert found.log_evidence_runs.shape == (400,) and found.verdict.died.shape == ()
    assert ((found.value.sum((-2, -1)) - 2).abs() <= 1).all() and float(found.verdict.died) > 0
    mass = stats.norm(0, 2).cdf(3) - stats.norm(0, 2).cdf(1)
    z = (found.log_evidence.value - math.log(mass / 2)) / found.log_evidence.standard_error
    assert abs(z) < 4.5


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_a_guide_with_sweeps_has_the_density_of_its_own_run():
    # Importance weights are the runs' own evidences, whose mean is p(y) (a false alarm in 7e-6 of seeds but
    # for heavier tails), and the ELBO is a bound.
    law = chain()

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=Y)

    guide = AutoTwistedSMC(model, Misguided, num_particles=16, sweeps=2)
    importance = Importance(model, guide, num_samples=40).run()
    weights = torch.stack([*importance.log_weights]).double()
    error = independent_variance(weights).sqrt()
    assert abs(float(weights.logsumexp(0)) - math.log(40) - LOG_Z) < 4.5 * error
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=0)
    loss = elbo.loss(model, guide)
    runs = guide.swept.log_evidence_runs
    assert runs.shape == (500,) and len(runs.unique()) > 490
    assert loss == pytest.approx(float(-runs.mean())) and loss > -LOG_Z


def test_a_guide_of_a_plate_with_a_run_that_died():
    law = chain()

    def model():
        with pyro.plate("data", 2):
            x = pyro.sample("x", law)
            near = dist.Uniform(x[..., 0] - WIDTH, x[..., 0] + WIDTH, validate_args=False)
            pyro.sample("y", near, obs=torch.ones(2, dtype=F64))

    guide = AutoTwistedSMC(model, SampledGuidance, num_particles=2, sweeps=1)
    with pytest.warns(UnreliableWarning, match="left without a particle"):
        draws = Predictive(model, guide=guide, num_samples=200, parallel=True)()["x"]
    assert draws.shape == (200, 2, 2) and ((draws[..., 0] - 1).abs() <= WIDTH).all()
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    with (
        pytest.warns(UnreliableWarning),
        pytest.raises(ValueError, match=r"num_particles: got 2, of"),
    ):
        elbo.loss(model, guide)
    easy = AutoTwistedSMC(model, SampledGuidance, num_particles=64, sweeps=1)
    mass = 2 * math.log(stats.norm.cdf(1.5) - stats.norm.cdf(0.5))
    assert -elbo.loss(model, easy) == pytest.approx(mass, abs=0.1)
    assert easy.swept.log_evidence_runs.shape == (100, 2)


def test_normal_data_have_even_weights():
    law = chain()
    found = TwistedSMC(law, readings(law, 2), MMPS, 4).draws(20)
    assert (found.verdict.effective_runs > 15).all() and found.verdict.believable
    assert (found.verdict.died == 0).all() and not found.verdict.dead.any()
