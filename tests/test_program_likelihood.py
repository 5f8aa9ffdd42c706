"""The likelihood read out of Pyro programs, against the same formula written by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import transforms

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    Denoiser,
    LevelsDenoiser,
    MixtureDenoiser,
    uniform_levels,
)
from pyro_diffusion.distributions import (
    Diffusion,
    DiffusionSDE,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.dynamics import ExactTrace, Hutchinson, ODESolver
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import LogLinear, Rectified
from tests.exact import mixture
from tests.small_diffusions import Tiny

D = torch.float64
DENOISER = mixture(LogLinear(10.0, -10.0))  # data in two dimensions
A = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.2, -0.4]], dtype=D)
Y3 = torch.tensor([0.3, -1.1, 0.7], dtype=D)
N = 4  # data in a plate
GENERATOR = torch.Generator().manual_seed(1)
YN3 = torch.randn(N, 3, generator=GENERATOR, dtype=D)
Y5N3 = torch.randn(5, N, 3, generator=GENERATOR, dtype=D)
COUNTS = torch.tensor([2.0, 0.0, 5.0], dtype=D)
MASK = torch.tensor([True, False, True])
COV = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, 0.1], [0.0, 0.1, 0.8]], dtype=D)


def site(name="x", **arguments):
    return pyro.sample(name, Diffusion(DENOISER, (2,), steps=3, **arguments))


def mean(x):
    return x @ A.T


def normal(y, loc, scale):
    gap = (y - loc) / scale
    return -0.5 * gap**2 - math.log(2 * math.pi) / 2 - torch.as_tensor(scale, dtype=D).log()


# Programs. Each has a formula log p(y | x) for x of shape sample + batch + (2,).


def linear():
    pyro.sample("y", dist.Normal(mean(site()), 0.5).to_event(1), obs=Y3)


def undeclared():
    pyro.sample("y", dist.Normal(mean(site()), 0.5), obs=Y3)


def single():
    """Written for one x: a matrix times a vector, and indices from the left."""
    x = site()
    pyro.sample("y", dist.Normal(A @ x, 0.5).to_event(1), obs=Y3)
    pyro.sample("z", dist.Normal(x[0] * x[1], 1.0), obs=torch.tensor(0.5))


def sequential():
    x = mean(site())
    for i in pyro.plate("readings", 3):
        pyro.sample(f"y_{i}", dist.Normal(x[..., i], 0.5), obs=Y3[i])


def several():
    x = site()
    pyro.sample("counts", dist.Poisson(mean(x).exp()).to_event(1), obs=COUNTS)
    pyro.sample("coin", dist.Bernoulli(logits=x[..., 0]), obs=torch.tensor(1.0))
    pyro.sample("class", dist.Categorical(logits=mean(x)), obs=torch.tensor(2))
    pyro.factor("score", -x.square().sum(-1))
    pyro.deterministic("size", x.norm(dim=-1))


def several_formula(x):
    rate, logits = mean(x).exp(), mean(x)
    return (
        (COUNTS * rate.log() - rate - (COUNTS + 1).lgamma()).sum(-1)
        - nn.functional.softplus(-x[..., 0])
        + logits.log_softmax(-1)[..., 2]
        - x.square().sum(-1)
    )


def multivariate():
    pyro.sample("y", dist.MultivariateNormal(mean(site()), COV), obs=Y3)


def mixtures():
    x = mean(site()).unsqueeze(-1)
    parts = dist.Normal(torch.cat([x, -x], -1), 0.5)
    halves = dist.Categorical(torch.ones(2, dtype=D))
    pyro.sample("y", dist.MixtureSameFamily(halves, parts).to_event(1), obs=Y3)


def weighted():
    x = mean(site())
    with poutine.scale(scale=2.5):
        pyro.sample("y", dist.Normal(x, 0.5).mask(MASK).to_event(1), obs=Y3)
    with poutine.mask(mask=torch.tensor(False)):
        pyro.sample("hidden", dist.Normal(x, 0.5).to_event(1), obs=Y3)


def transformed():
    law = Diffusion(DENOISER, (2,), steps=3)
    parts = [transforms.AffineTransform(1.0, 0.5), transforms.ExpTransform()]
    x = pyro.sample("x", dist.TransformedDistribution(law, parts))
    pyro.sample("y", dist.Normal(mean(x), 0.5).to_event(1), obs=Y3)


def plate():
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean(site()), 0.5).to_event(1), obs=YN3)


def plate_and_constant():
    """One site tells nothing of x, but stands in the plate."""
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean(site()), 0.5).to_event(1), obs=YN3)
        pyro.sample("z", dist.Poisson(2.0), obs=torch.ones(N))


def two_plates():
    """Five readings of each datum."""
    with pyro.plate("data", N, dim=-1):
        x = site()
        with pyro.plate("readings", 5, dim=-2):
            pyro.sample("y", dist.Normal(mean(x), 0.5).to_event(1), obs=Y5N3)


def outer_plate():
    """The same, with the data on the left: the site's batch shape is (N, 1)."""
    with pyro.plate("data", N, dim=-2):
        x = site()
        with pyro.plate("readings", 5, dim=-1):
            y = Y5N3.transpose(0, 1)
            pyro.sample("y", dist.Normal(mean(x), 0.5).to_event(1), obs=y)


