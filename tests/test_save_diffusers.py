"""Models that diffusers trained, by its own steps: read in a fresh process, trained further, given back."""

import json
import subprocess
import sys
from functools import partial

import pyro
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyro_diffusion import Cosine, Diffusion, GaussianDenoiser, GaussianProcess, checkpoint
from pyro_diffusion.denoisers import Noise, VarianceDenoiser
from pyro_diffusion.foreign import from_diffusers, from_edm, load_diffusers, save_diffusers
from pyro_diffusion.nn import MLP
from pyro_diffusion.train import Trainer

COUNT = 12  # timesteps
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def unet(diffusers, channels=1):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(diffusers, tmp_path_factory):
    """The steps of their script for unconditional images, and the pipeline that it saves."""
    place, model = tmp_path_factory.mktemp("theirs"), unet(diffusers)
    scheduler = diffusers.DDPMScheduler(
        COUNT, beta_end=0.6, variance_type="fixed_large", clip_sample=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.95, 0.999))
    images = torch.rand(32, *SHAPE) * torch.linspace(-1, 1, 8)
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    for _ in range(6):
        noise, timesteps = torch.randn_like(images), torch.randint(COUNT, (len(images),))
        noisy = scheduler.add_noise(images, noise, timesteps)
        loss = nn.functional.mse_loss(model(noisy, timesteps).sample.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert any(not p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    diffusers.DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(place)
    return place


BOUND = """
import sys, torch
from safetensors.torch import load_file, save_file
from pyro_diffusion import Diffusion, foreign
model = foreign.load_diffusers(sys.argv[1])
data = load_file(sys.argv[2])
chain = Diffusion(model, (1, 8, 8), steps=len(data["noise"]) - 1)
terms = []
with torch.no_grad():
    for index in range(len(data["noise"]) + 1):
        torch.manual_seed(index)
        terms.append(chain.bound_terms(data["x"], index))
save_file({"terms": torch.stack(terms)}, sys.argv[3])
"""


def test_a_fresh_process_has_the_likelihood_of_their_formula(diffusers, folder, tmp_path):
    """Every term of the bound of the chain, on the same noise, by their scheduler and the formulas."""
    x = torch.rand(3, *SHAPE) * 2 - 1
    noise = []
    for index in range(COUNT):
        torch.manual_seed(index)
        noise.append(torch.randn(x.shape))
    given, found = tmp_path / "given.safetensors", tmp_path / "found.safetensors"
    save_file({"x": x, "noise": torch.stack(noise)}, given)
    run = [sys.executable, "-c", BOUND, str(folder), str(given), str(found)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    scheduler, network = pipeline.scheduler, pipeline.unet
    signal, expected = scheduler.alphas_cumprod.double(), []
    for index in range(COUNT):
        now = signal[index]
        xt = now.sqrt() * x.double() + (1 - now).sqrt() * noise[index]
        with torch.no_grad():
            x0 = (xt - (1 - now).sqrt() * network(xt.float(), index).sample) / now.sqrt()
        x0 = x0.clamp(-1, 1)
        if index == 0:
            cost = -torch.distributions.Normal(x0, (1 - now).sqrt()).log_prob(x.double())
        else:
            before = signal[index - 1]
            beta = 1 - now / before
            least = beta * (1 - before) / (1 - now)
            gap = before.sqrt() * beta / (1 - now) * (x - x0)
            cost = 0.5 * (least / beta - 1 - (least / beta).log() + gap.square() / beta)
        expected.append(cost.flatten(1).sum(1))
    last = torch.distributions.Normal(signal[-1].sqrt() * x.double(), (1 - signal[-1]).sqrt())
    prior = torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0))
    expected.append(prior.flatten(1).sum(1))
    found = load_file(found)["terms"].double()
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-3, rtol=1e-4)


