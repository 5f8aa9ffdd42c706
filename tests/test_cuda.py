"""What users do on a GPU: results are there, and agree with the CPU's where the noise is common.

Noise that is keyed by row is the same on every device up to rounding. Other draws are compared by their
moments, within 4.5 standard errors (a false alarm in 10^5).

Run: pytest -m gpu tests/test_cuda.py
"""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from pyro_diffusion import AutoGuidance, Trainer, evaluate, samplers
from pyro_diffusion.checkpoint import load_model, save_model
from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.infer import AutoTwistedSMC
from pyro_diffusion.nn import MLP, DiT, SetTransformer, Transformer, UNet
from pyro_diffusion.optim import JointOptim
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear
from tests.small_diffusions import SMALL_DIFFUSIONS, SmallDiffusion

DEVICE, CPU = torch.device("cuda"), torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CASES = {case.name: case for case in SMALL_DIFFUSIONS}
close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


def here_and_there(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module on the CPU, and a copy of it on the GPU."""
    return module, copy.deepcopy(module).to(DEVICE)


def rows(case: SmallDiffusion, count: int, device: torch.device) -> dict[str, Tensor]:
    """The context of as many rows."""
    return {
        name: value.expand(count, *value.shape).to(device) for name, value in case.context.items()
    }


def assert_there(x: Tensor) -> None:
    """On the GPU, finite numbers."""
    assert x.device.type == DEVICE.type and bool(x.isfinite().all())


# --- the views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_bounds_and_draws_are_those_of_the_cpu(name):
    case = CASES[name]
    x = case.data((20,))
    bounds, draws = [], []
    for denoiser in here_and_there(case.denoiser()):
        diffusion = case(denoiser, context={})
        context = rows(case, len(x), diffusion.device)
        estimate = evaluate.log_likelihood(
            diffusion, x.to(diffusion.device), context=context, seed=3
        )
        bounds.append(estimate.value)
        draws.append(evaluate.draw_samples(diffusion, len(x), context=context, seed=3))
    close(*bounds)
    close(*draws)
    inside = diffusion.condition(**context)
    assert_there(inside.log_prob(x.to(DEVICE)))
    assert_there(inside.sample())


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("normal", samplers.DDIM(0.0)),
        ("normal", samplers.DDIM(0.5)),
        ("normal", samplers.Heun()),
        ("normal", samplers.DPMSolverPP()),
        ("normal", samplers.UniPC()),
        ("normal", samplers.RePaint(jumps=1)),
        ("absorbing", samplers.Remasking(0.2)),
        ("absorbing", samplers.FirstHitting()),
        ("uniform", samplers.Remasking(0.2)),
    ],
    ids=repr,
)
def test_samplers_draw_as_on_the_cpu(name, sampler):
    pair = here_and_there(CASES[name].denoiser())
    make = functools.partial(CASES[name], steps=6, sampler=sampler)
    close(*(evaluate.draw_samples(make(denoiser), 20, seed=5) for denoiser in pair))


def test_continuous_views():
    x = torch.randn(20, 3)
    pair = here_and_there(CASES["normal"].denoiser())
    flows = [ProbabilityFlow(denoiser, (3,)) for denoiser in pair]
    densities = [flow.log_prob(x.to(flow.device)) for flow in flows]
    assert_there(densities[1])
    close(densities[0], densities[1].cpu())
    for density in densities:
        density.sum().backward()
    for own, other in zip(*(denoiser.parameters() for denoiser in pair), strict=True):
        close(own.grad, other.grad.cpu(), atol=1e-2 * float(own.grad.abs().max()))
    close(*(evaluate.draw_samples(flow, 10, seed=1) for flow in flows))
    sdes = [DiffusionSDE(denoiser, (3,)) for denoiser in pair]
    scores = (
        evaluate.log_likelihood(sde, x.to(sde.device), num_terms=8, seed=2).value for sde in sdes
    )
    close(*scores)
    assert_there(sdes[1].sample((5,)))


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_symbols_in_continuous_time(name):
    x = CASES[name].data((20,))
    pair = here_and_there(CASES[name].denoiser())
    models = [DiffusionCTMC(denoiser, (3,), steps=8) for denoiser in pair]
    scores = (evaluate.log_likelihood(m, x.to(m.device), num_terms=8, seed=2).value for m in models)
    close(*scores)
    close(*(evaluate.draw_samples(model, 20, seed=1) for model in models))
    assert_there(models[1].log_prob(x.to(DEVICE)))


# --- networks -----------------------------------------------------------------------------------


def symbols(count: int, length: int) -> Tensor:
    return torch.randint(5, (count, length))


NETWORKS = {
    "mlp": (lambda: MLP(4, hidden=(32, 32)), lambda: torch.randn(6, 4)),
    "u-net": (lambda: UNet(1, width=16, outputs=3), lambda: torch.randn(6, 1, 8, 8)),
    "dit": (lambda: DiT(1, patch=2, width=32, depth=2), lambda: torch.randn(6, 1, 8, 8)),
    "sets": (lambda: SetTransformer(3, width=32, depth=2), lambda: torch.randn(6, 5, 3)),
    "symbols": (lambda: Transformer(5, 16, width=32, depth=2), lambda: symbols(6, 16)),
    # 64 positions: a length at which some of torch's kernels have been wrong beside a mask
    "relative": (
        lambda: Transformer(5, 64, 32, 2, relative=True, noise_level=False),
        lambda: symbols(6, 64),
    ),
    "causal": (
        lambda: Transformer(5, 64, 32, 2, relative=True, noise_level=False, causal=True),
        lambda: symbols(6, 64),
    ),
}


@pytest.mark.parametrize("half", [False, True], ids=["single", "half"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_their_gradients(name, half):
    """In single precision; and under autocast, where only directions are compared."""
    make, data = NETWORKS[name]
    pair, x, log_snr = here_and_there(make()), data(), torch.linspace(-3, 3, 6)
    for network in pair:  # their last layers start at zero
        torch.manual_seed(1)
        for p in network.parameters():
            p.data += 0.05 * torch.randn(p.shape).to(p.device)
    found = []
    for network, device, cast in zip(pair, (CPU, DEVICE), (False, half), strict=True):
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(device.type, torch.bfloat16, enabled=cast):
            out = network(x.to(device), log_snr.to(device))
        torch.manual_seed(2)
        (out.float() * torch.randn(out.shape).to(device)).sum().backward()
        assert out.device.type == device.type
        parameters = dict(network.named_parameters())
        assert all(p.grad is not None for p in parameters.values())
        gradients = {name: p.grad.cpu() for name, p in parameters.items()}
        found.append(gradients | {"output": out.detach().float().cpu()})
    for part, own in found[0].items():
        other, largest = found[1][part], float(own.abs().max())
        if half and float(own.norm()) > 1e-3:
            assert torch.cosine_similarity(own.flatten(), other.flatten(), dim=0) > 0.95, part
        elif not half:
            close(own, other, rtol=1e-3, atol=1e-3 * largest + 1e-4)


# --- training -----------------------------------------------------------------------------------


def program(denoiser: Denoiser, x: Tensor) -> None:
    pyro.module("denoiser", denoiser)
    with pyro.plate("data", len(x)):
        pyro.sample("x", Diffusion(denoiser, x.shape[1:], steps=10), obs=x)


def two_moons(count: int) -> Tensor:
    angle = math.pi * torch.rand(count, 1)
    return torch.cat([angle.cos(), angle.sin()], 1)


def new_trainer(**options) -> tuple[Denoiser, Trainer]:
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    denoiser = GaussianDenoiser(MLP(2, hidden=(32, 32)), GaussianProcess(Cosine())).to(DEVICE)
    adam = functools.partial(torch.optim.AdamW, lr=1e-2)
    trainer = Trainer(functools.partial(program, denoiser), optimizer=adam, ema=0.9, **options)
    return denoiser, trainer


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_training_in_half_precision_and_going_on(tmp_path, where):
    """A run in two parts ends where the whole one does; data may be on either device."""
    x = two_moons(128).to(DEVICE if where == "device" else "cpu")
    setting = {"batch_size": 32, "validation": x[:50], "validate_every": 4, "progress": False}
    results = []
    for name, parts in (("whole", (12,)), ("parts", (8, 12))):
        for steps in parts:
            denoiser, trainer = new_trainer(autocast=torch.bfloat16, clip_norm=1.0)
            path = tmp_path / f"{name}.safetensors"
            history = trainer.fit(x, steps=steps, checkpoint=path, **setting)
        assert all(p.device.type == DEVICE.type for p in denoiser.parameters())
        assert all(p.dtype == torch.float32 for p in denoiser.parameters())
        results.append((history, denoiser.state_dict()))
    (whole, weights), (parts, others) = results
    assert len(whole.losses) == 12
    assert whole.losses[-4:] == pytest.approx(parts.losses[-4:], rel=1e-4)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


def test_losses_fall_under_stock_svi():
    denoiser, _ = new_trainer()
    x = two_moons(256).to(DEVICE)
    scaled = pyro.poutine.scale(functools.partial(program, denoiser), 1 / len(x))
    adam = JointOptim(torch.optim.AdamW, {"lr": 1e-2, "fused": True})
    svi = SVI(scaled, lambda x: None, adam, Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_saved_there_and_loaded_here(tmp_path):
    denoiser, trainer = new_trainer()
    x = two_moons(64)
    trainer.fit(x, steps=3, progress=False)
    save_model(tmp_path / "there.safetensors", Diffusion(denoiser, (2,), steps=10))
    here = load_model(tmp_path / "there.safetensors", device="cpu")
    assert here.device.type == "cpu"
    save_model(tmp_path / "here.safetensors", here)
    back = load_model(tmp_path / "here.safetensors", device=str(DEVICE))
    assert back.device.type == DEVICE.type
    bounds = [evaluate.log_likelihood(m, x.to(m.device), seed=1).value for m in (here, back)]
    close(*bounds)


def test_a_group_of_one_process():
    backend = "gloo" if DEVICE.type == "cpu" else "nccl"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        denoiser, trainer = new_trainer(process_group=group)
        x = two_moons(64)
        history = trainer.fit(x, steps=5, batch_size=16, progress=False, validation=x)
        assert len(history.losses) == 5 and math.isfinite(history.validations[5])
        diffusion = Diffusion(denoiser, (2,), steps=10)
        scores = [
            evaluate.log_likelihood(diffusion, x.to(DEVICE), seed=1, process_group=of).value
            for of in (None, group)
        ]
        assert scores[0].equal(scores[1])
    finally:
        torch.distributed.destroy_process_group()


# --- posteriors ---------------------------------------------------------------------------------


def normal_prior(device: torch.device, **options) -> Diffusion:
    """A standard normal one of two coordinates."""
    process = GaussianProcess(LogLinear(10, -10))
    denoiser = MixtureDenoiser(process, torch.ones(1), torch.zeros(1, 2), 1.0)
    return Diffusion(denoiser.to(device), (2,), **{"steps": 50, **options})


def sum_is_two(prior: Diffusion) -> None:
    x = pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(2.0, device=prior.device))


def test_guided_draws_are_of_the_posterior():
    """The sum of both coordinates has the mean 2 * 2 / 2.25 and the variance 2 * .25 / 2.25."""
    model = functools.partial(sum_is_two, normal_prior(DEVICE))
    draws = Predictive(model, guide=AutoGuidance(model), num_samples=1000, parallel=True)()["x"]
    assert_there(draws)
    total, spread = draws.sum(-1), math.sqrt(0.5 / 2.25)
    # 50 steps are near enough: their bias is below the error
    assert abs(float(total.mean()) - 4 / 2.25) < 4.5 * spread / math.sqrt(1000) + 0.03
    assert abs(float(total.std()) / spread - 1) < 4.5 / math.sqrt(2000) + 0.03


def test_particles_know_the_evidence():
    model = functools.partial(sum_is_two, normal_prior(DEVICE))
    guide = AutoTwistedSMC(model, num_particles=500)
    Predictive(model, guide=guide, num_samples=10, parallel=True)()
    exact = -0.5 * math.log(2 * math.pi * 2.25) - 4 / 4.5
    assert abs(float(guide.particles.log_evidence.value) - exact) < 0.2
    assert_there(guide.particles.value)


def test_guidance_of_a_network_by_default():
    denoiser, trainer = new_trainer()
    trainer.fit(two_moons(64), steps=10, progress=False)
    model = functools.partial(sum_is_two, Diffusion(denoiser, (2,), steps=10))
    draws = Predictive(model, guide=AutoGuidance(model), num_samples=20, parallel=True)()["x"]
    assert_there(draws)