def joint():
    with pyro.plate("data", N):
        x = site()
    pyro.sample("total", dist.Normal(mean(x).sum(-2), 0.5).to_event(1), obs=Y3)


def joint_batched():
    """The same, with a dimension for the plate that it is not in."""
    with pyro.plate("data", N):
        x = site()
    loc = mean(x).sum(-2, keepdim=True)
    pyro.sample("total", dist.Normal(loc, 0.5).to_event(1), obs=Y3)


def joint_and_own():
    with pyro.plate("data", N):
        x = site()
        pyro.sample("y", dist.Normal(mean(x), 0.5).to_event(1), obs=YN3)
    # Written for one run: the sum over data takes the plate's dimension by its place from the left.
    pyro.sample("total", dist.Normal(mean(x).sum(0), 0.5).to_event(1), obs=Y3)


def independent():
    """Four data as one event."""
    law = Diffusion(DENOISER, (2,), steps=3).expand([N]).to_event(1)
    x = pyro.sample("x", law)
    pyro.sample("y", dist.Normal(mean(x), 0.5).to_event(2), obs=YN3)


def independent_in_plate():
    """The same in a plate of one, which is not the diffusion's last batch dimension."""
    law = Diffusion(DENOISER, (2,), steps=3).expand([N]).to_event(1)
    with pyro.plate("sets", 1):
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(mean(x), 0.5).to_event(2), obs=YN3)


@dataclass
class Case:
    program: Callable[[], None]
    formula: Callable[[torch.Tensor], torch.Tensor]
    batch: tuple[int, ...] = ()
    factorized: bool = True
    vectorized: bool = True
    normal: bool = True


def gaussian(x):
    return normal(Y3, mean(x), 0.5).sum(-1)


def in_plate(x):
    return normal(YN3, mean(x), 0.5).sum(-1)


def summed(x):
    return in_plate(x).sum(-1, keepdim=True)


def total(x):
    return normal(Y3, mean(x).sum(-2), 0.5).sum(-1, keepdim=True)


CASES = {
    case.program.__name__: case
    for case in [
        Case(linear, gaussian),
        Case(undeclared, gaussian),
        Case(
            single,
            lambda x: normal(Y3, mean(x), 0.5).sum(-1) + normal(0.5, x[..., 0] * x[..., 1], 1.0),
            vectorized=False,
        ),
        Case(sequential, gaussian),
        Case(several, several_formula, normal=False),
        Case(
            multivariate,
            lambda x: torch.distributions.MultivariateNormal(mean(x), COV).log_prob(Y3),
        ),
        Case(
            mixtures,
            lambda x: (
                torch.stack([normal(Y3, mean(x), 0.5), normal(Y3, -mean(x), 0.5)])
                .logsumexp(0)
                .sub(math.log(2))
                .sum(-1)
            ),
            normal=False,
        ),
        Case(weighted, lambda x: 2.5 * normal(Y3, mean(x), 0.5)[..., MASK].sum(-1)),
        Case(transformed, lambda x: gaussian((1 + 0.5 * x).exp())),
        Case(plate, in_plate, (N,)),
        Case(plate_and_constant, lambda x: in_plate(x) + math.log(2) - 2, (N,)),
        Case(
            two_plates,
            lambda x: normal(Y5N3, mean(x).unsqueeze(-3), 0.5).sum((-1, -3)),
            (N,),
        ),
        Case(
            outer_plate,
            lambda x: normal(Y5N3.transpose(0, 1), mean(x), 0.5).sum((-1, -2)).unsqueeze(-1),
            (N, 1),
        ),
        Case(joint, total, (N,), factorized=False, vectorized=False),
        Case(joint_batched, total, (N,), factorized=False),
        Case(
            joint_and_own,
            lambda x: summed(x) + total(x),
            (N,),
            factorized=False,
            vectorized=False,
        ),
        Case(independent, summed, (N,), factorized=False),
        Case(independent_in_plate, summed, (1, N), factorized=False),
    ]
}

