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
RATES = {"AdamW": (1e-3, 4e-3), "Amos": (0.01, 0.3)}
# Those of the picture.
SHOWN = {"moons": {"AdamW": 4e-3, "Amos": 0.3}, "digits": {"AdamW": 4e-3, "Amos": 0.01}}


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


def curve(kind: str, rate: float, name: str, steps: int) -> tuple[list[float], float]:
    """Bound of held-out rows (nats a row) every so many steps; bytes of state over those of the weights."""
    torch.manual_seed(0)
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
        {"AdamW": torch.optim.AdamW, "Amos": Amos}[kind], {"lr": rate}, clip_norm=100.0
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
    steps, fine = max(int(600 * scale), 2), True
    print(
        f"held-out bound, nats a row, after {steps} steps; the better of two rates each, by the same rows"
    )
    print(
        f"{'data':>7} {'AdamW':>9} {'Amos':>9} {'Amos is there after':>20} {'state / weights':>18}"
    )
    for name in ("moons", "digits"):
        (old, more), (new, less) = (
            max((curve(kind, rate, name, steps) for rate in rates), key=lambda run: run[0][-1])
            for kind, rates in RATES.items()
        )
        at = next((EVERY * (i + 1) for i, bound in enumerate(new) if bound >= old[-1]), None)
        print(
            f"{name:>7} {old[-1]:>9.3f} {new[-1]:>9.3f} {at or 'not there':>20} {more:>8.2f}, {less:.5f}",
            flush=True,
        )
        fine &= less < more and at is not None
    return fine
