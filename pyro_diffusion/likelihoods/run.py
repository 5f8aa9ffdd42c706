"""One run of a Pyro program with its latents given, and its observed sites."""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamHandler
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = [
    "Message",
    "check_fixed_rows",
    "collapse",
    "handlers",
    "is_computed",
    "isolated",
    "log_density",
    "observations",
    "observed",
    "of_each_datum",
    "unconditioned",
]

Message = dict[str, Any]

_ONE_AT_A_TIME = threading.RLock()


def handlers(program: Any) -> Iterator[Any]:
    """The Pyro handlers that a program is wrapped in, outermost first."""
    while True:
        if isinstance(program, ReparamHandler):
            yield program.msngr
            program = program.fn
        elif isinstance(program, functools.partial):
            # Pyro's own partials are those of a handler and what it wraps.
            handler = program.args[0] if len(program.args) > 1 else None
            wrapped = isinstance(handler, Messenger)
            if wrapped:
                yield handler
            program = program.args[1] if wrapped else program.func
        else:
            return


def of_each_datum(site: Message) -> Message:
    """A site without the factor N / B of subsampled plates, which makes B data stand for N."""
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            scale = scale * frame.size / frame.full_size
    return {**site, "scale": scale}


def check_fixed_rows(msg: Message) -> None:
    """Refuse a plate that draws a subsample of its own, so that no two runs of a program see the same data.

    Raises:
        ValueError: naming the plate and the ways out.
    """
    size, full_size = getattr(msg["fn"], "subsample_size", None), getattr(msg["fn"], "size", None)
    if (
        site_is_subsample(cast(Any, msg))
        and msg["value"] is None
        and size is not None
        and size < full_size
    ):
        name = msg["name"]
        raise ValueError(
            f"plate {name!r}: got a subsample of {size} of {full_size} that is drawn anew at each run of the "
            f"model, expected the whole plate, or pyro.plate({name!r}, {full_size}, subsample=indices)"
        )


class _Redrawn(Messenger):
    """Draws some observed sites anew, where the program is: what comes after them sees the draw."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])


def observed(
    program: Callable[[], Any], data: dict[str, Tensor], redrawn: Collection[str] = ()
) -> list[Message]:
    """The observed sites of a run with latent values given, some of them drawn anew."""
    with isolated(), poutine.trace() as tracer, poutine.condition(data=data), _Redrawn(redrawn):
        program()
    nodes: Any = tracer.trace.nodes
    return observations(nodes, data)


def log_density(site: Message) -> Tensor:
    """The log-probability of an observed site, scaled and masked, of its batch shape."""
    try:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except Exception as error:
        error.add_note(
            f"site {site['name']!r}: got a value of shape {tuple(site['value'].shape)}, expected one that "
            f"its {type(site['fn']).__name__} scores"
        )
        raise
    out: Tensor = scale_and_mask(log_prob, site["scale"], site["mask"])
    return out


def collapse(x: Tensor, lead: int, nesting: int, event: int, kept: list[int]) -> Tensor:
    """Move all but the sample and the kept plates' dimensions to one last dimension.

    Args:
        x: sample + plates + event; sample dimensions may be missing where nothing depends on them.
        lead: how many dimensions are sample dimensions.
        nesting: how many are plates'.
        event: how many are event dimensions.
        kept: which of the plates' dimensions stay, from the right.
    """
    missing = lead + nesting + event - x.dim()
    if missing > 0:
        x = x.reshape((1,) * missing + x.shape)
    stay = [x.dim() - event + d for d in kept]
    rest = [d for d in range(lead, x.dim()) if d not in stay]
    shape = x.shape[:lead] + torch.Size(x.shape[d] for d in stay)
    return x.permute((*range(lead), *stay, *rest)).reshape(*shape, -1)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Run a program as if no handler and no plate were around it: the caller may be inside some.

    Pyro's handlers are one stack for all threads, so runs wait for one another.
    """
    allocator, enumerator = runtime._DIM_ALLOCATOR, runtime._ENUM_ALLOCATOR
    with _ONE_AT_A_TIME:
        around, allocator._stack = allocator._stack, []
        dims = copy.deepcopy(enumerator.__dict__)
        try:
            with poutine.block():
                yield
        finally:
            allocator._stack = around
            # What is summed over inside of a guide does not move what its model is about to sum over.
            enumerator.__dict__.clear()
            enumerator.__dict__.update(dims)


def is_computed(site: Message) -> bool:
    """Whether a site is neither drawn nor data: `pyro.deterministic`, or what a reparametrizer made a latent.

    That is, as far as Pyro says, an observation, of a point mass by the very tensor that is its point.
    """
    infer = site["infer"]
    if infer.get("_deterministic"):
        return True
    base = site["fn"]
    while hasattr(base, "base_dist"):
        base = base.base_dist
    # `poutine.uncondition` of Pyro's draws again, and keeps what was observed
    value = infer.get("obs") if infer.get("was_observed") else site["is_observed"] and site["value"]
    return isinstance(base, Delta) and base.v is value


class _Uncondition(UnconditionMessenger):
    """Leaves alone what is computed: a plate around would draw a whole batch of it for each of the batch."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_computed(msg):
            super()._pyro_sample(msg)


def unconditioned(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program without its data, as `poutine.uncondition`, in plates of any number of runs, too."""
    out: Callable[..., Any] = _Uncondition()(program)
    return out


def observations(nodes: dict[str, Message], given: dict[str, Tensor]) -> list[Message]:
    """The observed sites of a trace, factors among them; not what is given and not `pyro.deterministic`.

    What a reparametrizer computed is among them: it may have a density, that of a change of variables.
    """
    return [
        node
        for name, node in nodes.items()
        if node["type"] == "sample"
        and node["is_observed"]
        and name not in given
        and not node["infer"].get("_deterministic")
    ]
