"""AutoGuides that draw a diffusion site from its posterior: by guidance, or by twisted particles."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.smcfilter import SMCFailed
from torch import Tensor

from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.estimate import Estimate
from pyro_diffusion.guidance import GuidedDenoiser
from pyro_diffusion.guidance.base import Guidance
from pyro_diffusion.infer.auto_posterior import AutoPosterior, as_chain
from pyro_diffusion.infer.filtering.independent_runs import LEAST_RUNS
from pyro_diffusion.infer.filtering.simulated_posterior import Drawn
from pyro_diffusion.infer.filtering.swept import Swept, SweptVerdict
from pyro_diffusion.infer.filtering.twisted_smc import Particles, TwistedSMC
from pyro_diffusion.infer.filtering.verdict import (
    FALSE_ALARM,
    OWN_PARTICLES,
    Verdict,
    misfit,
    misses,
)
from pyro_diffusion.infer.reparam import reverse_chain
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.samplers import Ancestral, Sampler
from pyro_diffusion.samplers.base import check_sampler
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_positive_int

__all__ = ["AutoGuidance", "AutoTwistedSMC"]

# Particles of a call where their number is left out; and of one of many draws, at least.
PARTICLES, LEAST_PARTICLES = 1024, 8
# Numbers in the states of particles that are then held at once, if these are more than in one run.
NUMBERS = 2**18


class AutoGuidance(AutoPosterior):
    r"""Draws a diffusion site by a guided chain: approximate, one run of the sampler per draw.

    Any guidance, any sampler; see ``AutoPosterior`` for other latents. With the ancestral sampler a draw
    has the trajectory's importance weight

    .. math:: \hat Z = p(y|x)\, \frac{p(x, x_{t_0}, \dots, x_{t_K})}{q(x, x_{t_0}, \dots, x_{t_K})},

    hence a density for ELBOs and ``Importance``, computed when asked for by one more pass of the unguided
    chain over the same states. Other samplers have draws alone, all that ``Predictive`` needs.

    Nothing weighs a guided draw. Those that miss the observations by far more than the program's noise does
    are told (``UnreliableWarning``; a false alarm in 1e-4 of calls, of draws that are the posterior's);
    draws that fit need not be right.

    If ``model`` is ``poutine.reparam(model, config={"x": ChainReparam()})``, the guide emits the chain's own
    sites with exact densities, and does not ask how the model builds its ``Diffusion``.

    Args:
        model: a Pyro program with one diffusion site (or ``site``) and observed sites.
        guidance: ``guidance(denoiser, likelihood)``, a class of guided denoisers or a partial of one; what
            suits the likelihood by default, as in :class:`~pyro_diffusion.infer.TwistedSMC`.
        site: name of the diffusion site; may be left out if there is one.
        times: the grid; that of the model's ``Diffusion`` by default.
        sampler: how to sample along it; that of the model's ``Diffusion`` by default.
        create_plates: as in Pyro.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> from pyro.distributions import Normal
        >>> from pyro.infer import Predictive
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.guidance import MMPS
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import LogLinear
        >>> process = GaussianProcess(LogLinear(10, -10))
        >>> prior = Diffusion(MixtureDenoiser(process, torch.ones(1), torch.zeros(1, 2), 1.0), (2,), steps=20)
        >>> def model():
        ...     x = pyro.sample("x", prior)
        ...     pyro.sample("y", Normal(x.sum(-1), 0.5), obs=torch.tensor(2.0))
        >>> guide = AutoGuidance(model, MMPS)
        >>> draws = Predictive(model, guide=guide, num_samples=500, parallel=True)()["x"]
        >>> draws.mean(0).sum().round().item()  # 2 * 2 / 2.25 in the limit of many steps
        2.0
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guidance: Guidance | None = None,
        *,
        site: str | None = None,
        times: Tensor | None = None,
        sampler: Sampler | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, guidance, site=site, times=times, create_plates=create_plates)
        self._sampler = None if sampler is None else check_sampler(sampler)
        if self._chained and (times is not None or not isinstance(sampler, Ancestral | None)):
            raise ValueError(
                f"times, sampler: got {'times' if times is not None else repr(sampler)} for a model unfolded "
                "by ChainReparam, expected neither (its own grid and kernels are used)"
            )

    def _guided(self, likelihood: ProgramLikelihood) -> Diffusion:
        """The guided chain at the batch shape of the site."""
        guided = self._guidance[0](likelihood.prior.denoiser, likelihood)
        if not isinstance(guided, GuidedDenoiser):
            raise ValueError(
                f"guidance: got a factory of {type(guided).__name__}, expected one of GuidedDenoiser"
            )
        return as_chain(likelihood.prior, guided, times=self._times, sampler=self._sampler)

    def _emit(
        self, likelihood: ProgramLikelihood, fn: TorchDistribution, nesting: int
    ) -> dict[str, Tensor]:
        if not self._chained:
            return super()._emit(likelihood, fn, nesting)
        chain = self._guided(likelihood)
        name, grouped = likelihood.site, fn.event_dim - chain.event_dim
        with torch.no_grad(), poutine.trace() as tracer:
            pyro.sample(name, reverse_chain(name, chain.to_event(grouped)))
        nodes: Any = tracer.trace.nodes
        return {site: node["value"] for site, node in nodes.items() if node["type"] == "sample"}

    def _draw(self, likelihood: ProgramLikelihood, sample: torch.Size) -> Drawn:
        chain = self._guided(likelihood)
        chain = chain.expand(sample + chain.batch_shape)
        if not isinstance(chain.sampler, Ancestral):
            x = chain.sample()
            self._check_fit(likelihood, x, sample)
            return Drawn(_transformed(likelihood, x), self._no_density)
        with poutine.trace() as trajectory:
            x = pyro.sample("x", reverse_chain("x", chain))
        self._check_fit(likelihood, x, sample)

        def relative() -> Tensor:
            free = as_chain(likelihood.prior, times=self._times).expand(chain.batch_shape)
            with poutine.trace() as again, poutine.condition(data=trajectory.trace):
                pyro.sample("x", reverse_chain("x", free))
            return _log_joint(trajectory.trace) - _log_joint(again.trace)

        return Drawn(_transformed(likelihood, x), relative)

    def _check_fit(self, likelihood: ProgramLikelihood, x: Tensor, sample: torch.Size) -> None:
        """Say so where draws miss the observations by far: guidance has no weights that would tell."""
        x0 = likelihood.prior.encode(x.detach())
        draws = x0.reshape(sample.numel(), *x0.shape[len(sample) :])
        own = likelihood.batch_shape if likelihood.factorized else torch.Size()
        even = x0.new_full((len(draws), *own), -math.log(len(draws)), dtype=torch.float64)
        chi2, p_value = misfit(likelihood, draws, even)
        missed = p_value < FALSE_ALARM / max(p_value.numel(), 1)
        if bool(missed.any()):
            warn_unreliable(f"AutoGuidance: {misses(chi2, missed)}; {OWN_PARTICLES}")

    def _no_density(self) -> Tensor:
        raise ValueError(
            f"sampler: got {self._sampler!r}, whose trajectories have no density; expected Ancestral(), or "
            "AutoTwistedSMC (Predictive draws with any sampler)"
        )


