"""What a posterior variance is worth: the bound against the number of steps.

Run: python benchmarks/variances.py

One mean, many variances: DDPM's two fixed choices, the optimal one per noise level measured on data
(Analytic-DPM), the per-coordinate ones of heads trained on the frozen mean (SN, NPR), and the optimal
sub-grid. First on a mixture whose exact variance is the floor, then on the trained digits of
examples/digits.py (trained here if results/digits has no checkpoint). All rows of a column score the same
data with the same noise. Heads are kept in results/variances/ and trained if they are not there; a plot
goes there too.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pyro.distributions import Delta, Normal, TorchDistribution
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_diffusion import checkpoint, evaluate
from pyro_diffusion.denoisers import (
    NPR,
    SN,
    Denoiser,
    MixtureDenoiser,
    VarianceDenoiser,
    analytic_variance,
    residual_variance,
    unit_variance,
)
from pyro_diffusion.denoisers.variance_heads import NoiseHead
from pyro_diffusion.distributions import Diffusion, MomentRegression
from pyro_diffusion.nn import MLP, UNet
from pyro_diffusion.optim import EMA, JointOptim
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, Level, uniform
from pyro_diffusion.schedules.optimal_grid import optimal_grids
from pyro_diffusion.unwrapping import per_coordinate

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import digits

STEPS = (10, 25, 50, 100, 200, 400, 1000)
Grids = dict[int, Tensor]
Row = tuple[Denoiser, Grids]


class Tape(Denoiser):
    """Remembers what a denoiser said, so that many variances of one mean cost one read of it."""

    def __init__(self, base: Denoiser) -> None:
        super().__init__(base.process)
        self.base, self.tapes, self.place = base, {}, 0

    def rewind(self, key: object) -> None:
        """Go to the start of the tape of one kind of grid."""
        self.tape, self.place = self.tapes.setdefault(key, []), 0

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """What the base says, or said."""
        if self.place == len(self.tape):
            law = per_coordinate(self.base(xt, t, **context))
            point = isinstance(law, Delta)
            self.tape.append((xt, law.mean, law.mean if point else law.variance.sqrt()))
        seen, mean, scale = self.tape[self.place]
        self.place += 1
        assert torch.equal(seen, xt), "rows of a table must see the same noise"
        return Normal(mean, scale, validate_args=False).to_event(self.process.event_dim)


class Seeing(nn.Module):
    """A network of twice the channels (or coordinates) that reads the state and its noise estimate."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
        """One number per coordinate of x."""
        return self.network(torch.cat([x, noise], 1), log_snr)[:, : self.channels]


def chain(denoiser: Denoiser, like: Diffusion, times: Tensor, **arguments: object) -> Diffusion:
    """The same chain with another denoiser and grid."""
    return Diffusion(denoiser, like.event_shape, times=times, decoder=like.decoder, **arguments)


