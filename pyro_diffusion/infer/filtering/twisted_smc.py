"""Twisted sequential Monte Carlo: particles of a reverse chain, weighted by the observations."""

import contextlib
import dataclasses
import math
from typing import Any, TypeVar

import torch
from pyro.infer.smcfilter import SMCFailed
from torch import Tensor
from tqdm import tqdm

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions import Diffusion
from pyro_diffusion.distributions.base import dtype_and_device
from pyro_diffusion.estimate import UNBIASED, Estimate
from pyro_diffusion.guidance import (
    MMPS,
    CalibratedCovariance,
    GuidedDenoiser,
    PlugIn,
    SampledGuidance,
)
from pyro_diffusion.guidance.base import Guidance, check_guidance
from pyro_diffusion.guidance.chain_moments import ChainMoments
from pyro_diffusion.infer.filtering.conditional_filter import ConditionalFilter
from pyro_diffusion.infer.filtering.particle_filter import ParticleFilter
from pyro_diffusion.infer.filtering.particles import Particles
from pyro_diffusion.infer.filtering.resampling import effective_ancestors, evidence_variance
from pyro_diffusion.infer.filtering.small_runs import no_run_left, small_runs, swept_again
from pyro_diffusion.infer.filtering.swept import Swept, judged
from pyro_diffusion.infer.filtering.twisted_chain import Proposal, Target, TwistedChain
from pyro_diffusion.infer.filtering.verdict import Verdict, judge, misfit
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.base import check_likelihood
from pyro_diffusion.pareto import pareto_khat
from pyro_diffusion.processes import Ability
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_positive_int

__all__ = ["Particles", "TwistedSMC", "default_guidance"]

Filter = TypeVar("Filter", bound=ParticleFilter)