cases = pytest.mark.parametrize("name", CASES)


@cases
def test_log_prob_is_the_formula(name):
    case = CASES[name]
    likelihood = ProgramLikelihood(case.program)
    assert likelihood.site == "x" and likelihood.event_shape == (2,)
    assert likelihood.batch_shape == case.batch and likelihood.factorized == case.factorized
    assert likelihood.analysis.vectorized[False] == case.vectorized
    kept = case.batch if case.factorized else (1,) * len(case.batch)
    for sample in [(), (1,), (3,), (2, 3)]:
        x0 = torch.randn(*sample, *case.batch, 2, dtype=D)
        found = likelihood.log_prob(x0)
        assert found.shape == (*sample, *kept) and found.dtype == D
        torch.testing.assert_close(found, case.formula(x0))


@cases
def test_gradient_is_the_formulas(name):
    case = CASES[name]
    likelihood = ProgramLikelihood(case.program)
    likelihood.check_gradient()
    x0 = torch.randn(3, *case.batch, 2, dtype=D, requires_grad=True)
    (found,) = torch.autograd.grad(likelihood.log_prob(x0).sum(), x0)
    (wanted,) = torch.autograd.grad(case.formula(x0).sum(), x0)
    torch.testing.assert_close(found, wanted)


@cases
def test_row_0_does_not_see_the_others(name):
    likelihood = ProgramLikelihood(CASES[name].program)
    x0 = torch.randn(5, *CASES[name].batch, 2, dtype=D)
    whole = likelihood.log_prob(x0)
    torch.testing.assert_close(whole[0], likelihood.log_prob(x0[0]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(whole[:1], likelihood.log_prob(x0[:1]), rtol=1e-13, atol=1e-13)


@cases
def test_residual_and_normalizer_make_the_log_prob(name):
    case = CASES[name]
    likelihood = ProgramLikelihood(case.program)
    x0 = torch.randn(2, 3, *case.batch, 2, dtype=D)
    if not case.normal:
        with pytest.raises(
            ValueError, match=r"site '\w+' with a \w+, expected a Normal.*PlugIn.*TwistedSMC"
        ):
            likelihood.residual(x0)
        return
    residual, log_normalizer = likelihood.whitened(x0)
    kept = case.batch if case.factorized else (1,) * len(case.batch)
    assert residual.shape[:-1] == log_normalizer.shape == (2, 3, *kept)
    log_prob = log_normalizer - 0.5 * residual.square().sum(-1)
    torch.testing.assert_close(log_prob, likelihood.log_prob(x0))
    torch.testing.assert_close(likelihood.residual(x0), residual)
    torch.testing.assert_close(likelihood.log_normalizer(x0), log_normalizer)


def test_residual_is_whitened_and_linear():
    x0 = torch.randn(4, 2, dtype=D, requires_grad=True)
    residual = ProgramLikelihood(linear).residual(x0)
    torch.testing.assert_close(residual, (Y3 - mean(x0)) / 0.5)
    (slope,) = torch.autograd.grad(residual[:, 1].sum(), x0)
    torch.testing.assert_close(slope, -A[1].expand(4, 2) / 0.5)
    residual = ProgramLikelihood(multivariate).residual(x0)
    root = torch.linalg.cholesky(COV)
    torch.testing.assert_close(residual @ root.T, Y3 - mean(x0))
    residual = ProgramLikelihood(weighted).residual(x0)
    shown = residual[:, residual.abs().sum(0) > 0]
    torch.testing.assert_close(shown, (math.sqrt(2.5) * (Y3 - mean(x0)) / 0.5)[:, MASK])


def test_sites_that_do_not_depend_are_left_out_of_the_residual():
    likelihood = ProgramLikelihood(plate_and_constant)
    assert likelihood.residual(torch.randn(5, N, 2, dtype=D)).shape == (5, N, 3)


@pytest.mark.parametrize("inside", [True, False], ids=["in the plate", "outside"])
def test_a_program_that_says_nothing_of_x_has_derivatives_of_0(inside):
    def model():
        with pyro.plate("rows", N):
            site()
            if inside:
                pyro.sample("y", dist.Gamma(2.0, 1.0), obs=COUNTS[0])
        if not inside:
            pyro.sample("y", dist.Gamma(2.0, 1.0), obs=COUNTS[0])

    likelihood = ProgramLikelihood(model)
    x0 = torch.randn(5, N, 2, dtype=D, requires_grad=True)
    found, (residual, rest) = likelihood.log_prob(x0), likelihood.whitened(x0)
    assert torch.equal(found, rest) and found.shape == (5, N if inside else 1)
    assert torch.equal(residual, torch.zeros(*found.shape, 1, dtype=D))
    for value in (found, residual):
        (gradient,) = torch.autograd.grad(value.sum(), x0)
        assert torch.equal(gradient, torch.zeros_like(x0))
    linear = likelihood.linearized(x0.detach())
    assert torch.equal(linear.push(torch.ones_like(x0)), torch.zeros_like(residual))


def test_arguments_conditions_and_names():
    def model(a, y=None, scale=1.0):
        x = pyro.sample("x", Diffusion(DENOISER, (2,), steps=3))
        z = pyro.sample("z", Diffusion(DENOISER, (2,), steps=3))
        pyro.sample("y", dist.Normal((x - z) @ a.T, scale).to_event(1), obs=y)

    z, x0 = torch.randn(2, dtype=D), torch.randn(5, 2, dtype=D)
    given = ProgramLikelihood(
        model, (A,), {"y": Y3, "scale": 0.5}, site="x", latents={"z": z}
    ).log_prob(x0)
    torch.testing.assert_close(given, gaussian(x0 - z))
    conditioned = pyro.condition(model, data={"y": Y3})
    likelihood = ProgramLikelihood(
        conditioned, (A,), {"scale": 0.5}, site="x", latents={"z": z.expand(5, 2)}
    )
    torch.testing.assert_close(likelihood.log_prob(x0), given)
    with pytest.raises(ValueError, match=r"site 'z': got an observed Diffusion.*latents=\{'z'"):
        ProgramLikelihood(pyro.condition(model, data={"y": Y3, "z": z}), (A,), site="x")


def test_an_observed_flow_has_an_exact_density():
    # The likelihood is exponentiated in weights of particles.
    def model(trace):
        x = pyro.sample("x", Diffusion(DENOISER, (2,), steps=3))
        flow = ProbabilityFlow(DENOISER, (2,), solver=ODESolver("rk4", steps=2), trace=trace)
        shift = dist.transforms.AffineTransform(x, 1.0, event_dim=1)
        pyro.sample("y", dist.TransformedDistribution(flow, [shift]), obs=torch.zeros(2, dtype=D))

    for trace in (Hutchinson(), Hutchinson(seed=0)):
        with pytest.raises(
            ValueError, match="site 'y': got an observed ProbabilityFlow with Hutch"
        ):
            ProgramLikelihood(model, (trace,))
    x0 = torch.zeros(3, 2, dtype=D)
    assert ProgramLikelihood(model, (ExactTrace(),)).log_prob(x0).isfinite().all()


def test_a_conditioned_latent_is_an_observation():
    likelihood = ProgramLikelihood(pyro.condition(latent, data={"s": torch.tensor(0.5, dtype=D)}))
    x0 = torch.randn(5, 2, dtype=D)
    wanted = gaussian(x0) + dist.HalfNormal(1.0).log_prob(torch.tensor(0.5, dtype=D))
    torch.testing.assert_close(likelihood.log_prob(x0), wanted)
    torch.testing.assert_close(likelihood.residual(x0), (Y3 - mean(x0)) / 0.5)


@pytest.mark.parametrize("written", ["for one run", "for a batch"])
def test_latents_may_differ_by_particle(written):
    def model(y):
        s = pyro.sample("s", dist.HalfNormal(1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", N):
            x = pyro.sample("x", Diffusion(DENOISER, (2,), steps=3))
            s = s if written == "for one run" else s.unsqueeze(-1)
            pyro.sample("y", dist.Normal(mean(x) + b, s).to_event(1), obs=y)

    s, b = torch.tensor(0.7, dtype=D), torch.randn(3, dtype=D)
    likelihood = ProgramLikelihood(model, (YN3,), latents={"s": s, "b": b})
    assert likelihood.analysis.vectorized == {False: True, True: written == "for a batch"}
    x0 = torch.randn(5, N, 2, dtype=D)

    def formula(x0, s, b):
        return normal(YN3, mean(x0) + b, s).sum(-1)

    torch.testing.assert_close(likelihood.log_prob(x0), formula(x0, s, b))
    many, shifts = torch.rand(5, dtype=D) + 0.1, torch.randn(5, 3, dtype=D)
    wanted = formula(x0, many[:, None, None], shifts[:, None])
    particles = likelihood.with_latents({"s": many, "b": shifts})
    torch.testing.assert_close(particles.log_prob(x0), wanted)
    residual, log_normalizer = particles.whitened(x0)
    torch.testing.assert_close(log_normalizer - 0.5 * residual.square().sum(-1), wanted)
    # One of them with particles, a single x_0, two sample dimensions; and the same from the door.
    one = likelihood.with_latents({"s": many})
    torch.testing.assert_close(one.log_prob(x0), formula(x0, many[:, None, None], b))
    torch.testing.assert_close(one.log_prob(x0[0]), formula(x0[0], many[:, None, None], b))
    x0 = torch.randn(3, 5, N, 2, dtype=D)
    torch.testing.assert_close(one.log_prob(x0), formula(x0, many[:, None, None], b))
    direct = ProgramLikelihood(model, (YN3,), latents={"s": many, "b": b})
    torch.testing.assert_close(direct.log_prob(x0), one.log_prob(x0))
    torch.testing.assert_close(likelihood.latents["s"], s)


def test_a_wrong_broadcast_is_noticed():
    """Three events, three trial draws: a scale per particle would fit along the events."""

    def model():
        s = pyro.sample("s", dist.HalfNormal(1.0))
        x = pyro.sample("x", Diffusion(DENOISER, (2,), steps=3))
        pyro.sample("y", dist.Normal(mean(x), s).to_event(1), obs=Y3)

    likelihood = ProgramLikelihood(model, latents={"s": torch.tensor(0.5, dtype=D)})
    assert likelihood.analysis.vectorized == {False: True, True: False}
    s, x0 = torch.tensor([0.5, 1.0, 2.0], dtype=D), torch.randn(3, 2, dtype=D)
    found = likelihood.with_latents({"s": s}).log_prob(x0)
    torch.testing.assert_close(found, normal(Y3, mean(x0), s[:, None]).sum(-1))


@pytest.mark.parametrize("view", [DiffusionSDE, ProbabilityFlow])
def test_every_view_is_a_prior(view):
    def model():
        x = pyro.sample("x", view(DENOISER, (2,)))
        pyro.sample("y", dist.Normal(mean(x), 0.5).to_event(1), obs=Y3)

    likelihood, x0 = ProgramLikelihood(model), torch.randn(4, 2, dtype=D)
    assert isinstance(likelihood.prior, view) and likelihood.prior.denoiser is DENOISER
    torch.testing.assert_close(likelihood.log_prob(x0), gaussian(x0))


def test_site_value_goes_through_the_transforms():
    x0 = torch.randn(4, 2, dtype=D)
    likelihood = ProgramLikelihood(transformed)
    torch.testing.assert_close(likelihood.site_value(x0), (1 + 0.5 * x0).exp())
    assert len(likelihood.transforms) == 2
    nested = dist.TransformedDistribution(
        dist.TransformedDistribution(
            Diffusion(DENOISER, (2,), steps=3), [transforms.AffineTransform(0.0, 2.0)]
        ).mask(True),
        [transforms.StickBreakingTransform()],
    )

    def model():
        with pyro.plate("data", N):
            x = pyro.sample("x", nested)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=YN3)

    likelihood, x0 = ProgramLikelihood(model), torch.randn(5, N, 2, dtype=D)
    value = transforms.StickBreakingTransform()(2 * x0)
    torch.testing.assert_close(likelihood.log_prob(x0), normal(YN3, value, 0.5).sum(-1))


def test_integers_are_extended_to_the_real_line():
    denoiser = LevelsDenoiser(Tiny((3,), 4), GaussianProcess(LogLinear()), uniform_levels(4))
    law = Diffusion(denoiser, (3,), steps=3, decoder=QuantizedDecoder(4))

    def model():
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.zeros(3))

    likelihood = ProgramLikelihood(model)
    integers = torch.tensor([0.0, 2.0, 3.0])
    torch.testing.assert_close(likelihood.site_value(law.encode(integers)), integers)
    wanted = dist.Normal(integers, 0.5).to_event(1).log_prob(torch.zeros(3))
    torch.testing.assert_close(likelihood.log_prob(law.encode(integers)), wanted)
    likelihood.check_gradient()


def test_symbols_have_a_likelihood_without_gradient():
    denoiser = CategoricalDenoiser(Tiny((3,), 5), Absorbing(Rectified.full(), 5))
    table = torch.randn(5, 6)

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (3,), steps=3))
        pyro.sample("y", dist.Categorical(logits=table[x]).to_event(1), obs=torch.tensor([0, 3, 5]))

    likelihood = ProgramLikelihood(model)
    x0 = torch.randint(5, (7, 3))
    wanted = table.log_softmax(-1)[x0].gather(-1, torch.tensor([0, 3, 5]).expand(7, 3)[..., None])
    torch.testing.assert_close(likelihood.log_prob(x0), wanted[..., 0].sum(-1))
    with pytest.raises(ValueError, match="twisted SMC"):
        likelihood.check_gradient()


