"""Draws with particles of their own: independent, nearer to the posterior with every sweep, and judged."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from scipy import stats

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import MMPS, SampledGuidance
from pyro_diffusion.infer import AutoTwistedSMC, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.schedules import Rectified, uniform
from pyro_diffusion.unreliable import UnreliableWarning
from tests.test_particle_gibbs import F64, NOISE, Misguided, Y, chain, exact_paths, readings

VARIANCE = 1 / (1 + 1 / NOISE**2)
EXACT = dist.Normal(VARIANCE * Y / NOISE**2, VARIANCE**0.5)
EXACT_LOG_Z = float(dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(Y).sum())


def z_scores(draws: torch.Tensor) -> torch.Tensor:
    """Means and variances against the posterior's, in standard errors of independent draws, (2, 2)."""
    n = len(draws)
    mean = (draws.mean(0) - EXACT.mean) / (EXACT.stddev / math.sqrt(n))
    return torch.stack([mean, (draws.var(0) / VARIANCE - 1) / math.sqrt(2 / (n - 1))])


@pytest.mark.parametrize("guidance", [Misguided, MMPS], ids=lambda g: g.__name__)
def test_exact_draws_stay_exact_with_four_particles(guidance):
    # Three data side by side in 2000 chains, which start at the posterior. Each of twelve z-tests alarms
    # falsely in 7e-6 of seeds (|z| > 4.5), each of 18 KS-tests in 1e-5.
    law, chains = chain(), 2000
    smc = TwistedSMC(law, readings(law, 3), guidance, 4, 1.0)
    smc.chain = smc.chain.repeated(chains)
    path = [x.unflatten(0, (chains, 3)) for x in exact_paths(law, 3 * chains)[0]]
    before, fresh = path, exact_paths(law, 3 * chains)[0]
    for _ in range(4):
        path = smc.sweep(path)
    assert (path[-1] != before[-1]).any(-1).double().mean() > 0.6
    for datum in path[-1].unbind(1):
        assert (z_scores(datum).abs() < 4.5).all()
        for i in range(2):
            law_of = ("norm", (float(EXACT.mean[i]), float(EXACT.stddev[i])))
            assert stats.kstest(datum[:, i].numpy(), *law_of).pvalue > 1e-5
    # The past of a path, too, which ancestor sampling replaces.
    for a, b in zip(path, fresh, strict=True):
        for i in range(2):
            assert stats.ks_2samp(a[..., i].flatten().numpy(), b[:, i].numpy()).pvalue > 1e-5


def test_sweeps_take_the_bias_of_few_particles_away():
    # One sweep of three particles under a bad twist is wrong by many standard errors, thirty are not. Four
    # z-tests, a false alarm in 7e-6 of seeds each.
    law = chain()
    smc = TwistedSMC(law, readings(law, 1), Misguided, 3)
    found = smc.draws(3000, sweeps=30)
    first, last = (z_scores(found.history[i].squeeze(1)).abs() for i in (0, -1))
    assert found.history.shape == (30, 3000, 1, 2) and found.value.equal(found.history[-1])
    assert len(found) == 3000
    assert first.max() > 15 and last.max() < 4.5


def test_draws_of_one_call_are_independent():
    # Of a single run of four particles two draws are often the same; the variance between means of calls is
    # that of independent draws. A chi^2 of 200 with bounds of 1e-6 to either side.
    law = chain()
    smc = TwistedSMC(law, readings(law, 100), MMPS, 4)
    found = smc.draws(20).value
    assert len(found[:, 0].unique(dim=0)) == 20
    spread = ((found.mean(0) - EXACT.mean).square() / (VARIANCE / 20)).sum()
    low, high = stats.chi2(200).ppf([1e-6, 1 - 1e-6])
    assert low < float(spread) < high


