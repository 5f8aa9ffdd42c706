"""Few-step samplers: error against evaluations beside diffusers and azula, and measured orders.

Run: python benchmarks/samplers.py
     python benchmarks/samplers.py --trained  # the network of examples/digits.py, trained now if need be
     python benchmarks/samplers.py --trained results/images/model.safetensors  # that of examples/images.py

Data is a mixture of 25 normals whose exact posterior replaces the network, so every error is the sampler's.
It is the root-mean-square distance per coordinate from the exact end of the probability flow (a walk of 600
steps) from the same noise. In 16 dimensions it is mostly that of the few trajectories that end at another
component; "no worse" therefore allows two standard errors of the paired difference (and a relative 1e-3, as
diffusers computes in float32).
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import Data, MixtureDenoiser, Noise, V, Velocity
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    Ancestral,
    DPMSolverPP,
    Heun,
    Sampler,
    UniPC,
    ancestral,
    heun,
    simulate,
)
from pyro_diffusion.schedules import (
    Level,
    LogLinear,
    Schedule,
    TabulatedBetas,
    focused_log_snr,
    uniform_log_snr,
)
from pyro_diffusion.unwrapping import per_coordinate

EVALUATIONS = (5, 8, 10, 20, 50)
Walk = Callable[[MixtureDenoiser, Tensor, Tensor], Tensor]

OURS: dict[str, Sampler] = {
    "AdamsMoulton() [default]": AdamsMoulton(),
    "AdamsMoulton(Velocity())": AdamsMoulton(extrapolate=Velocity()),
    "AdamsBashforth(3, V())": AdamsBashforth(3, extrapolate=V()),
    "AdamsBashforth(3, Noise())": AdamsBashforth(3, extrapolate=Noise()),
    "AdamsBashforth(3)": AdamsBashforth(3),
    "UniPC(3)": UniPC(3),
    "UniPC(2)": UniPC(2),
    "DPMSolverPP()": DPMSolverPP(),
    "Heun()": Heun(),
    "DDIM()": DDIM(),
}


class Posterior(nn.Module):
    """The exact posterior in azula's terms."""

    def __init__(self, denoiser: MixtureDenoiser, schedule: Callable[[Tensor], tuple]) -> None:
        super().__init__()
        self.inner, self.schedule = denoiser, schedule

    def forward(self, x: Tensor, t: Tensor) -> object:
        """The posterior mean, as azula wants it."""
        from azula.denoise import DiracPosterior

        alpha, sigma = self.schedule(t)
        log_snr = 2 * torch.log(alpha / sigma)
        level = Level(t, log_snr, log_snr, alpha, sigma)
        return DiracPosterior(self.inner(x, level).mean)


def scales(schedule: Schedule) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda t: (schedule.alpha(t), schedule.sigma(t))


def of_azula(name: str, **options: int) -> Walk:
    """A sampler of azula on a given grid."""
    import azula.sample

    base = getattr(azula.sample, name)

    def walk(denoiser: MixtureDenoiser, times: Tensor, x: Tensor) -> Tensor:
        class OnGrid(base):
            @property
            def timesteps(self) -> Tensor:
                return times.flip(0)

        posterior = Posterior(denoiser, scales(denoiser.process.schedule))
        return OnGrid(posterior, steps=len(times) - 1, silent=True, **options)(x)

    return walk


def of_diffusers(name: str, **options: object) -> Walk:
    """A scheduler of diffusers on a given grid."""
    import diffusers

    def walk(denoiser: MixtureDenoiser, times: Tensor, x: Tensor) -> Tensor:
        scheduler = getattr(diffusers, name)(prediction_type="sample", **options)
        level = denoiser.process.schedule.level(times.flip(0))
        scheduler.sigmas = level.sigma / level.alpha
        scheduler.num_inference_steps = len(times) - 1
        scheduler.timesteps = torch.arange(len(times) - 1, 0, -1)
        for i, t in enumerate(scheduler.timesteps):
            mean = denoiser(x.double(), level.at(i)).mean
            x = scheduler.step(mean, t, x).prev_sample.double()
        return x

    return walk


def peers() -> dict[str, Walk]:
    walks = {
        f"diffusers DPM-Solver++ {k}": of_diffusers("DPMSolverMultistepScheduler", solver_order=k)
        for k in (2, 3)
    }
    walks |= {
        f"diffusers UniPC {k}": of_diffusers("UniPCMultistepScheduler", solver_order=k)
        for k in (2, 3)
    }
    walks |= {f"azula {n}": of_azula(f"{n}Sampler") for n in ("DDIM", "Euler", "Heun")}
    for n in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
        walks |= {f"azula {n} {k}": of_azula(f"{n}Sampler", order=k) for k in (2, 3)}
    return walks


SEED, VARIANCE = 0, 0.05


