"""The guide of EM: the exact posterior of an enumerated latent, at the parameters as they are."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.validation import check_positive_int

__all__ = ["Responsibilities"]

_Sites = dict[str, Any]  # of a run of the model, by name


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The guide of a model whose latents are all enumerated."""


class Responsibilities:
    r"""A guide of discrete latents that is their exact posterior, held fixed: EM as variational inference.

    .. math:: q(k | x) = p_{\bar\theta}(k | x) = \frac{p(k)\,p(x | k)}{\sum_j p(j)\,p(x | j)},

    by Pyro's ``TraceEnum_ELBO.compute_marginals``, without gradients. With it the ELBO *is* log p(x) at the
    present parameters, its gradient is that of log p(x) (Fisher's identity), and a step of any optimizer is a
    partial M-step; :meth:`probs` has the responsibilities for an M-step in closed form. Exact for latents
    that are independent given the data, one for each datum of one plate, which may be subsampled.

    Other latents are drawn first, in a guide that ends with
    ``Responsibilities(poutine.condition(model, draws))(x)``; its ELBO has the discrete ones summed out.

    What is enumerated must have a density: a site of :class:`~pyro_diffusion.distributions.Diffusion`
    estimates a bound, which inside the sum over k is no bound. Take its flow, its chain unfolded, or a
    decoder.

    Args:
        model: the program; its discrete latents are enumerated in parallel.
        max_plate_nesting: number of its plates.

    Raises:
        ValueError: when called, for a model without discrete latents or with others too, several latents for
            the same data, whose posterior is no product, and plates nested deeper than said.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        ...     with pyro.plate("rows", len(x)):
        ...         k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        ...         pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)
        >>> guide = Responsibilities(model)
        >>> guide.probs(torch.tensor([0.0, 3.0]))["k"].shape
        torch.Size([2, 2])
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), guide.elbo)

    References:
        Dempster, Laird and Rubin 1977; Neal and Hinton 1998, A view of the EM algorithm that justifies
        incremental, sparse, and other variants.
    """

    def __init__(self, model: Callable[..., Any], max_plate_nesting: int = 1) -> None:
        if not callable(model):
            raise ValueError(f"model: got {type(model).__name__}, expected a Pyro program")
        nesting = check_positive_int("max_plate_nesting", max_plate_nesting)
        self.model = model
        self.elbo = TraceEnum_ELBO(max_plate_nesting=nesting)

    @torch.no_grad()
    def _marginals(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], _Sites]:
        """Responsibilities, and the sites of a run of the model on the same rows."""
        with poutine.block(), _noted():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        sites: _Sites = {k: v for k, v in trace.nodes.items() if v["type"] == "sample"}
        _check_latents(sites, self.elbo.max_plate_nesting)
        # a plate that draws some of its rows is to have these again
        for name, site in list(trace.nodes.items()):
            if not site_is_subsample(site):
                trace.remove_node(name)
        with poutine.block(), _noted():
            enumerated = config_enumerate(poutine.replay(self.model, trace), default="parallel")
            found: dict[str, Any] = self.elbo.compute_marginals(
                enumerated, _nothing, *args, **kwargs
            )
        return found, sites

    def probs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Responsibilities by name, (rows, values), the E-step's result; of ``Bernoulli``, of the value 1."""
        return {name: q.probs for name, q in self._marginals(*args, **kwargs)[0].items()}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The guide, to be run as Pyro runs one."""
        found, sites = self._marginals(*args, **kwargs)
        plates: dict[str, Any] = {}
        for name, q in found.items():
            with ExitStack() as entered:
                for frame in sites[name]["cond_indep_stack"]:
                    if frame.dim is None:  # a loop, each of whose turns has sites of its own
                        continue
                    if frame.name not in plates:
                        rows = sites[frame.name]
                        taken = None if len(rows["value"]) == rows["fn"].size else rows["value"]
                        plates[frame.name] = pyro.plate(
                            frame.name, rows["fn"].size, subsample=taken, dim=frame.dim
                        )
                    entered.enter_context(plates[frame.name])
                pyro.sample(name, q, infer={"enumerate": "parallel"})


@contextmanager
def _noted() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(
            "model: got an error where it ran enumerated, expected arguments that it takes"
        )
        raise


def _check_latents(sites: _Sites, max_plate_nesting: int) -> None:
    """Refuse what the product of marginals is not the exact posterior of.

    Raises:
        ValueError: naming the sites.
    """
    latents = {
        name: site
        for name, site in sites.items()
        if not site["is_observed"] and not site_is_subsample(site)
    }
    others = [name for name, site in latents.items() if not site["fn"].has_enumerate_support]
    if len(others) == len(latents):
        raise ValueError("model: got no discrete latent, expected one to enumerate")
    if others:
        raise ValueError(
            f"model: got latents {others} that cannot be enumerated, expected discrete ones of finite "
            "support alone: make the others parameters, or draw them in a guide, which then calls "
            "Responsibilities(poutine.condition(model, draws))"
        )
    depth = max((-f.dim for s in sites.values() for f in s["cond_indep_stack"] if f.dim), default=0)
    if depth > max_plate_nesting:
        raise ValueError(
            f"max_plate_nesting: got {max_plate_nesting}, expected {depth}, the plates of the model"
        )
    frames = {
        name: {(f.name, f.counter) for f in site["cond_indep_stack"]}
        for name, site in latents.items()
    }
    for one, other in combinations(latents, 2):
        if not frames[one] or not frames[other] or frames[one] & frames[other]:
            raise ValueError(
                f"model: got latents {one!r} and {other!r} for the same data, expected one for each datum: "
                "their posterior is not the product of what each has alone; make them one site of all pairs "
                "of values"
            )
