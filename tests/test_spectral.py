"""Gaussian processes in an orthonormal basis: bases, closed forms, and that nothing else changes.

Monte-Carlo comparisons accept 3 standard errors where they must agree (two-sided, false alarms 0.3 % of seeds
each) and ask for 6 where they must differ. The seeds are fixed.
"""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.denoisers import (
    Denoiser,
    GaussianDenoiser,
    LearnedVariance,
    MixtureDenoiser,
    SpectralDenoiser,
)
from pyro_diffusion.distributions import (
    BasisDecoder,
    Diffusion,
    DiffusionSDE,
    NormalDecoder,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.dynamics import ODESolver, SDESolver
from pyro_diffusion.guidance import MMPS
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import (
    Ability,
    Basis,
    Blurring,
    GaussianProcess,
    LearnedSpectralGaussian,
    SpectralGaussian,
)
from pyro_diffusion.samplers import DDIM, AdamsMoulton, Ancestral, Heun, simulate
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified, VarianceExploding, uniform
from tests.linear_gaussian import NormalDenoiser, Reading, problem

F64 = torch.float64
RING = torch.eye(6, dtype=F64).roll(1, 0) + torch.eye(6, dtype=F64).roll(-1, 0)


def covariance(n, seed=0):
    root = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed)) / n**0.5
    return root @ root.mT + 0.05 * torch.eye(n, dtype=F64)


BASES = {
    "identity": lambda: Basis.identity((2, 3)),
    "dct": lambda: Basis.dct((1, 4, 6)),
    "dct of a series": lambda: Basis.dct((5,), dims=1),
    "haar": lambda: Basis.haar((2, 8, 4), levels=2),
    "eigenvectors": lambda: Basis.eigenvectors(covariance(6), (2, 3)),
    "principal": lambda: Basis.principal(torch.randn(9, 2, 2, dtype=F64)),
    "laplacian": lambda: Basis.laplacian(RING),
}


def matrix(basis):
    """V of flattened data, column by column."""
    n = basis.event_shape.numel()
    return basis.inverse(torch.eye(n, dtype=F64).reshape(n, *basis.event_shape)).reshape(n, n).mT


@pytest.mark.parametrize("name", BASES)
def test_bases_are_orthonormal(name):
    basis = BASES[name]()
    vectors, x = matrix(basis), torch.randn(3, 2, *basis.event_shape, dtype=F64)
    assert_close(vectors.mT @ vectors, torch.eye(len(vectors), dtype=F64))
    assert_close(basis(x).flatten(2), x.flatten(2) @ vectors)
    assert_close(basis.inverse(basis(x)), x)
    v = torch.rand_like(x)
    expected = torch.stack(
        [(vectors @ row.diag() @ vectors.mT).diagonal() for row in v.flatten(2).flatten(0, 1)]
    )
    assert_close(basis.marginal_variances(v).flatten(2).flatten(0, 1), expected)
    single = basis(x.float())
    assert single.dtype == torch.float32
    assert_close(single.double(), basis(x), rtol=1e-5, atol=1e-5)
    for copied in (pickle.loads(pickle.dumps(basis)), copy.deepcopy(basis)):
        assert_close(copied(x), basis(x))


def test_cosines_are_what_blur_damps():
    """Frequencies are eigenvalues: of heat between walls, (cos k - 1) on the grid to second order."""
    basis = Basis.dct((1, 4, 6))
    n, j = 6, torch.arange(6, dtype=F64)
    for k in range(n):
        wave = torch.cos(math.pi * k * (j + 0.5) / n).expand(1, 4, n)
        u = basis(wave)
        assert u[0, 0, k].abs() > 1
        u[0, 0, k] = 0
        assert u.abs().max() < 1e-12
    i, k = torch.arange(4, dtype=F64)[:, None], torch.arange(6, dtype=F64)
    assert_close(basis.frequencies[0], (math.pi * i / 4) ** 2 + (math.pi * k / 6) ** 2)


def test_haar_coordinates_are_averages_and_differences():
    basis, x = Basis.haar((1, 4, 4), levels=2), torch.randn(1, 4, 4, dtype=F64)
    assert_close(basis(x)[0, 0, 0], x.sum() / 4)
    row = Basis.haar((4,), levels=1, dims=1)(torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=F64))
    assert_close(row * 2**0.5, torch.tensor([3.0, 14.0, -1.0, -4.0], dtype=F64))


