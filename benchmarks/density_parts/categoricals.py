"""Categoricals by noise: the published table, draws, sums, and posteriors of a masked diffusion."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import CategoricalDenoiser
from pyro_diffusion.distributions import (
    ArgmaxCategorical,
    DiffusionCTMC,
    RelaxedArgmaxCategorical,
)
from pyro_diffusion.distributions.argmax_probabilities import LOG_PROBABILITIES
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.schedules import Rectified

UTILITIES = torch.tensor([0.0, 0.5, 1.2, -0.7], dtype=torch.float64)
NOISES = {
    "Gumbel": (dist.Gumbel(0.0, 1.0), (0.1547, 0.2550, 0.5135, 0.0768)),
    "exponential": (dist.Exponential(1.0), (0.1200, 0.2128, 0.6104, 0.0568)),
    "uniform(0, 3)": (dist.Uniform(0.0, 3.0), (0.1106, 0.2531, 0.6151, 0.0212)),
    "normal": (dist.Normal(0.0, 1.0), (0.1220, 0.2516, 0.5899, 0.0365)),
}
SYMBOLS = 8


class Chooser(nn.Module):
    """Utilities of the symbols at both places, and their logits under some noise. Time-free."""

    def __init__(self, noise: dist.Distribution) -> None:
        super().__init__()
        self.noise = noise
        width = 2 * (SYMBOLS + 1)
        self.layers = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 2 * SYMBOLS))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Logits of both places."""
        seen = nn.functional.one_hot(x, SYMBOLS + 1).flatten(-2).float()
        utilities = self.layers(seen).unflatten(-1, (2, SYMBOLS))
        return ArgmaxCategorical(utilities, self.noise, validate_args=False).logits


def gap_of_a_diffusion(noise: dist.Distribution, joint: Tensor, steps: int) -> tuple[float, float]:
    """log p less the bound of a masked diffusion that was trained on draws, and its standard error."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    denoiser = CategoricalDenoiser(Chooser(noise), Absorbing(Rectified.full(), SYMBOLS))
    law = dist.Categorical(probs=joint.flatten())

    def rows(count: int) -> Tensor:
        index = law.sample((count,))
        return torch.stack([index // SYMBOLS, index % SYMBOLS], -1)

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("data", len(x)):
            pyro.sample("x", DiffusionCTMC(denoiser, (2,), steps=2), obs=x)

    optimizer = pyro.optim.Adam({"lr": 3e-3})
    svi = pyro.infer.SVI(model, lambda x: None, optimizer, pyro.infer.Trace_ELBO())
    for _ in range(steps):
        svi.step(rows(128))
    x = rows(1000)
    bound = log_likelihood(DiffusionCTMC(denoiser, (2,), steps=2), x, num_terms=20)
    gaps = law.log_prob(SYMBOLS * x[:, 0] + x[:, 1]) - bound.value
    return float(gaps.mean()), float(gaps.std() / len(x) ** 0.5)


def main(scale: float) -> bool:
    """Print the tables; whether they are as wanted."""
    fine, draws = True, max(int(1_000_000 * scale), 1000)
    joint = torch.rand(SYMBOLS, SYMBOLS).pow(6)
    joint = joint / joint.sum()
    print(
        f"{'noise':>14} {'P(argmax = i)':>28} {'largest error':>14} {'draws, s.e.':>12}"
        f" {'sum - 1, K=200':>15} {'gap of a diffusion':>20}"
    )
    many = 0.5 * torch.randn(200, dtype=torch.float64)
    for name, (noise, expected) in NOISES.items():
        probs = ArgmaxCategorical(UTILITIES, noise).probs
        error = float((probs - torch.tensor(expected, dtype=probs.dtype)).abs().max())
        relaxed = RelaxedArgmaxCategorical(torch.tensor(1.0), UTILITIES, noise)
        shares = relaxed.sample((draws,)).argmax(-1).bincount(minlength=4) / draws
        off = float(((shares - probs) / (probs * (1 - probs) / draws).sqrt()).abs().max())
        (integral,) = [f for kind, (_, f) in LOG_PROBABILITIES.items() if isinstance(noise, kind)]
        total = float(integral(many).exp().sum() - 1)
        row = " ".join(f"{p:.4f}" for p in probs.tolist())
        print(
            f"{name:>14} {row:>28} {error:>14.1e} {off:>12.1f} {total:>15.1e}", end=" ", flush=True
        )
        fine &= error < 6e-5 and off < 4.5 and abs(total) < 1e-10
        if isinstance(noise, dist.Uniform):  # denies rare data in training, sooner or later
            print(f"{'not trained':>20}")
            continue
        gap, error = gap_of_a_diffusion(noise, joint, max(int(1000 * scale), 2))
        print(f"{gap:>11.4f} ({error:.4f})")
        fine &= gap - 3 * error < 0.05
    print(
        "error: from the published table of four digits; draws: largest deviation of a share in s.e."
        "\n(beyond 4.5: 1 in 10^4 tables); gap: log p less the bound in nats, two symbols of eight, trained"
    )
    return fine
