"""What every observation of a program says of every posterior draw."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions import ProbabilityFlow
from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.likelihoods.run import (
    Message,
    check_fixed_rows,
    is_computed,
    log_density,
    observations,
    of_each_datum,
)
from pyro_diffusion.unwrapping import unwrap_to

__all__ = ["Draws", "latent_draws", "pointwise_log_likelihood"]

Draws = Mapping[str, Tensor]


def pointwise_log_likelihood(
    model: Callable[..., Any], args: Any, kwargs: Any, latents: Draws, count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per observed site: log-densities of its batch shape for every draw, and what was observed.

    Raises:
        ValueError: where a column would not be the log-density of one and the same observation.
    """
    rows: dict[str, list[Tensor]] = {}
    observed: dict[str, Tensor] = {}
    for i in range(count):
        data = {name: value[i] for name, value in latents.items()}
        given = poutine.condition(data=data)
        with torch.no_grad(), poutine.block(), poutine.trace() as tracer, given:
            model(*args, **kwargs)
        nodes: Any = tracer.trace.nodes
        for node in map(of_each_datum, observations(nodes, data)):
            if type(node["fn"]).__name__ == "Unit" or is_computed(node):
                continue
            _check_pointwise(node, observed.setdefault(node["name"], node["value"]))
            rows.setdefault(node["name"], []).append(log_density(node))
    for name, parts in rows.items():
        if len(parts) != count:
            raise ValueError(
                f"site {name!r}: got an observation at {len(parts)} of {count} draws, expected one at each"
            )
    return {name: torch.stack(parts) for name, parts in rows.items()}, observed


def _check_pointwise(node: Message, first: Tensor) -> None:
    """Refuse an observed site whose log-density is not that of each of the data that the first run saw."""
    where, value = f"site {node['name']!r}:", node["value"]
    scale = torch.as_tensor(node["scale"], dtype=torch.float64)
    if not bool(torch.isclose(scale, scale.new_ones(()), rtol=1e-6).all()):
        raise ValueError(
            f"{where} got log-densities scaled by {scale.tolist()}, expected 1 (leave out poutine.scale)"
        )
    if first.shape != value.shape or not torch.allclose(first, value, 0, 0, equal_nan=True):
        raise ValueError(f"{where} got other data at every run, expected the same observations")
    found = unwrap_to(node["fn"], DenoisedDistribution)
    if found is not None and _estimated(found.base):
        raise ValueError(
            f"{where} got a {type(found.base).__name__}, whose log_prob is an estimate, expected an exact "
            "density (a ProbabilityFlow with ExactTrace): ArviZ exponentiates it"
        )


def _estimated(view: DenoisedDistribution) -> bool:
    return not isinstance(view, ProbabilityFlow) or view.trace.stochastic


def latent_draws(
    model: Callable[..., Any], args: Any, kwargs: Any, values: Draws
) -> dict[str, Tensor]:
    """Draws of the model's latent sites without the singleton dimensions that Predictive leaves.

    Raises:
        ValueError: if a latent site has no draws, or draws of another shape.
    """
    with torch.no_grad(), poutine.block(), _First(values) as first:
        model(*args, **kwargs)
    if first.missing:
        raise ValueError(
            f"posterior: got no draws of {', '.join(first.missing)}, expected draws of every latent site (or "
            "a model conditioned on it)"
        )
    return {name: values[name].reshape(-1, *shape) for name, shape in first.shapes.items()}


class _First(Messenger):
    """Gives every latent site its first draw, leaves observed ones as they are, and notes the shapes."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws
        self.shapes: dict[str, torch.Size] = {}
        self.missing: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        check_fixed_rows(msg)
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if name not in self.draws:
            self.missing.append(name)
            return
        shape, first = msg["fn"].shape(), self.draws[name][0]
        # Singleton dimensions apart: draws of a transposed shape are draws of something else.
        if [n for n in first.shape if n > 1] != [n for n in shape if n > 1]:
            raise ValueError(
                f"posterior: got draws of shape {tuple(first.shape)} for {name!r}, expected {tuple(shape)}"
            )
        self.shapes[name] = shape
        msg["value"] = first.reshape(shape)