def rounded():
    pyro.sample("y", dist.Normal(mean(site()).round(), 0.5).to_event(1), obs=Y3)


def detached():
    pyro.sample("y", dist.Normal(mean(site()).detach(), 0.5).to_event(1), obs=Y3)


def thresholded():
    pyro.sample("y", dist.Bernoulli((mean(site()) > 0) * 0.8 + 0.1).to_event(1), obs=MASK.double())


@pytest.mark.parametrize("model", [rounded, detached, thresholded])
def test_no_gradient_is_noticed(model):
    likelihood = ProgramLikelihood(model)
    assert torch.isfinite(likelihood.log_prob(torch.randn(3, 2, dtype=D))).all()
    with pytest.raises(ValueError, match=r"no gradient in x_0 at site 'y'.*twisted SMC"):
        likelihood.check_gradient()


def test_handlers_and_plates_around_a_call_are_not_seen():
    """As inside SMCFilter, whose particle plate would take the dimension of the program's own."""
    likelihood, x0 = ProgramLikelihood(plate), torch.randn(6, N, 2, dtype=D)
    wanted = in_plate(x0)
    with poutine.trace() as tracer, pyro.plate("particles", 6, dim=-1):
        torch.testing.assert_close(likelihood.log_prob(x0), wanted)
        ProgramLikelihood(plate)
        inner = pyro.sample("z", dist.Normal(0.0, 1.0))
    assert inner.shape == (6,)
    assert "x" not in tracer.trace.nodes and "y" not in tracer.trace.nodes
    with pytest.raises(ValueError), pyro.plate("particles", 6, dim=-1):
        likelihood.log_prob(torch.randn(3, dtype=D))
    with pyro.plate("again", 6, dim=-1):
        assert pyro.sample("z", dist.Normal(0.0, 1.0)).shape == (6,)