def test_one_joint_datum_and_no_plate():
    law = chain()

    def joint():
        with pyro.plate("data", 3):
            x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x.sum((-2, -1)), NOISE), obs=Y[0])

    found = TwistedSMC(law, ProgramLikelihood(joint), num_particles=4).draws(500, sweeps=2)
    assert found.value.shape == (500, 3, 2) and found.verdict.renewed.shape == ()
    total, variance = found.value.sum((-2, -1)), 6 / (1 + 6 / NOISE**2)
    z = (total.mean() - 6 / (6 + NOISE**2) * Y[0]) / math.sqrt(variance / 500)
    assert abs(z) < 4.5  # a false alarm in 7e-6 of seeds

    def single():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=Y)

    smc = TwistedSMC(law, ProgramLikelihood(single), num_particles=2)
    assert smc.draws(1).value.shape == (1, 2)
    with pytest.raises(ValueError, match=r"^num_draws: got 0"):
        smc.draws(0)
    with pytest.raises(ValueError, match=r"^sweeps: got 0"):
        smc.draws(2, sweeps=0)
    path = smc.sweep()
    for wrong in (path[1:], [x[..., :1] for x in path], []):
        with pytest.raises(
            ValueError, match=r"^path: got \d+ states of shapes .*, expected \d+ of"
        ):
            smc.sweep(wrong)


def test_the_verdict_says_how_far_sweeps_still_change():
    law = chain()
    smc = TwistedSMC(law, readings(law, 2), Misguided, 3)
    once, settled = smc.draws(50).verdict, smc.draws(200, sweeps=30).verdict
    assert once.believable and once.change.isnan().all() and once.moved.isnan().all()
    assert "means moved, in sds          - (by chance -)" in str(once)
    assert str(once).startswith("50 chains, 1 sweep of 3 particles, the worst of 2 filters")
    assert str(smc.draws(1, sweeps=2).verdict).startswith("1 chain, 2 sweeps of 3 particles")
    assert settled.believable and 0.05 < settled.renewed.min() < settled.renewed.max() < 0.9
    # Change and chance agree once nothing changes: a chi^2 of two coordinates, |t| < 4.5 each.
    assert (settled.change < 4.5 * settled.change_by_chance).all()
    assert "means moved, in sds" in str(settled) and "30 sweeps of 3 particles" in str(settled)
    # From the first to the second sweep of a bad twist the change is plain with 4000 chains.
    with pytest.warns(
        UnreliableWarning, match=r"the last sweep still moved means by 0\.\d\d posterior"
    ):
        early = smc.draws(4000, sweeps=2).verdict
    assert not early.believable and (early.change > 5 * early.change_by_chance).any()


def test_the_guide_draws_by_sweeps():
    law = chain()

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=Y)

    guide = AutoTwistedSMC(model, MMPS, num_particles=4, sweeps=2)
    draws = Predictive(model, guide=guide, num_samples=400, parallel=True)()["x"]
    assert draws.shape == (400, 2) and (z_scores(draws).abs() < 4.5).all()  # 3e-5 of seeds
    assert guide.swept.value.equal(draws) and guide.particles is None
    assert guide.median()["x"].shape == (2,)
    one_by_one = Predictive(model, guide=guide, num_samples=3)()["x"]
    assert len(one_by_one.unique(dim=0)) == 3
    with pytest.raises(ValueError, match=r"^sweeps: got 0"):
        AutoTwistedSMC(model, sweeps=0)


def test_symbols():
    process = Absorbing(Rectified.full(), 3).double()
    law = Diffusion(
        TableDenoiser(process, torch.rand(3, 3, dtype=F64)), (2,), times=uniform(3, F64)
    )

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x.sum(-1).to(F64), 0.5), obs=torch.tensor(4.0, dtype=F64))

    found = TwistedSMC(law, ProgramLikelihood(model), SampledGuidance, 8).draws(30, sweeps=3).value
    assert found.shape == (30, 2) and (found.sum(-1) >= 3).double().mean() > 0.7


@pytest.mark.parametrize(
    "draws, shares", [(1, None), (15, None), (16, 64), (100, 10), (400, 8)], ids=str
)
def test_many_draws_under_a_network_share_out_the_particles(draws, shares, monkeypatch):
    law = chain()
    monkeypatch.setattr(type(law.denoiser), "is_exact", False)

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=Y)

    guide = AutoTwistedSMC(model, MMPS)
    with pytest.raises(ValueError, match="before its first call"):
        guide.log_evidence  # noqa: B018
    found = Predictive(model, guide=guide, num_samples=draws, parallel=True)()["x"]
    assert found.shape == (draws, 2)
    if shares is None:
        assert guide.swept is None and guide.particles.verdict is guide.verdict
        assert guide.verdict.num_particles == 1024
    else:
        assert guide.particles is None and guide.verdict is guide.swept.verdict
        assert (guide.verdict.num_particles, guide.verdict.num_chains) == (shares, draws)
        assert guide.swept.value.equal(found)
    # four errors, and .02 for what four steps leave of the twist
    assert (
        abs(guide.log_evidence.value - EXACT_LOG_Z) < 4 * guide.log_evidence.standard_error + 0.02
    )


