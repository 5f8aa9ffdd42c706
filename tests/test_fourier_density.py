"""Fourier densities: mass, moments, quantiles and gradients by quadrature, and the denoiser made of them.

A Kolmogorov-Smirnov test that rejects at p < 1e-5 raises a false alarm in one of 10^5 seeds; seeds are fixed.
"""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import nn

from pyro_diffusion.denoisers import FourierDenoiser
from pyro_diffusion.distributions import Diffusion, FourierDensity, NormalDecoder
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, Rectified, VarianceExploding

F64 = torch.float64
LOC, SCALE = 0.3, 1.7
DOMAINS = ("line", "interval", "circle")
every = pytest.mark.parametrize("domain", DOMAINS)
close = torch.testing.assert_close


def density(domain, degree=6, dtype=F64, seed=0):
    torch.manual_seed(seed)
    return FourierDensity(torch.randn(degree + 1, 2, dtype=F64).to(dtype), LOC, SCALE, domain)


def nodes(domain, count=20_001):
    """Where a density of a domain has its mass, and the weights of the trapezoidal rule there."""
    low, high = (-40, 40) if domain == "line" else (LOC - SCALE, LOC + SCALE)
    x = torch.linspace(low, high, count, dtype=F64)
    weight = torch.full_like(x, float(x[1] - x[0]))
    weight[[0, -1]] /= 2
    return x, weight


def test_the_squared_modulus_is_the_published_series():
    """1/2 + sum Re(c_n e^{i n pi u}) / c_0 with c_n = sum_k a_k conj(a_{k+n}), by loops."""
    law = FourierDensity(torch.randn(4, 2, dtype=F64), domain="interval")
    a = torch.view_as_complex(law.coefficients)
    u = torch.linspace(-1, 1, 11, dtype=F64)
    c = [sum(a[k] * a[k + n].conj() for k in range(4 - n)) for n in range(4)]
    p = 0.5 + sum((c[n] * torch.exp(1j * n * math.pi * u)).real / c[0].real for n in range(1, 4))
    close(law.log_prob(u).exp(), p)
    cdf = 0.5 * (u + 1) + sum(
        (c[n] * (torch.exp(1j * n * math.pi * u) - (-1) ** n) / (1j * n * math.pi)).real / c[0].real
        for n in range(1, 4)
    )
    close(law.cdf(u), cdf)


@every
@pytest.mark.parametrize("degree", [0, 1, 14])
def test_mass_and_distribution_function(domain, degree):
    law = density(domain, degree)
    x, weight = nodes(domain)
    p = law.log_prob(x).exp()
    assert float((p * weight).sum()) == pytest.approx(1, abs=1e-5)
    # The integral up to the middle of a step, by the rule of midpoints.
    middle = (x[1:] + x[:-1]) / 2
    mass = law.log_prob(middle).exp() * (x[1] - x[0])
    inner = slice(0, -1)  # the end of a circle is its start
    close(mass.cumsum(0)[inner], law.cdf(x)[1:][inner], atol=1e-5, rtol=0)
    assert law.cdf(x[0]) == pytest.approx(0, abs=1e-8) and law.degree == degree


@pytest.mark.parametrize("domain", ["line", "interval"])
def test_moments(domain):
    law = density(domain)
    x, weight = nodes(domain)
    p = law.log_prob(x).exp() * weight
    close(law.mean, (p * x).sum(), atol=1e-6, rtol=0)
    close(law.variance, (p * (x - law.mean).square()).sum(), atol=1e-5, rtol=0)


def test_a_constant_series_is_logistic_and_uniform():
    line = FourierDensity(torch.tensor([[2.0, 1.0]], dtype=F64), LOC, SCALE)
    x = torch.linspace(-9, 9, 19, dtype=F64)
    logistic = stats.logistic(LOC, SCALE / 2)
    close(line.log_prob(x), torch.from_numpy(logistic.logpdf(x.numpy())))
    close(line.cdf(x), torch.from_numpy(logistic.cdf(x.numpy())))
    assert float(line.variance) == pytest.approx(logistic.var())
    far = line.log_prob(torch.tensor([-1e4, 1e4], dtype=F64))
    close(far, torch.from_numpy(logistic.logpdf([-1e4, 1e4])))
    interval = FourierDensity(torch.ones(1, 2), 0.0, 2.0, "interval")
    assert float(interval.log_prob(torch.tensor(1.5))) == pytest.approx(-math.log(4))


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-14)])
def test_quantiles(domain, dtype, tolerance):
    law = density(domain, 14, dtype)
    probability = torch.linspace(0.001, 0.999, 101, dtype=dtype)
    x = law.icdf(probability)
    close(law.cdf(x), probability, atol=tolerance, rtol=0)
    assert (x.diff() > 0).all()
    ends = law.icdf(torch.tensor([1e-7, 1 - 1e-6], dtype=dtype))
    assert ends.isfinite().all() and law.log_prob(ends).isfinite().all()


