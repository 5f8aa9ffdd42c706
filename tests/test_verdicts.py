"""Error bars without a ceiling, and runs that say whether they may be believed."""

import dataclasses
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.smcfilter import SMCFailed
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.estimate import Estimate
from pyro_diffusion.guidance import MMPS, GuidedDenoiser, SampledGuidance, Twisted
from pyro_diffusion.guidance.base import shift_mean
from pyro_diffusion.infer import AutoTwistedSMC, TwistedSMC
from pyro_diffusion.infer.filtering.particle_filter import ParticleFilter
from pyro_diffusion.infer.filtering.resampling import (
    LEAST_ANCESTORS,
    effective_ancestors,
    evidence_variance,
    genealogical_variance,
)
from pyro_diffusion.infer.filtering.verdict import judge, misfit
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import LogLinear, Rectified, uniform
from pyro_diffusion.unreliable import UnreliableWarning

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
RUNS = 200


class Unguided(GuidedDenoiser):
    """The prior itself, with a constant twist: importance sampling from the prior."""

    def __init__(self, denoiser, likelihood):
        super().__init__(denoiser)

    def twisted(self, xt, t, **context):
        prior = self.denoiser(xt, t, **context)
        return Twisted(prior, prior, xt.new_zeros(xt.shape[:-1]))


class Misguided(Unguided):
    """A proposal and a twist that are both wrong, and unlike each other."""

    def twisted(self, xt, t, **context):
        prior = self.denoiser(xt, t, **context)
        shift = torch.full_like(xt, 0.3) * prior.variance.sqrt()
        return Twisted(prior, shift_mean(prior, shift), 0.5 * prior.mean[..., 0])


class Hasty(Unguided):
    """A twist that chooses one particle at the first state and knows nothing ever after."""

    def twisted(self, xt, t, **context):
        twisted = super().twisted(xt, t, **context)
        first = self.process.level(t, xt).clock.amax() < -9
        return twisted._replace(log_twist=torch.where(first, 60.0, 0.0) * xt[..., 0])


def prior(size: int, steps: int = 6) -> Diffusion:
    """Standard normal data, whose chain is exact at any number of steps."""
    process = GaussianProcess(LogLinear(10, -10))
    denoiser = MixtureDenoiser(process, ONE, torch.zeros(1, size, dtype=F64), 1.0)
    return Diffusion(denoiser, (size,), times=uniform(steps, F64))


def observed(law: Diffusion, y: Tensor, noise: float) -> ProgramLikelihood:
    """Every coordinate of every row with normal noise."""

    def model():
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", law)
            pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    return ProgramLikelihood(model)


def repeats(guidance, noise: float, size: int = 2, particles: int = 64, **options) -> TwistedSMC:
    """Independent repeats of one filter, side by side as rows of a plate with equal observations."""
    law = prior(size)
    likelihood = observed(law, torch.full((RUNS, size), 0.7, dtype=F64), noise)
    return TwistedSMC(law, likelihood, guidance, particles, **options)


HEALTHY = [
    (MMPS, 0.5, {}),
    (Misguided, 0.5, {}),
    (Misguided, 0.5, {"systematic": False}),
    (Unguided, 0.35, {"particles": 128}),
]


@pytest.mark.parametrize(("guidance", "noise", "options"), HEALTHY)
def test_the_printed_error_is_the_spread_of_two_hundred_repeats(guidance, noise, options):
    with warnings.catch_warnings():
        # A repeat in hundreds has few ancestors by chance, and says so.
        warnings.simplefilter("ignore", UnreliableWarning)
        run = repeats(guidance, noise, **options).run()
    errors, values = run.log_evidence_errors, run.log_evidence_terms
    estimated = errors < math.inf
    assert estimated.double().mean() > 0.95
    # A standard deviation of 200 repeats is known to 5 %, the root mean square of the errors to less: 1.25
    # is four standard errors, a false alarm in 1e-4 of seeds.
    ratio = errors[estimated].square().mean().sqrt() / values.std()
    assert 1 / 1.25 < ratio < 1.25
    assert run.log_evidence.standard_error == pytest.approx(float(errors.square().sum().sqrt()))


def test_collapsed_filters_have_no_error_bar():
    with pytest.warns(
        UnreliableWarning, match=r"weights collapsed .* of 200 rows .*more particles"
    ):
        run = repeats(Unguided, 0.3, size=8).run()
    assert run.log_evidence_terms.std() > 3
    # The genealogical variance, which cannot exceed 1, is what was printed before.
    assert genealogical_variance(run.log_weights, run.root, run.correction).max() <= 1
    assert (run.log_evidence_errors == math.inf).double().mean() > 0.98
    assert str(run.log_evidence).endswith("nats (unbiased, error not estimated)")
    assert (run.mean_error.isinf().double().mean() > 0.98) and not run.verdict.believable
    assert "not to be believed" in str(run.verdict)


