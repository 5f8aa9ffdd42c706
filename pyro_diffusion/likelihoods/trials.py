"""A few trial runs of a program: what depends on x_0, how smoothly, and how a batch can be run."""

import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.likelihoods.run import Message, log_density
from pyro_diffusion.likelihoods.whitening import RESIDUALS, whitened
from pyro_diffusion.unwrapping import unwrap

__all__ = ["Dependence", "agree", "choose_vectorization", "find_dependence", "trials"]

TRIALS = 3


class Dependence(NamedTuple):
    """How observed sites depend on x_0.

    Attributes:
        dependent: names of those that depend on x_0.
        without_gradient: names of those that change with x_0 but have no gradient.
        without_residual: name and distribution of a site that depends on x_0 and has no residual, for each
            kind of residual that some site lacks.
        batch_size: a number of draws that no dimension of the program has: a wrong broadcast then fails, or
            shows in the numbers.
        varying: names of those whose log-density differs between the trial draws.
        silent: whether some site is 0 or infinite for all of them: a sum over wrong rows is the same, so that
            agreement says nothing.
    """

    dependent: frozenset[str]
    without_gradient: tuple[str, ...]
    without_residual: dict[str, tuple[str, str]]
    batch_size: int
    varying: frozenset[str]
    silent: bool = False


def trials(prior: DenoisedDistribution) -> Tensor:
    """A few x_0 to try a program on, the same at each call; the global generators are left alone."""
    process = prior.denoiser.process
    shape = (TRIALS, *prior.batch_shape, *prior.event_shape)
    return process.trial_data(shape, prior.dtype).to(prior.device)


def find_dependence(run: Callable[[Tensor], list[Message]], draws: Tensor) -> Dependence:
    """Run a program singly on trial draws.

    Raises:
        ValueError: if a log-density is NaN.
    """
    densities: dict[str, list[Tensor]] = {}
    linked, sloped, sizes = set(), set(), set(draws.shape[1:])
    with torch.inference_mode(False), torch.enable_grad():
        for draw in draws:
            x0 = draw.clone().requires_grad_(draw.is_floating_point())
            sites = {site["name"]: site for site in run(x0)}
            for name, site in sites.items():
                log_prob = log_density(site)
                if bool(log_prob.isnan().any()):
                    raise ValueError(
                        f"site {name!r}: got a log-density of NaN at an x_0 drawn from N(0, I), expected a "
                        "program that is defined for any x_0"
                    )
                slope = None
                if log_prob.requires_grad and x0.requires_grad:
                    total = log_prob.sum()
                    (slope,) = torch.autograd.grad(total, x0, retain_graph=True, allow_unused=True)
                if slope is not None:
                    linked.add(name)
                    if bool((slope != 0).any()):
                        sloped.add(name)
                densities.setdefault(name, []).append(log_prob.detach())
                sizes |= {*log_prob.shape, *site["fn"].event_shape}
    varying = {k for k, v in densities.items() if not all(torch.equal(v[0], x) for x in v)}
    constant = [v[0] for k, v in densities.items() if k not in varying and _counts(sites[k])]
    dependent = frozenset(linked | varying)
    without_residual = {}
    for kind in RESIDUALS:
        others = [k for k in densities if k in dependent and whitened(sites[k], kind) is None]
        if others:
            without_residual[kind] = others[0], _distribution_name(sites[others[0]])
    batch_size = next(n for n in itertools.count(TRIALS) if n not in sizes)
    return Dependence(
        dependent,
        tuple(sorted(varying - sloped)),
        without_residual,
        batch_size,
        frozenset(varying),
        any(bool(((v == 0) | v.isinf()).all()) for v in constant),
    )


def choose_vectorization(
    log_prob: Callable[[bool], Tensor], expected: Tensor, silent: bool = False
) -> bool:
    """Whether a batch can be put left of a program's plates (True), or must be run under vmap (False).

    Args:
        log_prob: log-probabilities of trial draws, run in that way.
        expected: those of single runs.
        silent: of :class:`Dependence`: then vmap, which needs no proof, comes first.

    Raises:
        ValueError: if neither gives the same numbers.
    """
    failures = {}
    for vectorized in (False, True) if silent else (True, False):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                got = log_prob(vectorized)
        except Exception as error:  # whatever a program that is not written for batches may raise
            failures[vectorized] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            continue
        if agree(got, expected):
            return vectorized
        failures[vectorized] = "other numbers than single runs"
    raise ValueError(
        f"model: got no batch of x_0 through it. With a dimension left of all plates: {failures[True]}. "
        f"Under torch.func.vmap: {failures[False]}. Expected a program without randomness of its own "
        "that indexes data from the right (x[..., 0], sum(-1)), or one that vmap can run (no branch on "
        "values)"
    )


def agree(got: Tensor, expected: Tensor) -> bool:
    """Whether log-probabilities are the same up to rounding."""
    finite = expected[expected.isfinite()].abs()
    tolerance = 1e-3 if expected.dtype.itemsize < 8 else 1e-6
    slack = tolerance * float(finite.max()) if len(finite) else 0.0
    return got.shape == expected.shape and torch.allclose(got, expected, tolerance, slack)


def _counts(site: Message) -> bool:
    """Whether a site has a datum that no mask and no scale takes away."""
    masks = [mask for mask, _ in unwrap(site["fn"]).masks]
    given = (site["scale"], site["mask"], *masks)
    return all(v is None or bool(torch.as_tensor(v).any()) for v in given)


def _distribution_name(site: Message) -> str:
    return type(unwrap(site["fn"], torch.distributions.TransformedDistribution).base).__name__
