"""Heavy-tailed data under normal and under Student-t noise: density, tails and how far they reach.

Data are returns of three correlated assets, made with a fixed seed: one market factor, one more for each
asset, all scaled by a volatility that is shared, so that large moves come together, as in markets. Their tail
index is 3.5. The same network is trained for the same number of steps by the same weighted regression under
both processes; the density is that of the probability flow, the samples are those of a deterministic sampler.

Run: python examples/heavy_tails.py [--df 4] [--steps 1500] [--samples 20000]
"""

import argparse
import json
import math
import time
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import trange

from pyro_diffusion import GaussianProcess, LogLinear, nn, schedules
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.distributions.objectives import DecoderStep, ReverseStep
from pyro_diffusion.distributions.regressions import Regression
from pyro_diffusion.dynamics import ODESolver
from pyro_diffusion.processes import ForwardProcess, StudentTProcess
from pyro_diffusion.samplers import AdamsMoulton

ASSETS, TAIL = 3, 3.5
LOADINGS = torch.tensor([0.9, 0.6, -0.4])
# Share of the draws that count as the tail.
RARE = 1e-3


def returns(count: int, seed: int) -> Tensor:
    """Draws of the data, (count, 3), of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, 1 + ASSETS, generator=generator)
    own = (1 - LOADINGS.square()).sqrt() * factors[:, 1:]
    half = torch.full((count, 1), TAIL / 2)
    kappa = torch._standard_gamma(half, generator=generator) / half
    scale = math.sqrt((TAIL - 2) / TAIL)
    return scale * (LOADINGS * factors[:, :1] + own) * kappa.rsqrt()


class Tempered(Regression):
    r"""Squared error of the data, each x_t weighted by :math:`1/(1 + |x_t|^2/(d\,n^2))`.

    A weight that depends on x_t alone leaves the posterior mean the best answer, and far draws of
    heavy-tailed data do not rule the gradient.
    """

    def error(self, step: ReverseStep | DecoderStep) -> Tensor:
        """The error at t over the number of steps, batch shape."""
        t = step.t
        size = (step.xt / torch.hypot(t.alpha, t.sigma)).square().mean(-1)
        error = (1 + t.log_snr.exp()) * (step.x0 - step.posterior.mean).square()
        return error.sum(-1) / (1 + size) / step.steps


def fit(process: ForwardProcess, train: Tensor, args: argparse.Namespace) -> GaussianDenoiser:
    """Plain SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    network = nn.MLP(ASSETS, (args.width, args.width))
    denoiser = GaussianDenoiser(network, process)

    def model(x: Tensor) -> None:
        pyro.module("denoiser", denoiser)
        diffusion = Diffusion(denoiser, (ASSETS,), 1000, objective=Tempered())
        with pyro.plate("data", len(x)), poutine.scale(scale=1 / x.numel()):
            pyro.sample("x", diffusion, obs=x)

    optimizer = ClippedAdam({"lr": args.lr, "lrd": 0.03 ** (1 / args.steps)})
    svi = SVI(model, lambda x: None, optimizer, Trace_ELBO())
    for _ in trange(args.steps, disable=not args.progress, leave=False):
        svi.step(train[torch.randint(len(train), (args.batch,))])
    return denoiser.eval()


