"""What in a program may depend on what, given any of its sites: its moral graph."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from pyro.ops.provenance import get_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_diffusion.infer.simulators.runs import score, site_score, sites_of, traced
from pyro_diffusion.likelihoods.run import Message, isolated, unconditioned

__all__ = ["moral_graph"]

MOST = 4096  # coordinates of all sites up to which a graph is computed

Plates = dict[str, Tensor]


class _Escapes(TorchFunctionMode):
    """Notices whether a drawn value leaves torch or is written into a tensor: its origin is lost then."""

    READS = frozenset(
        {
            *("item", "tolist", "numpy", "__array__", "__bool__"),
            *("__float__", "__int__", "__index__", "__complex__"),
        }
    )
    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        into = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if name in self.READS or into:
            known = get_provenance(args[:1]) if into else frozenset()
            self.found |= bool(get_provenance([args, kwargs]) - known)
        return func(*args, **(kwargs or {}))


def _check_names(parents: Mapping[str, Collection[str]], nodes: Mapping[str, Any]) -> None:
    named = {*parents, *(name for each in parents.values() for name in each)}
    unknown = sorted(str(name) for name in named if name not in nodes)
    if unknown:
        raise ValueError(f"graph: got sites {unknown}, expected names out of {list(nodes)}")


def moral_graph(
    program: Callable[..., Any],
    args: Any,
    kwargs: Any,
    shapes: Mapping[str, torch.Size],
    parents: Mapping[str, Collection[str]] | None = None,
) -> Tensor | None:
    r"""Which coordinates of sites are neighbours: (M, M) booleans, symmetric, with a True diagonal.

    A program's density is :math:`\prod_i p(x_i | x_{pa(i)})`, and the moral graph joins all members of every
    family :math:`\{i\} \cup pa(i)`. Any conditional :math:`p(x_F | x_C)` is the same product with :math:`x_C`
    filled in, so it is Markov on this graph without C. Noise on every free coordinate is one more factor for
    each alone, which adds no edge. So in :math:`E[x_{0,i} | x_{F,t}, x_C]` coordinate i depends on another
    only by paths through free ones. No edge may be left out for the sake of a conditioning set: a child that
    is not given is still seen through its noise, and so couples its parents at every level but the last.

    Sites in the same plate are joined at equal rows only, as the plate says; with a warning at all rows, if
    rows of the program depend on one another all the same. Coordinates of one event are joined. Sites that
    are left out (integrated out) join all whom a path through them leads to.

    Args:
        program: the Pyro program.
        args: its arguments.
        kwargs: likewise.
        shapes: of the unconstrained values of the sites to keep, in the order of coordinates.
        parents: of each site, where the program's own dependencies are not to be read.

    Returns:
        None, with a warning, if the program takes drawn numbers out of torch or writes them into tensors; and
        for more than :data:`MOST` coordinates. Everything may then depend on everything.

    Raises:
        ValueError: for parents, or of sites, that the program has not.
    """
    program = unconditioned(program)
    nodes = sites_of(traced(program, args, kwargs))
    if parents is None:
        parents = _parents(program, args, kwargs)
        if parents is None:
            return None
    else:
        _check_names(parents, nodes)
    order = [*shapes, *(name for name in nodes if name not in shapes)]
    crossed = _crossed(program, args, kwargs)
    plates = [_plates(nodes[name], shapes.get(name), crossed) for name in order]
    sizes = [len(next(iter(each.values()))) for each in plates]
    if sum(sizes) > MOST:
        return None
    families = torch.eye(sum(sizes)).split(sizes)
    for name, own, rows in zip(order, plates, families, strict=True):
        for other, theirs, block in zip(order, plates, rows.split(sizes, 1), strict=True):
            if other == name or other in parents.get(name, ()):
                block.copy_(_joined(own, theirs))
    joint = torch.cat(families)
    return _without((joint.mT @ joint) > 0, sum(sizes[: len(shapes)]))


def _parents(
    program: Callable[..., Any], args: Any, kwargs: Any
) -> Mapping[str, Collection[str]] | None:
    """The sites that each site's distribution was computed from, if all of that was torch's."""
    # validation reads, too
    with isolated(), pyro.validation_enabled(False), _Escapes() as escapes:
        relations = get_model_relations(program, tuple(args), dict(kwargs))
    found = {name: set(parents) for name, parents in relations["sample_sample"].items()}
    kinds = relations["sample_dist"]
    missed = False
    for up, down in _felt(program, args, kwargs):
        # Pyro looks through point masses, at what they were computed from
        missed |= kinds[up] != "Delta" and up not in found[down]
        found[down].add(up)
    if not escapes.found and not missed:
        return found
    warnings.warn(
        "model: takes drawn numbers out of torch (if, float, numpy, torch.tensor), writes them into tensors "
        "or has noise that is no site, so that its dependencies cannot be read: each site is taken to depend "
        "on all others (or give graph={site: parents})",
        stacklevel=2,
    )
    return None


def _felt(program: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[tuple[str, str]]:
    """Pairs of a site and another whose density, at the same values else, changes with the first's value."""
    one, other = (sites_of(traced(program, args, kwargs)) for _ in range(2))
    values = {name: node["value"] for name, node in one.items()}

    def scores(**changed: Tensor) -> dict[str, Tensor]:
        run = poutine.condition(program, {**values, **changed})
        return {name: score(node) for name, node in sites_of(traced(run, args, kwargs)).items()}

    before = scores()
    for up in values:
        after = scores(**{up: other[up]["value"]}) if up in other else {}
        for down, found in after.items():
            if down != up and not torch.allclose(found, before[down], 0.0, 0.0, equal_nan=True):
                yield up, down