def test_eigenvectors_diagonalize():
    sigma = covariance(6)
    vectors, basis = matrix(Basis.eigenvectors(sigma)), Basis.eigenvectors(sigma)
    assert_close(vectors.mT @ sigma @ vectors, basis.variances.diag())
    assert bool((basis.variances.diff() < 0).all())
    data = torch.randn(50, 2, 2, dtype=F64) @ torch.randn(2, 2, dtype=F64)
    basis = Basis.principal(data)
    assert_close(basis(data).var(0), basis.variances)
    ring = Basis.laplacian(RING)
    vectors = matrix(ring)
    assert_close(vectors.mT @ (2 * torch.eye(6).to(RING) - RING) @ vectors, ring.frequencies.diag())


def test_the_transform_keeps_volumes():
    basis = Basis.dct((1, 4, 6))
    u, transform = torch.randn(5, 1, 4, 6, dtype=F64), basis.transform
    x = transform(u)
    assert_close(transform.inv(x), u)
    assert transform.bijective and transform.log_abs_det_jacobian(u, x).shape == (5,)
    assert bool((transform.log_abs_det_jacobian(u, x) == 0).all())
    sites = dist.TransformedDistribution(dist.Normal(u, 0.3).to_event(3), [transform])
    vectors = matrix(basis)
    full = dist.MultivariateNormal(u.flatten(1) @ vectors.mT, 0.09 * torch.eye(24, dtype=F64))
    assert_close(sites.log_prob(x + 0.1), full.log_prob((x + 0.1).flatten(1)))


# The process beside GaussianProcess.


def isotropic(process):
    """A mixture in two dimensions under a process of event shape (2,)."""
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    means = torch.tensor([[-1.0, 0.5], [1.5, 0.2]], dtype=F64)
    return MixtureDenoiser(process, weights, means, torch.tensor([0.3, 0.1], dtype=F64), True)


SAME = {
    "no shift": lambda s: SpectralGaussian(s, Basis.identity((2,))),
    "no blur": lambda s: Blurring(s, Basis.dct((2,), dims=1), sigma_max=0.0),
    "not yet learned": lambda s: LearnedSpectralGaussian(s, Basis.identity((2,))),
    "a shift of 0": lambda s: SpectralGaussian(s, Basis.identity((2,)), torch.zeros(())),
}
VIEWS = {
    "bound": lambda d, x: Diffusion(d, (2,), times=uniform(7, F64)).log_prob(x),
    "continuous bound": lambda d, x: DiffusionSDE(d, (2,)).log_prob(x),
    "chain": lambda d, x: Diffusion(d, (2,), times=uniform(7, F64)).sample((4,)),
    "ODE": lambda d, x: ProbabilityFlow(d, (2,), solver=ODESolver("rk4", steps=8)).log_prob(x),
    "SDE": lambda d, x: DiffusionSDE(d, (2,), solver=SDESolver("euler", steps=8)).sample((4,)),
    **{
        repr(sampler): lambda d, x, s=sampler: simulate(d, uniform(7, F64), x, s)
        for sampler in (Ancestral(), DDIM(), DDIM(0.5), AdamsMoulton(3), Heun(churn=1.0))
    },
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("same", SAME)
def test_without_differences_it_is_the_gaussian_process(same, view):
    x = torch.randn(6, 2, dtype=F64)
    found = []
    for schedule in (LogLinear(9.0, -9.0), VarianceExploding(0.05, 30.0)):
        for process in (GaussianProcess(schedule), SAME[same](schedule)):
            torch.manual_seed(5)
            found.append(VIEWS[view](isotropic(process), x).detach())
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert_close(other, one, rtol=1e-8, atol=1e-8)


def test_the_blur_of_the_paper():
    basis, t = Basis.dct((1, 4, 6)), torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    process = Blurring(Cosine(), basis, sigma_max=3.0, d_min=0.01)
    level, plain = process.levels(t), GaussianProcess(Cosine(), 3).levels(t)
    sigma_b = 3.0 * torch.sin(math.pi * t / 2) ** 2
    tau = (sigma_b**2 / 2).reshape(3, 1, 1, 1)
    d = (1 - 0.01) * torch.exp(-basis.frequencies * tau) + 0.01
    assert_close(level.alpha, plain.alpha * d)
    assert_close(level.sigma, plain.sigma.expand_as(d))
    assert_close(level.log_snr, (level.alpha**2 / level.sigma**2).log())
    assert_close(level.clock, plain.clock)
    assert_close(level.alpha[0], plain.alpha[0].expand(1, 4, 6))
    assert Ability.ISOTROPIC not in Blurring.abilities
    # Heat: the mean of the marginal is the data, blurred between walls, by a direct sum of images.
    x, width = torch.zeros(1, 4, 6, dtype=F64), 200
    x[0, 1, 2] = 1
    mean = basis.inverse(Blurring(Cosine(), basis, 3.0, 1e-9).marginal(basis(x), t[1]).mean)
    k = torch.arange(width, dtype=F64).reshape(-1, 1)
    along = (2 - (k == 0).double()) * torch.exp(-((math.pi * k / 6) ** 2) * tau[1].squeeze())
    j = torch.arange(6, dtype=F64)
    waves = torch.cos(math.pi * k * (j + 0.5) / 6) * torch.cos(math.pi * k * 2.5 / 6)
    row = ((along * waves)[:6]).sum(0) / 6
    assert_close(mean.sum(1)[0], plain.alpha[1].squeeze() * row, rtol=1e-6, atol=1e-8)


def shifted(n, seed=1):
    return torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed))


