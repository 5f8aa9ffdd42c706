"""A guide's draws, corrected by the model: importance weights, evidence, and whether to believe them."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.util import plate_log_prob_sum
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.dynamics.refinement import refined
from pyro_diffusion.estimate import LogLikelihoodEstimate
from pyro_diffusion.evaluate.importance import from_log_weights
from pyro_diffusion.evaluate.solver_error import solver_error
from pyro_diffusion.infer.filtering.simulated_posterior import SimulatedPosterior
from pyro_diffusion.infer.simulators.runs import WholeData
from pyro_diffusion.likelihoods.run import is_computed
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.unwrapping import unwrap_to
from pyro_diffusion.validation import check_positive_int

__all__ = ["WeightedDraws", "importance_posterior"]

HIGHEST_KHAT = 0.7
TRIALS = 3
ALIKE = 1e-3  # nats


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of a guide with their importance weights under a model.

    Attributes:
        draws: latent values by name, (num_samples,) + the shape of each.
        log_weights: (num_samples,), log p(x, z) - log q(z | x) in nats.
        log_evidence: log p(x) with its standard error, effective sample size and Pareto k-hat, of one datum.
            The error is that of the draws and ``solver_error`` together.
        solver_error: how far it may be off by the tolerances of ODE solvers (nats), where densities take any:
            by the first 64 draws' difference to finer solutions. Approximate; also in the weights, alike
            for most draws, so that averages under them hardly see it.
    """

    draws: dict[str, Tensor]
    log_weights: Tensor
    log_evidence: LogLikelihoodEstimate
    solver_error: float = 0.0

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
        error = float(estimate.standard_error)
        known = f" +- {error:.3f}" if math.isfinite(error) else " (error not estimated)"
        return (
            f"{len(self.log_weights)} draws: log evidence {float(estimate.value):.3f}{known}, "
            f"effective sample size {float(estimate.ess):.0f}, k-hat {float(estimate.khat):.2f}"
        )


class _FromPrior(Messenger):
    """Leaves out the densities of latents that are drawn from the model itself."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["mask"] = False


def _sites(model: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The sites of one run, some of them observed."""
    tracer = poutine.trace(poutine.block(model, hide_types=["param"]))
    with WholeData():
        nodes: Any = tracer.get_trace(*args, **kwargs).nodes
    sites = {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }
    if not _data(sites):
        raise ValueError(
            f"model: got no observed site when run with these arguments (its sites: {list(sites)}), "
            "expected data in the arguments"
        )
    return sites


def _data(sites: dict[str, Any]) -> list[Any]:
    return [node for node in sites.values() if node["is_observed"] and not is_computed(node)]


def _check_possible(trace: Any) -> None:
    """Refuse a site that rules out every draw, as the point mass of a simulator without a likelihood does."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and bool((node["log_prob"] == -math.inf).all()):
            raise ValueError(
                f"site {name!r}: got a density of 0 ({type(node['fn']).__name__}) at every draw, expected a "
                "model whose likelihood can be evaluated, and draws within its support"
            )


def _has_density(name: str, node: Any) -> bool:
    """Whether a site's log_prob is a number, not an estimate as a diffusion's."""
    return unwrap_to(node["fn"], DenoisedDistribution) is None


def _shares_run(node: Any) -> bool:
    """Whether a guide's draws are of one run of an algorithm."""
    found = unwrap_to(node["fn"], SimulatedPosterior) if node["type"] == "sample" else None
    return found is not None and found.base.one_run


