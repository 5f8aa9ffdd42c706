"""Characters by masked diffusion: the same `Diffusion`, over symbols instead of numbers.

The text is two chapters of Alice's Adventures in Wonderland (data/alice.txt) in 26 letters and the space, and
a window of it is one datum. The forward process masks characters one by one until none is left, a
bidirectional transformer restores them. The bound of held-out windows, in bits per character, stands beside
smoothed n-gram models of the same windows.

Run: python examples/text.py
"""

import argparse
import json
import math
import re
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from tqdm import trange

from pyro_diffusion import (
    EMA,
    Absorbing,
    CategoricalDenoiser,
    Diffusion,
    evaluate,
    plotting,
    samplers,
    schedules,
)
from pyro_diffusion.nn import Transformer

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
STATES = MASK = len(ALPHABET)  # symbols are 0 ... STATES - 1, and the mask comes after them


def encode(text: str) -> Tensor:
    """Text as symbols: whatever is no letter is a space, and "_" is the mask."""
    plain = re.sub("[^a-z_]+", " ", text.lower()).strip()
    return torch.tensor([MASK if c == "_" else ALPHABET.index(c) for c in plain])


def decode(symbols: Tensor) -> str:
    """Symbols as text."""
    return "".join((ALPHABET + "_")[i] for i in symbols.tolist())