def test_effective_size_after_the_collapse_does_not_hide_it():
    law = prior(2, steps=10)
    likelihood = observed(law, torch.zeros(1, 2, dtype=F64), 5.0)
    with pytest.warns(UnreliableWarning, match=r"effective size of 1\.\d at log-SNR -.*says less"):
        run = TwistedSMC(law, likelihood, Hasty, 64).run()
    assert run.ess[-1].min() > 32  # what a look at the end of the run would see
    assert run.verdict.effective_ancestors.max() < 2
    assert run.verdict.least_ess_log_snr.item() in (
        -10.0,
        -8.0,
    )  # chosen, then the choice is paid for
    assert run.log_evidence.standard_error == math.inf


def test_a_healthy_run_says_so():
    law = prior(3)
    run = TwistedSMC(law, observed(law, torch.full((4, 3), 0.5, dtype=F64), 0.5), MMPS, 256).run()
    verdict = run.verdict
    assert verdict.believable and verdict.problems == ()
    assert (
        verdict.least_ess.equal(run.ess.amin(0)) and (verdict.ancestors == run.ancestors[-1]).all()
    )
    assert (verdict.misfit < 2).all() and (verdict.misfit_p_value > 0.01).all()
    table = str(verdict)
    assert "256 particles, the worst of 4 filters" in table and "nothing speaks against" in table
    assert len(table.splitlines()) == 8 and "nan" not in table


def test_the_jackknife_of_the_first_generation():
    root = torch.arange(50)
    weights = torch.rand(50, 3, dtype=F64) + 1e-3
    one = torch.full((3,), 50 / 49, dtype=F64)
    logs = (weights / weights.sum(0)).log()
    found = evidence_variance(logs, root.unsqueeze(1).expand(50, 3), one)
    kept = torch.stack(
        [torch.cat([weights[:i], weights[i + 1 :]]).mean(0).log() for i in range(50)]
    )
    torch.testing.assert_close(found, (kept - kept.mean(0)).square().sum(0) * 49 / 50)
    # Small shares: Lee & Whiteley's.
    plain = genealogical_variance(logs, root.unsqueeze(1).expand(50, 3), one)
    torch.testing.assert_close(found, plain, rtol=0.1, atol=0)
    # The share that one root takes: up to a half, four effective ancestors, and no further.
    shares = torch.stack(
        [torch.tensor([q, *[(1 - q) / 49] * 49], dtype=F64) for q in (0.45, 0.55)], 1
    )
    several = root.unsqueeze(1).expand(50, 2)
    variance = evidence_variance(shares.log(), several, one[:2])
    assert (effective_ancestors(shares.log(), several) > LEAST_ANCESTORS).tolist() == [True, False]
    assert variance[1] == math.inf and 0.3 < variance[0] < 0.5


class Fair:
    """Weights of mean 1 that know nothing of one another, as a model and its own guide."""

    def __init__(self, deviation: float, filters: int) -> None:
        self.deviation, self.filters = deviation, filters

    def init(self, state):
        self.step(state)

    def step(self, state):
        z = torch.randn(state._num_particles, self.filters, dtype=F64)
        pyro.factor("weight", self.deviation * z - self.deviation**2 / 2)


class Silent:
    """A guide that draws nothing."""

    def init(self, state):
        """Nothing."""

    def step(self, state):
        """Nothing."""


@pytest.mark.parametrize(("deviation", "rarely"), [(0.35, False), (0.7, True)])
def test_runs_that_kept_ancestors_by_luck_print_no_small_error(deviation, rarely):
    filters = 2000
    found = ParticleFilter(
        Fair(deviation, filters), Silent(), 64, batch_shape=(filters,), max_plate_nesting=1
    )
    found.init()
    for _ in range(62):
        found.step()
    found.finish()
    arguments = found.log_weights, found.state["root"], found.correction
    spread = found.log_evidence.std()

    def ratio(variance: Tensor) -> float:
        return float(variance[variance < math.inf].mean().sqrt() / spread)

    error = evidence_variance(*arguments, found.weight_variance)
    jackknife = evidence_variance(*arguments)
    # Nine runs of ten where the spread is .44 nats; nine of 2000, on average, where it is .92 (none in 1e-4
    # of seeds). The sum is within 10 % of its mean in most runs, and four equal roots are .58 at most.
    assert ((error < math.inf).double().mean() < 0.1) == rarely
    assert 1 / 1.5 < ratio(error) < 1.25
    assert (ratio(jackknife) < 1 / 1.5) == rarely
    # Where weights know nothing of the future they vary by all there is, but for the logarithm's tails.
    assert found.weight_variance.mean().sqrt() == pytest.approx(float(spread), rel=0.15)


