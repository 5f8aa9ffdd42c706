"""Free of overhead: SVI with a Diffusion site, its sampler and the Trainer, beside loops by hand.

Run: python benchmarks/training.py

The bare loops are what one would write by hand for the same network, batch and bound: the schedule inlined,
the divergences of the chain as one formula, torch's own fused AdamW. Both sides run in turns of a few steps
in one process; the figure is the median over turns of the ratio of their seconds.
"""

import argparse
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable

import pyro
import torch
import torch.distributed as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, LevelsDenoiser, uniform_levels
from pyro_diffusion.distributions import Decoder, Diffusion, NormalDecoder, QuantizedDecoder
from pyro_diffusion.nn import MLP, UNet
from pyro_diffusion.optim import EMA, JointOptim
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine
from pyro_diffusion.train import Trainer

STEPS, SHARE, LEVELS = 1000, 1 / 16, 17
LOG_SNR_MAX, LOG_SNR_MIN, SHIFT = 12.0, -9.0, 1.25
START, STOP = (
    2 / math.pi * math.atan(math.exp(SHIFT - end / 2)) for end in (LOG_SNR_MAX, LOG_SNR_MIN)
)


def cosine() -> Cosine:
    return Cosine(LOG_SNR_MAX, LOG_SNR_MIN, shift=SHIFT)


def log_snr(t: Tensor) -> Tensor:
    """The cosine schedule, by hand."""
    return 2 * SHIFT - 2 * torch.log(torch.tan(math.pi / 2 * (START + (STOP - START) * t)))


def bare_point_mass(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Minus the bound of DDPM with v-prediction on vectors, mean over the batch."""

    def loss(x: Tensor) -> Tensor:
        place, j = strata(len(x))
        late, early = log_snr(j / STEPS)[:, None], log_snr((j - 1).clamp(min=0) / STEPS)[:, None]
        alpha, sigma = torch.sigmoid(late).sqrt(), torch.sigmoid(-late).sqrt()
        xt = alpha * x + sigma * torch.randn_like(x)
        estimate = alpha * xt - sigma * network(xt, late[:, 0])
        error = (x - estimate).square()
        step = 0.5 * ((early.exp() - late.exp()) * error).sum(1)
        decoding = 0.5 * (late.exp() * error + math.log(2 * math.pi) - late).sum(1)
        return cost(place, decoding, step, prior(x))

    return loss


def bare_levels(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Minus the bound of the digits example, mean over the batch."""
    values = uniform_levels(LEVELS)

    def loss(x: Tensor) -> Tensor:
        x0 = x / 8 - 1
        place, j = strata(len(x))
        late = log_snr(j / STEPS)[:, None, None, None]
        early = log_snr((j - 1).clamp(min=0) / STEPS)[:, None, None, None]
        alpha, sigma = torch.sigmoid(late).sqrt(), torch.sigmoid(-late).sqrt()
        xt = alpha * x0 + sigma * torch.randn_like(x0)
        out = network(xt, late.reshape(-1))
        evidence = (xt[..., None] - alpha[..., None] * values) / sigma[..., None]
        logits = (out - 0.5 * evidence.square()).log_softmax(-1)
        probs = logits.exp()
        mean = probs @ values
        variance = (probs * (values - mean[..., None]).square()).sum(-1)
        gain = early.exp() - late.exp()
        step = 0.5 * (
            torch.log1p(gain * variance)
            + (1 + gain * (x0 - mean).square()) / (1 + gain * variance)
            - 1
        )
        decoding = -logits.gather(-1, x[..., None])
        return cost(place, decoding.flatten(1).sum(1), step.flatten(1).sum(1), prior(x0))

    return loss


def strata(count: int) -> tuple[Tensor, Tensor]:
    """Low-discrepancy positions, and the terms of the bound that they fall on."""
    place = (torch.rand(()) + torch.arange(count) / count) % 1
    return place, ((place - SHARE) / (1 - SHARE) * STEPS).floor().clamp(-1, STEPS - 1) + 1


def prior(x0: Tensor) -> Tensor:
    """KL(q(x_1 | x_0) || N(0, I))."""
    alpha2 = 1 / (1 + math.exp(-LOG_SNR_MIN))
    return 0.5 * (alpha2 * x0.square() - alpha2 - math.log1p(-alpha2)).flatten(1).sum(1)


def cost(place: Tensor, decoding: Tensor, step: Tensor, prior: Tensor) -> Tensor:
    chosen = torch.where(place < SHARE, decoding / SHARE, step * STEPS / (1 - SHARE))
    return (prior + chosen).mean()


def svi_step(denoiser: Denoiser, decoder: Decoder, lr: float) -> Callable[[Tensor], float]:
    """What a user writes."""
    pyro.clear_param_store()

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)), poutine.scale(scale=1 / len(x)):
            pyro.sample("x", Diffusion(denoiser, x.shape[1:], STEPS, decoder=decoder), obs=x)

    optimizer = JointOptim(torch.optim.AdamW, {"lr": lr, "fused": True})
    return SVI(model, lambda x: None, optimizer, Trace_ELBO()).step


