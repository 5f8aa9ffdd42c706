"""Any operator under noise: bridges with the right marginals, cold diffusion, heat dissipation, bounds."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from pyro.distributions import Delta, MultivariateNormal, Normal, Uniform
from torch import nn
from torch.distributions import kl_divergence

from pyro_diffusion import evaluate
from pyro_diffusion.denoisers import (
    Data,
    Denoiser,
    GaussianDenoiser,
    MixtureDenoiser,
    Noise,
    Score,
    TimeVariance,
)
from pyro_diffusion.distributions import (
    Diffusion,
    DiffusionSDE,
    FlowMatching,
    Hybrid,
    ProbabilityFlow,
    Simple,
)
from pyro_diffusion.distributions.regressions import Regression
from pyro_diffusion.guidance import ClassifierFreeGuidance
from pyro_diffusion.infer.reparam import forward_chain
from pyro_diffusion.processes import Ability, DegradedGaussian, GaussianProcess
from pyro_diffusion.samplers import (
    DAPS,
    DDIM,
    AdamsBashforth,
    Ancestral,
    Heun,
    RePaint,
    simulate,
)
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified, VarianceExploding
from tests.fuzz.catalogue import read
from tests.small_diffusions import Tiny

F64 = torch.float64
SCHEDULE = LogLinear(8.0, -8.0)
MIX = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=F64)


def squashed(x0, t):
    """Not linear: large values saturate, then all is lost. The identity at t = 0."""
    return (1 - 0.9 * t) * x0 / torch.sqrt(1 + 3 * t * x0.square())


def matrix(t):
    """Blur of two pixels, and some loss: batch + (2, 2)."""
    t = t.to(F64).reshape(*t.shape, 1, 1)
    return (1 - 0.8 * t) * ((1 - t) * torch.eye(2, dtype=F64) + t * MIX)


def blurred(x0, t):
    a = matrix(t if t.dim() == 0 else t.squeeze(-1)).to(x0.dtype)
    return (a @ x0.unsqueeze(-1)).squeeze(-1)


def faded(x0, t):
    """As a Gaussian process has it."""
    return SCHEDULE.alpha(t) * x0


class NormalData(Denoiser):
    """The exact posterior mean of normal data under blur."""

    point_mass = True
    mean = torch.tensor([0.7, -0.4], dtype=F64)
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)

    def gain(self, level):
        """Of the posterior mean in x_t, and the posterior's covariance."""
        a = matrix(level.t if level.t.dim() == 0 else level.t.squeeze(-1))
        noise = level.sigma if level.t.dim() == 0 else level.sigma.unsqueeze(-1)
        total = a @ self.covariance @ a.mT + noise.square() * torch.eye(2, dtype=F64)
        gain = self.covariance @ a.mT @ torch.linalg.inv(total)
        return a, gain, self.covariance - gain @ a @ self.covariance

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt, state="xt")
        a, gain, _ = self.gain(level)
        off = xt.to(F64) - a @ self.mean
        mean = self.mean + (gain @ off.unsqueeze(-1)).squeeze(-1)
        return Delta(mean.to(xt.dtype), event_dim=1)

    def data(self):
        return MultivariateNormal(self.mean, self.covariance)


def end(sigma):
    """The exact distribution of x_1."""
    a = matrix(torch.tensor(1.0))
    cov = a @ NormalData.covariance @ a.T + sigma**2 * torch.eye(2, dtype=F64)
    return MultivariateNormal(a @ NormalData.mean, cov)


def blurring(schedule=SCHEDULE, sigma=0.2, **arguments):
    last = schedule.sigma(torch.tensor(1.0, dtype=F64)).item() if sigma is None else sigma
    prior = end(last) if last > 0 else None
    return DegradedGaussian(schedule, blurred, sigma=sigma, prior=prior, **arguments)


def plain(**arguments):
    return DegradedGaussian(SCHEDULE, blurred, **{"sigma": 0.2, **arguments})


