"""A small U-Net trained on images, kept in a folder for later runs."""

import contextlib
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, LearnedVariance
from pyro_diffusion.distributions import Diffusion, Hybrid
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.nn import UNet
from pyro_diffusion.optim import EMA, JointOptim
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine
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
    """Plain SVI with a falling learning rate; the average of the weights."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    denoiser, small = build(images), images.side == 8
    batch = 128 if small else 64

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        site = chain(denoiser, images.shape, objective)  # built anew: its noise is fresh
        with pyro.plate("images", len(x)), poutine.scale(scale=1 / (images.pixels * len(x))):
            pyro.sample("x", site, obs=x)

    optimizer = JointOptim(
        torch.optim.AdamW,
        {"lr": 2e-3, "weight_decay": 0.05},
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {"T_max": updates},
    )
    svi = SVI(model, lambda x: None, optimizer, Trace_ELBO())
    average = EMA(denoiser, 0.995)
    denoiser.train()
    losses: list[float] = []
    for update in range(1, updates + 1):
        # Half the time on a processor, for images whose training takes minutes.
        half = contextlib.nullcontext() if small else torch.autocast("cpu", torch.bfloat16)
        with half:
            losses.append(svi.step(images.train[torch.randint(len(images.train), (batch,))]))
        optimizer.step()
        average.update()
        if update % 100 == 0:
            print(f"update {update}: loss {sum(losses[-100:]) / 100:.4f} nats a pixel", flush=True)
    with average.average_parameters():
        averaged = {name: value.clone() for name, value in denoiser.state_dict().items()}
    denoiser.load_state_dict(averaged)
    return denoiser


def trained(images: Images, cache: Path, objective: str, updates: int) -> GaussianDenoiser:
    """The network of a cache folder, or one trained now and kept there."""
    path = cache / f"{images.name}_{objective}_{updates}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        save_file(train(images, OBJECTIVES[objective], updates).state_dict(), path)
    denoiser = build(images)
    denoiser.load_state_dict(load_file(path))
    return denoiser.requires_grad_(False).eval()
