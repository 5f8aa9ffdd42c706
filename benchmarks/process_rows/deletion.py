"""Loss of symbols: strings of up to three of two letters."""

import itertools
import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from process_rows import STEPS, Row, bound_gaps, frequencies
from pyro_diffusion.denoisers import Denoiser, StringTableDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionCTMC
from pyro_diffusion.processes import Deletion
from pyro_diffusion.processes.strings import embeddings
from pyro_diffusion.schedules import Rectified, quadratic


def row_deletion(draws: int) -> Row:
    process, rows, joint = Deletion(Rectified.full(), 2), strings(3, 2), table(3, 2)
    denoiser = StringTableDenoiser(process, joint)
    probs = joint[tuple(rows.T)]
    index = torch.multinomial(probs, draws, replacement=True)

    def view(denoiser: Denoiser, steps: int | None) -> TorchDistribution:
        del steps
        return DiffusionCTMC(denoiser, (3,))

    # The chain's by enumeration: its divergences, each from one draw, are too noisy for many steps.
    gaps = {str(steps): (chain_gap(denoiser, rows, probs, steps), 0.0) for steps in STEPS}
    gaps |= bound_gaps(view, (denoiser, probs.log()[index]), rows[index], steps=(None,))
    power = 3 ** torch.arange(2, -1, -1)
    names = (rows * power).sum(-1)
    # So many steps that their error, at most the chain's gap, is below what so many draws can tell.
    x = Diffusion(denoiser, (3,), times=quadratic(1000)).sample((min(draws, 2_000),))
    place = torch.searchsorted(names.sort().values, (x * power).sum(-1))
    samples = {"ancestral": frequencies(place.unsqueeze(-1), probs[names.argsort()])}
    return Row("deletion", True, gaps, samples, claims=enumerated())


def chain_gap(denoiser: StringTableDenoiser, rows: Tensor, probs: Tensor, steps: int) -> float:
    """log p less the bound of a chain, averaged over all data, by enumeration of its states."""
    process, total = denoiser.process, 0.0
    levels = process.levels(quadratic(steps).double())
    x0, xt = rows[:, None, None], rows[:, None]  # data, states at t, states at s
    for part in torch.arange(steps).split(50):
        s, t = (levels.at(i).map(lambda v: v[:, None, None, None]) for i in (part, part + 1))
        chance = process.marginal(x0, t).log_prob(xt).exp()
        shape = (*chance.shape[:-1], 1)
        weight = probs[:, None, None] * chance
        at_t = xt.expand(*shape, xt.shape[-1])
        bridge = process.bridge(at_t, x0.expand_as(at_t), s, t).log_prob(rows)
        once = xt.expand(len(part), 1, *xt.shape)
        found = process.reverse(once, denoiser(once, t), s, t).log_prob(rows)
        gap = torch.where(bridge > -math.inf, bridge.exp() * (bridge - found), 0.0)
        total += float((weight * gap.sum(-1, keepdim=True)).nan_to_num(nan=0.0).sum())
    return total + float((probs * probs.log()).sum())


def strings(length: int, symbols: int) -> Tensor:
    """All padded strings, shortest first."""
    words = (
        [*word, *[symbols] * (length - size)]
        for size in range(length + 1)
        for word in itertools.product(range(symbols), repeat=size)
    )
    return torch.tensor([*words])


def table(length: int, symbols: int) -> Tensor:
    """Random probabilities of all strings."""
    rows = strings(length, symbols)
    generator = torch.Generator().manual_seed(length)
    joint = torch.zeros([symbols + 1] * length, dtype=torch.float64)
    weights = torch.rand(len(rows), dtype=torch.float64, generator=generator) ** 3
    joint[tuple(rows.T)] = weights + 0.02  # none so rare that a chi-square would not hold
    return joint / joint.sum()


def enumerated(
    length: int = 6, symbols: int = 3, count: int = 12
) -> dict[str, tuple[float, float]]:
    """Largest deviations from enumeration, over strings of up to six of three letters."""
    process, rows, joint = (
        Deletion(Rectified.full(), symbols),
        strings(length, symbols),
        table(length, symbols),
    )
    denoiser = StringTableDenoiser(process, joint)
    s, t = (torch.tensor(v, dtype=torch.float64) for v in (0.35, 0.8))
    step = process.transition(rows.unsqueeze(1), s, t).log_prob(rows).exp()
    chosen = torch.linspace(0, len(rows) - 1, count).long()
    errors = {"marginal": 0.0, "bridge": 0.0, "bound": 0.0}
    for x in rows[chosen]:
        early, late = (process.marginal(x, v).log_prob(rows).exp() for v in (s, t))
        worst = (late - survivors(x, float(1 - t), rows, symbols)).abs().max()
        errors["marginal"] = max(errors["marginal"], float(worst))
        xt, chance = rows[late > 0], late[late > 0]
        bridge = process.bridge(xt.unsqueeze(1), x.expand_as(xt).unsqueeze(1), s, t)
        want = early * step[:, late > 0].T / chance.unsqueeze(-1)
        worst = (bridge.log_prob(rows).exp() - want).abs().max()
        errors["bridge"] = max(errors["bridge"], float(worst))
        gap = continuous_bound(denoiser, x, rows) - float(joint[tuple(x)].log())
        errors["bound"] = max(errors["bound"], abs(gap))
    limits = {"marginal": 1e-13, "bridge": 1e-13, "bound": 1e-5}
    where = f"against enumeration ({count} strings of up to {length} of {symbols} letters)"
    return {f"{name} {where}": (error, limits[name]) for name, error in errors.items()}


def survivors(x: Tensor, keep: float, rows: Tensor, pad: int) -> Tensor:
    """Probability of every string that is left, over all sets of surviving symbols."""
    out: dict[tuple[int, ...], float] = {}
    word = [c for c in x.tolist() if c != pad]
    for kept in itertools.product((False, True), repeat=len(word)):
        left = [c for c, k in zip(word, kept, strict=True) if k]
        key = (*left, *[pad] * (len(x) - len(left)))
        chance = keep ** sum(kept) * (1 - keep) ** (len(word) - sum(kept))
        out[key] = out.get(key, 0.0) + chance
    return torch.tensor([out.get(tuple(row), 0.0) for row in rows.tolist()], dtype=torch.float64)


def continuous_bound(denoiser: StringTableDenoiser, x: Tensor, rows: Tensor) -> float:
    """The bound by quadrature over the square root of t and enumeration of the states."""
    process, count = denoiser.process, 100
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    root = (values + 1) / 2
    left = rows[embeddings(x, rows, denoiser.symbols) > 0]
    rates = process.rates(root.square().repeat_interleave(len(left)))
    xt = left.repeat(count, 1)
    probs = process.marginal(x.expand_as(xt), rates.level).log_prob(xt).exp()
    cost = process.divergence_rate(x.expand_as(xt), xt, denoiser(xt, rates.level), rates)
    weight = vectors[0].square() * 2 * root
    total = (weight * (probs * cost).reshape(count, -1).sum(-1)).sum()
    return -float(total) if math.isfinite(total) else math.nan
