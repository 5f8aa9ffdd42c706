"""AutoGuides of a diffusion site in programs with predictions, subsamples and other guides."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Delta, LogNormal, Normal
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import MMPS
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, ParticleGibbs
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import LogLinear

STEPS, NOISE = 3, 0.5


def prior(dimensions=1):
    """A standard normal, whose chain with the exact variance is exact at any number of steps."""
    zeros = torch.zeros(1, dimensions, dtype=torch.float64)
    process = GaussianProcess(LogLinear(10, -10))
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=torch.float64), zeros, 1.0)
    return Diffusion(denoiser, (dimensions,), steps=STEPS)


PRIOR, PAIR = prior(), prior(2)
KINDS = ["guidance", "particles"]


def guide_of(kind, model, particles=200, **options):
    if kind == "guidance":
        return AutoGuidance(model, MMPS, **options)
    return AutoTwistedSMC(model, num_particles=particles, **options)


# --- predictions ----------------------------------------------------------------------------------


def predicting(y):
    x = pyro.sample("x", PRIOR)
    pyro.sample("y", Normal(x, NOISE).to_event(1), obs=y)
    new = pyro.sample("y_new", Normal(x, 0.1).to_event(1))
    pyro.sample("later", Normal(new, 0.1).to_event(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_are_left_to_the_model(kind, parallel):
    """y_new is x and noise of .1, later is y_new and as much: z-scores below 4.5 (3e-5 in all)."""
    y = torch.ones(1, dtype=torch.float64)
    guide = guide_of(kind, predicting, particles=40)
    count = 400 if parallel else 10
    draws = Predictive(predicting, guide=guide, num_samples=count, parallel=parallel)(y)
    assert set(guide(y)) == {"x"}
    for name, before in (("y_new", "x"), ("later", "y_new")):
        gap = (draws[name] - draws[before]).flatten() / 0.1
        assert gap.mean().abs() < 4.5 / math.sqrt(count)
        assert (gap.var() - 1).abs() < 4.5 * math.sqrt(2 / (count - 1))


def test_a_prediction_that_something_observed_depends_on_is_asked_for():
    def model(y):
        x = pyro.sample("x", PRIOR)
        new = pyro.sample("new", Normal(x, 0.1).to_event(1))
        pyro.sample("y", Normal(new, NOISE).to_event(1), obs=y)

    with pytest.raises(ValueError, match="latents: got no draws of new"):
        AutoGuidance(model)(torch.ones(1, dtype=torch.float64))


def half_seen(y, seen):
    x = pyro.sample("x", PAIR)
    with pyro.plate("sites", 2):
        pyro.sample("y", Normal(x, NOISE), obs=y, obs_mask=seen)


@pytest.mark.parametrize("kind", KINDS)
def test_obs_mask(kind):
    """The observed half is the likelihood, whatever stands in the rest, which is predicted (4.5 errors)."""
    y = torch.tensor([1.0, math.nan], dtype=torch.float64).nan_to_num(1e6)
    seen = torch.tensor([True, False])
    likelihood = ProgramLikelihood(half_seen, (y, seen))
    x0 = torch.randn(5, 2, dtype=torch.float64)
    exact = Normal(x0[:, 0], NOISE).log_prob(torch.tensor(1.0).double())
    assert torch.allclose(likelihood.log_prob(x0), exact)
    guide = guide_of(kind, half_seen, particles=2000)
    draws = Predictive(half_seen, guide=guide, num_samples=2000, parallel=True)(y, seen)
    x, rest = draws["x"].reshape(2000, 2), draws["y_unobserved"][..., 1]
    # Mean 1 / (1 + s^2), variance s^2 / (1 + s^2).
    variance = NOISE**2 / (1 + NOISE**2)
    error = math.sqrt(variance * (1 / 2000 + 1 / 2000))
    assert (x[:, 0].mean() - 1 / (1 + NOISE**2)).abs() < 4.5 * error + 0.02 * (kind == "guidance")
    assert x[:, 1].mean().abs() < 4.5 * math.sqrt(2 / 2000)
    assert (rest - x[:, 1]).abs().max() < 6 * NOISE
    assert torch.equal(draws["y"][:, 0], y[:1].expand(2000))


# --- subsampled plates ----------------------------------------------------------------------------

DATA = torch.tensor([3.0, -2.0, 0.0, 1.0], dtype=torch.float64).unsqueeze(-1)


def subsampled(data=DATA, size=2, indices=None):
    with pyro.plate("data", len(data), subsample_size=size, subsample=indices) as ind:
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", Normal(x, NOISE).to_event(1), obs=data[ind])


def log_evidence(data=DATA):
    return Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(data).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_subsample_draws_for_the_guides_own_data(kind):
    """Each draw belongs to the datum of its index, whose posterior is far from the others'."""
    guide, z = guide_of(kind, subsampled), []
    mean, spread = DATA / (1 + NOISE**2), NOISE / math.sqrt(1 + NOISE**2)
    for _ in range(20):
        with poutine.trace() as tracer:
            x = guide()["x"]
        assert x.shape == (2, 1)
        z.append((x - mean[tracer.trace.nodes["data"]["value"]]) / spread)
    # The mean square is 1, and 4 for guided draws of three steps; between two data it is 28 more on average.
    # Forty normals twice as wide exceed 12 in 1e-9 of seeds.
    assert torch.stack(z).square().mean() < 12