def test_equal_weights_have_no_variance():
    even = torch.full((30,), -math.log(30), dtype=F64)
    for correction in (30 / 29, (30 / 29) ** 3):
        found = evidence_variance(even, torch.arange(30), torch.tensor(correction, dtype=F64))
        assert found.abs() < 1e-12


def test_what_an_estimate_prints():
    assert str(Estimate(-3.0, 0.25, "unbiased", "nats", 1)) == "-3.0000 +- 0.2500 nats (unbiased)"
    unknown = Estimate(-3.0, math.inf, "unbiased", "nats", 1)
    assert str(unknown) == "-3.0000 nats (unbiased, error not estimated)"


def test_a_row_that_nothing_explains_leaves_the_others_alone():
    law, y = prior(2), torch.full((5, 2), 0.5, dtype=F64)
    bound = torch.tensor([math.inf, math.inf, -1e3, math.inf, math.inf])

    def model(rows):
        with pyro.plate("rows", len(rows)):
            x = pyro.sample("x", law)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y[rows])
            pyro.factor("possible", torch.where(x[..., 0] < bound[rows], 0.0, -math.inf))

    everyone, possible = torch.arange(5), torch.tensor([0, 1, 3, 4])
    smc = TwistedSMC(law, ProgramLikelihood(model, (everyone,)), Unguided, 64)
    with pytest.warns(UnreliableWarning, match=r"evidence 0, no draws.*") as caught:
        run = smc.run()
    assert "in 1 of 5 rows (2)" in str(caught[0].message)
    assert run.verdict.dead.tolist() == [False, False, True, False, False]
    assert run.log_evidence_terms[2] == -math.inf and run.value[:, 2].isnan().all()
    assert run.mean[possible].isfinite().all() and run.sample((7,))[:, possible].isfinite().all()
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(0.5)) * 2
    gap = run.log_evidence_terms[possible] - exact
    # Four numbers at 4.5 standard errors: a false alarm in 3e-5 of seeds.
    assert (gap.abs() < 4.5 * run.log_evidence_errors[possible]).all()
    assert run.log_evidence.value == -math.inf and run.log_evidence.standard_error == math.inf

    with pytest.raises(SMCFailed, match=r"row 2 of 5"):
        AutoTwistedSMC(model, Unguided, 64)(everyone)
    impossible = torch.full((2,), 2)
    with pytest.raises(SMCFailed, match=r"row 0, 1 of 2"):
        TwistedSMC(law, ProgramLikelihood(model, (impossible,)), Unguided, 64).run()


def test_a_guidance_that_breaks_one_row():
    law = prior(2)

    class Broken(Unguided):
        def twisted(self, xt, t, **context):
            twisted = super().twisted(xt, t, **context)
            nan = torch.tensor([0.0, math.nan, 0.0], dtype=F64)
            return twisted._replace(log_twist=twisted.log_twist + nan)

    smc = TwistedSMC(law, observed(law, torch.full((3, 2), 0.5, dtype=F64), 0.5), Broken, 64)
    with pytest.warns(UnreliableWarning, match=r"1 of 3 rows \(1\)"):
        run = smc.run()
    assert run.mean[[0, 2]].isfinite().all() and run.mean[1].isnan().all()


def test_symbols_cannot_be_nan():
    joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=F64)
    law = Diffusion(TableDenoiser(Absorbing(Rectified.full(), 2), joint), (2,), steps=4)

    def model():
        with pyro.plate("rows", 2):
            x = pyro.sample("x", law)
            impossible = torch.where(torch.arange(2) > 0, -math.inf, 0.0)
            pyro.factor("f", impossible + 0.0 * x.sum(-1))

    with pytest.raises(SMCFailed, match="row 1 of 2"):
        TwistedSMC(law, ProgramLikelihood(model), SampledGuidance, 16).run()


def posterior_draws(noise: float, size: int, rows: int = 2000) -> tuple[ProgramLikelihood, Tensor]:
    """Data of the program itself, and 20 draws of the exact posterior of each row."""
    x = torch.randn(rows, size, dtype=F64)
    y = x + noise * torch.randn(rows, size, dtype=F64)
    precision = 1 + noise**-2
    mean = y * noise**-2 / precision
    draws = mean + torch.randn(20, rows, size, dtype=F64) / precision**0.5
    return observed(prior(size), y, noise), draws