def split(path: Path, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first 80 % of the text to train on; the next and the last 10 % as windows (n, length)."""
    text = encode(path.read_text(encoding="ascii").partition("\n")[2])  # after the note of origin
    parts = text.tensor_split([int(0.8 * len(text)), int(0.9 * len(text))])
    validation, test = (part[: len(part) // length * length].view(-1, length) for part in parts[1:])
    return parts[0], validation, test


def build(args: argparse.Namespace) -> Diffusion:
    """A transformer that gives the posterior of every character, and the chain over windows."""
    network = Transformer(
        states=STATES + 1,
        length=args.length,
        width=args.width,
        depth=args.depth,
        dropout=args.dropout,
        outputs=STATES,
    )
    # alpha(t) = 1 - t is the probability that a character is not masked yet.
    denoiser = CategoricalDenoiser(network, Absorbing(schedules.Rectified.full(), STATES))
    return Diffusion(denoiser, (args.length,), steps=args.chain)


def train(
    diffusion: Diffusion, text: Tensor, validation: Tensor, args: argparse.Namespace
) -> list[float]:
    """Fit by SVI on windows at any position; of the averaged weights, keep the best on validation."""
    denoiser, windows = diffusion.denoiser, text.unfold(0, args.length, 1)
    scale = 1 / (len(windows) * args.length * math.log(2))  # the loss in bits per character

    def model() -> None:
        pyro.module("denoiser", denoiser)
        with (
            poutine.scale(scale=scale),
            pyro.plate("windows", len(windows), subsample_size=args.batch) as index,
        ):
            fresh = Diffusion(denoiser, (args.length,), steps=args.chain)  # and so is its noise
            pyro.sample("x", fresh, obs=windows[index])

    def guide() -> None:
        """Nothing: the chain's latent variables are inside the site."""

    settings = {
        "optimizer": torch.optim.AdamW,
        "optim_args": {"lr": args.lr, "betas": (0.9, 0.98), "weight_decay": args.weight_decay},
        "max_lr": args.lr,
        "total_steps": args.steps + 1,
        "pct_start": 0.1,
        "cycle_momentum": False,
    }
    optimizer = pyro.optim.OneCycleLR(settings, clip_args={"clip_norm": 1.0})
    svi, ema = SVI(model, guide, optimizer, Trace_ELBO()), EMA(denoiser, 0.99)
    losses, best, kept = [], math.inf, {}
    bar = trange(1, args.steps + 1, desc="training", disable=not args.progress)
    for step in bar:
        losses.append(svi.step())
        optimizer.step()
        ema.update()
        if step % args.check_every and step != args.steps:
            continue
        denoiser.eval()
        with ema.average_parameters():
            now = evaluate.log_likelihood(diffusion, validation, num_terms=32).bits_per_dim.value
        denoiser.train()
        bar.set_postfix({"validation bits/char": f"{now:.3f}"})
        if now < best:
            best, kept = now, {name: value.clone() for name, value in ema.average.items()}
    denoiser.load_state_dict(kept)
    denoiser.eval()
    return losses


def ngrams(text: Tensor, validation: Tensor, orders: int) -> list[Tensor]:
    """Conditional probabilities of order 1, 2, ...: counts, smoothed towards the order below.

    p_k(c | h) = (n(h c) + m p_{k-1}(c | h')) / (n(h) + m), with m chosen on validation (MacKay & Peto 1995).
    """
    tables, lower = [], torch.full((STATES,), 1 / STATES)
    for order in range(1, orders + 1):
        counts = torch.zeros((STATES,) * order)
        rows = text.unfold(0, order, 1).unbind(1)
        counts.index_put_(rows, torch.ones(len(rows[0])), accumulate=True)
        total = counts.sum(-1, keepdim=True)
        candidates = [(counts + m * lower) / (total + m) for m in (0.5, 1, 2, 4, 8, 16, 32)]
        lower = max(candidates, key=lambda p: ngram_score([*tables, p], validation).mean.value)
        tables.append(lower)
    return tables


def ngram_score(tables: list[Tensor], windows: Tensor) -> evaluate.LogLikelihoodEstimate:
    """Windows stand alone, as they do for the diffusion: the first characters have a shorter past."""
    log_p = torch.zeros(len(windows), dtype=torch.float64)
    for i in range(windows.shape[1]):
        order = min(i + 1, len(tables))
        log_p += tables[order - 1][windows[:, i + 1 - order : i + 1].unbind(1)].log()
    return evaluate.LogLikelihoodEstimate(
        log_p, torch.zeros(len(windows)), "exact", 0, windows.shape[1]
    )


def infill(diffusion: Diffusion, windows: Tensor, steps: int, progress: bool = False) -> Tensor:
    """Draw the masked characters of windows (n, length) given the others.

    The chain starts at the time by which that share of characters is masked; those that are not masked stay.
    """
    share = float((windows == MASK).double().mean())
    times = torch.linspace(0, share, steps + 1)
    with torch.no_grad():
        return samplers.simulate(
            diffusion.denoiser, times, windows, diffusion.sampler, progress=progress
        )


def passage(diffusion: Diffusion, characters: int, args: argparse.Namespace) -> str:
    """A sampled window, continued by half a window at a time."""
    half = args.length // 2
    text = infill(diffusion, torch.full((1, args.length), MASK), args.sample_steps, args.progress)[
        0
    ]
    while len(text) < characters:
        rest = torch.full((args.length - half,), MASK)
        window = torch.cat([text[-half:], rest]).unsqueeze(0)
        text = torch.cat([text, infill(diffusion, window, args.sample_steps)[0, half:]])
    return decode(text)


def report(rows: dict[str, evaluate.LogLikelihoodEstimate]) -> dict[str, dict[str, float | str]]:
    """Print the table, each model paired with the first, and return the figures."""
    first, metrics = next(iter(rows.values())), {}
    print(
        f"\n{'held-out text':<12} {'bits/char':>10} {'s.e.':>7} {'to first':>9} {'s.e.':>7}   kind"
    )
    for name, row in rows.items():
        figure = row.bits_per_dim
        gap = (first.value - row.value) / (row.dimensions * math.log(2))
        error = float(gap.std()) / math.sqrt(len(gap))
        numbers = (figure.value, figure.standard_error, float(gap.mean()), error)
        print(
            "{:<12} {:>10.4f} {:>7.4f} {:>9.4f} {:>7.4f}   {}".format(name, *numbers, figure.kind)
        )
        metrics[name] = {**vars(figure), "difference": numbers[2], "difference_error": error}
    return metrics


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    bundled = Path(__file__).parent / "data" / "alice.txt"
    gap = "the white rabbit ____ ____ close"
    parser.add_argument("--text", type=Path, default=bundled, help="text to learn, ASCII")
    parser.add_argument("--gap", default=gap, help="a window with masks to fill in")
    parser.add_argument("--out", type=Path, default=Path("results/text"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000, help="training steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--length", type=int, default=32, help="characters in a window")
    parser.add_argument("--width", type=int, default=64, help="features of the transformer")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the transformer")
    parser.add_argument("--chain", type=int, default=1000, help="steps of the chain")
    parser.add_argument("--draws", type=int, default=256, help="steps evaluated per test window")
    parser.add_argument("--check-every", type=int, default=200, help="steps between validations")
    parser.add_argument("--sample-steps", type=int, default=64, help="steps of a sampled window")
    parser.add_argument("--characters", type=int, default=320, help="length of the passage")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    text, validation, test = split(args.text, args.length)
    diffusion = build(args)
    losses = train(diffusion, text, validation, args)
    bound = evaluate.log_likelihood(diffusion, test, num_terms=args.draws, progress=args.progress)
    rows = {"diffusion": bound}
    tables = ngrams(text, validation, orders=4)
    for order, name in enumerate(("unigram", "bigram", "trigram", "4-gram"), start=1):
        rows[name] = ngram_score(tables[:order], test)
    metrics = report(rows)
    window, gap = torch.full((1, args.length), MASK), encode(args.gap)[: args.length]
    window[0, : len(gap)] = gap
    filled = decode(infill(diffusion, window, args.sample_steps)[0])
    sample = passage(diffusion, args.characters, args)
    print(
        f"\na gap filled in:\n  {decode(window[0])}\n  {filled}\n\na sampled passage:\n  {sample}\n"
    )
    (args.out / "samples.txt").write_text(f"{decode(window[0])}\n{filled}\n\n{sample}\n")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    figures = {
        "loss": plotting.loss_curve(losses, unit="bits/char"),
        "bound_per_step": plotting.bound_per_step(
            diffusion.times[1:], bound.terms.steps, bound.terms.steps_standard_error
        ),
    }
    for name, ax in figures.items():
        ax.figure.savefig(args.out / f"{name}.png", dpi=120)
    print(f"figures, samples.txt and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