def test_a_denoiser_in_closed_form_keeps_one_run():
    law = chain()

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=Y)

    guide = AutoTwistedSMC(model, MMPS)
    Predictive(model, guide=guide, num_samples=50, parallel=True)()
    assert guide.swept is None and guide.particles.verdict.num_particles == 1024
    for guide, count in (
        (AutoTwistedSMC(model, MMPS, sweeps=2), 20),
        (AutoTwistedSMC(model, MMPS, 32, sweeps=2), 32),
    ):
        Predictive(model, guide=guide, num_samples=50, parallel=True)()
        assert (guide.verdict.num_particles, guide.verdict.sweeps) == (count, 2)


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_draws_by_parts_are_draws(sweeps, monkeypatch):
    """No more particles than asked for are held, of runs and of sweeps, and nothing else differs."""
    law = chain()
    smc = TwistedSMC(law, readings(law, 1), Misguided, 8)
    repeated = type(smc.chain).repeated
    sizes = []

    def counted(chain, count):
        sizes.append(count)
        return repeated(chain, count)

    monkeypatch.setattr(type(smc.chain), "repeated", counted)
    found = smc.draws(1500, sweeps=sweeps, at_once=3200)
    assert sizes == [400, 400, 400, 300] * sweeps
    assert found.history.shape == (sweeps, 1500, 1, 2)
    assert found.log_evidence_runs.shape == (1500, 1)
    assert len(found.log_evidence_runs.unique()) == 1500
    # by weights there is no bias: 4.5 errors, 7e-6 of seeds each
    weights, x = found.log_weights.exp(), found.history[0][:, 0]
    assert abs(found.log_evidence.value - EXACT_LOG_Z) < 4.5 * found.log_evidence.standard_error
    z = ((weights * x).sum(0) - EXACT.mean) / EXACT.stddev
    assert (z * math.sqrt(float(found.verdict.effective_runs))).abs().max() < 4.5


def test_runs_that_die_give_way_to_one(monkeypatch):
    """Where a likelihood is 0 in places, the default is as good as one run: draws, evidence and ELBO."""
    law = chain()
    monkeypatch.setattr(type(law.denoiser), "is_exact", False)

    def model():
        x = pyro.sample("x", law)
        near = dist.Uniform(x[..., 0] - 0.2, x[..., 0] + 0.2, validate_args=False)
        pyro.sample("y", near, obs=torch.tensor(1.0, dtype=F64))

    guide = AutoTwistedSMC(model, SampledGuidance)
    draws = Predictive(model, guide=guide, num_samples=200, parallel=True)()["x"]
    assert ((draws[:, 0] - 1).abs() <= 0.2).all() and guide.swept is None
    assert guide.verdict.num_particles == 1024
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=0)
    mass = math.log((stats.norm.cdf(1.2) - stats.norm.cdf(0.8)) / 0.4)
    assert elbo.loss(model, guide) == pytest.approx(-mass, abs=0.3)


def test_an_evidence_given_other_latents_is_not_the_programs():
    law = chain()

    def model():
        noise = pyro.sample("noise", dist.LogNormal(torch.zeros((), dtype=F64), 0.1))
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, noise.unsqueeze(-1)).to_event(1), obs=Y)

    guides = AutoGuideList(model)
    guides.append(AutoNormal(poutine.block(model, hide=["x"])))
    guides.append(AutoTwistedSMC(model, MMPS, num_particles=16))
    Predictive(model, guide=guides, num_samples=3, parallel=True)()
    assert guides[1].verdict.num_particles == 16
    with pytest.raises(ValueError, match=r"log_evidence: got runs given other latents \(noise\)"):
        guides[1].log_evidence  # noqa: B018


def test_every_part_goes_on_from_its_own_paths():
    """Some chains keep the draw that they had, in every part; none has another's."""
    law = chain()
    smc = TwistedSMC(law, readings(law, 1), MMPS, 4)
    before, after = smc.draws(400, sweeps=2, at_once=400).history[:, :, 0]
    kept = (before == after).all(-1).view(4, 100).double().mean(1)
    assert (kept > 0.1).all() and (kept < 0.6).all()
