"""Discrete exactness: the bound of a masked and of a uniform chain over every short sequence.

Run: python benchmarks/discrete.py

A known joint over all 81 sequences of length 4 from 3 letters, the exact posterior of every letter as the
denoiser, and expectations over every x_t taken by enumeration, not by sampling. All figures in nats.

A denoiser gives each letter its own posterior, so a chain of few steps is not quite the data's law. The
bound is below the *chain's* log p for every sequence (a theorem, checked here for all 81), and below the
data's log p on average over data; both gaps vanish with the steps, and importance weighting closes the first
at any number.
"""

import argparse

import torch
from torch import Tensor

from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.distributions.objectives import divergence
from pyro_diffusion.evaluate import importance_weighted
from pyro_diffusion.processes import Absorbing, CategoricalProcess, Uniform
from pyro_diffusion.schedules import Level, Rectified, uniform
from pyro_diffusion.unwrapping import per_coordinate

LENGTH, STATES = 4, 3


def exact_bound(denoiser: TableDenoiser, steps: int) -> Tensor:
    """The bound of every sequence, expectations by enumeration."""
    process, x0 = denoiser.process, denoiser.sequences.unsqueeze(1)
    symbols = torch.arange(len(process.noise))
    states = torch.cartesian_prod(*[symbols] * LENGTH)
    levels = process.schedule.level(uniform(steps)).unsqueeze(process.event_dim)

    def level(j: int) -> Level:
        return Level(*(v[j] for v in levels))

    prior = process.prior((LENGTH,), dtype=torch.float64).expand((len(x0), 1))
    total = divergence(process.marginal(x0, level(-1)), prior).squeeze(1)
    for j in range(steps + 1):
        t = level(j)
        q = process.marginal(x0, t).expand((len(x0), len(states))).log_prob(states).exp()
        posterior = denoiser(states, t)
        if j == 0:
            # A state that data cannot reach has probability 0 and may have any finite cost.
            cost = -posterior.expand((len(x0), len(states))).log_prob(x0).clamp(min=-1e6)
        else:
            s = level(j - 1)
            cost = divergence(
                process.bridge(states, x0, s, t), process.reverse(states, posterior, s, t)
            )
        total = total + (q * cost).sum(1)
    return -total


def model_log_prob(denoiser: TableDenoiser, steps: int) -> Tensor:
    """The chain's own log p of every sequence: its kernels multiplied out over all states."""
    process = denoiser.process
    symbols = torch.arange(len(process.noise))
    states = torch.cartesian_prod(*[symbols] * LENGTH)
    levels = process.schedule.level(uniform(steps)).unsqueeze(process.event_dim)
    mass = process.prior((LENGTH,), dtype=torch.float64).log_prob(states).exp()
    for j in range(steps, -1, -1):
        t = Level(*(v[j] for v in levels))
        posterior = denoiser(states, t)
        if j == 0:
            kernel, targets = posterior, denoiser.sequences
        else:
            s = Level(*(v[j - 1] for v in levels))
            kernel, targets = process.reverse(states, posterior, s, t), states
        probs = per_coordinate(kernel).probs  # (states, length, symbols)
        joint = probs[:, 0, targets[:, 0]]
        for i in range(1, LENGTH):
            joint = joint * probs[:, i, targets[:, i]]
        mass = mass @ joint
    return mass.log()


def table(process: CategoricalProcess, joint: Tensor, most: int) -> bool:
    """Print the gaps of one process; whether every figure is as it must be."""
    denoiser = TableDenoiser(process, joint)
    truth = denoiser.log_joint
    weight = truth.exp()
    print(f"\n{type(process).__name__}: log p of the chain itself, and of the data it models")
    print(
        f"{'steps':>6} {'below chain: mean':>18} {'least':>9} {'below data: mean':>17} {'x steps':>8}"
    )
    fine, previous = True, None
    for steps in (10, 100, 1000, 10_000):
        if steps > most:
            break
        bound, chain = exact_bound(denoiser, steps), model_log_prob(denoiser, steps)
        inner = chain - bound
        mean = float((weight * (truth - bound)).sum())
        fine &= bool(inner.min() >= -1e-9) and mean > 0
        if previous is not None:
            fine &= 8 < previous / mean < 12
        previous = mean
        print(
            f"{steps:>6} {float((weight * inner).sum()):>18.3e} {float(inner.min()):>9.1e}"
            f" {mean:>17.3e} {mean * steps:>8.4f}"
        )
    return weighting(denoiser, steps=3) and fine


def weighting(denoiser: TableDenoiser, steps: int) -> bool:
    """Importance weighting at few steps; whether it reaches the chain's own log p."""
    weight = denoiser.log_joint.exp()
    chain = model_log_prob(denoiser, steps)
    gap = float((weight * (chain - exact_bound(denoiser, steps))).sum())
    print(f"importance weighting on a chain of {steps} steps, log p of the chain minus estimate")
    print(f"{'chains':>7} {'mean gap':>10} {'std. error':>10}")
    print(f"{'bound':>7} {gap:>10.4f} {'exact':>10}")
    law = Diffusion(denoiser, (LENGTH,), steps=steps)
    for samples in (10, 100, 1000):
        estimate = importance_weighted(law, denoiser.sequences, num_samples=samples, batch_size=81)
        left = float((weight * (chain - estimate.value)).sum())
        error = float((weight * estimate.standard_error).square().sum().sqrt())
        print(f"{samples:>7} {left:>10.4f} {error:>10.4f}")
    return abs(left) < 0.02 * gap + 3 * error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=10_000, help="most steps of a chain")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    joint = torch.rand((STATES,) * LENGTH).square()
    schedule = Rectified.full()
    processes = (Absorbing(schedule, STATES), Uniform(schedule, STATES))
    fine = [table(process, joint, args.most) for process in processes]
    print(f"\nbound never above log p, gap ~ 1/steps, closed by weighting: {all(fine)}")


if __name__ == "__main__":
    main()
