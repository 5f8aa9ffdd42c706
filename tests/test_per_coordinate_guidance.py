"""Guidance where scales differ by coordinate, each method to its own formula in closed form."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_normal import TAU, A, Y, conditioned, posterior, scales
from per_coordinate import F64, MEAN, VARIANCE, PerCoordinate, normal
from torch import nn

from pyro_diffusion import denoisers, guidance
from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import (
    MMPS,
    TMPD,
    CalibratedCovariance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DataCovariance,
    DiffPIR,
    DPSStep,
    PiGDM,
    PlugIn,
    Replacement,
    SampledGuidance,
    SimilarityGuidance,
    SubstitutionGuidance,
)
from pyro_diffusion.guidance.classifier import NoiseAwareGuidance
from pyro_diffusion.infer.filtering.twisted_smc import default_guidance
from pyro_diffusion.likelihoods import Likelihood, ProgramLikelihood
from pyro_diffusion.likelihoods.whitening import Whitened
from pyro_diffusion.processes import Ability, Absorbing, GaussianProcess
from pyro_diffusion.schedules import LogLinear, Rectified, uniform

T = torch.tensor([0.15, 0.4, 0.55, 0.8], dtype=F64)
XT = torch.tensor([[0.3, -1.0], [1.1, 0.6], [-0.7, 2.0], [0.2, -0.4]], dtype=F64)
C = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
DATA, VARIANCES = posterior(XT, T)
ALPHA, SIGMA = scales(T)
EXACT, _, EVIDENCE = conditioned(DATA, torch.diag_embed(VARIANCES))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def likelihood(a=A, y=Y, tau=TAU):
    def model():
        x = pyro.sample("x", Diffusion(normal(), (2,), times=uniform(4, F64)))
        pyro.sample("y", dist.Normal(x @ a.mT, tau).to_event(1), obs=y)

    return ProgramLikelihood(model)


def shifted(gain, covariance, a=A):
    """x_0 given y as a method has it: gain A^T (A covariance A^T + tau^2)^-1 (y - A x_0), added."""
    s = a @ covariance @ a.mT + TAU**2 * torch.eye(len(a), dtype=F64)
    gap = Y[: len(a)] - DATA @ a.mT
    u = torch.linalg.solve(s, gap.unsqueeze(-1))
    return DATA + (gain @ a.mT @ u).squeeze(-1)


EXACTLY = {
    "MMPS": lambda d: MMPS(d, likelihood()),
    "MMPS, whole gradient": lambda d: MMPS(d, likelihood(), full_gradient=True),
    "PiGDM": lambda d: PiGDM(d, likelihood()),
    "PiGDM, whole gradient": lambda d: PiGDM(d, likelihood(), full_gradient=True),
    "PiGDM, variance of data": lambda d: PiGDM(d, likelihood(), data_variance=VARIANCE),
    "DataCovariance": lambda d: DataCovariance(
        d, likelihood(), covariance=VARIANCE * torch.eye(2, dtype=F64)
    ),
}


@pytest.mark.parametrize("build", EXACTLY.values(), ids=EXACTLY)
def test_exact_methods_are_exact(build):
    found = build(normal()).twisted(XT, T)
    close(found.posterior.mean, EXACT)
    close(found.log_twist, EVIDENCE)
    close(found.posterior.variance, VARIANCES)


@pytest.mark.parametrize("build", [MMPS, PiGDM], ids=["MMPS", "PiGDM"])
@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_krylov_solvers_are_exact(build, solver):
    close(build(normal(), likelihood(), solver=solver, iterations=2)(XT, T).mean, EXACT)


@pytest.mark.parametrize("build", EXACTLY.values(), ids=EXACTLY)
def test_rows_of_a_grid_and_single_times_are_those_of_a_batch(build):
    guided = build(normal())
    for i, t in enumerate(T):
        close(guided(XT[i : i + 1], t).mean, EXACT[i : i + 1])
        level = guided.process.level(float(t), XT)
        close(guided(XT[i : i + 1], level).mean, EXACT[i : i + 1])


def test_methods_follow_their_own_formulas():
    v = torch.diag_embed(VARIANCES)
    s2 = 0.7
    assumed = torch.diag_embed(s2 * SIGMA**2 / (s2 * ALPHA**2 + SIGMA**2))
    close(PiGDM(normal(), likelihood(), data_variance=s2)(XT, T).mean, shifted(v, assumed))
    noise = torch.diag_embed(SIGMA**2 / ALPHA**2 / 0.6)
    close(DiffPIR(normal(), likelihood(), lam=0.6)(XT, T).mean, shifted(noise, noise))
    dense = torch.linalg.inv(torch.linalg.inv(C) + torch.diag_embed(ALPHA**2 / SIGMA**2))
    for options in ({}, {"solver": "cg", "iterations": 2}):
        guided = DataCovariance(normal(), likelihood(), covariance=C, **options)
        close(guided(XT, T).mean, shifted(dense, dense))
    sums = (A @ v @ A.mT).sum(-1).clamp(min=0) + TAU**2
    gap = (Y - DATA @ A.mT) / sums
    close(TMPD(normal(), likelihood())(XT, T).mean, DATA + VARIANCES * (gap @ A))


def test_what_a_whole_gradient_adds_is_limited_by_the_noise_of_all_coordinates():
    means = torch.tensor([[-6.0, -6.0], [6.0, 6.0]], dtype=F64)
    denoiser = MixtureDenoiser(PerCoordinate(), torch.ones(2, dtype=F64), means, 0.01)
    xt, t = torch.linspace(-3, 3, 40, dtype=F64).unsqueeze(-1).expand(-1, 2), T[2]
    at, partial, whole = (
        d(xt, t).mean
        for d in (
            denoiser,
            MMPS(denoiser, likelihood()),
            MMPS(denoiser, likelihood(), full_gradient=True),
        )
    )
    alpha, sigma = scales(t)
    limit = (partial - at).norm(dim=-1) + (sigma / alpha).norm()
    share = (whole - partial).norm(dim=-1) / limit
    assert share.max() < 1 + 1e-10
    cut = share > 1 - 1e-10
    assert 0 < cut.sum() < len(xt)


def test_tmpd_is_exact_for_observations_of_single_coordinates():
    eye = torch.eye(2, dtype=F64)
    exact, _, evidence = conditioned(DATA, torch.diag_embed(VARIANCES), a=eye)
    found = TMPD(normal(), likelihood(eye)).twisted(XT, T)
    close(found.posterior.mean, exact)
    close(found.log_twist, evidence)


def test_a_covariance_by_cholesky_is_that_of_the_eigenbasis():
    # Under one noise level both are to be had.
    process = GaussianProcess(LogLinear(10.0, -10.0))
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 1.0)
    guided = DataCovariance(denoiser, likelihood(), covariance=C)
    level = process.level(T, XT)
    spread = level._replace(alpha=level.alpha.expand(-1, 2), sigma=level.sigma.expand(-1, 2))
    close(guided(XT, spread).mean, guided(XT, level).mean)


def test_plug_in():
    found = PlugIn(normal(), likelihood(), scale=0.3, line_search=False).twisted(XT, T)
    gap = Y - DATA @ A.mT
    close(found.posterior.mean, DATA + 0.3 * VARIANCES * (gap @ A) / TAU**2)
    close(found.log_twist, dist.Normal(DATA @ A.mT, TAU).log_prob(Y).sum(-1))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("squared_norm", [True, False])
def test_a_step_of_dps_shifts_the_state_by_the_gradient(eta, squared_norm):
    # What the paper's algorithm adds to x_s is the same for every coordinate: -zeta grad E / root E.
    times = torch.cat([torch.zeros(1, dtype=F64), T])
    step = DPSStep(0.3, times, eta=eta, squared_norm=squared_norm)
    guided = PlugIn(normal(), likelihood(), step_size=step)
    process, prior = guided.process, guided.denoiser

    def energy(xt):
        gap = Y - posterior(xt, T)[0] @ A.mT
        square = (gap / TAU).square().sum(-1)
        return square if squared_norm else -dist.Normal(gap, TAU).log_prob(gap * 0).sum(-1)

    xt = XT.clone().requires_grad_()
    e = energy(xt)
    (slope,) = torch.autograd.grad(e.sum(), xt)
    size = 0.3 / e.detach().clamp(min=0.0 if squared_norm else 1.0).sqrt()
    expected = -size.unsqueeze(-1) * slope
    kernels = [process.reverse(XT, d(XT, T), times[:-1], T, eta) for d in (guided, prior)]
    close(kernels[0].mean - kernels[1].mean, expected)
    levels = process.levels(times)
    for i in range(len(T)):  # and at one time for the batch, as a sampler asks
        s, t = levels.at(i), levels.at(i + 1)
        kernels = [
            process.reverse(XT[i : i + 1], d(XT[i : i + 1], t), s, t, eta) for d in (guided, prior)
        ]
        close(kernels[0].mean - kernels[1].mean, expected[i : i + 1])


@pytest.mark.parametrize("i", [0, 1])
def test_replacement(i):
    # 2 x_i = y with noise: precision 4 / tau^2 of that coordinate; the other is the prior's.
    found = Replacement(normal(), likelihood(2 * torch.eye(2, dtype=F64)[i : i + 1], Y[:1]))(XT, T)
    precision = 4 / TAU**2 + ALPHA[:, i] ** 2 / SIGMA[:, i] ** 2
    mean, variance = DATA.clone(), VARIANCES.clone()
    mean[:, i] = (2 * Y[0] / TAU**2 + ALPHA[:, i] / SIGMA[:, i] ** 2 * XT[:, i]) / precision
    variance[:, i] = 1 / precision
    close(found.mean, mean)
    close(found.variance, variance)


class ExactTwist(NoiseAwareGuidance):
    """log p(y | x_t) itself."""

    def log_twist(self, xt, log_snr):
        torch.testing.assert_close(log_snr, 10 - 20 * T)  # networks are told the clock
        mean, variance = posterior(xt, T)
        return conditioned(mean, torch.diag_embed(variance))[2]


def test_twists_of_the_noisy_state():
    found = ExactTwist(normal()).twisted(XT, T)
    close(found.posterior.mean, EXACT)
    close(found.log_twist, EVIDENCE)
    by_level = ExactTwist(normal(), scale=lambda level: 1 + level.t).twisted(XT, T)
    close(by_level.posterior.mean, DATA + (1 + T.unsqueeze(-1)) * (EXACT - DATA))

    def classifier(xt, log_snr):
        return dist.Normal(xt.sum(-1), 1.0)

    tweedie = SIGMA**2 / ALPHA
    guided = ClassifierGuidance(normal(), classifier, Y[0])
    close(guided(XT, T).mean, DATA + tweedie * (Y[0] - XT.sum(-1, keepdim=True)))
    target = torch.tensor([0.5, -2.0], dtype=F64)
    guided = SimilarityGuidance(normal(), lambda xt, _: xt, target, similarity="dot")
    close(guided(XT, T).mean, DATA + tweedie * target)


def test_a_scale_is_one_number_per_level():
    guided = ExactTwist(normal(), scale=lambda level: level.sigma)
    with pytest.raises(ValueError, match=r"^scale: got .* shape \(4, 2\), expected one number per"):
        guided(XT, T)


class Conditional(denoisers.Denoiser):
    """The exact denoiser, shifted by its context."""

    def __init__(self):
        super().__init__(PerCoordinate())
        self.denoiser, self.evaluations = normal(), 0

    def forward(self, xt, t, shift=None):
        self.evaluations += 1
        posterior = self.denoiser(xt, t)
        mean = posterior.mean if shift is None else posterior.mean + shift
        return dist.Normal(mean, posterior.variance.sqrt()).to_event(1)


def test_classifier_free_guidance():
    shift = torch.tensor([1.0, -2.0], dtype=F64)
    guided = ClassifierFreeGuidance(Conditional(), 3.0, interval=(-2.0, 4.0))  # T has -1, 2 in it
    found = guided(XT, T, shift=shift)
    inside = torch.tensor([[1.0], [3.0], [3.0], [1.0]], dtype=F64)
    close(found.mean, DATA + inside * shift)
    close(found.variance, VARIANCES)
    guided = ClassifierFreeGuidance(Conditional(), lambda level: level.noise_to_signal)
    close(guided(XT, T, shift=shift).mean, DATA + SIGMA / ALPHA * shift)
    for t, weight, evaluations in ((T[1], 3, 2), (T[0], 1, 1)):  # at one time for the whole batch
        one = ClassifierFreeGuidance(Conditional(), 3.0, interval=(-2.0, 4.0))
        close(one(XT, t, shift=shift).mean, posterior(XT, t)[0] + weight * shift)
        assert one.denoiser.evaluations == evaluations


def test_draws_of_the_posterior_estimate_the_twist_without_bias():
    # 400 estimates from 50 draws each; z beyond 4.5 has a chance below 1e-4 for all four together.
    guided = SampledGuidance(normal(), likelihood(), num_samples=50)
    found = guided.twisted(XT.expand(400, 4, 2), T)
    ratio = (found.log_twist - EVIDENCE).exp()
    z = (ratio.mean(0) - 1) / (ratio.std(0) / 20)
    assert z.abs().max() < 4.5, z


def test_weighted_draws_have_the_posteriors_mean():
    # 100 means of 5000 draws each, whose bias is a tenth of the error: beyond 5 a chance below 1e-5 in all.
    guided = SampledGuidance(normal(), likelihood(), num_samples=5000, prior_count=1e-3)
    means = guided(XT.expand(100, 4, 2), T).mean
    z = (means.mean(0) - EXACT) / (means.std(0) / 10)
    assert z.abs().max() < 5, z


class Nothing(Likelihood):
    """Observations that say nothing, of any data."""

    batch_shape, event_shape = torch.Size(), torch.Size((2,))

    def log_prob(self, x0):
        return 0.0 * x0.to(F64).sum(-1)

    def whitened(self, x0):
        return Whitened(0.0 * x0, self.log_prob(x0))


class Table(nn.Module):
    """Equal probabilities of three symbols."""

    def forward(self, xt, log_snr):
        return torch.zeros(*xt.shape, 3, dtype=F64)


LEVELS = (GaussianProcess(LogLinear(10.0, -10.0)), PerCoordinate())
BASES = {
    type(p).__name__: MixtureDenoiser(
        p, torch.ones(1, dtype=F64), torch.tensor([MEAN], dtype=F64), 0.3
    )
    for p in LEVELS
}
BASES["Absorbing"] = denoisers.CategoricalDenoiser(Table(), Absorbing(Rectified.full(), 3))
NUMBERS, SYMBOLS = "data of real numbers", "data of finitely many symbols"
BY_LIKELIHOOD = {
    MMPS: NUMBERS,
    CalibratedCovariance: NUMBERS,
    TMPD: NUMBERS,
    DiffPIR: NUMBERS,
    PiGDM: NUMBERS,
    PlugIn: NUMBERS,
    Replacement: NUMBERS,
    DataCovariance: NUMBERS,
    SampledGuidance: None,
    SubstitutionGuidance: SYMBOLS,
}
BUILT = {kind: lambda d, kind=kind: kind(d, Nothing()) for kind in BY_LIKELIHOOD}
BUILT |= {
    DataCovariance: lambda d: DataCovariance(d, Nothing(), covariance=C),
    ExactTwist: ExactTwist,
    ClassifierGuidance: lambda d: ClassifierGuidance(
        d, lambda xt, _: dist.Normal(xt.sum(-1), 1.0), 0.0
    ),
    SimilarityGuidance: lambda d: SimilarityGuidance(d, lambda xt, _: xt, torch.ones(2)),
    ClassifierFreeGuidance: lambda d: ClassifierFreeGuidance(d, 2.0),
}
NEEDS = BY_LIKELIHOOD | {
    ExactTwist: NUMBERS,
    ClassifierGuidance: NUMBERS,
    SimilarityGuidance: NUMBERS,
    ClassifierFreeGuidance: None,
}


def test_the_table_has_every_guidance():
    bases = {"GaussianConditioning", "GuidedDenoiser", "NoiseAwareGuidance"}
    public = {
        name
        for name in guidance.__all__
        if isinstance(kind := getattr(guidance, name), type)
        and issubclass(kind, denoisers.Denoiser)
    }
    assert public - bases == {kind.__name__ for kind in NEEDS} - {"ExactTwist"}


@pytest.mark.parametrize("process", BASES)
@pytest.mark.parametrize("kind", NEEDS, ids=lambda kind: kind.__name__)
def test_every_guidance_works_or_names_what_the_process_lacks(kind, process):
    base, missing = BASES[process], NEEDS[kind]
    symbols = process == "Absorbing"
    if missing is not None and symbols == (missing == NUMBERS):
        with pytest.raises(
            ValueError, match=f"^denoiser: got .* under {process}, which lacks {missing}"
        ):
            BUILT[kind](base)
        return
    xt = torch.tensor([[0, 3]]).expand(4, 2) if symbols else XT
    found = BUILT[kind](base)(xt, T)
    assert found.batch_shape + found.event_shape == (4, 2)


class OtherNoise(GaussianProcess):
    """Real data under noise that is not normal."""

    abilities = GaussianProcess.abilities - {Ability.TWEEDIE}


@pytest.mark.parametrize(
    "kind", [k for k in NEEDS if NEEDS[k] == NUMBERS], ids=lambda kind: kind.__name__
)
def test_shifts_by_a_gradient_ask_for_tweedies_formula(kind):
    base = MixtureDenoiser(
        PerCoordinate(), torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 0.3
    )
    base.process = OtherNoise(LogLinear(10.0, -10.0))
    with pytest.raises(
        ValueError, match=r"^denoiser: .* under OtherNoise, which lacks Tweedie's formula"
    ):
        BUILT[kind](base)
    assert SampledGuidance(base, Nothing()).process is base.process
    assert isinstance(default_guidance(base, Nothing()), SampledGuidance)


def test_a_step_size_asks_for_a_free_variance():
    class Markov(GaussianProcess):
        abilities = GaussianProcess.abilities - {Ability.FREE_VARIANCE}

    base = MixtureDenoiser(
        PerCoordinate(), torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 0.3
    )
    base.process = Markov(LogLinear(10.0, -10.0))
    PlugIn(base, Nothing(), step_size=DPSStep(0.3, T))
    with pytest.raises(
        ValueError, match=r"^step_size: got DPSStep\(eta=0\) under Markov, which lacks"
    ):
        PlugIn(base, Nothing(), step_size=DPSStep(0.3, T, eta=0.0))
