"""What processes of real data share: their support, states and point masses."""

from pyro.distributions import Delta, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.base import ForwardProcess
from pyro_diffusion.validation import check_finite

__all__ = ["RealProcess"]


class RealProcess(ForwardProcess):
    """A process of real numbers, each finite.

    Args:
        schedule: signal and noise scales; chains need finite log-SNR at their ends.
        event_dim: number of rightmost dimensions that make one datum.
    """

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.real

    def check_state(self, name: str, x: Tensor, values: bool = True) -> None:
        """Refuse what cannot be a state: as the base does, and numbers that are not finite.

        Raises:
            ValueError: naming the argument.
        """
        super().check_state(name, x, values)
        if values:
            check_finite(name, x)

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """Delta at x_0."""
        self.check_state("x0", x0, values=False)
        return Delta(x0, event_dim=self.event_dim, validate_args=False)