def test_the_elbo_of_subsamples_estimates_that_of_all_data():
    """N / B times the evidence of the drawn data, each by the data of the guide's indices."""
    guide = guide_of("particles", subsampled)
    elbo, found = Trace_ELBO(), []
    for _ in range(20):
        loss = elbo.loss(subsampled, guide)
        terms = guide.particles.log_evidence_terms
        assert -loss == pytest.approx(2 * float(terms.sum()), abs=1e-9)
        found.append(terms)
    exact = log_evidence()
    # Each term is one of the four data's, within the particles' error: nearest neighbours suffice.
    gaps = (torch.stack(found).unsqueeze(-1) - exact).abs().min(-1).values
    assert gaps.max() < 0.5
    assert gaps.mean() < 0.1


def test_indices_of_ones_own():
    """The plate of the model says which; create_plates says so to the guide."""
    indices = torch.tensor([3, 0])

    def model():
        subsampled(size=None, indices=indices)

    likelihood = ProgramLikelihood(model)
    x0 = torch.randn(3, 2, 1, dtype=torch.float64)
    exact = Normal(x0, NOISE).log_prob(DATA[indices]).sum(-1)
    assert torch.allclose(likelihood.log_prob(x0), exact)
    plates = lambda *args: pyro.plate("data", 4, subsample=indices, dim=-1)  # noqa: E731
    guide = guide_of("particles", model, create_plates=plates)
    draws = Predictive(model, guide=guide, num_samples=5, parallel=True)()["x"]
    mean, spread = DATA[indices] / (1 + NOISE**2), NOISE / math.sqrt(1 + NOISE**2)
    assert draws.shape == (5, 2, 1)
    assert ((draws - mean).abs() < 5 * spread).all()
    with pytest.raises(ValueError, match="got other indices in the model than in the guide"):
        pyro.set_rng_seed(0)
        guide_of("particles", model)()


def test_subsamples_of_which_nothing_can_be_made_are_refused():
    def outside(inner):
        x = pyro.sample("x", PRIOR) if not inner else None
        with pyro.plate("data", 4, subsample_size=2) as ind:
            x = pyro.sample("x", PRIOR) if inner else x
            if not inner:
                pyro.sample("y", Normal(x, NOISE).to_event(1), obs=DATA[ind])
        if inner:
            pyro.sample("y", Normal(x.sum(-2), NOISE).to_event(1), obs=DATA[0])

    with pytest.raises(ValueError, match="stands outside of it, and its posterior depends on all"):
        AutoGuidance(outside)(False)
    with pytest.raises(ValueError, match="an observed site outside of it depends on all of 'x'"):
        AutoGuidance(outside)(True)
    with pytest.raises(ValueError, match="a subsample of 2 of 4 that is drawn anew at each run"):
        ProgramLikelihood(subsampled)
    with pytest.raises(ValueError, match="a subsample of 2 of 4 that is drawn anew at each run"):
        ParticleGibbs(subsampled).setup(1)
    with pytest.raises(ValueError, match="Predictive does not say which data"):
        Predictive(subsampled, guide=AutoGuidance(subsampled), num_samples=2, parallel=True)()


def test_a_plate_of_another_size_is_drawn_at_its_size():
    """Guides by themselves follow their arguments; those of a list keep the list's plates, as in Pyro."""

    def model(data):
        subsampled(data, None)

    guide = guide_of("guidance", model)
    assert guide(DATA)["x"].shape == (4, 1)
    assert guide(DATA[:3])["x"].shape == (3, 1)
    draws = Predictive(model, guide=guide, num_samples=5, parallel=True)(DATA.repeat(2, 1))
    assert draws["x"].shape == (5, 8, 1)


# --- lists ----------------------------------------------------------------------------------------


