"""Refuse to be exponentiated: what Pyro does with an estimate of log p, told from who asks for it.

An unbiased estimate L of a bound obeys E[L] <= log p wherever it enters linearly, as in an ELBO. But E[exp L]
and E[log sum exp L] depend on the estimate's variance, and are no bounds. As the density of a guide's own
latent even linear use is wrong: an ELBO subtracts it, and L <= log q makes the ELBO larger than it is. Pyro
asks for ``log_prob`` after the program has run, when none of its handlers is left on the stack; what it will
do with the numbers is known to the frames that ask, and which latents it enumerates to the trace that they
hold.
"""

import sys
from itertools import zip_longest
from types import FrameType
from typing import Any

import torch
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    TraceEnum_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)

from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.distributions.callers import callers, inside_markov_chain
from pyro_diffusion.unwrapping import unwrap_to

__all__ = ["check_linear_use"]

TRACE = "pyro.poutine.trace_struct"
IMPORTANCE_TRACE = "pyro.infer.enum"
DISCRETE = "pyro.infer.discrete"

# Objectives that may exponentiate; any other is linear.
EXPONENTIATING = (
    *(RenyiELBO, ReweightedWakeSleep, TraceTailAdaptive_ELBO),
    *(TraceEnum_ELBO, TraceTMC_ELBO),
)

# Distributions whose density is a sum of exponentials of their parts', by module.
MIXTURES = {
    "torch.distributions.mixture_same_family": "MixtureSameFamily",
    "pyro.distributions.zero_inflated": "ZeroInflatedDistribution",
    "pyro.distributions.folded": "FoldedDistribution",
    "pyro.distributions.hmm": "DiscreteHMM",
}

# Weights of particles, by the module that computes them.
WEIGHTS = {
    "pyro.infer.importance": "importance weights",
    "pyro.infer.predictive": "WeighedPredictive",
    "pyro.infer.resampler": "Resampler",
    "pyro.infer.smcfilter": "SMCFilter",
    "pyro_diffusion.infer.filtering.particle_filter": "ParticleFilter",
}

# Information gains that average densities, by the function that scores traces; the others score guides alone.
DESIGN = "pyro.contrib.oed.eig"
NESTED = {"nmc_eig": "nmc_eig", "_vnmc_eig_loss": "vnmc_eig"}

CHAIN = "the unfolded chain (ChainReparam and forward_chain)"
WAYS_OUT = f"{CHAIN} or ProbabilityFlow"


def check_linear_use(distribution: Any, chains: bool = True, bound: bool = True) -> None:
    """Refuse callers that exponentiate the estimate which is about to be made, or subtract a bound.

    Args:
        distribution: whose ``log_prob`` is asked for.
        chains: whether a Markov chain is refused as well.
        bound: whether it is of a lower bound, which no guide's density may be; else of the density itself.

    Raises:
        ValueError: naming what was going to use the estimate, and what to use instead.
    """
    found = _mixture_or_trace(sys._getframe(2))
    refused = None
    if chains and inside_markov_chain():
        refused = (
            "a Markov chain, which needs one exact density",
            f"{WAYS_OUT}, or for a latent diffusion ParticleGibbs",
        )
    elif isinstance(found, str):
        refused = found, f"components of ProbabilityFlow, or the component as a latent of {CHAIN}"
    elif found is not None:
        if bound and (elbo := _guide_of(found)):
            raise ValueError(
                f"guide: got a {type(distribution).__name__} as the law of its latent in {elbo}, "
                "expected one whose log_prob is a density (ProbabilityFlow, or any AutoGuide): a lower bound "
                "of log q, subtracted, takes the ELBO above the evidence. To train a diffusion on draws of a "
                "posterior make it a model of them; to correct a guide use AnnealedSMC"
            )
        refused = _use_of_trace(found)
    if refused is None:
        return
    raise ValueError(
        f"log_prob: got {refused[0]}, expected {refused[1]}: {type(distribution).__name__}.log_prob is an "
        "unbiased estimate, which is no bound once it is exponentiated"
    )


def _mixture_or_trace(frame: FrameType) -> str | FrameType | None:
    """Whichever is nearest: a mixture (its name), or the trace that scores its sites (its frame)."""
    for module, caller in callers(frame):
        if module in MIXTURES:
            return MIXTURES[module]
        if module == TRACE:
            return caller
    return None


def _guide_of(frame: FrameType) -> str | None:
    """The name of the ELBO whose guide scores its own draw there; None for other uses."""
    holder: FrameType | None = None
    for module, caller in callers(frame):
        if module == IMPORTANCE_TRACE:
            holder = caller
        elif module != TRACE and caller.f_code.co_name != "<listcomp>":
            break
    elbo = caller.f_locals.get("self")
    # Wake-sleep raises the guide's density at draws of the model, which is a use of the right direction.
    if not isinstance(elbo, ELBO) or isinstance(elbo, ReweightedWakeSleep):
        return None
    traces = _traces((holder or caller).f_locals)
    trace, name = frame.f_locals["self"], frame.f_locals["name"]
    if trace is not traces["guide_trace"] or trace.nodes[name]["is_observed"]:
        return None
    return None if _cancels(name, **traces) else type(elbo).__name__