def learned(basis, seed, degree=5, scale=1.5):
    process = LearnedSpectralGaussian(LogLinear(9.0, -9.0), basis, degree=degree)
    generator = torch.Generator().manual_seed(seed)
    draws = scale * torch.randn(process.steps.shape, dtype=F64, generator=generator)
    process.steps = torch.nn.Parameter(draws, requires_grad=False)
    return process


PROCESSES = {
    "shift": lambda: SpectralGaussian(LogLinear(), Basis.eigenvectors(covariance(6)), shifted(6)),
    "whitening": lambda: SpectralGaussian.whitening(Cosine(), Basis.eigenvectors(covariance(6))),
    "exploding": lambda: SpectralGaussian(VarianceExploding(), Basis.dct((6,), dims=1), shifted(6)),
    "blur": lambda: Blurring(Cosine(), Basis.dct((6,), dims=1), 2.0),
    "heat on a graph": lambda: Blurring(Cosine(), Basis.laplacian(RING), 2.0),
    "learned": lambda: learned(Basis.haar((6,), 1, dims=1), 3),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_fall_and_their_rates_are_derivatives(name):
    process, t = PROCESSES[name](), torch.linspace(0.02, 0.98, 97, dtype=F64)
    level, rates = process.levels(t), process.rates(t)
    assert level.alpha.shape == (97, 6) and level.clock.shape == (97, 1)
    assert bool((level.log_snr.diff(dim=0) < 0).all())
    assert_close(level.log_snr, 2 * (level.alpha / level.sigma).log())
    step = 1e-6
    up, down = process.levels(t + step), process.levels(t - step)
    assert_close(rates.log_snr, (up.log_snr - down.log_snr) / (2 * step), rtol=1e-4, atol=1e-5)
    slope = (up.alpha.log() - down.alpha.log()) / (2 * step)
    assert_close(rates.log_alpha, slope, rtol=1e-4, atol=1e-5)
    process.check_grid(uniform(50, F64))


@pytest.mark.parametrize("name", PROCESSES)
def test_marginals_of_marginals_are_marginals(name):
    process, x0 = PROCESSES[name](), torch.randn(4, 6, dtype=F64)
    s, t = (process.level(v, x0) for v in (0.3, 0.8))
    direct, first = process.marginal(x0, t), process.marginal(x0, s)
    step = process.transition(first.mean, s, t)
    assert_close(step.mean, direct.mean)
    assert_close(step.variance + (t.alpha / s.alpha) ** 2 * first.variance, direct.variance)
    for eta in (0.0, 0.5, 1.0):
        back, weight = process.bridge(direct.mean, x0, s, t, eta), process.coefficients(s, t, eta)
        assert_close(back.mean, first.mean)
        assert_close(back.variance + weight.xt**2 * direct.variance, first.variance)


def test_learned_curves_keep_their_ends_and_fall_by_construction():
    basis, ends = Basis.identity((3,)), torch.tensor([0.0, 1.0], dtype=F64)
    for seed in range(4):
        process = learned(basis, seed, scale=6.0)
        assert_close(
            process.levels(ends).log_snr, torch.tensor([[9.0], [-9.0]]).to(F64).expand(2, 3)
        )
        assert bool((process.levels(uniform(500, F64)).log_snr.diff(dim=0) < 0).all())
    assert process.levels(uniform(10, F64)).log_snr.std(-1).max() > 0.5


# Closed forms.


class NormalCoordinates(Denoiser):
    """The exact posterior of independent normal coordinates of any variances, or its mean alone."""

    def __init__(self, process, mean, variances, point_mass=False):
        super().__init__(process)
        self.register_buffer("mean", mean)
        self.register_buffer("variances", variances)
        self.point_mass = point_mass

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt)
        total = level.alpha**2 * self.variances + level.sigma**2
        mean = self.mean + level.alpha * self.variances / total * (xt - level.alpha * self.mean)
        if self.point_mass:
            return dist.Delta(mean, event_dim=self.process.event_dim, validate_args=False)
        scale = (self.variances * level.sigma**2 / total).sqrt()
        return dist.Normal(mean, scale.expand_as(mean)).to_event(self.process.event_dim)


