"""Many runs of a program as one, side by side in one more plate, and whether it may be run so."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_diffusion.infer.simulators.runs import score, sites_of, traced
from pyro_diffusion.likelihoods.run import Message, unconditioned

__all__ = ["is_vectorizable", "rows_of", "side_by_side"]

CROWD = 1000  # runs side by side, of which what mixes one in hundreds with the others shows


def is_vectorizable(
    program: Callable[..., Any], args: Any, kwargs: Any, runs: list[Any], nesting: int
) -> bool:
    """Whether the runs, repeated side by side in one more plate, score as they do one by one.

    A program that reads a number may branch on it. A branch that is rare in three runs is sure in a thousand
    of them side by side, so that a read is enough. What mixes runs without a read, ``torch.where`` of their
    largest value say, is looked for in a crowd of them.
    """
    single = [sites_of(run) for run in runs]
    data = {}
    for name in (n for n in single[0] if all(n in each for each in single)):
        values = [each[name]["value"] for each in single]
        batch = len(single[0][name]["fn"].batch_shape)
        if batch > nesting or any(value.shape != values[0].shape for value in values):
            return False
        data[name] = torch.stack(values)

    free = unconditioned(program)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pyro.validation_enabled(False), _Reads() as reads:  # validation reads, too
                together = side_by_side(free, single[0], len(runs), nesting, args, kwargs, data)
            if reads.found or not _score_alike(together, single, list(data), len(runs), nesting):
                return False
            crowd = side_by_side(free, single[0], CROWD, nesting, args, kwargs)
            rows = {n: rows_of(crowd[n], CROWD, nesting, v.shape[1:]) for n, v in data.items()}
            for i, each in enumerate(single):
                again = poutine.condition(free, {n: value[i] for n, value in rows.items()})
                single[i] = {**each, **sites_of(traced(again, args, kwargs))}
            return _score_alike(crowd, single, list(data), CROWD, nesting)
    except Exception:  # whatever a program that knows nothing of plates may raise
        return False


class _Reads(TorchDispatchMode):
    """Notices whether a number leaves a tensor: by `if`, `float`, `item`."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _score_alike(
    together: dict[str, Message],
    single: list[dict[str, Message]],
    names: list[str],
    count: int,
    nesting: int,
) -> bool:
    """Whether the first of so many runs side by side score as these, which have their values."""
    lead = (count,) + (1,) * nesting
    for name in names:
        own = score(together[name])
        own = own.expand(torch.broadcast_shapes(own.shape, lead)).reshape(count, -1).sum(1)
        alone = torch.stack([score(each[name]).sum() for each in single])
        if not torch.allclose(own[: len(single)], alone, rtol=1e-4, atol=1e-4, equal_nan=True):
            return False
    return True


def side_by_side(
    program: Callable[..., Any],
    single: dict[str, Message],
    count: int,
    nesting: int,
    args: Any,
    kwargs: Any,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Message]:
    """Sites of many runs that are one, inside one more plate on the left of the program's.

    As ``Predictive(parallel=True)``, which runs the program two more times to learn what is known here, and
    takes values of a site outside of the plates for values inside if they are vectors.

    Args:
        program: what is run.
        single: sites of one run, of all that are given at least.
        count: how many runs.
        nesting: dimensions of the program's plates.
        args: the program's.
        kwargs: likewise.
        given: values of some sites, (count,) + the shape of each in one run.
    """
    data = {}
    for name, value in (given or {}).items():
        missing = nesting - len(single[name]["fn"].batch_shape)
        data[name] = value.reshape(count, *(1,) * missing, *value.shape[1:])

    def together(*args: Any, **kwargs: Any) -> None:
        with pyro.plate("_num_simulations", count, dim=-nesting - 1):
            program(*args, **kwargs)

    return sites_of(traced(poutine.condition(together, data) if data else together, args, kwargs))


def rows_of(node: Message, count: int, nesting: int, shape: torch.Size) -> Tensor:
    """A site's value of each of so many runs side by side, (count,) + the shape in one run."""
    value: Tensor = node["value"]
    if value.numel() == count * shape.numel():
        return value.reshape(count, *shape)
    # one that knows nothing of some of its plates
    missing = nesting + node["fn"].event_dim - len(shape)
    return value.expand(count, *(1,) * missing, *shape).reshape(count, *shape)