def network(process, **arguments):
    return GaussianDenoiser(Tiny((2,), 1), process, Data(), **arguments)


@pytest.mark.parametrize("renewal", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("sigma", [None, 0.2])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_bridge_over_its_marginal_is_a_marginal(renewal, sigma, eta):
    process = blurring(sigma=sigma, renewal=renewal, reverse_scale=0.7)
    x0, (s, t) = torch.tensor([[1.2, -0.7]], dtype=F64), torch.tensor([0.35, 0.8], dtype=F64)
    late, want = process.marginal(x0, t), process.marginal(x0, s)

    def bridge(xt):
        return process.bridge(xt, x0, s, t, eta)

    mean = bridge(late.mean).mean
    slope = torch.stack([bridge(late.mean + e).mean - mean for e in torch.eye(2, dtype=F64)])
    cov = slope[:, 0].T @ torch.diag(late.variance[0]) @ slope[:, 0]
    cov = cov + torch.diag(bridge(late.mean).variance[0])
    assert torch.allclose(mean, want.mean, atol=1e-12)
    assert torch.allclose(cov, torch.diag(want.variance[0]), atol=1e-12)


@pytest.mark.parametrize("renewal", [None, 0.4, 1.0])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_bridge_of_a_nonlinear_operator_has_the_marginals_by_quadrature(renewal, eta):
    process = DegradedGaussian(
        Cosine(), lambda x0, t: (1 - t) * x0 + t * torch.tanh(x0), renewal=renewal
    )
    s, t = torch.tensor(0.3, dtype=F64), torch.tensor(0.7, dtype=F64)
    x0 = torch.tensor([[1.3]], dtype=F64)
    late = process.marginal(x0, t)
    z = torch.linspace(-9, 9, 2001, dtype=F64)
    xt = late.mean + late.stddev * z.unsqueeze(-1)
    weight = torch.softmax(-0.5 * z.square(), 0)
    values = process.marginal(x0, s).mean + torch.linspace(-2, 2, 9, dtype=F64).reshape(-1, 1, 1)
    density = (process.bridge(xt, x0, s, t, eta).log_prob(values).exp() * weight).sum(-1)
    assert torch.allclose(density, process.marginal(x0, s).log_prob(values[:, 0]).exp(), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_fading_operator_is_the_gaussian_process(dtype, eta):
    mine, gaussian = DegradedGaussian(SCHEDULE, faded), GaussianProcess(SCHEDULE)
    x0, xt = torch.randn(2, 50, 3, dtype=dtype)
    t = torch.linspace(0.05, 1, 50, dtype=dtype)
    got, want = (p.bridge(xt, x0, 0.9 * t, t, eta) for p in (mine, gaussian))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert torch.allclose(got.mean, want.mean, atol=tolerance)
    assert torch.allclose(got.variance, want.variance, rtol=tolerance, atol=0)
    for name in ("mean", "variance"):
        each = (getattr(p.marginal(x0, t), name) for p in (mine, gaussian))
        assert torch.equal(*each)
    ends = (p.prior((3,), dtype=dtype).stddev for p in (mine, gaussian))
    assert torch.equal(*ends)


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(), DDIM(0.5)], ids=repr)
def test_so_are_its_bound_and_its_samples(sampler):
    views = []
    for process in (DegradedGaussian(SCHEDULE, faded), GaussianProcess(SCHEDULE)):
        exact = MixtureDenoiser(
            GaussianProcess(SCHEDULE), torch.ones(2), torch.eye(2, dtype=F64), 0.1, point_mass=True
        )
        exact.process = process
        torch.manual_seed(1)
        view = Diffusion(exact, (2,), 20, sampler=sampler)
        views.append((view.log_prob(torch.ones(30, 2, dtype=F64)), view.sample((5,))))
    assert torch.allclose(views[0][0], views[1][0], rtol=1e-9)
    assert torch.allclose(views[0][1], views[1][1], atol=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_cold_diffusions_update_is_a_bridge(sigma):
    process = DegradedGaussian(Cosine(), squashed, sigma=sigma, renewal=0.0)
    denoiser, times = network(process).eval(), torch.linspace(0, 1, 11)
    x = torch.randn(7, 2)
    with torch.no_grad():
        estimate = denoiser(x, 0.5).mean
        bridge = process.bridge(x, estimate, 0.4, 0.5)
        update = x - squashed(estimate, torch.tensor(0.5)) + squashed(estimate, torch.tensor(0.4))
        assert (bridge.mean - update).abs().max() < 1e-6
        assert float(bridge.variance.max()) == 0
        want = x
        for s, t in reversed([*itertools.pairwise(times)]):
            restored = denoiser(want, t).mean
            want = want - squashed(restored, t) + squashed(restored, s)
        for sampler in (Ancestral(), DDIM()):
            assert (simulate(denoiser, times, x, sampler) - want).abs().max() < 1e-6
    # By eta = 0 it is the step of any renewal at constant noise.
    other = DegradedGaussian(Cosine(), squashed, sigma=0.3, renewal=0.8)
    row = other.bridge(x, estimate, 0.4, 0.5, eta=0.0)
    assert (row.mean - update).abs().max() < 1e-6


def test_without_noise_what_an_estimate_misses_is_kept():
    """The default renewal is 0 there, as in cold diffusion."""
    x, x0 = torch.randn(2, 5, 2)
    default, stated = (
        DegradedGaussian(Cosine(), squashed, sigma=0.0, renewal=r).bridge(x, x0, 0.4, 0.5)
        for r in (None, 0.0)
    )
    assert torch.equal(default.mean, stated.mean)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_kernels_have_their_scale_and_come_back_from_tensors(eta):
    process = plain(renewal=1.0, reverse_scale=0.7)
    xt, x0 = torch.randn(2, 5, 2, dtype=F64)
    s, t = torch.tensor([0.4, 0.5], dtype=F64)
    kernel = process.reverse(xt, process.point_mass(x0), s, t, eta)
    assert torch.allclose(kernel.stddev, torch.full_like(xt, 0.7 * eta))
    again = process.kernel_from(process.kernel_tensors(kernel))
    assert torch.equal(again.mean, kernel.mean) and torch.equal(again.stddev, kernel.stddev)


class Restorer(Denoiser):
    """The inverse of the operator of the tests."""

    point_mass = True

    def forward(self, xt, t, **context):
        t = self.process.level(t, xt, state="xt").t
        y = xt / (1 - 0.9 * t)
        return self.process.point_mass(y / torch.sqrt(1 - 3 * t * y.square()))


def test_an_operator_that_changes_its_data_is_refused():
    process = DegradedGaussian(Cosine(6.0, -6.0), lambda x, t: x.mul_(1 - 0.5 * t))
    with pytest.raises(ValueError, match="operator: got one that changes x0 in place"):
        process.marginal(torch.randn(4, 2), 0.5)


def test_an_exact_restorer_restores_exactly():
    process = DegradedGaussian(Cosine(), squashed, sigma=0.0)
    x0 = torch.linspace(-1.5, 1.5, 20, dtype=F64).reshape(10, 2)
    times = torch.linspace(0, 1, 21, dtype=F64)
    with pytest.raises(ValueError, match="sigma: got 0"):
        process.check_density()
    degraded = process.marginal(x0, 1.0).mean
    for renewal in (0.0, 0.5, 1.0):
        denoiser = Restorer(DegradedGaussian(Cosine(), squashed, sigma=0.0, renewal=renewal))
        for sampler in (Ancestral(), DDIM()):
            assert (simulate(denoiser, times, degraded, sampler) - x0).abs().max() < 1e-9
    view = Diffusion(Restorer(process), (2,), 20)
    assert torch.equal(view.decode(x0).sample(), x0)  # no noise is added at the end


def expected_bound(denoiser, steps):
    """E[bound] of normal data in closed form: K steps, prior and decoder."""
    process = denoiser.process
    levels = process.levels(torch.linspace(0, 1, steps + 1, dtype=F64))
    s, t = levels.at(slice(-1)), levels.at(slice(1, None))
    c = process.coefficients(s, t)
    change = matrix(s.t[:, 0]) - c.noise.unsqueeze(-1) * matrix(t.t[:, 0])
    left = denoiser.gain(levels)[2]
    square = (change @ left[1:] @ change.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    ratio = (c.variance / c.reverse_variance)[:, 0]
    reverse = square / (2 * c.reverse_variance[:, 0]) + (ratio - 1 - ratio.log())
    noise = levels.noise_to_signal[0].square()
    decoder = left[0].trace() / (2 * noise) + (2 * math.pi * noise).log()
    # The prior is the distribution of x_1: mutual information of x_0 and x_1.
    prior = 0.5 * torch.logdet(process._prior.covariance_matrix) - 2 * levels.sigma[-1].log()
    return -float(reverse.sum() + decoder + prior)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"renewal": 0.3},
        {"renewal": 1.0},
        {"renewal": 1.0, "reverse_scale": 0.25},  # heat dissipation, 1.25 sigma
        {"sigma": None, "schedule": VarianceExploding(0.1, 2.0)},
    ],
    ids=str,
)
def test_the_bound_is_what_it_should_be_and_below_the_evidence(arguments):
    denoiser = NormalData(blurring(**arguments))
    x = denoiser.data().sample((4_000,))
    entropy = denoiser.data().entropy().item()
    for steps in (1, 10, 100, 1000):
        values = Diffusion(denoiser, (2,), steps).log_prob(x)
        want, error = expected_bound(denoiser, steps), values.std() / len(x) ** 0.5
        # Twenty numbers: false alarms in 1 of 800 runs.
        assert abs(values.mean() - want) < 4 * error
        assert want < -entropy


