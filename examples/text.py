"""Characters by masked diffusion: the same `log_prob`, over symbols instead of numbers.

A window of the text is one datum. The forward process masks characters one by one until none is left, a
bidirectional transformer restores them, and the continuous-time bound of held-out windows, in bits per
character, stands beside two kinds of models of the same windows: counts of n-grams, smoothed by Kneser and
Ney's method, and autoregression by the same transformer, causal, trained for as many steps of the same size
(on a GPU, fewer: it knows the text by heart before). Of both, the weights that were best on the validation
part are kept. An importance-weighted bound of the same diffusion, on some of the windows, shows how much is
the bound's.

The text is two chapters of Alice's Adventures in Wonderland (data/alice.txt), or any file. A GPU is used if
there is one (--device).

Run: python examples/text.py [--text FILE] [--minutes MINUTES]
"""

import argparse
import gzip
import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from text_baselines import Autoregressive, kneser_ney
from timed_training import Clock
from torch import Tensor

from pyro_diffusion import (
    Absorbing,
    CategoricalDenoiser,
    Trainer,
    evaluate,
    plotting,
    samplers,
    schedules,
)
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC
from pyro_diffusion.nn import Transformer
from pyro_diffusion.train.history import History

MODELS = ("diffusion", "autoregressive")
LARGE = 200_000  # characters from which on a text is large
# defaults: of a small text, of a large one, of a large one on a GPU
SIZES = {
    "steps": (2500, 2400, 6000),
    "causal_steps": (2500, 2400, 2000),
    "batch": (32, 32, 256),
    "length": (64, 128, 256),
    "width": (128, 256, 384),
    "depth": (3, 4, 6),
    "heads": (4, 4, 6),
    "dropout": (0.05, 0.0, 0.2),
    "causal_dropout": (0.3, 0.1, 0.3),
    "held_out": (0.1, 0.05, 0.05),
    "weighted_windows": (64, 16, 64),
}


