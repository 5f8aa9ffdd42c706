"""A program as a simulator: its latents, its observed sites, and joint draws of both."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import ZeroInflatedDistribution
from pyro.infer import Predictive
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.infer.simulators.intervals import of_one
from pyro_diffusion.infer.simulators.runs import sites_of, traced
from pyro_diffusion.infer.simulators.site_checks import (
    check_same,
    is_reweighted,
    known,
)
from pyro_diffusion.infer.simulators.standardized import LOG, LOG_OF_COUNTS, PLAIN
from pyro_diffusion.infer.simulators.vectorization import is_vectorizable, rows_of, side_by_side
from pyro_diffusion.likelihoods.run import (
    Message,
    isolated,
    unconditioned,
)
from pyro_diffusion.unwrapping import unwrap

__all__ = [
    "SimulatedSite",
    "Simulator",
    "find_joint",
    "find_sites",
    "observed_nodes",
    "simulate",
    "trial_runs",
]

TRIALS = 3
RUNS = 8  # in which a fair coin falls alike in 1 of 128 cases
Values = dict[str, Tensor]


class SimulatedSite(NamedTuple):
    """A site of a simulator.

    Attributes:
        shape: of one value, its plates and its event.
        positive: whether its values are positive reals.
        event_dim: how many dimensions of the value are the event's.
        counts: whether its values are numbers of something, from 0 on.
    """

    shape: torch.Size
    positive: bool
    event_dim: int
    counts: bool = False

    @property
    def log(self) -> int:
        """Which logarithm of its values is taken, as ``Standardized`` has it."""
        return LOG if self.positive else LOG_OF_COUNTS if self.counts else PLAIN


class Simulator(NamedTuple):
    """A program and what is known of it.

    Attributes:
        program: the Pyro program.
        latents: names of the latents in the order of the program, and their sites.
        observed: likewise of the observed sites.
        nesting: how many dimensions plates take, from the right.
        vectorized: whether many simulations may be one run inside one more plate.
    """

    program: Callable[..., Any]
    latents: dict[str, SimulatedSite]
    observed: dict[str, SimulatedSite]
    nesting: int
    vectorized: bool


def find_sites(
    program: Callable[..., Any],
    args: Any,
    kwargs: Any,
    latents: Collection[str] | None,
    observed: Collection[str] | None,
    vectorized: bool | None,
) -> Simulator:
    """Run the program a few times and tell its latents from its observed sites.

    Raises:
        ValueError: as ``AutoAmortized.simulate`` says.
    """
    trace, data = _drawn(program, args, kwargs)
    names = [n for n, node in data.items() if node["is_observed"]]
    if observed is not None:
        names = known("observed", observed, data, trace)
    if not names:
        raise ValueError(
            "observed: got a model without observed sites when run with these arguments (its sites: "
            f"{list(data)}), expected their names, AutoAmortized(model, observed=[...]), or data in the "
            "arguments"
        )
    hidden = [n for n in data if n not in names]
    if latents is not None:
        hidden = known("latents", latents, data, trace)
    if not hidden or set(hidden) & set(names):
        raise ValueError(f"latents: got {hidden}, expected sites other than the observed {names}")
    return _simulator(program, args, kwargs, hidden, names, vectorized, "latents")


def find_joint(
    program: Callable[..., Any],
    args: Any,
    kwargs: Any,
    names: Collection[str] | None,
    observed: Collection[str] | None,
    vectorized: bool | None,
) -> tuple[Simulator, list[str]]:
    """Sites of a program whose joint distribution is wanted, all as latents, and which of them are data.

    Raises:
        ValueError: as ``AutoJoint.simulate`` says.
    """
    trace, data = _drawn(program, args, kwargs)
    wanted = list(data) if names is None else known("sites", names, data, trace)
    if len(wanted) < 2:
        raise ValueError(f"sites: got {wanted}, expected two or more sites of the model")
    given = [n for n in wanted if data[n]["is_observed"]]
    if observed is not None:
        given = known("observed", observed, {n: data[n] for n in wanted}, trace)
    return _simulator(program, args, kwargs, wanted, [], vectorized, "sites"), given


def _drawn(program: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, dict[str, Message]]:
    """A run and its sites, all of which say how data arise."""
    trace = traced(program, args, kwargs)
    data = sites_of(trace)
    factors = [n for n, node in data.items() if type(node["fn"]).__name__ == "Unit"]
    if factors:
        raise ValueError(
            f"model: got pyro.factor sites {factors}, which say nothing of how data arise; expected a "
            "pyro.sample site for every observation"
        )
    nodes = [n for n in trace.nodes.values() if n["type"] == "sample" and not site_is_subsample(n)]
    reweighted = [n["name"] for n in nodes if is_reweighted(n)]
    if reweighted:
        raise ValueError(
            f"model: got a mask or scale at {reweighted}, or a change of variables, which say nothing of how "
            "data arise; expected sites without"
        )
    return trace, data


def _simulator(
    program: Callable[..., Any],
    args: Any,
    kwargs: Any,
    hidden: list[str],
    names: list[str],
    vectorized: bool | None,
    argument: str,
) -> Simulator:
    """The program with its latents and observed sites, which are in every run and alike there."""
    runs = [traced(unconditioned(program), args, kwargs) for _ in range(TRIALS)]
    sites = [sites_of(run) for run in runs]
    for name in (*hidden, *names):
        check_same(name, [each.get(name) for each in sites], name in hidden, argument)
    frames = [f for node in sites[0].values() for f in node["cond_indep_stack"]]
    nesting = max([-f.dim for f in frames if f.dim is not None], default=0)
    if vectorized is None:
        vectorized = is_vectorizable(program, args, kwargs, runs, nesting)
    found = {n: _simulated_site(sites[0][n]) for n in (*hidden, *names)}
    return Simulator(
        program,
        {n: found[n] for n in hidden},
        {n: found[n] for n in names},
        nesting,
        vectorized,
    )


def _simulated_site(node: Message) -> SimulatedSite:
    support, _ = of_one(node["fn"].support)
    bounds = constraints.greater_than | constraints.greater_than_eq
    positive = isinstance(support, bounds) and not bool(torch.as_tensor(support.lower_bound).any())
    # Pyro gives these the support of what they inflate, and zero is not among positive numbers
    positive = positive and not isinstance(unwrap(node["fn"]).base, ZeroInflatedDistribution)
    return SimulatedSite(
        node["value"].shape, positive, node["fn"].event_dim, _counts(node["fn"], support)
    )


def _counts(fn: Any, support: Any) -> bool:
    """Whether a distribution is of counts: integers from 0 on that are no labels."""
    if isinstance(unwrap(fn).base, torch.distributions.Categorical):
        return False
    integers = type(constraints.nonnegative_integer), constraints.integer_interval
    return isinstance(support, integers) and not bool(torch.as_tensor(support.lower_bound).any())


def simulate(simulator: Simulator, num_samples: int, args: Any, kwargs: Any) -> Values:
    """Joint draws of latents and observed sites, (num_samples,) + the shape of each.

    Raises:
        ValueError: if a site is missing or of another shape in some run.
    """
    sites = {**simulator.latents, **simulator.observed}
    program = unconditioned(simulator.program)
    try:
        if simulator.vectorized:
            nesting = simulator.nesting
            nodes = side_by_side(program, {}, num_samples, nesting, args, kwargs)
            return {n: rows_of(nodes[n], num_samples, nesting, sites[n].shape) for n in sites}
        predictive = Predictive(program, num_samples=num_samples, return_sites=tuple(sites))
        with isolated(), torch.no_grad():
            drawn = predictive(*args, **kwargs)
        return {n: drawn[n].reshape(num_samples, *site.shape) for n, site in sites.items()}
    except (KeyError, RuntimeError) as error:
        error.add_note(
            f"model: expected the sites {list(sites)} in every run, each of one shape"
            + (", and one run in a plate of many (or vectorized=False)" * simulator.vectorized)
        )
        raise


def observed_nodes(simulator: Simulator, args: Any, kwargs: Any) -> dict[str, Message]:
    """The observed sites of a run of the program with data in its arguments.

    Raises:
        ValueError: if an observed site has none.
    """
    nodes = sites_of(traced(simulator.program, args, kwargs))
    without = [n for n in simulator.observed if n not in nodes or not nodes[n]["is_observed"]]
    if without:
        raise ValueError(
            f"site {without[0]!r}: got no data, expected arguments of the model that hold them "
            "(`obs=` in the model)"
        )
    return {name: nodes[name] for name in simulator.observed}


def trial_runs(
    simulator: Simulator, args: Any, kwargs: Any
) -> tuple[list[dict[str, Message]], Callable[[Values], dict[str, Message]]]:
    """The sites of some runs without data, and a function that runs the program at values of all sites."""
    program = unconditioned(simulator.program)

    def rerun(values: Values) -> dict[str, Message]:
        return sites_of(traced(poutine.condition(program, data=values), args, kwargs))

    return [sites_of(traced(program, args, kwargs)) for _ in range(RUNS)], rerun
