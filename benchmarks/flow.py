"""Exact likelihoods by the probability-flow ODE, beside k-diffusion, and NUTS under a flow prior.

Run: python benchmarks/flow.py            (all of it: some minutes on one core)
     python benchmarks/flow.py --only nuts

The peer: pip install --no-deps k-diffusion==0.1.1. Its package imports far more than its likelihood needs, so
only its `sampling` and `utils` modules are loaded, and torchvision is stubbed. Without the peer its claim
counts as not shown. Everything is in float64 on 25-component mixtures (means N(0, I), variance 0.05) with the
exact denoiser.
"""

import argparse
import importlib
import importlib.util
import itertools
import math
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.reparam import TransformReparam
from pyro.ops.stats import effective_sample_size
from scipy.stats import t as student
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import ProbabilityFlow
from pyro_diffusion.dynamics import Hutchinson, HutchPlusPlus, ODESolver, TraceEstimator
from pyro_diffusion.dynamics.trace_estimators import gaussian, rademacher, sphere
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Level, LinearBeta, LogLinear, Schedule, VarianceExploding

# Rows of the mixture that one call integrates.
DATA = {2: 200, 16: 100, 64: 40}


def mixture(d: int, schedule: Schedule) -> MixtureDenoiser:
    means = torch.randn(25, d, generator=torch.Generator().manual_seed(d))
    return MixtureDenoiser(GaussianProcess(schedule), torch.ones(25), means, 0.05)


def draws(denoiser: MixtureDenoiser, count: int, seed: int = 0) -> Tensor:
    pyro.set_rng_seed(seed)
    return denoiser.data().sample((count,))


# --- claim 1: against the closed form -------------------------------------------------------------


def accuracy() -> bool:
    """Exact trace, default solver: error per dimension against log p of the data."""
    print(
        "\nLog p by the ODE, exact trace, dopri5 at the default tolerance 1e-5; closed form = the data's own"
    )
    print("law, so the noise left at t = 0 and the prior N(0, I) at t = 1 are errors too")
    header = f"{'schedule':<26} {'d':>3} {'data':>5} {'mean error':>11} {'max |error|':>12}"
    print(f"{header} {'evals':>6} {'wanted':>9}")
    schedules: dict[str, Schedule] = {
        "VP, log-SNR 14 to -14": LogLinear(14, -14),
        "VP, log-SNR 10 to -10": LogLinear(10, -10),
        "linear beta, 10 to -10.05": LinearBeta(),
    }
    fine = True
    for d, count in DATA.items():
        for name, schedule in schedules.items():
            denoiser = mixture(d, schedule)
            x = draws(denoiser, count)
            with torch.no_grad():
                score = ProbabilityFlow(denoiser, (d,)).score(x)
            error = (score.value - denoiser.data().log_prob(x)) / d
            judged = name.startswith("VP, log-SNR 14")
            fine &= not judged or float(error.abs().max()) <= 1e-3
            print(
                f"{name:<26} {d:>3} {count:>5} {float(error.mean()):>11.1e} {float(error.abs().max()):>12.1e}"
                f" {score.evaluations:>6} {'<= 1e-3' if judged else '':>9}"
            )
    print(f"as wanted: {fine}")
    return fine


def rows() -> bool:
    """A batch against its rows one by one."""
    print(
        "\nBatch rows against one by one (default tolerance; steps fit the hardest row of a batch)"
    )
    print(f"{'d':>3} {'largest difference, nats/dim':>30} {'wanted':>9}")
    fine = True
    for d in (2, 16):
        denoiser = mixture(d, LogLinear(14, -14))
        flow, x = ProbabilityFlow(denoiser, (d,)), draws(denoiser, 20)
        with torch.no_grad():
            gap = flow.log_prob(x) - torch.stack([flow.log_prob(row) for row in x])
        worst = float(gap.abs().max()) / d
        fine &= worst <= 1e-3
        print(f"{d:>3} {worst:>30.1e} {'<= 1e-3':>9}")
    print(f"as wanted: {fine}")
    return fine


# --- claim 1: beside k-diffusion ------------------------------------------------------------------


def peer() -> Any:
    """k_diffusion.sampling without its package's imports, or None."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        return None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stubs = [sys.modules.setdefault(name, types.ModuleType(name)) for name in names]
    stubs[1].functional = stubs[2]
    return importlib.import_module("k_diffusion.sampling")


Sweep = list[tuple[float, float]]

PEER_TERMS = """Error: RMS over data and 3 probe seeds of (value - value at tolerance 1e-9 with the same
probe) / d, so neither probe noise nor the ends count. Same ends, log-SNR 10 to -10 (sigma 0.0067 to 148);
each with its own terminal law, N(0, 1 + sigma^2) here and N(0, sigma^2) there; one Rademacher probe each."""


def peer_sweep(sampling: Any, d: int, x: Tensor, end: float, seeds: range) -> Sweep:
    """Evaluations and error of k-diffusion's log_likelihood over its tolerance."""
    low, high = math.exp(-end / 2), math.exp(end / 2)
    denoiser = mixture(d, VarianceExploding(low, high))

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.unsqueeze(-1)
        log_snr = -2 * sigma.log()
        return denoiser(x, Level(log_snr, log_snr, log_snr, torch.ones_like(sigma), sigma)).mean

    def run(tolerance: float, seed: int) -> tuple[Tensor, int]:
        torch.manual_seed(seed)  # the same probe at every tolerance
        value, info = sampling.log_likelihood(model, x, low, high, atol=tolerance, rtol=tolerance)
        return value, info["fevals"]

    return sweep(run, d, seeds)