def test_there_and_back(diffusers, folder, tmp_path):
    """Trained further by the bound, their pipeline samples with the new weights."""
    model, images = load_diffusers(folder), torch.rand(16, *SHAPE) * 2 - 1
    old = {k: v.clone() for k, v in model.denoiser.network.network.state_dict().items()}

    def program(x):
        pyro.module("denoiser", model)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Diffusion(model, SHAPE, steps=COUNT - 1), obs=x)

    adam = partial(torch.optim.Adam, lr=1e-3)
    Trainer(program, optimizer=adam).fit(images, steps=2, batch_size=16, progress=False)
    save_diffusers(tmp_path / "ours", model)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    new = pipeline.unet.state_dict()
    assert any(not new[name].equal(value) for name, value in old.items())
    assert all(new[k].equal(v) for k, v in model.denoiser.network.network.state_dict().items())
    theirs = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    ours = pipeline.scheduler.config
    same = ("num_train_timesteps", "prediction_type", "variance_type", "clip_sample")
    assert all(theirs[key] == ours[key] for key in (*same, "clip_sample_range"))
    expected = diffusers.DDPMScheduler.from_config(theirs).alphas_cumprod
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, expected, atol=1e-6, rtol=1e-5)
    again, x = load_diffusers(tmp_path / "ours"), torch.randn(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(again(x, 0.4).mean, model.eval()(x, 0.4).mean)
        assert again(x, 0.4).variance.equal(model(x, 0.4).variance)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(num_inference_steps=3, output_type="np")
    assert pictures.images.shape == (1, 8, 8, 1)


CONFIGS = [
    {"prediction_type": "v_prediction", "clip_sample": False},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"variance_type": "learned_range", "clip_sample_range": 2.0},
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100, "shift": 3.0},
    {"_class_name": "EDMEulerScheduler", "sigma_data": 0.7, "rho": 5.0},
    {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.02},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: " ".join(map(str, c.values())))
def test_every_scheduler_comes_back(diffusers, tmp_path, config):
    network = unet(diffusers, 2 if "variance_type" in config else 1).eval()
    model = from_diffusers(network, config)
    save_diffusers(tmp_path, model)
    again, x, t = load_diffusers(tmp_path), torch.randn(3, *SHAPE), torch.tensor([0.0, 0.3, 1.0])
    with torch.no_grad():
        torch.testing.assert_close(again(x, t).mean, model(x, t).mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(x, t).variance, model(x, t).variance, atol=1e-6, rtol=1e-3)
    knots = [getattr(m.process.schedule, "knots", x) for m in (again, model)]
    torch.testing.assert_close(*knots, atol=1e-4, rtol=1e-5)
    assert again.clip == model.clip and type(again.variance) is type(model.variance)


def test_what_diffusers_has_no_place_for(tmp_path):
    class Saved(nn.Identity):
        def save_pretrained(self, folder, **options):
            raise AssertionError("nothing is to be written")

    class Other(GaussianProcess):
        pass

    config = {"num_train_timesteps": COUNT, "clip_sample": False}
    model, ours = from_diffusers(Saved(), config), GaussianProcess(Cosine())
    cases = {
        "got GaussianDenoiser on MLP, expected one of load_diffusers": GaussianDenoiser(
            MLP(2), ours
        ),
        "network Identity without save_pretrained": from_diffusers(nn.Identity(), config),
        "got the variance": VarianceDenoiser(model, lambda level: level.sigma),
        "got Cosine": GaussianDenoiser(model.network, ours, Noise()),
        "got a process Other": GaussianDenoiser(model.network, Other(Cosine()), Noise()),
        "on the time Sigma": from_edm(Saved()),
        "on the time FlowTime": GaussianDenoiser(
            from_diffusers(Saved(), {"_class_name": "FlowMatchEulerDiscreteScheduler"}).network,
            ours,
        ),
    }
    for message, denoiser in cases.items():
        with pytest.raises(ValueError, match=message):
            save_diffusers(tmp_path / "new", denoiser)
    (tmp_path / "old.bin").touch()
    with pytest.raises(checkpoint.CheckpointError, match=r"old\.bin"):
        save_diffusers(tmp_path, model)
