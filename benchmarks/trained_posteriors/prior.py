"""A small U-Net trained on scikit-learn's 8x8 digits, kept in a folder for later runs."""

import functools
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, LearnedVariance
from pyro_diffusion.distributions import Diffusion, Hybrid
from pyro_diffusion.distributions.objectives import Objective
from pyro_diffusion.nn import UNet
from pyro_diffusion.optim import EMA, JointOptim
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

SHAPE, STEPS = (1, 8, 8), 64
OBJECTIVES: dict[str, Objective | None] = {"bound": None, "hybrid": Hybrid()}


@functools.cache
def digits() -> dict[str, Tensor]:
    """Images in [-1, 1], (n, 1, 8, 8): 1437 to train on, 360 to test on."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = np.random.default_rng(0).permutation(len(images))
    return {"train": images[order[:1437]], "test": images[order[1437:]]}


def build() -> GaussianDenoiser:
    """An untrained network."""
    process = GaussianProcess(Cosine(), event_dim=3)
    return GaussianDenoiser(UNet(1, width=32, outputs=2), process, variance=LearnedVariance())


def chain(denoiser: Denoiser, objective: Objective | None = None) -> Diffusion:
    """The prior as a Pyro distribution."""
    return Diffusion(denoiser, SHAPE, steps=STEPS, objective=objective)


def train(objective: Objective | None, updates: int, batch: int = 128) -> GaussianDenoiser:
    """Plain SVI with a falling learning rate; the average of the weights."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    denoiser, images = build(), digits()["train"]

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        site = chain(denoiser, objective)  # built anew: its noise is fresh
        with pyro.plate("images", len(x)), poutine.scale(scale=1 / (64 * len(x))):
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
    for _ in range(updates):
        svi.step(images[torch.randint(len(images), (batch,))])
        optimizer.step()
        average.update()
    with average.average_parameters():
        averaged = {name: value.clone() for name, value in denoiser.state_dict().items()}
    denoiser.load_state_dict(averaged)
    return denoiser


def trained(cache: Path, objective: str, updates: int) -> GaussianDenoiser:
    """The network of a cache folder, or one trained now and kept there."""
    path = cache / f"digits_{objective}_{updates}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        save_file(train(OBJECTIVES[objective], updates).state_dict(), path)
    denoiser = build()
    denoiser.load_state_dict(load_file(path))
    return denoiser.requires_grad_(False).eval()