def default_guidance(denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
    """The most accurate guidance that the likelihood, the process and the denoiser allow.

    Gaussian conditioning for Normal observations of real data, and on deviance residuals where every other
    site has them (counts, heavy tails): :class:`~pyro_diffusion.guidance.MMPS` for denoisers in closed form
    (``denoiser.is_exact``), :class:`~pyro_diffusion.guidance.CalibratedCovariance` for all others, networks
    above all, whose derivative at high noise is mostly error.
    :class:`~pyro_diffusion.guidance.PlugIn` for other likelihoods with a gradient, and draws
    (:class:`~pyro_diffusion.guidance.SampledGuidance`) for all the rest.

    Args:
        denoiser: posterior of the prior.
        likelihood: log p(y | x_0).
    """
    if Ability.TWEEDIE not in denoiser.process.abilities:
        return SampledGuidance(denoiser, likelihood)
    try:
        likelihood.check_gradient()
    except ValueError:
        return SampledGuidance(denoiser, likelihood)
    own = likelihood.batch_shape + likelihood.event_shape
    dtype, device = dtype_and_device(denoiser)
    trial = torch.zeros(own, dtype=dtype, device=device)
    conditioning = MMPS if denoiser.is_exact else CalibratedCovariance
    for kind in (likelihood, likelihood.with_residuals("deviance")):
        with contextlib.suppress(ValueError):
            kind.residual(trial)
            return conditioning(denoiser, kind)
    return PlugIn(denoiser, likelihood)


class TwistedSMC:
    r"""Draws from p(x | y) under a diffusion prior, asymptotically exact whatever the guidance.

    The target is the chain's own distribution times the likelihood,
    :math:`p(x_{t_K}) \prod_j p(x_{t_{j-1}} | x_{t_j})\, p(x | x_{t_0})\, p(y | x)`. Particles follow the
    guided kernel q and are weighted at every step from t to s by

    .. math:: \frac{p(x_s | x_t)\, \psi_s(x_s)}{q(x_s | x_t)\, \psi_t(x_t)}, \qquad
              \psi_t(x_t) \approx p(y | x_t),

    with the twist :math:`\psi` of the guidance in between and the exact likelihood at the end. Hence
    :math:`\hat Z` is unbiased for the chain's evidence for every number of particles and every positive
    twist, random ones included; averages are consistent, with a bias of order 1/N. Bad guidance costs
    effective sample size, asymptotically nothing else; with few particles it shows as a log-evidence that
    is too low under an error bar that is too small, so compare two numbers of particles. Guidance must not
    deny what prior and likelihood allow (none here does). A twist is raised by what gives its particle 1 % of
    the mean weight (or of the mean twist, where the guided kernel does not follow the twist), so that what it
    wrongly denies can come back. :meth:`run` raises where no particle is left, whose evidence would be 0:
    unbiased is meant with that counted. What remains is the chain's own difference from the data's
    distribution.

    Guidance that linearizes the observations (:class:`~pyro_diffusion.guidance.MMPS` and its kin, where each
    datum has its own) gives q their covariance, too: the kernel times the next twist, as far as both are
    normal. For normal data and linear readings weights then vary by that of x at t_K alone, with any number
    of readings, however sharp.

    One network evaluation per step and particle. A plate of data whose likelihood factorizes over it gets one
    filter per datum, all run together; otherwise particles weigh all of the plate jointly.

    Args:
        diffusion: the prior, of the likelihood's batch shape or one that broadcasts to it.
        likelihood: log p(y | x), a :class:`~pyro_diffusion.likelihoods.ProgramLikelihood` or another. It
            makes the target, whatever the guidance approximates.
        guidance: ``guidance(denoiser, likelihood)``, a class of guided denoisers or a partial of one; if
            None, :class:`~pyro_diffusion.guidance.MMPS` (for a denoiser that is not in closed form
            :class:`~pyro_diffusion.guidance.chain_moments.ChainMoments`, with context
            :class:`~pyro_diffusion.guidance.CalibratedCovariance`) for Normal observations and deviance
            residuals, :class:`~pyro_diffusion.guidance.PlugIn` for other likelihoods with a gradient, else
            :class:`~pyro_diffusion.guidance.SampledGuidance`.
        num_particles: N >= 2.
        ess_threshold: resample when the effective sample size falls below this share of N.
        systematic: systematic resampling (less noise), else multinomial (an unbiased error bar).
        progress: whether to show a progress bar.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    References:
        Wu et al., Practical and asymptotically exact conditional sampling in diffusion models,
        arXiv 2306.17775;
        Naesseth, Lindsten & Schoen, Elements of sequential Monte Carlo, arXiv 1903.04797.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        likelihood: Likelihood,
        guidance: Guidance | None = None,
        num_particles: int = 1024,
        ess_threshold: float = 0.5,
        *,
        systematic: bool = True,
        progress: bool = False,
    ) -> None:
        if not isinstance(diffusion, Diffusion):
            raise ValueError(
                f"diffusion: got {type(diffusion).__name__}, expected a Diffusion (the chain of any denoiser)"
            )
        self.likelihood, self.progress = check_likelihood(likelihood), progress
        self.diffusion = diffusion.expand(likelihood.batch_shape)
        if guidance is None or guidance is default_guidance:
            guidance = self._default
        check_guidance(guidance)
        guided = guidance(diffusion.denoiser, likelihood)
        if not isinstance(guided, GuidedDenoiser):
            raise ValueError(
                f"guidance: got a factory of {type(guided).__name__}, expected one of GuidedDenoiser"
            )
        self.chain = TwistedChain(self.diffusion, guided, likelihood)
        self._options = {"ess_threshold": ess_threshold, "systematic": systematic}
        self.num_particles = num_particles
        self.filter()  # refuse bad arguments now

    def _default(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """The default of guides, with the moments of this chain where those of a network are uncertain."""
        found = default_guidance(denoiser, likelihood)
        if isinstance(found, CalibratedCovariance) and not self.diffusion.context:
            return ChainMoments(denoiser, found.likelihood, times=self.diffusion.times)
        return found

    def filter(self, kind: type[Filter] = ParticleFilter, **options: Any) -> Filter:  # type: ignore[assignment]
        """A fresh filter over the chain; drive it with :meth:`drive`, or by hand."""
        chain = self.chain
        chain.renew()
        return kind(
            Target(chain),
            Proposal(chain),
            self.num_particles,
            batch_shape=chain.filters,
            max_plate_nesting=len(chain.diffusion.batch_shape),
            device=chain.device,
            **{**self._options, **options},
        )

    def drive(self, particles: Filter) -> Filter:
        """Run a filter from noise to data.

        Raises:
            SMCFailed: (a ``ValueError``) if at some step no particle explains the observations at all.
        """
        count = self.diffusion.steps
        stages = tqdm(
            reversed(range(count)), total=count, desc="particles", disable=not self.progress
        )
        stage = count
        try:
            with torch.no_grad():
                particles.init(stage)
                for stage in stages:
                    particles.step(stage)
                stage = -1
                particles.finish(stage)
        except SMCFailed as error:
            where = "at the data" if stage < 0 else f"at t_{stage}"
            reason = str(error).split("\n")[0]  # Pyro appends the trace's shapes
            raise SMCFailed(
                f"likelihood: got none that is positive and finite among {self.num_particles} particles "
                f"{where} ({reason}), expected some: give the observations more noise, use more particles "
                "or another guidance, and see that the program's derivatives are finite (at 0 those of a "
                "root or a norm are not)"
            ) from error
        return particles

    def run(self, *, keep_others: bool = True) -> Particles:
        """Run a fresh filter from noise to data once; ``verdict`` of the result says whether to believe it.

        Args:
            keep_others: whether a plate's datum that no particle explains leaves the others alone: its draws
                are NaN, its evidence is 0, a warning names it. Data of symbols have no NaN, and raise.

        Warns:
            UnreliableWarning: with what speaks against the run and what to change.

        Raises:
            SMCFailed: (a ``ValueError``) if at some step no particle explains the observations of all data,
                or without ``keep_others`` of one.
        """
        keep_others = keep_others and Ability.NUMBERS in self.diffusion.denoiser.process.abilities
        done = self.drive(self.filter(ParticleFilter, keep_others=keep_others))
        log_weights, root = done.log_weights, done.state["root"]
        x0 = self.chain.encoded(done.state["x"])
        variance = evidence_variance(log_weights, root, done.correction, done.weight_variance)
        error = variance.masked_fill(done.dead, math.inf).sum().sqrt()
        evidence = Estimate(
            float(done.log_evidence.sum()),
            float(error),
            UNBIASED,
            "nats",
            self.num_particles * (self.diffusion.steps + 1),
        )
        verdict = self._verdict(done, x0, evidence)
        if verdict.problems:
            warn_unreliable("TwistedSMC: " + "; ".join(verdict.problems))
        return Particles(
            value=self._value(done.state["x"], done.dead),
            log_weights=log_weights,
            log_evidence=evidence,
            log_evidence_terms=done.log_evidence,
            ess=torch.stack(done.ess),
            ancestors=torch.stack(done.roots),
            resamplings=done.resamplings,
            root=root,
            correction=done.correction,
            weight_variance=done.weight_variance,
            verdict=verdict,
        )

    def sweep(self, path: list[Tensor] | None = None) -> list[Tensor]:
        """A path of the chain drawn from a run of particles, one of which follows the path that is given.

        A Markov kernel that leaves the posterior of whole paths invariant, for any number of particles and
        any guidance; without a path, a draw of an ordinary run. See
        :class:`~pyro_diffusion.infer.filtering.conditional_filter.ConditionalFilter`.

        Args:
            path: a state for every step, from noise to data, each batch + event.

        Raises:
            ValueError: for a path of another length or shape.
        """
        if path is not None:
            self.chain.check_path(path)
        return self._swept(path).path()

    def _swept(self, path: list[Tensor] | None, **options: Any) -> ConditionalFilter:
        """The filter of one sweep, done."""
        join = self.chain.join
        return self.drive(self.filter(ConditionalFilter, reference=path, join=join, **options))

    def draws(
        self,
        num_draws: int,
        sweeps: int = 1,
        *,
        keep_others: bool = True,
        at_once: int | None = None,
    ) -> Swept:
        r"""Independent draws, each from particles of its own: the choice under networks, and for spreads.

        Draws of one run share what few ancestors it has kept. Here M chains stand side by side, each with N
        particles; each gives one draw after S sweeps. The first sweep is an ordinary run. Every other keeps
        the path :math:`x_{t_K}, \dots, x_{t_0}, x` that was drawn last as one of its N particles, draws the
        others around it, and then one path of all by its weight. That leaves the posterior as it is for any
        N, so that a draw's distribution comes nearer to it with every sweep (no divergence between the two
        can grow) and is exact in the limit of many; one sweep has the bias of order 1/N of a run. M draws are
        independent whatever N is. They have equal weights; by ``log_weights`` of the result, the evidences of
        the first runs, there is no bias, and fewer draws count.

        Under observations that deny most of x, runs may be left without a particle. These are made again, up
        to four times, so that their draws are those of a run that survives: a bias of the order of the share
        that died, which goes with more particles or sweeps; the verdict tells it. The evidence counts them
        as 0 and is unbiased.

        Network evaluations: M N S (K + 1), as one run of M N S particles, and those of repeats; M N particles
        are held at once, with all of their states, or as many as ``at_once`` says.

        Args:
            num_draws: M, how many draws of every datum.
            sweeps: S >= 1.
            keep_others: whether a plate's datum that no run explains leaves the others alone: its draws are
                NaN, its evidence is 0, a warning names it. Data of symbols have no NaN, and raise.
            at_once: most particles of a datum that are held at once, N at least; all if None.

        Warns:
            UnreliableWarning: with what speaks against the draws.

        Raises:
            SMCFailed: (a ``ValueError``) if no run explains the observations of any datum, or without
                ``keep_others`` of one; or if a sweep meets densities that are NaN.

        References:
            Andrieu, Doucet & Holenstein, Particle Markov chain Monte Carlo methods, JRSS B 72 (2010).
        """
        count, sweeps = (
            check_positive_int(name, value)
            for name, value in (("num_draws", num_draws), ("sweeps", sweeps))
        )
        keep_others = keep_others and Ability.NUMBERS in self.diffusion.denoiser.process.abilities
        most = count if at_once is None else check_positive_int("at_once", at_once)
        most = max(most if at_once is None else most // self.num_particles, 1)
        first = small_runs(self, count, most)
        if bool(first.dead.any()) and not keep_others:
            raise SMCFailed(no_run_left(count, self.num_particles, first.dead))
        paths = [first.path]
        values = [self._value(first.path[-1], first.dead)]
        for _ in range(sweeps - 1):
            path, dead = swept_again(self, paths[-1], most, keep_others)
            if bool((dead & ~first.dead).any()):
                raise SMCFailed(
                    "draws: got densities that are NaN in a later sweep, expected finite ones"
                )
            paths = [paths[-1], path]
            values.append(self._value(paths[-1][-1], first.dead))
        ends = (paths[0], paths[1]) if len(paths) == 2 else None
        x0 = self.chain.encoded(paths[-1][-1])
        found = judged(torch.stack(values), x0, ends, first, self.likelihood, self.num_particles)
        if found.verdict.problems:
            warn_unreliable("TwistedSMC: " + "; ".join(found.verdict.problems))
        return found

    def _value(self, x: Tensor, dead: Tensor) -> Tensor:
        """Data as values of the site, (n,) + batch + event, NaN for filters that are dead."""
        value = self.likelihood.site_value(self.chain.encoded(x))
        if not bool(dead.any()):
            return value
        row = dead.reshape(dead.shape + (1,) * (value.dim() - dead.dim() - 1))
        return value.masked_fill(row, math.nan)

    def _verdict(self, done: ParticleFilter, x0: Tensor, evidence: Estimate) -> Verdict:
        """What the filter's history says of it."""
        log_weights = done.log_weights
        least, step = torch.stack(done.ess).min(0)
        clock = self.chain.grid.clock.flatten().flip(0)
        places = torch.cat([clock, clock.new_full((1,), math.inf)])
        khat = pareto_khat(log_weights).reshape(done.dead.shape).to(log_weights)
        # Even weights, and those of few values (symbols), have no tail.
        values = 1 + (log_weights.sort(0).values.diff(dim=0) > 1e-9).sum(0)
        uneven = 2 * torch.maximum(done.ess[-1], self.num_particles - values) < self.num_particles
        chi2, p_value = misfit(self.likelihood, x0, log_weights)
        verdict = Verdict(
            num_particles=self.num_particles,
            least_ess=least,
            least_ess_log_snr=places[step],
            ancestors=done.roots[-1],
            effective_ancestors=effective_ancestors(log_weights, done.state["root"]),
            khat=khat.masked_fill(khat.isinf() | ~uneven, math.nan),
            misfit=chi2,
            misfit_p_value=p_value,
            dead=done.dead,
            log_evidence=evidence,
        )
        return dataclasses.replace(verdict, problems=judge(verdict))
