"""A good call of every public constructor and method, argument by argument, to be spoilt by the fuzz."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_diffusion import (
    denoisers,
    distributions,
    dynamics,
    infer,
    likelihoods,
    processes,
    samplers,
    schedules,
)
from pyro_diffusion import nn as networks
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver, SDESolver
from tests.small_diffusions import Tiny


@dataclass(frozen=True)
class Call:
    """A public name called with good arguments.

    Attributes:
        name: dotted, from its module on.
        function: takes the arguments by keyword; what it returns is looked at for numbers.
        arguments: good values, made afresh for every call.
        infinite: whether infinite numbers are a right answer of finite arguments.
        weight: how often it is drawn.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    infinite: bool = False
    weight: float = 1.0


# Public names that are no calls of a user's, and why.
NOT_CALLED: dict[str, str] = {
    "denoisers.Denoiser": "a base class",
    "denoisers.Parameterization": "a base class",
    "denoisers.Variance": "a base class",
    "distributions.Decoder": "a base class",
    "distributions.Objective": "a base class",
    "dynamics.TraceEstimator": "a base class",
    "guidance.GuidedDenoiser": "a base class",
    "likelihoods.Likelihood": "a base class",
    "samplers.Sampler": "a base class",
    "schedules.VariancePreserving": "a base class",
    "guidance.Twisted": "made by the package, for reading",
    "likelihoods.Whitened": "made by the package, for reading",
    "processes.Ability": "an enumeration",
    "samplers.State": "made by the package, for reading",
    "schedules.Level": "made by the package, for reading",
    "infer.UnreliableWarning": "made by the package, for reading",
    "infer.ChainReparam": "takes nothing to spoil, or objects of the caller",
}

PROCESS = processes.GaussianProcess(schedules.Cosine())
MASKING = processes.Absorbing(schedules.Rectified.full(), 4)
DELETION = processes.Deletion(schedules.Rectified.full(), 3)
COSINES = processes.Basis.dct((3,), dims=1)
BLURRING = processes.Blurring(schedules.Cosine(), COSINES, sigma_max=2.0)
HEAVY = processes.StudentTProcess(schedules.Cosine(), degrees_of_freedom=3.0)
ORDERS = torch.tensor([[0, 1, 2], [2, 0, 1]])
TIMES = schedules.uniform(3)
LEVEL = PROCESS.level(torch.tensor([0.3, 0.6]))


