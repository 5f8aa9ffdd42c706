"""Latents and the data that they made, and what a posterior under test answers to the data."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_diffusion.infer import AutoAmortized
from pyro_diffusion.likelihoods.run import check_fixed_rows, is_computed, unconditioned
from pyro_diffusion.unreliable import UnreliableWarning
from pyro_diffusion.validation import check_finite, kind_of

__all__ = [
    "Posterior",
    "RobustScale",
    "Values",
    "answers",
    "flat",
    "observed_sites",
    "settings",
    "simulate",
]

TOGETHER = 10_000  # draws of an amortized posterior in one call

Values = dict[str, Tensor]
Posterior = Callable[[Values], Mapping[str, Tensor]] | AutoAmortized


def settings(
    posterior: Posterior, observed: Collection[str] | None, parallel: bool | None
) -> tuple[Collection[str] | None, bool]:
    """Observed sites, and whether to simulate in a plate; what an AutoAmortized knows, if None."""
    if isinstance(posterior, AutoAmortized):
        observed = posterior.observed if observed is None else observed
        parallel = posterior.vectorized if parallel is None else parallel
    return observed, bool(parallel)


def simulate(
    model: Callable[..., Any], num_samples: int, args: Any, kwargs: Any, parallel: bool
) -> Values:
    """Joint draws of all sites, (num_samples,) + the shape of each."""
    program = unconditioned(model)
    predictive = Predictive(program, num_samples=num_samples, return_sites=None, parallel=parallel)
    drawn = predictive(*args, **kwargs)
    sites = {name: value.detach() for name, value in drawn.items() if isinstance(value, Tensor)}
    if parallel:  # a site outside of the model's plates has singletons for them
        alone = poutine.trace(poutine.block(program, hide_types=["param"]))
        nodes: Any = alone.get_trace(*args, **kwargs).nodes
        for name, value in sites.items():
            shape = torch.Size((num_samples, *torch.as_tensor(nodes[name]["value"]).shape))
            if value.shape != shape and value.numel() == shape.numel():
                sites[name] = value.reshape(shape)
    return sites


def answers(
    posterior: Posterior, sites: Values, names: Collection[str], num_samples: int
) -> Iterator[Values]:
    """The posterior's draws given the data of each simulation in turn."""
    rows = len(next(iter(sites.values())))
    if not isinstance(posterior, AutoAmortized):
        for i in range(rows):
            drawn = posterior({name: sites[name][i] for name in names})
            if not isinstance(drawn, Mapping) or not all(v.dim() for v in drawn.values()):
                raise ValueError(
                    f"posterior: got {kind_of(drawn)}, or single values in it, expected a dictionary of "
                    "draws, each (L,) + the shape of its latent"
                )
            yield {name: value.detach() for name, value in drawn.items() if name not in names}
        return
    chunk = max(1, TOGETHER // num_samples)
    for start in range(0, rows, chunk):
        data = {name: sites[name][start : start + chunk] for name in names}
        with warnings.catch_warnings():
            # of data that are simulations, one in a thousand of which is unlike the others
            warnings.simplefilter("ignore", UnreliableWarning)
            drawn = posterior.draw(num_samples, data)
        for i in range(len(next(iter(data.values())))):
            yield {name: value[:, i] for name, value in drawn.items()}


def observed_sites(
    model: Callable[..., Any], args: Any, kwargs: Any, names: Collection[str] | None
) -> list[str]:
    """Names of the observed sites, checked."""
    with _WholeData():
        tracer = poutine.trace(poutine.block(model, hide_types=["param"]))
        nodes: Any = tracer.get_trace(*args, **kwargs)
    data = [n for n in nodes.observation_nodes if not is_computed(nodes.nodes[n])]
    factors = [n for n in data if type(nodes.nodes[n]["fn"]).__name__ == "Unit"]
    if factors:
        raise ValueError(
            f"model: got pyro.factor sites {factors}, which say nothing of how data arise; expected a "
            "pyro.sample site for every observation"
        )
    found = data if names is None else list(names)
    unknown = [name for name in found if name not in nodes.nodes]
    if names is None and not found:
        raise ValueError(
            "observed: got none, and no site that the model observes with these arguments, expected "
            f"observed=[...] out of {nodes.stochastic_nodes}"
        )
    if not found or unknown:
        raise ValueError(
            f"observed: got {found}, expected sites of the model out of "
            f"{nodes.stochastic_nodes + data}"
        )
    return found


class _WholeData(Messenger):
    """Refuses plates that draw their rows: the data of a simulation would be weighed N / B times."""

    def _pyro_sample(self, msg: Any) -> None:
        check_fixed_rows(msg)


def flat(sites: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
    """The named sites' values as one vector for each row, (rows, size)."""
    rows = len(next(iter(sites.values())))
    return torch.cat([sites[name].reshape(rows, -1).double() for name in names], 1)


class RobustScale:
    r"""Coordinates less their median, over their interquartile range: :math:`(u - m) / s`.

    Heavy tails of one coordinate do not drown the others. A range of zero, as rare counts have it, gives way
    to the standard deviation, and that to 1.

    Args:
        rows: (n, size), what the scales are taken from.
        what: name of the values in messages.

    Raises:
        ValueError: for values that are not finite.
    """

    def __init__(self, rows: Tensor, what: str) -> None:
        check_finite(what, rows)
        low, self.loc, high = torch.quantile(rows, torch.tensor([0.25, 0.5, 0.75]).to(rows), dim=0)
        scale, spread = high - low, rows.std(0)
        scale = torch.where(scale > 0, scale, spread)
        self.scale = torch.where(scale > 0, scale, 1.0)

    def __call__(self, rows: Tensor) -> Tensor:
        """Scaled coordinates."""
        return (rows - self.loc) / self.scale
