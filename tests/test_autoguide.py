"""AutoGuides of a diffusion site inside Predictive, Importance, ELBOs and lists, against closed forms."""

import functools
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import (
    Categorical,
    LogNormal,
    Normal,
    TransformedDistribution,
)
from pyro.distributions.transforms import AffineTransform
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.importance import vectorized_importance_weights
from pyro.optim import Adam
from scipy import stats

from pyro_diffusion.denoisers import MixtureDenoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.guidance import MMPS, GuidedDenoiser, SampledGuidance
from pyro_diffusion.infer import AutoGuidance, AutoTwistedSMC, ChainReparam
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.samplers import DDIM
from pyro_diffusion.schedules import LogLinear, Rectified
from pyro_diffusion.unreliable import UnreliableWarning
from tests.small_diffusions import conditional

STEPS = 8
A = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
Y = torch.tensor([1.5], dtype=torch.float64)
NOISE = 0.5


def gaussian(dimensions: int = 2) -> MixtureDenoiser:
    """A standard normal prior: its chain with the exact variance is exact at any number of steps."""
    zeros = torch.zeros(1, dimensions, dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    return MixtureDenoiser(GaussianProcess(LogLinear(10, -10)), ones, zeros, 1.0)


PRIOR = Diffusion(gaussian(), (2,), steps=STEPS)


def program(y=Y, prior=PRIOR):
    x = pyro.sample("x", prior)
    pyro.sample("y", Normal(x @ A.mT, NOISE).to_event(1), obs=y)


def fresh(y=Y):
    """The usual way to write a model: its Diffusion is built at every run."""
    program(y, Diffusion(gaussian(), (2,), steps=STEPS))


def evidence(y=Y) -> float:
    return float(Normal(0.0, (A.square().sum() + NOISE**2).sqrt()).log_prob(y).sum())


def conjugate(y=Y):
    covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + A.mT @ A / NOISE**2)
    return covariance @ A.mT @ y / NOISE**2, covariance


def guide_of(kind, model=program, **options):
    if kind == "guidance":
        return AutoGuidance(model, MMPS, **options)
    return AutoTwistedSMC(model, **{"num_particles": 64, **options})


KINDS = ["guidance", "smc"]


def check_evidence(model, kind, exact, *args, nesting=0):
    """The mean weight is exp(log p(y)) within 4.5 of its own errors (7e-6); weights and draws."""
    guide = AutoGuidance(model) if kind == "guidance" else guide_of(kind, model)
    if kind == "guidance":  # walks are independent, so that one call will do
        log_weights, trace, _ = vectorized_importance_weights(
            model, guide, *args, num_samples=1000, max_plate_nesting=nesting
        )
        x = trace.nodes["x"]["value"]
    else:
        importance = Importance(model, guide, num_samples=30)
        importance.run(*args)
        log_weights = torch.stack(list(importance.log_weights))
        x = torch.stack([trace.nodes["x"]["value"] for trace in importance.exec_traces])
    ratio = (log_weights - exact).exp()
    assert len(ratio.unique()) > 0.9 * len(ratio)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(len(ratio))
    return log_weights, x


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [64])
def test_predictive_by_guidance_has_the_posteriors_moments(steps):
    """2000 draws: z-scores of both means and variances below 4.5 (3e-5 in all); 64 steps' bias is within."""
    model = functools.partial(program, prior=Diffusion(gaussian(), (2,), steps=steps))
    draws = Predictive(model, guide=AutoGuidance(model, MMPS), num_samples=2000, parallel=True)()
    check_moments(draws["x"], 4.5)
    assert draws["y"].shape == (2000, 1)


def test_predictive_by_particles_has_the_posteriors_moments():
    """4000 particles, 2000 draws of them: z-scores allow for both (variance 1/2000 + 4/4000)."""
    guide = guide_of("smc", num_particles=4000)
    draws = Predictive(program, guide=guide, num_samples=2000, parallel=True)()
    check_moments(draws["x"], 4.5 * math.sqrt(3))
    assert guide.particles.value.shape == (4000, 2)
    assert abs(guide.particles.log_evidence.value - evidence()) < 0.1


