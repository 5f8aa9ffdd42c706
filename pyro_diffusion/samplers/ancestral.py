"""Samplers that draw from the reverse kernel, or from the bridge to the posterior mean."""

from typing import Any, ClassVar

from torch import Tensor

from pyro_diffusion.processes import Ability, ForwardProcess, draw
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.samplers.base import Denoise, Sampler, State
from pyro_diffusion.schedules import Level

__all__ = ["DDIM", "Ancestral"]


class Ancestral(Sampler):
    r"""Draw :math:`x_s \sim \int q(x_s | x_t, x_0)\, p(x_0 | x_t)\, dx_0`, the chain's own kernel.

    Exact for the model: the samples follow the density that the bound bounds. One network evaluation a
    step; any process. Weak order 1 for a point mass; a posterior variance only lowers the error.

    References:
        Ho et al., arXiv 2006.11239, algorithm 2; with a posterior variance, Bao et al., arXiv 2201.06503.
    """

    weak_order: int | None = 1
    strong_order: int | None = 1

    def __repr__(self) -> str:
        return "Ancestral()"

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> tuple[Any, ...]:
        """The bridge's weights and variance."""
        return process.coefficients(s, t)

    def step(
        self,
        process: ForwardProcess,
        denoise: Denoise,
        state: State,
        s: Level,
        t: Level,
        c: Any,
    ) -> State:
        r"""Draw :math:`x_s \sim p(x_s | x_t)`, the bridge integrated over the posterior.

        Under a Gaussian process, with posterior mean :math:`\hat x_0` and variance w (0 for a point mass),

        .. math:: x_s = r\,x_t + k\,\hat x_0 + \sqrt{v + k^2 w}\;z, \qquad z \sim \mathcal N(0, I),

        where r, k and v are the bridge's weights and variance in ``c``, see :meth:`DDIM.step` at
        :math:`\eta = 1`. Under a categorical process it is the mixture over symbols of
        :class:`~pyro_diffusion.processes.CategoricalProcess`.
        """
        return State(draw(process.combine(state.x, denoise(state.x, t), c)).detach())


class DDIM(Sampler):
    r"""The bridge with free variance :math:`\eta^2` around a point mass at the posterior mean.

    ``eta=1`` is DDPM's sampler with the small variance, ``eta=0`` is deterministic and goes both ways
    (first order in the step of the probability-flow ODE). One network evaluation a step; any
    process with free variance, or with a flow for ``eta=0``.

    Args:
        eta: fraction of the bridge's standard deviation that is fresh noise, in [0, 1].

    Attributes:
        needs: what else the process must be able to do, see :class:`~pyro_diffusion.processes.Ability`.

    Raises:
        ValueError: if eta lies outside [0, 1].

    References:
        Song, Meng & Ermon, arXiv 2010.02502, equation 12.
    """

    needs: ClassVar[tuple[Ability, ...]] = ()

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
        self.eta = float(eta)
        self.order = 1 if eta == 0 else None
        self.weak_order = self.strong_order = 1 if eta > 0 else None

    def __repr__(self) -> str:
        return f"DDIM(eta={self.eta:g})"

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> Any:
        """The bridge's r, k and v at this eta.

        Raises:
            ValueError: for a process whose bridges have no free variance.
        """
        flow = Ability.ODE in process.abilities
        # Without noise the step is one of the flow, which needs no bridge that draws any.
        needed = Ability.ODE if flow and self.eta == 0 else Ability.FREE_VARIANCE
        instead = "eta=0" if flow else "Ancestral()"
        require(process, needed, *self.needs, argument="sampler", by=self, instead=instead)
        return process.coefficients(s, t, self.eta)

    def step(
        self,
        process: ForwardProcess,
        denoise: Denoise,
        state: State,
        s: Level,
        t: Level,
        c: Any,
    ) -> State:
        r"""Go to :math:`x_s = r\,x_t + k\,\hat x_0 + \sqrt v\,z` with :math:`z \sim \mathcal N(0, I)`.

        The coefficients in ``c``, once for all steps from
        :meth:`~pyro_diffusion.processes.ForwardProcess.coefficients`, are

        .. math::
            \kappa = 1 - e^{\lambda_t - \lambda_s}, \qquad
            r = \frac{\sigma_s}{\sigma_t}\sqrt{1 - \eta^2 \kappa}, \qquad
            k = \alpha_s - r\,\alpha_t, \qquad
            v = \eta^2 \sigma_s^2\,\kappa .
        """
        return State(self.bridge_step(process, state.x, denoise(state.x, t).mean, c))

    def bridge_step(self, process: ForwardProcess, x: Tensor, x0: Tensor, c: Any) -> Tensor:
        r""":math:`r\,x + k\,x_0 + \sqrt v\,z`: the end of the bridge from x to data known to be x0.

        Args:
            process: the forward process, which combines the three terms.
            x: state, batch + event.
            x0: data, likewise.
            c: the bridge's coefficients r, k and v.
        """
        kernel = process.combine(x, process.point_mass(x0), c)  # mean r x + k x0, variance v
        return draw(kernel).detach() if self.eta > 0 else kernel.mean
