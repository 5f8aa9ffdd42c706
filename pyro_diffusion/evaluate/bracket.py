"""A guide's bounds of the evidence from both sides, whose gap shows what either bound hides."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_diffusion.estimate import LOWER_BOUND, UPPER_BOUND, Estimate
from pyro_diffusion.infer.annealing.annealed_particles import BLIND, AnnealedParticles, mean_gap
from pyro_diffusion.infer.annealing.guide_chart import chart_of
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel, check_guide
from pyro_diffusion.infer.auto_diffusion import AutoDiffusion
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_finite, check_positive_int, kind_of

__all__ = ["EvidenceBracket", "bracket_evidence"]

WIDE = 1.0  # nats
SIGMAS = 4  # false alarms of a gap of just that: 3e-5
AT_ONCE = 10_000


@dataclass(frozen=True)
class EvidenceBracket:
    r"""What a guide says of the evidence from below and from above.

    Attributes:
        elbo: :math:`E_q[\log p(x, z) - \log q(z)] \le \log p(x)`.
        eubo: :math:`E_{p(z|x)}[\log p(x, z) - \log q(z)] \ge \log p(x)` for exact draws of the posterior;
            else an estimate that is blind to modes never visited, and bounds nothing.
        exact: whether the draws were said to be exact.
        problems: one sentence each. Without exact draws, an empty tuple is no all-clear.
    """

    elbo: Estimate
    eubo: Estimate
    exact: bool
    problems: tuple[str, ...]

    @property
    def gap(self) -> Estimate:
        r"""EUBO - ELBO, which for exact draws is :math:`KL(q \| p) + KL(p \| q)`, nats."""
        error = math.hypot(self.elbo.standard_error, self.eubo.standard_error)
        return Estimate(
            self.eubo.value - self.elbo.value, error, self.eubo.kind, "nats", self.eubo.evaluations
        )

    def __str__(self) -> str:
        if self.problems:
            said = "the guide is not to be believed"
        elif self.exact and not self.gap.value <= WIDE:
            said = "not known: the gap may be chance; take more draws, of the posterior and of the guide"
        elif self.exact:
            said = f"the guide is within {self.gap.value:.2g} nats of the posterior, both ways together"
        else:
            said = "no all-clear: modes that no particle visited are not seen"
        rows = [("ELBO", self.elbo), ("EUBO", self.eubo), ("gap", self.gap), ("verdict", said)]
        lines = [f"{name:<8} {value}" for name, value in rows]
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


@torch.no_grad()
def bracket_evidence(
    model: Callable[..., Any],
    guide: AutoGuide,
    posterior: Mapping[str, Tensor] | AnnealedParticles,
    *args: Any,
    num_samples: int = 10_000,
    **kwargs: Any,
) -> EvidenceBracket:
    r"""The evidence of a model between a guide's two bounds.

    An ELBO is high for a guide that sits in one mode, or in the neck of a funnel: it looks where the guide
    is. The upper bound looks where the posterior is, and is far above where the guide has no mass.

    Args:
        model: the program.
        guide: a fitted ``AutoNormal`` or ``AutoContinuous``; or an
            :class:`~pyro_diffusion.infer.AutoDiffusion` of this model, whose bounds are those of its paths.
        posterior: *exact* draws of the posterior {site: (n,) + its shape}, those of a long run of NUTS, say,
            or of a target that is known; or particles, whose figure is called blind and gives no all-clear.
        args: of the model.
        num_samples: draws of the guide for the ELBO.
        kwargs: of the model.

    Returns:
        Both bounds with the standard errors that independent draws have (those of a chain have larger ones),
        and what their gap says: one of more than a nat, by 4 standard errors, is a problem.

    Warns:
        UnreliableWarning: with the problem.

    Raises:
        ValueError: for draws of other sites or shapes, for another model than an AutoDiffusion's, and as
            :class:`~pyro_diffusion.infer.AnnealedSMC` does for models and guides.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoNormal(model, init_scale=0.5)
        >>> exact = {"z": dist.Normal(0.5, 0.5**0.5).sample((1000,))}
        >>> found = bracket_evidence(model, guide, exact)
        >>> found.elbo.value < dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)) < found.eubo.value
        tensor(True)

    References:
        Ji & Shen, arXiv 1908.04498 (the upper bound); Blessing et al., arXiv 2406.07423 (mode collapse).
    """
    check_positive_int("num_samples", num_samples, at_least=2)
    walks = isinstance(guide, AutoDiffusion)
    if not walks:
        check_guide(guide)
    exact = not isinstance(posterior, AnnealedParticles)
    if exact and not isinstance(posterior, Mapping):
        raise ValueError(
            f"posterior: got {kind_of(posterior)}, expected a dict of exact draws or AnnealedParticles"
        )
    either: Any = _of_paths if walks else _of_density
    below, above = either(model, guide, posterior, num_samples, args, kwargs)
    elbo = mean_gap(below, None, LOWER_BOUND)
    if isinstance(posterior, AnnealedParticles):
        eubo = mean_gap(above, posterior.log_weights, BLIND, posterior.repeat)
    else:
        eubo = mean_gap(above, None, UPPER_BOUND)
    problems = _problems(elbo, eubo)
    if problems:
        warn_unreliable("bracket_evidence: " + "; ".join(problems))
    return EvidenceBracket(elbo, eubo, exact, problems)


def _of_density(
    model: Any, guide: AutoGuide, posterior: Any, num_samples: int, args: Any, kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Log p - log q at draws of a guide with a density, and of the posterior."""
    with isolated():
        guide(*args, **kwargs)
    scored = UnconstrainedModel(model, guide, args, kwargs)
    with pyro.validation_enabled(False):
        with isolated():
            chart = chart_of(guide, args, kwargs)
        u = chart(chart.base.sample((num_samples,)))[0]
        scored.check(u)

        def gap(rows: Tensor) -> Tensor:
            parts = [scored(part) - chart.log_prob(part) for part in rows.split(AT_ONCE)]
            return torch.cat(parts).double()

        below = gap(u)
        if isinstance(posterior, AnnealedParticles):
            _check_particles(posterior, scored.constrain(u[:1]))
            return below, gap(posterior.unconstrained)
        rows = scored.unconstrain(posterior)
        check_finite("posterior (unconstrained)", rows)
        return below, gap(rows)