def check_moments(x, limit):
    mean, covariance = conjugate()
    spread = covariance.diagonal()
    z = (x.mean(0) - mean) / (spread / len(x)).sqrt()
    assert z.abs().max() < limit
    z = (x.var(0) / spread - 1) / math.sqrt(2 / len(x))
    assert z.abs().max() < limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_shapes(kind, parallel):
    guide = guide_of(kind)
    draws = Predictive(program, guide=guide, num_samples=5, parallel=parallel)(Y)
    assert draws["x"].shape == (5, 2)
    assert draws["x"].dtype == torch.float64
    assert not draws["x"].requires_grad
    assert len(draws["x"].unique(dim=0)) == 5
    again = Predictive(program, guide=guide, num_samples=5, parallel=parallel)(Y + 3)
    assert (again["x"] @ A.mT).mean() > (draws["x"] @ A.mT).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_median_and_quantiles(kind):
    """100 draws: within 5 errors of the median's, 1.25 sd / 10."""
    guide = guide_of(kind, num_particles=1000) if kind == "smc" else guide_of(kind)
    mean, covariance = conjugate()
    assert guide.median()["x"].shape == (2,)
    gap = guide.median(Y)["x"] - mean
    assert (gap.abs() < 5 * 0.125 * covariance.diagonal().sqrt()).all()
    low, high = guide.quantiles([0.05, 0.95], Y)["x"]
    assert (low < high).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_repeats_with_the_seed(kind):
    guide = guide_of(kind)
    guide()
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        draws.append(guide()["x"])
    assert torch.equal(*draws)


def test_any_sampler_draws_but_has_no_density():
    guide = AutoGuidance(program, MMPS, sampler=DDIM(0.0))
    assert Predictive(program, guide=guide, num_samples=3, parallel=True)()["x"].shape == (3, 2)
    with pytest.raises(ValueError, match="sampler: got DDIM"):
        Trace_ELBO().loss(program, guide)


# --- densities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_importance_weights_are_properly_weighted(kind):
    log_weights, x = check_evidence(program, kind, evidence())
    mean, _ = conjugate()
    weights = log_weights.softmax(0)
    error = (weights.square().unsqueeze(-1) * (x - mean).square()).sum(0).sqrt()
    assert ((weights @ x - mean).abs() < 4.5 * error).all()


def test_importance_one_by_one():
    importance = Importance(program, guide_of("guidance"), num_samples=20)
    importance.run(Y)
    assert abs(float(importance.get_log_normalizer()) - evidence()) < 1
    assert importance.get_ESS() > 5


@pytest.mark.parametrize("kind", KINDS)
def test_elbo_is_a_bound_of_the_evidence(kind):
    """Below log p(y) on average (4.5 errors allowed), and near it."""
    guide, runs = guide_of(kind), 20 if kind == "smc" else 40
    values = torch.tensor([-Trace_ELBO().loss(program, guide) for _ in range(runs)])
    error = float(values.std()) / math.sqrt(runs)
    assert float(values.mean()) < evidence() + 4.5 * error
    assert float(values.mean()) > evidence() - (1.0 if kind == "guidance" else 0.1)


def test_elbo_of_particles_is_their_evidence():
    guide = guide_of("smc")
    loss = Trace_ELBO().loss(program, guide)
    assert -loss == pytest.approx(guide.particles.log_evidence.value, abs=1e-9)
    loss = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=0).loss(
        program, guide
    )
    assert -loss == pytest.approx(guide.particles.log_evidence.value, abs=1e-9)


def test_model_and_guide_must_read_one_diffusion():
    guide = guide_of("smc", fresh)
    assert Predictive(fresh, guide=guide, num_samples=2)()["x"].shape == (2, 2)
    with pytest.raises(ValueError, match="built anew at each run"):
        Trace_ELBO().loss(fresh, guide)


