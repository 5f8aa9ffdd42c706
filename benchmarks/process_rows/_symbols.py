"""What the rows of discrete processes share: pairs of symbols from a table, and their exact denoiser."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from process_rows import Row, bound_gaps, frequencies
from pyro_diffusion.denoisers import TableDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC
from pyro_diffusion.processes import CategoricalProcess
from pyro_diffusion.samplers import Ancestral, Remasking, Sampler
from pyro_diffusion.schedules import quadratic

SYMBOLS = 4


def table() -> Tensor:
    """Two neighbouring symbols of a scale, mostly."""
    place = torch.arange(SYMBOLS, dtype=torch.float64)
    joint = torch.exp(-(place[:, None] - place).abs()) * (1 + place)
    return joint / joint.sum()


def symbols_row(
    name: str,
    process: CategoricalProcess,
    draws: int,
    further: dict[str, DiffusionCTMC] | None = None,
) -> Row:
    """Bounds and samples of a process of ``SYMBOLS`` symbols; chains have grids that are dense near data."""
    joint = table()
    denoiser = TableDenoiser(process, joint)
    index = torch.multinomial(joint.flatten(), draws, replacement=True)
    data = torch.stack([index // SYMBOLS, index % SYMBOLS], -1)
    truth = joint.flatten().log()[index]
    alone = joint.sum(1, keepdim=True) * joint.sum(0)  # the same symbols, independent

    def view(denoiser: TableDenoiser, steps: int | None) -> TorchDistribution:
        if steps is None:
            return DiffusionCTMC(denoiser, (2,))
        return Diffusion(denoiser, (2,), times=quadratic(steps))

    gaps = bound_gaps(
        view,
        (denoiser, truth),
        data,
        (TableDenoiser(process, alone), alone.flatten().log()[index]),
        terms=16,
    )
    limit = DiffusionCTMC(denoiser, (2,), 300)
    views = {
        "ancestral": limit,
        "remasking": limit.replace(sampler=Remasking(0.05)),
        **(further or {}),
    }
    count = (min(draws, 5_000),)
    samples = {k: frequencies(view.sample(count), joint) for k, view in views.items()}
    return Row(name, True, gaps, samples, notes=[pairs(name, process, draws)])


def pairs(name: str, process: CategoricalProcess, draws: int) -> str:
    """How often two symbols that are always equal come out unequal, by number of steps."""
    twins = torch.eye(SYMBOLS, dtype=torch.float64) / SYMBOLS
    denoiser = TableDenoiser(process, twins)
    lines = [f"{name}: share of unequal pairs where data are equal pairs"]
    samplers: list[Sampler] = [Ancestral(), Remasking(0.05), Remasking(0.2)]
    for sampler in samplers:
        line = f"  {sampler!r:26}"
        for steps in (4, 16, 64):
            x = Diffusion(denoiser, (2,), steps, sampler=sampler).sample((min(draws, 5_000),))
            line += f"  K = {steps}: {float((x[:, 0] != x[:, 1]).double().mean()):.4f}"
        lines.append(line)
    return "\n".join(lines)
