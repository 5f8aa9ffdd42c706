r"""The forward SDE of a Gaussian process and the family of SDEs that reverse it, for torchsde."""

from typing import NamedTuple

import torch
import torchsde
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.pyro_modules import in_this_run
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import Shape, check_expands, check_number

__all__ = ["ForwardSDE", "GaussianSDE", "KnownData", "ReverseSDE"]


class Node(NamedTuple):
    r"""Coefficients of an SDE :math:`dy = (a\,y + b\,\hat x_0)\,du + g\,dw` at one or more times.

    Attributes (of shape times + (numbers in a datum,), or times + (1,) if all are alike):
        state: a.
        noise: g.
        data: b, if the drift depends on the denoiser.
        level: the schedule there, likewise.
    """

    state: Tensor
    noise: Tensor
    data: Tensor | None = None
    level: Level | None = None


class GaussianSDE(torchsde.BaseSDE):
    r"""A linear SDE in u in [0, 1] with additive noise, as torchsde wants it: rows of flat states.

    Additive noise has no Ito correction: an Ito SDE is its own Stratonovich SDE, so ``sde_type`` may be set
    to whatever a method is written for. And Euler-Maruyama is Milstein's method, of strong order 1.

    Args:
        process: a Gaussian process whose schedule has finite ends.
        event_shape: shape of one datum; states are (rows, numbers in a datum).
        noise_type: ``"additive"``, the cheapest, whose Brownian motion must be passed in, or ``"diagonal"``
            for all else of torchsde (``logqp``, adjoints, no ``bm``).
        sde_type: ``"ito"`` or ``"stratonovich"``.

    Raises:
        ValueError: for another process or an infinite end.

    References:
        Song et al., arXiv 2011.13456; Li et al. (torchsde), arXiv 2001.01328.
    """

    def __init__(
        self,
        process: ForwardProcess,
        event_shape: Shape,
        noise_type: str = "additive",
        sde_type: str = "ito",
    ) -> None:
        for name, value, known in (
            ("noise_type", noise_type, ("additive", "diagonal")),
            ("sde_type", sde_type, ("ito", "stratonovich")),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        super().__init__(noise_type, sde_type)
        require(process, Ability.SDE, argument="process")
        process.finite_clock_ends()
        self.process, self.event_shape = process, process.check_event(event_shape)
        if noise_type == "diagonal":
            self.g = self._spread

    def nodes(self, u: Tensor) -> Node:
        """Coefficients at times u."""
        raise NotImplementedError

    def drift(self, y: Tensor, node: Node) -> Tensor:
        """Drift of rows y."""
        raise NotImplementedError

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift."""
        return self.drift(y, self._node(t, y))

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times a vector."""
        return self._node(t, y).noise * v

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and diffusion times a vector."""
        node = self._node(t, y)
        return self.drift(y, node), node.noise * v

    def _flat(self, coefficient: Tensor, u: Tensor) -> Tensor:
        """A coefficient for flat states: times + (1,), or one number per coordinate of a datum."""
        if coefficient.numel() > u.numel():
            coefficient = coefficient.expand(*u.shape, *self.event_shape)
        return coefficient.reshape(*u.shape, -1)

    def _spread(self, t: Tensor, y: Tensor) -> Tensor:
        """Diffusion per coordinate."""
        return torch.zeros_like(y) + self._node(t, y).noise

    def _node(self, u: Tensor, y: Tensor) -> Node:
        # On the host, as the solver's time is.
        node = self.nodes(torch.as_tensor(u, dtype=torch.float64).clamp(0, 1))
        if node.level is None:
            return node
        level = node.level.map(lambda v: v.to(y))
        state, noise, data = (v if v is None else v.to(y) for v in node[:3])
        return Node(state, noise, data, level)  # type: ignore[arg-type]


class ForwardSDE(GaussianSDE):
    r"""The SDE from data to noise, :math:`dx = f(t)\,x\,dt + g(t)\,dw` with u = t.

    From x_0 at t = 0, i.e. a state drawn from q(x_{t_0} | x_0), its
    distribution at t is exactly the process's marginal.

    Args:
        process: a Gaussian process whose schedule has finite ends.
        event_shape: shape of one datum.
        noise_type: ``"additive"``, whose Brownian motion must be passed in, or ``"diagonal"``.
        sde_type: ``"ito"`` or ``"stratonovich"``: the same under additive noise.

    Example:
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import SubVP
        >>> sde = ForwardSDE(GaussianProcess(SubVP()), (2,), noise_type="diagonal")
        >>> torchsde.sdeint(sde, torch.zeros(5, 2), [0.0, 1.0], dt=0.1, method="euler").shape
        torch.Size([2, 5, 2])

    References:
        Song et al., arXiv 2011.13456, equation 5.
    """

    def nodes(self, u: Tensor) -> Node:
        """Coefficients f and g, with b = 0, at times t = u."""
        rates = self.process.rates(u)
        drift, noise = rates.log_alpha, rates.diffusion.sqrt()
        return Node(self._flat(drift, u), self._flat(noise, u))

    def drift(self, y: Tensor, node: Node) -> Tensor:
        """The drift f x of rows y."""
        return node.state * y


class ReverseSDE(GaussianSDE):
    r"""The SDEs from noise to data, in u = 1 - t, whose marginals are those of the forward one.

    .. math:: dx = -\Big[f x - \tfrac{1 + \eta^2}{2} g^2 s\Big] du + \eta\,g\,dw, \qquad
              s = \frac{\alpha \hat x_0 - x}{\sigma^2}.

    With :math:`g^2 = -\sigma^2 \lambda'(t)` it is linear in the state and the posterior mean, which is how it
    is computed (elementwise where noise differs by coordinate):

    .. math:: dx = (a\,x + b\,\hat x_0)\,du + \eta\,g\,dw, \qquad
              a = \tfrac{1 + \eta^2}{2}\,\lambda' - f, \qquad
              b = -\tfrac{1 + \eta^2}{2}\,\lambda'\,\alpha .

    ``eta=1`` is Anderson's reverse of the forward SDE, ``eta=0`` the probability-flow ODE. With the exact
    posterior mean the marginals are those of the forward process for every eta.

    With a second denoiser as ``prior`` it has torchsde's prior drift ``h``, and ``logqp=True`` integrates the
    divergence of the two paths (noise type ``"diagonal"``, eta > 0). With ``KnownData`` as the denoiser
    and a model as the prior that is, at eta = 1, the diffusion term of the continuous-time bound, and
    :math:`(1 + \eta^2)^2 / (4 \eta^2)` times it otherwise.

    Args:
        denoiser: posterior p(x_0 | x_t) under a Gaussian process; its mean is used.
        event_shape: shape of one datum.
        eta: share of the noise, from 0 to 1000.
        context: tensors for the denoiser, one row per row of the state.
        prior: a denoiser of the same process.
        noise_type: ``"additive"``, whose Brownian motion must be passed in, or ``"diagonal"``.
        sde_type: ``"ito"`` or ``"stratonovich"``: the same under additive noise.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    References:
        Anderson, Reverse-time diffusion equation models, 1982; Song et al., arXiv 2011.13456, equation 6;
        Zhang & Chen, arXiv 2107.07675 (the family in eta).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        eta: float = 1.0,
        *,
        context: dict[str, Tensor] | None = None,
        prior: Denoiser | None = None,
        noise_type: str = "additive",
        sde_type: str = "ito",
    ) -> None:
        if not isinstance(denoiser, Denoiser):
            raise ValueError(f"denoiser: got {type(denoiser).__name__}, expected a Denoiser")
        super().__init__(denoiser.process, event_shape, noise_type, sde_type)
        self.denoiser, self.eta = in_this_run(denoiser), check_eta(eta)
        self.context = dict(context or {})
        self.prior = None if prior is None else in_this_run(prior)
        if prior is not None:
            self.h = self._prior_drift

    def nodes(self, u: Tensor) -> Node:
        r"""Coefficients at times t = 1 - u.

        With :math:`c = \tfrac{1 + \eta^2}{2} \lambda'(t)` they are :math:`a = c - f` of the state,
        :math:`b = -c\,\alpha` of the posterior mean and :math:`\eta\,g` of the noise.
        """
        rates = self.process.rates(1 - u)
        c = 0.5 * (1 + self.eta**2) * rates.log_snr
        a, b = c - rates.log_alpha, -c * rates.level.alpha
        noise = self.eta * rates.diffusion.sqrt()
        state, noise, data = (self._flat(v, u) for v in (a, noise, b))
        return Node(state, noise, data, rates.level)

    def drift(self, y: Tensor, node: Node) -> Tensor:
        """The drift a y + b x0_hat of rows y."""
        return self._drift_of(self.denoiser, y, node)

    def _prior_drift(self, t: Tensor, y: Tensor) -> Tensor:
        assert self.prior is not None
        return self._drift_of(self.prior, y, self._node(t, y))

    def _drift_of(self, denoiser: Denoiser, y: Tensor, node: Node) -> Tensor:
        assert node.data is not None and node.level is not None
        x = y.reshape(-1, *self.event_shape)
        estimate = denoiser(x, node.level, **self.context).mean.reshape(y.shape)
        return node.state * y + node.data * estimate


class KnownData(Denoiser):
    r"""The posterior of known data: a point mass at x_0.

    Under it the reverse SDE is the bridge, whose marginals are q(x_t | x_0).

    Args:
        process: the forward process.
        x0: the data, batch + event.

    Raises:
        ValueError: for another process, or data that are no state of it.
    """

    def __init__(self, process: ForwardProcess, x0: Tensor) -> None:
        super().__init__(process)
        require(process, Ability.SDE, argument="process")
        process.check_state("x0", x0)
        self.x0 = x0

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """A point mass at x_0, whatever the state."""
        check_expands("x0", self.x0, xt.shape)
        return self.process.point_mass(self.x0.expand(xt.shape))


def check_eta(eta: float) -> float:
    """Refuse anything but a number in [0, 1000].

    Raises:
        ValueError: naming what was found.
    """
    return check_number("eta", eta, at_least=0, at_most=1e3)
