"""Half precision is for networks: what defines a model, its levels and its bound stay in float32."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import MEANS, SCHEDULES, VARIANCES, WEIGHTS
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    EstimatedVariance,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    MixtureDenoiser,
    TableDenoiser,
    TimeVariance,
    uniform_levels,
)
from pyro_diffusion.distributions import (
    Diffusion,
    DiffusionSDE,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.dynamics import SDESolver
from pyro_diffusion.guidance import MMPS, DataCovariance
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.nn import MLP, LabelContext, TensorContext, Transformer, UNet
from pyro_diffusion.nn.embedding import fourier_embedding
from pyro_diffusion.optim import JointOptim
from pyro_diffusion.precision import PreciseModule
from pyro_diffusion.processes import (
    Absorbing,
    GaussianProcess,
    SeededNoise,
    Uniform,
    drawing_from,
)
from pyro_diffusion.schedules import Cosine, LearnedSchedule, Rectified, TabulatedBetas

HALF = (torch.bfloat16, torch.float16)


class Flat(nn.Module):
    """Every value equally likely."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(values))

    def forward(self, x, log_snr):
        return self.weight.expand(*x.shape, -1)


def filled(network):
    """The network with weights that do something, the last layer's too."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


def gaussian():
    return GaussianProcess(Cosine())


DEFINED = {
    "levels": lambda: LevelsDenoiser(Flat(256), gaussian(), uniform_levels(256)),
    "mixture": lambda: MixtureDenoiser(gaussian(), WEIGHTS, MEANS, VARIANCES),
    "table": lambda: TableDenoiser(Uniform(Rectified(), 3), torch.rand(3, 3)),
    "uniform": lambda: CategoricalDenoiser(Flat(5), Uniform(Rectified(), 5)),
    "betas": lambda: GaussianProcess(TabulatedBetas(torch.linspace(1e-3, 0.1, 40))),
    "learned": lambda: GaussianProcess(LearnedSchedule(7)),
    "time variance": lambda: TimeVariance(torch.linspace(-10, 10, 33)),
    "estimate": lambda: EstimatedVariance(torch.linspace(-10, 10, 33), torch.rand(33)),
}


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
@pytest.mark.parametrize("name", DEFINED)
def test_a_definition_loses_no_digit_in_half_precision(name, cast):
    module = DEFINED[name]()
    networks = {id(p) for m in module.modules() if isinstance(m, Flat) for p in m.parameters()}
    before = copy.deepcopy(module.state_dict(keep_vars=False))
    getattr(module, cast)()
    for key, value in module.state_dict(keep_vars=True).items():
        if id(value) in networks:
            assert value.dtype.itemsize == 2
        else:
            assert torch.equal(value, before[key]) and value.dtype == before[key].dtype
    module.double()
    assert all(
        v.dtype == torch.float64 for v in module.state_dict().values() if v.is_floating_point()
    )
    module.float()
    assert all(
        v.dtype == torch.float32 for v in module.state_dict().values() if v.is_floating_point()
    )


def test_a_definition_follows_devices():
    module = DEFINED["levels"]().to("meta")
    assert module.values.device.type == module.network.weight.device.type == "meta"
    assert module.to(torch.bfloat16).values.dtype == torch.float32


def test_a_guidance_keeps_its_numbers():
    denoiser = MixtureDenoiser(gaussian(), torch.ones(1), torch.zeros(1, 2), 1.0)

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,)))
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=torch.tensor(1.0))

    guided = DataCovariance(
        denoiser, ProgramLikelihood(model), covariance=torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    )
    before = guided.estimate.vectors.clone()
    guided.to(torch.bfloat16)
    assert torch.equal(guided.estimate.vectors, before)


def test_every_buffer_of_the_package_is_a_definition():
    found = [m for name in DEFINED for m in DEFINED[name]().modules()]
    owners = [m for m in found if any(True for _ in m.buffers(recurse=False))]
    assert owners and all(isinstance(m, PreciseModule) for m in owners)


def bits(denoiser, x):
    pyro.set_rng_seed(1)
    law = Diffusion(denoiser, (4,), 50, decoder=QuantizedDecoder(256))
    with torch.no_grad():
        return float(-law.log_prob(x).mean() / (4 * math.log(2)))


@pytest.mark.parametrize("dtype", HALF)
def test_bound_of_uniform_integers(dtype):
    # The exact posterior of independent uniform integers: the bound lies a little above 8 bits, and an
    # estimate of it within 0.25. With 256 levels rounded to bfloat16 it was 12.65.
    denoiser, x = DEFINED["levels"](), torch.randint(256, (4096, 4))
    exact = bits(denoiser, x)
    assert exact == pytest.approx(8.0, abs=0.25)
    assert bits(denoiser.to(dtype), x) == pytest.approx(exact, abs=1e-4)


class Quantiles(SeededNoise):
    """32 quantiles of the normal distribution in turn, in place of draws."""

    def normal(self, shape, like, event_dim=0):
        quantiles = torch.special.ndtri((torch.arange(32) + 0.5) / 32)
        return (quantiles / quantiles.square().mean().sqrt()).repeat(shape[0] // 32)[:, None]


def test_expected_bound_of_uniform_integers_is_above_their_entropy():
    # By quadrature in place of draws. With 1000 quantiles it is 8.0603 bits in ten steps, 8.0097 in fifty;
    # 32 quantiles are off by 0.003, and 8 is the entropy.
    steps, x = 10, torch.arange(256).repeat_interleave(32)[:, None]
    law = Diffusion(DEFINED["levels"]().bfloat16(), (1,), steps, decoder=QuantizedDecoder(256))
    with torch.no_grad(), drawing_from(Quantiles(0)):
        places = ((torch.arange(steps) + 0.5) / steps).unsqueeze(-1).expand(steps, len(x))
        reverse = torch.stack([law.reverse_terms(x, place).mean() for place in places]).mean()
        bound = reverse + law.decoder_terms(x).mean() + law.prior_terms(x).mean()
    assert float(bound) / math.log(2) == pytest.approx(8.060, abs=0.005)


@pytest.mark.parametrize("dtype", HALF)
def test_the_networks_compute_in_the_dtype_of_their_parameters(dtype):
    context = {"label": LabelContext(3, 4), "y": TensorContext(2, 4)}
    log_snr = torch.tensor([-9.0, 0.0, 9.0])
    said = {"label": torch.tensor([0, 1, 2]), "y": torch.randn(3, 2)}
    cases = [
        (MLP(4, (16, 16), context=context), torch.randn(3, 4), said),
        (UNet(1, 8), torch.randn(3, 1, 8, 8), {}),
        (Transformer(5, 7, 16, 2), torch.randint(5, (3, 7)), {}),
    ]
    for network, x, given in cases:
        network = filled(network).eval()
        expected = network(x, log_snr, **given)
        got = network.to(dtype)(x, log_snr, **given)
        assert got.dtype == dtype
        # Rounding of 2^-8 a layer.
        torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
        (got.float().sum()).backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", HALF)
def test_levels_are_embedded_before_they_are_rounded(dtype):
    log_snr = torch.tensor([9.0, 9.01])
    assert fourier_embedding(log_snr.to(dtype), 8).dtype == torch.float32
    assert fourier_embedding(log_snr.double(), 8).dtype == torch.float64
    network = MLP(1).to(dtype)
    seen = []
    handle = network.conditioning.level_in.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    GaussianDenoiser(network, gaussian())(
        torch.zeros(2, 1), gaussian().schedule.time_of_log_snr(log_snr)
    )
    handle.remove()
    expected = fourier_embedding(log_snr, 64).to(dtype)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=2**-7)
    assert not torch.equal(seen[0][0], seen[0][1])  # bfloat16 does not tell 9 from 9.01


@pytest.mark.parametrize("dtype", HALF)
def test_a_denoiser_gets_at_least_float32_from_its_network(dtype):
    denoiser = GaussianDenoiser(filled(MLP(3)), gaussian())
    expected = denoiser.network_output(torch.ones(2, 3), torch.zeros(()), {})
    for x in (torch.ones(2, 3), torch.ones(2, 3, dtype=dtype)):
        out = denoiser.to(dtype).network_output(x, torch.zeros(()), {})
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def views():
    """Denoisers of every kind with the laws that read them, and data."""
    x = torch.randn(512, 3)
    normal = GaussianDenoiser(
        filled(MLP(3, (32,), outputs=2)), gaussian(), variance=LearnedVariance()
    )
    image = GaussianDenoiser(filled(UNet(1, 8)), GaussianProcess(Cosine(), 3))
    levels = LevelsDenoiser(filled(MLP(3, (32,), outputs=9)), gaussian(), uniform_levels(9))
    symbols = CategoricalDenoiser(
        filled(Transformer(6, 3, 16, 1, outputs=5)), Absorbing(Rectified(), 5)
    )
    for denoiser in (normal, image, levels, symbols):
        denoiser.eval()
    return {
        "chain": (normal, lambda d: Diffusion(d, (3,), 20), x),
        "sde": (normal, lambda d: DiffusionSDE(d, (3,), solver=SDESolver(steps=20)), x),
        "flow": (normal, lambda d: ProbabilityFlow(d, (3,)), x[:4]),
        "image": (image, lambda d: Diffusion(d, (1, 4, 4), 20), torch.randn(64, 1, 4, 4)),
        "levels": (
            levels,
            lambda d: Diffusion(d, (3,), 20, decoder=QuantizedDecoder(9)),
            torch.randint(9, (512, 3)),
        ),
        "symbols": (symbols, lambda d: Diffusion(d, (3,), 20), torch.randint(5, (512, 3))),
    }


@pytest.mark.parametrize("way", [*HALF, "autocast"], ids=str)
@pytest.mark.parametrize("name", ["chain", "sde", "flow", "image", "levels", "symbols"])
def test_views_of_half_networks(name, way):
    denoiser, law, x = views()[name]

    def run(d):
        pyro.set_rng_seed(0)
        view = law(d)
        with torch.no_grad():
            return view.log_prob(x), view.sample((2,))

    exact, drawn = run(denoiser)
    if way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, sample = run(denoiser)
    else:
        got, sample = run(denoiser.to(way))
    assert got.dtype == exact.dtype == torch.float32
    assert sample.dtype == drawn.dtype
    assert sample.isfinite().all()
    # The noise is the same: what differs is the network's rounding of 2^-8 (of its outputs, of order 1).
    slack = 0.05 * float(exact.std()) + 0.02 * abs(float(exact.mean()))
    assert float(got.mean()) == pytest.approx(float(exact.mean()), abs=slack)


def test_training_under_autocast_and_in_bfloat16():
    x = 0.5 * torch.randn(256, 2) + 1

    def train(dtype, autocast):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        denoiser = GaussianDenoiser(MLP(2, (32,)), GaussianProcess(LearnedSchedule(5))).to(dtype)

        def model(x):
            pyro.module("denoiser", denoiser)
            with pyro.plate("data", len(x)):
                pyro.sample("x", Diffusion(denoiser, (2,), 20), obs=x)

        svi = SVI(model, lambda x: None, JointOptim(torch.optim.Adam, {"lr": 3e-3}), Trace_ELBO())
        losses = []
        for _ in range(80):
            # Entered anew at every step: torch keeps the rounded weights until it is left.
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                losses.append(svi.step(x))
        assert denoiser.process.schedule.heights.dtype == torch.float32
        return sum(losses[-20:]) / 20 / len(x)

    exact = train(torch.float32, False)
    # Same noise, the same start: rounding moves the loss by little (about 7 nats after 80 steps).
    assert train(torch.float32, True) == pytest.approx(exact, abs=0.05)
    assert train(torch.bfloat16, False) == pytest.approx(exact, abs=0.05)


def test_guidance_under_autocast_is_exact():
    # One datum of a standard normal, read with error 0.3: mean y / 1.09 whatever autocast rounds elsewhere.
    denoiser = MixtureDenoiser(gaussian(), torch.ones(1), torch.zeros(1, 2), 1.0)
    y = torch.tensor([1.234, -2.345])

    def model():
        x = pyro.sample("x", Diffusion(denoiser, (2,)))
        pyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y)

    guided = MMPS(denoiser, ProgramLikelihood(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = guided(torch.zeros(2), torch.tensor(1.0)).mean
    torch.testing.assert_close(mean, y / 1.09, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", HALF)
def test_levels_at_times_of_half_precision_are_in_float32(name, dtype):
    schedule, t = SCHEDULES[name](), torch.tensor([0.25, 0.5], dtype=dtype)
    process = GaussianProcess(schedule, event_dim=0)
    for level in (schedule.level(t), process.levels(t), process.levels(t, dtype)):
        assert all(v.dtype == torch.float32 for v in level)
        torch.testing.assert_close(level.log_snr, schedule.log_snr(t.float()))
