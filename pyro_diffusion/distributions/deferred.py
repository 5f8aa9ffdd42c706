"""A distribution that is computed when it is first needed, known by its shapes until then."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine import runtime
from pyro.poutine.mask_messenger import MaskMessenger
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_diffusion.processes import draw
from pyro_diffusion.validation import Shape

__all__ = ["Deferred", "unscored"]


def unscored() -> bool:
    """Whether a program runs for its values alone, as in ``Predictive``: masked away, without gradients."""
    stack = runtime._PYRO_STACK
    masked = any(isinstance(m, MaskMessenger) and m.mask is False for m in stack)
    return masked and not torch.is_grad_enabled()


class Deferred(TorchDistribution):
    """Stands for a distribution that costs a network evaluation, and saves it where a value is given.

    Only for runs without gradients (:func:`unscored`): whether draws are reparameterized is not asked.

    Args:
        make: makes the distribution.
        batch_shape: its batch shape.
        event_shape: its event shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self, make: Callable[[], TorchDistribution], batch_shape: Shape, event_shape: Shape
    ) -> None:
        self._make = make
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @lazy_property
    def distribution(self) -> Any:
        """The distribution itself."""
        return self._make()

    @property
    def support(self) -> Any:
        """That of the distribution."""
        return self.distribution.support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "Deferred":
        """The same at a larger batch shape, still deferred."""
        shape = torch.Size(batch_shape)
        return Deferred(lambda: self.distribution.expand(shape), shape, self.event_shape)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws of the distribution."""
        with torch.no_grad():
            return draw(self.distribution.expand(torch.Size(sample_shape) + self.batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the distribution."""
        out: Tensor = self.distribution.log_prob(value)
        return out
