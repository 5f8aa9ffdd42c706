"""The continuous-time diffusion as a Pyro distribution over data."""

from typing import ClassVar

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.continuous import ContinuousDistribution
from pyro_diffusion.distributions.decoders import Decoder
from pyro_diffusion.distributions.shape_runs import shapes_only
from pyro_diffusion.dynamics import ReverseSDE, SDESolver
from pyro_diffusion.dynamics.sde import check_eta
from pyro_diffusion.dynamics.sde_solver import check_sde_solver
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.levels import Rates
from pyro_diffusion.validation import Shape

__all__ = ["DiffusionSDE"]


class DiffusionSDE(ContinuousDistribution):
    r"""A diffusion model in continuous time, the limit of :class:`Diffusion` for many steps.

    .. math::
        -\log p(x) \le KL(q(x_{t_1} | x) \| p(x_{t_1})) + \mathbb E_q[-\log p(x | x_{t_0})]
        + \tfrac12 \int_0^1 (-\lambda'(t))\, e^{\lambda(t)}\,
        \mathbb E_q \|x_0 - \hat x_0(x_t)\|^2\, dt .

    ``log_prob`` is an *unbiased estimate of this bound* from one network evaluation per datum, at
    low-discrepancy times; its randomness is drawn once per instance, as in :class:`Diffusion`. There are no
    steps in it and only the posterior's mean matters (but for the decoder). It depends on the schedule
    through its two ends alone (where a process has ``scales`` of its own, as long as these depend on the
    level through its clock). Parameters of the schedule therefore get another gradient: that of the
    squared diffusion term, whose expectation they can change, so that they learn to lower its variance. (Ends
    that were parameters would get the wrong gradient; :class:`~pyro_diffusion.schedules.LearnedSchedule`
    fixes them.)

    Parameters of a process's own ``scales`` keep the bound's gradient: where noise differs by coordinate, the
    diffusion term of an inexact denoiser depends on them.

    What would exponentiate the estimate is refused, as :class:`Diffusion` has it.

    :meth:`sample` integrates the reverse SDE with torchsde and decodes; an approximation that gets better
    with steps. It is not reparameterized. The bound is on the distribution of the SDE with ``eta=1``: with an
    inexact denoiser, draws of another eta have another distribution.

    The network is trained only if Pyro sees it, as with any view: ``pyro.module("denoiser", denoiser)``.

    Args:
        denoiser: posterior p(x_0 | x_t) of a Gaussian process.
        event_shape: shape of one datum; its length is the process's ``event_dim``.
        solver: :class:`~pyro_diffusion.dynamics.SDESolver` that :meth:`sample` takes: method and number of
            even steps in t, or tolerances; by default 1000 steps of ``"euler"``.
        eta: share of noise of the reverse SDE, from 0 to 1000; 0 is the probability-flow ODE.
        decoder: p(x | x_{t_0}); normal by default.
        context: tensors for the denoiser; their batch shapes broadcast into this distribution's.
        validate_args: whether to check arguments and values; Pyro's global setting by default.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:
        >>> from pyro_diffusion.denoisers import GaussianDenoiser
        >>> from pyro_diffusion.nn import MLP
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import SubVP
        >>> denoiser = GaussianDenoiser(MLP(2), GaussianProcess(SubVP()))
        >>> diffusion = DiffusionSDE(denoiser, (2,), solver=SDESolver("heun", steps=20))
        >>> diffusion.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
        >>> diffusion.sample((3,)).shape
        torch.Size([3, 2])

    References:
        Kingma et al., arXiv 2107.00630, equations 11 to 13 and appendix I; Song et al., arXiv 2011.13456.
    """

    _arguments: ClassVar[tuple[str, ...]] = ("solver", "eta", "decoder", "context")
    _shown: ClassVar[tuple[str, ...]] = ("solver", "eta")
    _needs = Ability.SDE

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Shape,
        *,
        solver: SDESolver | None = None,
        eta: float = 1.0,
        decoder: Decoder | None = None,
        context: dict[str, Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.solver = SDESolver() if solver is None else check_sde_solver(solver)
        self.eta = check_eta(eta)
        super().__init__(
            denoiser, event_shape, decoder=decoder, context=context, validate_args=validate_args
        )

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Data from the model, sample + batch + event, through torchsde and the decoder."""
        if shapes_only():
            return self._example(sample_shape)
        with torch.no_grad():
            x = self._prior_draw(sample_shape)
            batch = x.shape[: x.dim() - len(self.event_shape)]
            count = batch.numel()
            context = {
                name: value.reshape(count, *value.shape[len(batch) :])
                for name, value in self.with_context(x)[1].items()
            }
            sde = ReverseSDE(self.denoiser, self.event_shape, self.eta, context=context)
            return self._decoded(self.solver(sde, x.reshape(count, -1)).reshape(x.shape))

    def _rates(self, t: Tensor) -> tuple[Rates, "_SquaredTermGradient"]:
        gradient = _SquaredTermGradient()
        return self.denoiser.process.rates(t, gradient), gradient


class _SquaredTermGradient:
    r"""Multiplies the gradients of a schedule's rates by a factor that is known later.

    With the factor :math:`2L` this makes :math:`\nabla L^2` of what would be :math:`\nabla L`.

    Attributes:
        factor: to be set before the backward pass, batch + singleton event dimensions.
    """

    factor: Tensor

    def __call__(self, rates: Rates) -> Rates:
        """The same rates, whose gradients are multiplied."""
        if not (rates.log_snr.requires_grad and torch.is_grad_enabled()):
            return rates
        slope = self._scaled(rates.log_snr)
        return Rates(rates.level.map(self._scaled), slope, slope, self._scaled(rates.log_alpha))

    def _scaled(self, x: Tensor) -> Tensor:
        # An alias of its own: what one of the outputs was computed from another is scaled once.
        alias = x.view_as(x)
        if alias.requires_grad:
            alias.register_hook(lambda gradient: gradient * self.factor)
        return alias