def test_the_bound_loosens_without_limit_unless_the_noise_is_carried_over():
    steps = (10, 100, 1000)
    clock, constant, fresh = (
        [expected_bound(NormalData(blurring(renewal=renewal)), k) for k in steps]
        for renewal in (None, 0.3, 1.0)
    )
    for losing in (constant, fresh):
        assert losing[0] > losing[1] + 1 > losing[2] + 10
    # By the clock it converges, to less than the evidence.
    evidence = -NormalData(blurring()).data().entropy().item()
    limit = expected_bound(NormalData(blurring()), 4000)
    assert abs(limit - clock[2]) < 0.02
    assert limit < evidence - 0.05


def test_heat_dissipation_has_the_divergence_of_its_paper():
    sigma, delta = 0.01, 0.0125
    process = DegradedGaussian(Cosine(), blurred, sigma=sigma, renewal=1.0, reverse_scale=delta)
    x0, estimate, xt = torch.randn(3, 5, 2, dtype=F64)
    s, t = torch.tensor(0.4, dtype=F64), torch.tensor(0.5, dtype=F64)
    q, p = process.bridge(xt, x0, s, t), process.reverse(xt, process.point_mass(estimate), s, t)
    square = (blurred(x0, s) - blurred(estimate, s)).square().sum(-1)
    want = square / (2 * delta**2) + 2 * (math.log(delta / sigma) + sigma**2 / (2 * delta**2) - 0.5)
    assert torch.allclose(kl_divergence(q, p), want)


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(), DDIM(0.5)], ids=repr)
@pytest.mark.parametrize("sigma", [None, 0.2])
def test_samples_have_the_moments_of_the_data(sampler, sigma):
    schedule = VarianceExploding(0.02, 1.0) if sigma is None else SCHEDULE
    denoiser = NormalData(blurring(schedule, sigma))
    start = end(1.0 if sigma is None else sigma)
    torch.manual_seed(3)
    count = 4_000
    x = simulate(denoiser, torch.linspace(0, 1, 201, dtype=F64), start.sample((count,)), sampler)
    cov = denoiser.covariance + denoiser.process.level(
        torch.tensor(0.0)
    ).sigma.square() * torch.eye(2)
    # Five numbers, six cases: false alarms in 1 of 500 runs, and what 200 steps leave.
    error = 4 * (cov.diag() / count).sqrt()
    assert bool(((x.mean(0) - denoiser.mean).abs() < error + 2e-3).all())
    spread = 4 * ((cov.diag().outer(cov.diag()) + cov.square()) / count).sqrt()
    assert bool(((x.T.cov() - cov).abs() < spread + 4e-3).all())