def _crossed(program: Callable[..., Any], args: Any, kwargs: Any) -> set[str]:
    """Plates in which densities of some rows change with values of others, which a plate rules out."""
    one, other = (sites_of(traced(program, args, kwargs)) for _ in range(2))
    values = {name: node["value"] for name, node in one.items()}
    sizes = {
        f.name: f.size for n in one.values() for f in n["cond_indep_stack"] if f.dim is not None
    }
    found = set()
    for plate, size in sizes.items():
        inside = {n: f.dim for n in one for f in one[n]["cond_indep_stack"] if f.name == plate}
        # any two rows differ in a bit of their numbers
        bits = [torch.arange(size) >> k & 1 > 0 for k in range((size - 1).bit_length())]
        for moved in [*bits, *(~bit for bit in bits)]:
            changed = dict(values)
            for name, dim in inside.items():
                if name not in other or other[name]["value"].shape != values[name].shape:
                    continue
                axis = dim - one[name]["fn"].event_dim
                rows = moved.to(values[name].device).reshape(-1, *(1,) * (-axis - 1))
                changed[name] = torch.where(rows, other[name]["value"], values[name])
            after = sites_of(traced(poutine.condition(program, changed), args, kwargs))
            kept = (~moved).nonzero().squeeze(1)
            for name, dim in inside.items():
                if name in after:
                    was, now = (
                        site_score(n).movedim(dim, 0)[kept.to(values[name].device)]
                        for n in (one[name], after[name])
                    )
                    if not torch.allclose(was, now, 0.0, 0.0, equal_nan=True):
                        found.add(plate)
    if found:
        warnings.warn(
            f"model: rows of plates {sorted(found)} depend on one another, expected rows that are "
            "independent given what is outside, as a plate says; all their rows are taken to be neighbours",
            stacklevel=3,
        )
    return found


def _plates(node: Message, shape: torch.Size | None, crossed: Collection[str]) -> Plates:
    """Row of every coordinate of a site in each of its plates; `""` has zeros, whatever the plates."""
    value = node["value"].shape
    shape = value if shape is None else shape
    batch = shape[: len(value) - node["fn"].event_dim]
    rows = {"": torch.zeros(shape.numel(), dtype=torch.long)}
    for frame in node["cond_indep_stack"]:
        axis = None if frame.dim is None else len(batch) + frame.dim
        if axis is None or axis < 0 or batch[axis] == 1 or frame.name in crossed:
            continue
        index = torch.arange(batch[axis]).reshape(-1, *(1,) * (len(shape) - axis - 1))
        rows[frame.name] = index.expand(shape).flatten()
    return rows


def _joined(one: Plates, other: Plates) -> Tensor:
    """Pairs of coordinates that are in the same row of every plate that both are in."""
    shared = [name for name in one if name in other]
    return torch.stack([one[n].unsqueeze(1) == other[n] for n in shared]).all(0)


def _without(graph: Tensor, kept: int) -> Tensor:
    """The graph of the first nodes when the others are integrated out."""
    inner, edges = graph[kept:, kept:], graph[:kept, kept:].float()
    if not inner.numel():
        return graph
    while not torch.equal(further := (inner.float() @ inner.float()) > 0, inner):
        inner = further
    return graph[:kept, :kept] | ((edges @ inner.float() @ edges.mT) > 0)
