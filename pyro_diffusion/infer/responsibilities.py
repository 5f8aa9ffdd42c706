"""The guide of EM: the exact posterior of an enumerated latent, at the parameters as they are."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_diffusion.validation import check_positive_int

__all__ = ["Responsibilities"]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The guide of a model whose latents are all enumerated."""


class Responsibilities:
    r"""A guide of discrete latents that is their exact posterior, held fixed: EM as variational inference.

    .. math:: q(k | x) = p_{\bar\theta}(k | x) = \frac{p(k)\,p(x | k)}{\sum_j p(j)\,p(x | j)},

    by Pyro's ``TraceEnum_ELBO.compute_marginals``, without gradients. With it the ELBO *is* log p(x) at the
    present parameters, its gradient is that of log p(x) (Fisher's identity), and a step of any optimizer is a
    partial M-step; :meth:`probs` has the responsibilities for an M-step in closed form. Exact for latents
    that are independent given the data, one for each datum of one plate.

    What is enumerated must have a density: a site of :class:`~pyro_diffusion.distributions.Diffusion`
    estimates a bound, which inside the sum over k is no bound. Take its flow, its chain unfolded, or a
    decoder.

    Args:
        model: the program; its discrete latents are enumerated in parallel.
        max_plate_nesting: number of its plates.

    Raises:
        ValueError: when called, for a model without discrete latents.

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

    def _marginals(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return self._enumerated(*args, **kwargs)
        except Exception as error:
            error.add_note(
                "model: got an error where it ran enumerated, expected arguments that it takes"
            )
            raise

    @torch.no_grad()
    def _enumerated(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        latents = [
            site
            for site in self._nodes(*args, **kwargs).values()
            if site["type"] == "sample" and not site["is_observed"]
        ]
        if not any(site["fn"].has_enumerate_support for site in latents):
            raise ValueError("model: got no discrete latent, expected one to enumerate")
        with poutine.block():
            enumerated = config_enumerate(self.model, default="parallel")
            found: dict[str, Any] = self.elbo.compute_marginals(
                enumerated, _nothing, *args, **kwargs
            )
        return found

    @torch.no_grad()
    def _nodes(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with poutine.block():
            nodes: dict[str, Any] = poutine.trace(self.model).get_trace(*args, **kwargs).nodes
        return nodes

    def probs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Responsibilities by name, (rows, values), the E-step's result."""
        return {name: q.probs for name, q in self._marginals(*args, **kwargs).items()}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The guide, to be run as Pyro runs one."""
        found, nodes = self._marginals(*args, **kwargs), self._nodes(*args, **kwargs)
        for name, q in found.items():
            with ExitStack() as plates:
                for frame in nodes[name]["cond_indep_stack"]:
                    plates.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                pyro.sample(name, q, infer={"enumerate": "parallel"})