def test_rows_do_not_see_each_other():
    process = DegradedGaussian(Cosine(), squashed, reverse_scale=0.3)
    x0, xt = torch.randn(2, 6, 2, dtype=F64)
    t = torch.linspace(0.3, 0.9, 6, dtype=F64)
    for make in (
        lambda i: process.marginal(x0[i], t[i]),
        lambda i: process.bridge(xt[i], x0[i], t[i] / 2, t[i]),
        lambda i: process.reverse(xt[i], process.point_mass(x0[i]), t[i] / 2, t[i]),
    ):
        whole = make(slice(None))
        for i in range(6):
            assert torch.allclose(make(i).mean, whole.mean[i], rtol=1e-12)
            assert torch.allclose(make(i).variance, whole.variance[i], rtol=1e-12)


def test_one_datum_meets_many_states():
    process = DegradedGaussian(Cosine(), squashed)
    x0, xt, t = torch.randn(2), torch.randn(6, 2), torch.linspace(0.3, 0.9, 6)
    wide = process.bridge(xt, x0.expand(6, 2), t / 2, t)
    assert torch.equal(process.bridge(xt, x0, t / 2, t).mean, wide.mean)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_it_trains_and_samples_in_its_dtype(dtype):
    process = DegradedGaussian(SCHEDULE, squashed)
    denoiser = network(process).to(dtype)
    x = torch.randn(16, 2, dtype=dtype)
    view = Diffusion(denoiser, (2,), 10)
    bound = view.log_prob(x)
    assert bound.dtype == dtype
    bound.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in denoiser.parameters())
    assert view.sample((3,)).dtype == dtype