def test_unfolded_chain_has_exact_densities():
    """The model builds its Diffusion anew; its chain's sites are scored exactly."""
    chain = poutine.reparam(fresh, config={"x": ChainReparam()})
    check_evidence(chain, "guidance", evidence())
    guide = AutoGuidance(chain, MMPS)
    assert sorted(guide()) == sorted(["x", *(f"x_t{j}" for j in range(STEPS + 1))])
    assert math.isfinite(Trace_ELBO().loss(chain, guide))
    draws = Predictive(chain, guide=guide, num_samples=50, parallel=True)()
    assert draws["x_t3"].shape == draws["x"].shape == (50, 2)


def test_weight_of_a_walk_does_not_depend_on_how_it_is_spelled():
    """The one-site density and the chain's own sites give one law of log-weights (KS at 1e-4)."""
    chain = poutine.reparam(program, config={"x": ChainReparam()})
    weights = [check_evidence(model, "guidance", evidence())[0] for model in (program, chain)]
    assert stats.ks_2samp(*weights).pvalue > 1e-4


# --- other latents --------------------------------------------------------------------------------


def noisy(y):
    """The observation noise is unknown."""
    s = pyro.sample("s", LogNormal(-1.0, 0.7))
    x = pyro.sample("x", PRIOR)
    pyro.sample("y", Normal(x, s.unsqueeze(-1)).to_event(1), obs=y)


def listed(kind="smc", model=noisy, **options):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["x"]), init_scale=0.3))
    guide.append(guide_of(kind, model, **options))
    return guide


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [False, True])
def test_in_a_list(kind, parallel):
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    draws = Predictive(noisy, guide=listed(kind), num_samples=6, parallel=parallel)(y)
    assert draws["x"].shape == (6, 2)
    assert draws["s"].reshape(-1).shape == (6,)


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_each_draw_sees_its_own_noise():
    """A tiny noise pins x to the data, a huge one leaves the prior; both in one vectorized call."""
    y = torch.tensor([3.0, 3.0], dtype=torch.float64)
    scales = torch.tensor([1e-2, 1e3], dtype=torch.float64).repeat(20)

    def custom(y):
        index = torch.arange(40)
        return {"s": pyro.sample("s", pyro.distributions.Delta(scales[index]))}

    for kind in KINDS:
        guide = AutoGuideList(noisy)
        guide.append(custom)
        guide.append(guide_of(kind, noisy))
        with pyro.plate("samples", 40, dim=-1):
            x = guide(y)["x"]
        assert x.shape == (40, 2)
        assert (x[::2] - 3).abs().max() < 0.1
        assert x[1::2].mean(0).abs().max() < 5 / math.sqrt(20)


@pytest.mark.filterwarnings("ignore::pyro_diffusion.unreliable.UnreliableWarning")
def test_svi_finds_the_noise():
    """Trained log-normal q(s) near p(s | y) by quadrature, though the prior's mean is 3.8 deviations away."""
    y = torch.tensor([3.0, -2.5, 2.0, -3.0], dtype=torch.float64)
    prior = Diffusion(gaussian(4), (4,), steps=6)

    def model():
        s = pyro.sample("s", LogNormal(-1.0, 1.0))
        x = pyro.sample("x", prior)
        pyro.sample("y", Normal(x, s).to_event(1), obs=y)

    guide = listed("smc", model, num_particles=32)
    svi = SVI(model, guide, Adam({"lr": 0.08}), Trace_ELBO())
    tail = []
    for step in range(140):
        svi.step()
        if step >= 60:
            tail.append(guide[0].median()["s"].log())
    log_s = torch.linspace(-5, 4, 2000, dtype=torch.float64)
    total = (1 + (2 * log_s).exp()).sqrt()
    joint = Normal(-1.0, 1.0).log_prob(log_s)
    weights = (joint + Normal(0.0, total.unsqueeze(-1)).log_prob(y).sum(-1)).softmax(0)
    mean = float((weights * log_s).sum())
    spread = float((weights * (log_s - mean).square()).sum().sqrt())
    assert abs(float(torch.stack(tail).mean()) - mean) < 0.5 * spread


