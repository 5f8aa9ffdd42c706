"""Derivatives of derivatives: densities of flows, and guidance, through layers that torch batches wrongly."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch import nn
from torch.nn import functional as F

from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.dynamics import (
    ExactTrace,
    Hutchinson,
    HutchPlusPlus,
    ODESolver,
    trace_estimators,
)
from pyro_diffusion.dynamics.attention import twice_differentiable_attention
from pyro_diffusion.guidance import MMPS, PiGDM, PlugIn
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.nn import MLP, UNet
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

FEW = {"solver": ODESolver("rk4", steps=1)}


class Attention(nn.Module):
    """Over the last but one dimension, by torch's fused kernel if it has one."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, 1.1 * x, x.sin())


class Images(nn.Module):
    """A convolution, a group norm and fused attention over pixels."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, log_snr):
        hidden = self.norm(self.first(x)) + 0.1 * log_snr[:, None, None, None]
        pixels = hidden.flatten(2).mT.contiguous()
        hidden = hidden + Attention()(pixels[:, None])[:, 0].mT.reshape(hidden.shape)
        return self.last(F.silu(hidden))


def unet() -> UNet:
    network = UNet(1, width=8)
    with torch.no_grad():
        for p in network.parameters():  # the last layers start at zero
            p.add_(0.05 * torch.randn_like(p))
    return network


def denoiser(network: nn.Module) -> GaussianDenoiser:
    return GaussianDenoiser(network.double(), GaussianProcess(Cosine(), 3))


NETWORKS = {"images": Images, "unet": unet}
networks = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
sizes = pytest.mark.parametrize("size", [2, 8])


def slope(value, inputs) -> tuple[float, float]:
    """The derivative of a number along a random direction in all inputs, by autograd and by differences."""
    directions = [torch.randn_like(p) for p in inputs]
    gradients = torch.autograd.grad(value(), inputs, materialize_grads=True)
    got = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
    # Norms over two values bend within the root of their epsilon: small steps, and differences of fourth
    # order. Of 25 seeds the worst was wrong by 1e-6; plain central differences were by 1e-3.
    h, ends = 1e-7, []
    for step in (2 * h, -h, -2 * h, -h):
        with torch.no_grad():
            for p, v in zip(inputs, directions, strict=True):
                p.add_(step * v)
        ends.append(value().detach())
    return float(got), float((8 * (ends[1] - ends[2]) - (ends[0] - ends[3])) / (12 * h))


# --- products, layer by layer -----------------------------------------------------------------------

LAYERS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), (4,)),
    "activations": (
        lambda: nn.Sequential(
            *(nn.Linear(4, 4), nn.Tanh(), nn.GELU(), nn.Sigmoid(), nn.Softplus(), nn.ReLU())
        ),
        (4,),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), (4,)),
    "layer norm of images": (lambda: nn.LayerNorm((4, 2, 2)), (4, 2, 2)),
    "root mean square norm": (lambda: nn.RMSNorm(4), (4,)),
    "group norm, silently wrong": (lambda: nn.GroupNorm(1, 4), (4, 2, 2)),
    "group norm, raises": (lambda: nn.GroupNorm(2, 4), (4, 4, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(4).eval(), (4, 2, 2)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 2, 2)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 1, 2)),
        (1, 4, 4),
    ),
    "resampling": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Tanh(), nn.AvgPool2d(2)),
        (1, 2, 2),
    ),
    "attention": (lambda: nn.Sequential(nn.Linear(4, 4), Attention()), (1, 3, 4)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        (3, 4),
    ),
    "recurrent": (lambda: First(nn.GRU(4, 4, batch_first=True)), (3, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (4,)),
    "unet": (unet, (1, 4, 4)),
    "mlp": (lambda: MLP(4), (4,)),
}


class First(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_a_loop(name):
    build, event = LAYERS[name]
    network, n = build().double(), 4
    rows = torch.randn(n, math.prod(event), dtype=torch.float64).requires_grad_()
    level = (torch.zeros(n, dtype=torch.float64),) if name in ("unet", "mlp") else ()
    # Cubes, so that the layer's own second derivatives count even where it is linear.
    with twice_differentiable_attention():
        output = network(rows.reshape(n, *event), *level).flatten(1) ** 3
    vectors = torch.randn(3, *output.shape, dtype=torch.float64)
    loop = torch.stack(
        [torch.autograd.grad(output, rows, v, create_graph=True)[0] for v in vectors]
    )
    plain = trace_estimators.pull_back(output, rows, vectors, differentiable=False, keep=True)
    torch.testing.assert_close(plain, loop.detach())
    assert not plain.requires_grad
    pulled = trace_estimators.pull_back(output, rows, vectors, differentiable=True)
    inputs = [rows, *network.parameters()]
    got, expected = (
        torch.autograd.grad(p.square().sum(), inputs, allow_unused=True, retain_graph=True)
        for p in (pulled, loop)
    )
    torch.testing.assert_close(got, expected)


def test_perceptrons_and_closed_forms_take_one_batched_pass():
    x = torch.randn(3, 4).requires_grad_()
    assert trace_estimators._operations(MLP(4)(x, torch.zeros(3)), x) <= trace_estimators.BATCHED
    assert "NativeGroupNormBackward0" in trace_estimators._operations(nn.GroupNorm(2, 4)(x * 2), x)
    # What leads to the rows does not count.
    assert trace_estimators._operations(2 * (y := nn.GroupNorm(2, 4)(x)), y) == {"MulBackward0"}


# --- flows ------------------------------------------------------------------------------------------


# Gradients of a sketch are those of its instance only where it is exact.
ESTIMATORS = [
    (2, ExactTrace()),
    (2, Hutchinson(2, seed=0)),
    (2, HutchPlusPlus(4, seed=0)),
    (8, Hutchinson(2, seed=0)),
    pytest.param(8, ExactTrace(), marks=pytest.mark.slow),
]


@networks
@pytest.mark.parametrize(("size", "estimator"), ESTIMATORS)
def test_densities_of_images_have_the_gradients_of_their_differences(build, size, estimator):
    event = (1, size, size)
    flow = ProbabilityFlow(denoiser(build()), event, trace=estimator, **FEW)
    x = torch.randn(2, *event, dtype=torch.float64).requires_grad_()
    parameters = list(flow.denoiser.parameters())
    got, expected = slope(lambda: flow.log_prob(x).sum(), [x, *parameters])
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def drawn():
        pyro.set_rng_seed(3)
        x, log_prob = flow.rsample_and_log_prob((2,))
        return x.sin().sum() + log_prob.sum()

    got, expected = slope(drawn, parameters)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_adjoint_of_images():
    event = (1, 4, 4)
    model = denoiser(Images())
    x = torch.randn(2, *event, dtype=torch.float64).requires_grad_()
    values = []
    for adjoint in (False, True):
        flow = ProbabilityFlow(
            *(model, event),
            trace=Hutchinson(1, seed=0),
            solver=ODESolver("rk4", adjoint=adjoint, steps=16),
        )
        inputs = [x, *model.network.parameters()]
        values.append(torch.autograd.grad(flow.log_prob(x).sum(), inputs))
    for plain, adjoint in zip(*values, strict=True):
        assert (plain - adjoint).abs().max() < 5e-3 * plain.abs().max().clamp(min=1)


def test_an_observed_flow_of_images_trains():
    event, x = (1, 4, 4), 0.1 * torch.randn(2, 1, 4, 4)
    model_denoiser = GaussianDenoiser(unet(), GaussianProcess(Cosine(), 3))

    def model(x):
        pyro.module("denoiser", model_denoiser)
        with pyro.plate("data", len(x)):
            flow = ProbabilityFlow(model_denoiser, event, trace=Hutchinson(1, seed=0), **FEW)
            pyro.sample("x", flow, obs=x)

    def guide(x):
        pass

    before = [p.detach().clone() for p in model_denoiser.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert not any(
        torch.equal(a, b) for a, b in zip(before, model_denoiser.parameters(), strict=True)
    )


def test_chains_move_in_a_flow_of_images():
    flow = ProbabilityFlow(denoiser(Images()), (1, 2, 2), **FEW)

    def model():
        x = pyro.sample("x", flow)
        pyro.sample("y", dist.Normal(x.sum(), 0.5), obs=torch.tensor(1.0, dtype=torch.float64))

    kernel = NUTS(model, step_size=0.1, adapt_step_size=False, max_tree_depth=2)
    mcmc = MCMC(kernel, 3, warmup_steps=1, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["x"]
    assert torch.isfinite(x).all()
    assert (x[0] != x[-1]).all()
    x = x[-1].requires_grad_()
    got, expected = slope(lambda: kernel.potential_fn({"x": x}), [x])
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_densities_want_a_mean_with_a_gradient():
    prior = GaussianDenoiser(MLP(2).double(), GaussianProcess(Cosine()))

    def model():
        x = pyro.sample("x", Diffusion(prior, (2,)))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(3.0, dtype=torch.float64))

    flow = ProbabilityFlow(PlugIn(prior, ProgramLikelihood(model)), (2,), **FEW)
    assert flow.sample((3,)).shape == (3, 2)
    message = "denoiser: got a PlugIn whose mean has no gradient in x_t, expected a differentiable"
    for ask in (lambda: flow.log_prob(torch.zeros(2)), flow.rsample_and_log_prob):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            ask()


# --- guidance ---------------------------------------------------------------------------------------


@networks
@sizes
def test_guidance_differentiates_denoisers_and_programs_twice(build, size):
    event, classifier = (1, size, size), Images().double()
    prior = denoiser(build())

    def model():
        x = pyro.sample("x", Diffusion(prior, event))
        read = classifier(x.reshape(-1, *event), x.new_zeros(x.reshape(-1, *event).shape[0]))
        read = read.flatten(1)[:, :3].reshape(*x.shape[:-3], 3)
        pyro.sample("y", dist.Normal(read, 0.5).to_event(1), obs=torch.ones(3).double())

    likelihood, t = ProgramLikelihood(model), torch.tensor(0.5, dtype=torch.float64)
    xt = torch.randn(2, *event, dtype=torch.float64).requires_grad_()
    level = prior.process.level(t, xt)

    # Products with B are the transposes of those with B^T.
    at = LinearizedDenoiser(prior, likelihood, xt, level, {})
    u, v = torch.randn_like(at.residual), torch.randn_like(at.mean)
    torch.testing.assert_close((at.push(v) * u).sum(), (at.pull(u) * v).sum())
    assert torch.isfinite(MMPS(prior, likelihood, solver="gmres")(xt, t).mean).all()

    # The whole gradient of the log-twist.
    guided = PiGDM(prior, likelihood, full_gradient=True)

    at, level = guided._linearized(xt, t, {})
    score = at.score(guided._direct(at, level).log_evidence)
    direction, h = torch.randn_like(xt), 2e-7

    def log_twist(x):
        return guided._direct(*guided._linearized(x, t, {})).log_evidence.sum().detach()

    expected = (log_twist(xt + h * direction) - log_twist(xt - h * direction)) / (2 * h)
    torch.testing.assert_close((score * direction).sum(), expected, rtol=1e-5, atol=1e-6)