class Absolute(Regression):
    """The loss of cold diffusion."""

    def error(self, step):
        return (step.x0 - step.posterior.mean).abs().sum(-1) / step.steps


def test_without_noise_errors_of_the_data_train():
    denoiser = network(DegradedGaussian(Cosine(), squashed, sigma=0.0))
    loss = -Diffusion(denoiser, (2,), 5, objective=Absolute()).log_prob(torch.randn(9, 2)).sum()
    loss.backward()
    assert bool(loss.isfinite())
    assert all(p.grad.abs().max() > 0 for p in denoiser.parameters())


def test_an_operator_with_parameters_is_learned_by_the_bound():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0))

        def forward(self, x0, t):
            return x0 * torch.exp(-self.rate * t)

    process = DegradedGaussian(Cosine(), Gain())
    Diffusion(network(process), (2,), 5).log_prob(torch.randn(9, 2)).sum().backward()
    assert process.operator.rate.grad.abs() > 0


def test_copies_pickles_and_state_dicts():
    process = DegradedGaussian(
        Cosine(), squashed, sigma=0.1, renewal=0.5, reverse_scale=0.2, prior=end(0.1)
    )
    x = torch.randn(4, 2, dtype=F64)
    denoiser = network(process).double()
    for other in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        kernels = (
            d.process.reverse(x, d(x, 0.5), torch.tensor(0.4), torch.tensor(0.5))
            for d in (denoiser, other)
        )
        first, second = kernels
        assert torch.equal(first.mean, second.mean)
        assert torch.equal(first.variance, second.variance)
        assert torch.equal(other.process.prior((2,)).mean, process.prior((2,)).mean)
    fits = network(DegradedGaussian(Cosine(), squashed, sigma=0.1, renewal=0.5, reverse_scale=0.2))
    fits.load_state_dict(denoiser.state_dict())
    with pytest.raises(ValueError, match=r"sigma: got 0\.1, expected 0\.3"):
        network(
            DegradedGaussian(Cosine(), squashed, sigma=0.3, renewal=0.5, reverse_scale=0.2)
        ).load_state_dict(denoiser.state_dict())