def rotated(process, point_mass=False):
    """A mixture in the plane of data x, its exact denoiser in coordinates, and its distribution."""
    weights = torch.tensor([0.4, 0.6], dtype=F64)
    means = torch.tensor([[-1.2, 0.9], [0.8, -0.4]], dtype=F64)
    scales = torch.tensor([0.5, 0.3], dtype=F64)
    turned = process.basis(means)
    denoiser = MixtureDenoiser(process, weights, turned, scales**2, point_mass)
    parts = dist.Normal(means, scales.unsqueeze(-1)).to_event(1)
    return denoiser, dist.MixtureSameFamily(dist.Categorical(weights), parts)


TURN = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64)


def test_the_bound_of_a_rotated_mixture_reaches_its_density():
    process = SpectralGaussian(LogLinear(12.0, -12.0), Basis(TURN, (2,)), torch.tensor([0.0, 2.0]))
    denoiser, data = rotated(process)
    x = data.sample((30000,))
    basis, plain = process.basis, DiffusionSDE(denoiser, (2,))
    model = dist.TransformedDistribution(plain, [basis.transform])
    gap = model.log_prob(x) - data.log_prob(x)
    assert abs(gap.mean()) < 3 * gap.std() / len(x) ** 0.5 + 1e-3
    # The decoder of the data leaves out correlations at t_0, at a known cost.
    v = process.level(0.0, x).noise_to_signal.square()
    cost = 0.5 * (basis.marginal_variances(v).log() - v.log()).sum()
    assert cost > 0.3
    pixels = plain.replace(decoder=BasisDecoder(basis)).decoder_terms(x)
    more = pixels - plain.decoder_terms(basis(x))
    assert abs(more.mean() - cost) < 3 * more.std() / len(x) ** 0.5
    flow = ProbabilityFlow(denoiser, (2,), solver=ODESolver("rk4", steps=400))
    flow = dist.TransformedDistribution(flow, [process.basis.transform])
    assert_close(flow.log_prob(x[:50]), data.log_prob(x[:50]), rtol=0, atol=2e-3)


def diffusion_term(process, denoiser, data):
    """The continuous bound's integral for each datum, unbiased, from stratified times."""
    model = DiffusionSDE(denoiser, (2,), decoder=BasisDecoder(process.basis))
    t = (torch.arange(len(data)) + torch.rand(len(data))) / len(data)
    return model.bound_terms(data, t.to(F64)[torch.randperm(len(data))])


class Leaky(Denoiser):
    """No posterior of any data: each coordinate's estimate takes some of the other's state."""

    def __init__(self, exact):
        super().__init__(exact.process)
        self.exact = exact

    def forward(self, xt, t, **context):
        mean = self.exact(xt, t).mean + 0.2 * xt.flip(-1)
        return dist.Delta(mean, event_dim=1, validate_args=False)