def _of_paths(
    model: Any, guide: AutoDiffusion, posterior: Any, num_samples: int, args: Any, kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The same of a guide whose density is that of paths: from its own draws, and back from the posterior."""
    guide.check_model(model)
    below = guide.log_weights(num_samples, *args, **kwargs).double()
    if isinstance(posterior, AnnealedParticles):
        _check_particles(posterior, {k: v.unsqueeze(0) for k, v in guide(*args, **kwargs).items()})
        posterior = posterior.draws
    return below, guide.log_weights_back(posterior, *args, **kwargs).double()


def _check_particles(particles: AnnealedParticles, drawn: Mapping[str, Tensor]) -> None:
    own, theirs = (
        {name: tuple(value.shape[1:]) for name, value in each.items()}
        for each in (drawn, particles.draws)
    )
    if list(own.items()) != list(theirs.items()):  # in order: columns of rows
        raise ValueError(
            f"posterior: got particles of {list(theirs)}, expected {own}, the latents of the model"
        )


def _problems(elbo: Estimate, eubo: Estimate) -> tuple[str, ...]:
    gap = eubo.value - elbo.value
    error = math.hypot(elbo.standard_error, eubo.standard_error)
    if math.isfinite(elbo.value) and gap - SIGMAS * error <= WIDE:
        return ()
    return (
        f"guide: got an ELBO of {elbo.value:.3f} and an EUBO of {eubo.value:.3f}, {gap:.3g} nats apart: it "
        "leaves out a part of the posterior, or puts mass where there is none; expected a gap below "
        f"{WIDE:g}: use a richer or wider guide, and AnnealedSMC to correct it",
    )
