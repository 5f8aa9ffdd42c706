"""Beside the libraries themselves, where they are installed: their steps, their models, their folders."""

import pytest
import torch
from torch import nn

from pyro_diffusion import Diffusion, checkpoint
from pyro_diffusion.foreign import from_azula, from_diffusers, load_diffusers
from pyro_diffusion.samplers import DDIM, simulate

COUNT = 40


class Waves(nn.Module):
    """A network of no special form, of x and timestep."""

    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(2, 2 * outputs, 3, padding=1)

    def forward(self, x, timestep):
        return torch.tanh(self.layer(x + torch.sin(timestep / 7)[:, None, None, None]))


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def options(**changes):
    return {"num_train_timesteps": COUNT, "beta_end": 0.3, "clip_sample": False, **changes}


def times(index):
    """Two neighbouring levels of the table."""
    return torch.tensor([index - 1, index], dtype=torch.float32) / (COUNT - 1)


CASES = [
    *[{"prediction_type": p} for p in ("epsilon", "sample", "v_prediction")],
    {"variance_type": "fixed_large"},
    {"variance_type": "learned_range"},
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "sigmoid"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_of_ddpm(diffusers, case):
    scheduler = diffusers.DDPMScheduler(**options(**case))
    network = Waves(2 if case.get("variance_type") == "learned_range" else 1)
    model = from_diffusers(network, scheduler)
    x = torch.randn(3, 2, 4, 4)
    for index in (1, 7, COUNT - 2):
        out = network(x, torch.full((3,), float(index)))
        generator = torch.Generator().manual_seed(index)
        expected = scheduler.step(out, index, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        early, late = times(index)
        kernel = model.process.reverse(x, model(x, late), early, late)
        torch.testing.assert_close(
            kernel.mean + kernel.stddev * noise, expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_step_of_ddim(diffusers, prediction):
    scheduler = diffusers.DDIMScheduler(**options(prediction_type=prediction))
    scheduler.set_timesteps(COUNT)
    network = Waves()
    model = from_diffusers(network, scheduler)
    x = torch.randn(3, 2, 4, 4)
    for index in (1, 7, COUNT - 1):
        out = network(x, torch.full((3,), float(index)))
        expected = scheduler.step(out, index, x, eta=0.0).prev_sample
        with torch.no_grad():
            found = simulate(model, times(index), x, DDIM())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_step_of_flow_matching(diffusers):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=COUNT)
    scheduler.set_timesteps(10)
    network = Waves()
    model = from_diffusers(network, scheduler)
    x = torch.randn(3, 2, 4, 4)
    scheduler.set_begin_index(4)
    sigmas, timestep = scheduler.sigmas[4:6], scheduler.timesteps[4]
    expected = scheduler.step(network(x, timestep.expand(3)), timestep, x).prev_sample
    log_snr = 2 * (torch.log1p(-sigmas) - sigmas.log())
    t = model.process.schedule.time_of_log_snr(log_snr.flip(0))
    with torch.no_grad():
        found = simulate(model, t, x, DDIM())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_their_unet_from_a_folder(diffusers, tmp_path):
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(**options(clip_sample=True))
    network.save_pretrained(tmp_path / "unet", safe_serialization=True)
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = load_diffusers(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        out = network(x, 5).sample
        expected = scheduler.step(out, 5, x).pred_original_sample
        torch.testing.assert_close(model(x, times(5)[1]).mean, expected, atol=1e-5, rtol=1e-5)
        assert Diffusion(model, (1, 8, 8), steps=COUNT - 1).log_prob(x).isfinite().all()
    with torch.no_grad():
        draws = Diffusion(model, (1, 8, 8), steps=4).sample((2,))
    assert draws.shape == (2, 1, 8, 8)


def test_their_unet_of_texts_and_their_dit(diffusers):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=6, attention_head_dim=4,
    ).eval()  # fmt: skip
    model = from_diffusers(unet, options(), context_event_dims={"encoder_hidden_states": 2})
    x, text = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 6)
    with torch.no_grad():
        found = model(x, times(5)[1], encoder_hidden_states=text).mean
        out = unet(x, 5, text).sample
        expected = diffusers.DDPMScheduler(**options()).step(out, 5, x).pred_original_sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=2, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=1,
    ).eval()  # fmt: skip
    model = from_diffusers(dit, options(variance_type="learned_range"))
    labels = torch.tensor([1, 7])
    with torch.no_grad():
        posterior = model(x, times(5)[1], class_labels=labels)
        out = dit(x, torch.tensor([5, 5]), labels).sample[:, :1]
        expected = diffusers.DDPMScheduler(**options()).step(out, 5, x).pred_original_sample
    torch.testing.assert_close(posterior.mean, expected, atol=1e-5, rtol=1e-5)
    assert posterior.variance.gt(0).all()


