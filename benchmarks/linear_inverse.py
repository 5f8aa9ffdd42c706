"""Posteriors known in closed form: linear inverse problems under a mixture prior, beside azula.

The problems of Cardoso et al. (arXiv 2308.07983): 25 normals of unit covariance at (8i, 8j, 8i, 8j, ...)
for i, j in -2 ... 2, weights from squared normals, y = A x + noise, A a Gaussian matrix whose singular values
are replaced by sorted uniform numbers, noise of a uniform share of the largest. Prior and posterior are
mixtures, so posterior draws and log p(y) are known exactly. Both packages read the same closed-form denoiser.

Printed per cell (d_x, d_y): sliced and max-sliced Wasserstein-2 distance of 1000 draws to 1000 exact draws,
median (mean) over the problems, beside that of two exact sets (the floor); the error of log p(y); seconds and
network evaluations per draw, as ratios to azula's same method in the same run. Every setting of azula (of 100
steps) is printed and counted; in 80 dimensions those that did best in 8. Ours are one setting each, of at
most as many evaluations, chosen on other problems of the kind (seeds from 200). azula's twist is normal for
data of a variance that its user has to know.

    python benchmarks/linear_inverse.py                      # all (about an hour)
    python benchmarks/linear_inverse.py --cells 8,1 --problems 4
    python benchmarks/linear_inverse.py --alone --particles 4096   # the floor, and particles that reach it
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_diffusion.denoisers import MixtureDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.guidance import MMPS, GuidedDenoiser, PiGDM
from pyro_diffusion.infer import Particles, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.samplers import Ancestral, Langevin, PredictorCorrector
from pyro_diffusion.schedules import Level, VarianceExploding, focused_log_snr

CELLS = ((8, 1), (8, 2), (8, 4), (80, 1), (80, 4))
METHODS = ["MMPS", "PiGDM", "twisted SMC"]
LONG = "twisted SMC, 100 steps"
DRAWS, STEPS = 1000, 100
DOUBLE = torch.float64

Guidance = Callable[..., GuidedDenoiser]
Found = dict[str, tuple[float, float]]  # sliced and max-sliced distance
Cost = dict[str, tuple[float, float]]  # seconds, and network evaluations a draw


class Problem(NamedTuple):
    """Prior means and weights, observation matrix, noise standard deviation, observation (float64)."""

    means: Tensor
    weights: Tensor
    matrix: Tensor
    scale: Tensor
    y: Tensor

    def exact(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p(y), and the posterior's weights, means and common covariance's square root."""
        a, n = self.matrix, len(self.y)
        inverse = torch.linalg.inv(a @ a.T + self.scale**2 * torch.eye(n, dtype=DOUBLE))
        gap = self.y - self.means @ a.T
        log_joint = self.weights.log() - 0.5 * ((gap @ inverse) * gap).sum(-1)
        log_joint = log_joint + 0.5 * torch.logdet(inverse) - 0.5 * n * math.log(2 * math.pi)
        gain = a.T @ inverse
        values, vectors = torch.linalg.eigh(torch.eye(a.shape[1], dtype=DOUBLE) - gain @ a)
        root = vectors * values.clamp(min=0).sqrt()
        return log_joint.logsumexp(0), log_joint.softmax(0), self.means + gap @ gain.T, root

    def draws(self, count: int) -> Tensor:
        """Exact posterior draws."""
        _, weights, means, root = self.exact()
        which = torch.multinomial(weights, count, replacement=True)
        return means[which] + torch.randn(count, len(root), dtype=DOUBLE) @ root.T


