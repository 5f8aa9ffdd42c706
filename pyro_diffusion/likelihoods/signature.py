"""What tells one structure of a program from another: sites, shapes, and the operations between them."""

from collections.abc import Iterable
from typing import Any

from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.likelihoods.run import Message
from pyro_diffusion.unwrapping import unwrap

__all__ = ["signature_of", "structure"]


def signature_of(nodes: dict[str, Message], given: Iterable[str], total: Tensor) -> Any:
    """The structure of a run: its sample sites in order, and the autograd graph of what they add up to.

    Args:
        nodes: sample sites by name.
        given: names of those whose value was given.
        total: the log-density of all observations.
    """
    names = set(given)
    return tuple((*_site(node), name in names) for name, node in nodes.items()), _graph(total)


def structure(x: Any) -> Any:
    """An argument without the numbers in its tensors; what has no structure of its own is itself."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device, x.requires_grad
    if isinstance(x, dict):
        return dict, tuple((key, structure(value)) for key, value in x.items())
    if isinstance(x, list | tuple):
        return type(x), tuple(map(structure, x))
    if isinstance(x, int | float | complex | str | bytes | None):
        return type(x), x
    return type(x), id(x)


def _site(node: Message) -> tuple[Any, ...]:
    fn = node["fn"]
    head = node["name"], node["is_observed"], type(fn)
    if site_is_subsample(node):  # type: ignore[arg-type]
        return (*head, fn.size, fn.subsample_size)
    inside = unwrap(fn)
    plates = tuple((f.name, f.dim, f.size, f.full_size) for f in node["cond_indep_stack"])
    rest = (structure(node[key]) for key in ("value", "mask", "scale"))
    return (
        *head,
        type(inside.base),
        tuple(map(type, inside.wrappers)),
        tuple(map(type, inside.transforms)),
        fn.batch_shape,
        fn.event_shape,
        plates,
        bool(node["infer"].get("_deterministic")),
        *rest,
    )


def _graph(total: Tensor) -> tuple[str, ...]:
    """Names of the operations behind a tensor, each once, depth first."""
    names, seen, ahead = [], set(), [total.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        ahead += [following for following, _ in node.next_functions]
    return tuple(names)
