"""Simulations from a prior that is cut to a region: latents first, and the rest for those inside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_diffusion.infer.simulators.runs import sites_of, traced
from pyro_diffusion.infer.simulators.simulations import Simulator
from pyro_diffusion.infer.simulators.vectorization import rows_of, side_by_side
from pyro_diffusion.likelihoods.run import Message, unconditioned

__all__ = ["Box", "draw_prior", "first_sites", "simulate_within"]

BLOCK = 10_000  # draws of the prior in one run
RIDGE = 1e-6  # of the variances along the axes, relative to the largest

Values = dict[str, Tensor]


class Box(NamedTuple):
    """The range of draws along their principal axes, widened.

    Attributes:
        loc: mean of the draws, (size,).
        axes: directions, each over the draws' standard deviation along it, (size, size).
        low: least coordinate of the draws, (size,).
        high: greatest one.
        margin: what is added at both ends, (size,).
    """

    loc: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor
    margin: Tensor

    @classmethod
    def around(cls, draws: Tensor, widen: float) -> "Box":
        """The box of draws, (n, size), whose ranges are widened by a share of themselves at both ends."""
        draws = draws.double()
        loc = draws.mean(0)
        values, vectors = torch.linalg.eigh((draws - loc).mT @ (draws - loc) / len(draws))
        axes = vectors / (values + RIDGE * values.max()).sqrt()
        low, high = ((draws - loc) @ axes).aminmax(dim=0)
        return cls(loc, axes, low, high, widen * (high - low))

    def holds(self, values: Tensor, margin: bool = True) -> Tensor:
        """Whether values are inside, (..., size) -> (...); without its margin where that is False."""
        place = (values.double() - self.loc) @ self.axes
        more = self.margin if margin else 0.0
        return ((place >= self.low - more) & (place <= self.high + more)).all(-1)


class _Enough(Exception):
    """All latents are drawn."""


class _UpTo(Messenger):
    """Ends a run when the last of some sites has been drawn."""

    def __init__(self, names: Any) -> None:
        super().__init__()
        self.names = frozenset(names)

    def __enter__(self) -> Any:
        self.left = set(self.names)
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.left.discard(msg["name"])
        if not self.left:
            raise _Enough


def _without_data(simulator: Simulator) -> Callable[..., None]:
    """The program as far as its last latent."""
    program = unconditioned(simulator.program)

    def drawing(*args: Any, **kwargs: Any) -> None:
        try:
            with _UpTo(simulator.latents):
                program(*args, **kwargs)
        except _Enough:
            pass

    return drawing


def first_sites(simulator: Simulator, args: Any, kwargs: Any) -> dict[str, Message]:
    """The sites of one run that ends with the last latent."""
    return sites_of(traced(_without_data(simulator), args, kwargs))


def draw_prior(simulator: Simulator, num_samples: int, args: Any, kwargs: Any) -> Values:
    """Draws of the latents, and of what the program draws before the last of them; nothing is simulated.

    Returns:
        (num_samples,) + the shape of each site by name.
    """
    sites = first_sites(simulator, args, kwargs)
    program = _without_data(simulator)
    if not simulator.vectorized:
        return _one_by_one(simulator, sites, num_samples, args, kwargs)
    nesting = simulator.nesting
    nodes = side_by_side(program, sites, num_samples, nesting, args, kwargs)
    return {
        n: rows_of(nodes[n], num_samples, nesting, torch.as_tensor(site["value"]).shape)
        for n, site in sites.items()
    }


def _one_by_one(
    simulator: Simulator, sites: dict[str, Message], num_samples: int, args: Any, kwargs: Any
) -> Values:
    runs = [first_sites(simulator, args, kwargs) for _ in range(num_samples)]
    other = [n for run in runs for n in run if n not in sites] or [
        n for n in sites if any(n not in run for run in runs)
    ]
    if other:
        raise ValueError(
            f"model: got {other[0]!r} before the last latent in some runs only, expected it in every run"
        )
    return {n: torch.stack([torch.as_tensor(run[n]["value"]) for run in runs]) for n in sites}


def simulate_within(
    simulator: Simulator,
    num_samples: int,
    args: Any,
    kwargs: Any,
    inside: Callable[[Values], Tensor],
    most: int,
) -> tuple[Values, int]:
    """Joint draws whose latents are inside a region; what is outside costs a draw of the prior alone.

    What the program draws before its last latent is kept with it, so that the draws are those of the program
    given that the latents are inside.

    Args:
        simulator: the program and its sites.
        num_samples: how many are wanted.
        args: the program's.
        kwargs: likewise.
        inside: of values of the latents, (n,) + the shape of each, which are in the region, (n,).
        most: draws of the prior after which it gives up.

    Returns:
        (at most num_samples,) + the shape of each latent and observed site, and how many draws of the prior
        were looked at.
    """
    kept: list[Values] = []
    found = tried = 0
    block = BLOCK if simulator.vectorized else num_samples
    while found < num_samples and tried < most:
        drawn = draw_prior(simulator, block, args, kwargs)
        (which,) = inside(drawn).nonzero(as_tuple=True)
        lacking = num_samples - found
        tried += block if len(which) <= lacking else int(which[lacking - 1]) + 1
        which = which[:lacking]
        kept.append({name: value[which] for name, value in drawn.items()})
        found += len(which)
    values = {name: torch.cat([each[name] for each in kept]) for name in kept[0]}
    if not found:
        return {}, tried
    return _completed(simulator, values, found, args, kwargs), tried


def _completed(simulator: Simulator, values: Values, count: int, args: Any, kwargs: Any) -> Values:
    """Runs of the program that begin with these values."""
    wanted = {**simulator.latents, **simulator.observed}
    program = unconditioned(simulator.program)
    if simulator.vectorized:
        sites, nesting = first_sites(simulator, args, kwargs), simulator.nesting
        nodes = side_by_side(program, sites, count, nesting, args, kwargs, values)
        return {n: rows_of(nodes[n], count, nesting, site.shape) for n, site in wanted.items()}
    runs = [
        traced(poutine.condition(program, {n: v[i] for n, v in values.items()}), args, kwargs)
        for i in range(count)
    ]
    return {
        name: torch.stack([run.nodes[name]["value"].reshape(site.shape) for run in runs])
        for name, site in wanted.items()
    }
