"""An estimate of a bound inside a non-linear function is refused; where it enters linearly, it is not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.oed.eig import nmc_eig, posterior_eig, vnmc_eig
from pyro.infer import (
    HMC,
    MCMC,
    NUTS,
    Importance,
    RandomWalkKernel,
    RenyiELBO,
    ReweightedWakeSleep,
    SMCFilter,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    WeighedPredictive,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.importance import vectorized_importance_weights

from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import Hutchinson, ODESolver
from pyro_diffusion.infer.filtering.particle_filter import ParticleFilter
from tests.classes import LOCS, WEIGHTS, NormalClass, data

F64 = torch.float64
DENOISER = NormalClass()
X = data(4)
ZERO = torch.zeros(2, dtype=F64)
ENUM = {"enumerate": "parallel"}
ENUMERATED = (
    r"got 'k' enumerated in the model, expected .*ChainReparam.*Flow, or 'k' enumerated in the"
)


def site(loc) -> Diffusion:
    return Diffusion(DENOISER, (2,), steps=3, context={"loc": loc})


def empty(*args) -> None:
    """A guide of no latents."""


def given_class(law, infer=ENUM):
    def model():
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=infer)
            pyro.sample("x", law(k), obs=X)

    return model


def guide_of(infer):
    def guide():
        with pyro.plate("data", 4):
            pyro.sample("k", dist.Categorical(WEIGHTS), infer=infer)

    return guide


def shared_class():
    """One class for all data, outside of their plates."""
    k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=ENUM)
    with pyro.plate("one", 2, dim=-2), pyro.plate("two", 2, dim=-1):
        pyro.sample("x", site(LOCS[k]), obs=X.reshape(2, 2, 2))


def grouped():
    k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=ENUM)
    pyro.sample("x", site(LOCS[k].unsqueeze(-2)).expand((*k.shape, 4)).to_event(1), obs=X)


def shifted():
    """The value depends on the class, the law does not."""
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=ENUM)
        pyro.sample("x", site(ZERO), obs=X - LOCS[k])


def latent():
    """A hidden diffusion whose guide does not know the class."""
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=ENUM)
        z = pyro.sample("z", site(LOCS[k]))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X)


def chain_of_classes():
    """A hidden Markov model, whose enumeration reuses dimensions."""
    k = torch.tensor(0)
    for t in pyro.markov(range(4)):
        k = pyro.sample(f"k{t}", dist.Categorical(WEIGHTS), infer=ENUM)
        pyro.sample(f"x{t}", site(LOCS[k]), obs=X[t])


AFFINE = dist.transforms.AffineTransform(1.0, 2.0)
WRAPPED = {
    "plain": lambda k: site(LOCS[k]),
    "sde": lambda k: DiffusionSDE(DENOISER, (2,), context={"loc": LOCS[k]}),
    "condition": lambda k: site(ZERO).condition(loc=LOCS[k]),
    "mask": lambda k: site(LOCS[k]).mask(torch.tensor([True, False, True, True])),
    "transformed": lambda k: dist.TransformedDistribution(site(LOCS[k]), [AFFINE]),
    "half": lambda k: dist.MaskedMixture(torch.tensor(True), site(LOCS[k]), site(LOCS[k])),
    "noisy flow": lambda k: ProbabilityFlow(
        DENOISER,
        (2,),
        solver=ODESolver("rk4", steps=2),
        trace=Hutchinson(),
        context={"loc": LOCS[k]},
    ),
}
MODELS = {
    **{name: given_class(law) for name, law in WRAPPED.items()},
    "config": config_enumerate(given_class(WRAPPED["plain"], {})),
    "scaled": poutine.scale(given_class(WRAPPED["plain"]), 2.0),
    "masked": poutine.mask(given_class(WRAPPED["plain"]), mask=torch.tensor(True)),
    "shared": shared_class,
    "grouped": grouped,
    "shifted": shifted,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_latent_enumerated_in_the_model_is_refused(name):
    with pytest.raises(ValueError, match=ENUMERATED):
        TraceEnum_ELBO(max_plate_nesting=2).loss(MODELS[name], empty)


def test_a_hidden_diffusion_under_an_enumerated_latent_is_refused():
    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(X, 1.0).to_event(1))

    with pytest.raises(ValueError, match=ENUMERATED):
        TraceEnum_ELBO(max_plate_nesting=1).loss(latent, guide)


def test_enumeration_in_a_markov_chain_is_refused_by_each_name():
    with pytest.raises(ValueError, match="'k0' enumerated in the model"):
        TraceEnum_ELBO(max_plate_nesting=0).loss(chain_of_classes, empty)


def test_infer_discrete_is_refused():
    with pytest.raises(ValueError, match=r"infer_discrete over 'k', expected.*ProbabilityFlow"):
        infer_discrete(MODELS["plain"], first_available_dim=-2)()


def given_shift(law=lambda loc: site(loc)):
    def model():
        loc = pyro.sample("loc", dist.Normal(ZERO, 1.0).to_event(1))
        pyro.sample("x", law(loc), obs=X[0])

    return model


def shift():
    pyro.sample("loc", dist.Normal(ZERO, 1.0).to_event(1))


PARTICLES = {"num_particles": 3, "max_plate_nesting": 1}
WEIGHING = {
    "Renyi": (lambda m, g: RenyiELBO(num_particles=3).loss(m, g), r"RenyiELBO\(num_particles=3\)"),
    "Renyi together": (
        lambda m, g: RenyiELBO(vectorize_particles=True, **PARTICLES).loss_and_grads(m, g),
        r"RenyiELBO\(num_particles=3\)",
    ),
    "wake-sleep": (lambda m, g: ReweightedWakeSleep(**PARTICLES).loss(m, g), "ReweightedWakeSleep"),
    "tail-adaptive": (
        lambda m, g: TraceTailAdaptive_ELBO(vectorize_particles=True, **PARTICLES).loss_and_grads(
            m, g
        ),
        r"TraceTailAdaptive_ELBO\(num_particles=3\)",
    ),
    "importance": (lambda m, g: Importance(m, g, num_samples=2).run(), "importance weights"),
    "vectorized": (
        lambda m, g: vectorized_importance_weights(m, g, num_samples=2, max_plate_nesting=1),
        "importance weights",
    ),
    "weighed": (lambda m, g: WeighedPredictive(m, guide=g, num_samples=2)(), "WeighedPredictive"),
    "weighed together": (
        lambda m, g: WeighedPredictive(m, guide=g, num_samples=2, parallel=True)(),
        "WeighedPredictive",
    ),
}


@pytest.mark.parametrize("name", WEIGHING)
def test_weights_of_particles_are_refused(name):
    run, said = WEIGHING[name]
    with pytest.raises(
        ValueError, match=f"log_prob: got {said}, expected Trace_ELBO, the unfolded"
    ):
        run(given_shift(), shift)


class Walk:
    """A random walk, seen through a diffusion."""

    def init(self, state):
        state["z"] = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    def step(self, state):
        state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0))
        shift = dist.transforms.AffineTransform(state["z"].unsqueeze(-1), 1.0, event_dim=1)
        pyro.sample("x", dist.TransformedDistribution(site(ZERO), [shift]), obs=X[0])


class WalkGuide:
    def init(self, state):
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    def step(self, state):
        pyro.sample("z", dist.Normal(state["z"], 1.0))


@pytest.mark.parametrize("kind", [SMCFilter, ParticleFilter])
def test_weights_of_filters_are_refused(kind):
    particles = kind(Walk(), WalkGuide(), 4, max_plate_nesting=0)
    particles.init()
    with pytest.raises(ValueError, match=f"log_prob: got {kind.__name__}, expected Trace_ELBO"):
        particles.step()


@pytest.mark.parametrize("name", [n for n in WEIGHING if n not in ("wake-sleep", "tail-adaptive")])
def test_weights_free_of_the_estimate_are_not(name):
    """The prior proposes its own draws: one instance in both, whose estimates cancel."""
    law = site(ZERO)

    def model():
        z = pyro.sample("z", law)
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X[0])

    run, said = WEIGHING[name]
    run(model, lambda: pyro.sample("z", law))
    with pytest.raises(ValueError, match=said):
        run(model, lambda: pyro.sample("z", site(ZERO)))
    weights, trace, _ = vectorized_importance_weights(
        model, lambda: pyro.sample("z", law), num_samples=5, max_plate_nesting=1
    )
    z = trace.nodes["z"]["value"].reshape(5, 2)
    assert weights.allclose(dist.Normal(z, 1.0).to_event(1).log_prob(X[0]))


def test_tensor_monte_carlo_is_refused():
    with pytest.raises(ValueError, match="TraceTMC_ELBO over 'k', expected TraceEnum_ELBO"):
        TraceTMC_ELBO(max_plate_nesting=1).loss(given_class(WRAPPED["plain"], {}), guide_of(ENUM))


@pytest.mark.parametrize("kernel", [NUTS, HMC, RandomWalkKernel])
def test_markov_chains_are_refused(kernel):
    with pytest.raises(ValueError, match=r"got a Markov chain.*ChainReparam.*Flow.*ParticleGibbs"):
        MCMC(kernel(given_shift()), 2, warmup_steps=1, disable_progbar=True).run()


def test_a_potential_written_by_hand_is_refused_and_a_hook_is_not():
    law, heard = site(ZERO), []

    def potential(values):
        return -law.log_prob(values["z"]).sum()

    kernel = HMC(potential_fn=potential)
    start = {"z": torch.zeros(1, 2, dtype=F64)}
    chain = MCMC(kernel, 1, warmup_steps=1, initial_params=start, disable_progbar=True)
    with pytest.raises(ValueError, match="got a Markov chain"):
        chain.run()

    def hook(kernel, values, stage, i):
        heard.append(law.log_prob(values["z"]))

    kernel = HMC(potential_fn=lambda values: values["z"].square().sum() / 2)
    options = {"initial_params": start, "hook_fn": hook, "disable_progbar": True}
    MCMC(kernel, 2, warmup_steps=1, **options).run()
    assert len(heard) == 3


def test_mixtures_are_refused():
    mixture = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), site(LOCS))
    with pytest.raises(ValueError, match="got MixtureSameFamily, expected components of Probab"):
        mixture.log_prob(X)

    def model():
        with pyro.plate("data", 4):
            pyro.sample("x", mixture, obs=X)

    with pytest.raises(ValueError, match="got MixtureSameFamily"):
        Trace_ELBO().loss(model, empty)
    flows = ProbabilityFlow(DENOISER, (2,), solver=ODESolver("rk4", steps=4), context={"loc": LOCS})
    assert dist.MixtureSameFamily(dist.Categorical(WEIGHTS), flows).log_prob(X).isfinite().all()


def test_states_of_a_markov_model_are_refused():
    # Like a mixture's components, but summed over paths of states.
    states = dist.DiscreteHMM(
        torch.zeros(2, dtype=F64), torch.zeros(2, 2, dtype=F64), site(LOCS[:2])
    )
    with pytest.raises(ValueError, match="got DiscreteHMM, expected components of Probab"):
        states.log_prob(X)


def hidden_by_class():
    """Neither the law nor the value depends on the class, but whether the site counts."""
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=ENUM)
        with poutine.mask(mask=k > 0):
            pyro.sample("x", site(ZERO), obs=X)


def test_a_mask_that_depends_on_a_class_is_refused():
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.raises(ValueError, match=ENUMERATED):
        elbo.loss(hidden_by_class, empty)
    assert elbo.loss(hidden_by_class, guide_of(ENUM)) > 0


def test_information_gains_that_average_densities_are_refused():
    def model(design):
        with pyro.plate_stack("plates", design.shape[:-1]):
            z = pyro.sample("z", dist.Normal(0, torch.ones(design.shape[:-1], dtype=F64)))
            shift = dist.transforms.AffineTransform(z.unsqueeze(-1), 1.0, event_dim=1)
            return pyro.sample("y", dist.TransformedDistribution(site(ZERO), [shift]))

    def guide(y, design, *names):
        loc = pyro.param("loc", torch.zeros((), dtype=F64))
        with pyro.plate_stack("plates", design.shape[:-1]):
            pyro.sample("z", dist.Normal(loc, torch.ones(design.shape[:-1], dtype=F64)))

    design, adam = torch.zeros(1, 1), pyro.optim.Adam({})
    with pytest.raises(ValueError, match="got nmc_eig, expected posterior_eig, the unfolded chain"):
        nmc_eig(model, design, "y", "z", N=4, M=2)
    with pytest.raises(ValueError, match="got vnmc_eig"):
        vnmc_eig(model, design, "y", "z", (4, 2), 1, guide, adam)
    # This one scores the guide alone.
    gain = posterior_eig(model, design, "y", "z", 4, 1, guide, adam, eig=False)
    assert gain.isfinite().all()


OUTER, HALF = dist.transforms.AffineTransform(0.0, 2.0), torch.tensor(0.5, dtype=F64)
AROUND = {
    "transform": lambda law: dist.TransformedDistribution(law, [OUTER]),
    "mask": lambda law: law.mask(torch.tensor(False)),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_estimates_of_one_instance_cancel_only_under_the_same_transforms_and_masks(around):
    law = site(ZERO)

    def draws(law):
        return lambda: pyro.sample("z", law)

    Importance(draws(around(law)), draws(around(law)), num_samples=2).run()
    Importance(draws(law.mask(torch.tensor(True))), draws(law), num_samples=2).run()
    with pytest.raises(ValueError, match="got importance weights"):
        Importance(draws(around(law)), draws(law), num_samples=2).run()


@pytest.mark.parametrize(
    "handler", [poutine.scale(scale=HALF), poutine.mask(mask=torch.tensor(False))]
)
def test_estimates_of_one_instance_cancel_only_at_the_same_scale(handler):
    law = site(ZERO)

    def model():
        pyro.sample("z", law)

    Importance(handler(model), handler(model), num_samples=2).run()
    with pytest.raises(ValueError, match="got importance weights"):
        Importance(handler(model), model, num_samples=2).run()


def untouched():
    """An enumerated class beside a diffusion that does not depend on it."""
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=ENUM)
        pyro.sample("y", dist.Normal(LOCS[k], 1.0).to_event(1), obs=X)
        pyro.sample("x", site(ZERO), obs=X)


def beside():
    """Two classes, of which the guide enumerates the one that matters to the diffusion."""
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=ENUM)
        j = pyro.sample("j", dist.Categorical(WEIGHTS), infer=ENUM)
        pyro.sample("y", dist.Normal(LOCS[j], 1.0).to_event(1), obs=X)
        pyro.sample("x", site(LOCS[k]), obs=X)


def seeded(k):
    trace = Hutchinson(seed=0)
    return ProbabilityFlow(
        DENOISER, (2,), solver=ODESolver("rk4", steps=2), trace=trace, context={"loc": LOCS[k]}
    )


ENUMERATING = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
LINEAR = {
    "nothing enumerated": (ENUMERATING, given_shift(), shift),
    "not touched": (ENUMERATING, untouched, empty),
    "in the guide": (ENUMERATING, given_class(WRAPPED["plain"]), guide_of(ENUM)),
    "in the guide, wrapped": (ENUMERATING, given_class(WRAPPED["transformed"]), guide_of(ENUM)),
    "one by one": (
        ENUMERATING,
        given_class(WRAPPED["plain"]),
        guide_of({"enumerate": "sequential"}),
    ),
    "in both": (ENUMERATING, beside, guide_of(ENUM)),
    "fixed probes": (ENUMERATING, given_class(seeded), empty),
    "blocked": (ENUMERATING, poutine.block(MODELS["plain"], hide=["k"]), empty),
    "many particles": (Trace_ELBO(num_particles=3), given_shift(), shift),
    "one particle": (RenyiELBO(num_particles=1), given_shift(), shift),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_uses_are_not_refused(name):
    elbo, model, guide = LINEAR[name]
    assert torch.tensor(elbo.loss(model, guide)).isfinite()


def test_sleep_updates_score_a_diffusion_guide_linearly():
    def model(observations):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=observations["x"])

    def guide(observations):
        pyro.sample("z", site(ZERO))

    asleep = {"insomnia": 0.0, "model_has_params": False, "vectorize_particles": False}
    assert ReweightedWakeSleep(**asleep).loss(model, guide, observations={"x": X[0]})[1].isfinite()
    with pytest.raises(ValueError, match="got ReweightedWakeSleep"):
        ReweightedWakeSleep(vectorize_particles=False).loss(model, guide, observations={"x": X[0]})


def own_law(law):
    """A guide whose latent has that law, of a model in which it is normal."""

    def model():
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X[0])

    return model, lambda: pyro.sample("z", law)


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), TraceGraph_ELBO(), TraceEnum_ELBO(max_plate_nesting=0)]
)
@pytest.mark.parametrize("law", [site(ZERO), DiffusionSDE(DENOISER, (2,), context={"loc": ZERO})])
def test_a_bound_as_the_density_of_a_guide_is_refused(elbo, law):
    """It would be subtracted: the ELBO could exceed the evidence."""
    model, guide = own_law(law)
    for loss in (elbo.loss, elbo.loss_and_grads):
        with pytest.raises(
            ValueError, match=r"guide: got a Diffusion.* in .*_ELBO, expected .*AnnealedSMC"
        ):
            loss(model, guide)


def test_a_density_a_prior_or_data_in_a_guide_are_not():
    flow = ProbabilityFlow(DENOISER, (2,), context={"loc": ZERO})
    prior = site(ZERO)

    def same():
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X[0])

    def seen():
        pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
        pyro.sample("seen", prior, obs=X[0], infer={"is_auxiliary": True})

    for model, guide in (
        own_law(flow),
        (same, lambda: pyro.sample("z", prior)),
        (own_law(flow)[0], seen),
    ):
        assert torch.isfinite(torch.tensor(Trace_ELBO().loss(model, guide)))
