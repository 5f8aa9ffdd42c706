"""Good calls of what stands above the distributions: guidance, inference, evaluation, networks, files."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import save_file
from torch import nn

from pyro_diffusion import (
    checkpoint,
    denoisers,
    evaluate,
    foreign,
    guidance,
    infer,
    likelihoods,
    optim,
    plotting,
    processes,
    samplers,
    schedules,
    train,
)
from pyro_diffusion import nn as networks
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver, SDESolver
from tests.fuzz.catalogue import (
    ORDERS,
    TIMES,
    Call,
    chain,
    conditional,
    data,
    exact,
    gaussian,
    of,
    particles,
    program,
    read,
    symbols,
    used_guidance,
    used_network,
)
from tests.small_diffusions import Tiny


def classed(x: torch.Tensor) -> None:
    """Numbers of two classes."""
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)


def decoded(x: torch.Tensor) -> None:
    """Rows that are a diffusion's draws and noise."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", Diffusion(exact(), (3,), steps=3))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def encoded(x: torch.Tensor) -> None:
    """A guide to what they were."""
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


def spelled() -> likelihoods.ProgramLikelihood:
    """A reading of the first of three symbols."""
    prior = Diffusion(symbols(), (3,), 3)

    def model() -> None:
        x = pyro.sample("x", prior)
        logits = 2.0 * torch.nn.functional.one_hot(x[..., 0], 4)
        pyro.sample("y", dist.Categorical(logits=logits), obs=torch.tensor(1))

    return likelihoods.ProgramLikelihood(model)


def guidance_calls() -> list[Call]:
    gaussian_kinds = {"solver": "direct", "iterations": 2, "full_gradient": False}
    kinds = {
        "PlugIn": {"scale": 1.0},
        "MMPS": gaussian_kinds,
        "TMPD": gaussian_kinds,
        "PiGDM": {"data_variance": 1.0, **gaussian_kinds},
        "DiffPIR": {"lam": 1.0, **gaussian_kinds},
        "DataCovariance": {"covariance": torch.eye(3)},
        "CalibratedCovariance": {"solver": "direct", "iterations": 2},
        "SampledGuidance": {"num_samples": 4, "prior_count": 1.0},
    }

    def built(kind: str, **arguments: Any) -> Any:
        return used_guidance(getattr(guidance, kind)(**arguments))

    def wrapped(kind: Any, **arguments: Any) -> Any:
        return used_guidance(kind(**arguments))

    def learned(sims: int, **arguments: Any) -> Any:
        twist = guidance.AmortizedTwist(**arguments)
        twist.simulate(sims)
        return used_guidance(twist(exact(), read()))

    likelihood = read()
    x0 = lambda: {"x0": data()}  # noqa: E731

    def daps(**arguments: Any) -> Any:
        return chain(sampler=samplers.DAPS(read(), **arguments)).sample((2,))

    def step(**arguments: Any) -> Any:
        guided = guidance.PlugIn(exact(), read(), step_size=guidance.DPSStep(**arguments))
        return chain(denoiser=guided).sample((2,))

    def classifier(x: Any, log_snr: Any) -> Any:
        return dist.Normal(x.sum(-1), 1.0)

    def features(x: Any, log_snr: Any) -> Any:
        return x

    def free(**arguments: Any) -> Any:
        guided = guidance.ClassifierFreeGuidance(conditional(), **arguments)
        posterior = guided(data(2), torch.tensor(0.5), label=torch.tensor([0, 1]))
        return posterior.mean

    return [
        *(
            Call(
                f"guidance.{kind}",
                functools.partial(built, kind),
                of({"denoiser": exact(), "likelihood": likelihood, **arguments}),
                weight=2,
            )
            for kind, arguments in kinds.items()
        ),
        Call(
            "guidance.AmortizedTwist",
            learned,
            of({"likelihood": likelihood, "hidden": (4, 4), "sims": 20}),
        ),
        Call(
            "guidance.Replacement",
            lambda **a: guidance.Replacement(**a)(data(2), torch.tensor(0.5)).mean,
            of({"denoiser": exact(), "likelihood": likelihood}),
        ),
        Call(
            "guidance.SubstitutionGuidance",
            lambda **a: guidance.SubstitutionGuidance(**a)(
                torch.tensor([[0, 1, 4]]), torch.tensor(0.5)
            ).sample(),
            of({"denoiser": symbols(), "likelihood": spelled(), "floor": 0.05}),
        ),
        Call(
            "guidance.DPSStep",
            step,
            of({"zeta": 1.0, "times": TIMES, "eta": 1.0, "squared_norm": True}),
        ),
        Call("samplers.DAPS", daps, of({"inner": 2, "moves": 2})),
        Call(
            "guidance.ClassifierGuidance",
            functools.partial(wrapped, guidance.ClassifierGuidance),
            of(
                {
                    "denoiser": exact(),
                    "classifier": classifier,
                    "value": torch.tensor(1.0),
                    "scale": 1.0,
                }
            ),
        ),
        Call(
            "guidance.SimilarityGuidance",
            functools.partial(wrapped, guidance.SimilarityGuidance),
            of(
                {
                    "denoiser": exact(),
                    "features": features,
                    "target": torch.ones(3),
                    "scale": 1.0,
                    "similarity": "cosine",
                }
            ),
        ),
        Call("guidance.ClassifierFreeGuidance", free, of({"scale": 2.0, "interval": (-1.0, 5.0)})),
        Call("likelihoods.ProgramLikelihood.log_prob", likelihood.log_prob, x0),
        Call("likelihoods.ProgramLikelihood.whitened", likelihood.whitened, x0),
        Call("likelihoods.ProgramLikelihood.residual", likelihood.residual, x0),
        Call("likelihoods.ProgramLikelihood.log_normalizer", likelihood.log_normalizer, x0),
        Call("likelihoods.ProgramLikelihood.site_value", likelihood.site_value, x0),
        Call(
            "likelihoods.ProgramLikelihood.with_residuals",
            likelihood.with_residuals,
            of({"residuals": "deviance"}),
        ),
        Call(
            "likelihoods.ProgramLikelihood.with_latents",
            likelihood.with_latents,
            of({"latents": {}}),
        ),
        Call(
            "likelihoods.ProgramLikelihood",
            lambda **a: likelihoods.ProgramLikelihood(**a).log_prob(data()),
            of(
                {
                    "model": program,
                    "args": (torch.ones(3),),
                    "kwargs": {},
                    "site": "x",
                    "residuals": "normal",
                }
            ),
            weight=2,
        ),
    ]


