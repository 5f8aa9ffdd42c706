"""Where a Pyro program has its diffusion site, and whether its likelihood can be extracted."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions import (
    BoundedDistribution,
    DenoisedDistribution,
    ProbabilityFlow,
    QuantizedDecoder,
)
from pyro_diffusion.likelihoods.missing import without_missing
from pyro_diffusion.likelihoods.run import (
    Message,
    isolated,
    log_density,
    observations,
    of_each_datum,
)
from pyro_diffusion.likelihoods.signature import signature_of
from pyro_diffusion.unwrapping import unwrap_to
from pyro_diffusion.validation import check_finite

__all__ = ["DiffusionSite", "FirstRun", "MissingLatents", "first_run"]


class DiffusionSite(NamedTuple):
    """A sample site whose distribution is a diffusion, perhaps transformed.

    Attributes:
        name: of the site.
        diffusion: at its full batch shape (plates included).
        transforms: from x_0's scale to the site's value, first to last.
        batch_dims: how many dimensions of the site's value are batch; the diffusion may have more.
        plates: dimension (from the right) of each plate around the site, by name.
        distribution: the site's own, with all that stands around the diffusion.
    """

    name: str
    diffusion: DenoisedDistribution
    transforms: tuple[Any, ...]
    batch_dims: int
    plates: dict[str, int]
    distribution: Any

    def value(self, x0: Tensor) -> Tensor:
        """x_0 as the site's value: through the decoder's scale and the transforms."""
        decoder = getattr(self.diffusion, "decoder", None)
        if isinstance(decoder, QuantizedDecoder):
            # The integers' own line: differentiable, and exact where x_0 is one of the levels.
            x0 = (x0 - decoder.low) / decoder.width
        for transform in self.transforms:
            x0 = transform(x0)
        return x0


REDRAWS = 5  # of latents that seem to matter to no observation


class _TrialMessenger(Messenger):
    """Gives every diffusion a trial value, so that nothing is sampled from one, and latents theirs."""

    def __init__(
        self,
        trial: Callable[[DenoisedDistribution], Tensor],
        latents: dict[str, Tensor],
        named: str | None,
        subsamples: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.trial, self.latents, self.named = trial, latents, named
        self.subsamples, self.chance = subsamples, set[str]()
        self.given: dict[str, Tensor] = {}
        self.sites: dict[str, DiffusionSite] = {}
        self.trials: list[Tensor] = []
        self.dims: dict[str, tuple[int, int]] = {}
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            self._subsample(msg)
            return
        if msg["is_observed"]:
            return
        found = unwrap_to(fn, DenoisedDistribution)
        if name in self.latents and name != self.named:
            batch = len(fn.batch_shape)
            own = batch + len(fn.event_shape)
            self.dims[name] = batch, own
            msg["value"] = self.latents[name][(0,) * max(self.latents[name].dim() - own, 0)]
        elif found is not None:
            frames = [f for f in msg["cond_indep_stack"] if f.dim is not None]
            plates = {f.name: f.dim for f in frames}
            site = DiffusionSite(
                name, found.base, found.transforms, len(fn.batch_shape), plates, fn
            )
            self.sites[name] = site
            self.trials.append(self.trial(site.diffusion))
            msg["value"] = site.value(self.trials[-1])
        else:
            value = fn(*msg["args"], **msg["kwargs"]).detach()
            msg["value"] = value.requires_grad_() if value.is_floating_point() else value
            self.drawn[name] = msg["value"]

    def _subsample(self, msg: Any) -> None:
        """Give a subsampled plate the indices that are given, or note that it draws them anew."""
        name, given = msg["name"], self.subsamples.get(msg["name"])
        own, fn = msg["value"], msg["fn"]
        if own is None and given is not None:
            msg["value"] = self.given[name] = given
        elif own is None and fn.subsample_size is not None and fn.subsample_size < fn.size:
            self.chance.add(name)
        elif given is not None and not torch.equal(torch.as_tensor(own), given.to("cpu")):
            raise ValueError(
                f"plate {name!r}: got other indices in the model than in the guide, expected the same (pass "
                "create_plates to the outermost guide, with the model's own subsample)"
            )


class MissingLatents(ValueError):
    """Other latents that observations depend on have no value."""

    def __init__(self, names: list[str], message: str) -> None:
        super().__init__(message)
        self.names = names


class FirstRun(NamedTuple):
    """What the first run of a program finds.

    Attributes:
        site: its diffusion site.
        nesting: how many dimensions plates and the site's batch take, from the right.
        idle: latents that no observation depends on, and some value of each.
        dims: how many batch dimensions a given latent has in a single run, and how many in all.
        observed: the observed sites.
        factorized: whether each datum of the site has its own observations.
        signature: what tells one structure of the program from another.
        subsamples: the indices that plates were given.
    """

    site: DiffusionSite
    nesting: int
    idle: dict[str, Tensor]
    dims: dict[str, tuple[int, int]]
    observed: list[Message]
    factorized: bool
    signature: Any
    subsamples: dict[str, Tensor]


def first_run(
    program: Callable[[], Any],
    named: str | None,
    latents: dict[str, Tensor],
    trial: Callable[[DenoisedDistribution], Tensor],
    subsamples: dict[str, Tensor],
    known: Any = None,
) -> FirstRun:
    """Run a program once and find its sites.

    Args:
        program: the model with its arguments.
        named: the diffusion site's name, if it is given.
        latents: values of other latents.
        trial: gives every diffusion its value.
        subsamples: indices of subsampled plates.
        known: a signature whose idle latents are known, so that one more run is enough to confirm them.

    Raises:
        ValueError: for no diffusion site, several, an observed one, other latents, plates of which a
            subsample is not enough, no observations, or such as are not finite though no mask hides them.
    """
    run = _TrialMessenger(trial, latents, named, subsamples)
    nodes = _traced(run, program)
    site = _choose(nodes, run.sites, named)
    _check_names(nodes, site, latents)
    sites = _observed_sites(nodes, latents)
    if not sites:
        raise ValueError(
            "model: got no observed site and no factor, expected at least one (pass data with `obs=`, or use "
            "pyro.condition)"
        )
    factorized = _factorizes(site, site.diffusion.batch_shape, sites)
    _check_subsamples(nodes[site.name], sites, factorized, run.chance)
    for node in sites:
        _check_exact(node)
        if torch.is_tensor(node["value"]):
            check_finite(f"site {node['name']!r}", node["value"])
    signature = signature_of(nodes, latents, _total(sites))
    idle = _idle(sites, run.drawn, [nodes[site.name]["value"], *_tensors(site.diffusion)])
    redraws = 1 if signature == known else REDRAWS
    for _ in range(redraws if idle else 0):
        # What no gradient shows, a comparison or a rounding: the same x_0 with other values of them.
        kept = iter(run.trials)
        again = _TrialMessenger(functools.partial(_next, kept), latents, named, subsamples)
        others = _observed_sites(_traced(again, program), latents)
        if not torch.equal(_total(sites).detach(), _total(others).detach()):
            idle = {}
            break
    _check_given(nodes, site, {*latents, *idle})
    frames = [f for node in (nodes[site.name], *sites) for f in node["cond_indep_stack"]]
    nesting = max([site.batch_dims, *(-f.dim for f in frames if f.dim is not None)])
    return FirstRun(site, nesting, idle, run.dims, sites, factorized, signature, run.given)


def _observed_sites(nodes: dict[str, Message], latents: dict[str, Tensor]) -> list[Message]:
    return [without_missing(of_each_datum(node)) for node in observations(nodes, latents)]


def _check_subsamples(
    node: Message, sites: list[Message], factorized: bool, chance: set[str]
) -> None:
    """Refuse a subsampled plate unless each datum of the site is in it with its own observations."""
    around = {f.name for f in node["cond_indep_stack"]}
    frames = [f for site in (node, *sites) for f in site["cond_indep_stack"]]
    for frame in frames:
        if frame.full_size in (None, frame.size):
            continue
        got = f"plate {frame.name!r}: got a subsample of {frame.size} of {frame.full_size}"
        if frame.name not in around:
            raise ValueError(
                f"{got}, expected the whole plate: {node['name']!r} stands outside of it, and its posterior "
                "depends on all of the plate's data"
            )
        if not factorized:
            raise ValueError(
                f"{got}, expected the whole plate: an observed site outside of it depends on all of "
                f"{node['name']!r}"
            )
        if frame.name in chance:
            raise ValueError(
                f"{got} that is drawn anew at each run of the model, expected the indices of those that are "
                f"meant, pyro.plate({frame.name!r}, {frame.full_size}, subsample=indices), or the whole plate"
            )


def _choose(
    nodes: dict[str, Message], sites: dict[str, DiffusionSite], named: str | None
) -> DiffusionSite:
    if named is None:
        if len(sites) == 1:
            return next(iter(sites.values()))
        if sites:
            raise ValueError(
                f"site: got None and several diffusion sites, {', '.join(sites)}; expected the name of one, "
                "and values of the others in `latents`"
            )
        seen = [
            name
            for name, node in nodes.items()
            if unwrap_to(node["fn"], DenoisedDistribution) is not None
        ]
        raise ValueError(
            "model: got no diffusion site"
            + (f" that is not observed or given (of {', '.join(seen)})" if seen else "")
            + ", expected a sample site with a Diffusion, DiffusionSDE or ProbabilityFlow and no `obs`"
        )
    if named in sites:
        return sites[named]
    if named not in nodes:
        raise ValueError(
            f"site: got {named!r}, expected a sample site of the model: "
            f"{', '.join(nodes) or 'it has none'}"
        )
    if nodes[named]["is_observed"]:
        raise ValueError(
            f"site: got {named!r}, which is observed, expected a latent one (take its `obs` away: its values "
            "are what is inferred)"
        )
    raise ValueError(
        f"site: got {named!r} with a {type(nodes[named]['fn']).__name__}, expected a Diffusion, DiffusionSDE "
        "or ProbabilityFlow, perhaps transformed"
        + (f" (such as {', '.join(sites)})" if sites else "")
    )


def _check_names(
    nodes: dict[str, Message], site: DiffusionSite, latents: dict[str, Tensor]
) -> None:
    for name in latents:
        if name == site.name or name not in nodes or nodes[name]["is_observed"]:
            raise ValueError(
                f"latents: got {name!r}, expected names of latent sites of the model other than {site.name!r}"
            )


def _next(values: Iterator[Tensor], prior: DenoisedDistribution) -> Tensor:
    del prior
    return next(values)


def _traced(run: _TrialMessenger, program: Callable[[], Any]) -> dict[str, Message]:
    """The sample sites of a run."""
    with isolated(), torch.inference_mode(False), torch.enable_grad(), poutine.trace() as tracer:
        try:
            run(program)()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "model: failed with x_0 drawn from N(0, I), expected a program that runs for any real x_0 "
                f"(clamp what must be positive, or transform the site): {error}"
            ) from error
    traced: Any = tracer.trace.nodes
    return {k: node for k, node in traced.items() if node["type"] == "sample"}


def _total(sites: list[Message]) -> Tensor:
    parts = [log_density(node).sum() for node in sites]
    return sum(parts[1:], parts[0])


def _tensors(prior: DenoisedDistribution) -> list[Tensor]:
    """What the prior itself is made of."""
    denoiser = prior.denoiser
    return [*prior.context.values(), *denoiser.buffers(), *denoiser.parameters()]


def _idle(sites: list[Message], drawn: dict[str, Tensor], prior: list[Tensor]) -> dict[str, Tensor]:
    """Latents that neither observations nor the prior depend on: predictions, what `obs_mask` leaves out."""
    total = _total(sites)
    total = sum((v.sum() for v in prior if v.requires_grad), total)
    values = {name: value for name, value in drawn.items() if value.requires_grad}
    if not values:
        return {}
    slopes: tuple[Tensor | None, ...] = (None,) * len(values)
    if total.requires_grad:
        slopes = torch.autograd.grad(total, tuple(values.values()), allow_unused=True)
    return {
        name: value.detach()
        for (name, value), slope in zip(values.items(), slopes, strict=True)
        if slope is None
    }


def _check_given(nodes: dict[str, Message], site: DiffusionSite, given: set[str]) -> None:
    left = [
        name
        for name, node in nodes.items()
        if not node["is_observed"]
        and not site_is_subsample(cast(Any, node))
        and name not in given
        and name != site.name
    ]
    if left:
        raise MissingLatents(
            left,
            f"latents: got no value for {', '.join(left)}, expected one for every latent site but "
            f"{site.name!r}: pass latents={{{left[0]!r}: value, ...}} (held fixed, or drawn by another "
            "guide), or condition the model with pyro.condition",
        )


def _check_exact(node: Message) -> None:
    found, name = unwrap_to(node["fn"], DenoisedDistribution), node["name"]
    diffusion = None if found is None else found.base
    got = f"site {name!r}: got an observed {type(diffusion).__name__}"
    if isinstance(diffusion, BoundedDistribution):
        raise ValueError(
            f"{got}, whose log_prob is a random bound, expected its value as latents={{{name!r}: value}} "
            "(which leaves its own density out), or a ProbabilityFlow"
        )
    if isinstance(diffusion, ProbabilityFlow) and diffusion.trace.stochastic:
        raise ValueError(
            f"{got} with {type(diffusion.trace).__name__}(), whose log_prob is a random estimate (with a "
            "seed, too: each row has its own probes), expected one with ExactTrace()"
        )


def _factorizes(site: DiffusionSite, batch: torch.Size, sites: list[Message]) -> bool:
    if batch.numel() == 1:
        return True
    if len(batch) != site.batch_dims:
        return False  # dimensions that `to_event` or a transform made one datum
    dims = set(site.plates.values())
    declared = all(
        size == 1 or d in dims for d, size in zip(range(-len(batch), 0), batch, strict=True)
    )
    return declared and all(
        set(site.plates) <= {f.name for f in node["cond_indep_stack"]} for node in sites
    )