class Text:
    """A text as symbols 0 ... states - 1 of its training part's alphabet; the mask comes after them.

    Characters that the training part has not become its most frequent one.
    """

    def __init__(self, text: str, held_out: float, length: int) -> None:
        ends = [round((1 - 2 * held_out) * len(text)), round((1 - held_out) * len(text))]
        counts = Counter(text[: ends[0]])
        self.alphabet = "".join(sorted(counts))
        self.states = self.mask = len(self.alphabet)
        self.usual = self.alphabet.index(counts.most_common(1)[0][0])
        self.unknown = sum(c not in counts for c in text)
        self.training, *parts = self.encode(text).tensor_split(ends)
        # windows (n, length)
        self.validation, self.test = (
            p[: len(p) // length * length].view(-1, length) for p in parts
        )

    def encode(self, text: str) -> Tensor:
        """Text as symbols."""
        number = {c: i for i, c in enumerate(self.alphabet)}
        return torch.tensor([number.get(c, self.usual) for c in text])

    def decode(self, symbols: Tensor) -> str:
        """Symbols as text, masks as "_"."""
        return "".join((self.alphabet + "_")[i] for i in symbols.tolist())


def load(path: Path) -> str:
    """A text file, perhaps compressed, without the first line of those that begin with a comment."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8")
    return text.partition("\n")[2].strip() if text.startswith("// ") else text


def network(text: Text, args: argparse.Namespace, causal: bool) -> Transformer:
    """Of equal size for both models: logits of every character, from all others or from those before it."""
    return Transformer(
        states=text.states + 1,
        length=args.length,
        width=args.width,
        depth=args.depth,
        heads=args.heads,
        dropout=args.causal_dropout if causal else args.dropout,
        outputs=text.states,
        relative=True,
        noise_level=False,
        causal=causal,
    ).to(args.device)


def distribution(
    module: Transformer, text: Text, args: argparse.Namespace
) -> Callable[[], TorchDistribution]:
    """What makes the distribution of a window: of a causal network autoregression, else the diffusion."""
    if module.causal:
        return partial(Autoregressive, module, args.length, text.mask)
    # alpha(t) = 1 - t is the probability that a character is not masked yet
    process = Absorbing(schedules.Rectified.full(), text.states)
    denoiser = CategoricalDenoiser(module, process).to(args.device)
    return partial(DiffusionCTMC, denoiser, (args.length,), args.sample_steps)


def half(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16; the loss and the bound are in single precision all the same."""
    return torch.autocast(args.device.type, torch.bfloat16) if args.half else nullcontext()


def optimizers(module: Transformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    muon = getattr(torch.optim, "Muon", None)  # from torch 2.9 on; AdamW takes twice as many steps
    named = dict(module.named_parameters())
    matrices = [
        name
        for name in named
        if muon and "blocks." in name and name.endswith("weight") and "norm" not in name
    ]
    rest = [p for name, p in named.items() if name not in matrices]
    found = [torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        found.append(muon([named[name] for name in matrices], lr=0.02, weight_decay=0.05))
    return found


def schedule(
    over: Callable[[int], float], optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear start and a cosine's end, by the share of the training that is over at a step."""

    def factor(step: int) -> float:
        return min((step + 1) / 50, 0.03 + 0.97 * math.cos(0.5 * math.pi * over(step)) ** 2)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(
    make: Callable[[], TorchDistribution], module: Transformer, text: Text, args: Any
) -> History:
    """Fit by SVI on windows at any position; of the averaged weights, keep the best on validation."""
    pyro.clear_param_store()

    def model(x: Tensor) -> None:
        pyro.module("model", module)
        with pyro.plate("windows", len(x)):
            pyro.sample("x", make(), obs=x)  # a fresh one, and so is its noise

    steps = args.causal_steps if module.causal else args.steps
    clock = Clock(args.minutes, steps)
    trainer = Trainer(
        model,
        optimizer=lambda _: optimizers(module),
        schedule=partial(schedule, clock.share),
        ema=0.998,
        clip_norm=1.0,
        autocast=torch.bfloat16 if args.half else None,
        unit="bits/char",
    )
    return trainer.fit(
        text.training.to(args.device).unfold(0, args.length, 1),
        steps=steps,
        batch_size=args.batch,
        validation=lambda: score(make(), text.validation, 8, args).bits_per_dim.value,
        validate_every=max(steps // args.checks, 1),
        callback=lambda trainer: clock.over(trainer.step),
        progress=args.progress,
    )


def score(
    model: TorchDistribution, windows: Tensor, draws: int, args: argparse.Namespace
) -> evaluate.LogLikelihoodEstimate:
    """Log-likelihoods of windows: a bound of the diffusion, exact of autoregression."""
    windows, batch = windows.to(args.device), 64 if args.device.type == "cpu" else 256
    with torch.no_grad(), half(args):
        if isinstance(model, DiffusionCTMC):
            return evaluate.log_likelihood(model, windows, num_terms=draws, batch_size=batch)
        log_p = torch.cat([model.log_prob(rows) for rows in windows.split(batch)])
        return exact(log_p.cpu(), args.length)


def exact(log_p: Tensor, length: int) -> evaluate.LogLikelihoodEstimate:
    """Exact log-likelihoods."""
    return evaluate.LogLikelihoodEstimate(
        log_p.double(), torch.zeros(len(log_p)), "exact", 1, length
    )


def weighted(
    diffusion: DiffusionCTMC, windows: Tensor, args: argparse.Namespace
) -> evaluate.LogLikelihoodEstimate:
    """The importance-weighted bound of some windows: the log of a mean over orders, not the mean of logs.

    A chain of few steps unmasks a few characters at once, which loosens the bound a little.
    """
    chain = Diffusion(diffusion.denoiser, (args.length,), args.weighted_steps)
    some = windows[subset(len(windows), args.weighted_windows)].to(args.device)
    with half(args):
        return evaluate.importance_weighted(
            chain, some, num_samples=args.weighted_samples, progress=args.progress
        )


def subset(windows: int, count: int) -> Tensor:
    """Which of the windows: so many, evenly spread over the text; all if there are no more."""
    return torch.linspace(0, windows - 1, min(windows, count)).round().long()


def infill(diffusion: DiffusionCTMC, windows: Tensor, steps: int) -> Tensor:
    """Draw the masked characters of windows (n, length) given the others.

    The chain starts at the time by which that share of characters is masked; those that are not masked stay.
    """
    share = float((windows == diffusion.denoiser.process.mask).double().mean())
    times = torch.linspace(0, share, steps + 1)
    with torch.no_grad():
        return samplers.simulate(diffusion.denoiser, times, windows, diffusion.sampler)


def passage(diffusion: DiffusionCTMC, text: Text, args: argparse.Namespace) -> str:
    """A sampled window, continued by half a window at a time."""
    half = args.length // 2
    masks = torch.full((1, args.length), text.mask, device=args.device)
    found = infill(diffusion, masks, args.sample_steps)[0]
    while len(found) < args.characters:
        window = torch.cat([found[-half:], masks[0, half:]]).unsqueeze(0)
        found = torch.cat([found, infill(diffusion, window, args.sample_steps)[0, half:]])
    return text.decode(found)


def report(rows: dict[str, evaluate.LogLikelihoodEstimate]) -> dict[str, dict[str, float | str]]:
    """Print the table, each model paired with the first on the same windows, and return the figures."""
    first, metrics = next(iter(rows.values())), {}
    head = f"{'windows':>7} {'bits/char':>10} {'s.e.':>7} {'to first':>9} {'s.e.':>7} {'ratio':>6}   kind"
    print(f"\n{'held-out text':<20} {head}")
    for name, row in rows.items():
        figure, count = row.bits_per_dim, len(row.value)
        same = first.value[subset(len(first.value), count)]
        gap = (same - row.value) / (row.dimensions * math.log(2))
        error = float(gap.std()) / math.sqrt(count) if count > 1 else math.inf
        ratio = float(same.mean() / row.value.mean())
        numbers = (figure.value, figure.standard_error, float(gap.mean()), error, ratio)
        form = "{:<20} {:>7} {:>10.4f} {:>7.4f} {:>9.4f} {:>7.4f} {:>6.3f}   {}"
        print(form.format(name, count, *numbers, figure.kind))
        metrics[name] = {
            **vars(figure),
            "windows": count,
            "difference": numbers[2],
            "difference_error": error,
        }
    return metrics


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    bundled = Path(__file__).parent / "data" / "alice.txt"
    parser.add_argument("--text", type=Path, default=bundled, help="text to learn, UTF-8, or .gz")
    parser.add_argument("--gap", default="the ______ and the ______.", help="_ is to be filled in")
    parser.add_argument("--out", type=Path, default=Path("results/text"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=MODELS, help="which to train"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=device)
    limit = "training of a model ends then, if not before; the learning rate follows"
    parser.add_argument("--minutes", type=float, default=math.inf, help=limit)
    for name, (small, large, gpu) in SIZES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(small),
            help=f"{small}, or {large} for {LARGE} characters and more, {gpu} for these on a GPU",
        )
    parser.add_argument("--checks", type=int, default=12, help="validations during training")
    parser.add_argument("--draws", type=int, default=128, help="times evaluated per test window")
    parser.add_argument("--weighted-steps", type=int, default=64, help="steps of weighted chains")
    parser.add_argument("--weighted-samples", type=int, default=16, help="chains for each window")
    parser.add_argument("--sample-steps", type=int, default=128, help="steps of a sampled window")
    parser.add_argument("--characters", type=int, default=384, help="length of the passage")
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def show(
    chain: DiffusionCTMC,
    text: Text,
    rows: dict[str, evaluate.LogLikelihoodEstimate],
    args: argparse.Namespace,
) -> None:
    """What the weighted bound is of, and what the diffusion writes."""
    row = rows["diffusion, weighted"]
    of = subset(len(text.test), len(row.value))
    print(
        f"weighted: {args.weighted_samples} chains of {args.weighted_steps} steps, median effective sample "
        f"size {row.ess.median():.1f}, {len(of)} windows"
    )
    for name, other in rows.items():
        if len(of) < len(other.value):
            bits = -float(other.value[of].mean()) / (args.length * math.log(2))
            print(f"  {name} has {bits:.4f} bits/char there")
    window = torch.full((1, args.length), text.mask)
    gap = args.gap[: args.length]
    known = torch.tensor([c != "_" for c in gap])
    window[0, : len(gap)][known] = text.encode(gap)[known]
    filled = text.decode(infill(chain, window.to(args.device), args.sample_steps)[0])
    sample = passage(chain, text, args)
    print(f"\na gap filled in:\n{gap}\n{filled}\n\na sampled passage:\n{sample}\n")
    (args.out / "samples.txt").write_text(f"{gap}\n{filled}\n\n{sample}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    raw = load(args.text)
    size = 0 if len(raw) < LARGE else 1 if args.device.type == "cpu" else 2
    args.causal_steps = args.causal_steps or args.steps
    for name, choices in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, choices[size])
    text = Text(raw, args.held_out, args.length)
    print(f"{len(raw)} characters, {text.states} symbols, {text.unknown} replaced; {vars(args)}")
    rows: dict[str, evaluate.LogLikelihoodEstimate] = {}
    histories, chain = {}, None
    for name in args.models:
        pyro.set_rng_seed(args.seed)
        module = network(text, args, causal=name != "diffusion")
        make = distribution(module, text, args)
        histories[name] = train(make, module, text, args)
        rows[name] = score(make(), text.test, args.draws, args)
        if name == "diffusion":
            chain = make()
            rows["diffusion, weighted"] = weighted(chain, text.test, args)
        weights = sum(p.numel() for p in module.parameters())
        print(
            f"{name}: {weights} weights, {len(histories[name].losses)} steps in "
            f"{histories[name].seconds:.0f} s, best at {histories[name].best_step}; {rows[name].bits_per_dim}"
        )
    for order in range(2, 7):
        log_p = kneser_ney(text.training, text.test, order, text.states)
        rows[f"{order}-gram"] = exact(log_p, args.length)
    metrics = report(rows)
    for name, history in histories.items():
        metrics[name]["training_seconds"] = history.seconds
        metrics[name]["training_steps"] = len(history.losses)
        metrics[name]["validations"] = history.validations
    if chain is not None:
        show(chain, text, rows, args)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    ax = plotting.loss_curve(histories[args.models[0]].losses, unit="bits/char")
    ax.figure.savefig(args.out / "loss.png", dpi=120)
    print(f"the results are in {args.out}")


if __name__ == "__main__":
    main()
