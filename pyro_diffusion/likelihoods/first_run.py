"""The first run of a program: its sites, and which latents matter to no observation."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.likelihoods.missing import without_missing
from pyro_diffusion.likelihoods.run import (
    Message,
    isolated,
    log_density,
    observations,
    of_each_datum,
)
from pyro_diffusion.likelihoods.signature import signature_of
from pyro_diffusion.likelihoods.sites import (
    DiffusionSite,
    check_exact,
    check_given,
    check_names,
    check_subsamples,
    choose_site,
    factorizes,
)
from pyro_diffusion.unwrapping import unwrap_to
from pyro_diffusion.validation import check_finite

__all__ = ["FirstRun", "first_run"]

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
        self.subsamples, self.redrawn = subsamples, set[str]()
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
            self.redrawn.add(name)
        elif given is not None and not torch.equal(torch.as_tensor(own), given.to("cpu")):
            raise ValueError(
                f"plate {name!r}: got other indices in the model than in the guide, expected the same (pass "
                "create_plates to the outermost guide, with the model's own subsample)"
            )


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
    site = choose_site(nodes, run.sites, named)
    check_names(nodes, site, latents)
    sites = _observed_sites(nodes, latents)
    if not sites:
        raise ValueError(
            "model: got no observed site and no factor, expected at least one (pass data with `obs=`, or use "
            "pyro.condition)"
        )
    factorized = factorizes(site, site.diffusion.batch_shape, sites)
    check_subsamples(nodes[site.name], sites, factorized, run.redrawn)
    for node in sites:
        check_exact(node)
        if torch.is_tensor(node["value"]):
            try:
                check_finite(f"site {node['name']!r}", node["value"])
            except ValueError as error:
                raise ValueError(
                    f"{error} (for missing values: .mask, poutine.mask, obs_mask, or NanMaskedNormal)"
                ) from None
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
    check_given(nodes, site, {*latents, *idle})
    frames = [f for node in (nodes[site.name], *sites) for f in node["cond_indep_stack"]]
    nesting = max([site.batch_dims, *(-f.dim for f in frames if f.dim is not None)])
    return FirstRun(site, nesting, idle, run.dims, sites, factorized, signature, run.given)


def _observed_sites(nodes: dict[str, Message], latents: dict[str, Tensor]) -> list[Message]:
    return [without_missing(of_each_datum(node)) for node in observations(nodes, latents)]


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
