"""A guide's site whose values are drawn by a procedure, with their density where it is known."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.distributions.no_closed_forms import NoClosedForms
from pyro_diffusion.validation import Shape

__all__ = ["Draw", "Drawn", "SimulatedPosterior"]


class Drawn(NamedTuple):
    """What an algorithm drew.

    Attributes:
        value: sample + batch + event.
        log_density: a function that gives their log-densities, sample + batch.
        one_run: whether several draws are of one run with one estimate of the evidence, so that what they
            weigh says nothing of its error.
    """

    value: Tensor
    log_density: Callable[[], Tensor]
    one_run: bool = False


# Takes the sample shape.
Draw = Callable[[torch.Size], Drawn]


class SimulatedPosterior(NoClosedForms, TorchDistribution):
    """What a guide's site is distributed as when its value is the outcome of an algorithm.

    The density belongs to the draw: :meth:`log_prob` answers for the value that :meth:`sample` returned last,
    which is all that ELBOs and importance weights ask of a guide.

    Args:
        draw: the algorithm.
        batch_shape: of the site.
        event_shape: of the site.
        support: of the site.
        nesting: how many rightmost batch dimensions are the model's plates; those to their left are
            samples. As many as ``batch_shape`` has, or more.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False
    _instead = "take the {} of draws of the guide, such as Predictive's"
    # The density is relative to the model's own estimate, so that weights of particles are free of it.
    holds_prior = True

    def __init__(
        self,
        draw: Draw,
        batch_shape: Shape,
        event_shape: Shape,
        support: constraints.Constraint,
        nesting: int = 0,
    ) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)
        self._draw, self._support = draw, support
        self._own = self.batch_shape
        self._nesting = max(nesting, len(self._own))
        self._last: Drawn | None = None

    @property
    def one_run(self) -> bool:
        """Whether the last draws share one estimate of the evidence."""
        return self._last is not None and self._last.one_run

    @property
    def support(self) -> constraints.Constraint:
        """That of the model's site."""
        return self._support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Self:
        """The same distribution at a larger batch shape; what is new on the left are samples."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._last = None
        TorchDistribution.__init__(
            new, torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        return new

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """One run of the algorithm for all draws, sample + batch + event."""
        shape = torch.Size(sample_shape) + self.batch_shape
        lead = shape[: max(len(shape) - self._nesting, 0)]
        if shape.numel() != (lead + self._own).numel():
            raise ValueError(
                f"plates: got batch shape {tuple(self.batch_shape)}, expected samples on the left of "
                f"{tuple(self._own)}, the site's own"
            )
        with torch.no_grad():
            drawn = self._draw(lead)
            value = drawn.value.detach().reshape(shape + self.event_shape)
        self._last = drawn._replace(value=value)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the last draw (nats), a constant for autograd, of the batch shape.

        Raises:
            ValueError: for any other value.
        """
        if self._last is None or not _same(self._last.value, value):
            raise ValueError(
                "value: got one that this guide did not draw, expected its last draw (the guide proposes; it "
                "has no density elsewhere)"
            )
        with torch.no_grad():
            log_density = self._last.log_density()
        return log_density.detach().reshape(value.shape[: value.dim() - len(self.event_shape)])


def _same(drawn: Tensor, value: Tensor) -> bool:
    return drawn is value or (drawn.shape == value.shape and bool((drawn == value).all()))