@every
def test_draws(domain):
    law = density(domain)
    x = law.sample((20_000,))
    assert law.support.check(x).all()
    assert stats.kstest(x.numpy(), lambda v: law.cdf(torch.from_numpy(v)).numpy()).pvalue > 1e-5


@every
def test_gradients(domain):
    """Of density, distribution function and quantiles, in every argument."""
    arguments = [
        torch.randn(4, 2, dtype=F64),
        torch.tensor(LOC, dtype=F64),
        torch.tensor(SCALE, dtype=F64),
        torch.tensor([0.2, 0.4, 0.9], dtype=F64),
    ]
    arguments = [x.requires_grad_() for x in arguments]
    for name in ("log_prob", "cdf", "icdf"):
        assert torch.autograd.gradcheck(
            lambda a, loc, scale, x, name=name: getattr(
                FourierDensity(a, loc, scale, domain), name
            )(x),
            arguments,
        )


def test_gradients_of_draws_are_those_of_expectations():
    """d E[x^2] / d a by draws against the closed form; five standard errors, one false alarm in 10^6."""
    a = density("line").coefficients.requires_grad_()
    (exact,) = torch.autograd.grad(
        (law := FourierDensity(a, LOC, SCALE)).variance + law.mean.square(), a
    )
    rows = []
    for _ in range(40):
        (row,) = torch.autograd.grad(
            FourierDensity(a, LOC, SCALE).rsample((500,)).square().mean(), a
        )
        rows.append(row)
    rows = torch.stack(rows)
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - exact).abs() < 5 * error + 1e-9).all()


def test_a_circle_has_a_period():
    law = density("circle")
    x = torch.linspace(-1, 1, 7, dtype=F64)
    close(law.log_prob(x + 2 * SCALE), law.log_prob(x))
    close(law.cdf(x - 4 * SCALE), law.cdf(x))
    ends = torch.tensor([LOC - SCALE, LOC + SCALE], dtype=F64)
    close(*law.log_prob(ends))
    with pytest.raises(
        NotImplementedError, match=r"FourierDensity\.mean: there is none on a circle"
    ):
        _ = law.mean


def test_roughness_is_the_integral_of_the_squared_slope():
    law = FourierDensity(torch.randn(2, 6, 2, dtype=F64), domain="interval")
    u = torch.linspace(-1, 1, 20_001, dtype=F64)
    p = law.log_prob(u.unsqueeze(-1)).exp()
    slope = p.diff(dim=0) / (u[1] - u[0])
    close(law.roughness(), slope.square().sum(0) * (u[1] - u[0]), rtol=1e-4, atol=0)
    assert law.expand((3, 2)).roughness().shape == (3, 2)


def test_length_and_phase_of_the_coefficients_change_nothing():
    law = density("line")
    turned = torch.view_as_real(torch.view_as_complex(law.coefficients) * (0.01 - 3j))
    x = torch.linspace(-3, 3, 7, dtype=F64)
    other = FourierDensity(turned, LOC, SCALE)
    close(other.log_prob(x), law.log_prob(x))
    close(other.variance, law.variance)


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_coefficients_whose_squares_are_no_numbers(length):
    law = density("line", dtype=torch.float32)
    other = FourierDensity(law.coefficients * length, LOC, SCALE)
    x = torch.linspace(-3, 3, 7)
    for name in ("log_prob", "cdf"):
        close(getattr(other, name)(x), getattr(law, name)(x))
    close(other.variance, law.variance)


