"""Sets of binary vectors: reading them, networks of their densities, training and scores."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_diffusion import Trainer
from pyro_diffusion.denoisers import CategoricalDenoiser
from pyro_diffusion.distributions import Autoregressive, DiffusionCTMC
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.nn import MADE, NADE, UNet
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.schedules import Rectified

MODELS = ("made", "made of 8 orders", "made of 32 orders", "nade", "masked diffusion")
# Hidden units of MADE's layers, of NADE's one and of the diffusion's two.
WIDTHS = {16: ((128, 128), 64, 256), 69: ((256, 256), 128, 512), 784: ((1000,), 500, 1000)}


@dataclass(frozen=True)
class Settings:
    """How to train: seconds (of the processor; of the clock on an accelerator), rows of a batch, rate."""

    seconds: float
    batch: int = 100
    rate: float = 2e-3
    decay: float = 0.0
    ema: float = 0.995
    autocast: torch.dtype | None = None
    log: Path | None = None


class Masked(nn.Module):
    """Logits of bits from those that are not masked: signs and which are there. Time-free."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(
            *(nn.Linear(2 * size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, size),
        )

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Symbols 0, 1 and 2, the mask, (n, size) to logits (n, size, 2)."""
        seen = (x < 2).to(log_snr.dtype)
        out = self.layers(torch.cat([seen * (2 * x - 1), seen], -1))
        return torch.stack([torch.zeros_like(out), out], -1)


class MaskedImage(nn.Module):
    """The same by a U-Net, of square images in rows. Time-free."""

    def __init__(self, side: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.size, self.side = side**2, side
        self.network = UNet(2, width, levels=(1, 2, 2), dropout=dropout)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """As that of ``Masked``."""
        seen = (x < 2).to(log_snr.dtype)
        image = torch.stack([seen * (2 * x - 1), seen], 1).unflatten(-1, (self.side, self.side))
        out = self.network(image, torch.zeros_like(log_snr))[:, 0].flatten(1)
        return torch.stack([torch.zeros_like(out), out], -1)


def read(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Rows of bits of an archive of packed rows."""
    with np.load(path, allow_pickle=False) as file:
        size = int(file["n_vars"]) if "n_vars" in file else 8 * file["train"].shape[1]
        return {
            name: torch.from_numpy(np.unpackbits(file[name], axis=1)[:, :size].astype(np.int64)).to(
                device
            )
            for name in ("train", "valid", "test")
        }


def build(kind: str, size: int, hidden: tuple[int, ...] = (), images: int = 0) -> nn.Module:
    """An untrained network of the kind, of widths if given; a diffusion by a U-Net so wide if given."""
    layers, units, width = WIDTHS[size]
    if kind == "nade":
        return NADE(size, *(hidden or (units,)))
    if kind == "masked diffusion":
        network = MaskedImage(round(size**0.5), images) if images else Masked(size, width)
        return CategoricalDenoiser(network, Absorbing(Rectified.full(), 2))
    count = int(kind.split()[2]) if "orders" in kind else 1
    orders = torch.stack([torch.randperm(size) for _ in range(count)])
    return MADE(size, hidden or layers, orders=orders)


def law(network: nn.Module, train: bool = False) -> DiffusionCTMC | Autoregressive:
    """The distribution; in training under one order, drawn afresh."""
    if isinstance(network, CategoricalDenoiser):
        return DiffusionCTMC(network, (network.network.size,), steps=2, validate_args=False)
    order = int(torch.randint(len(network.orders), ())) if train else None
    return Autoregressive(network, order, validate_args=False)


@torch.no_grad()
def score(network: nn.Module, rows: Tensor, draws: int = 32) -> Tensor:
    """Log-probabilities, or the diffusion's bound."""
    if isinstance(network, CategoricalDenoiser):
        return log_likelihood(
            law(network), rows, num_terms=draws, batch_size=1000, seed=0
        ).value.float()
    size = 500 if rows.is_cuda else 100
    return torch.cat([law(network).log_prob(part) for part in rows.split(size)])


def fit(network: nn.Module, data: dict[str, Tensor], settings: Settings) -> Trainer:
    """Train by SVI for so many seconds, checks included; weights are the best on validation."""
    clock = time.perf_counter if data["train"].is_cuda else time.process_time
    start = clock()

    def over(_: object = None) -> float:
        return min((clock() - start) / settings.seconds, 1.0)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law(network, train=True), obs=x)

    trainer = Trainer(
        model,
        optimizer=partial(torch.optim.AdamW, lr=settings.rate, weight_decay=settings.decay),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: 1 - over()
        ),
        ema=settings.ema,
        autocast=settings.autocast,
    )
    held, every = data["valid"], max(int(40 * settings.seconds**0.5), 1)
    held = held[: 2000 if held.is_cuda else 1000]
    trainer.fit(
        data["train"],
        steps=10**6,
        batch_size=settings.batch,
        validation=lambda: -float(score(network, held, 8).mean()),
        validate_every=every,
        log=settings.log,
        log_every=every,
        callback=lambda trainer: over() >= 1,
        progress=False,
    )
    return trainer
