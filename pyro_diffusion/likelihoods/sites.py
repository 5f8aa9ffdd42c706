"""Which site of a Pyro program is its diffusion site, and what must hold for a likelihood of it."""

from typing import Any, NamedTuple, cast

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions import ProbabilityFlow
from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.distributions.bounded import BoundedDistribution
from pyro_diffusion.likelihoods.run import Message
from pyro_diffusion.unwrapping import unwrap_to

__all__ = [
    "DiffusionSite",
    "MissingLatents",
    "check_exact",
    "check_given",
    "check_names",
    "check_subsamples",
    "choose_site",
    "factorizes",
]


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
        if decoder is not None:
            x0 = decoder.data_of(x0)
        for transform in self.transforms:
            x0 = transform(x0)
        return x0


class MissingLatents(ValueError):
    """Other latents that observations depend on have no value."""

    def __init__(self, names: list[str], message: str) -> None:
        super().__init__(message)
        self.names = names


def choose_site(
    nodes: dict[str, Message], sites: dict[str, DiffusionSite], named: str | None
) -> DiffusionSite:
    """The diffusion site of a run: the one named, or the only one.

    Raises:
        ValueError: for none, several and none named, and a named site that is none.
    """
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


def check_names(nodes: dict[str, Message], site: DiffusionSite, latents: dict[str, Tensor]) -> None:
    """Refuse latents that are no latent sites of the model.

    Raises:
        ValueError: naming the first such.
    """
    for name in latents:
        if name == site.name or name not in nodes or nodes[name]["is_observed"]:
            raise ValueError(
                f"latents: got {name!r}, expected names of latent sites of the model other than {site.name!r}"
            )


def check_given(nodes: dict[str, Message], site: DiffusionSite, given: set[str]) -> None:
    """Refuse latent sites without a value.

    Raises:
        MissingLatents: naming them.
    """
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


def check_subsamples(
    node: Message, sites: list[Message], factorized: bool, redrawn: set[str]
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
        if frame.name in redrawn:
            raise ValueError(
                f"{got} that is drawn anew at each run of the model, expected the indices of those that are "
                f"meant, pyro.plate({frame.name!r}, {frame.full_size}, subsample=indices), or the whole plate"
            )


def check_exact(node: Message) -> None:
    """Refuse an observed site whose log_prob is an estimate.

    Raises:
        ValueError: naming the site.
    """
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


def factorizes(site: DiffusionSite, batch: torch.Size, sites: list[Message]) -> bool:
    """Whether each datum of a diffusion site has observed sites of its own."""
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
