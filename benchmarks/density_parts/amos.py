"""Amos beside AdamW: steps to the same bound on held-out rows, and the state of both."""

import pyro
import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, LearnedVariance
from pyro_diffusion.distributions import Diffusion, QuantizedDecoder
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.optim import Amos, JointOptim
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine

EVERY = 50
# Amos as its formulas have it, and with the two options of its paper.
OPTIONS = {"AdamW": {}, "Amos": {}, "with momentum": {"momentum": 0.9, "per_output": True}}
RATES = {"AdamW": (1e-3, 4e-3), "Amos": (0.03, 0.3), "with momentum": (0.1, 0.2)}


def moons() -> tuple[Tensor, Tensor, int | None]:
    from sklearn.datasets import make_moons

    x = torch.tensor(make_moons(4000, noise=0.06, random_state=0)[0], dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    return x[:3000], x[3000:], None


def digits() -> tuple[Tensor, Tensor, int | None]:
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data).long()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1500], x[1500:], 17


def curve(
    kind: str, rate: float, name: str, steps: int, seed: int = 0
) -> tuple[list[float], float]:
    """Bound of held-out rows (nats a row) every so many steps; bytes of state over those of the weights."""
    torch.manual_seed(seed)
    pyro.clear_param_store()
    train, test, levels = {"moons": moons, "digits": digits}[name]()
    size = train.shape[1]
    waves = (1, 2, 4, 8) if name == "moons" else ()
    network: nn.Module = MLP(size, (128, 128), outputs=2, frequencies=waves)
    denoiser: Denoiser = GaussianDenoiser(
        network, GaussianProcess(Cosine()), variance=LearnedVariance()
    )
    decoder = None if levels is None else QuantizedDecoder(levels)

    def view() -> Diffusion:
        return Diffusion(denoiser, (size,), steps=100, decoder=decoder)

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", view(), obs=x)

    optimizer = JointOptim(
        torch.optim.AdamW if kind == "AdamW" else Amos,
        {"lr": rate, **OPTIONS[kind]},
        clip_norm=100.0,
    )
    svi = pyro.infer.SVI(model, lambda x: None, optimizer, pyro.infer.Trace_ELBO())
    found = []
    for step in range(1, steps + 1):
        svi.step(train[torch.randint(len(train), (128,))])
        if step % EVERY == 0 or step == steps:
            with torch.random.fork_rng():
                torch.manual_seed(1)  # the same noise at every look
                bound = log_likelihood(view(), test[:256], num_terms=10)
            found.append(float(bound.value.mean()))
    states = optimizer.get_state()["optimizer"]["state"].values()
    held = sum(x.nbytes for state in states for x in state.values())
    return found, held / sum(p.nbytes for p in denoiser.parameters())


def main(scale: float) -> bool:
    """Print the table; whether Amos is there in no more steps, with less state."""
    steps, behind = max(int(600 * scale), 2), []
    print(
        f"held-out bound, nats a row, after {steps} steps, at the best of its rates; the steps after which it"
        " first had\nAdamW's last bound; bytes of state over those of the weights"
    )
    print(
        f"{'data':>7} {'optimizer':>14} {'rate':>6} {'bound':>9} {'there after':>12} {'state':>8}"
    )
    for name in ("moons", "digits"):
        wanted = most = 0.0
        for kind, rates in RATES.items():
            runs = [(*curve(kind, rate, name, steps), rate) for rate in rates]
            bounds, state, rate = max(runs, key=lambda run: run[0][-1])
            if kind == "AdamW":
                wanted, most = bounds[-1], state
            at = next(
                (min(EVERY * (i + 1), steps) for i, x in enumerate(bounds) if x >= wanted), None
            )
            print(
                f"{name:>7} {kind:>14} {rate:>6g} {bounds[-1]:>9.3f} {at or 'not there':>12} {state:>8.4f}",
                flush=True,
            )
            if kind == "with momentum" and (at is None or state >= most):
                behind.append(name)
    if behind:
        print(f"Amos with momentum is behind AdamW on {', '.join(behind)}")
    return not behind