def test_guidance_by_context_takes_it_and_particles_need_noise():
    process = DegradedGaussian(Cosine(), squashed, sigma=0.0)
    denoiser = GaussianDenoiser(Tiny((2,), 1, True), process, Data())
    guided = ClassifierFreeGuidance(denoiser, 2.0)
    view = Diffusion(guided, (2,), 5, context={"label": torch.tensor(1)})
    assert bool(view.sample((4,)).isfinite().all())
    plain = Diffusion(network(process), (2,), 3)
    with pytest.raises(ValueError, match=r"^sigma: got 0 of a DegradedGaussian"):
        forward_chain("x", plain, torch.zeros(2))


WITHOUT = {
    "a Markov transition": lambda d, x: Diffusion(d, (2,), 3, sampler=RePaint()).sample(),
    "a stochastic": lambda d, x: DiffusionSDE(d, (2,)),
    "a probability-flow": lambda d, x: ProbabilityFlow(d, (2,)),
    "states x_t = alpha": lambda d, x: Diffusion(d, (2,), 3, sampler=Heun()).sample(),
    "states x_t": lambda d, x: Diffusion(d, (2,), 3, sampler=AdamsBashforth()).sample(),
    "states": lambda d, x: Diffusion(d, (2,), 3, sampler=DAPS(read())).sample(),
    "states x": lambda d, x: Diffusion(d, (2,), 3, objective=Simple()),
    "states x_t = ": lambda d, x: Diffusion(d, (2,), 3, objective=Hybrid()),
    "states x_t = a": lambda d, x: Diffusion(d, (2,), 3, objective=FlowMatching()),
    "Tweedie": lambda d, x: evaluate.wasserstein_bound(d, torch.randn(9, 2)),
    "Tweedie's": lambda d, x: MixtureDenoiser(d.process, torch.ones(1), torch.zeros(1, 2), 1.0),
}


@pytest.mark.parametrize("missing", WITHOUT)
def test_what_it_lacks_is_refused_by_name(missing):
    denoiser = network(plain())
    with pytest.raises(
        ValueError,
        match=f"DegradedGaussian, which lacks {missing}",
    ):
        WITHOUT[missing](denoiser, torch.zeros(2))


@pytest.mark.parametrize("parameterization", [None, Noise(), Score()], ids=repr)
def test_networks_predict_the_data(parameterization):
    with pytest.raises(
        ValueError, match=r"^parameterization: got .* under DegradedGaussian, .*, expected Data\(\)"
    ):
        GaussianDenoiser(Tiny((2,), 1), plain(), parameterization)


