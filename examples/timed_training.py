"""Training for some minutes on any device: what the examples of larger images share.

The learning rate falls along a cosine that ends when the minutes do, or the steps, whichever is first. A run
that the clock ends is no repeatable one: how many steps it takes depends on the machine.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pyro_diffusion import Trainer
from pyro_diffusion.train.history import History

WARM_UP = 200  # steps in which the learning rate rises


def add_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Those of a training run."""
    parser.add_argument("--out", type=Path, default=Path(folder), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time at most")
    parser.add_argument("--steps", type=int, default=1_000_000, help="training steps at most")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the weights' average")
    parser.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute in bfloat16 while training",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the network for training: pays on a GPU",
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)


class Clock:
    """How much of a run is left, of its minutes and steps.

    It starts after the second step: the first finds what there is to train, the second compiles.
    """

    def __init__(self, minutes: float, steps: int) -> None:
        self.seconds, self.steps = 60 * minutes, steps
        self.start: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the second step."""
        return 0.0 if self.start is None else time.monotonic() - self.start

    def share(self, step: int) -> float:
        """The share of the run that is over at a step."""
        return min(max(self.elapsed / self.seconds, step / self.steps), 1.0)

    def rate(self, step: int) -> float:
        """What the learning rate is multiplied by."""
        return min(1.0, (step + 1) / WARM_UP) * math.cos(math.pi / 2 * self.share(step)) ** 2

    def over(self, step: int) -> bool:
        """Whether time is up, after a step."""
        if self.start is None and step >= 2:
            self.start = time.monotonic()
        return self.elapsed > self.seconds


def fit(
    model: Callable[[Tensor], None],
    network: nn.Module,
    data: Tensor,
    unit: str,
    args: argparse.Namespace,
) -> History:
    """Train a program by SVI on data on one device, and say how long that took."""
    clock = Clock(args.minutes, args.steps)

    def schedule(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, clock.rate)

    def after_step(trainer: Trainer) -> bool:
        if (
            args.compile and trainer.step == 1
        ):  # before, hooks of the first run would break its graph
            network.compile()
        return clock.over(trainer.step)

    trainer = Trainer(
        model,
        optimizer=partial(AdamW, lr=args.lr, weight_decay=args.weight_decay, fused=True),
        schedule=schedule,
        ema=args.ema,
        clip_norm=1.0,
        autocast=torch.bfloat16 if args.autocast else None,
        unit=unit,
    )
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    history = trainer.fit(
        data.to(args.device),
        steps=args.steps,
        batch_size=args.batch,
        log=args.out / "log.csv",
        log_every=50,
        callback=after_step,
        progress=args.progress,
    )
    count = sum(p.numel() for p in network.parameters())
    print(
        f"{count} weights, {trainer.step} steps of {args.batch} images in {clock.elapsed / 60:.2f} minutes, "
        f"and {time.monotonic() - start - clock.elapsed:.0f} s up to the second step; loss of the last "
        f"hundred {sum(history.losses[-100:]) / len(history.losses[-100:]):.4f} {unit}"
    )
    if args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{torch.cuda.get_device_name()}, {peak:.1f} GiB at most")
    return history


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """For scores and samples: whatever was compiled runs as it is written, without gradients."""
    stance = torch.compiler.set_stance("force_eager")
    with stance, torch.no_grad():
        yield