def test_the_exact_bound_does_not_depend_on_the_path_and_a_wrong_ones_does():
    basis, found, wrong = Basis(TURN, (2,)), [], []
    for seed in (2, 3):
        process = learned(basis, seed, scale=3.0)
        denoiser, data = rotated(process, point_mass=True)
        x = data.sample((100000,))
        found.append(diffusion_term(process, denoiser, x))
        wrong.append(diffusion_term(process, Leaky(denoiser), x))

    def z(one, other):
        error = (one.var() / len(one) + other.var() / len(other)).sqrt()
        return abs(one.mean() - other.mean()) / error

    assert z(*found) < 3
    assert z(*wrong) > 6
    assert wrong[0].mean() > found[0].mean()


def test_correlated_normals_in_their_eigenbasis():
    mean, sigma, _ = problem(4, 2)
    basis, t = Basis.eigenvectors(sigma), torch.tensor(0.45, dtype=F64)
    x = dist.MultivariateNormal(mean, sigma).sample((5,))
    # Without a shift: the posterior of the data is that of the isotropic process.
    exact = NormalDenoiser(mean, sigma)
    process = SpectralGaussian(exact.process.schedule, basis)
    denoiser = NormalCoordinates(process, basis(mean), basis.variances)
    here, there = exact(x, t), denoiser(basis(x), t)
    assert_close(basis.inverse(there.mean), here.mean)
    assert_close(basis.marginal_variances(there.variance), here.variance.expand(5, 4))
    # Whitening: gain and posterior variance, as a share of the data's, are alike for all components.
    process = SpectralGaussian.whitening(LogLinear(), basis)
    denoiser = NormalCoordinates(process, basis(mean), basis.variances)
    share = denoiser(basis(x), t).variance / basis.variances
    assert_close(share, share[:1, :1].expand(5, 4))
    level = process.level(t)
    assert_close(level.alpha**2 * basis.variances / level.sigma**2, level.clock.exp().expand(4))


@pytest.mark.parametrize("steps", [3, 60])
def test_samples_of_correlated_normals_have_their_moments(steps):
    """Ancestral sampling with exact posterior variances is exact for normals, at any number of steps."""
    mean, sigma, _ = problem(4, 2)
    basis = Basis.eigenvectors(sigma)
    process = SpectralGaussian(LogLinear(12.0, -12.0), basis, shifted(4))
    denoiser = NormalCoordinates(process, basis(mean), basis.variances)
    model = Diffusion(denoiser, (4,), times=uniform(steps, F64), decoder=BasisDecoder(basis))
    x, n = model.sample((20000,)), 20000
    z = (x.mean(0) - mean) / (sigma.diagonal() / n).sqrt()
    products = (x - mean).unsqueeze(-1) * (x - mean).unsqueeze(-2)
    z2 = (products.mean(0) - sigma) / (products.std(0) / n**0.5)
    # 4 + 10 two-sided tests at 4 errors: false alarms below 1e-3.
    assert z.abs().max() < 4 and z2.abs().max() < 4


SITES = {
    "decoder": lambda denoiser, basis: Diffusion(denoiser, (4,), 2, decoder=BasisDecoder(basis)),
    "transform": lambda denoiser, basis: dist.TransformedDistribution(
        Diffusion(denoiser, (4,), 2), [basis.transform]
    ),
}


@pytest.mark.parametrize("site", SITES)
def test_guidance_is_exact_for_normal_data(site):
    mean, sigma, reading = problem(4, 2)
    basis = Basis.eigenvectors(sigma)
    process = SpectralGaussian(LogLinear(8.0, -8.0), basis, shifted(4))
    denoiser = NormalCoordinates(process, basis(mean), basis.variances)

    def model():
        x = pyro.sample("x", SITES[site](denoiser, basis))
        y = (reading.matrix @ x.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Normal(y, reading.scale).to_event(1), obs=reading.y)

    guided = MMPS(denoiser, ProgramLikelihood(model))
    vectors, ut = matrix(basis), torch.randn(5, 4, dtype=F64)
    turned = Reading(reading.matrix @ vectors, reading.y, reading.scale)
    for t in (0.1, 0.5, 0.9):
        prior = denoiser(ut, torch.tensor(t, dtype=F64))
        expected, _ = turned.posterior(prior.mean, prior.variance[0].diag())
        found = guided.twisted(ut, torch.tensor(t, dtype=F64))
        assert_close(found.posterior.mean, expected)
        assert_close(found.log_twist, turned.log_evidence(prior.mean, prior.variance[0].diag()))


# Networks and decoders.