def infer_calls() -> list[Call]:
    y = torch.ones(3)

    def guided(kind: Any, **arguments: Any) -> Any:
        return Predictive(program, guide=kind(program, **arguments), num_samples=2, parallel=True)(
            y
        )

    def quantiles(guide: Any, **arguments: Any) -> Any:
        return guide.quantiles(arguments["quantiles"], y, num_samples=arguments["num_samples"])

    def filtered(**arguments: Any) -> Any:
        run = infer.TwistedSMC(**arguments).run()
        # Not the verdict, whose k-hat of a few even weights is NaN by its definition.
        return run.value, run.log_weights, run.log_evidence

    def gibbs(**arguments: Any) -> Any:
        kernel = infer.ParticleGibbs(program, **arguments)
        kernel.setup(0, y)
        return kernel.sample(kernel.initial_params)

    def joint(run: Any, **arguments: Any) -> Any:
        return pyro.poutine.trace(run).get_trace(**arguments).log_prob_sum()

    weighted = particles()
    ddpm = infer.DDPM(gaussian(), (3,), 2)
    guide = infer.AutoTwistedSMC(program, num_particles=4)
    prior = Diffusion(exact(), (3,), steps=2)
    return [
        Call(
            "infer.AutoGuidance",
            functools.partial(guided, infer.AutoGuidance),
            of({"guidance": guidance.MMPS, "site": "x", "times": TIMES, "sampler": None}),
            weight=0.5,
        ),
        Call(
            "infer.AutoTwistedSMC",
            functools.partial(guided, infer.AutoTwistedSMC),
            of({"num_particles": 4, "site": "x", "ess_threshold": 0.5, "sweeps": None}),
            weight=0.5,
        ),
        *amortized_calls_of(y),
        *further_amortized_calls_of(),
        *joint_calls_of(),
        Call(
            "infer.AutoPosterior.quantiles",
            functools.partial(quantiles, guide),
            of({"quantiles": [0.1, 0.9], "num_samples": 3}),
            weight=0.5,
        ),
        Call(
            "infer.AutoPosterior.median",
            lambda num_samples: guide.median(y, num_samples=num_samples),
            of({"num_samples": 3}),
            weight=0.5,
        ),
        Call(
            "infer.TwistedSMC",
            filtered,
            of(
                {
                    "diffusion": prior,
                    "likelihood": read(),
                    "num_particles": 4,
                    "ess_threshold": 0.5,
                    "systematic": True,
                }
            ),
            True,
        ),
        Call(
            "infer.TwistedSMC.draws",
            lambda **a: infer.TwistedSMC(prior, read(), num_particles=4).draws(**a).history,
            of({"num_draws": 3, "sweeps": 2, "keep_others": True}),
            weight=0.5,
        ),
        Call(
            "infer.ParticleGibbs",
            gibbs,
            of({"site": "x", "num_particles": 4, "ess_threshold": 0.5}),
            weight=0.5,
        ),
        *annealed_calls_of(y),
        Call("infer.Particles.sample", weighted.sample, of({"sample_shape": (2,)})),
        Call(
            "infer.DDPM",
            lambda **a: infer.DDPM(gaussian(), **a).model(size=2),
            of({"event_shape": (3,), "steps": 2, "name": "x"}),
        ),
        Call(
            "infer.DDPM.model",
            lambda **a: joint(ddpm.model, **a),
            lambda: {"x": data(), "subsample_size": 2},
        ),
        Call(
            "infer.DDPM.guide",
            lambda **a: joint(ddpm.guide, **a),
            lambda: {"x": data(), "subsample_size": 2},
        ),
        Call(
            "infer.forward_chain",
            lambda **a: joint(infer.reparam.forward_chain, **a),
            lambda: {"name": "x", "diffusion": chain(), "value": data(), "auxiliary": False},
        ),
    ]


def annealed_calls_of(y: Any) -> list[Call]:
    """Particles from a guide to a posterior."""

    def annealed(**arguments: Any) -> Any:
        run = infer.AnnealedSMC(**arguments).run(y)
        # Not the verdict, whose k-hat of even weights is NaN by its definition.
        return run.draws["z"], run.log_weights, run.log_evidence

    guide = AutoNormal(simulator, init_scale=1.0)
    found = infer.AnnealedSMC(simulator, guide, 64, 8).run(y)
    return [
        Call(
            "infer.AnnealedSMC",
            annealed,
            of(
                {
                    "model": simulator,
                    "guide": guide,
                    "num_particles": 32,
                    "num_repeats": 8,
                    "steps": 2,
                    "moves": 1,
                    "final_moves": 1,
                    "conditional_ess": 0.9,
                    "ess_threshold": 0.5,
                    "max_leapfrog": 2,
                    "pilot_particles": 64,
                    "widen": 1,
                }
            ),
            weight=0.5,
        ),
        Call("infer.AnnealedParticles.sample", found.sample, of({"num_samples": 3})),
        *path_calls_of(guide, y),
    ]