def make(dx: int, dy: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(100_003 * seed + 10 * dx + dy)
    random = functools.partial(torch.randn, generator=generator, dtype=DOUBLE)
    uniform = functools.partial(torch.rand, generator=generator, dtype=DOUBLE)
    centres = [(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    means = torch.tensor([[c[k % 2] for k in range(dx)] for c in centres], dtype=DOUBLE)
    weights = random(25).square()
    u, _, v = torch.linalg.svd(random(dy, dx), full_matrices=False)
    singular = uniform(dy).sort(descending=True).values
    matrix = u @ torch.diag(singular) @ v
    scale = uniform(()) * singular[0]
    which = torch.multinomial(weights, 1, generator=generator)[0]
    y = matrix @ (means[which] + random(dx)) + scale * random(dy)
    return Problem(means, weights / weights.sum(), matrix, scale, y)


# --- distances --------------------------------------------------------------------------------------


def along(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Squared Wasserstein-2 distances of two sets of one size along directions."""
    a, b = (v.to(DOUBLE) @ directions.T for v in (x, y))
    return (a.sort(0).values - b.sort(0).values).square().mean(0)


def distances(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Sliced distance over 1000 directions, and the largest that gradient ascent finds from the best five."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(1000, x.shape[1], generator=generator, dtype=DOUBLE)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    squared = along(x, y, directions)
    best = directions[squared.topk(5).indices].clone().requires_grad_()
    optimizer = torch.optim.Adam([best], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        (-along(x, y, best / best.norm(dim=-1, keepdim=True)).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        largest = along(x, y, best / best.norm(dim=-1, keepdim=True)).max()
    return float(squared.mean().sqrt()), float(torch.maximum(largest, squared.max()).sqrt())


# --- ours -------------------------------------------------------------------------------------------


class Ours:
    """A Pyro program with a diffusion prior; nothing else says what y is."""

    def __init__(self, problem: Problem) -> None:
        means, weights, matrix, scale, y = (v.float() for v in problem)
        schedule = VarianceExploding(1e-2, 300.0)
        process = GaussianProcess(schedule)
        self.denoiser = MixtureDenoiser(process, weights, means, torch.ones(()))
        self.point_mass = MixtureDenoiser(process, weights, means, torch.ones(()), point_mass=True)
        # Dense where modes part: noise of the size of their distance.
        grid = functools.partial(focused_log_snr, schedule, centre=-2 * math.log(6.0))
        self.prior = Diffusion(self.denoiser, (means.shape[1],), times=grid(STEPS, width=3.0))
        self.grid = grid

        def model() -> None:
            x = pyro.sample("x", self.prior)
            pyro.sample("y", dist.Normal(x @ matrix.T, scale).to_event(1), obs=y)

        self.likelihood = ProgramLikelihood(model)

    def guided(self, guidance: Guidance, levels: int) -> tuple[Tensor, float]:
        """Draws, and network evaluations a draw: a step and a Langevin move at every level."""
        guided = guidance(self.point_mass, self.likelihood)
        sampler = PredictorCorrector(Ancestral(), Langevin(snr=0.3))
        times = self.grid(levels, width=1.0)
        law = Diffusion(guided, self.prior.event_shape, times=times, sampler=sampler)
        return law.sample((DRAWS,)), 2 * levels + 1

    def mmps(self) -> tuple[Tensor, float]:
        """The shift by the whole log-twist."""
        return self.guided(functools.partial(MMPS, full_gradient=True), 20)

    def pigdm(self) -> tuple[Tensor, float]:
        """As the paper has it, for data of this variance around a mode."""
        return self.guided(functools.partial(PiGDM, data_variance=8.0), 24)

    def smc(self) -> tuple[Tensor, float]:
        """Half as many particles again as draws, for fewer steps."""
        prior = self.prior.replace(times=self.grid(24, width=1.0))
        particles = TwistedSMC(prior, self.likelihood, MMPS, 3 * DRAWS // 2).run()
        return particles.sample((DRAWS,)), particles.log_evidence.evaluations / DRAWS

    def particles(self, count: int = 1024, steps: int = STEPS) -> Particles:
        """As many steps as azula takes, for evidence and draws."""
        prior = self.prior.replace(times=self.grid(steps, width=3.0))
        return TwistedSMC(prior, self.likelihood, MMPS, count).run()


# --- azula ------------------------------------------------------------------------------------------


class Peer:
    """azula on the same problem, with the same denoiser, in several settings of each method."""

    def __init__(self, problem: Problem) -> None:
        import azula.denoise
        import azula.noise

        self.y, self.matrix = problem.y.float(), problem.matrix.float()
        self.variance = float(problem.scale) ** 2
        self.inverse = torch.linalg.pinv(problem.matrix).float()
        self.spread = (
            float(problem.means.square().mean()) + 1
        )  # variance of the prior, by coordinate
        ours = Ours(problem).denoiser
        exact = MixtureDenoiser(ours.process, ours.weights, ours.means, 1.0, point_mass=True)

        class Exact(azula.denoise.Denoiser):
            def __init__(self, schedule: azula.noise.Schedule) -> None:
                super().__init__()
                self.schedule = schedule

            def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> azula.denoise.Posterior:
                alpha, sigma = self.schedule(t)
                log_snr = 2 * (alpha / sigma).log()
                level = Level(t, log_snr, log_snr, alpha, sigma)
                return azula.denoise.DiracPosterior(mean=exact(x_t, level).mean)

        self.denoisers = {
            "VP": Exact(azula.noise.VPSchedule()),
            "cosine": Exact(azula.noise.CosineSchedule()),
        }

    def observe(self, x: Tensor) -> Tensor:
        """The forward operator, once more."""
        return x @ self.matrix.T

    def twist(self, spread: float, x: Tensor, rho: Tensor) -> Tensor:
        """p(y | x_t) as the user of azula has to write it: normal, for data of some variance or none."""
        known = spread * rho**2 / (spread + rho**2) if spread else 0.0
        total = self.variance + known * self.matrix.square().sum(-1)
        return (-0.5 * (self.y - self.observe(x)).square() / total - 0.5 * torch.log(total)).sum(-1)

    def methods(self) -> Iterator[tuple[str, int, Callable[[Tensor], Tensor]]]:
        """Name, network evaluations and sampler of every setting."""
        from azula.guidance import MMPSDenoiser, PGDMSampler, TDSSampler
        from azula.sample import DDPMSampler

        small, options = self.matrix.shape[1] < 80, {"steps": STEPS, "silent": True}
        noise = functools.partial(torch.mul, torch.tensor(self.variance))
        pulled = functools.partial(torch.matmul, other=self.inverse.T)
        for name, base in self.denoisers.items():
            solved = {1, len(self.y)} if small else {len(self.y)} if name == "cosine" else ()
            for iterations in solved:
                guided = MMPSDenoiser(base, self.y, self.observe, noise, iterations=iterations)
                yield f"MMPS {name} {iterations} it.", STEPS, DDPMSampler(guided, **options)
            # In 80 dimensions what did best in 8: MMPS on the cosine schedule, the others on VP.
            for eta in (0.0, 1.0) if small or name == "VP" else ():
                sampler = PGDMSampler(base, self.y, self.observe, pulled, eta=eta, **options)
                yield f"PiGDM {name} eta={eta:g}", STEPS, sampler
            for spread in (
                (0.0, 1.0, self.spread) if small else (self.spread,) if name == "VP" else ()
            ):
                label = {0.0: "plug-in", 1.0: "unit"}.get(spread, "scaled")
                twist = functools.partial(self.twist, spread)
                yield f"twisted SMC {name} {label}", STEPS, TDSSampler(base, twist, **options)


# --- the tables -------------------------------------------------------------------------------------


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def one_problem(dx: int, dy: int, seed: int, count: int) -> tuple[Found, Cost, float]:
    """Distances, seconds and network evaluations a draw by method, and the error of log p(y)."""
    pyro.set_rng_seed(seed)
    problem = make(dx, dy, seed)
    reference = problem.draws(DRAWS)
    found = {"floor": distances(problem.draws(DRAWS), reference)}
    cost = {}
    ours = Ours(problem)
    for name, run in zip(METHODS, (ours.mmps, ours.pigdm, ours.smc), strict=False):
        (draws, reads), seconds = timed(run)
        found[name], cost[name] = distances(draws, reference), (seconds, reads)
    particles = ours.particles(count)
    found[LONG] = distances(particles.sample((DRAWS,)), reference)
    for name, reads, sampler in Peer(problem).methods() if METHODS else ():
        start = sampler.init((DRAWS, dx))
        try:
            draws, seconds = timed(functools.partial(sampler, start))
        except RuntimeError:  # its weights underflow to NaN
            continue
        found["azula " + name], cost["azula " + name] = (
            distances(draws, reference),
            (seconds, reads),
        )
    return found, cost, particles.log_evidence.value - float(problem.exact()[0])


def cheapest(cost: Cost, method: str) -> tuple[float, float]:
    """Seconds and reads of azula's method, solved as far as ours is: as many iterations as residuals."""
    peers = [v for k, v in cost.items() if k.startswith("azula " + method)]
    if method == "MMPS":
        most = max(int(k.split()[-2]) for k in cost if k.startswith("azula MMPS"))
        peers = [v for k, v in cost.items() if k.startswith("azula MMPS") and f" {most} it." in k]
    return min(peers)


def cell(
    dx: int, dy: int, problems: range, count: int
) -> tuple[bool, dict[str, list[Any]], list[float]]:
    """Print one cell; whether every claim holds there, cost ratios, errors of log p(y)."""
    rows: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, list[Any]] = {}
    errors = []
    for seed in problems:
        found, cost, error = one_problem(dx, dy, seed, count)
        errors.append(error)
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
        for name in METHODS:
            pair = zip(cost[name], cheapest(cost, name), strict=True)
            ratios.setdefault(name, []).append(tuple(mine / peer for mine, peer in pair))
    print(f"\n({dx}, {dy}): median (mean) over {len(problems)} problems")
    summary = {}
    for name, values in rows.items():
        sliced, largest = ([v[i] for v in values] for i in (0, 1))
        summary[name] = [
            f(v) for v in (sliced, largest) for f in (statistics.median, statistics.mean)
        ]
        a, b, c, d = summary[name]
        failed = len(problems) - len(values)
        note = f"   NaN in {failed} problem(s)" if failed else ""
        print(f"  {name:32s} sliced {a:6.2f} ({b:6.2f})   max-sliced {c:6.2f} ({d:6.2f}){note}")
    good = True
    for name in METHODS:
        peers = [v for k, v in summary.items() if k.startswith("azula " + name)]
        better = all(o < p for peer in peers for o, p in zip(summary[name], peer, strict=True))
        print(f"  {name} better than azula's in all settings, by all four figures: {better}")
        good &= better
    best = min((summary[n] for n in (*METHODS, LONG)), key=lambda v: v[0])
    over = [o / f for o, f in zip(best, summary["floor"], strict=True)]
    print(
        "  best over floor: "
        + " ".join(f"{v:.2f}" for v in over)
        + f"  at most 1.5: {max(over) <= 1.5}"
    )
    good &= max(over) <= 1.5
    print(
        f"  |error of log p(y)|, {count} particles: median {statistics.median(map(abs, errors)):.3f} nats"
    )
    return good, ratios, errors


def evidence_repeats(repeats: int) -> bool:
    """Is Z-hat unbiased, and does its error fall with particles?

    Z-hat is unbiased for the chain's evidence, not the data's, so that question is asked of a fine walk.
    """
    print(f"\nEvidence over {repeats} repeats, (8, 2), problem 0")
    pyro.set_rng_seed(0)
    problem = make(8, 2, 0)
    ours, exact = Ours(problem), float(problem.exact()[0])

    def gaps(count: int, steps: int, times: int) -> Tensor:
        values = [ours.particles(count, steps).log_evidence.value for _ in range(times)]
        return torch.tensor(values, dtype=DOUBLE) - exact

    ratio = gaps(64, 400, repeats).exp()
    mean, error = float(ratio.mean()), float(ratio.std() / repeats**0.5)
    good = abs(mean - 1) < 3 * error
    print(
        f"  64 particles, 400 steps: mean of Z-hat/Z {mean:.4f} +- {error:.4f}; within 3 errors: {good}"
    )
    errors = [float(gaps(n, STEPS, repeats // 4).square().mean().sqrt()) for n in (16, 128, 1024)]
    falls = errors[0] > errors[1] > errors[2]
    text = ", ".join(f"{v:.3f}" for v in errors)
    print(
        f"  RMS error of log Z with 16, 128, 1024 particles, 100 steps: {text} nats; falls: {falls}"
    )
    return good and falls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cells", nargs="*", default=[f"{a},{b}" for a, b in CELLS])
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    parser.add_argument("--repeats", type=int, default=200, help="of the evidence; 0 leaves it out")
    parser.add_argument("--particles", type=int, default=1024, help="of the run of 100 steps")
    parser.add_argument("--alone", action="store_true", help="that run and the floor alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.alone:
        METHODS.clear()
    good, ratios, errors = True, {}, []
    for text in args.cells:
        dx, dy = map(int, text.split(","))
        fine, more, off = cell(
            dx, dy, range(args.first, args.first + args.problems), args.particles
        )
        good &= fine
        errors += map(abs, off)
        for name, values in more.items():
            ratios.setdefault(name, []).extend(values)
    print(f"\n|error of log p(y)| over all: median {statistics.median(errors):.3f}, wanted <= 0.1")
    good &= statistics.median(errors) <= 0.1
    for name, values in ratios.items():
        seconds, reads = (statistics.median(v) for v in zip(*values, strict=True))
        print(f"{name}: a draw's cost over azula's, median over problems, wanted <= 1:", end=" ")
        print(f"{seconds:.2f} in seconds, {reads:.2f} in network evaluations")
        good &= max(seconds, reads) <= 1
    if args.repeats:
        good &= evidence_repeats(args.repeats)
    print("\nall claims hold:", good)
    sys.exit(not good)


if __name__ == "__main__":
    main()