def test_nothing_is_drawn_and_each_call_is_one_run():
    runs, law = [], Diffusion(DENOISER, (2,), steps=3)

    def model():
        runs.append(1)
        pyro.sample("y", dist.Normal(mean(pyro.sample("x", law)), 0.5).to_event(1), obs=Y3)

    before = torch.get_rng_state()
    likelihood = ProgramLikelihood(model)
    assert torch.equal(torch.get_rng_state(), before)
    runs.clear()
    for call in (likelihood.log_prob, likelihood.residual, likelihood.whitened):
        call(torch.randn(50, 2, dtype=D))
    assert len(runs) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_x0(dtype):
    def model():
        x = site()
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.zeros(2, dtype=x.dtype))

    x0 = torch.randn(3, 2, dtype=dtype)
    assert ProgramLikelihood(model).log_prob(x0).dtype == dtype


def test_a_denoiser_without_tensors_is_tried_in_the_default_dtype():
    class Unit(Denoiser):
        def forward(self, xt, t, **context):
            level = self.process.level(t, xt)
            return dist.Normal(level.alpha * xt, level.sigma.expand(xt.shape)).to_event(1)

    def model():
        x = pyro.sample("x", Diffusion(Unit(GaussianProcess(LogLinear())), (2,), steps=3))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.zeros(2))

    x0 = torch.randn(3, 2)
    wanted = dist.Normal(x0, 0.5).to_event(1).log_prob(torch.zeros(2))
    torch.testing.assert_close(ProgramLikelihood(model).log_prob(x0), wanted)


