"""Claims about discrete processes that are printed below the table, by enumeration and by chi-square."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from process_rows import Row, frequencies
from process_rows._symbols import table
from pyro_diffusion.denoisers import CategoricalDenoiser, Denoiser, TableDenoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.processes import Absorbing, CategoricalProcess
from pyro_diffusion.samplers import Ancestral, Remasking, Sampler
from pyro_diffusion.schedules import Rectified, uniform

ONE = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


def claim(row: Row, process: CategoricalProcess, draws: int) -> None:
    """Add to a row the chains' bounds that tend to log p, and one symbol's frequencies under remasking."""
    row.notes.append(limits(row, process))
    found, row.claims["one symbol's frequencies, largest deviation"] = one_symbol(process, draws)
    row.notes.append(f"{row.name}: {found}")


def limits(row: Row, process: CategoricalProcess) -> str:
    """Log p less the exact posterior's bound: chains by enumeration, continuous time from the table."""
    joint = table()
    denoiser = TableDenoiser(process, joint)
    line = "  ".join(f"K = {k}: {chain_gap(denoiser, joint, k):.2e}" for k in (1, 4, 16, 64, 256))
    gap, error = row.gaps["inf"]
    return (
        f"{row.name}: log p less the bound, exact posterior, nats a datum\n"
        f"  chains, by enumeration: {line}\n"
        f"  continuous time: {gap:.4f}, standard error {error:.4f}"
    )


def chain_gap(denoiser: Denoiser, joint: Tensor, steps: int) -> float:
    """E[log p(x) - bound(x)] over data, all states and data enumerated (a schedule without ends)."""
    process = denoiser.process
    assert isinstance(process, CategoricalProcess)
    count, width = len(joint), len(process.noise)
    data = torch.cartesian_prod(*[torch.arange(count)] * 2)
    states = torch.cartesian_prod(*[torch.arange(width)] * 2)
    x0 = data.unsqueeze(1).expand(-1, len(states), -1)
    x = states.expand_as(x0)
    cost = torch.zeros(len(data), dtype=torch.float64)
    for s, t in itertools.pairwise(uniform(steps, torch.float64)):
        early, late = process.level(s), process.level(t)
        log_prob = process.marginal(x0, late).log_prob(x)
        kernel = process.reverse(x, denoiser(x, late), early, late)
        terms = kl_divergence(process.bridge(x, x0, early, late), kernel)
        weight = log_prob.exp().where(log_prob > -80, 0.0)  # a floor stands for impossible symbols
        cost += (weight * terms).where(weight > 0, 0.0).sum(1)
    return float((joint.flatten() * (cost + joint.flatten().log())).sum())


def one_symbol(process: CategoricalProcess, draws: int) -> tuple[str, tuple[float, float]]:
    """Chi-square of one symbol's frequencies, as a standard normal number, by number of steps.

    Also the largest, and what it may be: one of nine right ones is larger with chance 0.0003.
    """
    lines, largest = (
        ["chi-square of one symbol's frequencies, as a standard normal number"],
        -math.inf,
    )
    denoiser = TableDenoiser(process, ONE)
    samplers: list[Sampler] = [Ancestral(), Remasking(0.05), Remasking(0.5)]
    for sampler in samplers:
        line = f"  {sampler!r:26}"
        for steps in (4, 16, 64):
            x = Diffusion(denoiser, (1,), steps, sampler=sampler).sample((min(draws, 20_000),))
            deviation = frequencies(x, ONE)
            line += f"  K = {steps}: {deviation:5.2f}"
            largest = max(largest, deviation)
        lines.append(line)
    return "\n".join(lines), (largest, 4.0)


class _Network(nn.Module):
    """Any function of the state, and of nothing else."""

    def __init__(self, length: int, states: int) -> None:
        super().__init__()
        self.place = (states + 1) ** torch.arange(length)
        shape = ((states + 1) ** length, length, states)
        self.logits = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        del log_snr
        return self.logits[(x.long() * self.place).sum(-1)]


def claim_orders(row: Row, length: int = 4, states: int = 3) -> None:
    """Add to a row a network without time: the continuous bound beside autoregression in every order."""
    process = Absorbing(Rectified.full(), states)
    denoiser = CategoricalDenoiser(_Network(length, states), process)
    x0 = torch.tensor([2, 0, 1, 1])[:length]
    with torch.no_grad():
        costs = []
        for order in itertools.permutations(range(length)):
            x, cost = torch.full((length,), process.mask), 0.0
            for i in order:
                posterior = denoiser(x, torch.tensor(0.5, dtype=torch.float64))
                cost -= float(posterior.base_dist.log_prob(x0)[i])
                x[i] = x0[i]
            costs.append(cost)
        average = sum(costs) / len(costs)
        bound = _integral(denoiser, x0)
    row.claims["bound less mean over orders"] = (abs(bound - average), 1e-9)
    row.notes.append(
        f"absorbing: a network of {length} symbols without time, nats\n"
        f"  continuous bound, by quadrature and enumeration: {bound:.12f}\n"
        f"  autoregression averaged over {len(costs)} orders: {average:.12f}, difference "
        f"{abs(bound - average):.1e} (single orders from {min(costs):.3f} to {max(costs):.3f})"
    )


def _integral(denoiser: Denoiser, x0: Tensor, count: int = 12) -> float:
    """The bound's integral, exact: in t it is a polynomial, by Gauss's rule."""
    process = denoiser.process
    assert isinstance(process, Absorbing)
    lost = torch.cartesian_prod(*[torch.tensor([False, True])] * len(x0))
    x = torch.where(lost, process.mask, x0)
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    total = 0.0
    for t, weight in zip((values + 1) / 2, vectors[0].square(), strict=True):
        rates = process.rates(t.expand(len(x)))
        cost = process.divergence_rate(x0.expand_as(x), x, denoiser(x, rates.level), rates)
        chance = process.marginal(x0.expand_as(x), rates.level).log_prob(x).exp()
        total += float(weight * (chance * cost).sum())
    return total