def test_a_zero_of_the_series_is_finite():
    """1 + e^{-i pi u} is zero at both ends."""
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    for end in (-1.0, 1.0):
        low = FourierDensity(a, domain="interval").log_prob(torch.tensor(end))
        assert low.isfinite() and low < -25


def test_a_smooth_prior_in_a_program_smooths():
    """A maximum a posteriori fit: more rate, less roughness, and the penalty is the factor's."""
    data = dist.Normal(0.0, 1.0).sample((200,))

    def roughness(rate):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

        def model():
            a = pyro.param("a", torch.eye(9, 2) + 0.1 * torch.randn(9, 2))
            law = FourierDensity(a, 0.0, 2.0)
            pyro.factor("smooth", -rate * law.roughness())
            with pyro.plate("rows", 200):
                pyro.sample("x", law, obs=data)

        svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(80):
            svi.step()
        return float(FourierDensity(pyro.param("a").detach()).roughness())

    free, mild, strong = (roughness(rate) for rate in (0.0, 5.0, 100.0))
    assert strong < mild < free


@every
def test_it_is_a_pyro_distribution(domain):
    law = FourierDensity(torch.randn(3, 5, 2), torch.zeros(2, 1), 1.0, domain)
    assert law.batch_shape == (2, 3) and law.sample((4,)).shape == (4, 2, 3)
    wide = law.expand((5, 2, 3))
    assert wide.rsample().shape == (5, 2, 3) and wide.domain == domain
    x = law.sample()
    close(wide.log_prob(x), law.log_prob(x).expand(5, 2, 3))
    assert law.to_event(1).log_prob(x).shape == (2,)
    close(pickle.loads(pickle.dumps(law)).log_prob(x), law.log_prob(x))
    with pyro.plate("rows", 3, dim=-1):
        assert pyro.sample("x", FourierDensity(torch.randn(5, 2), domain=domain)).shape == (3,)