def test_gradient_for_other_guides_is_that_of_the_evidence():
    """d log p(y | s) / d log s by Fisher's identity, averaged over 100 runs (4.5 errors)."""
    y = torch.tensor([0.5, -0.5], dtype=torch.float64)
    at = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def model():
        s = pyro.sample("s", pyro.distributions.Delta(at.exp()))
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", Normal(x, s).to_event(1), obs=y)

    def fixed():
        return {"s": pyro.sample("s", pyro.distributions.Delta(at.exp()))}

    guide = AutoGuideList(model)
    guide.append(fixed)
    guide.append(guide_of("smc", model))
    gradients = []
    for _ in range(100):
        loss = Trace_ELBO().differentiable_loss(model, guide)
        gradients.append(-torch.autograd.grad(loss, at)[0])
    gradients = torch.stack(gradients)
    exact = Normal(0.0, (1 + (2 * at).exp()).sqrt()).log_prob(y).sum()
    exact = torch.autograd.grad(exact, at)[0]
    error = gradients.std() / math.sqrt(100)
    assert abs(gradients.mean() - exact) < 4.5 * error
    assert error < 0.2 * exact.abs()


def test_the_order_in_a_list_matters():
    y = torch.zeros(2, dtype=torch.float64)
    guide = AutoGuideList(noisy)
    guide.append(guide_of("guidance", noisy))
    guide.append(AutoNormal(poutine.block(noisy, hide=["x"])))
    with pytest.raises(ValueError, match="latents: got no draws of s"):
        guide(y)
    with pytest.raises(ValueError, match="latents: got no draws of s"):
        guide_of("smc", noisy)(y)
    held = pyro.condition(noisy, data={"s": torch.tensor(0.5, dtype=torch.float64)})
    assert guide_of("smc", held)(y)["x"].shape == (2,)


# --- plates, transforms, other laws ---------------------------------------------------------------