def own_sweep(d: int, x: Tensor, end: float, seeds: range, method: str) -> Sweep:
    """The same of ProbabilityFlow with one Rademacher probe."""
    denoiser = mixture(d, LogLinear(end, -end))

    def run(tolerance: float, seed: int) -> tuple[Tensor, int]:
        trace = Hutchinson(1, seed=seed)
        solver = method if tolerance > 1e-8 else "dopri8"
        flow = ProbabilityFlow(
            denoiser, (d,), trace=trace, solver=ODESolver(solver, rtol=tolerance, atol=tolerance)
        )
        with torch.no_grad():
            score = flow.score(x)
        return score.value, score.evaluations

    return sweep(run, d, seeds)


def sweep(run: Callable[[float, int], tuple[Tensor, int]], d: int, seeds: range) -> Sweep:
    """(evaluations, root mean square solver error per dim) over tolerances, averaged over probe seeds."""
    truth = {seed: run(1e-9, seed)[0] for seed in seeds}
    out = []
    for exponent in (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6):
        results = {seed: run(10**-exponent, seed) for seed in seeds}
        squares = torch.stack([((results[s][0] - truth[s]) / d).square().mean() for s in seeds])
        count = sum(evaluations for _, evaluations in results.values()) / len(seeds)
        out.append((count, float(squares.mean().sqrt())))
    return out


def evaluations_at(points: Sweep, target: float) -> float:
    """Evaluations for an error, log-linear between the points of the sweep."""
    best: Sweep = []
    for count, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((count, error))
    for (n0, e0), (n1, e1) in itertools.pairwise(best):
        if e0 >= target >= e1:
            share = math.log(e0 / target) / math.log(e0 / e1)
            return n0 + share * (n1 - n0)
    return best[0][0] if target > best[0][1] else math.nan


def beside_peer() -> bool:
    """Network evaluations at equal solver error."""
    sampling = peer()
    print("\nEvaluations at equal error beside k-diffusion 0.1.1 log_likelihood (dopri5 in sigma)")
    if sampling is None:
        print("k-diffusion is not installed, so this is not shown\nas wanted: False")
        return False
    print(PEER_TERMS)
    header = f"{'d':>3} {'error':>7} {'k-diffusion':>12} {'dopri5':>7} {'ratio':>6} {'dopri8':>7}"
    print(f"{header} {'bosh3':>6} {'wanted':>7}")
    fine, ratios = True, []
    for d in DATA:
        x, seeds = draws(mixture(d, LogLinear(10, -10)), 100), range(3)
        theirs = peer_sweep(sampling, d, x, 10, seeds)
        ours = {m: own_sweep(d, x, 10, seeds, m) for m in ("dopri5", "dopri8", "bosh3")}
        for target in (1e-3, 3e-4, 1e-4, 3e-5):
            base = evaluations_at(theirs, target)
            counts = {m: evaluations_at(points, target) for m, points in ours.items()}
            ratio = counts["dopri5"] / base
            ratios.append(ratio)
            fine &= ratio <= 1
            print(
                f"{d:>3} {target:>7.0e} {base:>12.0f} {counts['dopri5']:>7.0f} {ratio:>6.2f}"
                f" {counts['dopri8']:>7.0f} {counts['bosh3']:>6.0f} {'<= 1':>7}"
            )
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean of the ratios: {mean:.2f} (aim 0.7)")
    print(f"as wanted: {fine}")
    return fine


# --- claim 1: error bars --------------------------------------------------------------------------


