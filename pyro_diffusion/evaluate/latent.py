"""Log p(x) of a model with a latent diffusion, beside its ELBO."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_diffusion.distributions import Diffusion, ProbabilityFlow
from pyro_diffusion.dynamics import ODESolver, TraceEstimator
from pyro_diffusion.estimate import LOWER_BOUND, LogLikelihoodEstimate
from pyro_diffusion.evaluate.importance import from_log_weights, log_weights
from pyro_diffusion.evaluate.ode import flow_log_likelihood
from pyro_diffusion.unwrapping import Unwrapped, check_wrappers, unwrap_to
from pyro_diffusion.validation import check_finite, check_positive_int, check_seed

__all__ = ["LatentLikelihood", "latent_log_likelihood"]


@dataclass(frozen=True)
class LatentLikelihood:
    """Two figures from the same draws of a guide.

    Attributes:
        importance: log p(x) of every row by importance weights, with standard error, effective sample size
            and Pareto k-hat; a lower bound in expectation that rises to log p(x) with the number of draws.
        elbo: the mean log-weight of every row, the evidence lower bound.
        by: how the diffusion was scored, "flow" or "chain".
    """

    importance: LogLikelihoodEstimate
    elbo: LogLikelihoodEstimate
    by: str

    def __str__(self) -> str:
        ess, khat = self.importance.ess, self.importance.khat
        assert ess is not None and khat is not None
        return (
            f"log p(x) {self.importance.mean}; ELBO {self.elbo.mean}; effective sample size "
            f"{float(ess.mean()):.1f}, k-hat above 0.7 in {float((khat > 0.7).double().mean()):.0%} of rows"
        )


@torch.no_grad()
def latent_log_likelihood(
    model: Callable[[Tensor], Any],
    guide: Callable[[Tensor], Any],
    data: Tensor,
    *,
    by: str = "flow",
    num_samples: int = 64,
    solver: ODESolver | None = None,
    trace: TraceEstimator | None = None,
    batch_size: int = 128,
    seed: int | None = None,
) -> LatentLikelihood:
    r"""Log p(x) of ``z ~ Diffusion, x ~ p(x | z)`` by importance samples of a guide q(z | x).

    .. math:: \log p(x) \approx \log \tfrac1S \sum_{s=1}^S \frac{p(x | z_s)\, p(z_s)}{q(z_s | x)},
              \qquad z_s \sim q(z | x).

    Model and guide are Pyro programs of a batch of rows, with one plate over them, as SVI takes them. The
    prior of every latent that is a :class:`~pyro_diffusion.distributions.Diffusion` is scored anew, since its
    own ``log_prob`` estimates a bound, which inside a logarithm of a mean is no bound of anything. With
    ``by="flow"`` the score is log p(z) of the probability flow, another model than the chain, exact to the
    solver's tolerance. With ``by="chain"`` the chain is unfolded at every draw: the weight is
    :math:`p(x | z)\, p(z, u) / q(z | x)\, q(u | z)` with u one chain of the forward process, an unbiased
    estimate of p(x) under the chain. All other sites count as they are; scales, such as those that anneal a
    loss or weigh a minibatch, are left out, since a scaled density is none.

    Args:
        model: program of the rows, observed sites included.
        guide: program of the rows.
        data: (n,) + event.
        by: "flow" or "chain".
        num_samples: number S of draws a row, at least 2. Below about 25 there is no tail to fit and every
            k-hat is infinite.
        solver: of the flow; by default that of :class:`~pyro_diffusion.distributions.ProbabilityFlow`.
        trace: of the flow, likewise. A stochastic one's scores are unbiased as log p(z) alone, and so are
            ELBOs; importance weights are then too large in expectation, and their figure is no bound.
        batch_size: rows scored together.
        seed: of all draws; torch's global generator as it is, if None.

    Returns:
        Importance-weighted estimates and the ELBO of the same draws, in nats a row.

    Raises:
        ValueError: for latents that only one of guide and model draws, sites whose batch shape is not that of
            the rows, a diffusion under transforms that are not bijective, and bad data.

    References:
        Burda et al., arXiv 1509.00519; Vahdat et al., arXiv 2106.05931 (the flow's score in a latent model).
    """
    if by not in ("flow", "chain"):
        raise ValueError(f"by: got {by!r}, expected 'flow' or 'chain'")
    check_positive_int("num_samples", num_samples, at_least=2)
    check_positive_int("batch_size", batch_size)
    check_finite("data", data)
    if data.dim() < 1 or data.numel() == 0:
        raise ValueError(f"data: got shape {tuple(data.shape)}, expected (n,) + event")
    scoring = _Scoring(by, solver, trace)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(check_seed("seed", seed))
        parts = [
            _weights(model, guide, rows, num_samples, scoring) for rows in data.split(batch_size)
        ]
    weights = torch.cat([weights for weights, _ in parts], 1)
    evaluations = sum(n for _, n in parts) / len(data)
    dimensions = data[0].numel()
    elbo = LogLikelihoodEstimate(
        value=weights.mean(0),
        standard_error=weights.std(0) / math.sqrt(num_samples),
        kind=LOWER_BOUND,
        evaluations=evaluations,
        dimensions=dimensions,
    )
    return LatentLikelihood(from_log_weights(weights, evaluations, dimensions), elbo, by)


@dataclass(frozen=True)
class _Scoring:
    """How a diffusion is scored."""

    by: str
    solver: ODESolver | None
    trace: TraceEstimator | None

    def __call__(self, priors: list[Unwrapped], draws: list[Tensor]) -> tuple[Tensor, float]:
        """Log-densities, or log-weights of chains, of draws under each one's prior; and evaluations."""
        # a prior may differ from draw to draw: by its context, or by its transforms
        base = priors[-1].base
        context = {k: torch.cat([p.base.context[k] for p in priors]) for k in base.context} or None
        jacobians = torch.cat([p.log_det(z) for p, z in zip(priors, draws, strict=True)])
        z = torch.cat([p.inverse(z) for p, z in zip(priors, draws, strict=True)])
        if self.by == "chain":
            value = log_weights(base.replace(context=None), z, context=context)[0]
            return value + jacobians.to(value), float(len(z) * (base.steps + 1))
        flow = ProbabilityFlow(
            base.denoiser, base.event_shape, solver=self.solver, trace=self.trace
        )
        found = flow_log_likelihood(flow, z, context=context, batch_size=4096)
        return found.value + jacobians.to(found.value), found.evaluations * len(z)


def _weights(
    model: Any, guide: Any, rows: Tensor, num_samples: int, scoring: _Scoring
) -> tuple[Tensor, float]:
    """(num_samples, n) log-weights in double precision, and evaluations."""
    weights: list[Tensor] = []
    drawn: dict[str, list[tuple[Unwrapped, Any]]] = {}
    for _ in range(num_samples):
        q, p = _traces(model, guide, rows)
        _check_latents(q, p)
        priors = {
            name: prior
            for name, site in _sites(p).items()
            if not site["is_observed"] and (prior := unwrap_to(site["fn"], Diffusion)) is not None
        }
        for name, prior in priors.items():
            check_wrappers(f"site {name!r}", prior)
            if prior.base.support.is_discrete:
                raise ValueError(
                    f"site {name!r}: got a diffusion of discrete data, expected real data"
                )
            drawn.setdefault(name, []).append((prior, p.nodes[name]))
        p.compute_log_prob(lambda name, _: name not in priors)  # noqa: B023
        q.compute_log_prob()
        ours = [site for name, site in _sites(p).items() if name not in priors]
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for sign, sites in ((1, ours), (-1, [*_sites(q).values()])):
            for site in sites:
                total = total + sign * _of_rows(site, len(rows)).double()
        weights.append(total)
    out, evaluations = torch.stack(weights), 0.0
    for found in drawn.values():
        own, sites = [prior for prior, _ in found], [site for _, site in found]
        value, count = scoring(own, [site["value"] for site in sites])
        each = zip(value.view(out.shape).to(out), sites, strict=True)
        out = out + torch.stack([scale_and_mask(v, mask=site["mask"]) for v, site in each])
        evaluations += count
    return out.cpu(), evaluations


def _traces(model: Any, guide: Any, rows: Tensor) -> tuple[Any, Any]:
    """Of the guide, and of the model at its draws."""
    try:
        q = poutine.trace(guide).get_trace(rows)
        return q, poutine.trace(poutine.replay(model, q)).get_trace(rows)
    except Exception as error:
        error.add_note(
            f"data: got rows of shape {tuple(rows.shape)}, expected some that model and guide take"
        )
        raise


def _check_latents(q: Any, p: Any) -> None:
    """Refuse a weight that is none: of latents that only one of the two has."""
    ours, theirs = (
        [name for name, site in _sites(trace).items() if not site["is_observed"]]
        for trace in (p, q)
    )
    if undrawn := [name for name in ours if name not in theirs]:
        raise ValueError(
            f"guide: got one that draws {theirs}, expected {undrawn}, too: latents of the model (or data "
            "that it does not observe)"
        )
    auxiliary = [name for name in theirs if q.nodes[name]["infer"].get("is_auxiliary")]
    if unknown := [name for name in theirs if name not in ours and name not in auxiliary]:
        raise ValueError(f"guide: got sites {unknown}, expected latents of the model, {ours}")


def _sites(trace: Any) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _of_rows(site: Any, count: int) -> Tensor:
    """A site's log-probability, one number a row, whatever its scale in a loss."""
    found: Tensor = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
    if found.shape != (count,):
        raise ValueError(
            f"site {site['name']!r}: got log-probabilities of shape {tuple(found.shape)}, expected "
            f"({count},), one a row: a plate over the rows, and events for all else"
        )
    return found