def test_misfit_of_right_and_of_wrong_draws():
    likelihood, draws = posterior_draws(0.5, 10)
    even = torch.full((20, 2000), -math.log(20), dtype=F64)
    chi2, p_value = misfit(likelihood, draws, even)
    # Mean of 1 with a variance of at most 2 / 10 a row: 4.5 standard errors.
    assert abs(chi2.mean() - 1) < 4.5 * (0.2 / 2000) ** 0.5
    # A p-value: at most the level's share, at 4 standard errors (false alarm 3e-5).
    assert (p_value < 0.05).double().mean() < 0.05 + 4 * (0.05 * 0.95 / 2000) ** 0.5
    chi2, p_value = misfit(likelihood, draws + 3.0, even)
    assert (p_value < 1e-4).all() and (chi2 > 10).all()


def test_a_few_draws_that_fit_do_not_hide_those_that_do_not():
    # The mean of the p-values of 20 draws was above 1e-4 with one of .002, whatever the others were.
    likelihood, draws = posterior_draws(0.5, 10)
    draws[5:] += 3.0
    even = torch.full((20, 2000), -math.log(20), dtype=F64)
    assert (misfit(likelihood, draws, even)[1] < 1e-4).all()
    # Draws that have most of the weight decide.
    uneven = torch.full((20, 2000), 0.4 / 15, dtype=F64)
    uneven[:5] = 0.6 / 5
    assert (misfit(likelihood, draws, uneven.log())[1] > 1e-6).all()
    uneven[:5], uneven[5:] = 0.3 / 5, 0.7 / 15
    assert (misfit(likelihood, draws, uneven.log())[1] < 1e-4).all()


def test_masked_observations_are_no_residuals():
    law = prior(4)
    y = torch.zeros(4, dtype=F64)
    shown = torch.tensor([True, False, True, False])

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, 0.5).mask(shown).to_event(1), obs=y)

    even = torch.full((3,), -math.log(3), dtype=F64)
    chi2, _ = misfit(ProgramLikelihood(model), torch.ones(3, 4, dtype=F64), even)
    torch.testing.assert_close(chi2, torch.tensor(4.0, dtype=F64))


def test_each_problem_is_named_by_itself():
    law = prior(2)
    good = TwistedSMC(law, observed(law, torch.zeros(2, 2, dtype=F64), 1.0), MMPS, 64).run().verdict
    assert judge(good) == ()
    low = torch.tensor([50.0, 2.0], dtype=F64)
    changed = {
        "lost a few at a time": {"effective_ancestors": low},
        "more steps near the data, or another": {
            "effective_ancestors": low,
            "least_ess": low,
            "least_ess_log_snr": torch.tensor([0.0, math.inf], dtype=F64),
        },
        "more steps there": {
            "effective_ancestors": low,
            "least_ess": low,
            "least_ess_log_snr": torch.tensor([-9.0, 2.0], dtype=F64),
        },
        "k-hat of 3.00": {
            "khat": torch.tensor([0.2, 3.0], dtype=F64),
            "num_particles": 4096,
        },
        "chi^2 9.00 a residual": {
            "misfit": torch.tensor([1.0, 9.0], dtype=F64),
            "misfit_p_value": torch.tensor([0.9, 1e-9], dtype=F64),
        },
    }
    for words, figures in changed.items():
        (problem,) = judge(dataclasses.replace(good, **figures))
        assert words in problem and "in 1 of 2 rows (1)" in problem
    assert judge(dataclasses.replace(good, khat=torch.tensor([0.9, math.nan], dtype=F64))) == ()


@pytest.mark.parametrize("particles", [2, 3, 4])
def test_few_particles_are_too_few_to_judge_by(particles):
    """However even their weights are, of a twist that is exact: nothing has collapsed."""
    law = prior(2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run = TwistedSMC(
            law, observed(law, torch.zeros(2, 2, dtype=F64), 0.5), MMPS, particles
        ).run()
    messages = [str(w.message) for w in found if w.category is UnreliableWarning]
    said = [m for m in messages if f"{particles} particles are too few to judge" in m]
    assert len(said) == 1
    assert not any(w in m for m in messages for w in ("collapsed", "lost a few", "k-hat"))
    uneven = dataclasses.replace(
        run.verdict,
        effective_ancestors=torch.tensor([1.0, 4.0], dtype=F64),
        least_ess=torch.tensor([1.0, 4.0], dtype=F64),
    )
    (problem,) = judge(uneven)
    assert problem.startswith(f"{particles} particles are too few to judge a run by in 1 of 2 rows")