def mixture(d: int, schedule: Schedule) -> MixtureDenoiser:
    means = torch.randn(25, d, generator=torch.Generator().manual_seed(1000 * SEED + d))
    process = GaussianProcess(schedule)
    return MixtureDenoiser(process, torch.ones(25), means, VARIANCE, point_mass=True)


def exact(denoiser: MixtureDenoiser, x: Tensor) -> Tensor:
    return simulate(denoiser, uniform_log_snr(denoiser.process.schedule, 600), x, AdamsMoulton())


def rms(squares: Tensor) -> float:
    return float(squares.mean().sqrt())


def worse(ours: Tensor, theirs: Tensor) -> bool:
    """Whether our mean square is above theirs by more than chance."""
    gap = ours - theirs
    margin = 2 * gap.std() / math.sqrt(len(gap)) + 2e-3 * theirs.mean()
    return float(gap.mean()) > float(margin)


GRIDS = {"uniform_log_snr": uniform_log_snr, "focused_log_snr": focused_log_snr}


def same_grid(d: int, count: int, grid: str) -> bool:
    """Every sampler on one grid."""
    schedule = LogLinear(9, -9)
    denoiser = mixture(d, schedule)
    x = torch.randn(count, d, generator=torch.Generator().manual_seed(1))
    end = exact(denoiser, x)
    print(f"\nError on one grid, {grid} (9 to -9), d = {d}, {count} trajectories")
    print(f"{'evaluations':<28}" + "".join(f"{n:>10}" for n in EVALUATIONS) + "   default worse at")

    def row(name: str, walk: Walk, reads: int = 1) -> list[Tensor]:
        cells = []
        for n in EVALUATIONS:
            times = GRIDS[grid](schedule, max(n // reads, 1))
            cells.append((walk(denoiser, times, x) - end).square().mean(-1))
        print(f"{name:<28}" + "".join(f"{rms(c):>10.5f}" for c in cells), end="   ")
        return cells

    default: list[Tensor] = []
    for name, sampler in OURS.items():
        cells = row(name, lambda q, t, x, s=sampler: simulate(q, t, x, s), sampler.evaluations)
        default = default or cells
        print()
    fine = True
    for name, walk in peers().items():
        cells = row(name, walk, 2 if "Heun" in name else 1)
        lost = [n for n, a, b in zip(EVALUATIONS, default, cells, strict=True) if worse(a, b)]
        fine &= not lost
        print(", ".join(map(str, lost)) or "-", flush=True)
    counted = "as wanted" if grid == "uniform_log_snr" else "not counted"
    print(f"the default is no worse than any peer in any cell, {counted}: {fine}")
    return fine


def own_defaults(d: int, count: int) -> bool:
    """Ten evaluations, everyone with their own defaults: grid, order, last step."""
    import azula.noise
    import diffusers

    x = torch.randn(count, d, generator=torch.Generator().manual_seed(1))
    errors = {}
    betas = torch.linspace(1e-4, 0.02, 1000)
    table = mixture(d, TabulatedBetas(betas))
    end = exact(table, x)
    times = focused_log_snr(table.process.schedule, 9)
    last = simulate(table, times, x, AdamsMoulton())
    errors["AdamsMoulton() [default]"] = (table(last, times[0]).mean - end).square().mean(-1)
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        scheduler = getattr(diffusers, name)(prediction_type="sample")
        scheduler.set_timesteps(10)
        scheduler.sigmas = scheduler.sigmas.double()
        y = x
        for t in scheduler.timesteps:
            level = table.process.schedule.level(t / 999)
            y = scheduler.step(table(y, level).mean, t, y).prev_sample.double()
        errors[f"diffusers {name}"] = (y - end).square().mean(-1)
    theirs = azula.noise.VPSchedule()
    ends = [2 * math.log(a / s) for a, s in (theirs(torch.tensor(t)) for t in (0.0, 1.0))]
    wide = mixture(d, LogLinear(*ends))
    end = exact(wide, x)
    for name in ("DDIM", "Euler", "Heun", "zAB", "vAB", "zEAB", "xEAB", "REAB"):
        sampler = getattr(azula.sample, f"{name}Sampler")
        y = sampler(Posterior(wide, theirs), steps=5 if name == "Heun" else 10, silent=True)(x)
        errors[f"azula {name}"] = (y - end).square().mean(-1)
    print(f"\nTen evaluations, each with its own defaults, d = {d}")
    for name, squares in errors.items():
        print(f"{name:<44}{rms(squares):>10.5f}")
    first, *others = map(rms, errors.values())
    fine = first < min(others)
    print(f"the default is better than each peer's, as wanted: {fine}")
    return fine


def slope(steps: list[int], errors: list[float]) -> float:
    """Minus the regression slope of log error on log steps."""
    a, b = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    a = a - a.mean()
    return -float((a * b).sum() / a.square().sum())


@contextmanager
def fed(noises: Tensor) -> Iterator[None]:
    """Draws take their noise from the rows given, so that a walk on normal data is a fixed affine map."""
    feed = iter(noises)

    def draw(kernel: object) -> Tensor:
        base = per_coordinate(kernel)
        return base.mean + base.stddev * next(feed)[:, None]

    with mock.patch.object(ancestral, "draw", draw), mock.patch.object(heun, "draw", draw):
        yield


def flow_error(sampler: Sampler, steps: int, cache: dict) -> float:
    """Mean distance from the flow's end on the mixture."""
    schedule = LogLinear(9, -14)
    if not cache:
        means = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.0, -1.0]])
        denoiser = MixtureDenoiser(GaussianProcess(schedule), torch.ones(3), means, 0.1, True)
        x = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))
        end = simulate(denoiser, uniform_log_snr(schedule, 3000), x, AdamsMoulton())
        cache.update(denoiser=denoiser, x=x, end=end)
    last = simulate(cache["denoiser"], uniform_log_snr(schedule, steps), cache["x"], sampler)
    return float((last - cache["end"]).abs().mean())