SCHEDULES = ["VPSchedule", "VESchedule", "CosineSchedule", "RectifiedSchedule", "DecaySchedule"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_denoisers_of_azula(name):
    denoise = pytest.importorskip("azula.denoise")
    noise, sample = pytest.importorskip("azula.noise"), pytest.importorskip("azula.sample")

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer = nn.Linear(3, 3)

        def forward(self, x, t):
            return torch.tanh(self.layer(x)) + torch.sin(t).reshape(-1, 1)

    theirs = denoise.KarrasDenoiser(Backbone(), getattr(noise, name)()).double()
    model = from_azula(theirs, event_dim=1)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    t = torch.tensor([[0.1], [0.3], [0.6], [0.9]], dtype=torch.float64)
    found = model(x, t.expand(4, 5)).mean
    for row in range(4):
        torch.testing.assert_close(found[row], theirs(x[row], t[row, 0].expand(5)).mean)
    level = model.process.schedule.level(t)
    alpha, sigma = theirs.schedule(t)
    torch.testing.assert_close(level.alpha, alpha)
    torch.testing.assert_close(level.sigma, sigma)
    torch.testing.assert_close(model.process.schedule.time_of_log_snr(level.log_snr), t)
    with torch.no_grad():
        grid = torch.tensor([0.3, 0.5], dtype=torch.float64)
        ddim = sample.DDIMSampler(theirs, steps=1)
        expected = ddim.step(x[0], grid[1], grid[0])
        torch.testing.assert_close(
            simulate(model, grid, x[0], DDIM()), expected, atol=1e-9, rtol=1e-7
        )


def test_the_bound_of_their_unet_is_our_formula(diffusers):
    """Terms of the bound on the same draw of noise, by the scheduler's means and variances."""
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(**options(variance_type="fixed_large"))
    chain = Diffusion(from_diffusers(network, scheduler), (1, 8, 8), steps=COUNT - 1)
    x = torch.randn(3, 1, 8, 8)
    signal = scheduler.alphas_cumprod
    for index in (0, 1, 20, COUNT - 1):
        with torch.no_grad():
            torch.manual_seed(index)
            found = chain.bound_terms(x, index)
            torch.manual_seed(index)
            xt = scheduler.add_noise(x, torch.randn(x.shape), torch.tensor([index] * 3))
            step = scheduler.step(network(xt, index).sample, index, xt)
        if index == 0:
            law = torch.distributions.Normal(step.pred_original_sample, (1 - signal[0]).sqrt())
            expected = -law.log_prob(x)
        else:
            now, before = signal[index], signal[index - 1]
            beta = 1 - now / before
            least = beta * (1 - before) / (1 - now)
            gap = before.sqrt() * beta / (1 - now) * (x - step.pred_original_sample)
            expected = 0.5 * (least / beta - 1 - (least / beta).log() + gap.square() / beta)
        torch.testing.assert_close(found, expected.flatten(1).sum(1), atol=1e-3, rtol=1e-4)


def test_a_denoiser_of_azula_is_saved(tmp_path):
    denoise, noise = pytest.importorskip("azula.denoise"), pytest.importorskip("azula.noise")
    checkpoint.register(noise.VPSchedule)
    theirs = denoise.SimpleDenoiser(Plain(), noise.VPSchedule(alpha_min=0.02))
    model, x = from_azula(theirs, event_dim=1), torch.randn(4, 3)
    checkpoint.save_model(tmp_path / "model.safetensors", model)
    again = denoise.SimpleDenoiser(Plain(), noise.VPSchedule(alpha_min=0.02))
    other = checkpoint.load_model(tmp_path / "model.safetensors", network=again)
    assert other.process.schedule.log_snr_min == model.process.schedule.log_snr_min
    assert torch.equal(other(x, 0.4).mean, model(x, 0.4).mean)


class Plain(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x, t):
        return super().forward(x)
