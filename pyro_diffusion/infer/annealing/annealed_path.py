"""The law of the end of a path from a guide to a posterior: draws, each with the density of its path."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.distributions.no_closed_forms import NoClosedForms
from pyro_diffusion.infer.annealing.path_kernels import Levels, PathKernel, State
from pyro_diffusion.infer.annealing.tempered import TemperedDensity, slope
from pyro_diffusion.validation import Shape

__all__ = ["AnnealedPath", "Control", "PathDensity", "centred"]

Control = Callable[[Tensor, int], Tensor]  # at (..., D) and a level


class PathDensity(NamedTuple):
    """Log densities of a path, nats.

    Attributes:
        forward: of the guide's draw and all steps from it, in the latents' coordinates, (...).
        backward: of all steps back, (...).
        joint: log p(x, u_K) of the latents and data at the path's end, (...).
    """

    forward: Tensor
    backward: Tensor
    joint: Tensor

    @property
    def ratio(self) -> Tensor:
        """Log forward less log backward, what stands for the density of the path's end."""
        return self.forward - self.backward

    @property
    def log_weight(self) -> Tensor:
        """Log joint less the ratio: its exponential is unbiased for the evidence."""
        return self.joint - self.ratio


class AnnealedPath(NoClosedForms, TorchDistribution):
    r"""The law of :math:`u_K = f(z_K)`, the end of a chain of K steps from a guide's draw.

    .. math::

        z_0 \sim q, \quad z_{k+1} \sim F_k(\cdot \mid z_k), \qquad
        \log \hat q(u_K) = \log q(z_0) + \sum_k \log \frac{F_k(z_{k+1} \mid z_k)}{B_k(z_k \mid z_{k+1})}
        - \log \left|\det \frac{\partial f}{\partial z}\right|,

    with f the guide's own chart. :meth:`log_prob` of the last draw is :math:`\log \hat q` of its path, so
    that :math:`p(x, u_K) / \hat q` is an *unbiased* estimate of the evidence and the mean of its logarithm a
    *lower bound*. For another value it walks back from there: then :math:`\hat q` is an *unbiased* estimate
    of the density, its logarithm is low on average, and :math:`E \log p - \log \hat q` over exact posterior
    draws an *upper bound* of the evidence.

    Args:
        density: between guide and posterior.
        kernel: of the steps.
        levels: their schedule.
        control: of the steps, None for none.
        given: further unconstrained latents of the model, (E,), or one row a draw.
        pathwise: whether draws carry gradients (of second derivatives of the model). If not, gradients are
            those of scores, with the mean over the draws as a baseline: first derivatives alone, and no graph
            through the chain.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    _instead = "take the {} of draws of the guide, such as Predictive's"

    def __init__(
        self,
        density: TemperedDensity,
        kernel: PathKernel,
        levels: Levels,
        *,
        control: Control | None = None,
        given: Tensor | None = None,
        pathwise: bool = True,
    ) -> None:
        event_shape = levels.scale.shape
        super().__init__(torch.Size(), event_shape, validate_args=False)
        self.density, self.kernel, self.levels = density, kernel, levels
        self.control, self.given, self.pathwise = control, given, pathwise
        self._last: tuple[Tensor, PathDensity] | None = None

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients."""
        return self.pathwise

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same law of more paths."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._last = None
        TorchDistribution.__init__(
            new, torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        return new

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Ends of paths, sample + batch + (D,)."""
        base = self.density.chart.base
        z = base.sample(torch.Size(sample_shape) + self.batch_shape)
        start, end, there, back = self._walk(z, 0, len(self.levels))
        u, log_det = self.density.chart(end["z"])
        if not self.pathwise:
            u = u.detach()
        joint = end["log_q"] + end["gap"] - log_det
        self._last = u, PathDensity(start["log_q"] + there - log_det, back, joint)
        return u

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """As :meth:`rsample`; where draws carry gradients, without them."""
        if not self.pathwise:
            return self.rsample(sample_shape)
        with torch.no_grad():
            return self.rsample(sample_shape)

    def path_density(self, value: Tensor) -> PathDensity:
        """Of the last draw's path, or of one walked back from another value, sample + batch."""
        if self._last is None or not _same(self._last[0], value):
            chart = self.density.chart
            z = value if chart.transform is None else chart.transform.inv(value)
            log_det = chart(z)[1]
            start, end, back, there = self._walk(z, len(self.levels), 0)
            joint = start["log_q"] + start["gap"] - log_det
            self._last = value, PathDensity(end["log_q"] + there - log_det, back, joint)
        return self._last[1]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of its path, see the class; the same again for the same value."""
        return self.path_density(value).ratio

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        r"""What Pyro's ELBOs differentiate.

        Without pathwise gradients that is, for N paths with log weights :math:`w_n`, the gradient of
        :math:`\frac1{N - 1} \sum_n (w_n - \bar w) \log F_n + \frac1N \sum_n \log B_n`, weights held fixed:
        that of the ELBO with each path's baseline the mean of the others. A single path has none.

        Raises:
            ValueError: for such gradients given latents that carry some themselves.
        """
        path = self.path_density(x)
        if self.pathwise:
            return ScoreParts(path.ratio, 0, path.ratio)  # type: ignore[arg-type]
        if self.given is not None and self.given.requires_grad:
            raise ValueError(
                "pathwise: got False after guides of a list whose draws carry gradients, which scores do not "
                "hand on, expected True, or those guides without parameters to train (requires_grad_(False))"
            )
        score = centred(path.forward)
        # Pyro's learning signal has the model's densities, not those of a guide's auxiliary sites.
        entropy = path.ratio.detach() * score - path.backward
        return ScoreParts(path.ratio, score, entropy)

    def _walk(self, z: Tensor, first: int, last: int) -> tuple[State, State, Tensor, Tensor]:
        """States of both ends, and log densities of the steps and of those back."""
        graph = self.pathwise and torch.is_grad_enabled()
        given = self.given
        if given is not None and given.dim() > 1:
            given = given.reshape(*z.shape[:-1], -1)

        betas, schedule = self.levels.betas.unbind(), self.kernel.schedule(self.levels)

        def arrive(z: Tensor, level: int) -> State:
            state = {"z": z, **self.density(z, given, create_graph=graph)}
            state["slope"] = slope(state, betas[level])
            if self.control is not None:
                state["control"] = self.control(z, level)
            return state

        start = state = self.kernel.start(arrive(z, first))
        there = self.kernel.edge(state)
        back = torch.zeros_like(there)
        sign = 1 if last > first else -1
        for level in range(first, last, sign):
            state, ahead, behind = self.kernel.step(
                schedule, arrive, state, level, level + sign, self.pathwise
            )
            there, back = there + ahead, back + behind
        return start, state, there, back + self.kernel.edge(state)


def centred(score: Tensor) -> Tensor:
    """N / (N - 1) (s - mean): each of N >= 2 signals then has the mean of the others as its baseline."""
    count = score.numel()
    return count / (count - 1) * (score - score.mean()) if count > 1 else score


def _same(drawn: Tensor, value: Tensor) -> bool:
    return drawn is value or (drawn.shape == value.shape and bool((drawn == value).all()))