def tails(x: Tensor) -> dict[str, tuple[float, float]]:
    """Numbers of the tails of the first asset with standard errors.

    Quantiles (their errors by the binomial interval), and Hill's estimate of the tail index of its absolute
    value from the largest percent.
    """
    first, count = x[:, 0].sort().values, len(x)
    found = {}
    for share in (RARE, 1 - RARE):
        place, spread = share * count, math.sqrt(share * (1 - share) * count)
        low, middle, high = (
            float(first[round(min(max(i, 0), count - 1))])
            for i in (place - spread, place, place + spread)
        )
        found[f"quantile {share:g}"] = (middle, (high - low) / 2)
    top = max(count // 100, 2)
    largest = x[:, 0].abs().topk(top).values
    index = 1 / float((largest[:-1] / largest[-1]).log().mean())
    found["tail index"] = (index, index / math.sqrt(top - 1))
    return found


def exceedances(x: Tensor, radius: float) -> tuple[float, float]:
    """How many times too often |x| exceeds the data's quantile of 1 - RARE, and its standard error."""
    share = float((x.norm(dim=-1) > radius).double().mean())
    return share / RARE, math.sqrt(max(share, 1 / len(x)) / len(x)) / RARE


def show(draws: dict[str, Tensor], path: Path) -> None:
    """How often |x| exceeds r, on logarithmic axes."""
    figure = Figure(figsize=(5.5, 4.0))
    axis = figure.subplots()
    styles = {
        "data": ("black", "-"),
        "normal": ("tab:blue", "--"),
        "Student-t": ("tab:orange", "-."),
    }
    for name, x in draws.items():
        radius = x.norm(dim=-1).sort(descending=True).values
        share = torch.arange(1, len(radius) + 1) / len(radius)
        color, line = styles[name]
        axis.loglog(radius, share, line, color=color, label=name)
    axis.set(xlabel="r", ylabel="share of |x| > r", xlim=(0.5, None), ylim=(1e-5, 1.2))
    axis.legend(title="noise")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/heavy_tails"), help="output folder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--df", type=float, default=4.0, help="degrees of freedom of the noise")
    parser.add_argument("--points", type=int, default=5000, help="training data")
    parser.add_argument("--held-out", type=int, default=1000, help="data that are scored")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=64, help="of the network's two layers")
    parser.add_argument("--solver-steps", type=int, default=30, help="steps of the flow's density")
    parser.add_argument("--chain", type=int, default=40, help="steps of the sampler")
    parser.add_argument("--samples", type=int, default=20_000, help="draws of each model")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = returns(args.points, 0), returns(args.held_out, 1)
    truth = returns(1_000_000, 2)
    radius = float(truth.norm(dim=-1).quantile(1 - RARE))
    schedule = LogLinear(7.0, -9.0)
    models = {"normal": GaussianProcess(schedule), "Student-t": StudentTProcess(schedule, args.df)}
    rows = {"data": {**tails(truth), "exceedances": exceedances(truth, radius)}}
    draws, densities = {"data": truth[:: max(len(truth) // args.samples, 1)]}, {}
    for name, process in models.items():
        began = time.perf_counter()
        denoiser = fit(process, train, args)
        seconds = time.perf_counter() - began
        flow = ProbabilityFlow(
            denoiser, (ASSETS,), solver=ODESolver("rk4", steps=args.solver_steps)
        )
        with torch.no_grad():
            densities[name] = flow.log_prob(test)
        grid = schedules.focused_log_snr(schedule, args.chain)
        pyro.set_rng_seed(args.seed)
        chain = Diffusion(denoiser, (ASSETS,), times=grid, sampler=AdamsMoulton())
        draws[name] = chain.sample((args.samples,))
        value = densities[name]
        rows[name] = {
            "log-density": (float(value.mean()), float(value.std()) / math.sqrt(len(value))),
            **tails(draws[name]),
            "exceedances": exceedances(draws[name], radius),
            "seconds": (seconds, 0.0),
        }
    print(f"{'':<16}" + "".join(f"{name:>20}" for name in rows))
    for name in dict.fromkeys(key for row in rows.values() for key in row):
        cells = (row.get(name) for row in rows.values())
        text = "".join(f"{'' if c is None else f'{c[0]:.3f} +- {c[1]:.3f}':>20}" for c in cells)
        print(f"{name:<16}{text}" if name != "log-density" else f"{name:<16}{text}  (ODE, nats)")
    gap = densities["Student-t"] - densities["normal"]
    paired = (float(gap.mean()), float(gap.std()) / math.sqrt(len(gap)))
    print(f"log-density, Student-t less normal: {paired[0]:.4f} +- {paired[1]:.4f} nats a datum")
    metrics = {"rows": rows, "paired": paired}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    show(draws, args.out / "tails.png")
    print(f"tails.png and metrics.json are in {args.out}")


if __name__ == "__main__":
    main()