def bare_step(
    network: nn.Module, loss: Callable[[Tensor], Tensor], lr: float
) -> Callable[[Tensor], float]:
    """The same by hand."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=True)

    def step(x: Tensor) -> float:
        value = loss(x)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def bare_sampler(read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | float]]) -> Callable:
    """Ancestral sampling by hand, coefficients tabulated."""
    level = log_snr(torch.linspace(0, 1, STEPS + 1))
    alpha, sigma = torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()
    fresh = -torch.expm1(level[1:] - level[:-1])
    keep = sigma[:-1].square() / sigma[1:].square() * alpha[1:] / alpha[:-1]
    blend, noise = alpha[:-1] * fresh, sigma[:-1].square() * fresh

    @torch.no_grad()
    def sample(x: Tensor) -> Tensor:
        for j in reversed(range(STEPS)):
            mean, variance = read(x, j + 1)
            scale = (noise[j] + blend[j] ** 2 * variance).sqrt()
            x = keep[j] * x + blend[j] * mean + scale * torch.randn_like(x)
        return x

    return sample


def compare(ours: Callable, bare: Callable, argument: object, steps: int, turns: int) -> None:
    """Seconds of each side in turns; print both and the median of their ratios."""
    sides: list[list[float]] = [[], []]
    for turn in range(turns + 1):
        for side, run in enumerate((ours, bare) if turn % 2 else (bare, ours)):
            start = time.perf_counter()
            for _ in range(steps):
                run(argument)
            which = side if turn % 2 else 1 - side
            if turn:  # the first turn warms up
                sides[which].append((time.perf_counter() - start) / steps)
    show(sides)


def show(sides: list[list[float]]) -> None:
    """The median of both sides and that of their ratios."""
    ratio = statistics.median(a / b for a, b in zip(*sides, strict=True))
    mine, theirs = (1e3 * statistics.median(s) for s in sides)
    print(f"{mine:>10.2f} {theirs:>10.2f} {ratio:>7.3f}", end="")


def mlp() -> tuple[nn.Module, Denoiser, Tensor]:
    network = MLP(64, hidden=(1024, 1024, 1024))
    denoiser = GaussianDenoiser(network, GaussianProcess(cosine()))
    return network, denoiser, torch.randn(512, 64)


def unet() -> tuple[nn.Module, Denoiser, Tensor]:
    network = UNet(1, outputs=LEVELS, dropout=0.2)
    process = GaussianProcess(cosine(), event_dim=3)
    denoiser = LevelsDenoiser(network, process, uniform_levels(LEVELS))
    return network, denoiser, torch.randint(LEVELS, (64, 1, 8, 8))


def training(turns: int) -> None:
    print(f"\n{'ms per training step':<40} {'SVI':>10} {'bare':>10} {'ratio':>7}  wanted")
    network, denoiser, x = mlp()
    print(f"{'MLP 3 x 1024, batch 512':<40}", end=" ")
    ours, bare = svi_step(denoiser, NormalDecoder(), 1e-4), bare_point_mass(network)
    compare(ours, bare_step(network, bare, 1e-4), x, 10, turns)
    print("  <= 1.05")
    network, denoiser, x = unet()
    print(f"{'digits: U-Net, batch 64':<40}", end=" ")
    ours, bare = svi_step(denoiser, QuantizedDecoder(LEVELS), 1e-4), bare_levels(network)
    compare(ours, bare_step(network, bare, 1e-4), x, 10, turns)
    print("  <= 1.10")


def by_hand(denoiser: Denoiser, decoder: Decoder, data: Tensor, batch: int) -> Callable[[], None]:
    """A step of the loop that one writes around SVI: rows, scheduler, averaged weights."""
    step, ema = svi_step(denoiser, decoder, 1e-4), EMA(denoiser)
    losses: list[float] = []

    def loop() -> None:
        losses.append(step(data[torch.randint(len(data), (batch,))]))
        ema.update()

    return loop


def looping(turns: int) -> None:
    """Trainer.fit, which stops after every ten steps to let the loop by hand take as many."""
    print(
        f"\n{'ms per step of a training loop':<40} {'Trainer':>10} {'by hand':>10} {'ratio':>7}  wanted"
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    for name, make, decoder, batch, shared in (
        ("MLP 3 x 1024, batch 512", mlp, NormalDecoder(), 512, None),
        ("digits: U-Net, batch 64", unet, QuantizedDecoder(LEVELS), 64, None),
        ("MLP, under DDP of one process", mlp, NormalDecoder(), 512, group),
        ("U-Net, under DDP of one process", unet, QuantizedDecoder(LEVELS), 64, group),
    ):
        _, denoiser, x = make()
        data = torch.cat([x] * 4)
        other = by_hand(copy.deepcopy(denoiser), decoder, data, batch)

        def model(x: Tensor, denoiser: Denoiser = denoiser, decoder: Decoder = decoder) -> None:
            pyro.module("trained", denoiser)
            with pyro.plate("data", len(x)):
                pyro.sample("x", Diffusion(denoiser, x.shape[1:], STEPS, decoder=decoder), obs=x)

        sides: list[list[float]] = [[], []]
        clock = [time.perf_counter()]

        def turn(
            trainer: Trainer,
            other: Callable = other,
            sides: list[list[float]] = sides,
            clock: list[float] = clock,
        ) -> None:
            if trainer.step % 10 == 0:
                clock.append(time.perf_counter())
                for _ in range(10):
                    other()
                clock.append(time.perf_counter())
                if trainer.step > 10:  # the first turn warms up
                    sides[0].append((clock[-2] - clock[-3]) / 10)
                    sides[1].append((clock[-1] - clock[-2]) / 10)

        print(f"{name:<40}", end=" ", flush=True)
        optimizer = functools.partial(torch.optim.AdamW, lr=1e-4, fused=True)
        trainer = Trainer(model, optimizer=optimizer, process_group=shared)
        trainer.fit(data, steps=10 * turns + 10, batch_size=batch, callback=turn, progress=False)
        show(sides)
        print("  <= 1.03" if shared is None else "")
    dist.destroy_process_group()


def sampling(turns: int) -> None:
    print(
        f"\n{'ms per 1000 sampling steps':<40} {'Diffusion':>10} {'bare':>10} {'ratio':>7}  wanted"
    )
    level = log_snr(torch.linspace(0, 1, STEPS + 1))
    alpha, sigma = torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()

    network, denoiser, _ = mlp()
    denoiser.eval()

    def read_v(x: Tensor, j: int) -> tuple[Tensor, float]:
        return alpha[j] * x - sigma[j] * network(x, level[j].expand(len(x))), 0.0

    for count in (64, 512):
        print(f"{f'MLP 3 x 1024, {count} samples':<40}", end=" ")
        run_pair(denoiser, read_v, (count, 64), turns)

    network, denoiser, _ = unet()
    denoiser.eval()
    values = uniform_levels(LEVELS)

    def read_levels(x: Tensor, j: int) -> tuple[Tensor, Tensor]:
        evidence = (x[..., None] - alpha[j] * values) / sigma[j]
        out = network(x, level[j].expand(len(x)))
        probs = (out - 0.5 * evidence.square()).softmax(-1)
        mean = probs @ values
        return mean, (probs * (values - mean[..., None]).square()).sum(-1)

    print(f"{'digits: U-Net, 16 samples':<40}", end=" ")
    run_pair(denoiser, read_levels, (16, 1, 8, 8), turns)


def run_pair(denoiser: Denoiser, read: Callable, shape: tuple[int, ...], turns: int) -> None:
    decoder = QuantizedDecoder(LEVELS) if isinstance(denoiser, LevelsDenoiser) else None
    law = Diffusion(denoiser, shape[1:], STEPS, decoder=decoder)
    bare = bare_sampler(read)
    compare(
        lambda n: law.sample((n,)), lambda n: bare(torch.randn(n, *shape[1:])), shape[0], 1, turns
    )
    print("  <= 1.05")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="turns of each side when training")
    parser.add_argument("--sampling-turns", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads")
    training(args.turns)
    looping(args.turns)
    sampling(args.sampling_turns)


if __name__ == "__main__":
    main()