class Recording(torch.nn.Module):
    """A network that keeps what it was shown; it answers with a function of it that no rotation respects."""

    def __init__(self, outputs=1):
        super().__init__()
        self.outputs, self.seen = outputs, []

    def forward(self, x, log_snr):
        self.seen.append(x)
        out = torch.tanh(x + 0.3) + 0.01 * log_snr.reshape(-1, 1, 1, 1)
        return out if self.outputs == 1 else torch.stack([out, 0.1 * x], -1)


SHAPE = (1, 4, 4)


def test_networks_stay_networks_of_images():
    """Without a shift, every view in the basis is the view in pixels, turned."""
    basis, network, schedule = Basis.dct(SHAPE), Recording(), LogLinear(8.0, -8.0)
    plain = GaussianDenoiser(network, GaussianProcess(schedule, 3))
    turned = SpectralDenoiser(network, SpectralGaussian(schedule, basis))
    x, t = torch.randn(3, *SHAPE, dtype=F64), torch.rand(3, dtype=F64)
    assert_close(basis.inverse(turned(basis(x), t).mean), plain(x, t).mean)
    assert_close(network.seen[0], network.seen[1])
    times = uniform(5, F64)
    ends = [simulate(d, times, v, DDIM()) for d, v in ((plain, x), (turned, basis(x)))]
    assert_close(basis.inverse(ends[1]), ends[0])
    last = turned.process.levels(times).at(0)
    for decoder in (NormalDecoder(), QuantizedDecoder(5)):
        in_pixels = decoder(plain(x, last), last, plain.process)
        in_basis = BasisDecoder(basis, decoder)(turned(basis(x), last), last, turned.process)
        value = torch.ones_like(x)
        assert_close(in_basis.log_prob(value), in_pixels.log_prob(value))


def test_the_network_sees_the_blurred_noisy_image_at_unit_scale():
    basis, network = Basis.dct(SHAPE), Recording()
    process = Blurring(Cosine(), basis, sigma_max=3.0)
    denoiser = SpectralDenoiser(network, process)
    x, t = torch.randn(20000, *SHAPE, dtype=F64), torch.tensor(0.3, dtype=F64)
    ut = process.marginal(basis(x), t).sample()
    denoiser(ut, t)
    level = process.level(t)
    assert_close(
        network.seen[0], basis.inverse(ut)
    )  # variance preserving, and the mean is not damped
    expected = (level.alpha**2 + level.sigma**2).mean().sqrt()
    assert network.seen[0].std() == pytest.approx(float(expected), rel=0.02)
    assert float((level.alpha**2 + level.sigma**2).max()) == pytest.approx(1)
    exploding = SpectralGaussian(VarianceExploding(), basis, torch.ones(()))
    ut = exploding.prior(SHAPE, F64).sample((200,))
    SpectralDenoiser(network, exploding)(ut, torch.tensor(1.0, dtype=F64))
    assert network.seen[-1].std() == pytest.approx(1, rel=0.1)


def test_a_variance_head_is_per_coordinate():
    basis, network = Basis.dct(SHAPE), Recording(2)
    process = Blurring(Cosine(), basis, sigma_max=2.0)
    denoiser = SpectralDenoiser(network, process, variance=LearnedVariance())
    ut, t = torch.randn(3, *SHAPE, dtype=F64), torch.tensor(0.4, dtype=F64)
    posterior, level = denoiser(ut, t), process.level(t)
    out = network(basis.inverse(ut), level.clock.expand(3))
    c = denoiser.parameterization.coefficients(level.alpha, level.sigma)
    assert_close(posterior.mean, c.c_skip * ut + c.c_out * basis(out[..., 0]))
    assert_close(posterior.variance, LearnedVariance()(out[..., 1], level))


