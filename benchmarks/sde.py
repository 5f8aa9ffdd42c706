"""The SDE view: the continuous bound is the discrete one's limit, orders, and torchsde beside a bare loop.

Run: python benchmarks/sde.py

Bounds are on a closed-form mixture with the exact denoiser read as a point mass, in float64: their reverse
terms, the only ones that depend on steps, over the same data and low-discrepancy positions. Strong orders are
slopes of the error of paths under one Brownian motion, weak orders those of the variance that a method gives
linear SDEs, without any draw. The bare loop is Euler-Maruyama as one writes it, f and g tabulated; both
sides run in turns in one process and the figure is the median over turns of the ratio of their seconds.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torchsde
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser, GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE
from pyro_diffusion.dynamics import ForwardSDE, ReverseSDE, SDESolver
from pyro_diffusion.dynamics.sde import KnownData
from pyro_diffusion.dynamics.sde_solver import METHODS
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LinearBeta, LogLinear, Schedule

F64 = torch.float64
ENDS = (8.0, -8.0)


def exact(schedule: Schedule) -> MixtureDenoiser:
    """The posterior of 25 components in two dimensions, as a point mass."""
    means = torch.randn(25, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    process = GaussianProcess(schedule)
    return MixtureDenoiser(process, torch.ones(25, dtype=F64), means, 0.05, point_mass=True)


def reverse_term(law: Diffusion | DiffusionSDE, count: int) -> tuple[float, float]:
    """Mean reverse term of fresh data in nats, and its standard error."""
    torch.manual_seed(0)
    means = []
    for _ in range(20):
        data = exact(Cosine(*ENDS)).data().sample((count // 20,))
        position = (torch.arange(len(data), dtype=F64) + torch.rand(len(data), dtype=F64)) / len(
            data
        )
        means.append(law.reverse_terms(data, position).mean())
    batches = torch.stack(means)
    return float(batches.mean()), float(batches.std() / math.sqrt(len(batches)))


def bounds(count: int) -> bool:
    """The chain's reverse term against the SDE's, for two schedules of equal ends."""
    print("\nReverse term of the bound (nats), 25 components, d = 2, log-SNR from 8 to -8")
    print(
        f"{'schedule':<12} {'steps':>8} {'term':>9} {'std. error':>11} {'over limit':>11} {'x steps':>9}"
    )
    limits, fine = [], True
    for name, schedule in (("cosine", Cosine(*ENDS)), ("log linear", LogLinear(*ENDS))):
        denoiser = exact(schedule)
        limit, error = reverse_term(DiffusionSDE(denoiser, (2,)), count)
        limits.append((limit, error))
        excess = []
        for steps in (100, 1000, 4000):
            grid = torch.linspace(0, 1, steps + 1, dtype=F64)
            term, spread = reverse_term(Diffusion(denoiser, (2,), times=grid), count)
            excess.append(term - limit)
            print(
                f"{name:<12} {steps:>8} {term:>9.4f} {spread:>11.4f} {excess[-1]:>11.4f}"
                f" {excess[-1] * steps:>9.1f}"
            )
        print(f"{name:<12} {'infinite':>8} {limit:>9.4f} {error:>11.4f}")
        fine &= abs(excess[-1]) <= 0.1 * abs(excess[0]) + 3 * math.hypot(error, spread)
    gap = abs(limits[0][0] - limits[1][0])
    error = math.hypot(limits[0][1], limits[1][1])
    print(f"two schedules differ by {gap:.4f}, {gap / error:.1f} standard errors (wanted <= 3)")
    return fine and gap <= 3 * error


class _Path(torchsde.BaseBrownian):
    """One Brownian path over [0, 1], known in cells, for every grid; or any increments at all."""

    levy_area_approximation = "space-time"

    def __init__(self, w: Tensor, u: Tensor) -> None:
        self.w, self.u = w, u

    def __call__(
        self,
        ta: Tensor,
        tb: Tensor | None = None,
        return_U: bool = False,
        return_A: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        cells = len(self.w)
        first, last = round(float(ta) * cells), round(float(tb) * cells)
        w = self.w[first:last]
        before = (w.cumsum(0) - w) / cells
        return (w.sum(0), (self.u[first:last] + before).sum(0)) if return_U else w.sum(0)

    def __repr__(self) -> str:
        return "_Path"

    dtype = property(lambda self: self.w.dtype)
    device = property(lambda self: self.w.device)
    shape = property(lambda self: self.w.shape[1:])


def walk(sde: ReverseSDE, y: Tensor, path: _Path, method: str, steps: int) -> Tensor:
    """The state at the end of a path."""
    sde.sde_type = METHODS[method].sde_type
    times = torch.tensor([0.0, 1.0], dtype=F64)
    dt = (1 + 4e-16 * steps) / steps
    return torchsde.sdeint(sde, y, times, bm=path, method=method, dt=dt)[-1]


def slope(steps: tuple[int, ...], errors: list[float]) -> float:
    """Minus the regression slope of log error on log steps."""
    x, y = (torch.tensor(v, dtype=F64).log() for v in (steps, errors))
    x = x - x.mean()
    return -float((x * y).sum() / x.square().sum())


def strong_orders(rows: int) -> dict[str, float]:
    """Root mean square error of paths on a mixture whose components overlap, eta = 2."""
    torch.manual_seed(0)
    grids, cells = (32, 64, 128, 256), 1024
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.3]], dtype=F64)
    process = GaussianProcess(LogLinear(2.0, -3.0))
    sde = ReverseSDE(MixtureDenoiser(process, torch.ones(2, dtype=F64), means, 0.25), (2,), 2.0)
    w, h = torch.randn(2, cells, rows, 2, dtype=F64) / math.sqrt(cells)
    path, y = _Path(w, (w / 2 + h / math.sqrt(12)) / cells), torch.randn(rows, 2, dtype=F64)
    reference = walk(sde, y, path, "srk", cells)
    return {
        method: slope(
            grids,
            [
                float((walk(sde, y, path, method, k) - reference).square().mean().sqrt())
                for k in grids
            ],
        )
        for method in METHODS
    }


class _Linear(ReverseSDE):
    """The exact reverse SDE of data N(0, 1/4)."""

    def drift(self, y: Tensor, node: object) -> Tensor:
        alpha, sigma = node.level.alpha, node.level.sigma
        return (node.state + node.data * 0.25 * alpha / (0.25 * alpha**2 + sigma**2)) * y


def weak_orders() -> dict[str, float]:
    """Error of the final variance of normal data: a walk's response to its start and to every increment."""
    schedule, grids = Cosine(3.0, -3.0), (32, 64, 128, 256)
    start, end = (schedule.level(torch.tensor(t, dtype=F64)) for t in (0.0, 1.0))
    truth = float(0.25 * start.alpha**2 + start.sigma**2)
    sde = _Linear(KnownData(GaussianProcess(schedule), torch.zeros(1)), (1,))
    out: dict[str, float] = {}
    for method in METHODS:
        errors = []
        for k in grids:
            w, u = torch.zeros(2, k, 2 * k + 1, 1, dtype=F64)
            step = torch.arange(k)
            w[step, 1 + step], u[step, 1 + step] = k**-0.5, k**-1.5 / 2
            u[step, 1 + k + step] = k**-1.5 / math.sqrt(12)
            y = torch.zeros(2 * k + 1, 1, dtype=F64)
            y[0] = (0.25 * end.alpha**2 + end.sigma**2).sqrt()
            variance = walk(sde, y, _Path(w, u), method, k).square().sum()
            errors.append(abs(float(variance) - truth))
        out[method] = slope(grids, errors)
    return out


