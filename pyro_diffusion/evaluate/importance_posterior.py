"""A guide's draws, corrected by the model: importance weights, evidence, and whether to believe them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.importance import vectorized_importance_weights
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.estimate import LogLikelihoodEstimate
from pyro_diffusion.evaluate.importance import from_log_weights
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_positive_int

__all__ = ["WeightedDraws", "importance_posterior"]

HIGHEST_KHAT = 0.7


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of a guide with their importance weights under a model.

    Attributes:
        draws: latent values by name, (num_samples,) + the shape of each.
        log_weights: (num_samples,), log p(x, z) - log q(z | x) in nats.
        log_evidence: log p(x) with its standard error, effective sample size and Pareto k-hat, of one datum.
    """

    draws: dict[str, Tensor]
    log_weights: Tensor
    log_evidence: LogLikelihoodEstimate

    @property
    def weights(self) -> Tensor:
        """Self-normalized weights, (num_samples,)."""
        return self.log_weights.softmax(0)

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws resampled by their weights, with repetitions: consistent in the number of weighted draws.

        Args:
            num_samples: far fewer than the effective sample size, lest draws repeat.
        """
        check_positive_int("num_samples", num_samples)
        index = torch.multinomial(self.weights, num_samples, replacement=True)
        return {name: value[index] for name, value in self.draws.items()}

    def __str__(self) -> str:
        estimate = self.log_evidence
        assert estimate.ess is not None and estimate.khat is not None
        return (
            f"{len(self.log_weights)} draws: log evidence {float(estimate.value):.3f} +- "
            f"{float(estimate.standard_error):.3f}, effective sample size {float(estimate.ess):.0f}, "
            f"k-hat {float(estimate.khat):.2f}"
        )


class _FromPrior(Messenger):
    """Leaves out the densities of latents that are drawn from the model itself."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["mask"] = False


@torch.no_grad()
def importance_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    **kwargs: Any,
) -> WeightedDraws:
    r"""Correct a guide's draws by the model's likelihood and prior.

    Draws :math:`z_i \sim q(z | x)` get the weights :math:`w_i = p(x, z_i) / q(z_i | x)`, by Pyro's
    ``vectorized_importance_weights``. Their mean is an unbiased estimate of p(x); averages under them are
    consistent in ``num_samples`` for the *exact* posterior, if the guide has a density where the model has
    one. The guide's density must be one and no bound: that of an
    :class:`~pyro_diffusion.infer.AutoAmortized` is. Latents that the guide leaves out are drawn from their
    prior and weigh nothing. Model and guide must run in a plate of all draws.

    Args:
        model: the program, with a likelihood: observed sites whose densities can be evaluated.
        guide: of the same arguments.
        args: of both, data included.
        num_samples: number of draws.
        kwargs: of both.

    Returns:
        Draws, weights and log evidence. Above a k-hat of 0.7 an ``UnreliableWarning`` says not to believe
        them.

    Raises:
        ValueError: for fewer than two draws, or weights that are NaN.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.5, 0.8))
        >>> found = importance_posterior(model, guide, num_samples=2000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))
        >>> bool((found.log_evidence.value - exact).abs() < 0.05)
        True

    References:
        Vehtari et al., Pareto smoothed importance sampling, JMLR 25(72), 2024 (k-hat).
    """
    check_positive_int("num_samples", num_samples, at_least=2)
    tracer = poutine.trace(poutine.block(model, hide_types=["param"]))
    nodes: Any = tracer.get_trace(*args, **kwargs).nodes
    sites = {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }
    frames = [f.dim for node in sites.values() for f in node["cond_indep_stack"] if f.dim]
    proposed = poutine.trace(poutine.block(guide, hide_types=["param"])).get_trace(*args, **kwargs)
    left_out = {n for n, node in sites.items() if not node["is_observed"]} - {*proposed.nodes}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found vars in model but not guide", UserWarning)
        log_weights, trace, _ = vectorized_importance_weights(
            _FromPrior(left_out)(model),
            guide,
            *args,
            num_samples=num_samples,
            max_plate_nesting=-min(frames, default=0),
            **kwargs,
        )
    log_weights = log_weights.detach().double().cpu()
    observed = sum(
        torch.as_tensor(node["value"]).numel()
        for node in sites.values()
        if node["is_observed"] and "_deterministic" not in node["infer"]
    )
    estimate = from_log_weights(log_weights.unsqueeze(1), 0, max(observed, 1))
    draws = {}
    for name, node in sites.items():
        if not node["is_observed"]:
            value, shape = trace.nodes[name]["value"], (num_samples, *node["value"].shape)
            whole = value.numel() == torch.Size(shape).numel()
            draws[name] = (value.reshape(shape) if whole else value.expand(shape)).detach()
    found = WeightedDraws(draws, log_weights, estimate)
    assert estimate.khat is not None
    if not float(estimate.khat) <= HIGHEST_KHAT:
        warn_unreliable(
            f"importance weights: got {found}; above a k-hat of {HIGHEST_KHAT} neither draws nor evidence "
            "are to be believed: train the guide longer or on more simulations, or draw more"
        )
    return found
