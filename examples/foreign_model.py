"""A model that another library trained, as a prior: its likelihood, and images completed with evidence.

The first half is what such a library does, without this package: a network of integer timesteps learns to
predict noise on 8x8 digits, by the plain squared error, and is saved in the layout of diffusers (JSON and
safetensors). Where diffusers is installed, network and scheduler are its own, otherwise a small stand-in. The
second half reads the folder.

Run: python examples/foreign_model.py
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import digits
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from pyro_diffusion import (
    DDIM,
    Diffusion,
    ProgramLikelihood,
    QuantizedDecoder,
    TwistedSMC,
    denoisers,
    evaluate,
    foreign,
    plotting,
)

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
}


class StandIn(nn.Module):
    """A residual network of images and integer timesteps, as a stranger would write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 4 * width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=2, dilation=2),
            )
            for _ in range(4)
        )  # fmt: skip
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The noise in x."""
        angle = timestep[:, None] / 1000 ** torch.linspace(0, 1, 16).to(x)
        shifts = self.time(torch.cat([angle.sin(), angle.cos()], -1)).chunk(4, -1)
        hidden = self.first(x)
        for block, shift in zip(self.blocks, shifts, strict=True):
            hidden = hidden + block(hidden + shift[:, :, None, None])
        return self.last(nn.functional.silu(hidden))


def build(args: argparse.Namespace) -> nn.Module:
    """The network: diffusers' U-Net, or the stand-in."""
    if not args.diffusers:
        return StandIn(args.width)
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(args.width, 2 * args.width), dropout=0.1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def train_elsewhere(args: argparse.Namespace, images: Tensor, folder: Path) -> None:
    """Train a network as the scripts of diffusers do, and save it as they do."""
    network, count = build(args), SCHEDULER["num_train_timesteps"]
    signal = (1 - torch.linspace(1e-4, 0.02, count)).cumprod(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for _ in trange(args.steps, desc="training elsewhere", disable=not args.progress):
        x = images[torch.randint(len(images), (args.batch,))]
        timestep, noise = torch.randint(count, (args.batch,)), torch.randn_like(x)
        level = signal[timestep][:, None, None, None]
        out = network(level.sqrt() * x + (1 - level).sqrt() * noise, timestep.float())
        loss = nn.functional.mse_loss(getattr(out, "sample", out), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    if args.diffusers:
        from diffusers import DDPMScheduler

        network.save_pretrained(folder / "unet", safe_serialization=True)
        DDPMScheduler.from_config(SCHEDULER).save_pretrained(folder / "scheduler")
        return
    for place, name, content in [
        ("unet", "config.json", {"_class_name": "StandIn", "width": args.width}),
        ("scheduler", "scheduler_config.json", SCHEDULER),
    ]:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(network.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")


def likelihoods(denoiser: Any, data: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Bounds of the integers in bits per pixel: as it is, and with a variance measured on its mean."""
    decoder = QuantizedDecoder(digits.LEVELS)
    x0 = decoder.encode(data["train"], torch.float32)
    variance = denoisers.residual_variance(denoiser, x0, knots=args.knots)
    measured, test = denoisers.VarianceDenoiser(denoiser, variance), data["test"][: args.scored]
    found = {"independent pixels": digits.histogram(data["train"], test, digits.LEVELS)}
    for steps in (999, args.chain):
        for name, model in [("as it is", denoiser), ("variance measured", measured)]:
            chain = Diffusion(model, digits.EVENT_SHAPE, steps, decoder=decoder)
            found[f"{name}, {steps} steps"] = evaluate.log_likelihood(
                chain, test, num_terms=args.terms, progress=args.progress
            )
    print(f"\n{'bits/dim, test images':<32} {'value':>8} {'s.e.':>8}  kind")
    for name, result in found.items():
        figure = result.bits_per_dim
        print(f"{name:<32} {figure.value:>8.4f} {figure.standard_error:>8.4f}  {figure.kind}")
    return {name: vars(result.bits_per_dim) for name, result in found.items()}


def complete(denoiser: Any, x: Tensor, mean: Tensor, args: argparse.Namespace) -> tuple[Any, Any]:
    """Images from their left halves, with noise of a tenth of a grey level's range."""
    chain = Diffusion(denoiser, digits.EVENT_SHAPE, args.chain)

    def model(y: Tensor) -> None:
        with pyro.plate("images", len(y)):
            image = pyro.sample("x", chain)
            pyro.sample("y", dist.Normal(image[..., :4], 0.1).to_event(3), obs=y)

    y = x[..., :4] + 0.1 * torch.randn_like(x[..., :4])
    likelihood = ProgramLikelihood(model, (y,))
    particles = TwistedSMC(
        chain, likelihood, num_particles=args.particles, progress=args.progress
    ).run()
    print(f"\n{particles.verdict}")
    errors = {
        name: float((estimate - x)[..., 4:].square().mean().sqrt()) * (digits.LEVELS - 1) / 2
        for name, estimate in [("mean image", mean), ("posterior mean", particles.mean)]
    }
    print("hidden halves, root mean squared error in grey levels: ", end="")
    print(", ".join(f"{name} {value:.3f}" for name, value in errors.items()))
    evidence, error = particles.log_evidence_terms, particles.log_evidence_errors
    for i in range(len(x)):
        print(f"  image {i}: log p(y) {float(evidence[i]):8.2f} +- {float(error[i]):.2f} nats")
    return particles, {
        "rmse": errors,
        "log_evidence": evidence.tolist(),
        "log_evidence_error": error.tolist(),
    }


def draw(samples: Tensor, x: Tensor, particles: Any) -> Figure:
    """Samples of the model; truth, observed half, posterior mean and a draw."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plotting.sample_grid(samples, low=-1, high=1, ax=left)
    left.set_title("samples, DDIM")
    seen = torch.cat([x[..., :4], -torch.ones_like(x[..., 4:])], -1)
    rows = torch.stack([x, seen, particles.mean, particles.sample((1,))[0]]).flatten(0, 1)
    plotting.sample_grid(rows, columns=len(x), low=-1, high=1, ax=right)
    right.set_title("truth, observed, mean, draw")
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/foreign_model"), help="output folder"
    )
    installed = importlib.util.find_spec("diffusers") is not None
    parser.add_argument("--diffusers", action=argparse.BooleanOptionalAction, default=installed)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=16, help="channels of the network")
    parser.add_argument("--steps", type=int, default=3000, help="of training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--terms", type=int, default=10, help="of the bound, for each image")
    parser.add_argument("--scored", type=int, default=360, help="test images")
    parser.add_argument("--knots", type=int, default=30, help="noise levels of a measured variance")
    parser.add_argument("--chain", type=int, default=50, help="steps of the short chain")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--images", type=int, default=4, help="to complete")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    data, folder = digits.load(), args.out / "model"
    images = QuantizedDecoder(digits.LEVELS).encode(data["train"], torch.float32)
    train_elsewhere(args, images, folder)

    denoiser = foreign.load_diffusers(folder, None if args.diffusers else StandIn(args.width))
    denoiser.requires_grad_(False)
    metrics = {"bits_per_dim": likelihoods(denoiser, data, args)}
    x = QuantizedDecoder(digits.LEVELS).encode(data["test"][: args.images], torch.float32)
    particles, metrics["completion"] = complete(denoiser, x, images.mean(0), args)
    samples = Diffusion(denoiser, digits.EVENT_SHAPE, args.chain, sampler=DDIM()).sample((36,))
    draw(samples, x, particles).savefig(args.out / "foreign_model.png", dpi=150)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