def test_the_decoder_has_the_means_and_variances_of_the_data():
    sigma = covariance(4)
    basis = Basis.eigenvectors(sigma, (2, 2))
    process = SpectralGaussian(LogLinear(4.0, -4.0), basis, shifted(4).reshape(2, 2))
    u, v = torch.randn(3, 2, 2, dtype=F64), torch.rand(3, 2, 2, dtype=F64)
    decoder, level, vectors = BasisDecoder(basis), process.level(0.0, u), matrix(basis)
    found = decoder(dist.Normal(u, v.sqrt()).to_event(2), level, process)
    full = torch.stack([vectors @ row.diag() @ vectors.mT for row in v.flatten(1)])
    assert_close(found.mean.flatten(1), u.flatten(1) @ vectors.mT)
    assert_close(found.variance.flatten(1), full.diagonal(dim1=-2, dim2=-1))
    # A point mass is widened by the noise at t_0, turned.
    found = decoder(dist.Delta(u, event_dim=2), level, process)
    noise = vectors @ level.noise_to_signal.square().flatten().diag() @ vectors.mT
    assert_close(found.variance.flatten(1), noise.diagonal().expand(3, 4))
    entropy = dist.Normal(torch.zeros(4, dtype=F64), noise.diagonal().sqrt()).entropy().sum()
    assert_close(decoder.baseline(level, torch.Size((2, 2))), entropy)
    rebuilt = decoder.kernel_from(decoder.kernel_tensors(found), 2)
    assert_close(rebuilt.log_prob(u), found.log_prob(u))


def test_integer_images():
    basis = Basis.dct(SHAPE)
    denoiser = SpectralDenoiser(Recording().double(), Blurring(Cosine(), basis, sigma_max=2.0))
    decoder = BasisDecoder(basis, QuantizedDecoder(5))
    value = torch.randint(5, (6, *SHAPE))
    assert_close(decoder.data_of(decoder.encode(value, F64)), value.double())
    model = Diffusion(denoiser, SHAPE, times=uniform(4, F64), decoder=decoder)
    assert model.log_prob(value).shape == (6,) and bool(model.log_prob(value).isfinite().all())
    x = model.sample((3,))
    assert x.dtype == torch.int64 and bool((x >= 0).all() and (x <= 4).all())

    def program():
        x = pyro.sample("x", model)
        pyro.sample("y", dist.Normal(x.sum((-1, -2, -3)), 1.0), obs=torch.tensor(30.0))

    expected = dist.Normal(30.0, 1.0).log_prob(value.float().sum((-1, -2, -3)))
    u = decoder.encode(value, torch.float32)
    assert_close(ProgramLikelihood(program).log_prob(u), expected, rtol=1e-4, atol=1e-4)


def test_rows_are_independent_and_gradients_reach_data():
    basis = Basis.dct(SHAPE)
    denoiser = SpectralDenoiser(Recording(), Blurring(Cosine(), basis, sigma_max=2.0))
    ut, t = torch.randn(4, *SHAPE, dtype=F64), torch.rand(4, dtype=F64)
    assert_close(denoiser(ut[2:3], t[2:3]).mean, denoiser(ut, t).mean[2:3])
    assert torch.autograd.gradcheck(
        lambda u: denoiser(u, t[:2]).mean, ut[:2].clone().requires_grad_()
    )