BAD = [
    ((torch.ones(3),), r"^coefficients: got shape \(3,\), expected batch \+ \(N \+ 1, 2\)"),
    ((torch.zeros(3, 2),), r"^coefficients: got only zeros"),
    ((torch.ones(3, 2, dtype=torch.complex64),), r"^coefficients: got dtype torch.complex64"),
    ((torch.full((3, 2), torch.inf),), r"^coefficients: got 6 NaN or infinite"),
    ((torch.ones(4, 3, 2), torch.zeros(3)), r"^loc: got shape \(3,\), expected one that broadcasts"),
    ((torch.ones(3, 2), 0.0, 1.0, "plane"), r"^domain: got 'plane', expected 'line'"),
    ((torch.ones(3, 2), 0.0, -1.0), "scale"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FourierDensity(*arguments)


def test_values_outside_the_interval_are_refused():
    with pytest.raises(ValueError, match="within the support"):
        density("interval").log_prob(torch.tensor(9.0))


# --- the denoiser -----------------------------------------------------------------------------------


class Fixed(nn.Module):
    """The same outputs for every row."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x, log_snr):
        return self.outputs.expand(len(x), *self.outputs.shape)


PROCESS = GaussianProcess(Cosine(log_snr_max=2.0))


def test_the_posterior_is_at_the_scale_of_the_noise():
    denoiser = FourierDenoiser(Fixed(torch.zeros(2, 8)), PROCESS, degree=3, scale=2.0)
    xt, t = torch.tensor([[0.5, -1.0], [2.0, 0.1]]), torch.tensor([0.2, 0.8])
    level, law = PROCESS.level(t, xt), denoiser(xt, t)
    total = level.alpha.square() + level.sigma.square()
    close(law.mean, level.alpha * xt / total)
    close(law.variance, (math.pi**2 / 3 * level.sigma.square() / total).expand(2, 2))
    assert law.event_shape == (2,) and denoiser(xt.double(), t.double()).mean.dtype == F64


def test_the_posterior_is_that_of_one_plus_the_outputs():
    network, seen = Fixed(torch.randn(2, 8)), []
    network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    xt, t = torch.randn(5, 2), torch.tensor(0.2)
    level, one = PROCESS.level(t, xt), torch.zeros(4, 2)
    one[0, 0], total = 1, torch.hypot(level.alpha, level.sigma)
    law = FourierDensity(
        network.outputs.unflatten(-1, (4, 2)) + one,
        level.alpha * xt / total.square(),
        2 * level.sigma / total,
    )
    found = FourierDenoiser(network, PROCESS, degree=3)(xt, t)
    close(found.log_prob(xt), law.log_prob(xt).sum(-1))
    close(seen[0], xt / total)


def test_the_decoder_is_the_posterior_itself():
    denoiser = FourierDenoiser(Fixed(torch.randn(2, 8)), PROCESS, degree=3)
    xt, level = torch.randn(5, 2), PROCESS.level(torch.zeros(5))
    posterior, decoder = denoiser(xt, torch.zeros(5)), NormalDecoder()
    kernel = decoder(posterior, level.unsqueeze(1), PROCESS)
    close(kernel.log_prob(xt), posterior.log_prob(xt))
    again = decoder.kernel_from(decoder.kernel_tensors(kernel), 1)
    close(again.log_prob(xt), posterior.log_prob(xt))


def test_the_reverse_kernel_has_its_moments():
    denoiser = FourierDenoiser(Fixed(torch.randn(2, 8)), PROCESS, degree=3)
    xt, s, t = torch.randn(5, 2), torch.tensor(0.3), torch.tensor(0.6)
    posterior = denoiser(xt, t)
    normal = dist.Normal(posterior.mean, posterior.variance.sqrt()).to_event(1)
    kernels = [PROCESS.reverse(xt, p, s, t) for p in (posterior, normal)]
    close(kernels[0].mean, kernels[1].mean)
    close(kernels[0].variance, kernels[1].variance)


def test_a_chain_with_such_posteriors_is_trained_and_finds_modes_that_noise_hides():
    """One column near -.6 or .6, a chain that ends at log-SNR 0: a normal posterior sees one mode there."""
    torch.manual_seed(0)
    process = GaussianProcess(Cosine(log_snr_max=0.0))
    denoiser = FourierDenoiser(MLP(1, (32,), outputs=30), process)
    modes = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.5, 0.5])),
        dist.Normal(torch.tensor([[-0.6], [0.6]]), 0.1).to_event(1),
    )

    def model(x):
        pyro.module("denoiser", denoiser)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", Diffusion(denoiser, (1,), steps=1), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    for _ in range(150):
        svi.step(modes.sample((256,)))
    x = modes.sample((2000,))
    chain = Diffusion(denoiser, (1,), steps=1)
    # With the exact mean and variance and a normal decoder it is 1.08 nats; three standard errors are .1.
    with torch.no_grad():
        assert float((modes.log_prob(x) - chain.log_prob(x)).mean()) < 0.35
    draws = chain.sample((2000,))
    assert float((draws.abs() < 0.3).float().mean()) < 0.1
    assert 0.4 < float((draws > 0).float().mean()) < 0.6


def test_denoisers_that_are_refused():
    with pytest.raises(ValueError, match="process"):
        FourierDenoiser(MLP(2), Absorbing(Rectified.full(), 3))
    with pytest.raises(ValueError, match=r"^degree: got 0, expected an integer >= 1"):
        FourierDenoiser(MLP(2), PROCESS, degree=0)
    with pytest.raises(ValueError, match=r"^scale: got 0"):
        FourierDenoiser(MLP(2), PROCESS, scale=0)
    with pytest.raises(ValueError, match=r"^network: got an output of shape \(5, 2\)"):
        FourierDenoiser(MLP(2), PROCESS)(torch.zeros(5, 2), torch.tensor(0.5))


def test_a_denoiser_scales_by_the_total_where_variance_explodes():
    """Input x_t / total, location that of standard normal data, scale b times their standard deviation."""
    given = []

    class Zeros(nn.Module):
        def forward(self, x, log_snr):
            given.append(x)
            return x.new_zeros(*x.shape, 6)

    process = GaussianProcess(VarianceExploding(0.1, 30.0))
    xt, t = torch.randn(7, 2, dtype=F64) * 4, torch.tensor(0.6, dtype=F64)
    level = process.level(t)
    total = 1 + level.sigma.square()
    density = FourierDenoiser(Zeros(), process, degree=2, scale=1.5)(xt, t).base_dist
    close(given[0], xt / total.sqrt())
    close(density.loc, xt / total)
    close(density.scale, (1.5 * level.sigma / total.sqrt()).expand_as(xt))