def test_works_without_gradients_and_in_inference_mode():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            likelihood = ProgramLikelihood(linear)
            assert likelihood.log_prob(torch.randn(3, 2, dtype=D)).shape == (3,)
        likelihood.check_gradient()


def test_parameters_keep_their_gradient():
    def model():
        scale = pyro.param("scale", torch.tensor(0.5, dtype=D))
        pyro.sample("y", dist.Normal(mean(site()), scale).to_event(1), obs=Y3)

    likelihood = ProgramLikelihood(model)
    log_prob = likelihood.log_prob(torch.randn(3, 2, dtype=D))
    log_prob.sum().backward()
    assert pyro.get_param_store()["scale"].grad is not None


def test_latents_that_nothing_observed_depends_on_are_not_asked_for():
    """Predictions, and what `obs_mask` leaves out."""

    def model():
        x = mean(site())
        y = pyro.sample("y", dist.Normal(x, 0.5), obs=Y3, obs_mask=MASK)
        pyro.sample("next", dist.Normal(y, 1.0).to_event(1))

    likelihood, x0 = ProgramLikelihood(model), torch.randn(5, 2, dtype=D)
    wanted = normal(Y3, mean(x0), 0.5)[:, MASK].sum(-1)
    for _ in range(2):
        torch.testing.assert_close(likelihood.log_prob(x0), wanted)
    residual = likelihood.residual(x0)
    torch.testing.assert_close(residual[:, MASK], ((Y3 - mean(x0)) / 0.5)[:, MASK])
    assert (residual[:, ~MASK] == 0).all()

    def used():
        x = mean(site())
        y = pyro.sample("y", dist.Normal(x, 0.5), obs=Y3, obs_mask=MASK)
        pyro.sample("next", dist.Normal(y, 1.0).to_event(1), obs=Y3)

    with pytest.raises(ValueError, match="latents: got no value for y_unobserved, expected"):
        ProgramLikelihood(used)

    def discrete():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(mean(site()) * (1 + z), 0.5).to_event(1), obs=Y3)

    with pytest.raises(ValueError, match="latents: got no value for z"):
        ProgramLikelihood(discrete)