def _use_of_trace(frame: FrameType) -> tuple[str, str] | None:
    """What is wrong with scoring a trace's site there, and the ways out; None if nothing is."""
    holder: FrameType | None = None
    for module, caller in callers(frame):
        if module == IMPORTANCE_TRACE:
            holder = caller
        elif module != TRACE and caller.f_code.co_name != "<listcomp>":
            break
    nested = NESTED.get(caller.f_code.co_qualname.split(".")[0]) if module == DESIGN else None
    if nested is not None:
        return nested, f"posterior_eig, {WAYS_OUT}"
    elbo = caller.f_locals.get("self")
    if not (isinstance(elbo, EXPONENTIATING) or module in WEIGHTS or module == DISCRETE):
        return None
    if holder is None and module in WEIGHTS:
        holder = caller
    traces = {} if holder is None else _traces(holder.f_locals)
    asked = frame.f_locals
    trace, name = asked["self"], asked["name"]
    weights = _weights(module, elbo, bool(traces))
    if weights is not None:
        if _cancels(name, **traces):
            return None
        return weights, f"Trace_ELBO, {WAYS_OUT}"
    enumerated = _enumerated(module, elbo, trace, traces.get("guide_trace"))
    touching = [k for k, id_ in enumerated.items() if id_ in _ids(trace.nodes[name])]
    if not touching:
        return None
    names = ", ".join(map(repr, touching))
    if isinstance(elbo, TraceTMC_ELBO):
        return f"TraceTMC_ELBO over {names}", f"TraceEnum_ELBO, {WAYS_OUT}"
    if module == DISCRETE:
        return f"infer_discrete over {names}", WAYS_OUT
    return f"{names} enumerated in the model", f"{WAYS_OUT}, or {names} enumerated in the guide"


def _traces(names: dict[str, Any]) -> dict[str, Any]:
    """The model's trace and the guide's among the names of a frame of Pyro's."""
    if "model_predictive" in names:  # of WeighedPredictive, one by one if it is not vectorized
        found = names["model_predictive"].trace, names["guide_predictive"].trace
        p, q = (trace[0] if isinstance(trace, list) else trace for trace in found)
    else:
        p, q = names.get("model_trace"), names.get("guide_trace")
    return {"model_trace": p, "guide_trace": q}


def _weights(module: str, elbo: Any, particles: bool) -> str | None:
    """The name of what turns log-probabilities into weights of particles, if that is what asks."""
    if module in WEIGHTS:
        return WEIGHTS[module]
    # Sleep updates score the guide alone, linearly.
    if isinstance(elbo, ReweightedWakeSleep) and particles:
        return "ReweightedWakeSleep"
    if isinstance(elbo, (RenyiELBO, TraceTailAdaptive_ELBO)) and elbo.num_particles > 1:
        return f"{type(elbo).__name__}(num_particles={elbo.num_particles})"
    return None


def _cancels(name: str, model_trace: Any = None, guide_trace: Any = None) -> bool:
    """Whether model and guide hold one and the same estimate, so that their difference is free of it."""
    if model_trace is None or guide_trace is None:
        return False
    if name not in model_trace or name not in guide_trace:
        return False
    sites = [trace.nodes[name] for trace in (model_trace, guide_trace)]
    if not all(_equal(*(site[key] for site in sites)) for key in ("scale", "mask")):
        return False
    if getattr(sites[1]["fn"], "holds_prior", False):
        return True
    p, q = (unwrap_to(site["fn"], DenoisedDistribution) for site in sites)
    if p is None or q is None or p.base._seed != q.base._seed or p.transforms != q.transforms:
        return False
    return all(
        _equal(m, n) for (m, _), (n, _) in zip_longest(p.masks, q.masks, fillvalue=(None, 0))
    )


def _equal(a: Any, b: Any) -> bool:
    """Whether two scales or masks are the same; None is no mask, as True is."""
    if a is b:
        return True
    if not (torch.is_tensor(a) or torch.is_tensor(b)):
        return (a is None or a) == (b is None or b)
    a, b = (torch.as_tensor(True if x is None else x).cpu() for x in (a, b))
    return bool((a == b).all())


def _enumerated(module: str, elbo: Any, trace: Any, guide_trace: Any) -> dict[str, int]:
    """Latents over whose values log-probabilities will be exponentiated and summed, with their ids."""
    everywhere = isinstance(elbo, TraceTMC_ELBO) or module == DISCRETE
    if not everywhere and (not isinstance(elbo, TraceEnum_ELBO) or trace is guide_trace):
        return {}
    out = {}
    for name, site in trace.nodes.items():
        dim = site["infer"].get("_enumerate_dim") if site["type"] == "sample" else None
        if dim is not None and (everywhere or name not in guide_trace):
            out[name] = site["infer"]["_dim_to_id"][dim]
    return out


def _ids(site: Any) -> set[int]:
    """Ids of the enumerated latents that a site's log-probability depends on."""
    fn, value = site["fn"], site["value"]
    batch = value.shape[: value.dim() - fn.event_dim]
    mask = site["mask"].shape if torch.is_tensor(site["mask"]) else ()
    shape = torch.broadcast_shapes(batch, fn.batch_shape, mask)
    ids = site["infer"].get("_dim_to_id", {})
    return {id_ for dim, id_ in ids.items() if len(shape) >= -dim and shape[dim] > 1}
