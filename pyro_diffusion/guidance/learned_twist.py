"""Guidance by a twist that was learned: shifts and kernels by the derivatives of a small network."""

import contextlib
from typing import TYPE_CHECKING

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.distributions.base import dtype_and_device
from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted, shift_mean
from pyro_diffusion.guidance.proposal import Readings, conditioned, told_at_last
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.precision import matmul
from pyro_diffusion.processes import Ability
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

if TYPE_CHECKING:
    from pyro_diffusion.guidance.amortized_twist import AmortizedTwist

__all__ = ["LearnedTwist"]

LEAST_SHARE = 0.01  # of the denoiser's variance


class LearnedTwist(GuidedDenoiser):
    r"""Guidance by :class:`~pyro_diffusion.guidance.AmortizedTwist`, which makes it.

    With :math:`G = \partial m / \partial x_t` the posterior's mean and variance are, by Tweedie's formulas of
    first and second order,

    .. math:: \hat x_0 + \frac{\sigma^2}{\alpha} \nabla \log \psi_t, \qquad
              v - \Big(\frac{\sigma^2}{\alpha}\Big)^2 \text{diag}(G^T S^{-1} G),

    exact if :math:`\psi_t` is p(y | x_t) and its covariance the same everywhere; at least a hundredth of the
    denoiser's variance v is left. One evaluation of the denoiser without a graph; the network has one pass
    back, m more for the variance.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior.
        likelihood: of the program at the data asked about.
        twist: trained.
        observations: y, batch + (m,).
    """

    needs = (Ability.NUMBERS, Ability.TWEEDIE)
    observations: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        twist: "AmortizedTwist",
        observations: Tensor,
    ) -> None:
        super().__init__(denoiser)
        self.twist = twist
        self.likelihood = _with_residuals(denoiser, likelihood)
        self.register_buffer("observations", observations)

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior (of the prior's variance) and log-twist at x_t, detached."""
        level = self.process.level(t, xt, state="xt")
        with torch.no_grad():
            prior = self.denoiser(xt, level, **context)
        with torch.enable_grad():
            x = xt.detach().requires_grad_()
            value = self.twist.log_prob(*self._rows(x, level))
            (slope,) = torch.autograd.grad(value.sum(), x)
        batch = xt.shape[: xt.dim() - self.process.event_dim]
        posterior = shift_mean(prior, level.tweedie * slope)
        return Twisted(prior, posterior, value.detach().reshape(batch))

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0 given x_t and y, batch and event shape of xt."""
        level = self.process.level(t, xt, state="xt")
        with torch.no_grad():
            prior = self.denoiser(xt, level, **context)
        slope, half = self._derivatives(xt, level)
        told = level.tweedie.square() * half.square().sum(-2).reshape(xt.shape)
        share = (1 - told / prior.variance).clamp(LEAST_SHARE, 1)
        return shift_mean(prior, level.tweedie * slope.reshape(xt.shape), share)

    def follow(self, kernel: TorchDistribution, level: Level | None) -> TorchDistribution | None:
        r"""The kernel to x_s times :math:`\psi_s`, linearized at the kernel's mean a.

        .. math:: \mathcal N\big(a + \Sigma\, \nabla \log \psi_s(a),\; \Sigma\big), \qquad
                  \Sigma = (Q^{-1} + G^T S^{-1} G)^{-1} .

        At the data, the kernel times the likelihood.
        """
        base = per_coordinate(kernel)
        if not isinstance(base, Normal):
            return None
        if level is None:
            return self._at_last(kernel)
        scale = base.scale.expand(base.loc.shape)
        slope, half = self._derivatives(base.loc, level)
        q = scale.reshape(slope.shape).double()
        half, slope = half.double() * q.unsqueeze(-2), slope.double() * q
        eye = torch.eye(half.shape[-2], dtype=half.dtype, device=half.device)
        root = torch.linalg.cholesky(eye + matmul(half, half.mT))
        told = torch.cholesky_solve(matmul(half, slope.unsqueeze(-1)), root)
        shift = q * (slope - matmul(half.mT, told).squeeze(-1))
        loc = base.loc + shift.reshape(base.loc.shape).to(base.loc)
        return conditioned(kernel, loc, half.reshape(*kernel.batch_shape, *half.shape[-2:]))

    def _derivatives(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        r"""The gradient of the log-twist and :math:`S^{-1/2} G`, (N, n) and (N, m, n), detached."""
        with torch.enable_grad():
            state, level, y = self._rows(x.detach(), level)
            state = state.requires_grad_()
            mean, root = self.twist.moments(state, level)
            value = self.twist.log_density(mean, root, y).sum()
            (slope,) = torch.autograd.grad(value, state, retain_graph=True)
            eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
            basis = eye.unsqueeze(1).expand(-1, *mean.shape)
            (rows,) = torch.autograd.grad(mean, state, basis, is_grads_batched=True)
        half = torch.linalg.solve_triangular(root.detach(), rows.movedim(0, -2), upper=False)
        return slope, half

    def _rows(self, x: Tensor, level: Level) -> tuple[Tensor, Level, Tensor]:
        """States and observations as rows, (N, n) and (N, m)."""
        event_dim = self.process.event_dim
        batch = x.shape[: x.dim() - event_dim]
        if level.alpha.numel() > 1:
            level = level.map(lambda v: v.reshape(v.shape[: v.dim() - event_dim]).expand(batch))
        y = self.observations.to(x)
        y = y.expand(*batch, y.shape[-1]).reshape(-1, y.shape[-1])
        return x.reshape(len(y), -1), level, y

    def _at_last(self, kernel: TorchDistribution) -> TorchDistribution | None:
        if self.likelihood is None:
            return None
        at = self.likelihood.linearized(per_coordinate(kernel).loc)
        rows = at.flat(at.rows())
        readings = Readings.of(at.residual, rows, rows)
        return told_at_last(kernel, readings) if readings.fit(kernel) else None


def _with_residuals(denoiser: Denoiser, likelihood: Likelihood) -> Likelihood | None:
    """The likelihood with residuals of one kind or the other, or None."""
    if not likelihood.differentiable:
        return None
    dtype, device = dtype_and_device(denoiser)
    trial = torch.zeros(likelihood.batch_shape + likelihood.event_shape, dtype=dtype, device=device)
    for kind in (likelihood, likelihood.with_residuals("deviance")):
        with contextlib.suppress(ValueError):
            kind.residual(trial)
            return kind
    return None