def noisy(y):
    s = pyro.sample("s", LogNormal(-1.0, 0.5))
    x = pyro.sample("x", PAIR)
    pyro.sample("y", Normal(x, s.unsqueeze(-1)).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_quantiles_in_a_list_are_those_of_the_marginal(kind):
    """s is .01 or 100 at even odds: x is y = 4 or a draw of N(0, 1), whose median is the lower quartile."""

    def either(y):
        return {
            "s": pyro.sample("s", Delta(torch.tensor([1e-2, 1e2]).double()[torch.randint(2, ())]))
        }

    y = torch.full((2,), 4.0, dtype=torch.float64)
    guide = AutoGuideList(noisy)
    guide.append(either)
    guide.append(guide_of(kind, noisy, particles=50))
    part, draws = guide[1], 40 if kind == "particles" else 400
    low, high = part.quantiles([0.25, 0.75], y, num_samples=draws)["x"]
    # The median of N(0, 1), and 4: 4.5 errors of a quantile, sqrt(q (1 - q) / n) / density, density .4 / 2.
    assert (low.abs() < 4.5 * math.sqrt(0.25 * 0.75 / draws) / 0.2).all()
    assert (high - 4).abs().max() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_median_and_quantiles_of_a_list(kind):
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    guide = AutoGuideList(noisy)
    guide.append(AutoNormal(poutine.block(noisy, hide=["x"]), init_scale=0.01))
    guide.append(guide_of(kind, noisy, particles=32))
    guide(y)
    state = torch.get_rng_state()
    found = guide.median(y, num_samples=40)
    assert not torch.equal(state, torch.get_rng_state())
    assert found["x"].shape == (2,)
    assert float(found["s"]) == pytest.approx(float(guide[0].median(y)["s"]))
    # Near the posterior's given the median of s, to which q(s) is narrow: 5 errors of 40 draws.
    s = float(found["s"]) ** 2
    error = 0.2 * math.sqrt(s / (1 + s))
    assert ((found["x"] - y / (1 + s)).abs() < 5 * error + 0.1).all()
    low, high = guide.quantiles([0.1, 0.9], y, num_samples=20)["x"]
    assert (low < high).all()
    with pytest.raises(ValueError, match="latents: got no draws of s"):
        guide_of(kind, noisy).median(y)


def test_medians_before_the_first_call_and_in_a_list_of_lists():
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def model(y):
        r = pyro.sample("r", LogNormal(0.0, 0.1))
        s = pyro.sample("s", LogNormal(-1.0, 0.5))
        x = pyro.sample("x", PAIR)
        pyro.sample("y", Normal(r.unsqueeze(-1) * x, s.unsqueeze(-1)).to_event(1), obs=y)

    guide, inner = AutoGuideList(model), AutoGuideList(poutine.block(model, hide=["r"]))
    guide.append(AutoDelta(poutine.block(model, expose=["r"])))
    guide.append(inner)
    inner.append(AutoNormal(poutine.block(model, expose=["s"])))
    inner.append(AutoGuidance(model, MMPS))
    assert inner[1].median(y, num_samples=10)["x"].shape == (2,)
    assert guide.median(y)["x"].shape == (2,)


def test_symbols_have_quantiles_too():
    def model():
        x = pyro.sample("x", Diffusion(PAIR.denoiser, (2,), steps=3))
        pyro.sample("y", Normal(x, 1.0).to_event(1), obs=torch.zeros(2).double())

    class Integers(AutoGuidance):
        def _draw(self, likelihood, sample):
            drawn = super()._draw(likelihood, sample)
            return drawn._replace(value=drawn.value.round().long())

    found = Integers(model).quantiles([0.1, 0.5], num_samples=21)["x"]
    assert found.dtype == torch.long


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"expose": ["x"]}, {"hide": ["s"]}])
def test_a_blocked_model_is_refused_for_what_it_is(kind, how):
    with pytest.raises(ValueError, match=r"poutine\.block.* expected the whole model"):
        guide_of(kind, poutine.block(noisy, **how))
    with pytest.raises(ValueError, match=r"poutine\.block.* expected the whole model"):
        ProgramLikelihood(pyro.condition(poutine.block(noisy, **how), data={}), (torch.zeros(2),))


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_gradients_of_subsamples_are_those_of_all_data():
    """d log p(y | loc) / d loc of four data from two at a time, averaged over 60 runs (4.5 errors)."""
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def model():
        loc = pyro.sample("loc", Delta(at))
        with pyro.plate("data", 4, subsample_size=2) as ind:
            x = pyro.sample("x", PRIOR)
            pyro.sample("y", Normal(loc.unsqueeze(-1) + x, NOISE).to_event(1), obs=DATA[ind] + 3)

    def fixed():
        return {"loc": pyro.sample("loc", Delta(at))}

    guide = AutoGuideList(model)
    guide.append(fixed)
    guide.append(AutoTwistedSMC(model, num_particles=32))
    gradients = []
    for _ in range(60):
        loss = Trace_ELBO().differentiable_loss(model, guide)
        gradients.append(-torch.autograd.grad(loss, at)[0])
    found, exact = torch.stack(gradients), float((DATA + 3).sum()) / (1 + NOISE**2)
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - exact) < 4.5 * error < 0.5 * exact