def path_calls_of(base: Any, y: torch.Tensor) -> list[Call]:
    """A guide that walks from another to a posterior."""

    def walked(**arguments: Any) -> Any:
        return infer.AutoDiffusion(**arguments).log_weights(3, y)

    def lost(**arguments: Any) -> Any:
        path = infer.AutoDiffusion(simulator, base, 2, pathwise=False)
        return infer.PathELBO(**arguments).loss(simulator, path, y)

    good = {
        "model": simulator,
        "base": base,
        "steps": 2,
        "kernel": "langevin",
        "control": True,
        "context": None,
        "step_size": 0.1,
        "pathwise": True,
        "train_base": False,
    }
    return [
        Call("infer.AutoDiffusion", walked, of(good), weight=0.5),
        Call("infer.PathELBO", lost, of({"num_particles": 3}), weight=0.5),
    ]


def simulator(x: Any = None) -> None:
    """A program that simulates."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def amortized() -> infer.AutoAmortized:
    """A guide with scales, not trained."""
    small = functools.partial(networks.ConditionalMLP, width=8, depth=1)
    guide = infer.AutoAmortized(
        simulator,
        observed=["x"],
        denoiser=lambda *sizes: denoisers.GaussianDenoiser(
            small(*sizes), processes.GaussianProcess(schedules.Cosine())
        ),
        solver=ODESolver("rk4", steps=2),
        vectorized=True,
    )
    guide.simulate(30)
    return guide


def amortized_calls_of(y: Any) -> list[Call]:
    del y
    guide = amortized()
    point = torch.tensor([0.5, -0.5, 0.0])
    table = guide.simulate(4)
    score = lambda **a: pyro.infer.Trace_ELBO().loss(guide.training_model, _empty, **a)  # noqa: E731

    def built(**arguments: Any) -> Any:
        return infer.AutoAmortized(simulator, **arguments).simulate(30)

    return [
        Call(
            "infer.AutoAmortized",
            built,
            of(
                {
                    "observed": ["x"],
                    "latents": ["z"],
                    "vectorized": True,
                    "summary": None,
                    "plates": None,
                }
            ),
            weight=0.5,
        ),
        Call("infer.AutoAmortized.forward", guide, lambda: {"x": point.clone()}, weight=0.5),
        Call(
            "infer.AutoAmortized.draw",
            lambda **a: guide.draw(a.pop("num_samples"), a),
            lambda: {"num_samples": 3, "x": point.clone()},
            weight=0.5,
        ),
        Call("infer.AutoAmortized.simulate", guide.simulate, of({"num_samples": 3})),
        Call(
            "infer.AutoAmortized.accept",
            lambda **a: guide.accept(a),
            lambda: {name: value.clone() for name, value in table.items()},
        ),
        Call(
            "infer.AutoAmortized.training_model",
            score,
            lambda: {name: value.clone() for name, value in table.items()},
        ),
        Call(
            "infer.AutoAmortized.log_prob",
            lambda z, x: guide.log_prob({"z": z}, x),
            lambda: {"z": torch.zeros(2, 3), "x": point.clone()},
            weight=0.5,
        ),
        Call(
            "infer.AutoAmortized.quantiles",
            functools.partial(quantiles_of, guide, point),
            of({"quantiles": [0.1, 0.9], "num_samples": 3}),
            weight=0.5,
        ),
    ]


def further_amortized_calls_of() -> list[Call]:
    """Ensembles, composed posteriors and truncated rounds."""
    point = torch.tensor([0.5, -0.5, 0.0])
    members = [amortized() for _ in range(2)]
    ensemble = infer.AutoEnsemble(members)
    several = torch.stack([point, -point])

    def composed(x: Any, **arguments: Any) -> Any:
        return infer.ComposedPosterior(members[0], {"x": x}, **arguments).draw(2)

    def truncated(x: Any, num_simulations: Any, **arguments: Any) -> Any:
        options = {"steps": 2, "progress": False}
        return train.fit_truncated(
            amortized(), {"x": x}, num_simulations, options=options, **arguments
        ).simulations

    return [
        Call("infer.AutoEnsemble", infer.AutoEnsemble, lambda: {"members": members}, weight=0.3),
        Call(
            "infer.AutoEnsemble.draw",
            lambda **a: ensemble.draw(a.pop("num_samples"), a),
            lambda: {"num_samples": 3, "x": point.clone()},
            weight=0.5,
        ),
        Call(
            "infer.ComposedPosterior",
            composed,
            lambda: {"x": several.clone(), "num_draws": 8},
            weight=0.5,
        ),
        Call(
            "train.fit_truncated",
            truncated,
            lambda: {"x": point.clone(), "num_simulations": 30, "rounds": 1, "widen": 0.2},
            weight=0.3,
        ),
    ]


def joint_calls_of() -> list[Call]:
    def small(size: int, graph: Any) -> denoisers.GaussianDenoiser:
        network = networks.SiteTransformer(size, width=8, depth=1, heads=2, graph=graph)
        dims = {"given": 1, "conditioned": 1}
        process = processes.GaussianProcess(schedules.Cosine())
        return denoisers.GaussianDenoiser(network, process, context_event_dims=dims)

    fast = {"denoiser": small, "solver": ODESolver("rk4", steps=2), "vectorized": True}
    joint = infer.AutoJoint(simulator, observed=["x"], **fast)
    table = joint.simulate(30)
    point = torch.tensor([0.5, -0.5, 0.0])
    score = lambda **a: pyro.infer.Trace_ELBO().loss(joint.training_model, _empty, **a)  # noqa: E731
    conditional = joint.condition({"x": point})
    return [
        Call(
            "infer.AutoJoint",
            lambda **a: infer.AutoJoint(simulator, **fast, **a).simulate(30),
            of(
                {
                    **{"observed": ["x"], "sites": ["z", "x"], "graph": True},
                    **{"conditions": {"joint": 0.5, "random": 0.5}},
                }
            ),
            weight=0.5,
        ),
        Call("infer.AutoJoint.simulate", joint.simulate, of({"num_samples": 3})),
        Call(
            "infer.AutoJoint.training_model",
            score,
            lambda: {name: value[:4].clone() for name, value in table.items()},
        ),
        Call(
            "infer.AutoJoint.condition",
            lambda x: joint.condition({"x": x}).sample((2,)),
            lambda: {"x": point.clone()},
            weight=0.5,
        ),
        Call("infer.JointConditional.sample", conditional.sample, of({"sample_shape": (2,)})),
        Call(
            "infer.JointConditional.log_prob",
            lambda z: conditional.log_prob({"z": z}),
            lambda: {"z": torch.zeros(2, 3)},
            weight=0.5,
        ),
        Call(
            "infer.JointConditional.quantiles",
            lambda **a: conditional.quantiles(**a),
            of({"quantiles": [0.1, 0.9], "num_samples": 3}),
            weight=0.5,
        ),
    ]


def quantiles_of(guide: Any, x: Any, **arguments: Any) -> Any:
    return guide.quantiles(arguments.pop("quantiles"), x, **arguments)


def _empty(**_: Any) -> None:
    """The guide of a model without latents."""


def evaluate_calls() -> list[Call]:
    flow = ProbabilityFlow(gaussian(), (3,), solver=ODESolver("rk4", steps=2))
    sde = DiffusionSDE(gaussian(), (3,), solver=SDESolver(steps=2))
    conditioned = Diffusion(conditional(), (3,), 3)
    rows = lambda: {"label": torch.tensor([0, 1, 2, 0]), "y": torch.zeros(4, 2)}  # noqa: E731

    def score(law: Any, **arguments: Any) -> Any:
        return evaluate.log_likelihood(law, **arguments)

    weights = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    known = evaluate.importance.from_log_weights(weights, 3, 3)
    ranks = evaluate.calibration.RankStatistics({"x": torch.arange(40) % 10}, 9)

    def simulate(**arguments: Any) -> Any:
        def model() -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

        def posterior(values: Any) -> Any:
            return {"z": 0.5 * values["y"] + 0.7 * torch.randn(9)}

        return evaluate.sbc(model, posterior, observed=["y"], **arguments)

    def pairs(test: Any, *data: Any, **arguments: Any) -> Any:
        def model() -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

        def posterior(values: Any) -> Any:
            return {"z": 0.5 * values["y"] + 0.7 * torch.randn(9)}

        return test(model, posterior, *data, observed=["y"], **arguments)

    pair = lambda: {"x": data(8), "y": data(8) + 0.1}  # noqa: E731
    return [
        Call(
            "evaluate.log_likelihood",
            functools.partial(score, chain()),
            lambda: {"data": data(), "num_terms": 2, "num_samples": 2, "batch_size": 3},
        ),
        Call(
            "evaluate.log_likelihood.sde",
            functools.partial(score, sde),
            lambda: {"data": data(), "num_terms": 2, "num_samples": 2, "batch_size": 3},
        ),
        Call(
            "evaluate.log_likelihood.context",
            functools.partial(score, conditioned),
            lambda: {"data": data(), "context": rows(), "batch_size": 3},
        ),
        Call(
            "evaluate.bracket_evidence",
            functools.partial(
                evaluate.bracket_evidence,
                simulator,
                AutoNormal(simulator, init_scale=1.0),
                x=torch.ones(3),
            ),
            lambda: {"posterior": {"z": data()}, "num_samples": 8},
            weight=0.5,
        ),
        Call(
            "evaluate.importance_posterior",
            functools.partial(evaluate.importance_posterior, simulator, amortized()),
            lambda: {"x": torch.ones(3), "num_samples": 3},
            True,
            weight=0.5,
        ),
        Call(
            "evaluate.latent_log_likelihood",
            functools.partial(evaluate.latent_log_likelihood, decoded, encoded),
            lambda: {
                "data": data(),
                "by": "chain",
                "num_samples": 2,
                "batch_size": 3,
                "seed": 0,
            },
            True,
            weight=0.5,
        ),
        Call(
            "evaluate.importance_weighted",
            functools.partial(evaluate.importance_weighted, chain()),
            lambda: {"data": data(), "num_samples": 2, "batch_size": 3},
            True,
            weight=0.5,
        ),
        Call(
            "evaluate.log_weights",
            functools.partial(evaluate.log_weights, chain()),
            lambda: {"data": data(), "num_samples": 1, "batch_size": 3},
            weight=0.5,
        ),
        Call(
            "evaluate.flow_log_likelihood",
            functools.partial(evaluate.flow_log_likelihood, flow),
            lambda: {"data": data(), "batch_size": 3},
        ),
        Call(
            "evaluate.draw_samples",
            functools.partial(evaluate.draw_samples, conditioned),
            lambda: {"num_samples": 4, "context": rows(), "batch_size": 3, "seed": 1},
        ),
        Call(
            "evaluate.from_log_weights",
            evaluate.importance.from_log_weights,
            of({"log_weights": weights, "evaluations": 3.0, "dimensions": 3}),
            True,
        ),
        Call(
            "evaluate.chain_costs",
            evaluate.chain_costs,
            lambda: {"denoiser": gaussian(), "data": data(), "times": TIMES, "num_samples": 1},
            True,
        ),
        Call(
            "evaluate.continuity_residual",
            evaluate.continuity_residual,
            lambda: {
                "denoiser": gaussian(),
                "data": data(),
                "levels": 3,
                "num_functions": 4,
                "num_samples": 1,
                "batch_size": 3,
            },
        ),
        Call(
            "infer.DensityRatio",
            lambda q, p: [
                infer.DensityRatio(nn.Linear(3, 1)).loss(q, p),
                infer.DensityRatio(nn.Linear(3, 1)).lower_bound(q, p).value,
            ],
            lambda: {"q": data(), "p": 1 + data()},
            True,
        ),
        Call(
            "infer.Responsibilities",
            lambda x, max_plate_nesting: infer.Responsibilities(classed, max_plate_nesting).probs(
                x
            ),
            lambda: {"x": torch.ones(3), "max_plate_nesting": 1},
        ),
        Call(
            "evaluate.jump_residual",
            evaluate.jump_residual,
            lambda: {
                "denoiser": symbols(),
                "data": torch.tensor([[0, 1, 3], [2, 2, 0], [1, 0, 0], [3, 3, 1]]),
                "times": 3,
                "num_functions": 4,
                "num_samples": 1,
                "batch_size": 3,
            },
        ),
        Call(
            "evaluate.wasserstein_bound",
            evaluate.wasserstein_bound,
            lambda: {
                "denoiser": gaussian(),
                "data": data(),
                "reference": exact(),
                "eta": 1.0,
                "num_points": 5,
            },
            weight=0.5,
        ),
        Call("evaluate.wasserstein", evaluate.wasserstein, pair),
        Call(
            "evaluate.sliced_wasserstein",
            evaluate.sliced_wasserstein,
            lambda: {**pair(), "num_projections": 8},
        ),
        Call(
            "evaluate.c2st",
            evaluate.c2st,
            lambda: {**pair(), "folds": 2, "hidden": 4, "iterations": 3, "learning_rate": 0.005},
        ),
        Call(
            "evaluate.to_elpd", evaluate.to_elpd, of({"likelihood": known, "name": "x"}), weight=0.5
        ),
        Call(
            "evaluate.LogLikelihoodEstimate",
            lambda **a: evaluate.LogLikelihoodEstimate(**a).mean,
            of(
                {
                    "value": known.value,
                    "standard_error": known.standard_error,
                    "kind": "exact",
                    "evaluations": 3.0,
                    "dimensions": 3,
                }
            ),
        ),
        Call("evaluate.compare", evaluate.compare, of({"likelihoods": {"a": known, "b": known}})),
        Call(
            "evaluate.to_arviz",
            evaluate.to_arviz,
            of({"likelihood": known, "name": "x", "num_chains": 1}),
            weight=0.5,
        ),
        Call(
            "evaluate.posterior_to_arviz",
            lambda **a: evaluate.posterior_to_arviz(
                a.pop("posterior"), program, torch.ones(3), **a
            ),
            lambda: {"posterior": {"x": data(6)}, "site": "x", "num_chains": 2},
            weight=0.5,
        ),
        Call(
            "evaluate.sbc",
            simulate,
            of({"num_simulations": 10, "thin": 1, "parallel": False}),
            weight=0.5,
        ),
        Call(
            "evaluate.tarp",
            functools.partial(pairs, evaluate.tarp),
            of({"num_simulations": 10, "num_references": 10, "parallel": False}),
            weight=0.5,
        ),
        Call(
            "evaluate.local_c2st",
            lambda observations, **a: pairs(evaluate.local_c2st, observations, **a),
            of(
                {
                    "observations": {"y": torch.tensor(0.5)},
                    **{"num_simulations": 20, "num_permutations": 10, "iterations": 2},
                    **{"hidden": 4, "learning_rate": 0.01},
                }
            ),
            weight=0.5,
        ),
        Call("evaluate.RankStatistics.p_value", ranks.p_value, of({"name": "x", "bins": 5})),
        Call("evaluate.RankStatistics.ecdf", ranks.ecdf, of({"name": "x"})),
        Call(
            "evaluate.RankStatistics.envelope",
            ranks.envelope,
            of({"level": 0.9, "num_simulations": 20}),
        ),
        Call(
            "evaluate.RankStatistics",
            lambda **a: evaluate.calibration.RankStatistics(**a).p_value(),
            of({"ranks": {"x": torch.arange(40) % 10}, "num_samples": 9}),
        ),
    ]


def network_calls() -> list[Call]:
    def mlp(**arguments: Any) -> Any:
        return used_network(networks.MLP(**arguments), torch.ones(2, 3))

    def unet(**arguments: Any) -> Any:
        return used_network(networks.UNet(**arguments), torch.ones(2, 1, 4, 4))

    def dit(**arguments: Any) -> Any:
        return used_network(networks.DiT(**arguments), torch.ones(2, 1, 4, 4))

    def sets(**arguments: Any) -> Any:
        return used_network(networks.SetTransformer(**arguments), torch.ones(2, 5, 3))

    def sites(**arguments: Any) -> Any:
        x = torch.ones(2, 3)
        return networks.SiteTransformer(**arguments)(x, torch.zeros(2), x, x > 0)

    def set_encoder(**arguments: Any) -> Any:
        return networks.SetEncoder(**arguments)(torch.ones(2, 5, 3))

    def series_encoder(**arguments: Any) -> Any:
        return networks.SeriesEncoder(**arguments)(torch.ones(2, 9, 3))

    def image_encoder(**arguments: Any) -> Any:
        return networks.ImageEncoder(**arguments)(torch.ones(2, 1, 5, 4))

    def transformer(**arguments: Any) -> Any:
        return used_network(networks.Transformer(**arguments), torch.zeros(2, 3).long())

    def labelled(value: Any, **arguments: Any) -> Any:
        net = networks.MLP(3, (8,), context={"label": networks.LabelContext(**arguments)})
        return used_network(net, torch.ones(2, 3), label=value)

    def vector(value: Any, **arguments: Any) -> Any:
        net = networks.MLP(3, (8,), context={"y": networks.TensorContext(**arguments)})
        return used_network(net, torch.ones(2, 3), y=value)

    small = networks.MLP(3, (8,), embedding=8).eval()
    image = networks.UNet(1, width=8, levels=(1,), attention=False).eval()
    patches = networks.DiT(1, width=8, depth=1, heads=2).eval()
    points = networks.SetTransformer(3, width=8, depth=1, heads=2).eval()
    some_sites = networks.SiteTransformer(3, width=8, depth=1, heads=2)
    words = networks.Transformer(4, 3, width=8, depth=1, heads=2).eval()
    return [
        Call(
            "nn.ConditionalMLP",
            lambda **a: networks.ConditionalMLP(**a)(
                torch.ones(2, a["event_size"]), torch.zeros(2), torch.ones(2, a["context_size"])
            ),
            of(
                {
                    **{"event_size": 3, "context_size": 2, "width": 8, "depth": 2},
                    **{"dropout": 0.0, "frequencies": (1.0, 2.0)},
                }
            ),
        ),
        Call(
            "nn.ConditionalMLP.forward",
            networks.ConditionalMLP(3, 2, width=8, depth=1),
            lambda: {"x": torch.ones(2, 3), "log_snr": torch.zeros(2), "y": torch.ones(2, 2)},
        ),
        *(
            Call(
                f"nn.{kind.__name__}",
                lambda kind=kind, **a: kind(**a)(torch.ones(2, 3), 1, torch.ones(2, 2)),
                of({"size": 3, "hidden": hidden, "states": 2, "orders": ORDERS, "context_size": 2}),
            )
            for kind, hidden in ((networks.MADE, (8,)), (networks.NADE, 4))
        ),
        Call(
            "nn.MADE.forward",
            networks.MADE(3, (8,), 2, ORDERS, 2),
            lambda: {"x": torch.ones(2, 3), "order": 1, "context": torch.ones(2, 2)},
        ),
        Call(
            "nn.NADE.conditional",
            networks.NADE(3, 8, 2, ORDERS, 2).conditional,
            lambda: {
                **{"x": torch.ones(2, 3), "position": 1, "order": 1},
                "context": torch.ones(2, 2),
            },
        ),
        Call(
            "nn.MLP",
            mlp,
            of(
                {
                    **{
                        "event_size": 3,
                        "hidden": (8,),
                        "outputs": 1,
                        "dropout": 0.0,
                        "embedding": 8,
                    },
                    **{"frequencies": (1.0, 2.0), "norm": True, "residual": True},
                }
            ),
        ),
        Call(
            "nn.DiT",
            dit,
            of(
                {
                    **{"channels": 1, "patch": 2, "width": 8, "depth": 1, "heads": 2},
                    **{"outputs": 1, "dropout": 0.0},
                }
            ),
        ),
        Call(
            "nn.SetTransformer",
            sets,
            of(
                {
                    **{"event_size": 3, "width": 8, "depth": 1, "heads": 2, "outputs": 1},
                    **{"dropout": 0.0, "frequencies": (1.0, 2.0)},
                }
            ),
        ),
        Call(
            "nn.SiteTransformer",
            sites,
            of(
                {
                    **{"event_size": 3, "width": 8, "depth": 1, "heads": 2, "dropout": 0.0},
                    **{"frequencies": (1.0, 2.0)},
                }
            ),
        ),
        Call(
            "nn.SiteTransformer.forward",
            lambda **a: some_sites(**a, conditioned=torch.tensor([[True, False, False]] * 2)),
            of({"x": torch.ones(2, 3), "log_snr": torch.zeros(2), "given": torch.ones(2, 3)}),
        ),
        Call(
            "nn.SetEncoder",
            set_encoder,
            of(
                {
                    **{"event_size": 3, "features": 4, "width": 8, "heads": 2, "blocks": 1},
                    **{"dropout": 0.0},
                }
            ),
        ),
        Call(
            "nn.SeriesEncoder",
            series_encoder,
            of(
                {
                    **{"channels": 3, "features": 4, "width": 8, "shrinks": 1, "blocks": 1},
                    **{"heads": 2, "dropout": 0.0},
                }
            ),
        ),
        Call(
            "nn.ImageEncoder",
            image_encoder,
            of(
                {
                    **{"channels": 1, "features": 4, "width": 8, "levels": (1, 2), "blocks": 1},
                    **{"attention": True, "dropout": 0.0},
                }
            ),
        ),
        Call(
            "nn.UNet",
            unet,
            of(
                {
                    "channels": 1,
                    "width": 8,
                    "levels": (1, 2),
                    "blocks": 1,
                    "attention": (0, 1),
                    "outputs": 1,
                    "dropout": 0.0,
                }
            ),
        ),
        Call(
            "nn.Transformer",
            transformer,
            of(
                {
                    **{"states": 4, "length": 3, "width": 8, "depth": 1, "heads": 2},
                    **{"dropout": 0.0, "relative": True, "noise_level": False, "causal": True},
                }
            ),
        ),
        Call(
            "nn.LabelContext",
            labelled,
            of({"value": torch.tensor([0, 1]), "classes": 3, "features": 8, "dropout": 0.1}),
        ),
        Call(
            "nn.TensorContext",
            vector,
            of({"value": torch.ones(2, 2), "in_features": 2, "features": 8, "dropout": 0.1}),
        ),
        Call(
            "nn.fourier_embedding",
            networks.embedding.fourier_embedding,
            of({"log_snr": torch.ones(2), "features": 8}),
        ),
        Call("nn.MLP.forward", small, of({"x": torch.ones(2, 3), "log_snr": torch.zeros(2)})),
        Call(
            "nn.UNet.forward", image, of({"x": torch.ones(2, 1, 4, 4), "log_snr": torch.zeros(2)})
        ),
        Call(
            "nn.DiT.forward", patches, of({"x": torch.ones(2, 1, 4, 4), "log_snr": torch.zeros(2)})
        ),
        Call(
            "nn.SetTransformer.forward",
            points,
            of({"x": torch.ones(2, 5, 3), "log_snr": torch.zeros(2)}),
        ),
        Call(
            "nn.SetEncoder.forward",
            networks.SetEncoder(3, 4, 8),
            of({"x": torch.ones(2, 5, 3), "mask": torch.ones(2, 5, dtype=torch.bool)}),
        ),
        Call(
            "nn.SeriesEncoder.forward",
            networks.SeriesEncoder(3, 4, 8),
            of({"x": torch.ones(2, 5, 3)}),
        ),
        Call(
            "nn.ImageEncoder.forward",
            networks.ImageEncoder(1, 4, 8),
            of({"x": torch.ones(2, 1, 4, 4)}),
        ),
        Call(
            "nn.Transformer.forward",
            words,
            of({"x": torch.zeros(2, 3).long(), "log_snr": torch.zeros(2)}),
        ),
    ]


def file_calls() -> list[Call]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    state = {"weights": torch.ones(2), "count": 3, "name": "a", "nested": {"x": [1.0, None]}}
    checkpoint.save(folder / "state.safetensors", state)
    net = Tiny((3,))
    checkpoint.save_module(folder / "net.safetensors", net)
    checkpoint.save_model(folder / "model.safetensors", gaussian())

    def average(**arguments: Any) -> Any:
        ema = optim.EMA(Tiny((3,)), **arguments)
        ema.update()
        return ema.state_dict()

    def joint(**arguments: Any) -> Any:
        weights = torch.nn.Parameter(torch.ones(2))
        weights.sum().backward()
        optim.JointOptim(torch.optim.Adam, **arguments)([weights])
        return weights

    def amos(**arguments: Any) -> Any:
        weights = torch.nn.Parameter(torch.ones(2))
        weights.sum().backward()
        optim.Amos([weights], **arguments).step()
        return weights

    good = optim.EMA(Tiny((3,))).state_dict()
    return [
        Call(
            "checkpoint.save",
            functools.partial(checkpoint.save, folder / "a.safetensors"),
            of({"state": state, "description": {"a": 1}}),
        ),
        Call(
            "checkpoint.load",
            checkpoint.load,
            of({"path": str(folder / "state.safetensors"), "description": {}}),
        ),
        Call(
            "checkpoint.read_description",
            checkpoint.saving.read_description,
            of({"path": str(folder / "state.safetensors")}),
        ),
        Call(
            "checkpoint.load_module",
            checkpoint.load_module,
            of({"path": str(folder / "net.safetensors"), "module": Tiny((3,))}),
        ),
        Call(
            "checkpoint.save_model",
            functools.partial(checkpoint.save_model, folder / "b.safetensors"),
            of({"model": chain()}),
        ),
        Call(
            "checkpoint.load_model",
            lambda **arguments: checkpoint.load_model(**arguments)(data(), 0.5).mean,
            of({"path": str(folder / "model.safetensors"), "network": Tiny((3,), 2)}),
        ),
        Call(
            "optim.Amos",
            amos,
            of({"lr": 0.1, "beta": 0.999, "scale": 0.5, "eps": 1e-18, "momentum": 0.9}),
        ),
        Call("optim.EMA", average, of({"decay": 0.9, "warmup": True})),
        Call(
            "optim.EMA.load_state_dict",
            lambda state: optim.EMA(Tiny((3,))).load_state_dict(state),
            of({"state": good}),
        ),
        Call("optim.JointOptim", joint, of({"optim_args": {"lr": 1e-3}, "clip_norm": 1.0})),
    ]


class Foreign(torch.nn.Module):
    """A network of another convention: any output of x's shape, a schedule, and logits of tokens."""

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> Any:
        return torch.ones(*x.shape, 5) if t is None else 0.1 * x

    def schedule(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1.01 - t, 0.01 + t


class Saving(Foreign):
    def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file({}, folder / "weights.safetensors")


class ForeignPosterior(Foreign):
    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> Any:
        return dist.Normal(0.1 * x, 1.0)


def foreign_calls() -> list[Call]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    config = {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.2, "clip_sample": False}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    save_file({}, folder / "weights.safetensors")

    def used(function: Any, **given: Any) -> Any:
        def call(**arguments: Any) -> Any:
            return function(**given, **arguments)(data(), 0.5).mean

        return call

    def saved(denoiser: Any) -> Any:
        foreign.save_diffusers(folder / "back", denoiser)
        return foreign.load_diffusers(folder / "back", network=Foreign()).process.schedule.knots

    tokens = torch.zeros(2, 3, dtype=torch.int64)
    edm = {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 7.0, "event_dim": 1}
    sde = {"beta_min": 0.1, "beta_max": 20.0, "scales": 100, "eps": 1e-3, "event_dim": 1}
    masked = {"vocabulary": 5, "mask_token": 1, "never": (4,)}
    return [
        Call("foreign.from_edm", used(foreign.from_edm, network=Foreign()), of(edm)),
        Call("foreign.from_score_sde", used(foreign.from_score_sde, network=Foreign()), of(sde)),
        Call(
            "foreign.from_diffusers",
            lambda event_dim, **config: used(
                foreign.from_diffusers, network=Foreign(), scheduler=config, event_dim=event_dim
            )(),
            of({**config, "event_dim": 1}),
        ),
        Call(
            "foreign.load_diffusers",
            lambda folder: foreign.load_diffusers(folder, network=Foreign()).process.schedule.knots,
            of({"folder": str(folder)}),
        ),
        Call(
            "foreign.save_diffusers",
            saved,
            of({"denoiser": foreign.from_diffusers(Saving(), config, event_dim=1)}),
        ),
        Call(
            "foreign.from_azula",
            used(foreign.from_azula, denoiser=ForeignPosterior()),
            of({"event_dim": 1, "variance": False}),
        ),
        Call(
            "foreign.from_masked_lm",
            lambda **arguments: foreign.from_masked_lm(network=Foreign(), **arguments)(
                tokens, 0.5
            ).sample(),
            of(masked),
        ),
    ]


def training_calls() -> list[Call]:
    def points(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    setup = {"unit": "bits/dim", "ema": 0.9, "clip_norm": 1.0, "accumulate": 2}

    def fitted(**arguments: Any) -> list[float]:
        given = {name: arguments.pop(name) for name in setup}
        optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
        trainer = train.Trainer(points, optimizer=optimizer, **given)
        return trainer.fit(rows, validation=rows, progress=False, **arguments).losses

    run = {"steps": 3, "batch_size": 2, "validate_every": 2, "patience": 2, "log_every": 2}
    rows = torch.ones(6, 3)
    table = amortized().simulate(10)
    return [
        Call("train.Trainer", fitted, of({**setup, **run})),
        Call(
            "train.fit_amortized",
            lambda **a: train.fit_amortized(amortized(), table, progress=False, **a).losses,
            of(
                {
                    **{"steps": 2, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.01},
                    **{"held_out": 0.2, "patience": 2},
                }
            ),
            weight=0.3,
        ),
    ]


def plotting_calls() -> list[Call]:
    steps = torch.tensor([1.0, 2.0, 3.0])
    return [
        Call(
            "plotting.sample_grid",
            plotting.sample_grid,
            of({"images": torch.rand(4, 1, 3, 3), "columns": 2, "low": 0.0, "high": 1.0}),
            weight=0.3,
        ),
        Call(
            "plotting.reverse_trajectory",
            plotting.reverse_trajectory,
            of({"states": torch.rand(3, 4, 2), "times": steps / 3, "columns": 2, "rows": 2}),
            weight=0.3,
        ),
        Call(
            "plotting.bound_per_step",
            plotting.bound_per_step,
            of(
                {
                    "steps": steps,
                    "terms": steps,
                    "standard_error": steps / 10,
                    "unit": "nats",
                    "axis": "time",
                }
            ),
            weight=0.3,
        ),
        Call(
            "plotting.schedule",
            plotting.schedule,
            of({"schedule": schedules.Cosine(), "num_points": 11}),
            weight=0.3,
        ),
        Call(
            "plotting.loss_curve",
            plotting.loss_curve,
            of({"losses": steps, "smooth": 2, "unit": "nats"}),
            weight=0.3,
        ),
        Call(
            "plotting.pair_plot",
            plotting.pair_plot,
            of(
                {
                    **{"data": torch.rand(4, 2), "samples": torch.rand(3, 2), "names": ["a", "b"]},
                    **{"num_points": 3, "bins": 4},
                }
            ),
            weight=0.3,
        ),
        Call(
            "plotting.coverage_curve",
            plotting.coverage_curve,
            of({"ranks": torch.arange(40) % 10, "num_samples": 9, "level": 0.9}),
            weight=0.3,
        ),
        Call(
            "plotting.null_histogram",
            plotting.null_histogram,
            of({"statistic": 0.1, "null": torch.arange(20) / 100, "bins": 5}),
            weight=0.3,
        ),
        Call(
            "plotting.rank_histogram",
            plotting.rank_histogram,
            of({"ranks": torch.arange(40) % 10, "num_samples": 9, "bins": 5, "level": 0.9}),
            weight=0.3,
        ),
    ]