def plated(y, shared=False):
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", PRIOR)
        if not shared:
            pyro.sample("y", Normal(x @ A.mT, NOISE).to_event(1), obs=y)
    if shared:
        pyro.sample("y", Normal(x.sum(-2, keepdim=True) @ A.mT, NOISE).to_event(1), obs=y.sum(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_plates(kind, shared, parallel):
    """One likelihood per datum, or one for all; the evidence of each (four guides)."""
    y = torch.tensor([[1.5], [-0.5], [0.0]], dtype=torch.float64)
    model = functools.partial(plated, shared=shared)
    guide = guide_of(kind, model)
    draws = Predictive(model, guide=guide, num_samples=4, parallel=parallel)(y)
    assert draws["x"].shape == (4, 3, 2)
    if parallel:
        loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        assert math.isfinite(loss.loss(model, guide, y))
        return
    norm = A.square().sum()
    exact = Normal(0.0, (norm + NOISE**2).sqrt()).log_prob(y).sum()
    if shared:
        exact = Normal(0.0, (3 * norm + NOISE**2).sqrt()).log_prob(y.sum(0)).sum()
    check_evidence(model, kind, exact, y, nesting=1)


def test_plates_of_an_unfolded_chain():
    y = torch.tensor([[1.5], [-0.5], [0.0]], dtype=torch.float64)
    chain = poutine.reparam(plated, config={"x": ChainReparam()})
    guide = AutoGuidance(chain, MMPS)
    draws = Predictive(chain, guide=guide, num_samples=4, parallel=True)(y)
    assert draws["x"].shape == draws["x_t0"].shape == (4, 3, 2)
    assert math.isfinite(Trace_ELBO().loss(chain, guide, y))


@pytest.mark.parametrize("kind", KINDS)
def test_transformed_site(kind):
    """x = 2 x_0 + 1, evidence by the scaled prior."""
    law = TransformedDistribution(PRIOR, [AffineTransform(1.0, 2.0)])

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", Normal(x, 1.0).to_event(1), obs=torch.tensor([2.0, 0.0]).double())

    scale = torch.tensor(5.0).double().sqrt()
    check_evidence(
        model, kind, Normal(1.0, scale).log_prob(torch.tensor([2.0, 0.0]).double()).sum()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_site(kind):
    """Two data made one by to_event."""
    law = PRIOR.expand([2]).to_event(1)

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", Normal(x.sum(-2), 1.0).to_event(1), obs=torch.ones(2).double())

    exact = Normal(0.0, math.sqrt(3.0)).log_prob(torch.ones(2)).sum()
    check_evidence(model, kind, exact)


def test_flow_as_prior():
    """Any view of a denoiser is walked as a chain; only a Diffusion has a density."""

    def model():
        x = pyro.sample("x", ProbabilityFlow(gaussian(), (2,), solver=ODESolver("rk4", steps=4)))
        pyro.sample("y", Normal(x @ A.mT, NOISE).to_event(1), obs=Y)

    times = torch.linspace(0, 1, 40, dtype=torch.float64)
    guide = AutoGuidance(model, MMPS, times=times)
    with poutine.trace() as tracer:
        guide()
    with pytest.raises(ValueError, match="expected one Diffusion built outside"):
        tracer.trace.compute_log_prob()


@pytest.mark.parametrize("kind", KINDS)
def test_categorical_site(kind):
    """Two symbols seen through noise: exact posterior by enumeration (4.5 errors, chain of 16 steps)."""
    joint = torch.tensor([[0.3, 0.1], [0.2, 0.4]], dtype=torch.float64)
    law = Diffusion(TableDenoiser(Absorbing(Rectified.full(), 2), joint), (2,), steps=16)
    noise = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", Categorical(noise[x.long()]).to_event(1), obs=torch.tensor([1, 0]))

    guide = guide_of("smc", model, num_particles=500)
    if kind == "guidance":
        guide = AutoGuidance(model, functools.partial(SampledGuidance, num_samples=16))
    runs = [Predictive(model, guide=guide, num_samples=400, parallel=True)() for _ in range(4)]
    x = torch.cat([run["x"] for run in runs])
    assert x.shape == (1600, 2)
    assert not x.is_floating_point()
    if kind == "guidance":
        log_weights, _ = check_evidence(model, kind, chain_joint(joint, noise).sum().log())
        assert log_weights.isfinite().all()
        return
    posterior = chain_joint(joint, noise)
    posterior = posterior / posterior.sum()
    shares = (2 * x[:, 0] + x[:, 1]).bincount(minlength=4) / 1600
    error = (posterior * (1 - posterior) * (1 / 1600 + 1 / 500)).sqrt().flatten()
    assert ((shares - posterior.flatten()).abs() < 4.5 * error).all()


def chain_joint(joint, noise):
    """p(x, y) under the chain: pairs revealed in one step (one in 16) are drawn apart."""
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    return (joint + (apart - joint) / 16) * noise[:, 1, None] * noise[None, :, 0]


# --- bad input ------------------------------------------------------------------------------------


def test_bad_arguments():
    chain = poutine.reparam(program, config={"x": ChainReparam()})
    with pytest.raises(ValueError, match="num_particles: got 1"):
        AutoTwistedSMC(program, MMPS, num_particles=1)
    with pytest.raises(ValueError, match="guidance: got str"):
        AutoGuidance(program, "mmps")
    with pytest.raises(ValueError, match="guidance: got a factory"):
        AutoGuidance(program, lambda denoiser, likelihood: denoiser)()
    with pytest.raises(ValueError, match="sampler: got 'ddim'"):
        AutoGuidance(program, MMPS, sampler="ddim")
    with pytest.raises(ValueError, match="times, sampler: got"):
        AutoGuidance(chain, MMPS, sampler=DDIM())
    with pytest.raises(ValueError, match="model: got one unfolded"):
        AutoTwistedSMC(chain, MMPS)
    with pytest.raises(ValueError, match=r"expected poutine\.reparam"):
        AutoGuidance(poutine.scale(chain, scale=1.0), MMPS)()


def test_bad_programs():
    def none():
        pyro.sample("z", Normal(0.0, 1.0))

    def two():
        x = pyro.sample("x", PRIOR) + pyro.sample("w", PRIOR)
        pyro.sample("y", Normal(x, 1.0).to_event(1), obs=torch.zeros(2).double())

    with pytest.raises(ValueError, match="model: got no diffusion site"):
        AutoGuidance(none, MMPS)()
    with pytest.raises(ValueError, match="several diffusion sites"):
        AutoGuidance(two, MMPS)()
    with pytest.raises(ValueError, match="latents: got no draws of w"):
        AutoGuidance(two, MMPS, site="x")()


def test_density_is_that_of_the_draw_alone():
    guide = guide_of("guidance")
    with poutine.trace() as tracer:
        guide()
    law = tracer.trace.nodes["x"]["fn"]
    assert torch.isfinite(law.log_prob(tracer.trace.nodes["x"]["value"]))
    with pytest.raises(ValueError, match="did not draw"):
        law.log_prob(torch.zeros(2, dtype=torch.float64))


def test_the_prior_s_own_context_is_no_prediction():
    denoiser = conditional()

    def model():
        y = pyro.sample("context", Normal(torch.zeros(2), 1.0).to_event(1))
        x = pyro.sample("x", Diffusion(denoiser, (3,), steps=3, context={"y": y}))
        pyro.sample("read", Normal(x.sum(-1), 0.5), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="latents: got no draws of context"):
        AutoTwistedSMC(model)()


# --- what speaks against guided draws --------------------------------------------------------------


class Deaf(GuidedDenoiser):
    """Guidance that does not listen."""

    def forward(self, xt, t, **context):
        return self.denoiser(xt, t, **context)


def deaf(denoiser, likelihood):
    return Deaf(denoiser)


def two(sd=0.05):
    with pyro.plate("data", 2):
        x = pyro.sample("x", PRIOR)
        y = torch.tensor([[9.0, -9.0], [0.0, 0.0]], dtype=torch.float64)
        noise = torch.tensor([[sd], [20.0]], dtype=torch.float64)
        pyro.sample("y", Normal(x, noise).to_event(1), obs=y)


@pytest.mark.parametrize("sampler", [None, DDIM()])
@pytest.mark.parametrize("parallel", [True, False])
def test_guided_draws_that_miss_the_observations_are_told(sampler, parallel):
    # The second datum, which says next to nothing, is as good as ever.
    guide = AutoGuidance(two, deaf, sampler=sampler)
    with pytest.warns(UnreliableWarning, match=r"miss the observations.* in 1 of 2 rows \(0\)"):
        Predictive(two, guide=guide, num_samples=4, parallel=parallel)()
    with pytest.warns(UnreliableWarning, match=r"AutoTwistedSMC\(model, sweeps=1\)"):
        guide()


def test_right_draws_raise_no_alarm():
    # 400 calls of two data: four false alarms in a hundred seeds if draws are exact (warnings are errors).
    guide = AutoGuidance(two, MMPS)
    for count in (1, 5):
        for _ in range(200):
            Predictive(two, guide=guide, num_samples=count, parallel=True)()


def test_observations_without_residuals_are_not_judged():
    def symbols():
        x = pyro.sample("x", PRIOR)
        pyro.sample("y", Categorical(logits=50 * x), obs=torch.tensor(1))

    AutoGuidance(symbols, deaf)()


def test_masked_observations_do_not_count():
    def masked():
        x = pyro.sample("x", PRIOR)
        y = torch.tensor([50.0, 0.0], dtype=torch.float64)
        keep = torch.tensor([False, True])
        pyro.sample("y", Normal(x, 5.0).mask(keep).to_event(1), obs=y)

    AutoGuidance(masked, deaf)()