def law_error(sampler: Sampler, steps: int) -> float:
    """Distance in mean and variance on normal data, without a draw."""
    schedule = LogLinear(8, -8)
    process, one = GaussianProcess(schedule), torch.ones(1)
    denoiser = MixtureDenoiser(process, one, torch.full((1, 1), 0.6), 0.3, point_mass=True)
    times = uniform_log_snr(schedule, steps)
    noises = torch.cat([torch.zeros(steps, 2), torch.eye(steps)], 1)
    x = torch.zeros(steps + 2, 1)
    x[1] = 1
    with fed(noises):
        out = simulate(denoiser, times, x, sampler)[:, 0]
    start, end = denoiser.marginal(times[-1]), denoiser.marginal(times[0])
    gain, noise = out[1] - out[0], out[2:] - out[0]
    mean = out[0] + gain * start.mean
    variance = gain**2 * start.variance + noise.square().sum()
    return float((mean - end.mean).abs() + (variance - end.variance).abs())


def orders() -> bool:
    """Measured orders beside the declared ones; strong orders are measured in the tests."""
    print("\nMeasured order (a few doublings of the steps)")
    print(f"{'sampler':<66}{'of':<6}{'declared':>9}{'measured':>9}")
    walks: list[Sampler] = [DDIM(), *(AdamsBashforth(k) for k in (2, 3, 4)), DPMSolverPP()]
    walks += [*(AdamsMoulton(k) for k in (2, 3, 4)), *(UniPC(p) for p in (1, 2, 3)), Heun()]
    walks += [Ancestral(), DDIM(0.5), DDIM(1.0), AdamsBashforth(2, 1.0), AdamsBashforth(3, 1.0)]
    walks += [AdamsMoulton(4, 1.0, Data()), DPMSolverPP(1.0), Heun(churn=4.0)]
    fine, cache = True, {}
    for sampler in walks:
        if sampler.order is not None:
            steps = [320, 640, 1280] if sampler.order == 4 else [80, 160, 320]
            measured = slope(steps, [flow_error(sampler, n, cache) for n in steps])
            kind, declared = "flow", sampler.order
        else:
            steps = [64, 128, 256, 512]
            measured = slope(steps, [law_error(sampler, n) for n in steps])
            kind, declared = "law", sampler.weak_order
        fine &= abs(measured - declared) <= 0.25
        print(f"{sampler!r:<66}{kind:<6}{declared:>9}{measured:>9.2f}", flush=True)
    print(f"every order within 0.25 of the declared one, as wanted: {fine}")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="trajectories")
    parser.add_argument(
        "--trained",
        nargs="?",
        const="digits",
        metavar="FILE",
        help="compare on a trained network instead: that of a file of save_model, or the digits'",
    )
    parser.add_argument("--device", default="cpu", help="of the trained network")
    parser.add_argument("--dimensions", type=int, nargs="*", default=[2, 16])
    parser.add_argument("--seed", type=int, default=0, help="of the mixture's means")
    parser.add_argument("--variance", type=float, default=0.05, help="of its components")
    args = parser.parse_args()
    if args.trained:
        from trained_network import compare

        with torch.no_grad():
            sys.exit(not compare(args.trained, args.count, args.device, OURS, worse))
    global SEED, VARIANCE
    SEED, VARIANCE = args.seed, args.variance
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    fine = [orders()]
    for d in args.dimensions:
        fine += [same_grid(d, args.count, "uniform_log_snr")]
        same_grid(d, args.count, "focused_log_snr")  # for the record: it is this package's own grid
        fine += [own_defaults(d, args.count)]
    print(f"\nevery figure as wanted: {all(fine)}")
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