def _check_alone(
    model: Callable[..., Any], draws: dict[str, Tensor], together: Tensor, args: Any, kwargs: Any
) -> None:
    """Warn if the first draws have other densities by themselves than in the plate of all.

    Sites whose density is itself an estimate are left out, as it is another at every call.
    """
    for i, expected in enumerate(together[:TRIALS].tolist()):
        one = poutine.condition(model, data={name: value[i] for name, value in draws.items()})
        tracer = poutine.trace(poutine.block(one, hide_types=["param"]))
        alone = float(tracer.get_trace(*args, **kwargs).log_prob_sum(site_filter=_has_density))
        if not math.isclose(alone, expected, rel_tol=1e-4, abs_tol=1e-2):
            warn_unreliable(
                f"model: got a log-density of {expected:.6g} for a draw in a plate of all, and {alone:.6g} "
                "for it by itself: the weights are wrong, unless the model estimates its density; expected "
                "a program whose dimensions left of an event are batches (sums over [-1], not over all)"
            )
            return


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

    What the tolerances of ODE solvers in either's densities leave in the log evidence is measured, by finer
    solutions for the first 64 draws, and is in its standard error.

    Args:
        model: the program, with a likelihood: observed sites whose densities can be evaluated.
        guide: of the same arguments.
        args: of both, data included.
        num_samples: number of draws.
        kwargs: of both.

    Returns:
        Draws, weights and log evidence. An ``UnreliableWarning`` says not to believe them above a k-hat of
        0.7, where a draw has another density by itself than in the plate of all, and where draws are of one
        run of particles: their error is then infinite, for "not estimated".

    Raises:
        ValueError: for fewer than two draws, weights that are NaN or all zero, a model without observed
            sites, and plates that draw a subsample.

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
    sites = _sites(model, args, kwargs)
    frames = [f.dim for node in sites.values() for f in node["cond_indep_stack"] if f.dim]
    # of which only the names are used, so that no chain is drawn
    named = poutine.block(guide, hide_fn=AutoGuide._prototype_hide_fn)
    proposed = poutine.trace(named).get_trace(*args, **kwargs)
    left_out = {n for n, node in sites.items() if not node["is_observed"]} - {*proposed.nodes}
    nesting, scored = -min(frames, default=0), _FromPrior(left_out)(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found vars in model but not guide", UserWarning)
        with refined(1) as own:
            log_weights, trace, guide_trace = vectorized_importance_weights(
                scored, guide, *args, num_samples=num_samples, max_plate_nesting=nesting, **kwargs
            )
        _check_possible(trace)
        log_weights = log_weights.detach().double().cpu()
        observed = sum(torch.as_tensor(node["value"]).numel() for node in _data(sites))
        estimate = from_log_weights(log_weights.unsqueeze(1), 0, max(observed, 1))
        left = 0.0
        if own.solutions:
            left = solver_error(trace, guide_trace, log_weights, nesting)
            error = (estimate.standard_error.square() + left**2).sqrt()
            estimate = dataclasses.replace(estimate, standard_error=error)
    draws = {}
    for name, node in sites.items():
        if not node["is_observed"]:
            value, shape = trace.nodes[name]["value"], (num_samples, *node["value"].shape)
            whole = value.numel() == torch.Size(shape).numel()
            draws[name] = (value.reshape(shape) if whole else value.expand(shape)).detach()
    for name, node in list(trace.nodes.items()):
        if node["type"] == "sample" and not _has_density(name, node):
            trace.remove_node(name)
    together = plate_log_prob_sum(trace, guide_trace.plate_to_symbol["num_particles_vectorized"])
    _check_alone(scored, draws, together, args, kwargs)
    if any(_shares_run(node) for node in guide_trace.nodes.values()):
        warn_unreliable(
            "guide: got draws of one run of particles, whose weights share its estimate of the evidence, so "
            "that their spread tells no error; expected draws with particles of their own, "
            "AutoTwistedSMC(model, sweeps=1)"
        )
        unknown = torch.full_like(estimate.standard_error, math.inf)
        estimate = dataclasses.replace(estimate, standard_error=unknown)
    found = WeightedDraws(draws, log_weights, estimate, left)
    assert estimate.khat is not None
    # weights that are all alike have no tail to fit, and need none
    alike = float(log_weights.max() - log_weights.min()) < ALIKE
    if not float(estimate.khat) <= HIGHEST_KHAT and not alike:
        warn_unreliable(
            f"importance weights: got {found}; above a k-hat of {HIGHEST_KHAT} neither draws nor evidence "
            "are to be believed: train the guide longer or on more simulations, or draw more"
        )
    return found