# Bad input.


def none():
    pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=torch.zeros(2))


def two():
    x = site() + site("w")
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(2))


def seen():
    pyro.sample("x", Diffusion(DENOISER, (2,), steps=3), obs=torch.zeros(2, dtype=D))
    pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=torch.zeros(2))


def latent():
    s = pyro.sample("s", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Normal(mean(site()), s).to_event(1), obs=Y3)


def unobserved():
    site()


def subsampled():
    with pyro.plate("data", N, subsample_size=2):
        pyro.sample("y", dist.Normal(site(), 1.0).to_event(1), obs=torch.zeros(2, 2))


def not_finite():
    pyro.sample("y", dist.Normal(mean(site()), 0.5).to_event(1), obs=Y3 / 0)


def random():
    x = mean(site())
    pyro.sample("y", dist.Normal(x + torch.randn(3), 0.5).to_event(1), obs=Y3)


def partial():
    pyro.sample("y", dist.Poisson(mean(site())).to_event(1), obs=COUNTS)


def branching():
    """Neither batches nor vmap: it looks at a value."""
    x = site()
    loc = A @ x if bool((x > 0).all()) else -A @ x
    pyro.sample("y", dist.Normal(loc, 0.5).to_event(1), obs=Y3)


def nan():
    x = mean(site())
    pyro.factor("score", (x - x.detach() - 1).log().sum(-1))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (none, {}, "model: got no diffusion site, expected"),
        (two, {}, "several diffusion sites, x, w; expected the name"),
        (two, {"site": "x"}, r"latents: got no value for w.*latents=\{'w'.*pyro.condition"),
        (two, {"site": "v"}, "site: got 'v', expected a sample site of the model: x, w, y"),
        (latent, {"site": "s"}, "site: got 's' with a HalfNormal.*such as x"),
        (seen, {}, r"no diffusion site that is not observed or given \(of x\)"),
        (seen, {"site": "x"}, "site: got 'x', which is observed"),
        (latent, {}, "latents: got no value for s"),
        (linear, {"latents": {"s": torch.tensor(1.0)}}, "latents: got 's'"),
        (linear, {"latents": {"y": Y3}}, "latents: got 'y'"),
        (unobserved, {}, "no observed site and no factor"),
        (subsampled, {}, "plate 'data': got a subsample of 2 of 4"),
        (not_finite, {}, "site 'y': got 3 NaN or infinite"),
        (random, {}, "without randomness of its own"),
        (partial, {}, "model: failed with x_0 drawn from N|site 'y'|rate"),
        (branching, {}, "no batch of x_0 through it"),
        (nan, {}, "site 'score': got a log-density of NaN|model: failed"),
        (3, {}, "model: got int"),
        (linear, {"args": Y3}, "args: got Tensor"),
    ],
)
def test_bad_programs_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        ProgramLikelihood(model, **arguments)