def fit(
    base: Denoiser,
    head: NoiseHead,
    network: nn.Module,
    batch: Callable[[], Tensor],
    like: Diffusion,
    args: argparse.Namespace,
    name: str,
) -> VarianceDenoiser:
    """A head on a frozen mean, by plain SVI; from its file if it is there."""
    denoiser = VarianceDenoiser(base.requires_grad_(False), head, network, show_noise=True)
    description = {"steps": args.head_steps, "batch": args.head_batch, "seed": args.seed}
    weights = sum(float(w.double().abs().sum()) for w in base.state_dict().values())
    key = hashlib.sha256(f"{description} {network} {head} {weights}".encode()).hexdigest()[:8]
    path = args.out / f"{name}_{key}.safetensors"
    if path.exists():
        checkpoint.load_module(path, network, description)
        return denoiser.eval()
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    objective = MomentRegression(deviance=isinstance(head, NPR))

    def model(x: Tensor) -> None:
        pyro.module("head", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", chain(denoiser, like, like.times, objective=objective), obs=x)

    optim = JointOptim(
        torch.optim.AdamW,
        {"lr": 2e-3, "weight_decay": 0.01},
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {"T_max": args.head_steps},
    )
    svi, ema = SVI(model, lambda x: None, optim, Trace_ELBO()), EMA(network, 0.99)
    denoiser.train()
    for _ in range(args.head_steps):
        svi.step(batch())
        optim.step()
        ema.update()
    with ema.average_parameters():
        checkpoint.save_module(path, network, description)
    checkpoint.load_module(path, network, description)
    return denoiser.eval()


def table(
    rows: dict[str, Row],
    tape: Tape,
    like: Diffusion,
    data: Tensor,
    all_terms: int,
    args: argparse.Namespace,
) -> dict[str, dict[int, evaluate.LogLikelihoodEstimate]]:
    """Bounds of all rows at all numbers of steps, per datum."""
    results: dict[str, dict[int, evaluate.LogLikelihoodEstimate]] = {name: {} for name in rows}
    for steps in STEPS:
        draws = None if steps <= all_terms else args.draws
        for name, (denoiser, grids) in rows.items():
            times = grids.get(steps)
            tape.rewind("even" if times is None else name)
            pyro.set_rng_seed(args.seed)
            law = chain(denoiser, like, uniform(steps) if times is None else times)
            results[name][steps] = evaluate.log_likelihood(
                law, data, num_terms=draws, batch_size=args.rows
            )
        tape.tapes.clear()
    return results


def show(
    results: dict[str, dict[int, evaluate.LogLikelihoodEstimate]],
    figure: Callable[[evaluate.LogLikelihoodEstimate], Tensor],
    unit: str,
) -> None:
    """The table, with two errors: over data, and of the draws alone."""
    header = "".join(f"{steps:>9}" for steps in STEPS)
    print(f"{unit:<32}{header}")
    for name, row in results.items():
        print(f"{name:<32}" + "".join(f"{float(figure(row[k]).mean()):>9.4f}" for k in STEPS))
    errors = (figure(results["analytic"][k]) for k in STEPS)
    line = "".join(f"{float(e.std()) / math.sqrt(len(e)):>9.4f}" for e in errors)
    print(f"{'standard error over data':<32}{line}")
    worst = {
        k: max(r[k].monte_carlo_error / r[k].dimensions / math.log(2) for r in results.values())
        for k in STEPS
    }
    print(f"{'largest Monte-Carlo error, bits':<32}" + "".join(f"{worst[k]:>9.4f}" for k in STEPS))


def bits(result: evaluate.LogLikelihoodEstimate) -> Tensor:
    """-log2 p(x) / d per datum."""
    return -result.value / (result.dimensions * math.log(2))


def mixture(d: int, args: argparse.Namespace) -> bool:
    """The 25-component mixture: gap to log p in nats per dimension."""
    print(
        f"\n25 components, means N(0, I), variance 0.05, d = {d}: gap to log p, cosine grid",
        flush=True,
    )
    means = torch.randn(25, d, generator=torch.Generator().manual_seed(d))
    process = GaussianProcess(Cosine(8.77, -9))
    exact = MixtureDenoiser(process, torch.ones(25), means, 0.05)
    tape, law = Tape(exact), exact.data()
    like = Diffusion(exact, (d,), 1000)
    train, test = law.sample((4000,)), law.sample((args.data,))
    analytic = analytic_variance(exact, train)

    def head(kind: NoiseHead, name: str) -> VarianceDenoiser:
        network = Seeing(MLP(2 * d, hidden=(128, 128)), d)
        fitted = fit(
            exact, kind, network, lambda: law.sample((512,)), like, args, f"mixture_{d}_{name}"
        )
        return VarianceDenoiser(tape, kind, fitted.network, show_noise=True).eval()

    grids = optimal(VarianceDenoiser(exact, analytic), train[:500])
    rows: dict[str, Row] = {
        "point mass (beta-tilde)": (VarianceDenoiser(tape), {}),
        "beta": (VarianceDenoiser(tape, unit_variance), {}),
        "analytic": (VarianceDenoiser(tape, analytic), {}),
        "NPR": (head(NPR(), "npr"), {}),
        "SN": (head(SN(skip=True), "sn"), {}),
        "analytic, optimal sub-grid": (VarianceDenoiser(tape, analytic), grids),
        "exact per coordinate": (tape, {}),
        "exact, optimal sub-grid": (tape, optimal(exact, train[: 2000 // d])),
    }
    results = table(rows, tape, like, test, 1000, args)
    truth = law.log_prob(test).double()
    show(results, lambda r: (truth - r.value) / d, "nats/dim")
    return verdict(results)


def optimal(denoiser: Denoiser, data: Tensor, count: int = 1000) -> Grids:
    """Optimal sub-grids of ``count`` uniform steps."""
    pyro.set_rng_seed(1)
    times = uniform(count)
    costs = evaluate.chain_costs(denoiser, data, times)
    return optimal_grids(times, costs, [k for k in STEPS if k <= count])


def verdict(results: dict[str, dict[int, evaluate.LogLikelihoodEstimate]]) -> bool:
    """What the papers' ordering asks of the table."""

    slack = 0.003  # bits/dim beyond chance that still count as no worse

    def above(name: str, other: str, steps: int) -> tuple[float, float]:
        gap = bits(results[name][steps]) - bits(results[other][steps])
        return float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))

    point = "point mass (beta-tilde)"
    checks = {
        "analytic below beta at every K": all(above("analytic", "beta", k)[0] < 0 for k in STEPS),
        "point mass far above at K = 10, 25 (> 0.5 bits/dim)": all(
            above(point, "analytic", k)[0] > 0.5 for k in STEPS[:2]
        ),
        "NPR no worse than analytic (0.003 + 2 standard errors)": all(
            gap <= slack + 2 * error for gap, error in (above("NPR", "analytic", k) for k in STEPS)
        ),
        "SN no worse than analytic (0.003 + 2 standard errors)": all(
            gap <= slack + 2 * error for gap, error in (above("SN", "analytic", k) for k in STEPS)
        ),
        "optimal sub-grid no worse than uniform": all(
            gap <= slack + 2 * error
            for gap, error in (above("analytic, optimal sub-grid", "analytic", k) for k in STEPS)
        ),
    }
    best = min(results, key=lambda name: float(bits(results[name][50]).mean()))
    rise = float((bits(results[best][50]) - bits(results[best][1000])).mean())
    checks[f"best at K = 50 ({best}) within 0.03 bits/dim of its K = 1000: {rise:.4f}"] = (
        rise <= 0.03
    )
    for text, fine in checks.items():
        print(f"  {'as wanted' if fine else 'NOT as wanted'}: {text}")
    return all(checks.values())


def images(args: argparse.Namespace) -> bool:
    """The trained digits: bits per dimension of test images."""
    data = digits.load()
    base = digits.trained(args.digits)
    like = digits.diffusion(base, 1000)
    train = like.encode(data["train"])
    tape, test = Tape(base), data["test"][: args.images]
    pyro.set_rng_seed(args.seed)
    analytic = analytic_variance(base, train[:400])
    held_out = like.encode(data["validation"])
    residual = residual_variance(base, held_out, num_samples=2)

    def batch() -> Tensor:
        return data["train"][torch.randint(len(train), (args.head_batch,))]

    def head(kind: NoiseHead, name: str) -> VarianceDenoiser:
        network = Seeing(UNet(2, width=16), 1)
        fitted = fit(base, kind, network, batch, like, args, f"digits_{name}")
        return VarianceDenoiser(tape, kind, fitted.network, show_noise=True).eval()

    rows: dict[str, Row] = {
        "point mass (beta-tilde)": (VarianceDenoiser(tape), {}),
        "beta": (VarianceDenoiser(tape, unit_variance), {}),
        "analytic": (VarianceDenoiser(tape, analytic), {}),
        "mean square residual": (VarianceDenoiser(tape, residual), {}),
        "NPR": (head(NPR(), "npr"), {}),
        "SN": (head(SN(skip=True), "sn"), {}),
        "analytic, optimal sub-grid": (
            VarianceDenoiser(tape, analytic),
            optimal(VarianceDenoiser(base, analytic), held_out),
        ),
        "levels' own": (tape, {}),
        "levels' own, optimal sub-grid": (tape, optimal(base, held_out[:60])),
    }
    print(f"\nDigits, {len(test)} test images: bound in bits/dim", flush=True)
    results = table(rows, tape, like, test, args.all_terms, args)
    show(results, bits, "bits/dim")
    plot(results, args.out / "bound_vs_steps.png")
    return verdict(results)


def plot(results: dict[str, dict[int, evaluate.LogLikelihoodEstimate]], path: Path) -> None:
    """Bound against steps, one line a row."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, row in results.items():
        marker, style = ("s", "--") if "sub-grid" in name else ("o", "-")
        values = [float(bits(row[k]).mean()) for k in STEPS]
        ax.plot(STEPS, values, style, marker=marker, markersize=4, label=name)
    ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="test bound (bits/dim)")
    ax.set_xticks(STEPS, [str(k) for k in STEPS])
    ax.set_yticks(ticks := [1.75, 2.1, 2.5, 3, 4, 6, 10, 20, 50, 100], [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/variances"))
    parser.add_argument("--digits", type=Path, default=Path("results/digits"))
    parser.add_argument("--images", type=int, default=360, help="test images scored")
    parser.add_argument("--data", type=int, default=1000, help="mixture data scored")
    parser.add_argument("--rows", type=int, default=1000, help="data read together")
    parser.add_argument(
        "--all-terms", type=int, default=50, help="images: read all of up to so many steps"
    )
    parser.add_argument("--draws", type=int, default=64, help="else this many per datum")
    parser.add_argument("--head-steps", type=int, default=1500)
    parser.add_argument("--head-batch", type=int, default=64)
    parser.add_argument("--only", choices=["mixture", "digits"], help="one of the two parts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    fine = []
    if args.only != "digits":
        fine += [mixture(2, args), mixture(16, args)]
    if args.only != "mixture":
        fine += [images(args)]
    print(f"\nevery figure as wanted: {all(fine)}")


if __name__ == "__main__":
    main()