def orders(rows: int) -> bool:
    """Measured against declared orders."""
    print(f"\nOrders\n{'method':<10} {'strong':>8} {'declared':>9} {'weak':>8} {'declared':>9}")
    strong, weak, fine = strong_orders(rows), weak_orders(), True
    for name, method in METHODS.items():
        print(
            f"{name:<10} {strong[name]:>8.2f} {method.strong_order:>9.1f} {weak[name]:>8.2f}"
            f" {method.weak_order:>9.1f}"
        )
        fine &= abs(strong[name] - method.strong_order) <= 0.25
        fine &= abs(weak[name] - method.weak_order) <= 0.25
    return fine


def bare_forward(sde: ForwardSDE, steps: int) -> Callable[[Tensor], Tensor]:
    """Euler-Maruyama, f and g tabulated."""
    dt = 1 / steps
    node = sde.nodes(torch.linspace(0, 1, steps + 1, dtype=F64))
    f, g = node.state.float(), node.noise.float()

    def run(x: Tensor) -> Tensor:
        for j in range(steps):
            x = x + f[j] * x * dt + g[j] * math.sqrt(dt) * torch.randn_like(x)
        return x

    return run


def bare_reverse(sde: ReverseSDE, denoiser: Denoiser, steps: int) -> Callable[[Tensor], Tensor]:
    """Euler-Maruyama with the network, coefficients tabulated."""
    dt = 1 / steps
    state, noise, data, level = sde.nodes(torch.linspace(0, 1, steps + 1, dtype=F64))
    a, b, g = state.float(), data.float(), noise.float()
    log_snr = level.log_snr.float()
    c = denoiser.parameterization.coefficients(level.alpha.float(), level.sigma.float())
    network = denoiser.network

    def run(x: Tensor) -> Tensor:
        for j in range(steps):
            estimate = c.c_skip[j] * x + c.c_out[j] * network(
                c.c_in[j] * x, log_snr[j].expand(len(x))
            )
            x = x + (a[j] * x + b[j] * estimate) * dt + g[j] * math.sqrt(dt) * torch.randn_like(x)
        return x

    return run


