"""Held-out rows beside the model that scores them, each with its own row of the context."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_diffusion.denoisers.base import check_context
from pyro_diffusion.distributions import ProbabilityFlow
from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.distributions.bounded import BoundedDistribution
from pyro_diffusion.evaluate.batches import in_batches
from pyro_diffusion.processes import drawing_from
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.ranks import ProcessGroup, agree_on_values
from pyro_diffusion.unwrapping import Unwrapped, check_wrappers, unwrap
from pyro_diffusion.validation import check_event_shape, kind_of

__all__ = ["Rows", "check_model", "check_rows", "find_view", "named", "score_rows"]

# The function that evaluates the log-density of each kind of view, or a bound.
SCORED_BY = {BoundedDistribution: "log_likelihood", ProbabilityFlow: "flow_log_likelihood"}

View = TypeVar("View", bound=DenoisedDistribution)


class Rows(NamedTuple):
    r"""Data y that are scored together, as the view inside the model sees them.

    Attributes:
        x: their values at the scale of the view, before the model's transforms, (n,) + the view's event.
        log_det: :math:`\log |\partial x / \partial y|`, (n,): what log p(y) is above log p(x).
        noise: what to score them with: a function of the call's seed and of each row's place in the data.
    """

    x: Tensor
    log_det: Tensor
    noise: RowNoise


def check_model(name: str, model: Any, kinds: type[View] | tuple[type[View], ...]) -> Unwrapped:
    """A view of some kinds at batch shape (), perhaps under transforms with a density, taken apart.

    Raises:
        ValueError: naming what was found.
    """
    found = find_view(name, model, kinds)
    check_wrappers(name, found)
    return found


def find_view(name: str, model: Any, kinds: type[View] | tuple[type[View], ...]) -> Unwrapped:
    """A view of some kinds at batch shape () with what is around it.

    A model with a batch shape would pair its rows with those of the data by chance: the context of every
    datum is an argument of its own.

    Raises:
        ValueError: naming what was found.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    wanted = " or ".join(kind.__name__ for kind in kinds)
    found = (
        unwrap(model, (*kinds, *SCORED_BY))
        if isinstance(model, torch.distributions.Distribution)
        else None
    )
    if found is None or not isinstance(found.base, kinds):
        inner = model if found is None else found.base
        scored = [by for kind, by in SCORED_BY.items() if isinstance(inner, kind)]
        instead = f" (use {scored[0]} for a {type(inner).__name__})" if scored else ""
        raise ValueError(
            f"{name}: got {kind_of(inner)}, expected {wanted}, perhaps under transforms{instead}"
        )
    if model.batch_shape or found.base.batch_shape:
        raise ValueError(
            f"{name}: got a {type(found.base).__name__} of batch shape "
            f"{tuple(found.base.batch_shape)}, expected (): build it without a context of that "
            "shape, which is the argument `context=`, one row per datum"
        )
    return found


def check_rows(name: str, data: Tensor, event_shape: torch.Size) -> None:
    """Refuse anything but (n,) + event.

    Raises:
        ValueError: naming what was found.
    """
    check_event_shape(name, data, event_shape)
    if data.dim() != 1 + len(event_shape):
        raise ValueError(
            f"{name}: got shape {tuple(data.shape)}, expected (n,) + {tuple(event_shape)}, one row per datum"
        )


def score_rows(
    score: Callable[[Rows, View], tuple[Tensor, ...]],
    model: Unwrapped,
    view: View,
    data: Tensor,
    *,
    context: dict[str, Tensor] | None,
    batch_size: int,
    progress: bool,
    seed: int,
    process_group: ProcessGroup | None,
) -> list[tuple[Tensor, ...]]:
    """Scores of data in batches, each by the view conditioned on its rows of the context; in order.

    Args:
        score: of a batch of rows, by the conditioned view; without gradients.
        model: as :func:`check_model` gives it; its transforms are undone.
        view: what scores: the model's own base, or a variant of it.
        data: (n,) + event.
        context: the denoiser's context, one row per datum.
        batch_size: data scored together.
        progress: whether to show a progress bar.
        seed: of the noise, the same on every rank.
        process_group: the processes that share the batches.

    Raises:
        ValueError: for a batch size below 1, a context without exactly one row per datum, or data and context
            that differ from rank to rank.
        RuntimeError: if another rank failed.
    """
    context = check_context(view.denoiser, context, len(data))
    agree_on_values({"data": data, **named(context)}, process_group)
    index = torch.arange(len(data), device=data.device)

    def work(rows: slice) -> tuple[Tensor, ...]:
        noise = RowNoise(seed, index[rows])
        with drawing_from(noise):  # the seed of its own
            conditioned = view.condition(**{k: v[rows] for k, v in context.items()})
        return score(_rows(model, data[rows], noise), conditioned)

    with torch.no_grad():
        return in_batches(work, len(data), batch_size, process_group, progress, "scoring")


def named(context: dict[str, Tensor]) -> dict[str, Tensor]:
    """A context by what messages call its entries."""
    return {f"context[{name!r}]": value for name, value in context.items()}


def _rows(model: Unwrapped, y: Tensor, noise: RowNoise) -> Rows:
    if not model.transforms:
        return Rows(y, torch.zeros(len(y), device=y.device), noise)
    y = y if y.is_floating_point() else y.to(model.base.dtype or torch.get_default_dtype())
    return Rows(model.inverse(y), model.log_det(y), noise)
