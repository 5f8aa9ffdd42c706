"""Particles from any fitted guide to the posterior: draws, evidence with its error, and a verdict."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.smcfilter import SMCFailed
from torch import Tensor

from pyro_diffusion.infer.annealing.annealed_chain import AnnealedChain, NoProposal, Stage
from pyro_diffusion.infer.annealing.annealed_particles import (
    AnnealedParticles,
    annealed_particles,
    summary,
)
from pyro_diffusion.infer.annealing.annealed_rounds import WIDER, of_the_guide, refitted, settled
from pyro_diffusion.infer.annealing.annealing_pilot import interpolated, next_stage
from pyro_diffusion.infer.annealing.guide_chart import GuideChart, chart_of
from pyro_diffusion.infer.annealing.local_scales import local_scales
from pyro_diffusion.infer.annealing.unconstrained import UnconstrainedModel, check_guide
from pyro_diffusion.infer.annealing.widening import WIDER as WIDENED
from pyro_diffusion.infer.annealing.widening import has_grown, moments, widened
from pyro_diffusion.infer.filtering.particle_filter import ParticleFilter
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_number, check_positive_int, kind_of

__all__ = ["AnnealedSMC"]

TRIES = 5  # draws of all particles until one has a density
MOST_STAGES = 1000
MOST_ROUNDS = 20


class AnnealedSMC:
    r"""Posterior draws and evidence of any continuous Pyro model, by particles that start at a fitted guide.

    Particles are drawn from the guide q and follow the laws

    .. math:: \pi_b(u) \propto q(u)^{1 - b}\, p(x, u)^b, \qquad 0 = b_0 < \dots < b_K = 1,

    of the unconstrained latents u, Jacobians included: weighted from one to the next, resampled when the
    effective sample size falls, and moved by Hamiltonian Monte Carlo under each. The moves are made in the
    guide's own coordinates, where it is standard normal.

    **A pilot run** chooses temperatures (each leaves a share ``conditional_ess`` of the particles), step
    sizes and scales of the moves. The reported run takes them as they are, with fresh particles. So
    :math:`\hat Z` is *unbiased* for the evidence p(x), for any number of particles and any guide that has a
    density where the posterior has one, discrete latents summed over; its logarithm is biased down by about
    half its variance. Averages over the draws are consistent in ``num_particles``. The ``num_repeats``
    systems are independent and run side by side; the error bar comes from their scatter and has no ceiling.

    **Rounds.** A guide that is narrow keeps its particles from the ends of a funnel, and no figure of the run
    shows it. So the next round starts at a base around the particles of the last: a normal half as wide
    again, in coordinates in which the cloud is as wide everywhere (places and log scales linear in
    a few latents, which takes a centred hierarchy to one that is not). It is one normal for all modes: bases
    with parts that fit some of them starve the others on the way. Rounds end when two agree in the log
    evidence and in the latents' spread. The reported run is one more with the last base, on fresh particles,
    and so as unbiased. Rounds that never agree are a problem of the verdict. What none of them visits, no
    figure can show: particles find modes that a path from the guide leads to.

    Moves have a metric of their own in each part of a mixture of normals, fitted by the pilot to the
    particles at every temperature.

    Cost: one call of the model under ``torch.func.vmap`` for all N R particles (see
    :class:`~pyro_diffusion.infer.annealing.unconstrained.UnconstrainedModel`), and one gradient a leapfrog
    step; memory does not grow with the number of temperatures.

    Args:
        model: the program.
        guide: an ``AutoNormal`` or any ``AutoContinuous`` (``AutoMultivariateNormal``,
            ``AutoLowRankMultivariateNormal``, ``AutoIAFNormal``, ...) of its continuous latents, fitted. For
            a model with discrete latents, one of ``poutine.block(model, hide=[...])``.
        num_particles: N >= 2, of each repeat.
        num_repeats: R >= 6.
        steps: K >= 1, temperatures after the guide's; as many as the pilot took if None.
        moves: at each temperature.
        final_moves: at the posterior, after the last weighting. They leave the posterior as it is; where they
            change the particles' moments, these are not there yet, and the verdict says so.
        conditional_ess: in (0, 1); nearer 1, more temperatures.
        ess_threshold: resample below this share of N, in (0, 1].
        max_leapfrog: leapfrog steps of one move at most; 1 is the Metropolis-adjusted Langevin algorithm.
        pilot_particles: of the pilot; half of N R by default.
        rounds: at most, each a pilot and a run. With more dimensions than the particles have covariances, the
            next has the same base and twice the temperatures. 1: one run that nothing is compared with.
        widen: look for modes beside the guide's: it gives way to a normal of the pilot's particles, three
            times as wide, again and again, and three times more after each round that finds nothing new,
            until so many of these have passed. Costs a pilot each, and more temperatures in the end: bases of
            later rounds are three times as wide as the particles too, so that rare modes stay.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor(1.0)
        >>> found = AnnealedSMC(model, AutoNormal(model)).run(x)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> abs(found.log_evidence.value - float(exact)) < 0.1
        True
        >>> found.sample(1000)["z"].shape
        torch.Size([1000])

    References:
        Neal, Annealed importance sampling, Statistics and Computing 11 (2001); Del Moral, Doucet & Jasra,
        Sequential Monte Carlo samplers, JRSS B 68 (2006); Zhou, Johansen & Aston, arXiv 1303.3123
        (conditional effective sample size); Hoffman et al., arXiv 1903.03704 (moves in a flow); Gorinova,
        Moore & Hoffman, arXiv 1906.03028 (reparametrization).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoGuide,
        num_particles: int = 256,
        num_repeats: int = 8,
        *,
        steps: int | None = None,
        moves: int = 1,
        final_moves: int = 10,
        conditional_ess: float = 0.97,
        ess_threshold: float = 0.5,
        max_leapfrog: int = 10,
        pilot_particles: int | None = None,
        rounds: int = 6,
        widen: int = 0,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: got {kind_of(model)}, expected a Pyro program")
        self.model, self.guide = model, check_guide(guide)
        self.num_particles = check_positive_int("num_particles", num_particles, at_least=2)
        self.num_repeats = check_positive_int("num_repeats", num_repeats, at_least=6)
        self.steps = None if steps is None else check_positive_int("steps", steps)
        self.moves = check_positive_int("moves", moves, at_least=0)
        self.final_moves = check_positive_int("final_moves", final_moves, at_least=0)
        check_number("conditional_ess", conditional_ess, above=0, below=1)
        check_number("ess_threshold", ess_threshold, above=0, at_most=1)
        self.conditional_ess, self.ess_threshold = conditional_ess, ess_threshold
        self.max_leapfrog = check_positive_int("max_leapfrog", max_leapfrog)
        if pilot_particles is None:
            pilot_particles = max(num_particles * num_repeats // 2, 2)
        self.rounds = check_positive_int("rounds", rounds)
        self.widen = check_positive_int("widen", widen, at_least=0)
        self.pilot_particles = check_positive_int("pilot_particles", pilot_particles, at_least=2)

    def run(self, *args: Any, **kwargs: Any) -> AnnealedParticles:
        """A pilot and a run, of the model with these arguments.

        Warns:
            UnreliableWarning: with what speaks against the run and what to change.

        Raises:
            ValueError: for a model that cannot be scored (see
                :class:`~pyro_diffusion.infer.annealing.unconstrained.UnconstrainedModel`), a guide of which
                no draw has a density under it (naming the site), and where every repeat loses all its
                particles.
        """
        with isolated(), torch.no_grad():
            self.guide(*args, **kwargs)  # an unfitted guide has no parameters before
        model = UnconstrainedModel(self.model, self.guide, args, kwargs)
        # Proposals that leave the numbers, NaN among them, are rejected; they are no errors.
        with pyro.validation_enabled(False):
            with isolated(), torch.no_grad():
                chart = chart_of(self.guide, args, kwargs)
            chart = first = self._widened(model, chart)
            rounds: list[AnnealedParticles] = []
            stages = self.pilot(model, chart)[0]
            while self.rounds > 1:
                rounds.append(self._once(model, chart, stages))
                if len(rounds) == self.rounds or settled(rounds):
                    break
                chart, stages = self._again(model, chart, rounds[-1])
            # Fresh particles: those of a round that was chosen for what it found would be biased.
            particles = self._once(model, chart, stages, rounds)
            if rounds:
                particles = of_the_guide(particles, rounds[0], model, first)
        if particles.verdict.problems:
            warn_unreliable("AnnealedSMC: " + "; ".join(particles.verdict.problems))
        return particles

    def _once(
        self,
        model: UnconstrainedModel,
        chart: GuideChart,
        stages: list[Stage],
        rounds: Sequence[AnnealedParticles] = (),
    ) -> AnnealedParticles:
        chain = AnnealedChain(model, chart, self.num_particles, self.num_repeats)
        done, gap, change = self._run(chain, stages)
        return annealed_particles(chain, done, stages, gap, change, rounds)

    def _again(
        self, model: UnconstrainedModel, chart: GuideChart, found: AnnealedParticles
    ) -> tuple[GuideChart, list[Stage]]:
        """The base and the stages of the next round: around the particles, or twice the temperatures."""
        base = refitted(found, WIDENED if self.widen else WIDER)
        stages = self.pilot(model, base or chart)[0]
        if base is None:
            stages = interpolated(stages, 2 * (len(found.betas) - 1))
        return base or chart, stages

    def _widened(self, model: UnconstrainedModel, chart: GuideChart) -> GuideChart:
        """The guide's own chart, or a wide normal around all that ever wider ones led to."""
        last: Tensor | None = None
        quiet = rounds = 0
        while quiet < self.widen and rounds < MOST_ROUNDS:
            done = self.pilot(model, chart)[1]
            with torch.no_grad():
                u = chart(done.state["z"])[0].flatten(0, 1)
                mean, root = moments(u, done.log_weights.flatten())
            quiet = quiet + 1 if last is not None and not has_grown(root, last) else 0
            chart, last, rounds = widened(mean, root, 1 + quiet), root, rounds + 1
        return chart if last is None else widened(mean, root, 1)

    def pilot(
        self, model: UnconstrainedModel, chart: GuideChart
    ) -> tuple[list[Stage], ParticleFilter]:
        """Temperatures and moves, and the particles that they are from; the last stage is at b = 1.

        Raises:
            ValueError: as :meth:`run`.
        """
        if self.steps == 1:
            return self._one_step(model, chart)
        chain = AnnealedChain(model, chart, self.pilot_particles, 1)
        done = self._start(chain)
        stages: list[Stage] = []
        with torch.no_grad():
            while not stages or stages[-1].next_beta < 1:
                stages.append(self._next(chain, done, stages))
                done.step(stages[-1], 0)
                if len(stages) > MOST_STAGES:
                    raise ValueError(
                        f"guide: got one from which b = {stages[-1].beta:.2g} of the way takes "
                        f"{MOST_STAGES} temperatures, expected one that is nearer; fit it, or make "
                        f"conditional_ess ({self.conditional_ess}) smaller"
                    )
            stages.append(self._next(chain, done, stages))
        return (stages if self.steps is None else interpolated(stages, self.steps)), done

    def _one_step(
        self, model: UnconstrainedModel, chart: GuideChart
    ) -> tuple[list[Stage], ParticleFilter]:
        """Plain importance sampling: only the moves at the posterior are tuned."""
        chain = AnnealedChain(model, chart, self.pilot_particles, 1)
        done = self._start(chain)
        z = done.state["z"]
        unit = local_scales(z.new_zeros(1), z.new_zeros(1, z.shape[-1]), torch.ones_like(z[0, :1]))
        first = Stage(0.0, 1.0, unit, z.new_ones(1), 1)
        with torch.no_grad():
            done.step(first, 0)
            return [first, self._next(chain, done, [first])], done

    def _next(self, chain: AnnealedChain, done: ParticleFilter, stages: list[Stage]) -> Stage:
        return next_stage(
            chain,
            done.state,
            done.log_weights,
            stages[-1] if stages else None,
            conditional_ess=self.conditional_ess,
            max_leapfrog=self.max_leapfrog,
        )

    def _start(self, chain: AnnealedChain, tries: int = TRIES) -> ParticleFilter:
        """A filter at draws of the guide of which one has a density at least."""
        count, repeats = chain.shape
        for _ in range(tries):
            with torch.no_grad():
                z = chain.chart.base.sample((count, repeats)).detach()
                u = chain.chart(z)[0]
            chain.model.check(u.reshape(-1, chain.model.dim))
            done = ParticleFilter(
                chain,
                NoProposal(),
                count,
                batch_shape=(repeats,),
                max_plate_nesting=1,
                ess_threshold=self.ess_threshold,
                device=z.device,
                keep_others=True,
            )
            done.init(z)
            if bool(done.state["gap"].isfinite().any()):
                return done
        raise ValueError(
            f"{chain.model.blame(u[0, 0])} at a draw of the guide, and no density at any of "
            f"{count * repeats} draws, {tries} times over, expected a guide whose draws the model allows"
        )

    def _run(
        self, chain: AnnealedChain, stages: list[Stage]
    ) -> tuple[ParticleFilter, Tensor, Tensor]:
        """The filter at the posterior, log p - log q at its start, and what the last moves changed."""
        # Once: a second try would leave out the evidence 0 of the first.
        done = self._start(chain, tries=1)
        gap = done.state["gap"].double()
        try:
            with torch.no_grad():
                for stage in stages[:-2]:
                    done.step(stage, self.moves)
                done.finish(stages[-2], self.moves)
                before = summary(done)
                for _ in range(self.final_moves):
                    chain.move(done.state, stages[-1])
        except SMCFailed as error:
            reason = str(error).split("\n")[0]
            raise SMCFailed(
                f"model: got no finite density among {self.num_particles} particles of {self.num_repeats} "
                f"repeats on the way from the guide ({reason}), expected some: use more particles or another "
                "guide"
            ) from error
        return done, gap, summary(done) - before