BAD = {
    r"^schedule: got float, expected a Schedule": lambda: DegradedGaussian(0.1, squashed),
    r"^operator: got float, expected a function": lambda: DegradedGaussian(Cosine(), 0.1),
    r"^operator: got the class Linear, expected": lambda: DegradedGaussian(Cosine(), nn.Linear),
    r"^sigma: got -1, expected .* >= 0": lambda: plain(sigma=-1),
    r"^renewal: got 2, expected .* <= 1": lambda: plain(renewal=2),
    r"^reverse_scale: got 0, expected .* > 0": lambda: plain(reverse_scale=0),
    r"^event_dim: got -1": lambda: DegradedGaussian(Cosine(), squashed, -1),
    r"^prior: got float, expected a Pyro distribution": lambda: DegradedGaussian(
        Cosine(), squashed, prior=1.0
    ),
    r"^prior: got batch shape \(2,\) and event shape \(\), expected no batch and 1": lambda: (
        DegradedGaussian(Cosine(), squashed, prior=Normal(torch.zeros(2), 1.0))
    ),
    r"^event_shape: got \(3,\), expected \(2,\), that of the process's prior": lambda: (
        blurring().prior((3,))
    ),
    r"^operator: got float from it, expected a tensor": lambda: DegradedGaussian(
        Cosine(), lambda x, t: 0.5
    ).marginal(torch.zeros(2), 0.5),
    r"^operator: got \(1,\) in torch.float32 from it, expected \(2,\) in torch.float32": lambda: (
        DegradedGaussian(Cosine(), lambda x, t: x[..., :1]).marginal(torch.zeros(2), 0.5)
    ),
    r"^operator: got \(2,\) in torch.float64 from it": lambda: DegradedGaussian(
        Cosine(), lambda x, t: x.double()
    ).marginal(torch.zeros(2), 0.5),
    r"^operator: got 4 NaN or infinite": lambda: Diffusion(
        network(DegradedGaussian(Cosine(), lambda x, t: x * torch.nan)), (2,), 3
    ).sample((2,)),
    r"^operator: got 2 NaN or infinite": lambda: Diffusion(
        network(DegradedGaussian(Cosine(), lambda x, t: x / 0)), (2,), 3
    ).log_prob(torch.zeros(2)),
    r"^prior: got Uniform at t = 1 of DegradedGaussian": lambda: Diffusion(
        network(plain(prior=Uniform(-torch.ones(2), 1.0).to_event(1))), (2,), 3
    ).log_prob(torch.zeros(2)),
    r"^prior: got Uniform at .* expected one with a density": lambda: Diffusion(
        network(plain(prior=Uniform(-torch.ones(2), 1.0).to_event(1))), (2,), 3
    ).prior_terms(torch.zeros(2)),
    r"^x0: got .* NaN": lambda: plain().marginal(torch.tensor([torch.nan, 0.0]), 0.5),
    r"^s, t: got s at or after t": lambda: plain().bridge(
        torch.zeros(2), torch.zeros(2), torch.tensor(0.5), torch.tensor(0.5)
    ),
    r"^eta: got 2": lambda: plain().bridge(
        torch.zeros(2), torch.zeros(2), torch.tensor(0.4), torch.tensor(0.5), 2
    ),
    r"^posterior: got Normal under DegradedGaussian, expected a point mass": lambda: Diffusion(
        network(plain(), variance=TimeVariance([-8.0, 8.0])), (2,), 3
    ).sample(),
    r"^schedule: got log-SNR \[inf, -inf\] at the ends": lambda: Diffusion(
        network(DegradedGaussian(Rectified.full(), squashed)), (2,), 3
    ),
    r"^sigma: got noise of scale 1e-08 and states in torch.float32, expected 1.9e-06": lambda: (
        Diffusion(network(plain(sigma=1e-8)), (2,), 3).sample()
    ),
    r"^schedule: got noise of scale 1.523e-08 and states in torch.float32": lambda: Diffusion(
        network(DegradedGaussian(LogLinear(36.0, -5.0), squashed)), (2,), 3
    ).sample(),
    r"^sigma: got 0 of a DegradedGaussian, whose bridges have no density": lambda: Diffusion(
        network(plain(sigma=0)), (2,), 3
    ).log_prob(torch.zeros(2)),
    r"^renewal: got 0 of a DegradedGaussian, whose bridges": lambda: Diffusion(
        network(plain(renewal=0)), (2,), 3
    ).bound_terms(torch.zeros(2), 1),
    r"^sigma: got 0 of .* for a bound or": lambda: Diffusion(
        network(plain(sigma=0)), (2,), 3
    ).prior_terms(torch.zeros(2)),
    r"^sigma: got 0 of .* bound": lambda: Diffusion(network(plain(sigma=0)), (2,), 3).decoder_terms(
        torch.zeros(2)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_its_abilities_are_those_that_hold():
    assert DegradedGaussian.abilities == {
        *(Ability.NUMBERS, Ability.INDEPENDENT, Ability.FREE_VARIANCE)
    }