class AutoTwistedSMC(AutoPosterior):
    r"""Draws a diffusion site by twisted SMC: exact in the limit of many particles, for any guidance.

    Each call runs :class:`~pyro_diffusion.infer.TwistedSMC` and draws from its particles, with its evidence
    :math:`\hat Z` as what ELBOs and importance weights see (see ``AutoPosterior``).

    **Many draws in one call** (``Predictive(parallel=True)``, ``vectorize_particles``). With
    ``num_particles`` alone they share one run, its ancestors and its :math:`\hat Z`, which
    :func:`~pyro_diffusion.evaluate.importance_posterior` does not take for independent weights. With
    ``sweeps`` every draw has particles of its own, see
    :meth:`TwistedSMC.draws <pyro_diffusion.infer.TwistedSMC.draws>`, and the :math:`\hat Z` of its own first
    run, whatever sweeps follow: weights are proper and the ELBO is a bound as without, a looser one if the
    particles are fewer. Where other guides have drawn other latents, each draw has a run of its own, one
    after another.

    With neither, a run has 1024 particles. Under a denoiser that is not known to be exact
    (``denoiser.is_exact``), a network above all, one run keeps few ancestors, so that 16 draws or more of one
    call share the particles out among themselves, 8 a draw at least, as with ``sweeps=1``: 500 draws cost as
    much as one run of 4000. A draw of 8 particles has a bias, of order 1/8 of what their weights vary by,
    that no error tells; more particles, sweeps, or ``swept.log_weights`` take it away. If one of these runs
    is left without a particle, as where a likelihood is 0 in places, one run of 1024 is made for all instead.

    Args:
        model: a Pyro program with one diffusion site (or ``site``) and observed sites.
        guidance: ``guidance(denoiser, likelihood)``, a class of guided denoisers or a partial of one; what
            suits the likelihood by default, as in :class:`~pyro_diffusion.infer.TwistedSMC`.
        num_particles: number of particles, >= 2, of a run; as above if None, and with ``sweeps`` 1024 shared
            out among the draws of a call, 8 each at least.
        site: name of the diffusion site; may be left out if there is one.
        times: the grid; that of the model's ``Diffusion`` by default.
        sweeps: conditional sweeps behind every draw; None for draws of one run, or as above.
        create_plates: as in Pyro.
        options: of ``TwistedSMC`` (``ess_threshold``, ``progress``, ...).

    Attributes:
        particles: of the last call, if its draws are of one run: its evidence and effective sample sizes.
        swept: of the last call, if its draws have particles of their own: the draws with their verdict.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guidance: Guidance | None = None,
        num_particles: int | None = None,
        *,
        site: str | None = None,
        times: Tensor | None = None,
        sweeps: int | None = None,
        create_plates: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, guidance, site=site, times=times, create_plates=create_plates)
        if self._chained:
            raise ValueError(
                "model: got one unfolded by ChainReparam, whose states particles do not keep; expected the "
                "model itself with a Diffusion built outside of it (or AutoGuidance)"
            )
        if num_particles is not None:
            check_positive_int("num_particles", num_particles, at_least=2)
        self._num_particles = num_particles
        self._sweeps = None if sweeps is None else check_positive_int("sweeps", sweeps)
        self._options = options
        self.particles: Particles | None = None
        self.swept: Swept | None = None
        self._given: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict | SweptVerdict:
        """Whether draws and evidence of the last run may be believed.

        That of the last call, unless its draws were given other latents, and had a run each.

        Raises:
            ValueError: before the first call.
        """
        last = self.particles if self.swept is None else self.swept
        if last is None:
            raise ValueError(
                "verdict, log_evidence: got a guide before its first call, expected one after"
            )
        return last.verdict

    @property
    def log_evidence(self) -> Estimate:
        """Log p(y) of all rows under the denoiser's chain, in nats, with its error, of the last call.

        Raises:
            ValueError: before the first call, and where other guides have drawn other latents, given which
                every run has an evidence of its own.
        """
        verdict = self.verdict
        if self._given:
            raise ValueError(
                f"log_evidence: got runs given other latents ({', '.join(self._given)}), each with an "
                "evidence given these; expected evaluate.importance_posterior(model, guides) for that of the "
                "program, or guide.verdict.log_evidence for that of the last run"
            )
        return verdict.log_evidence

    def _draw(self, likelihood: ProgramLikelihood, sample: torch.Size) -> Drawn:
        own = {k: v.shape[v.dim() - self._dims(k)[1] :] for k, v in likelihood.latents.items()}
        latents, self._given = likelihood.latents, tuple(likelihood.latents)
        alike = all(v.shape == own[k] for k, v in latents.items())
        if alike:
            value, evidence = self._run(likelihood, sample)
        else:
            rows = {k: v.expand(sample + own[k]).reshape(-1, *own[k]) for k, v in latents.items()}
            runs = [
                self._run(likelihood.with_latents({k: v[i] for k, v in rows.items()}), torch.Size())
                for i in range(sample.numel())
            ]
            value, evidence = (torch.stack(part) for part in zip(*runs, strict=True))
            value = value.reshape(sample + value.shape[1:])
            evidence = evidence.reshape(sample + evidence.shape[1:])

        def relative() -> Tensor:
            if bool((evidence == -math.inf).any()):
                raise SMCFailed(
                    f"num_particles: got {self.verdict.num_particles}, of which a draw's first run was left "
                    "with none, so that its weight is 0; expected more of them where a density is asked for"
                )
            x0 = value
            for transform in reversed(likelihood.transforms):
                x0 = transform.inv(x0)
            log_likelihood = likelihood.log_prob(likelihood.prior.encode(x0))
            return log_likelihood - evidence.to(log_likelihood.dtype)

        return Drawn(value, relative, one_run=alike and self.swept is None and sample.numel() > 1)

    def _run(self, likelihood: ProgramLikelihood, sample: torch.Size) -> tuple[Tensor, Tensor]:
        """Draws, and log-evidence, of one run for all or of each draw's, in the shape of the likelihood."""
        chain, count = as_chain(likelihood.prior, times=self._times), sample.numel()
        self.particles = self.swept = None
        many = count >= LEAST_RUNS and not chain.denoiser.is_exact
        if self._sweeps is not None:
            self.swept = self._smc(chain, likelihood, count).draws(
                count, self._sweeps, keep_others=False
            )
        elif self._num_particles is None and many:
            self.swept = self._shared_out(chain, likelihood, count)
        if self.swept is None:
            self.particles = run = self._smc(chain, likelihood).run(keep_others=False)
            value, terms = run.sample(sample), run.log_evidence_terms
        else:
            both = self.swept.value, self.swept.log_evidence_runs
            value, terms = (v.reshape(sample + v.shape[1:]) for v in both)
        if likelihood.prior.support.is_discrete and not likelihood.transforms:  # type: ignore[union-attr]
            value = value.round().long()
        filters = likelihood.batch_shape if likelihood.factorized else torch.Size()
        lead = terms.shape[: terms.dim() - len(filters)]
        return value, terms.reshape(lead + (filters or (1,) * len(likelihood.batch_shape)))

    def _smc(self, chain: Diffusion, likelihood: ProgramLikelihood, draws: int = 1) -> TwistedSMC:
        """Particles of one run, or of each of many draws."""
        count = self._num_particles
        if count is None:
            count = max(PARTICLES // max(draws, 1), LEAST_PARTICLES)
        return TwistedSMC(chain, likelihood, self._guidance[0], count, **self._options)

    def _shared_out(
        self, chain: Diffusion, likelihood: ProgramLikelihood, count: int
    ) -> Swept | None:
        """Draws of runs of their own; None if any is left without a particle, which one larger run is not."""
        at_once = max(PARTICLES, NUMBERS // chain.event_shape.numel())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                smc = self._smc(chain, likelihood, count)
                found = smc.draws(count, keep_others=False, at_once=at_once)
            except SMCFailed:
                return None
        if bool((found.log_evidence_runs == -math.inf).any()):
            return None
        for warning in told:
            warnings.warn(warning.message, stacklevel=2)
        return found


def _transformed(likelihood: ProgramLikelihood, x: Tensor) -> Tensor:
    """Draws of the diffusion as values of the site."""
    for transform in likelihood.transforms:
        x = transform(x)
    return x


def _log_joint(trace: Any) -> Tensor:
    """Log-density of all of a chain's sites, per datum."""
    trace.compute_log_prob()
    sites = [node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample"]
    total: Tensor = sum(sites[1:], sites[0])
    return total
