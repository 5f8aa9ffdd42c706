"""Bad input gets one clear error that names the argument, what it was and what was expected."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    EDMPreconditioning,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    MixtureDenoiser,
    TableDenoiser,
    TimeVariance,
    uniform_levels,
)
from pyro_diffusion.distributions import (
    CategoricalDecoder,
    Diffusion,
    Hybrid,
    NormalDecoder,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.guidance import (
    MMPS,
    TMPD,
    DiffPIR,
    PiGDM,
    PlugIn,
    SampledGuidance,
)
from pyro_diffusion.infer import DDPM, AutoGuidance, ParticleGibbs, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, CategoricalProcess, GaussianProcess, Uniform
from pyro_diffusion.samplers import DAPS, DDIM
from pyro_diffusion.schedules import (
    Cosine,
    LinearBeta,
    LogLinear,
    Rectified,
    Schedule,
    TabulatedBetas,
    VarianceExploding,
    karras,
    quadratic,
    uniform,
    uniform_log_snr,
)
from tests.small_diffusions import Tiny, conditional

NAN, INF = math.nan, math.inf
PROCESS = GaussianProcess(Cosine())
SEEN = torch.ones(3)
MASKING = Absorbing(Rectified.full(), 3)


class Short(nn.Module):
    """A network that forgets a coordinate."""

    def forward(self, x, log_snr):
        return x[:, :-1]


class Bumpy(LogLinear):
    """A schedule that turns back half way."""

    def _curve(self, u):
        return 10 * torch.cos(2 * math.pi * u)


def gaussian(**arguments) -> Diffusion:
    arguments = {"event_shape": (3,), "steps": 4, **arguments}
    return Diffusion(arguments.pop("denoiser", GaussianDenoiser(Tiny((3,)), PROCESS)), **arguments)


def images(**arguments) -> Diffusion:
    process = GaussianProcess(Cosine(), event_dim=3)
    denoiser = GaussianDenoiser(Tiny((1, 2, 2)), process)
    return Diffusion(denoiser, (1, 2, 2), 4, **arguments)


def symbols(**arguments) -> Diffusion:
    return Diffusion(CategoricalDenoiser(Tiny((4,), 3), MASKING), (4,), 4, **arguments)


def counts() -> Diffusion:
    return gaussian(decoder=QuantizedDecoder(5))


def mixture(event: int = 3) -> MixtureDenoiser:
    return MixtureDenoiser(PROCESS, torch.ones(1), torch.zeros(1, event), 1.0)


def read(law: dist.Distribution | None = None, sites: int = 1, **arguments) -> ProgramLikelihood:
    """The likelihood of a program of diffusion sites; a Normal reading of them unless there is a law."""
    prior = Diffusion(mixture(), (3,), steps=2)

    def model(obs=None):
        x = [pyro.sample(f"x_{i}", prior, obs=obs) for i in range(sites)]
        total = sum(x, torch.zeros(3))
        pyro.sample("y", law(total) if law else dist.Normal(total, 1.0).to_event(1), obs=SEEN)

    return ProgramLikelihood(model, **arguments)


def rounded(x: torch.Tensor) -> dist.Distribution:
    return dist.Normal(x.round(), 1.0).to_event(1)


def rates(x: torch.Tensor) -> dist.Distribution:
    return dist.Poisson(x.exp()).to_event(1)


def gammas(x: torch.Tensor) -> dist.Distribution:
    return dist.Gamma(2.0, x.exp()).to_event(1)


def never(x: torch.Tensor) -> dist.Distribution:
    return dist.Uniform(x.abs() + 2, x.abs() + 3, validate_args=False).to_event(1)


def particles(likelihood: ProgramLikelihood, guidance=None, **arguments) -> TwistedSMC:
    return TwistedSMC(Diffusion(mixture(), (3,), steps=2), likelihood, guidance, **arguments)


def at(index: int, bad: float) -> torch.Tensor:
    value = torch.zeros(2, 3)
    value[1, index] = bad
    return value


TABLE = {
    # processes
    "class for a schedule": (
        lambda: GaussianProcess(Cosine),
        r"schedule: got the class Cosine, expected a Schedule such as Cosine\(\)",
    ),
    # data
    "nan data": (lambda: gaussian().log_prob(at(0, NAN)), r"value: got 1 NaN .*\(2, 3\).*finite"),
    "infinite data": (lambda: gaussian().log_prob(at(2, -INF)), "value: got 1 NaN or infinite"),
    "nan counts": (lambda: counts().log_prob(at(0, NAN)), "value: got 1 NaN"),
    "fraction": (lambda: counts().log_prob(at(0, 0.5)), "value: got fractional.*integers"),
    "too large": (lambda: counts().log_prob(at(0, 5)), r"value: got .* 0 to 5, .*\[0, 4\]"),
    "negative": (lambda: counts().log_prob(at(0, -1)), r"value: got .* -1 to 0, .*\[0, 4\]"),
    "unknown symbol": (
        lambda: symbols().log_prob(torch.tensor([0, 1, 2, 3])),
        r"value: got .* 0 to 3, .*\[0, 2\]",
    ),
    "fractional symbol": (
        lambda: symbols().log_prob(torch.full((4,), 0.5)),
        "value: got fractional",
    ),
    "event shape": (lambda: gaussian().log_prob(torch.zeros(2, 4)), r"value: .*\(2, 4\).*\(3,\)"),
    "transposed image": (
        lambda: images().log_prob(torch.zeros(5, 2, 2, 1)),
        r"value: got shape \(5, 2, 2, 1\), expected .*\(1, 2, 2\)",
    ),
    "no dimensions": (lambda: gaussian().log_prob(torch.tensor(0.0)), r"value: got shape \(\)"),
    "empty batch": (lambda: gaussian().log_prob(torch.zeros(0, 3)), r"value: .*empty.*\(0, 3\)"),
    "empty symbols": (lambda: symbols().log_prob(torch.zeros(0, 4).long()), "value: .*empty"),
    "batch of another size": (
        lambda: gaussian().expand((4,)).log_prob(torch.zeros(5, 3)),
        r"value: got shapes value \(5, 3\), distribution \(4, 3\)",
    ),
    "terms of nan": (lambda: gaussian().bound_terms(at(0, NAN), 1), "value: got 1 NaN"),
    "term out of range": (lambda: gaussian().bound_terms(at(0, 0), 6), "index: got .*6.*0 to 4"),
    "term below zero": (lambda: gaussian().bound_terms(at(0, 0), -1), "index: got .*-1"),
    # the chain
    "no steps": (lambda: gaussian(steps=0), "steps: got 0, expected an integer >= 1"),
    "negative steps": (lambda: gaussian(steps=-3), "steps: got -3"),
    "float steps": (lambda: gaussian(steps=4.0), "steps: got 4.0"),
    "boolean steps": (lambda: gaussian(steps=True), "steps: got True"),
    "text steps": (lambda: gaussian(steps="4"), "steps: got '4'"),
    "late times": (
        lambda: gaussian(times=torch.tensor([0.0, 0.5, 1.5])),
        r"times: .* 1.5.*\[0, 1\]",
    ),
    "early times": (lambda: gaussian(times=torch.tensor([-0.1, 1.0])), r"times: .*-0.1"),
    "nan times": (lambda: gaussian(times=torch.tensor([0.0, NAN, 1.0])), "times: got"),
    "equal times": (
        lambda: gaussian(times=torch.tensor([0.0, 0.5, 0.5, 1.0])),
        "times: got a grid that is not increasing",
    ),
    "falling times": (lambda: gaussian(times=uniform(4).flip(0)), "times: .*not increasing"),
    "one time": (lambda: gaussian(times=torch.tensor([1.0])), "times: got shape .*at least two"),
    "square times": (lambda: gaussian(times=torch.rand(2, 2)), r"times: got shape \(2, 2\)"),
    "list of times": (lambda: gaussian(times=[0.0, 1.0]), "times: got list, expected a tensor"),
    "array of times": (lambda: gaussian(times=np.linspace(0, 1, 3)), "times: got ndarray"),
    "schedule that turns": (
        lambda: gaussian(denoiser=GaussianDenoiser(Tiny((3,)), GaussianProcess(Bumpy()))),
        r"schedule: got a non-monotone log-SNR .*Bumpy",
    ),
    "infinite schedule": (
        lambda: gaussian(denoiser=GaussianDenoiser(Tiny((3,)), GaussianProcess(Rectified.full()))),
        "schedule: got log-SNR .*inf.*finite",
    ),
    "half infinite schedule": (
        lambda: gaussian(
            denoiser=GaussianDenoiser(Tiny((3,)), GaussianProcess(Rectified(INF, -10.0)))
        ),
        "schedule: got log-SNR .*inf",
    ),
    "event too long": (
        lambda: gaussian(event_shape=(3, 3)),
        r"event_shape: got \(3, 3\), expected 1",
    ),
    "event too short": (lambda: gaussian(event_shape=()), r"event_shape: got \(\), expected 1"),
    "event a number": (lambda: gaussian(event_shape=3), "event_shape: got 3"),
    "network for denoiser": (lambda: gaussian(denoiser=Tiny((3,))), "denoiser: got Tiny"),
    "no denoiser": (lambda: gaussian(denoiser=None), "denoiser: got NoneType"),
    "unknown sampler": (lambda: gaussian(sampler="ddim"), r"sampler: got 'ddim'.*DDIM\("),
    "sampler class": (lambda: gaussian(sampler=DDIM), "sampler: got <class"),
    "decoder by name": (lambda: gaussian(decoder="normal"), "decoder: got 'normal'"),
    "objective by name": (lambda: gaussian(objective="simple"), "objective: got 'simple'"),
    "symbols for vectors": (
        lambda: gaussian(decoder=CategoricalDecoder(3)),
        "decoder: got CategoricalDecoder.*GaussianProcess",
    ),
    "vectors for symbols": (
        lambda: symbols(decoder=NormalDecoder()),
        "decoder: got NormalDecoder.*Absorbing",
    ),
    "other symbols": (lambda: symbols(decoder=CategoricalDecoder(5)), "decoder: got Categorical"),
    "hybrid without variance": (
        lambda: gaussian(objective=Hybrid()).log_prob(at(0, 0)),
        "objective: got Hybrid with a point mass",
    ),
    "hybrid weight": (lambda: Hybrid(0.0), "gamma: got 0.0"),
    "eta": (lambda: DDIM(1.5), r"eta: got 1.5.*\[0, 1\]"),
    "eta for symbols": (lambda: symbols(sampler=DDIM()).sample(), "sampler: got DDIM.*Absorbing"),
    # context
    "contexts disagree": (
        lambda: gaussian(
            denoiser=conditional(),
            context={"label": torch.zeros(3).long(), "y": torch.zeros(4, 2)},
        ),
        r"context: got shapes label \(3,\), y \(4,\), expected .*broadcast",
    ),
    "context of another batch": (
        lambda: gaussian(denoiser=conditional(), context={"label": torch.zeros(3).long()}).log_prob(
            torch.zeros(4, 3)
        ),
        r"value: got shapes value \(4, 3\), distribution \(3, 3\)",
    ),
    "context straight to a denoiser": (
        lambda: conditional()(torch.zeros(4, 3), torch.tensor(0.5), label=torch.zeros(5).long()),
        r"label: got shape \(5,\), expected .*\(4,\)",
    ),
    # times and processes
    "time above one": (
        lambda: PROCESS.marginal(torch.zeros(3), 1.2),
        r"t: got times .*1.2.*\[0, 1\]",
    ),
    "time below zero": (lambda: PROCESS.marginal(torch.zeros(3), -0.1), "t: got times .*-0.1"),
    "nan time": (lambda: MASKING.marginal(torch.zeros(4).long(), NAN), "t: got times"),
    "denoiser's time": (
        lambda: GaussianDenoiser(Tiny((3,)), PROCESS)(torch.zeros(2, 3), torch.tensor(2.0)),
        "t: got times",
    ),
    "schedule for process": (lambda: GaussianProcess(0.1), "schedule: got float"),
    "event dimension": (lambda: GaussianProcess(Cosine(), -1), "event_dim: got -1"),
    "one symbol": (lambda: Absorbing(Rectified.full(), 1), "states: got 1"),
    "float symbols": (lambda: Uniform(Rectified.full(), 3.0), "states: got 3.0"),
    "noise does not sum": (
        lambda: CategoricalProcess(Rectified.full(), 2, torch.tensor([0.3, 0.3])),
        "noise: got a sum of 0.6",
    ),
    "negative noise": (
        lambda: CategoricalProcess(Rectified.full(), 2, torch.tensor([1.5, -0.5])),
        "noise: got",
    ),
    "noise too short": (
        lambda: CategoricalProcess(Rectified.full(), 3, torch.tensor([0.5, 0.5])),
        r"noise: got shape \(2,\)",
    ),
    # schedules and grids
    "ends in the wrong order": (lambda: Cosine(-5.0, 5.0), "log_snr_max, log_snr_min: got -5"),
    "nan end": (lambda: LogLinear(NAN, -5.0), "log_snr_max, log_snr_min: got nan"),
    "betas in the wrong order": (lambda: LinearBeta(20.0, 0.1), "beta_min, beta_max: got 20"),
    "sigmas in the wrong order": (
        lambda: VarianceExploding(5, 1),
        "sigma_min, sigma_max: got 5, 1",
    ),
    "beta of one": (lambda: TabulatedBetas([0.1, 1.0]), "betas: got values from 0.1 to 1"),
    "negative beta": (lambda: TabulatedBetas([-0.1, 0.5]), "betas: got values from -0.1"),
    "nan beta": (lambda: TabulatedBetas([0.1, NAN]), "betas: got 1 NaN"),
    "one beta": (lambda: TabulatedBetas([0.1]), "betas: got shape"),
    "no uniform steps": (lambda: uniform(0), "steps: got 0"),
    "no quadratic steps": (lambda: quadratic(-1), "steps: got -1"),
    "rho": (lambda: karras(Cosine(), 4, rho=0.0), "rho: got 0.0"),
    "grid of an infinite schedule": (
        lambda: uniform_log_snr(Rectified.full(), 4),
        "schedule: got .*inf.*finite ends",
    ),
    # denoisers
    "symbols for a Gaussian denoiser": (
        lambda: GaussianDenoiser(Tiny((3,)), MASKING),
        "process: got Absorbing, which lacks data of real numbers .* expected a process such as Gauss",
    ),
    "vectors for a symbol denoiser": (
        lambda: CategoricalDenoiser(Tiny((3,)), PROCESS),
        "process: got GaussianProcess, which lacks data of finitely many symbols, expected a process",
    ),
    "no process": (lambda: GaussianDenoiser(Tiny((3,)), None), "process: got NoneType"),
    "parameterization by name": (
        lambda: GaussianDenoiser(Tiny((3,)), PROCESS, parameterization="eps"),
        "parameterization: got 'eps'",
    ),
    "network without a variance head": (
        lambda: GaussianDenoiser(Tiny((3,)), PROCESS, variance=LearnedVariance())(
            torch.zeros(2, 3), torch.tensor(0.5)
        ),
        r"network: got an output of shape \(2, 3\), expected \(2, 3, 2\)",
    ),
    "network of another size": (
        lambda: GaussianDenoiser(Short(), PROCESS)(torch.zeros(2, 3), torch.tensor(0.5)),
        r"network: got an output of shape \(2, 2\), expected \(2, 3, 1\)",
    ),
    "falling values": (
        lambda: LevelsDenoiser(Tiny((3,), 4), PROCESS, uniform_levels(4).flip(0)),
        "values: got",
    ),
    "levels that disagree": (
        lambda: gaussian(
            denoiser=LevelsDenoiser(Tiny((3,), 4), PROCESS, uniform_levels(4)),
            decoder=QuantizedDecoder(8),
        ).log_prob(at(0, 1)),
        "decoder: got 8 levels and a posterior over 4 values",
    ),
    "falling knots": (lambda: TimeVariance([1.0, -1.0]), "log_snr: got"),
    "sigma of data": (lambda: EDMPreconditioning(0.0), "sigma_data: got 0.0"),
    "mixture of images": (
        lambda: MixtureDenoiser(
            GaussianProcess(Cosine(), 3), torch.ones(1), torch.zeros(1, 2), 1.0
        ),
        "process: ",
    ),
    "mixture weights": (
        lambda: MixtureDenoiser(PROCESS, torch.ones(2), torch.zeros(3, 2), 1.0),
        r"weights, means: got shapes \(2,\), \(3, 2\)",
    ),
    "table of another alphabet": (
        lambda: TableDenoiser(MASKING, torch.ones(2, 2)),
        r"joint: got shape \(2, 2\)",
    ),
    # the chain spelled out
    "chain without data": (lambda: DDPM(gaussian().denoiser, (3,), 2).model(), "size: got None"),
    "chain of no steps": (lambda: DDPM(gaussian().denoiser, (3,), 0), "steps: got 0"),
    "chain of nan": (
        lambda: DDPM(gaussian().denoiser, (3,), 2).guide(at(0, NAN)),
        "value: got 1 NaN",
    ),
    # a likelihood out of a program
    "no diffusion site": (
        lambda: read(sites=0),
        "model: got no diffusion site, expected .*Diffusion",
    ),
    "several diffusion sites": (
        lambda: read(sites=2),
        "site: got None and several diffusion sites, x_0, x_1; expected the name of one",
    ),
    "another of several": (lambda: read(sites=2, site="x_0"), "latents: got no value for x_1"),
    "unknown site": (lambda: read(site="z"), "site: got 'z', expected a sample site .*x_0, y"),
    "site of another law": (lambda: read(site="y"), "site: got 'y', which is observed"),
    "observed diffusion site": (
        lambda: read(kwargs={"obs": SEEN}),
        "model: got no diffusion site that is not observed .*x_0",
    ),
    "observed and named": (
        lambda: read(kwargs={"obs": SEEN}, site="x_0"),
        "site: got 'x_0', which is observed.*take its `obs` away",
    ),
    "nothing observed": (
        lambda: ProgramLikelihood(lambda: pyro.sample("x", gaussian())),
        "model: got no observed site and no factor.*obs=",
    ),
    "observations of nan": (
        lambda: ProgramLikelihood(
            lambda: pyro.sample(
                "y", dist.Normal(pyro.sample("x", gaussian()), 1), obs=at(0, NAN)[1]
            )
        ),
        "site 'y': got 1 NaN",
    ),
    "program for a likelihood": (lambda: ProgramLikelihood(None), "model: got NoneType"),
    "residuals": (lambda: read(residuals="pearson"), "residuals: got 'pearson', expected 'normal'"),
    # guidance
    **{
        f"rounded data under {guidance.__name__}": (
            lambda guidance=guidance: guidance(mixture(), read(rounded)),
            "likelihood: got no gradient in x_0 at site 'y'.*twisted SMC",
        )
        for guidance in (PlugIn, MMPS, PiGDM, TMPD, DiffPIR)
    },
    "rounded data under DAPS": (lambda: DAPS(read(rounded)), "likelihood: got no gradient in x_0"),
    **{
        f"counts under {guidance.__name__}": (
            lambda guidance=guidance: guidance(mixture(), read(rates))(SEEN, torch.tensor(0.5)),
            r"site 'y' with a Poisson, expected a Normal.*residuals=\"deviance\".*PlugIn.*TwistedSMC",
        )
        for guidance in (MMPS, PiGDM, TMPD, DiffPIR)
    },
    "no deviance": (
        lambda: MMPS(mixture(), read(gammas, residuals="deviance"))(SEEN, torch.tensor(0.5)),
        "site 'y' with a Gamma, expected a Normal.*discrete distribution.*PlugIn.*TwistedSMC",
    ),
    "network for a guided denoiser": (lambda: PlugIn(Tiny((3,)), read()), "denoiser: got Tiny"),
    "solver by another name": (lambda: MMPS(mixture(), read(), solver="lu"), "solver: got 'lu'"),
    "no iterations": (lambda: MMPS(mixture(), read(), iterations=0), "iterations: got 0"),
    "negative scale": (lambda: PlugIn(mixture(), read(), scale=-1.0), "scale: got -1.0"),
    # evaluation
    "flow for a bound": (
        lambda: evaluate.log_likelihood(ProbabilityFlow(mixture(), (3,)), SEEN),
        "diffusion: got ProbabilityFlow, expected Diffusion .*use flow_log_likelihood for a Prob",
    ),
    "chain for a flow": (
        lambda: evaluate.flow_log_likelihood(gaussian(), SEEN),
        "flow: got Diffusion, expected ProbabilityFlow.*use log_likelihood for a Diffusion",
    ),
    # particles
    "one particle": (lambda: particles(read(), num_particles=1), "num_particles: got 1, .*>= 2"),
    "no particle": (lambda: particles(read(), num_particles=0), "num_particles: got 0, .*>= 2"),
    "half a particle": (lambda: particles(read(), num_particles=2.5), "num_particles: got 2.5"),
    "threshold": (lambda: particles(read(), ess_threshold=0.0), "ess_threshold: got 0.0"),
    "all weights zero": (
        lambda: particles(read(never), SampledGuidance, num_particles=4).run(),
        "likelihood: got none that is positive .*4 particles.*more noise, use more particles",
    ),
    "instance for a guidance, in a guide": (
        lambda: AutoGuidance(lambda: None, MMPS(mixture(), read())),
        "guidance: got an instance of MMPS, expected a class",
    ),
    "instance for a guidance, of particles": (
        lambda: particles(read(), MMPS(mixture(), read())),
        "guidance: got an instance of MMPS, expected a class",
    ),
    "instance for a guidance, of Gibbs moves": (
        lambda: ParticleGibbs(lambda: None, guidance=MMPS(mixture(), read())),
        "guidance: got an instance of MMPS, expected a class",
    ),
    "no function for particles": (
        lambda: particles(read(), "MMPS"),
        r"guidance: got str, expected guidance\(denoiser, likelihood\)",
    ),
    "counts in a guide": (
        lambda: particles(read(rates), MMPS, num_particles=2).run(),
        r"with a Poisson, .*guidance=lambda d, l: MMPS\(d, l.with_residuals\(\"deviance\"\)\)",
    ),
    "guidance that is none": (
        lambda: particles(read(), lambda denoiser, _: denoiser),
        "guidance: got a factory of MixtureDenoiser",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_refused_by_name(case):
    call, message = TABLE[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_lost_by_an_error():
    law = gaussian()
    generator = torch.get_rng_state()
    weights = [p.clone() for p in law.denoiser.parameters()]
    good = torch.zeros(2, 3)
    before = law.log_prob(good)
    for bad in (at(0, NAN), torch.zeros(2, 4), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="value"):
            law.log_prob(bad)
    assert torch.get_rng_state().equal(generator)
    assert law.log_prob(good).equal(before)
    assert all(a.equal(b) for a, b in zip(weights, law.denoiser.parameters(), strict=True))


def test_checks_can_be_switched_off():
    law = gaussian(validate_args=False)
    assert law.log_prob(at(0, NAN)).isnan().any()
    assert isinstance(law.denoiser.process.schedule, Schedule)
