"""Free of overhead: SVI with a Diffusion site, its sampler and the Trainer, beside loops by hand.

Run: python benchmarks/training.py [--device cuda] [--parts training compiled]

The bare loops are what one would write by hand for the same network, batch and bound: the schedule inlined,
the divergences of the chain as one formula, torch's own fused AdamW. Both sides run in turns of a few steps
in one process; the figure is the median over turns of the ratio of their seconds. On a GPU networks, images
and batches are larger, clocks are read when the device is done, and the memory that a step needs is shown.
"""

import argparse
import copy
import functools
import itertools
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
        place, j = strata(x)
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

    def loss(x: Tensor) -> Tensor:
        x0, values = x / 8 - 1, uniform_levels(LEVELS).to(x.device)
        place, j = strata(x)
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


def strata(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low-discrepancy positions of a batch, and the terms of the bound that they fall on."""
    count, device = len(x), x.device
    place = (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1
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


def bare_sampler(
    read: Callable[[Tensor, int], tuple[Tensor, Tensor | float]], device: torch.device
) -> Callable:
    """Ancestral sampling by hand, coefficients tabulated."""
    level = log_snr(torch.linspace(0, 1, STEPS + 1, device=device))
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


def seconds(device: torch.device) -> float:
    """The time when the device is done with all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(
    ours: Callable, bare: Callable, argument: object, steps: int, turns: int, device: torch.device
) -> None:
    """Seconds of each side in turns; print both and the median of their ratios."""
    sides: list[list[float]] = [[], []]
    for turn in range(turns + 1):
        for side, run in enumerate((ours, bare) if turn % 2 else (bare, ours)):
            start = seconds(device)
            for _ in range(steps):
                run(argument)
            which = side if turn % 2 else 1 - side
            if turn:  # the first turn warms up
                sides[which].append((seconds(device) - start) / steps)
    show(sides)


def memory(run: Callable, argument: object, device: torch.device) -> str:
    """What a step needs above what is held between steps, at its peak."""
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run(argument)
    return f"{(torch.cuda.max_memory_allocated(device) - held) / 2**20:.0f}"


def show(sides: list[list[float]]) -> None:
    """The median of both sides and that of their ratios."""
    ratio = statistics.median(a / b for a, b in zip(*sides, strict=True))
    mine, theirs = (1e3 * statistics.median(s) for s in sides)
    print(f"{mine:>10.2f} {theirs:>10.2f} {ratio:>7.3f}", end="")


def mlp(device: torch.device) -> tuple[str, nn.Module, Denoiser, Tensor]:
    """Its name, a network, the denoiser and a batch."""
    width, batch = (1024, 512) if device.type == "cpu" else (4096, 4096)
    network = MLP(64, hidden=(width, width, width)).to(device)
    denoiser = GaussianDenoiser(network, GaussianProcess(cosine())).to(device)
    return (
        f"MLP 3 x {width}, batch {batch}",
        network,
        denoiser,
        torch.randn(batch, 64, device=device),
    )


def unet(device: torch.device) -> tuple[str, nn.Module, Denoiser, Tensor]:
    """The same for images: those of the digits example, or of 28 by 28 pixels."""
    size, batch, wide = (
        (8, 64, {"width": 32}) if device.type == "cpu" else (28, 256, {"width": 64, "blocks": 2})
    )
    network = UNet(1, outputs=LEVELS, dropout=0.2, **wide).to(device)
    process = GaussianProcess(cosine(), event_dim=3)
    denoiser = LevelsDenoiser(network, process, uniform_levels(LEVELS)).to(device)
    name = f"U-Net, {size} x {size}, batch {batch}"
    return name, network, denoiser, torch.randint(LEVELS, (batch, 1, size, size), device=device)


SETTINGS = (
    (mlp, NormalDecoder(), bare_point_mass, "<= 1.05"),
    (unet, QuantizedDecoder(LEVELS), bare_levels, "<= 1.10"),
)


def training(turns: int, device: torch.device) -> None:
    """SVI beside a loop by hand."""
    head = f"{'ms per training step':<40} {'SVI':>10} {'bare':>10} {'ratio':>7}  wanted"
    print(f"\n{head}{'' if device.type == 'cpu' else '   MiB a step: SVI, bare'}")
    for make, decoder, bare_loss, wanted in SETTINGS:
        name, network, denoiser, x = make(device)
        print(f"{name:<40}", end=" ", flush=True)
        ours = svi_step(denoiser, decoder, 1e-4)
        bare = bare_step(network, bare_loss(network), 1e-4)
        compare(ours, bare, x, 10, turns, device)
        needs = ", ".join(memory(run, x, device) for run in (ours, bare))
        print(f"  {wanted if device.type == 'cpu' else '<= 1.10'}   {needs.strip(', ')}")


def compiled(turns: int, device: torch.device) -> None:
    """SVI whose network is compiled, beside the same network as it is."""
    print(
        f"\n{'ms per SVI step':<40} {'compiled':>10} {'as it is':>10} {'ratio':>7}  first step, s"
    )
    for make, decoder, _, _ in SETTINGS:
        name, _, denoiser, x = make(device)
        other = copy.deepcopy(denoiser)
        print(f"{name:<40}", end=" ", flush=True)
        plain = svi_step(other, decoder, 1e-4)
        denoiser.network.compile()  # in place: its parameters keep their names
        ours, start = svi_step(denoiser, decoder, 1e-4), seconds(device)
        ours(x)
        first = seconds(device) - start
        compare(ours, plain, x, 10, turns, device)
        print(f"  {first:.1f}")


def by_hand(denoiser: Denoiser, decoder: Decoder, data: Tensor, batch: int) -> Callable[[], None]:
    """A step of the loop that one writes around SVI: rows, scheduler, averaged weights."""
    step, ema = svi_step(denoiser, decoder, 1e-4), EMA(denoiser)
    losses: list[float] = []

    def loop() -> None:
        losses.append(step(data[torch.randint(len(data), (batch,))]))
        ema.update()

    return loop


def looping(turns: int, device: torch.device) -> None:
    """Trainer.fit, which stops after every ten steps to let the loop by hand take as many."""
    print(
        f"\n{'ms per step of a training loop':<40} {'Trainer':>10} {'by hand':>10} {'ratio':>7}  wanted"
    )
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    for shared, (make, decoder, _, _) in itertools.product((None, dist.group.WORLD), SETTINGS):
        name, _, denoiser, x = make(device)
        data, batch = torch.cat([x] * 4), len(x)
        other = by_hand(copy.deepcopy(denoiser), decoder, data, batch)

        def model(x: Tensor, denoiser: Denoiser = denoiser, decoder: Decoder = decoder) -> None:
            pyro.module("trained", denoiser)
            with pyro.plate("data", len(x)):
                pyro.sample("x", Diffusion(denoiser, x.shape[1:], STEPS, decoder=decoder), obs=x)

        sides: list[list[float]] = [[], []]
        clock = [seconds(device)]

        def turn(
            trainer: Trainer,
            other: Callable = other,
            sides: list[list[float]] = sides,
            clock: list[float] = clock,
        ) -> None:
            if trainer.step % 10 == 0:
                clock.append(seconds(device))
                for _ in range(10):
                    other()
                clock.append(seconds(device))
                if trainer.step > 10:  # the first turn warms up
                    sides[0].append((clock[-2] - clock[-3]) / 10)
                    sides[1].append((clock[-1] - clock[-2]) / 10)

        print(f"{name + ', DDP' * (shared is not None):<40}", end=" ", flush=True)
        optimizer = functools.partial(torch.optim.AdamW, lr=1e-4, fused=True)
        trainer = Trainer(model, optimizer=optimizer, process_group=shared)
        trainer.fit(data, steps=10 * turns + 10, batch_size=batch, callback=turn, progress=False)
        show(sides)
        print("  <= 1.03" if shared is None else "")
    dist.destroy_process_group()


def sampling(turns: int, device: torch.device) -> None:
    """The sampler beside a loop by hand."""
    print(
        f"\n{'ms per 1000 sampling steps':<40} {'Diffusion':>10} {'bare':>10} {'ratio':>7}  wanted"
    )
    level = log_snr(torch.linspace(0, 1, STEPS + 1, device=device))
    alpha, sigma = torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()

    name, network, denoiser, _ = mlp(device)
    denoiser.eval()

    def read_v(x: Tensor, j: int) -> tuple[Tensor, float]:
        return alpha[j] * x - sigma[j] * network(x, level[j].expand(len(x))), 0.0

    for count in (64, 512):
        shown = f"{name.partition(',')[0]}, {count} samples"
        print(f"{shown:<40}", end=" ", flush=True)
        run_pair(denoiser, read_v, (count, 64), turns)

    name, network, denoiser, x = unet(device)
    denoiser.eval()
    values = denoiser.values

    def read_levels(x: Tensor, j: int) -> tuple[Tensor, Tensor]:
        evidence = (x[..., None] - alpha[j] * values) / sigma[j]
        out = network(x, level[j].expand(len(x)))
        probs = (out - 0.5 * evidence.square()).softmax(-1)
        mean = probs @ values
        return mean, (probs * (values - mean[..., None]).square()).sum(-1)

    shown = f"{name.rpartition(',')[0]}, 16 samples"
    print(f"{shown:<40}", end=" ", flush=True)
    run_pair(denoiser, read_levels, (16, *x.shape[1:]), turns)


def run_pair(denoiser: Denoiser, read: Callable, shape: tuple[int, ...], turns: int) -> None:
    decoder = QuantizedDecoder(LEVELS) if isinstance(denoiser, LevelsDenoiser) else None
    diffusion = Diffusion(denoiser, shape[1:], STEPS, decoder=decoder)
    device = diffusion.device
    bare = bare_sampler(read, device)
    compare(
        lambda n: diffusion.sample((n,)),
        lambda n: bare(torch.randn(n, *shape[1:], device=device)),
        *(shape[0], 1, turns, device),
    )
    print("  <= 1.05")


PARTS = {"training": training, "looping": looping, "sampling": sampling, "compiled": compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--turns", type=int, default=15, help="turns of each side when training")
    parser.add_argument("--sampling-turns", type=int, default=5)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=("training", "looping", "sampling")
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    on = args.device
    card = torch.cuda.get_device_name(on) if on.type == "cuda" else ""
    print(f"{torch.get_num_threads()} threads {card}, torch {torch.__version__}")
    for name in args.parts:
        PARTS[name](args.sampling_turns if name == "sampling" else args.turns, on)


if __name__ == "__main__":
    main()
