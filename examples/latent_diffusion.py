"""A latent diffusion model of images, trained end to end by plain Trace_ELBO.

    z ~ Diffusion(...)                 where a variational autoencoder has Normal(0, 1)
    x ~ Categorical(decoder(z))        a level of each pixel: 17 of 64, for the digits
    q(z | x) = Normal(encoder(x))

`Diffusion.log_prob` is an unbiased estimate of a lower bound of log p(z), so the ELBO with it is an unbiased
estimate of a lower bound of log p(x): nothing else changes. The same autoencoder with the normal prior, at
equal budget, stands beside it.

Run: python examples/latent_diffusion.py
Others: python examples/latent_diffusion.py --images glyphs --side 16, or --images FILE, .npy or of idx
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import image_data
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor, nn

from pyro_diffusion import (
    MLP,
    Diffusion,
    GaussianDenoiser,
    GaussianProcess,
    LearnedVariance,
    LogLinear,
    ProbabilityFlow,
    Trainer,
    evaluate,
    plotting,
)
from pyro_diffusion.dynamics import ODESolver


def perceptron(inputs: int, width: int, outputs: int, dropout: float) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.SiLU(), nn.Dropout(dropout)),
        *(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout)),
        nn.Linear(width, outputs),
    )


class LatentModel(nn.Module):
    """Model and guide of images of so many pixels and levels; ``prior`` says what z is drawn from."""

    def __init__(self, prior: str, pixels: int, levels: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.latent, self.chain, self.levels = args.latent, args.chain, levels
        self.encoder = perceptron(pixels, args.width, 2 * args.latent, args.dropout)
        self.decoder = perceptron(args.latent, args.width, pixels * levels, args.dropout)
        self.denoiser = None
        if prior == "diffusion":
            network = MLP(args.latent, hidden=(args.prior_width,) * 3, outputs=2)
            # Encoded digits are blurs: finer noise than log-SNR 5 would show nothing new.
            process = GaussianProcess(LogLinear(log_snr_max=5, log_snr_min=-6))
            self.denoiser = GaussianDenoiser(network, process, variance=LearnedVariance())

    def prior(self) -> dist.TorchDistribution:
        """The distribution of z."""
        if self.denoiser is None:
            return dist.Normal(torch.zeros(self.latent), 1.0).to_event(1)
        return Diffusion(self.denoiser, (self.latent,), steps=self.chain)

    def model(self, x: Tensor) -> Tensor:
        """Score images."""
        pyro.module("latent_model", self)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z).to_event(1), obs=x)

    def likelihood(self, z: Tensor) -> dist.Categorical:
        """p(x | z) of every pixel."""
        return dist.Categorical(logits=self.decoder(z).unflatten(-1, (-1, self.levels)))

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        loc, log_scale = self.encoder(2 * x / (self.levels - 1) - 1).chunk(2, -1)
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@torch.no_grad()
def elbo(latent: LatentModel, x: Tensor, draws: int) -> evaluate.LogLikelihoodEstimate:
    """The lower bound of every image, from Pyro's own traces.

    A trace scores z under a diffusion by one term of its bound. Evaluation takes more of them: the same
    expectation with less noise.
    """
    values, evaluations = [], 2 * draws  # of encoder and decoder
    for _ in range(draws):
        q = poutine.trace(latent.guide).get_trace(x)
        p = poutine.trace(poutine.replay(latent.model, q)).get_trace(x)
        p.compute_log_prob()
        q.compute_log_prob()
        log_prior, prior = p.nodes["z"]["log_prob"], latent.prior()
        if isinstance(prior, Diffusion):
            bound = evaluate.log_likelihood(prior, q.nodes["z"]["value"], num_terms=20)
            log_prior, evaluations = bound.value, evaluations + bound.evaluations
        values.append(p.nodes["x"]["log_prob"] + log_prior - q.nodes["z"]["log_prob"])
    each = torch.stack(values).double()
    error = each.std(0) / math.sqrt(draws)
    return evaluate.LogLikelihoodEstimate(
        each.mean(0), error, "lower bound", evaluations, x.shape[-1]
    )


def train(
    prior: str, data: dict[str, Tensor], levels: int, args: argparse.Namespace
) -> tuple[LatentModel, list[float]]:
    """Fit by SVI; of the averaged weights, keep those that are best on validation."""
    latent = LatentModel(prior, data["train"].shape[1], levels, args)
    draws = max(2, args.draws // 8)
    trainer = Trainer(
        latent.model,
        latent.guide,
        optimizer=partial(torch.optim.AdamW, lr=args.lr, weight_decay=args.weight_decay),
        ema=0.99,
        unit="bits/dim",
    )
    history = trainer.fit(
        data["train"],
        steps=args.steps,
        batch_size=args.batch,
        validation=lambda: elbo(latent, data["validation"], draws).bits_per_dim.value,
        validate_every=args.check_every,
        progress=args.progress,
    )
    best = min(history.validations.values())
    print(f"{prior} prior: best ELBO on validation {best:.4f} bits/dim")
    return latent, history.losses


@torch.no_grad()
def mean_images(latent: LatentModel, count: int) -> Tensor:
    """E[x | z] of fresh z: the pixels' own noise would hide what z has to say."""
    z = latent.prior().expand((count,)).sample()
    return latent.likelihood(z).probs @ torch.arange(latent.levels, dtype=z.dtype)