def test_learned_curves_find_a_path_on_which_a_denoiser_errs_less():
    """In continuous time, too: the curves of coordinates get the bound's own gradient."""
    variances = torch.tensor([4.0, 0.01], dtype=F64)
    process = LearnedSpectralGaussian(LogLinear(4.0, -9.0), Basis.identity((2,)))
    exact = NormalCoordinates(process, torch.zeros(2, dtype=F64), variances, True)
    data = dist.Normal(torch.zeros(2, dtype=F64), variances.sqrt()).to_event(1)

    def cost(leak):
        """The diffusion term: errors of the posterior's variance, and what leaks in."""
        rates = process.rates((torch.arange(4000, dtype=F64) + 0.5) / 4000)
        level = rates.level
        total = level.alpha**2 * variances + level.sigma**2
        error = variances * level.sigma**2 / total + leak**2 * total.flip(-1)
        return (-0.5 * rates.log_snr * level.log_snr.exp() * error).sum(-1).mean()

    assert torch.autograd.grad(cost(0.0), process.steps)[0].abs().max() < 1e-4
    before = cost(0.2).item()
    optimizer = torch.optim.Adam(process.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        model = DiffusionSDE(Leaky(exact), (2,))
        (-model.log_prob(data.sample((256,))).mean()).backward()
        optimizer.step()
    assert cost(0.2).item() < 0.9 * before


def test_a_chain_trains_the_curves_by_its_bound():
    process = LearnedSpectralGaussian(LogLinear(9.0, -9.0), Basis.identity((2,)))
    variances = torch.tensor([4.0, 0.01], dtype=F64)
    denoiser = NormalCoordinates(process, torch.zeros(2, dtype=F64), variances, True)
    Diffusion(denoiser, (2,), times=uniform(5, F64)).log_prob(
        torch.randn(64, 2).double()
    ).sum().backward()
    assert process.steps.grad.abs().max() > 0


def test_state_dicts_and_half_precision():
    basis = Basis.dct(SHAPE)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    network.forward = lambda x, log_snr: network[0](x)
    denoiser = SpectralDenoiser(network, Blurring(Cosine(), basis, 2.0))
    denoiser.to(torch.bfloat16)
    assert basis.vectors1.dtype == F64 and network[0].weight.dtype == torch.bfloat16
    assert denoiser(torch.randn(2, *SHAPE), torch.tensor(0.5)).mean.dtype == torch.float32
    state = Blurring(Cosine(), basis, 3.0).state_dict()
    with pytest.raises(ValueError, match=r"sigma_max: got 3.0, expected 2.0"):
        Blurring(Cosine(), basis, 2.0).load_state_dict(state)
    with pytest.raises(ValueError, match="event_shape"):
        SpectralGaussian(Cosine(), Basis.dct((1, 4, 6))).load_state_dict(
            SpectralGaussian(Cosine(), basis).state_dict()
        )


PLAIN = Basis.identity((2,))
IMAGES = Basis.dct(SHAPE)
BAD = {
    "d_min: got 0.0, expected a finite number > 0": lambda: Blurring(Cosine(), IMAGES, d_min=0.0),
    "d_min: got 1.5": lambda: Blurring(Cosine(), IMAGES, d_min=1.5),
    "sigma_max: got -1": lambda: Blurring(Cosine(), IMAGES, sigma_max=-1.0),
    "basis: got one without frequencies": lambda: Blurring(Cosine(), PLAIN),
    "basis: got str": lambda: SpectralGaussian(Cosine(), "dct"),
    "basis: got GaussianProcess": lambda: BasisDecoder(GaussianProcess(Cosine())),
    "schedule: got int": lambda: SpectralGaussian(3, PLAIN),
    "schedule: got log-SNR ends": lambda: LearnedSpectralGaussian(Rectified.full(), PLAIN),
    "degree: got 0": lambda: LearnedSpectralGaussian(Cosine(), PLAIN, degree=0),
    "shift: got shape": lambda: SpectralGaussian(Cosine(), PLAIN, torch.zeros(3)),
    "shift: got 1 NaN": lambda: SpectralGaussian(Cosine(), PLAIN, torch.tensor([0.0, math.nan])),
    "variances: got none": lambda: SpectralGaussian.whitening(Cosine(), IMAGES),
    "floor: got 0": lambda: SpectralGaussian.whitening(Cosine(), PLAIN, torch.ones(2), floor=0),
    "vectors: got shape": lambda: Basis(torch.eye(3), (2,)),
    "vectors: got columns": lambda: Basis(torch.ones(2, 2), (2,)),
    "levels: got 3 for a dimension of size 4": lambda: Basis.haar(SHAPE, 3),
    "event_shape: got \\(4,\\), expected at least 2": lambda: Basis.dct((4,)),
    "covariance: got a matrix that is not": lambda: Basis.eigenvectors(torch.ones(2, 2).triu()),
    "adjacency: got -1": lambda: Basis.laplacian(-torch.ones(2, 2)),
    "data: got shape": lambda: Basis.principal(torch.randn(4)),
    "frequencies: got shape": lambda: Basis(torch.eye(2), (2,), -torch.ones(2)),
    "u: got shape": lambda: PLAIN.inverse(torch.zeros(3)),
    "x0: got event shape": lambda: SpectralGaussian(Cosine(), PLAIN).marginal(torch.zeros(3), 0.5),
    "event_shape: got event shape": lambda: Diffusion(
        SpectralDenoiser(Recording(), Blurring(Cosine(), IMAGES)), (1, 5, 5)
    ),
    "process: got GaussianProcess, which has no basis": lambda: SpectralDenoiser(
        Recording(), GaussianProcess(Cosine(), 3)
    ),
    "decoder: got a basis of event shape": lambda: Diffusion(
        GaussianDenoiser(Recording(), GaussianProcess(Cosine(), 3)),
        SHAPE,
        decoder=BasisDecoder(PLAIN),
    ),
    "decoder: got 3": lambda: BasisDecoder(PLAIN, 3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_by_name(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        BAD[message]()
