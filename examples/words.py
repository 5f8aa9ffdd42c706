"""Words by deletion: strings of variable length that grow from nothing, letter by letter.

Data are the words of two chapters of Alice's Adventures in Wonderland (data/alice.txt) in the order of the
text; the last tenth of them is held out. The forward process loses letters until none is left, a
bidirectional transformer says which letters are missing, and where. The bound of held-out words, in bits per
character (a word's end is one), stands beside n-gram models of letters with an end of the word.

Run: python examples/words.py
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

from pyro_diffusion import EMA, denoisers, evaluate, plotting, processes, schedules
from pyro_diffusion.distributions import DiffusionCTMC
from pyro_diffusion.nn import Transformer

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
END = len(ALPHABET)  # the pad of strings, and the end of a word


def encode(words: list[str], length: int) -> Tensor:
    """Words as rows of letters and pads; longer ones are left out."""
    rows = [[ALPHABET.index(c) for c in word] for word in words if len(word) <= length]
    return torch.tensor([row + [END] * (length - len(row)) for row in rows])


def decode(word: Tensor) -> str:
    """A row of letters and pads as a word."""
    return "".join(ALPHABET[i] for i in word.tolist() if i < END)


def split(path: Path, length: int) -> list[Tensor]:
    """The first 80 % of the text's words to train on, the next and the last 10 %."""
    text = path.read_text(encoding="ascii").partition("\n")[2].lower()  # after the note of origin
    words = encode(re.findall("[a-z]+", text), length)
    return list(words.tensor_split([int(0.8 * len(words)), int(0.9 * len(words))]))


def build(args: argparse.Namespace) -> DiffusionCTMC:
    """A transformer that gives the letters to insert at every place, and words in continuous time."""
    network = Transformer(
        states=END + 1,
        length=args.length,
        width=args.width,
        depth=args.depth,
        dropout=args.dropout,
        outputs=END,
    )
    # alpha(t) = 1 - t is the probability that a letter is still there.
    process = processes.Deletion(schedules.Rectified.full(), symbols=END)
    denoiser = denoisers.InsertionDenoiser(network, process)
    return DiffusionCTMC(denoiser, (args.length,), steps=args.sample_steps)


def characters(words: Tensor) -> Tensor:
    """Letters of each word and its end (none if it fills its row)."""
    return ((words < END).sum(-1) + 1).clamp(max=words.shape[-1]).double()


def bits(log_p: Tensor, words: Tensor) -> tuple[float, float]:
    """Bits per character of words, and the standard error over words (of the ratio of means)."""
    count = characters(words)
    rate = float(-log_p.double().sum() / count.sum()) / math.log(2)
    residual = -log_p.double() / math.log(2) - rate * count
    return rate, float(residual.std() / count.mean()) / math.sqrt(len(words))


def train(
    diffusion: DiffusionCTMC, words: Tensor, validation: Tensor, args: argparse.Namespace
) -> list[float]:
    """Fit by SVI; of the averaged weights, keep the best on validation."""
    denoiser = diffusion.denoiser
    scale = 1 / (float(characters(words).sum()) * math.log(2))  # the loss in bits per character

    def model() -> None:
        pyro.module("denoiser", denoiser)
        with (
            poutine.scale(scale=scale),
            pyro.plate("words", len(words), subsample_size=args.batch) as index,
        ):
            pyro.sample("x", diffusion.replace(), obs=words[index])  # a new one has fresh noise

    def guide() -> None:
        """Nothing: the path is inside the site."""

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
            found = evaluate.log_likelihood(diffusion, validation, num_terms=args.check_draws)
        denoiser.train()
        now = bits(found.value, validation)[0]
        bar.set_postfix({"validation bits/char": f"{now:.3f}"})
        if now < best:
            best, kept = now, {name: value.clone() for name, value in ema.average.items()}
    denoiser.load_state_dict(kept)
    denoiser.eval()
    return losses


