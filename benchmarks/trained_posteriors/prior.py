"""A small U-Net trained on images, kept in a folder for later runs."""

from functools import partial
from pathlib import Path

import pyro
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, LearnedVariance
from pyro_diffusion.distributions import Diffusion, Hybrid
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.nn import UNet
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine
from pyro_diffusion.train import Trainer
from trained_posteriors.images import Images

STEPS = 64
OBJECTIVES: dict[str, Objective | None] = {"bound": None, "hybrid": Hybrid()}


def build(images: Images) -> GaussianDenoiser:
    """An untrained network: of two resolutions for 8x8 images, of three and half as wide for larger ones."""
    small = images.side == 8
    network = UNet(1, width=32 if small else 16, levels=(1, 2) if small else (1, 2, 2), outputs=2)
    process = GaussianProcess(Cosine(), event_dim=3)
    return GaussianDenoiser(network, process, variance=LearnedVariance())


def chain(
    denoiser: Denoiser, shape: tuple[int, ...], objective: Objective | None = None
) -> Diffusion:
    """The prior as a Pyro distribution."""
    return Diffusion(denoiser, shape, steps=STEPS, objective=objective)


def train(images: Images, objective: Objective | None, updates: int) -> GaussianDenoiser:
    """SVI with a falling learning rate; the average of the weights."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    denoiser, small = build(images).to(images.train.device), images.side == 8

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        site = chain(denoiser, images.shape, objective)  # built anew: its noise is fresh
        with pyro.plate("images", len(x)):
            pyro.sample("x", site, obs=x)

    trainer = Trainer(
        model,
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05),
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=updates),
        ema=0.995,
        # Half the time on a processor, for images whose training takes minutes.
        autocast=None if small else torch.bfloat16,
        unit="nats/pixel",
    )

    def report(trainer: Trainer) -> None:
        if trainer.step % 100 == 0:
            loss = sum(trainer.history.losses[-100:]) / 100
            print(f"update {trainer.step}: loss {loss:.4f} nats a pixel", flush=True)

    trainer.fit(
        images.train,
        steps=updates,
        batch_size=128 if small else 64,
        callback=report,
        progress=False,
    )
    return denoiser


def trained(images: Images, cache: Path, objective: str, updates: int) -> GaussianDenoiser:
    """The network of a cache folder, or one trained now and kept there."""
    path = cache / f"{images.name}_{objective}_{updates}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        save_file(train(images, OBJECTIVES[objective], updates).state_dict(), path)
    denoiser = build(images)
    denoiser.load_state_dict(load_file(path))
    return denoiser.to(images.train.device).requires_grad_(False).eval()
