"""Posteriors where scales differ by coordinate: dependent data, guided chains, RED-diff, and divergence."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.importance import vectorized_importance_weights

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions import Diffusion, RedDiff
from pyro_diffusion.distributions.objectives import ReverseStep
from pyro_diffusion.guidance import (
    MMPS,
    TMPD,
    ClassifierGuidance,
    DataCovariance,
    GuidedDenoiser,
    PiGDM,
    Twisted,
)
from pyro_diffusion.guidance.base import shift_mean
from pyro_diffusion.infer import AutoGuidance
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.samplers import Ancestral, Heun
from pyro_diffusion.schedules import uniform
from tests.linear_normal import TAU, VARIANCE, A, M, Y, chain, conditioned, posterior, scales
from tests.per_coordinate import F64, PerCoordinate, normal

T = torch.tensor([0.15, 0.4, 0.55, 0.8], dtype=F64)
XT = torch.tensor([[0.3, -1.0], [1.1, 0.6], [-0.7, 2.0], [0.2, -0.4]], dtype=F64)
TIMES = uniform(8, F64)
EYE = torch.eye(2, dtype=F64)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def program(prior):
    x = pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(x @ A.mT, TAU).to_event(1), obs=Y)


def likelihood(denoiser):
    return ProgramLikelihood(program, (Diffusion(denoiser, (2,), times=TIMES),))


# Dependent coordinates: the derivative of the posterior mean is no diagonal matrix, nor symmetric.

C = torch.tensor([[0.5, -0.3], [-0.3, 0.3]], dtype=F64)


def dependent(xt, t):
    """Mean and covariance of x_0 given x_t for normal data of covariance C."""
    alpha, sigma = scales(t)
    covariance = torch.linalg.inv(torch.linalg.inv(C) + torch.diag_embed(alpha**2 / sigma**2))
    mean = covariance @ (torch.linalg.inv(C) @ M + alpha / sigma**2 * xt).unsqueeze(-1)
    return mean.squeeze(-1), covariance


class Dependent(Denoiser):
    """The exact denoiser of such data; its posterior has the variances alone."""

    def __init__(self):
        super().__init__(PerCoordinate())
        self.register_buffer("covariance", C)  # tells programs the precision

    def forward(self, xt, t):
        mean, covariance = dependent(xt, self.process.level(t, xt).t.squeeze(-1))
        return dist.Normal(mean, covariance.diagonal(dim1=-1, dim2=-2).sqrt()).to_event(1)


DATA, V = dependent(XT, T)
OPTIONS = ({}, {"full_gradient": True})
KRYLOV = tuple({"solver": solver, "iterations": 2} for solver in ("cg", "gmres"))


@pytest.mark.parametrize("options", [*OPTIONS, *KRYLOV], ids=str)
def test_mmps_is_exact_for_dependent_normals(options):
    exact, _, evidence = conditioned(DATA, V)
    guided = MMPS(Dependent(), likelihood(Dependent()), **options)
    close(guided(XT, T).mean, exact)
    close(guided.twisted(XT, T).log_twist, evidence)


@pytest.mark.parametrize("options", [{}, *KRYLOV], ids=str)
def test_the_covariance_of_dependent_data(options):
    exact, _, evidence = conditioned(DATA, V)
    guided = DataCovariance(Dependent(), likelihood(Dependent()), covariance=C, **options)
    close(guided(XT, T).mean, exact)
    close(guided.twisted(XT, T).log_twist, evidence)


@pytest.mark.parametrize("options", [*OPTIONS, *KRYLOV], ids=str)
def test_pigdm_pulls_back_through_the_denoiser(options):
    variances = torch.diag_embed(V.diagonal(dim1=-1, dim2=-2))
    s = A @ variances @ A.mT + TAU**2 * EYE
    u = torch.linalg.solve(s, (Y - DATA @ A.mT).unsqueeze(-1))
    found = PiGDM(Dependent(), likelihood(Dependent()), **options)(XT, T)
    close(found.mean, DATA + (V @ A.mT @ u).squeeze(-1))


def test_tmpd_counts_a_row_sum_below_zero_as_none():
    sums = (A @ V @ A.mT).sum(-1)
    assert sums.min() < -0.01
    gap = (Y - DATA @ A.mT) / (sums.clamp(min=0) + TAU**2)
    shift = (V @ (gap @ A).unsqueeze(-1)).squeeze(-1)
    # No shift explains more of the observations than there is to explain.
    length = (shift @ A.mT).norm(dim=-1, keepdim=True)
    most = (Y - DATA @ A.mT).norm(dim=-1, keepdim=True)
    cut = (most / length).clamp(max=1)
    assert bool((cut < 1).any()) and bool((cut == 1).any())
    found = TMPD(Dependent(), likelihood(Dependent()))(XT, T)
    close(found.mean, DATA + cut * shift)


# Chains guided by the exact posterior mean: moments and evidence in closed form.


def auto_guidance():
    model = functools.partial(program, Diffusion(normal(), (2,), times=TIMES))
    return Predictive(model, guide=AutoGuidance(model, MMPS), num_samples=4000, parallel=True)()[
        "x"
    ]


def classified():
    def classifier(xt, clock):
        mean, variance = posterior(xt, (10 - clock) / 20)
        s = A @ torch.diag_embed(variance) @ A.mT + TAU**2 * EYE
        return dist.MultivariateNormal(mean @ A.mT, s)

    guided = ClassifierGuidance(normal(), classifier, Y)
    return Diffusion(guided, (2,), times=TIMES).sample((4000,))


@pytest.mark.parametrize("draw", [auto_guidance, classified])
def test_guided_draws_have_the_moments_of_the_chain(draw):
    """4000 draws, five z-scores below 4.5: false alarms below 4e-5."""
    x = draw()
    mean, covariance = chain(TIMES, guided=True, left=draw is auto_guidance)
    variances = covariance.diagonal()
    z = (x.mean(0) - mean) / (variances / len(x)).sqrt()
    assert z.abs().max() < 4.5, z
    errors = ((variances.outer(variances) + covariance**2) / len(x)).sqrt()
    z = (x.mT.cov() - covariance) / errors
    assert z.abs().max() < 4.5, z


def test_the_chain_comes_to_the_posterior():
    """The limit that the draws above have with more steps."""
    exact, covariance, _ = conditioned(M, VARIANCE * EYE)
    gaps = []
    for steps in (200, 400):
        mean, found = chain(uniform(steps, F64), guided=True)
        gaps.append(max((mean - exact).norm(), (found - covariance).norm()))
    assert gaps[1] < 0.02 and 1.7 < gaps[0] / gaps[1] < 2.3  # of the first order


def test_weights_of_guided_draws_estimate_the_evidence():
    """2000 weights: a z-score below 4.5, false alarms below 7e-6."""
    model = functools.partial(program, Diffusion(normal(), (2,), times=TIMES))
    guide = AutoGuidance(model, MMPS)
    log_weights, *_ = vectorized_importance_weights(
        model, guide, num_samples=2000, max_plate_nesting=0
    )
    evidence = conditioned(*chain(TIMES, guided=False))[2]
    ratio = (log_weights - evidence).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 1.5


# RED-diff.

WEIGHTS = {"paper": 2.0, "smoothed": lambda log_snr: (0.5 * log_snr).exp()}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_the_gradient_of_red_diff(weight):
    """Affine in the noise, so that two opposite draws give its mean, w (alpha / sigma) (x_0 - E x_0_hat)."""
    process, objective = PerCoordinate(), RedDiff(weight)
    x0, noise = XT.clone().requires_grad_(), torch.randn(4, 2, dtype=F64)
    level = process.level(T, x0)
    alpha, sigma = scales(T)
    costs = []
    for sign in (1, -1):
        xt = alpha * x0 + sign * sigma * noise
        step = ReverseStep(process, x0, xt, normal()(xt, level), level, level, 9)
        costs.append(objective.reverse_term(step))
    (found,) = torch.autograd.grad(sum(costs).sum() / 2, x0)
    w = alpha / sigma if callable(weight) else weight * sigma / alpha
    close(found, w * alpha / sigma * (XT - posterior(alpha * XT, T)[0]) / 10)


# Trajectories that diverge.


class Overshooting(GuidedDenoiser):
    """The exact denoiser; from clock 0 on one coordinate is off by so many standard deviations of noise."""

    def __init__(self, noise, i):
        super().__init__(normal())
        self.noise = torch.zeros(2, dtype=F64)
        self.noise[i] = noise

    def twisted(self, xt, t):
        level, prior = self.process.level(t, xt), self.denoiser(xt, t)
        shift = torch.where(level.clock > 0.1, self.noise * level.noise_to_signal, 0.0)
        return Twisted(prior, shift_mean(prior, shift), xt.new_zeros(()))


@pytest.mark.parametrize("sampler", [Ancestral(), Heun()], ids=repr)
@pytest.mark.parametrize("i", [0, 1])
def test_a_trajectory_that_diverges_names_the_clock_and_the_noise(sampler, i):
    """One of two coordinates at 1e4 standard deviations, beside which the exact noise is nothing."""
    guided = Overshooting(1e4, i)
    match = r"leaves the model at log-SNR 2: .* noise of 7\.07e\+03 standard deviations"
    with pytest.raises(ValueError, match=match):
        Diffusion(guided, (2,), times=uniform(10, F64), sampler=sampler).sample((5,))
    # Just below the limit of 1000, by coordinate: let through.
    Diffusion(Overshooting(1e3, i), (2,), times=uniform(10, F64)[4:], sampler=sampler).sample((5,))