def seeded(module: Callable[[], Any]) -> Any:
    """The same random weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module()


@functools.cache
def network(outputs: int = 1, context: bool = False) -> nn.Module:
    return seeded(lambda: Tiny((3,), outputs, context)).eval()


@functools.cache
def gaussian(variance: bool = True) -> denoisers.Denoiser:
    head = denoisers.LearnedVariance() if variance else None
    return denoisers.GaussianDenoiser(network(2 if variance else 1), PROCESS, variance=head)


@functools.cache
def conditional() -> denoisers.Denoiser:
    return denoisers.GaussianDenoiser(
        network(2, True), PROCESS, variance=denoisers.LearnedVariance()
    )


@functools.cache
def symbols() -> denoisers.Denoiser:
    return denoisers.CategoricalDenoiser(network(4), MASKING)


@functools.cache
def conditional_bits() -> nn.Module:
    return seeded(lambda: networks.NADE(3, 4, orders=ORDERS, context_size=3))


def words() -> torch.Tensor:
    """A table over strings of up to three of three letters."""
    joint = torch.zeros(4, 4, 4)
    joint[0, 1, 2], joint[2, 3, 3], joint[1, 1, 3] = 0.5, 0.3, 0.2
    return joint


def exact() -> denoisers.Denoiser:
    return denoisers.MixtureDenoiser(PROCESS, torch.ones(1), torch.zeros(1, 3), 1.0)


def chain(**changes: Any) -> Diffusion:
    return Diffusion(changes.pop("denoiser", gaussian()), (3,), 3, **changes)


def read(y: Any = None) -> likelihoods.ProgramLikelihood:
    prior = Diffusion(exact(), (3,), steps=3)

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(3))

    return likelihoods.ProgramLikelihood(model)


def program(y: Any) -> None:
    x = pyro.sample("x", Diffusion(exact(), (3,), steps=3))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def data(n: int = 4) -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * n).reshape(n, 3)


def used_schedule(schedule: Any) -> Any:
    """What a schedule says inside its range."""
    level = schedule.level(torch.tensor([0.1, 0.5, 0.9]))
    return level, schedule.log_snr_slope(torch.tensor([0.1, 0.5]))


def used(law: Any, value: torch.Tensor | None = None) -> Any:
    """What a distribution says of data, and draws."""
    return law.log_prob(data() if value is None else value), law.sample((2,))


def drawn_and_scored(law: Any) -> Any:
    x = law.sample()
    return x, law.log_prob(x)


def used_decoder(decoder: Any) -> Any:
    posterior = dist.Normal(torch.zeros(2, 3), 0.1).to_event(1)
    law = decoder(posterior, LEVEL, PROCESS)
    return law.log_prob(torch.ones(2, 3)), law.sample()


def used_network(net: Any, x: torch.Tensor, **context: Any) -> Any:
    return net.eval()(x, torch.zeros(len(x)), **context)


def used_sampler(sampler: Any) -> Any:
    return samplers.simulate(gaussian(), TIMES, data(), sampler)


def used_guidance(guided: Any) -> Any:
    posterior = guided(data(2), torch.tensor(0.5))
    return posterior.mean, posterior.variance


def particles() -> infer.Particles:
    return infer.TwistedSMC(Diffusion(exact(), (3,), steps=2), read(), num_particles=8).run()


def of(value: Any) -> Callable[[], Any]:
    return lambda: value


def schedule_calls() -> list[Call]:
    ends = {"log_snr_max": 9.0, "log_snr_min": -9.0}
    betas = {"beta_min": 0.1, "beta_max": 20.0, "log_snr_max": 9.0}
    sigmas = {"sigma_min": 0.01, "sigma_max": 50.0}
    kinds = {
        "Cosine": {**ends, "shift": 0.5},
        "LogLinear": ends,
        "Rectified": ends,
        "LearnedSchedule": {"bins": 4, **ends},
        "LinearBeta": betas,
        "SubVP": betas,
        "VarianceExploding": sigmas,
        "EDM": {**sigmas, "rho": 7.0},
        "TabulatedBetas": {"betas": torch.tensor([0.1, 0.2, 0.3])},
    }

    def build(kind: str, **arguments: Any) -> Any:
        return used_schedule(getattr(schedules, kind)(**arguments))

    calls = [
        Call(f"schedules.{kind}", functools.partial(build, kind), of(arguments))
        for kind, arguments in kinds.items()
    ]
    cosine = schedules.Cosine()
    at = lambda: {"t": torch.tensor([0.2, 0.7])}  # noqa: E731
    for method in ("log_snr", "alpha", "sigma", "log_snr_slope", "f", "g2", "level"):
        calls.append(Call(f"schedules.Schedule.{method}", getattr(cosine, method), at, True))
    grid = {
        "quadratic": schedules.quadratic,
        "uniform": schedules.uniform,
    }
    calls += [Call(f"schedules.{k}", f, of({"steps": 4})) for k, f in grid.items()]
    by_schedule = {"schedule": cosine, "steps": 4}
    costs = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).triu(1)
    costs = costs.masked_fill(torch.ones(5, 5).tril() > 0, torch.inf)
    return [
        *calls,
        Call(
            "schedules.Schedule.time_of_log_snr",
            cosine.time_of_log_snr,
            lambda: {"log_snr": torch.tensor([0.2, 0.7])},
        ),
        Call(
            "schedules.Schedule.level_of_log_snr",
            cosine.level_of_log_snr,
            lambda: {"log_snr": torch.tensor([0.2, 0.7])},
        ),
        Call("schedules.uniform_log_snr", schedules.uniform_log_snr, of(by_schedule)),
        Call("schedules.karras", schedules.karras, of({**by_schedule, "rho": 7.0})),
        Call(
            "schedules.focused_log_snr",
            schedules.focused_log_snr,
            of({**by_schedule, "centre": 0.0, "width": 3.0}),
        ),
        Call(
            "schedules.optimal_grid",
            schedules.optimal_grid,
            of({"times": schedules.uniform(4), "costs": costs, "steps": 2}),
        ),
    ]


def process_calls() -> list[Call]:
    rectified = schedules.Rectified.full()
    states = torch.tensor([[0, 1, 3], [2, 3, 3]])
    posterior = processes.GaussianProcess.point_mass(PROCESS, data(2))

    def moments(law: Any) -> Any:
        return law.mean, law.variance, law.sample()

    def chances(law: Any) -> Any:
        return law.sample()

    def method(process: Any, name: str, summary: Any) -> Callable[..., Any]:
        return lambda **arguments: summary(getattr(process, name)(**arguments))

    def built(kind: Any, **arguments: Any) -> Any:
        process = kind(**arguments)
        if isinstance(process, processes.StudentTProcess | processes.AnyNoise):
            return drawn_and_scored(process.marginal(data(2), torch.tensor(0.5)))
        if isinstance(process, processes.CoupledGaussian):
            return process.marginal(data(2), torch.tensor(0.5)).sample()
        if isinstance(process, processes.GaussianProcess):
            return moments(process.marginal(data(2), torch.tensor(0.5)))
        return chances(process.marginal(states, torch.tensor(0.5)))

    x, s, t = data(2), torch.tensor(0.3), torch.tensor([0.5, 0.6])
    law = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def drawn(noise: Any) -> Any:
        with processes.drawing_from(noise):
            return processes.draw(law, (2,))

    def stepped(**arguments: Any) -> Any:
        with processes.global_batch(**arguments):
            return processes.draw(law, (2,))

    def turned(basis: Any) -> Any:
        x = torch.linspace(-1, 1, basis.event_shape.numel()).reshape(basis.event_shape)
        return basis(x), basis.inverse(x), basis.marginal_variances(x.square())

    of_gaussian = {
        "marginal": {"x0": x, "t": t},
        "transition": {"xs": x, "s": s, "t": t},
        "bridge": {"xt": x, "x0": x, "s": s, "t": t, "eta": 1.0},
        "reverse": {"xt": x, "posterior": posterior, "s": s, "t": t, "eta": 1.0},
        "prior": {"event_shape": (3,)},
        "point_mass": {"x0": x},
    }
    of_symbols = {
        "marginal": {"x0": states, "t": t},
        "transition": {"xs": states, "s": s, "t": t},
        "bridge": {"xt": states, "x0": states, "s": s, "t": t},
        "prior": {"event_shape": (3,)},
        "point_mass": {"x0": states},
    }
    return [
        Call(
            "processes.SeededNoise",
            lambda seed: drawn(processes.SeededNoise(seed)),
            of({"seed": 3}),
        ),
        Call("processes.global_batch", stepped, of({"rows": 2, "seed": 3, "step": 1})),
        Call("processes.drawing_from", drawn, of({"noise": processes.SeededNoise(1)})),
        Call(
            "processes.draw",
            functools.partial(processes.draw, law),
            of({"sample_shape": (2,)}),
        ),
        Call(
            "processes.GaussianProcess",
            functools.partial(built, processes.GaussianProcess),
            of({"schedule": schedules.Cosine(), "event_dim": 1}),
        ),
        Call(
            "processes.Basis",
            lambda **a: turned(processes.Basis(**a)),
            of(
                {
                    "vectors": torch.eye(3).flip(0),
                    "event_shape": (3,),
                    "frequencies": torch.arange(3.0),
                    "variances": torch.ones(3),
                }
            ),
        ),
        *(
            Call(
                f"processes.Basis.{name}",
                lambda name=name, **a: turned(getattr(processes.Basis, name)(**a)),
                of(arguments),
            )
            for name, arguments in {
                "identity": {"event_shape": (2, 3)},
                "dct": {"event_shape": (2, 3), "dims": 1},
                "haar": {"event_shape": (2, 4), "levels": 1, "dims": 1},
                "eigenvectors": {
                    "covariance": torch.ones(3, 3) + torch.eye(3),
                    "event_shape": (3,),
                },
                "principal": {"data": data()},
                "laplacian": {"adjacency": torch.ones(3, 3) - torch.eye(3)},
            }.items()
        ),
        *(
            Call(
                f"processes.{kind.__name__}",
                functools.partial(built, kind),
                of({"schedule": schedules.Cosine(), "basis": COSINES, **arguments}),
            )
            for kind, arguments in (
                (processes.SpectralGaussian, {"shift": torch.ones(3)}),
                (processes.LearnedSpectralGaussian, {"shift": torch.ones(3), "degree": 2}),
                (processes.Blurring, {"sigma_max": 2.0, "d_min": 0.01}),
            )
        ),
        Call(
            "processes.StudentTProcess",
            functools.partial(built, processes.StudentTProcess),
            of({"schedule": schedules.Cosine(), "degrees_of_freedom": 3.0, "event_dim": 1}),
        ),
        Call(
            "processes.AnyNoise",
            functools.partial(built, processes.AnyNoise),
            of({"schedule": schedules.Cosine(), "noise": dist.Laplace(0.0, 1.0), "event_dim": 1}),
        ),
        *(
            Call(f"processes.StudentTProcess.{k}", method(HEAVY, k, moments), of(v))
            for k, v in of_gaussian.items()
            if k not in ("transition", "point_mass")
        ),
        Call(
            "processes.SpectralGaussian.whitening",
            functools.partial(built, processes.SpectralGaussian.whitening),
            of(
                {
                    "schedule": schedules.Cosine(),
                    "basis": COSINES,
                    "variances": torch.tensor([2.0, 1.0, 0.5]),
                    "floor": 0.01,
                }
            ),
        ),
        *(
            Call(
                f"processes.{kind.__name__}",
                functools.partial(built, kind),
                of({"schedule": rectified, "states": 4, "event_dim": 1}),
            )
            for kind in (processes.Absorbing, processes.Uniform)
        ),
        Call(
            "processes.CategoricalProcess",
            functools.partial(built, processes.CategoricalProcess),
            of({"schedule": rectified, "states": 4, "noise": torch.ones(4) / 4, "event_dim": 1}),
        ),
        Call(
            "processes.TransitionMatrix",
            functools.partial(built, processes.TransitionMatrix),
            of({"schedule": rectified, "states": 4, "generator": torch.ones(4, 4), "event_dim": 1}),
        ),
        Call(
            "processes.CoupledGaussian",
            functools.partial(built, processes.CoupledGaussian),
            of({"schedule": schedules.Cosine(), "event_dim": 1}),
        ),
        Call(
            "processes.DegradedGaussian",
            lambda **a: moments(
                processes.DegradedGaussian(**a).marginal(data(2), torch.tensor(0.5))
            ),
            of(
                {
                    "schedule": schedules.Cosine(),
                    "operator": lambda x0, t: (1 - t) * x0 + t * torch.tanh(x0),
                    "event_dim": 1,
                    "sigma": 0.1,
                    "renewal": 0.5,
                    "reverse_scale": 0.2,
                    "prior": dist.Normal(torch.zeros(3), 1.0).to_event(1),
                }
            ),
        ),
        Call(
            "processes.VaryingNoise",
            functools.partial(built, processes.VaryingNoise),
            of(
                {"schedule": rectified, "states": 4, "stages": torch.ones(2, 4) / 4, "event_dim": 1}
            ),
        ),
        Call(
            "processes.DiscretizedGaussian",
            functools.partial(built, processes.DiscretizedGaussian),
            of({"schedule": rectified, "states": 4, "width": 1.0, "event_dim": 1}),
        ),
        Call(
            "processes.Deletion",
            functools.partial(built, processes.Deletion),
            of({"schedule": rectified, "symbols": 4}),
        ),
        *(
            Call(f"processes.GaussianProcess.{k}", method(PROCESS, k, moments), of(v))
            for k, v in of_gaussian.items()
        ),
        *(
            Call(f"processes.CategoricalProcess.{k}", method(MASKING, k, chances), of(v))
            for k, v in of_symbols.items()
        ),
        Call("processes.ForwardProcess.level", PROCESS.level, of({"t": t}), True),
        Call("processes.ForwardProcess.levels", PROCESS.levels, of({"times": TIMES}), True),
        Call("processes.ForwardProcess.rates", PROCESS.rates, of({"t": t}), True),
        Call(
            "processes.ForwardProcess.level_of_clock",
            PROCESS.level_of_clock,
            lambda: {"clock": torch.tensor([0.2, 0.7])},
        ),
        Call(
            "processes.GaussianProcess.coordinate_log_likelihood",
            PROCESS.coordinate_log_likelihood,
            of({"xt": x, "values": torch.tensor([-1.0, 0.0, 1.0]), "t": t}),
        ),
        Call(
            "processes.CategoricalProcess.coordinate_log_likelihood",
            MASKING.coordinate_log_likelihood,
            of({"xt": states, "values": torch.arange(4), "t": t}),
            True,
        ),
    ]


def denoiser_calls() -> list[Call]:
    gauss = {"xt": data(2), "t": torch.tensor([0.4, 0.6])}
    levels = denoisers.LevelsDenoiser(network(4), PROCESS, denoisers.uniform_levels(4))
    joint = torch.ones(3, 3, 3) / 27
    masking = processes.Absorbing(schedules.Rectified.full(), 4)
    table = denoisers.TableDenoiser(masking, torch.ones(4, 4, 4) / 64)
    states = {"xt": torch.tensor([[0, 1, 3], [2, 3, 3]]), "t": torch.tensor([0.4, 0.6])}
    strings = {"xt": torch.tensor([[0, 1, 2], [2, 3, 3]]), "t": torch.tensor([0.4, 0.6])}
    del joint

    def normal(law: Any) -> Any:
        return law.mean, law.variance

    def built(kind: Any, **arguments: Any) -> Any:
        return normal(kind(**arguments)(**gauss))

    def with_variance(variance: Any) -> Any:
        return built(
            denoisers.GaussianDenoiser, network=network(2), process=PROCESS, variance=variance
        )

    def with_parameterization(kind: Any, **arguments: Any) -> Any:
        return built(
            denoisers.GaussianDenoiser,
            network=network(),
            process=PROCESS,
            parameterization=kind(**arguments),
        )

    def one_variance(variance: Any) -> Any:
        denoiser = denoisers.GaussianDenoiser(network(), PROCESS, variance=variance)
        return normal(denoiser(**gauss))

    def headed(head: Any) -> Any:
        mean = denoisers.GaussianDenoiser(network(), PROCESS)
        return normal(denoisers.VarianceDenoiser(mean, head, Tiny((3,)))(**gauss))

    fit = {
        "denoiser": gaussian(False),
        "data": data(8),
        "knots": 5,
        "num_samples": 1,
        "batch_size": 4,
    }

    def fitted(function: Any, **arguments: Any) -> Any:
        found = function(**arguments)
        return found(None, LEVEL)

    return [
        *(
            Call(
                f"denoisers.{kind.__name__}",
                lambda xt, t, kind=kind: normal(
                    denoisers.GaussianDenoiser(network(), PROCESS, parameterization=kind())(xt, t)
                ),
                of(gauss),
                weight=0.5,
            )
            for kind in (
                denoisers.Data,
                denoisers.Noise,
                denoisers.Score,
                denoisers.V,
                denoisers.Velocity,
            )
        ),
        Call(
            "denoisers.unit_variance",
            lambda t: denoisers.unit_variance(PROCESS.level(t)),
            of({"t": torch.tensor([0.4, 0.6])}),
        ),
        Call(
            "denoisers.GaussianDenoiser",
            functools.partial(built, denoisers.GaussianDenoiser),
            of({"network": network(), "process": PROCESS, "parameterization": denoisers.V()}),
        ),
        Call("denoisers.GaussianDenoiser.forward", lambda **a: normal(gaussian()(**a)), of(gauss)),
        Call(
            "denoisers.NetworkDenoiser.context",
            lambda label, y: normal(conditional()(**gauss, label=label, y=y)),
            of({"label": torch.tensor([0, 1]), "y": torch.zeros(2, 2)}),
        ),
        Call(
            "denoisers.LevelsDenoiser",
            functools.partial(built, denoisers.LevelsDenoiser),
            of({"network": network(4), "process": PROCESS, "values": denoisers.uniform_levels(4)}),
        ),
        Call("denoisers.LevelsDenoiser.forward", lambda **a: normal(levels(**a)), of(gauss)),
        Call(
            "denoisers.FourierDenoiser",
            functools.partial(built, denoisers.FourierDenoiser),
            of({"network": network(8), "process": PROCESS, "degree": 3, "scale": 2.0}),
        ),
        Call(
            "denoisers.CategoricalDenoiser",
            lambda **a: denoisers.CategoricalDenoiser(**a)(**states).sample(),
            of({"network": network(4), "process": MASKING}),
        ),
        Call(
            "denoisers.CategoricalDenoiser.forward", lambda **a: symbols()(**a).sample(), of(states)
        ),
        Call(
            "denoisers.TableDenoiser",
            lambda **a: denoisers.TableDenoiser(**a)(**states).sample(),
            of({"process": masking, "joint": torch.ones(4, 4, 4) / 64}),
        ),
        Call(
            "denoisers.InsertionDenoiser",
            lambda **a: denoisers.InsertionDenoiser(**a)(**strings).sample(),
            of({"network": network(3), "process": DELETION}),
        ),
        Call(
            "denoisers.StringTableDenoiser",
            lambda **a: denoisers.StringTableDenoiser(**a)(**strings).sample(),
            of({"process": DELETION, "joint": words()}),
        ),
        Call("denoisers.TableDenoiser.forward", lambda **a: table(**a).sample(), of(states)),
        Call(
            "denoisers.MixtureDenoiser",
            functools.partial(built, denoisers.MixtureDenoiser),
            of(
                {
                    "process": PROCESS,
                    "weights": torch.ones(2) / 2,
                    "means": torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]),
                    "variances": torch.tensor([1.0, 0.5]),
                    "point_mass": False,
                }
            ),
        ),
        Call(
            "denoisers.NormalDenoiser",
            functools.partial(built, denoisers.NormalDenoiser),
            of({"process": PROCESS, "mean": torch.zeros(3), "covariance": torch.eye(3)}),
        ),
        Call(
            "denoisers.ComposedDenoiser",
            functools.partial(built, denoisers.ComposedDenoiser),
            of(
                {
                    "denoiser": exact(),
                    "context": {},
                    "covariances": torch.eye(3).expand(2, 3, 3) / 2,
                    "prior": exact(),
                    "prior_covariance": torch.eye(3),
                }
            ),
        ),
        Call("denoisers.MixtureDenoiser.forward", lambda **a: normal(exact()(**a)), of(gauss)),
        Call(
            "denoisers.MixtureDenoiser.marginal",
            lambda t: exact().marginal(t).log_prob(data()),
            of({"t": torch.tensor(0.5)}),
        ),
        Call(
            "denoisers.uniform_levels",
            denoisers.uniform_levels,
            of({"levels": 4, "low": -1.0, "high": 1.0}),
        ),
        Call(
            "denoisers.LearnedVariance",
            lambda **a: with_variance(denoisers.LearnedVariance(**a)),
            of({"limit": 15.0}),
        ),
        Call(
            "denoisers.TimeVariance",
            lambda **a: one_variance(denoisers.TimeVariance(**a)),
            of(
                {
                    "log_snr": torch.tensor([-1.0, 0.0, 1.0]),
                    "log_ratio": torch.tensor([-1.0, 0.0, 1.0]),
                    "trainable": True,
                }
            ),
        ),
        Call(
            "denoisers.EstimatedVariance",
            lambda **a: one_variance(denoisers.EstimatedVariance(**a)),
            of(
                {
                    "log_snr": torch.tensor([-1.0, 0.0, 1.0]),
                    "variance": torch.tensor([0.5, 0.3, 0.1]),
                }
            ),
        ),
        Call(
            "denoisers.EDMPreconditioning",
            functools.partial(with_parameterization, denoisers.EDMPreconditioning),
            of({"sigma_data": 0.5}),
        ),
        Call("denoisers.NPR", lambda **a: headed(denoisers.NPR(**a)), of({"limit": 15.0})),
        Call(
            "denoisers.SN",
            lambda **a: headed(denoisers.SN(**a)),
            of({"limit": 15.0, "skip": False, "largest": 1e3}),
        ),
        Call(
            "denoisers.SpectralDenoiser",
            functools.partial(built, denoisers.SpectralDenoiser),
            of(
                {
                    "network": network(2),
                    "process": BLURRING,
                    "parameterization": denoisers.Data(),
                    "variance": denoisers.LearnedVariance(),
                    "context_event_dims": None,
                }
            ),
        ),
        Call(
            "denoisers.VarianceDenoiser",
            functools.partial(built, denoisers.VarianceDenoiser),
            of({"denoiser": gaussian(False), "variance": denoisers.unit_variance, "network": None}),
        ),
        *(
            Call(f"denoisers.{f.__name__}", functools.partial(fitted, f), of(fit), weight=0.5)
            for f in (denoisers.analytic_variance, denoisers.residual_variance)
        ),
    ]


def sampler_calls() -> list[Call]:
    masks = torch.full((2, 3), 4)
    kinds = {
        "DDIM": {"eta": 0.5},
        "AdamsBashforth": {"order": 3, "eta": 0.0},
        "AdamsMoulton": {"order": 3, "eta": 0.0},
        "DPMSolverPP": {"eta": 0.0},
        "UniPC": {"predictor_order": 2},
        "Heun": {"churn": 0.1, "noise": 1.0, "between": (0.0, 10.0)},
        "AnnealedLangevin": {"snr": 0.3, "moves": 2},
    }
    corrector = {"snr": 0.16, "moves": 1}
    walk = {
        "denoiser": gaussian(),
        "times": TIMES,
        "x": data(),
        "sampler": samplers.Ancestral(),
        "context": {},
        "callback": None,
    }
    return [
        *(
            Call(
                f"samplers.{kind}",
                lambda kind=kind, **a: used_sampler(getattr(samplers, kind)(**a)),
                of(arguments),
            )
            for kind, arguments in kinds.items()
        ),
        Call(
            "samplers.Langevin",
            lambda **a: used_sampler(
                samplers.PredictorCorrector(samplers.Ancestral(), samplers.Langevin(**a))
            ),
            of(corrector),
        ),
        Call(
            "samplers.PredictorCorrector",
            lambda **a: used_sampler(samplers.PredictorCorrector(**a)),
            of({"predictor": samplers.DDIM(), "corrector": samplers.Langevin()}),
        ),
        Call(
            "samplers.RePaint",
            lambda **a: used_sampler(samplers.RePaint(**a)),
            of({"predictor": samplers.Ancestral(), "jumps": 1}),
        ),
        Call("samplers.simulate", samplers.simulate, of(walk), weight=2),
        Call(
            "samplers.Remasking",
            lambda share: samplers.simulate(symbols(), TIMES, masks, samplers.Remasking(share)),
            of({"share": 0.1}),
        ),
        Call(
            "samplers.FirstHitting",
            lambda x: samplers.simulate(symbols(), TIMES, x, samplers.FirstHitting()),
            of({"x": masks}),
        ),
        Call(
            "samplers.Ancestral",
            lambda x: samplers.simulate(gaussian(), TIMES, x, samplers.Ancestral()),
            lambda: {"x": data()},
        ),
    ]


def distribution_calls() -> list[Call]:
    views = {
        "Diffusion": {
            "event_shape": (3,),
            "steps": 3,
            "decoder": distributions.NormalDecoder(),
            "sampler": samplers.Ancestral(),
            "objective": distributions.Bound(),
        },
        "DiffusionSDE": {
            "event_shape": (3,),
            "solver": SDESolver(steps=3),
            "eta": 1.0,
        },
        "ProbabilityFlow": {
            "event_shape": (3,),
            "solver": ODESolver("rk4", steps=3),
            "trace": dynamics.ExactTrace(),
        },
    }
    kinds = {k: getattr(distributions, k) for k in views}
    chains = {"site": chain(), "sde": DiffusionSDE(gaussian(), (3,), solver=SDESolver(steps=3))}
    flow = ProbabilityFlow(gaussian(), (3,), solver=ODESolver("rk4", steps=3))
    every = {**chains, "flow": flow}
    labelled = {"label": torch.tensor([0, 1, 2, 0]), "y": torch.zeros(4, 2)}
    symbol = Diffusion(symbols(), (3,), 3)
    counts = chain(decoder=distributions.QuantizedDecoder(4))
    integers = torch.tensor([[0, 1, 3], [2, 3, 3]])
    calls = []
    for name, arguments in views.items():
        with_denoiser = {"denoiser": gaussian(), **arguments}
        calls.append(
            Call(
                f"distributions.{name}",
                lambda kind=kinds[name], **a: used(kind(**a)),
                of(with_denoiser),
                weight=3,
            )
        )
        small = {k: v for k, v in arguments.items() if k in ("event_shape", "steps", "solver")}
        calls.append(
            Call(
                f"distributions.{name}.context",
                lambda kind=kinds[name], small=small, **context: used(
                    kind(conditional(), **small, context=context)
                ),
                of(labelled),
                weight=2,
            )
        )
    calls.append(
        Call(
            "distributions.Diffusion.times",
            lambda times: used(Diffusion(gaussian(), (3,), times=times)),
            of({"times": TIMES}),
        )
    )
    calls.append(
        Call(
            "distributions.DiffusionCTMC",
            lambda **a: used(DiffusionCTMC(**a), integers),
            of(
                {
                    "denoiser": symbols(),
                    "event_shape": (3,),
                    "steps": 3,
                    "sampler": samplers.FirstHitting(),
                    "decoder": distributions.CategoricalDecoder(4),
                }
            ),
            weight=3,
        )
    )
    for name, view in every.items():
        calls += [
            Call(f"{name}.log_prob", view.log_prob, lambda: {"value": data()}, weight=2),
            Call(f"{name}.sample", view.sample, of({"sample_shape": (2,)}), weight=2),
            Call(
                f"{name}.expand",
                lambda batch_shape, view=view: used(view.expand(batch_shape)),
                of({"batch_shape": (4,)}),
            ),
        ]
    for name, view in chains.items():
        calls += [
            Call(f"{name}.prior_terms", view.prior_terms, lambda: {"value": data()}),
            Call(f"{name}.decoder_terms", view.decoder_terms, lambda: {"value": data()}),
            Call(
                f"{name}.reverse_terms",
                view.reverse_terms,
                lambda: {"value": data(), "position": torch.rand(4)},
            ),
            Call(f"{name}.encode", view.encode, lambda: {"value": data()}),
            Call(
                f"{name}.decode",
                lambda x, view=view: view.decode(x).sample(),
                lambda: {"x": data()},
            ),
        ]
    return [
        *calls,
        Call(
            "site.bound_terms",
            chains["site"].bound_terms,
            lambda: {"value": data(), "index": torch.tensor([0, 1, 2, 3])},
        ),
        Call(
            "site.bound_terms.int",
            chains["site"].bound_terms,
            lambda: {"value": data(), "index": 1},
        ),
        Call(
            "sde.bound_terms",
            chains["sde"].bound_terms,
            lambda: {"value": data(), "t": torch.rand(4)},
        ),
        Call(
            "site.replace",
            lambda **a: used(chains["site"].replace(**a)),
            of({"steps": 4, "sampler": samplers.DDIM()}),
        ),
        Call("symbols.log_prob", symbol.log_prob, of({"value": integers})),
        Call("counts.log_prob", counts.log_prob, of({"value": integers})),
        Call("flow.encode", flow.encode, lambda: {"value": data()}),
        Call("flow.decode", flow.decode, lambda: {"z": data()}),
        Call("flow.score", flow.score, lambda: {"value": data()}),
        Call("flow.rsample_and_log_prob", flow.rsample_and_log_prob, of({"sample_shape": (2,)})),
        Call(
            "distributions.FlowTransform",
            lambda **a: distributions.flow_transform.FlowTransform(**a)(data()),
            of(
                {
                    "denoiser": gaussian(),
                    "trace": dynamics.ExactTrace(),
                    "solver": dynamics.ODESolver("rk4", steps=3),
                    "seed": 0,
                }
            ),
        ),
        Call(
            "distributions.QuantizedDecoder",
            lambda **a: used_decoder(distributions.QuantizedDecoder(**a)),
            of({"levels": 4, "low": -1.0, "high": 1.0}),
        ),
        Call(
            "distributions.CategoricalDecoder",
            lambda **a: Diffusion(
                symbols(), (3,), 3, decoder=distributions.CategoricalDecoder(**a)
            ).log_prob(integers),
            of({"states": 4}),
        ),
        *(
            Call(
                "distributions.FourierDensity",
                lambda **a: drawn_and_scored(distributions.FourierDensity(**a)),
                of(
                    {"coefficients": torch.ones(4, 2), "loc": 0.5, "scale": scale, "domain": domain}
                ),
            )
            for domain, scale in (("line", 1.0), ("interval", torch.tensor(2.0)), ("circle", 3.0))
        ),
        *(
            Call(
                f"distributions.{kind.__name__}",
                lambda kind=kind, noise=noise, **a: drawn_and_scored(kind(noise=noise, **a)),
                of({"utilities": data(2), **more}),
            )
            for kind, more in (
                (distributions.ArgmaxCategorical, {}),
                (distributions.RelaxedArgmaxCategorical, {"temperature": torch.tensor(0.5)}),
            )
            for noise in (dist.Normal(0.0, 1.0), dist.Gumbel(0.0, 1.0), dist.Exponential(1.0))
        ),
        Call(
            "distributions.Autoregressive",
            lambda **a: drawn_and_scored(distributions.Autoregressive(**a)),
            of({"network": conditional_bits(), "order": 1, "context": data(2)}),
        ),
        Call(
            "distributions.OrderAgnostic",
            lambda **a: drawn_and_scored(
                distributions.Autoregressive(distributions.OrderAgnostic(**a))
            ),
            of({"denoiser": symbols(), "size": 3, "orders": ORDERS}),
        ),
        Call(
            "distributions.Dequantization",
            lambda x, event_dim: distributions.Dequantization(event_dim)(x),
            of({"x": torch.tensor([[0.2, 1.7]]), "event_dim": 1}),
        ),
        *(
            Call(
                f"distributions.{kind.__name__}",
                lambda value, kind=kind: chain(objective=kind()).log_prob(value),
                lambda: {"value": data()},
            )
            for kind in (distributions.Bound, distributions.Simple, distributions.FlowMatching)
        ),
        Call(
            "distributions.MomentRegression",
            lambda deviance, value: Diffusion(
                denoisers.VarianceDenoiser(gaussian(False), denoisers.NPR(), network()),
                (3,),
                3,
                objective=distributions.MomentRegression(deviance),
            ).log_prob(value),
            lambda: {"deviance": True, "value": data()},
        ),
        Call(
            "distributions.NormalDecoder",
            lambda value: chain(decoder=distributions.NormalDecoder()).log_prob(value),
            lambda: {"value": data()},
        ),
        Call(
            "distributions.BasisDecoder",
            lambda **a: used_decoder(distributions.BasisDecoder(**a)),
            of({"basis": COSINES, "decoder": distributions.QuantizedDecoder(4)}),
        ),
        Call(
            "distributions.Hybrid",
            lambda **a: chain(objective=distributions.Hybrid(**a)).log_prob(data()),
            of({"gamma": 1e-3}),
        ),
        Call(
            "distributions.RedDiff",
            lambda **a: chain(objective=distributions.RedDiff(**a)).log_prob(data()),
            of({"weight": 2.0}),
        ),
        Call(
            "distributions.Weighted",
            lambda **a: chain(objective=distributions.Weighted(**a)).log_prob(data()),
            of({"weight": lambda s, t, steps: s - t, "mean_only": False}),
        ),
    ]


def dynamics_calls() -> list[Call]:
    rows = lambda: {"normal": torch.randn(2, 4, 3)}  # noqa: E731
    fixed = {"method": "rk4", "steps": 3, "adjoint": False}
    tolerances = {"rtol": 0.1, "atol": 0.1}

    def traced(trace: Any) -> Any:
        return ProbabilityFlow(
            gaussian(), (3,), solver=ODESolver("rk4", steps=2), trace=trace
        ).log_prob(data())

    def solved(**arguments: Any) -> Any:
        return dynamics.ode.transport(gaussian(), data(), 0.1, 1.0, dynamics.ODESolver(**arguments))

    def integrated(**arguments: Any) -> Any:
        sde = dynamics.ReverseSDE(gaussian(), (3,))
        return dynamics.SDESolver(**arguments)(sde, data())

    def reverse(**arguments: Any) -> Any:
        return dynamics.SDESolver(steps=3)(dynamics.ReverseSDE(**arguments), data())

    def forward(**arguments: Any) -> Any:
        return dynamics.SDESolver(steps=3)(dynamics.ForwardSDE(**arguments), data())

    def increments(bm: Any) -> Any:
        return bm(0.1, 0.2)

    shape = {"shape": (4, 3), "dtype": torch.float32}
    return [
        Call(
            "dynamics.ExactTrace",
            lambda value: ProbabilityFlow(
                gaussian(), (3,), solver=ODESolver("rk4", steps=2), trace=dynamics.ExactTrace()
            ).log_prob(value),
            lambda: {"value": data()},
        ),
        Call(
            "dynamics.Hutchinson",
            lambda **a: traced(dynamics.Hutchinson(**a)),
            of({"num_probes": 2, "distribution": dynamics.trace_estimators.gaussian, "seed": 0}),
        ),
        Call(
            "dynamics.HutchPlusPlus",
            lambda **a: traced(dynamics.HutchPlusPlus(**a)),
            of({"num_probes": 2, "seed": 0}),
        ),
        Call("dynamics.ODESolver", solved, of(fixed)),
        Call("dynamics.ODESolver.adaptive", solved, of({"method": "dopri5", **tolerances})),
        Call(
            "dynamics.SDESolver",
            integrated,
            of({"method": "euler", "steps": 3, "adaptive": False}),
        ),
        Call(
            "dynamics.SDESolver.adaptive",
            integrated,
            of({"method": "heun", "adaptive": True, **tolerances}),
        ),
        Call(
            "dynamics.ReverseSDE",
            reverse,
            of({"denoiser": gaussian(), "event_shape": (3,), "eta": 1.0}),
        ),
        Call("dynamics.ForwardSDE", forward, of({"process": PROCESS, "event_shape": (3,)})),
        Call(
            "dynamics.transport",
            dynamics.ode.transport,
            lambda: {
                "denoiser": gaussian(),
                "z": data(),
                "start": 0.1,
                "stop": 1.0,
                "solver": dynamics.ODESolver("rk4", steps=2),
                "trace": dynamics.ExactTrace(),
            },
        ),
        Call(
            "dynamics.IndependentIncrements",
            lambda **a: increments(dynamics.brownian.IndependentIncrements(**a)),
            of(shape),
        ),
        Call(
            "dynamics.brownian_interval",
            lambda **a: increments(dynamics.brownian.brownian_interval(**a)),
            of({**shape, "stop": 1.0}),
        ),
        Call(
            "dynamics.KnownData",
            lambda **a: dynamics.sde.KnownData(**a)(data(), torch.tensor(0.5)).mean,
            lambda: {"process": PROCESS, "x0": data()},
        ),
        *(
            Call(f"dynamics.{f.__name__}", f, rows)
            for f in (
                dynamics.trace_estimators.gaussian,
                dynamics.trace_estimators.rademacher,
                dynamics.trace_estimators.sphere,
            )
        ),
    ]