def ratio(
    ours: Callable[[], object], bare: Callable[[], object], turns: int
) -> tuple[float, float]:
    """Median over turns of the ratio of seconds, and the bare loop's median seconds."""
    ratios, seconds = [], []
    for _ in range(turns):
        times = []
        for run in (ours, bare):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
        seconds.append(times[1])
    return statistics.median(ratios), statistics.median(seconds)


def overhead(turns: int, steps: int = 1000) -> bool:
    """torchsde's loop over a bare one."""
    print(f"\nSeconds of {steps} Euler steps through torchsde over a bare loop (float32)")
    print(f"{'SDE':<10} {'shape':>9} {'bare s':>8} {'ratio':>7} {'wanted':>8}")
    fine, process = True, GaussianProcess(LinearBeta())
    solver = SDESolver("euler", steps=steps)
    for size, wanted in ((2, 1.6), (784, 1.15)):
        x = torch.randn(64, size)
        forward = ForwardSDE(process, (size,))
        denoiser = GaussianDenoiser(MLP(size), process)
        reverse = ReverseSDE(denoiser, (size,))
        for name, sde, bare in (
            ("forward", forward, bare_forward(forward, steps)),
            ("reverse", reverse, bare_reverse(reverse, denoiser, steps)),
        ):
            with torch.no_grad():
                solver(sde, x)
                got, seconds = ratio(
                    lambda sde=sde, x=x: solver(sde, x), lambda bare=bare, x=x: bare(x), turns
                )
            fine &= got <= wanted
            print(f"{name:<10} {f'64x{size}':>9} {seconds:>8.3f} {got:>7.2f} {f'<= {wanted:g}':>8}")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400_000, help="data per bound")
    parser.add_argument("--rows", type=int, default=300, help="paths per strong order")
    parser.add_argument("--turns", type=int, default=15, help="turns per ratio of seconds")
    args = parser.parse_args()
    fine = [bounds(args.count), orders(args.rows), overhead(args.turns)]
    print(f"\nevery figure as wanted: {all(fine)}")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