def ngram(order: int, lower: Tensor, words: Tensor, weight: float) -> Tensor:
    """Probabilities of the next character given ``order - 1`` before it, smoothed by those of less."""
    counts = torch.zeros((END + 1,) * order, dtype=torch.float64)
    context, now = pairs(words, order)
    counts.index_put_((*context, now), torch.ones(len(now), dtype=torch.float64), accumulate=True)
    return (counts + weight * lower) / (counts.sum(-1, keepdim=True) + weight)


def pairs(words: Tensor, order: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Every character, the end included, and those before it; before a word there are ends."""
    before = torch.full((len(words), order - 1), END)
    rows = torch.cat([before, words, torch.full((len(words), 1), END)], -1).unfold(-1, order, 1)
    # Up to the first end of each word.
    place = torch.arange(words.shape[-1] + 1)
    used = rows[place <= (words < END).sum(-1, keepdim=True)]
    return used[:, :-1].unbind(-1), used[:, -1]


def ngram_scores(words: Tensor, validation: Tensor, test: Tensor) -> dict[str, Tensor]:
    """log p of test words under n-gram models, each smoothed by the order below (on validation)."""
    lower, out = torch.full((END + 1,), 1 / (END + 1), dtype=torch.float64), {}
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        tables = [ngram(order, lower, words, weight) for weight in (0.5, 1, 2, 4, 8, 16, 32)]
        lower = max(tables, key=lambda table: float(score(table, validation).sum()))
        out[name] = score(lower, test)
    return out


def score(table: Tensor, words: Tensor) -> Tensor:
    """log p of each word, with its end."""
    context, now = pairs(words, table.dim())
    owner = torch.arange(len(words)).repeat_interleave((words < END).sum(-1) + 1)
    log_p = table[(*context, now)].log()
    return torch.zeros(len(words), dtype=torch.float64).index_add_(0, owner, log_p)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    bundled = Path(__file__).parent / "data" / "alice.txt"
    parser.add_argument("--text", type=Path, default=bundled, help="text to learn, ASCII")
    parser.add_argument("--out", type=Path, default=Path("results/words"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--length", type=int, default=14, help="letters of the longest word")
    parser.add_argument("--width", type=int, default=64, help="features of the transformer")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the transformer")
    parser.add_argument("--draws", type=int, default=64, help="terms drawn for each test word")
    parser.add_argument("--check-every", type=int, default=250, help="steps between validations")
    parser.add_argument("--check-draws", type=int, default=16, help="terms of a validation word")
    parser.add_argument("--sample-steps", type=int, default=48, help="steps of a sampled word")
    parser.add_argument("--words", type=int, default=60, help="words sampled")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    words, validation, test = split(args.text, args.length)
    diffusion = build(args)
    losses = train(diffusion, words, validation, args)
    bound = evaluate.log_likelihood(diffusion, test, num_terms=args.draws, progress=args.progress)
    rows = {"diffusion": bound.value, **ngram_scores(words, validation, test)}
    metrics = {}
    print(f"\n{'held-out words':<15} {'bits/char':>10} {'s.e.':>7} {'bits/word':>10}   kind")
    for name, log_p in rows.items():
        rate, error = bits(log_p, test)
        word = float(-log_p.double().mean()) / math.log(2)
        kind = "bound" if name == "diffusion" else "exact"
        print(f"{name:<15} {rate:>10.3f} {error:>7.3f} {word:>10.2f}   {kind}")
        metrics[name] = {"bits_per_character": rate, "error": error, "bits_per_word": word}
    sampled = diffusion.sample((args.words,))
    text = " ".join(map(decode, sampled))
    known = {decode(word) for word in words}
    share = sum(decode(word) in known for word in sampled) / len(sampled)
    metrics["sampled"] = {
        "share_in_training": share,
        "length": float((sampled < END).sum(-1).double().mean()),
        "length_of_data": float((words < END).sum(-1).double().mean()),
    }
    print(f"\nsampled words ({share:.0%} of them are in the training text):\n  {text}\n")
    (args.out / "samples.txt").write_text(text + "\n")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    ax = plotting.loss_curve(losses, unit="bits/char")
    ax.figure.savefig(args.out / "loss.png", dpi=120)
    print(f"figure, samples.txt and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