def draw(panels: dict[str, Tensor], shape: torch.Size, levels: int) -> Figure:
    """Grids of images side by side."""
    figure = Figure(figsize=(3.4 * len(panels), 3.7), layout="constrained")
    for ax, (title, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        plotting.sample_grid(images.view(-1, *shape), low=0, high=levels - 1, ax=ax)
        ax.set_title(title)
    return figure


@torch.no_grad()
def encodings(latent: LatentModel, x: Tensor) -> Tensor:
    """A draw of q(z | x) for every image: draws of the aggregate posterior."""
    q = poutine.trace(latent.guide).get_trace(x)
    z: Tensor = q.nodes["z"]["value"]
    return z


def evidence(latent: LatentModel, x: Tensor, draws: int) -> dict[str, float]:
    """Print log p(x), the prior scored by the flow, and the prior's fit to encodings."""
    found = evaluate.latent_log_likelihood(
        latent.model, latent.guide, x, num_samples=draws, seed=0, solver=ODESolver("rk4", steps=20)
    )
    ess, khat = found.importance.ess, found.importance.khat
    assert ess is not None and khat is not None
    figures = {
        "log p(x)": found.importance.mean.value,
        "standard_error": found.importance.mean.standard_error,
        "ELBO": found.elbo.mean.value,
        "ess": float(ess.mean()),
        "khat above 0.7": float((khat > 0.7).double().mean()),
    }
    if latent.denoiser is not None:
        z = encodings(latent, x)
        flow = ProbabilityFlow(latent.denoiser, (latent.latent,), solver=ODESolver("rk4", steps=20))
        unit = dist.Normal(torch.zeros(latent.latent), 1.0).to_event(1)
        ours, theirs = evaluate.flow_log_likelihood(flow, z).value, unit.log_prob(z)
        fitted = dist.MultivariateNormal(z.mean(0), z.T.cov()).log_prob(z)
        for name, other in (("N(0, I)", theirs), ("a normal fitted to these", fitted)):
            gain = ours.to(other) - other
            figures[f"fit over {name}"] = float(gain.mean())
            figures[f"fit over {name}, error"] = float(gain.std()) / math.sqrt(len(gain))
    print(
        ", ".join(f"{name} {value:.3f}" for name, value in figures.items()) + f" ({len(x)} images)"
    )
    return figures


def report(results: dict[str, evaluate.LogLikelihoodEstimate]) -> dict[str, dict[str, float | str]]:
    """Print the table; the difference is paired by image (another training seed moves it, too)."""
    print(f"\n{'test ELBO, bits/dim':<22} {'value':>8} {'s.e.':>8}   kind")
    for prior, result in results.items():
        figure = result.bits_per_dim
        print(
            f"{prior + ' prior':<22} {figure.value:>8.4f} {figure.standard_error:>8.4f}   {figure.kind}"
        )
    metrics: dict = {prior: vars(result.bits_per_dim) for prior, result in results.items()}
    if len(results) == 2:
        gain = results["diffusion"].value - results["normal"].value
        bits = gain / (results["normal"].dimensions * math.log(2))
        error = float(bits.std()) / math.sqrt(len(bits))
        print(f"{'normal - diffusion':<22} {float(bits.mean()):>8.4f} {error:>8.4f}   paired")
        metrics["normal - diffusion"] = {"value": float(bits.mean()), "standard_error": error}
    return metrics


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out = Path("results/latent_diffusion")
    parser.add_argument("--prior", choices=("both", "normal", "diffusion"), default="both")
    parser.add_argument("--out", type=Path, default=out, help="output folder")
    parser.add_argument(
        "--images", default="digits", help="digits, glyphs, photographs, or a file, .npy or of idx"
    )
    parser.add_argument("--side", type=int, default=28, help="pixels of glyphs and photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="training steps for each prior")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--latent", type=int, default=10, help="dimensions of z")
    parser.add_argument("--width", type=int, default=256, help="hidden units of en- and decoder")
    parser.add_argument("--prior-width", type=int, default=128, help="hidden units of the denoiser")
    parser.add_argument("--chain", type=int, default=1000, help="steps of the chain")
    parser.add_argument("--draws", type=int, default=32, help="draws of z per test image")
    parser.add_argument("--evidence", type=int, default=120, help="test images for log p(x)")
    parser.add_argument("--check-every", type=int, default=150, help="steps between validations")
    parser.add_argument("--samples", type=int, default=64, help="images to draw")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    images, results = image_data.load(args.images, args.side), {}
    shape, levels = images["test"].shape[1:], 1 + max(int(part.max()) for part in images.values())
    data = {name: part.flatten(1) for name, part in images.items()}
    panels = {"test data": data["test"][: args.samples]}
    for prior in ("normal", "diffusion") if args.prior == "both" else (args.prior,):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        latent, losses = train(prior, data, levels, args)
        results[prior] = elbo(latent, data["test"], args.draws)
        if args.evidence:
            evidence(latent.eval(), data["test"][: args.evidence], args.draws)
        panels[f"{prior} prior"] = mean_images(latent, args.samples)
        plotting.loss_curve(losses, unit="bits/dim").figure.savefig(args.out / f"loss_{prior}.png")
    draw(panels, shape, levels).savefig(args.out / "samples.png", dpi=120)
    metrics = report(results)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    print(f"figures and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
