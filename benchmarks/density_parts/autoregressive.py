"""Autoregressive densities of bits: sums by enumeration, and sets of vectors beside figures of others."""

from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import CategoricalDenoiser
from pyro_diffusion.distributions import Autoregressive, OrderAgnostic
from pyro_diffusion.nn import MADE, NADE
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.schedules import Rectified

from .bits import Masked, Settings, build, fit, read, score

# Log-likelihoods of test rows in nats, as printed by Gens and Domingos 2013 (LearnSPN, WinMine), Rooshenas
# and Lowd 2014 (ID-SPN) and Germain et al. 2015.
PUBLISHED = {
    "debd_nltcs": "LearnSPN -6.11, WinMine -6.03, ID-SPN -6.02",
    "debd_plants": "LearnSPN -12.98, WinMine -12.65, ID-SPN -12.54",
    "binarized_mnist_static": "NADE -88.33, MADE -88.04 (one mask), -86.64 (32 masks) (arXiv 1502.03509)",
}
MODELS = ("made", "made of 8 orders", "nade", "masked diffusion")
# LearnSPN's figures, the least that is asked of the better of MADE and NADE.
WANTED = {"debd_nltcs": -6.11, "debd_plants": -12.98}


def compare(
    name: str,
    data: dict[str, Tensor],
    models: tuple[str, ...],
    settings: Settings,
    hidden: tuple[int, ...] = (),
    images: int = 0,
) -> dict[str, float]:
    """Print test nats of every model, trained for so long each, and return them."""
    size, found = data["train"].shape[1], {}
    counts = f"{len(data['train'])} rows, {len(data['test'])} of test"
    print(f"\n{name}: {size} bits, {counts}; published: {PUBLISHED.get(name)}", flush=True)
    for kind in models:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        network = build(kind, size, hidden, images).to(data["train"].device)
        trainer = fit(network, data, settings)
        values = score(network.eval(), data["test"])
        found[kind] = float(values.mean())
        what = "bound" if kind == "masked diffusion" else "exact"
        print(
            f"{kind:>28} {found[kind]:>9.3f} ({float(values.std()) / len(values) ** 0.5:.3f}) {what}"
            f" {trainer.step:>7} steps in {settings.seconds:.0f} s, the best {trainer.history.best_step}",
            flush=True,
        )
        if kind == "masked diffusion" and size < 100:
            orders = torch.stack([torch.randperm(size) for _ in range(8)])
            values = score(OrderAgnostic(network, size, orders), data["test"])
            print(
                f"{'its network in 8 orders':>28} {float(values.mean()):>9.3f} exact, their mixture"
            )
    return found


def sums(size: int = 10) -> bool:
    """Print totals over all vectors of so many bits; whether they are 1."""
    every, fine = torch.cartesian_prod(*[torch.arange(2)] * size), True
    orders = torch.stack([torch.randperm(size) for _ in range(3)])
    process = Absorbing(Rectified.full(), 2)
    denoiser = CategoricalDenoiser(Masked(size, 32), process)
    networks: dict[str, nn.Module] = {
        "MADE": MADE(size, (32, 32), orders=orders),
        "NADE": NADE(size, 16, orders=orders),
        "masked diffusion's network": OrderAgnostic(denoiser, size, orders),
    }
    for name, network in networks.items():
        network = network.double().requires_grad_(False)
        for p in network.parameters():
            p.mul_(3)
        off = float(Autoregressive(network).log_prob(every).exp().sum() - 1)
        print(f"{name:>28}: sum over 2^{size} vectors less 1: {off:.1e}")
        fine &= abs(off) < 1e-10
    return fine


def main(scale: float, folder: Path | None = None) -> bool:
    """Print the tables; whether sums are 1 and the better of MADE and NADE is not behind LearnSPN."""
    fine = sums()
    if folder is None:
        print("nltcs and plants: not run, they want --data DIR (debd_nltcs.npz, debd_plants.npz)")
        return False
    for name, least in WANTED.items():
        settings = Settings(max(10 * scale, 1))
        found = compare(name, read(folder / f"{name}.npz"), MODELS, settings)
        fine &= max(found["made"], found["nade"]) >= least
    return fine
