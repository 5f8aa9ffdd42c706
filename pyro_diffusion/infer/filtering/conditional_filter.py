"""A particle filter one of whose particles follows a given path."""

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical

from pyro_diffusion.infer.filtering.particle_filter import ParticleFilter
from pyro_diffusion.infer.filtering.resampling import multinomial_ancestors

__all__ = ["ConditionalFilter"]

Join = Callable[[Any, Tensor, int], Tensor]


class ConditionalFilter(ParticleFilter):
    r"""Conditional sequential Monte Carlo: a Markov kernel on whole paths.

    Particle 0 follows the reference path, the others are drawn around it; :meth:`path` draws one of all. That
    leaves the posterior of the path invariant for any number of particles >= 2. At resampling the reference
    gets a new past, drawn by what each particle's past and its own next state weigh together (ancestor
    sampling), without which it would hold on to the past it has.

    Resampling is multinomial, as invariance wants it. All states are kept: memory grows with steps times
    particles. Without a reference it is an ordinary filter that keeps its paths, and resamples as one.

    Args:
        model: object with ``init`` and ``step``; it writes ``state["x"]``, the value of its site "x".
        guide: likewise; it samples "x".
        num_particles: N >= 2.
        reference: a state for every step, each of the shape of one particle's; None for none.
        join: ``join(state, x, place)``, (N,) + batch: log-density of going on to x, the state at a place of
            the path, divided by each particle's twist.
        systematic: how to resample without a reference.
        options: the others of ``ParticleFilter``.

    References:
        Andrieu, Doucet & Holenstein, JRSS B 72 (2010), section 2.4.3;
        Lindsten, Jordan & Schoen, Particle Gibbs with ancestor sampling, arXiv 1401.0604.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        num_particles: int,
        *,
        reference: list[Tensor] | None = None,
        join: Join,
        systematic: bool = True,
        **options: Any,
    ) -> None:
        options["systematic"] = systematic and reference is None
        super().__init__(model, _Pinned(guide, self), num_particles, **options)
        self.reference, self.join = reference, join
        self.visited: list[Tensor] = []
        self.parents: list[Tensor] = []

    def path(self) -> list[Tensor]:
        """One of the paths, drawn by weight: the next reference."""
        index = Categorical(logits=self.log_weights.movedim(0, -1)).sample().unsqueeze(0)
        states = []
        for x, parents in zip(reversed(self.visited), reversed(self.parents), strict=True):
            index = parents.gather(0, index)
            at = index.reshape(index.shape + (1,) * (x.dim() - index.dim()))
            states.append(x.take_along_dim(at, 0).squeeze(0))
        return states[::-1]

    def _update_weights(self, model_trace: Any, guide_trace: Any) -> None:
        super()._update_weights(model_trace, guide_trace)
        self.visited.append(self.state["x"])

    def _maybe_importance_resample(self) -> None:
        super()._maybe_importance_resample()
        self.parents.append(self._parents)

    @property
    def _draws(self) -> int:
        return super()._draws + (self.reference is not None)

    def _ancestors(self, probs: Tensor, uniform: Tensor) -> Tensor:
        if self.reference is None:
            return super()._ancestors(probs, uniform)
        index = multinomial_ancestors(probs, uniform[:-1])
        place = len(self.visited)
        # Of weights, not of their exponentials: one that is 0 there may be made up for by the joint.
        joined = self.join(self.state, self.reference[place], place)
        log_weights = self.state._log_weights + joined
        index[:1] = multinomial_ancestors(log_weights.softmax(0), uniform[-1:])
        return index


class _Pinned:
    """A guide whose particle 0 draws what the reference says."""

    def __init__(self, guide: Any, owner: ConditionalFilter) -> None:
        self.guide, self.owner = guide, owner

    def init(self, state: Any, *args: Any, **kwargs: Any) -> None:
        with _Pin(self.owner):
            self.guide.init(state, *args, **kwargs)

    def step(self, state: Any, *args: Any, **kwargs: Any) -> None:
        with _Pin(self.owner):
            self.guide.step(state, *args, **kwargs)


class _Pin(Messenger):
    """Draws a site, and puts the reference in the place of the first particle."""

    def __init__(self, owner: ConditionalFilter) -> None:
        super().__init__()
        self.owner = owner

    def _pyro_sample(self, msg: Any) -> None:
        reference = self.owner.reference
        if reference is None or msg["name"] != "x":
            return
        value = msg["fn"].sample().clone()
        value[0] = reference[len(self.owner.visited)]
        msg["value"] = value
