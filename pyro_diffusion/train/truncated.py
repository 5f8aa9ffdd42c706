"""Training for one observation: rounds of simulations from the prior where the posterior is."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.infer import AutoAmortized, AutoEnsemble
from pyro_diffusion.infer.simulators.packed import pack
from pyro_diffusion.infer.simulators.simulated_latents import LEAST
from pyro_diffusion.infer.simulators.truncation import Box, simulate_within
from pyro_diffusion.train.amortized import fit_amortized
from pyro_diffusion.train.history import History
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_number, check_positive_int, kind_of

__all__ = ["TruncatedFit", "TruncatedRound", "fit_truncated"]

DRAWS = 1000  # that a box is taken from, and as many that it is checked with
MOST = 10_000  # draws of the prior for one simulation
IN_MARGIN = 0.05  # share of draws in a margin from which on the box is taken to cut

Values = dict[str, Tensor]


@dataclass(frozen=True)
class TruncatedRound:
    """What one round of :func:`~pyro_diffusion.train.fit_truncated` did.

    Attributes:
        simulations: runs of the program in this round.
        usable: simulations inside the region that the guide was trained on, of this and earlier rounds.
        acceptance: share of the prior's draws inside the region; 1 in the first round, which has no region.
        probability: of the region under the guide of the round before, from draws that did not make it.
        margin: share of the draws of the guide trained in the region that are in its margin; ``nan`` in the
            first round.
        history: of the training.
    """

    simulations: int
    usable: int
    acceptance: float
    probability: float
    margin: float
    history: History


@dataclass(frozen=True)
class TruncatedFit:
    """The rounds of :func:`~pyro_diffusion.train.fit_truncated`, and all simulations of the last one.

    Attributes:
        rounds: what each did.
        simulations: (n,) + the shape of each site by name: the draws of the prior cut to the last region.
    """

    rounds: tuple[TruncatedRound, ...]
    simulations: Values

    def __str__(self) -> str:
        lines = ["round  simulated  trained on  prior inside  posterior inside  in margin"]
        lines += [
            f"{i:>5} {r.simulations:>10} {r.usable:>11} {r.acceptance:>13.3g} {r.probability:>17.3f} "
            f"{r.margin:>10.3f}"
            for i, r in enumerate(self.rounds, 1)
        ]
        return "\n".join(lines)


def fit_truncated(
    guide: AutoAmortized,
    observations: Mapping[str, Tensor],
    num_simulations: int,
    *args: Any,
    rounds: int = 4,
    widen: float = 0.2,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TruncatedFit:
    r"""Train an amortized posterior for one observation, on simulations where its posterior is.

    The first round simulates from the prior. Every later one simulates from the prior *cut* to a region R
    around 1000 draws of the posterior so far: the range of the draws along their principal axes, in
    unconstrained space, widened by ``widen`` of itself at both ends. Latents are drawn from the prior and
    those outside are thrown away before anything is simulated. Where R holds the posterior,

    .. math:: p(\theta) 1_R(\theta)\, p(x_o | \theta) \propto p(\theta | x_o),

    so that the guide needs no correction, and all simulations of all rounds inside R are usable: regions are
    nested. Scales are taken anew in every round, and the network begins anew. The posterior is as
    *approximate* as that of :func:`fit_amortized`, for fewer simulations where prior and posterior differ
    much. A new draw of the guide that made a box of d latents is outside of it, before it is widened, with a
    probability of about 2 d / 1001.

    A region that is too small would cut the posterior unseen, so it is checked: the guide trained in it
    then has its draws up to the edge. Where more than 5% + 2 d / 1001 of them are in the margin, an
    ``UnreliableWarning`` says so and there are no more rounds. (A posterior that is all in a mode that
    the first round missed is not noticed by this, nor by anything else in the rounds; ``evaluate.sbc`` of
    the first round's guide tells of such.)

    Then the guide is for that observation alone: asked about others it answers with an
    ``UnreliableWarning``.

    Args:
        guide: with a ``denoiser`` and ``summary`` untrained.
        observations: values of all observed sites by name, one observation.
        num_simulations: of each round, 20 or more.
        args: the model's.
        rounds: how many, the first from the whole prior.
        widen: share of its range that a region is widened by, at each end.
        options: of :func:`fit_amortized`.
        kwargs: the model's.

    Returns:
        What every round did, and all simulations in the last region. Rounds end before their number if
        10,000 draws of the prior for a simulation do not suffice.

    Raises:
        ValueError: naming the argument, what it was and what was expected; for several observations, and
            programs with plates of rows, whose number varies in training (``plates=()`` takes them as one
            vector).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     pyro.sample("x", dist.Normal(mean, 0.1), obs=x)
        >>> guide = AutoAmortized(model, observed=["x"])
        >>> x = torch.tensor(3.0)
        >>> found = fit_truncated(
        ...     guide, {"x": x}, 100, rounds=2, options={"steps": 20, "progress": False})
        >>> len(found.rounds), found.rounds[0].acceptance
        (2, 1.0)

    References:
        Deistler, Goncalves & Macke, arXiv 2210.04815 (truncated rounds; regions of highest density); Miller
        et al., arXiv 2107.01214 (boxes).
    """
    _check(guide, num_simulations, rounds, widen)
    options = dict(options or {})
    values = guide.simulate(num_simulations, *args, **kwargs)
    if guide.in_levels:
        raise ValueError(
            f"guide: got plates of rows {[each.plates for each in guide._levels[1:]]}, expected none "
            "(plates=(), or a summary of the whole data)"
        )
    data, batch = guide._data_of(observations)
    if batch:
        raise ValueError(
            f"observations: got a batch of {tuple(batch)}, expected one observation without batch dimensions"
        )
    posterior: Any = guide.posterior
    posterior.focus.fill_(math.nan)
    untrained = copy.deepcopy(posterior.state_dict())
    boxes: list[Box] = []
    done: list[TruncatedRound] = []
    new, acceptance, probability = num_simulations, 1.0, 1.0
    while True:
        posterior.load_state_dict(untrained)
        guide._fit_scales(values)
        history = fit_amortized(guide, values, **options)
        draws = _draws(guide, observations, 2 * DRAWS)
        first, second = draws.split(DRAWS)
        cut, margin = _margin(boxes, draws)
        usable = len(next(iter(values.values())))
        done.append(TruncatedRound(new, usable, acceptance, probability, margin, history))
        if cut or len(done) == rounds:
            break
        boxes.append(Box.around(first, widen))
        probability = float(_inside(boxes, second).double().mean())
        found, new, tried = _simulate(guide, num_simulations, boxes, args, kwargs)
        acceptance = new / tried
        if new < num_simulations:
            warn_unreliable(
                f"rounds: got {new} simulations in round {len(done) + 1} out of {tried} draws of the prior, "
                f"expected {num_simulations}; the guide is that of the rounds before"
            )
            break
        values = _usable(guide, values, found, boxes)
    posterior.focus_on(data)
    return TruncatedFit(tuple(done), values)


def _check(guide: Any, num_simulations: Any, rounds: Any, widen: Any) -> None:
    if not isinstance(guide, AutoAmortized) or isinstance(guide, AutoEnsemble):
        raise ValueError(f"guide: got {kind_of(guide)}, expected an AutoAmortized")
    check_positive_int("num_simulations", num_simulations, at_least=LEAST)
    check_positive_int("rounds", rounds)
    check_number("widen", widen, above=0, at_most=10)


def _draws(guide: AutoAmortized, observations: Mapping[str, Tensor], count: int) -> Tensor:
    """Draws of the posterior, unconstrained and in one vector."""
    return pack(guide, guide.draw(count, observations), torch.Size([count]))


def _inside(boxes: list[Box], draws: Tensor) -> Tensor:
    return torch.stack([box.holds(draws) for box in boxes]).all(0)


def _margin(boxes: list[Box], draws: Tensor) -> tuple[bool, float]:
    """Whether the last box cuts the posterior of the guide trained in it, and the share in its margin."""
    if not boxes:
        return False, math.nan
    share = 1 - float(boxes[-1].holds(draws, margin=False).double().mean())
    expected = 2 * draws.shape[-1] / (DRAWS + 1)
    if share <= IN_MARGIN + expected:
        return False, share
    warn_unreliable(
        f"rounds: got {100 * share:.0f}% of the draws in the margin of the region that the guide was trained "
        f"in, expected at most {100 * (IN_MARGIN + expected):.0f}%: the region cuts the posterior; take more "
        "simulations in each round, a larger widen, or fewer rounds"
    )
    return True, share


def _simulate(
    guide: AutoAmortized, count: int, boxes: list[Box], args: Any, kwargs: Any
) -> tuple[Values, int, int]:
    """Valid simulations inside all boxes, how many there were with others, and draws of the prior."""

    def inside(drawn: Values) -> Tensor:
        return _inside(boxes, pack(guide, drawn, next(iter(drawn.values())).shape[:1]))

    simulator = guide._prepare(args, kwargs)
    found, tried = simulate_within(simulator, count, args, kwargs, inside, MOST * count)
    count_found = len(next(iter(found.values()), ()))
    return (guide._valid(found) if found else found), count_found, tried


def _usable(guide: AutoAmortized, before: Values, new: Values, boxes: list[Box]) -> Values:
    """Simulations of all rounds inside all boxes."""
    rows = next(iter(before.values())).shape[:1]
    kept = _inside(boxes, pack(guide, before, rows))
    return {name: torch.cat([value[kept], new[name]]) for name, value in before.items()}