def test_a_density_of_nan_is_refused():
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="log-density of NaN"):
        ProgramLikelihood(nan)


def test_bad_x0_is_refused():
    with pytest.raises(ValueError, match="x0: got shape"):
        ProgramLikelihood(plate).log_prob(torch.randn(5, 2, dtype=D))


def test_latents_that_no_gradient_shows_are_asked_for():
    """A comparison, and a prior that is itself a function of the latent."""
    process = GaussianProcess(LogLinear(10.0, -10.0))
    one = torch.ones(1, dtype=torch.float64)

    def compared():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample(
            "x", Diffusion(MixtureDenoiser(process, one, one[None], 1.0), (1,), steps=2)
        )
        pyro.sample("y", dist.Normal(x.sum(-1) + torch.where(z > 0, 1.0, -1.0), 0.5), obs=one[0])

    def upstream():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        denoiser = MixtureDenoiser(process, one, z * one[None], 1.0)
        x = pyro.sample("x", Diffusion(denoiser, (1,), steps=2))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=one[0])

    # Latents are drawn six times: all on one side of the comparison once in 32, but not at this seed.
    for model in (compared, upstream):
        with pytest.raises(ValueError, match="value for z"):
            ProgramLikelihood(model)


@pytest.mark.parametrize("likely", [False, True], ids=["never", "always"])
def test_trials_that_say_nothing_do_not_choose_how_batches_run(likely):
    # A joint sum over the plate, observed without a dimension for it: batches must be run one by one. Its
    # log-density is -inf, or 0, for all trial draws, and so is a sum of them over wrong rows.
    prior = Diffusion(DENOISER, (2,), steps=4)

    def model():
        with pyro.plate("data", N):
            x = pyro.sample("x", prior)
        small = x.sum((-2, -1)).abs() < 1e3
        pyro.factor("y", torch.where(small == likely, 0.0, -math.inf))

    likelihood = ProgramLikelihood(model)
    assert likelihood.analysis.vectorized == {False: False}
    x = torch.zeros(3, N, 2, dtype=D)
    x[1, 0, 0] = 1e4
    there = [0.0, -math.inf, 0.0] if likely else [-math.inf, 0.0, -math.inf]
    assert likelihood.log_prob(x).flatten().tolist() == there