def coverage(repeats: int) -> bool:
    """How often log p lies in the 95% interval of its estimate over probes."""
    print(
        "\nError bars of estimated traces: per datum, Student t over its probes, against the closed form"
    )
    print(f"log p; {repeats} independent data, each with probes of its own (rk4, 24 steps)")
    print(f"{'trace':<38} {'d':>3} {'s.e. nats':>10} {'covered':>8} {'wanted (3 binom. s.e.)':>23}")
    margin = 3 * math.sqrt(0.95 * 0.05 / repeats)
    laws = (rademacher, gaussian, sphere)
    cases: list[tuple[int, TraceEstimator]] = [(16, Hutchinson(64, law)) for law in laws]
    cases += [(16, HutchPlusPlus(5)), (16, Hutchinson(16)), (64, Hutchinson(32))]
    fine = True
    for d, trace in cases:
        denoiser = mixture(d, LogLinear(14, -14))
        x = draws(denoiser, repeats, seed=1)
        flow = ProbabilityFlow(denoiser, (d,), trace=trace, solver=ODESolver("rk4", steps=24))
        with torch.no_grad():
            parts = [flow.condition().score(part) for part in x.split(50)]
        value = torch.cat([part.value for part in parts])
        error = torch.cat([part.standard_error for part in parts])
        inside = (value - denoiser.data().log_prob(x)).abs() <= student.ppf(
            0.975, trace.columns - 1
        ) * error
        covered = float(inside.double().mean())
        judged = trace.columns >= 32  # with few, t intervals of skewed draws fall short
        fine &= not judged or abs(covered - 0.95) <= margin
        print(
            f"{trace!r:<38} {d:>3} {float(error.median()):>10.3f} {covered:>8.3f} "
            f"{f'{0.95 - margin:.3f} to {min(1.0, 0.95 + margin):.3f}' if judged else '':>25}"
        )
    print(f"as wanted: {fine}")
    return fine


# --- claim 8: NUTS --------------------------------------------------------------------------------


MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "E x1": lambda x: x[..., 0],
    "E x2": lambda x: x[..., 1],
    "E x1^2": lambda x: x[..., 0].square(),
    "E x2^2": lambda x: x[..., 1].square(),
    "E x1 x2": lambda x: x[..., 0] * x[..., 1],
}


def likelihood(x: Tensor) -> dist.TorchDistribution:
    """A crooked observation of both; curved so little that one chain finds all of the posterior."""
    return dist.Normal(x[..., 0] + x[..., 1] ** 2 / 4, 0.5)


def nuts(samples: int) -> bool:
    """Posterior moments by NUTS under a flow prior, against quadrature of the closed-form posterior."""
    print(
        "\nNUTS under a ProbabilityFlow prior (3 components in 2-d, rk4 with 5 steps, exact trace),"
    )
    print(
        f"y ~ N(x1 + x2^2 / 4, 0.5), y = 0.8; {samples} draws after 100. Truth: quadrature of the closed-form"
    )
    print("posterior on a 400 x 400 grid; Monte-Carlo error from the effective sample size")
    means = torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -0.5]])
    denoiser = MixtureDenoiser(GaussianProcess(LogLinear(12, -12)), torch.ones(3), means, 0.3)
    observed = torch.tensor(0.8)
    axis = torch.linspace(-4, 4, 400)
    grid = torch.cartesian_prod(axis, axis)
    weights = (denoiser.data().log_prob(grid) + likelihood(grid).log_prob(observed)).softmax(0)
    truth = {name: float((weights * moment(grid)).sum()) for name, moment in MOMENTS.items()}

    def model() -> None:
        prior = ProbabilityFlow(
            denoiser, (2,), solver=ODESolver("rk4", steps=5), validate_args=False
        )
        x = pyro.sample("x", prior)
        pyro.sample("y", likelihood(x), obs=observed)

    print(
        f"{'program':<18} {'moment':<8} {'NUTS':>8} {'MC error':>9} {'quadrature':>11} {'z':>6} {'wanted':>7}"
    )
    fine = True
    for name, program in {
        "direct": model,
        "TransformReparam": poutine.reparam(model, config={"x": TransformReparam()}),
    }.items():
        pyro.set_rng_seed(0)
        start = time.perf_counter()
        mcmc = MCMC(
            NUTS(program, max_tree_depth=3), samples, warmup_steps=100, disable_progbar=True
        )
        mcmc.run()
        seconds = time.perf_counter() - start
        chain = mcmc.get_samples()
        x = chain["x"] if "x" in chain else Predictive(program, chain, parallel=False)()["x"]
        x = x.reshape(-1, 2).detach()
        for key, moment in MOMENTS.items():
            value = moment(x)
            size = float(effective_sample_size(value.unsqueeze(0), chain_dim=0, sample_dim=1))
            error = float(value.std()) / math.sqrt(size)
            z = (float(value.mean()) - truth[key]) / error
            fine &= abs(z) <= 3
            row = f"{name:<18} {key:<8} {float(value.mean()):>8.3f} {error:>9.3f}"
            print(f"{row} {truth[key]:>11.3f} {z:>6.1f} {'|z| <= 3':>8}")
        print(f"{name:<18} {seconds:.0f} s")
    print(f"as wanted: {fine}")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=400, help="intervals per trace")
    parser.add_argument("--samples", type=int, default=1000, help="draws of each Markov chain")
    parser.add_argument("--only", choices=["accuracy", "rows", "peer", "coverage", "nuts"])
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    parts: dict[str, Callable[[], bool]] = {
        "accuracy": accuracy,
        "rows": rows,
        "peer": beside_peer,
        "coverage": lambda: coverage(args.repeats),
        "nuts": lambda: nuts(args.samples),
    }
    fine = [part() for name, part in parts.items() if args.only in (None, name)]
    print(f"\nevery figure as wanted: {all(fine)}")


if __name__ == "__main__":
    main()
