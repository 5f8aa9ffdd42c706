"""The same training script on one process or many: digits, with steps that all processes share.

Run: python examples/distributed.py
Two processes: torchrun --nproc-per-node 2 examples/distributed.py

A step has --batch rows whatever the number of processes, and the diffusion's noise is keyed by row: but for
dropout and rounding the losses are those of one process. A run that was killed goes on from its checkpoint,
also on another number of processes.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import digits
import pyro
import torch
import torch.distributed
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_diffusion import Trainer, evaluate, plotting


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/distributed"), help="folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400, help="training steps")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step, of all processes")
    parser.add_argument("--width", type=int, default=32, help="channels of the U-Net")
    parser.add_argument("--chain", type=int, default=1000, help="steps of the chain")
    parser.add_argument("--draws", type=int, default=96, help="steps evaluated per image")
    parser.add_argument("--samples", type=int, default=64, help="images to draw")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    args.blocks, args.dropout = 1, 0.2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group()
    world = torch.distributed.group.WORLD  # None for one process
    rank, ranks = (world.rank(), world.size()) if world else (0, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    data, denoiser = digits.load(), digits.build(args)

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", digits.diffusion(denoiser, args.chain), obs=x)

    trainer = Trainer(
        model,
        optimizer=partial(AdamW, lr=2e-3, weight_decay=0.05, fused=True),
        schedule=partial(CosineAnnealingLR, T_max=args.steps),
        ema=0.995,
        unit="bits/dim",
        process_group=world,
    )
    history = trainer.fit(
        data["train"],
        steps=args.steps,
        batch_size=args.batch // ranks,
        checkpoint=args.out / "checkpoint.safetensors",
        save_every=200,
        log=args.out / "log.csv",
        progress=args.progress,
    )
    chain, shared = digits.diffusion(denoiser, args.chain), {"seed": 0, "process_group": world}
    bound = evaluate.log_likelihood(chain, data["test"], num_terms=args.draws, **shared)
    images = evaluate.draw_samples(chain, args.samples, batch_size=16, **shared)
    if rank == 0:
        print(f"{ranks} process(es), test: {bound.bits_per_dim}")
        metrics = {"loss": history.losses[-1], "test": vars(bound.bits_per_dim)}
        (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        figure = plotting.sample_grid(images, low=0, high=digits.LEVELS - 1).figure
        figure.savefig(args.out / "samples.png", dpi=120)
    if world:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
