r"""Guidance by the likelihood of the posterior mean: diffusion posterior sampling."""

import math

import pyro
import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted, shift_mean
from pyro_diffusion.guidance.linearized_denoiser import detached
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.base import check_likelihood
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_number, check_tensor

__all__ = ["DPSStep", "PlugIn"]

# What the line search tries. A parabola through the best reaches those in between.
SHARES = tuple(4.0**-j for j in range(16))


class DPSStep:
    r"""The step-size rule of DPS: after a step from t to s, :math:`x_s \leftarrow x_s - \zeta_t \nabla E`.

    .. math:: \zeta_t = \zeta / \sqrt{E}, \qquad E = |r(\hat x_0(x_t))|^2, \qquad \nabla = \nabla_{x_t},

    one E for every datum. r is the whitened residual: for noise of one standard deviation
    :math:`\sigma_y` the paper's own :math:`\zeta` is this one divided by :math:`\sigma_y`. The rule is that
    of a *step*, so the grid is part of it: the bridge gives :math:`x_0` a weight k, and the mean is
    shifted by :math:`-\zeta_t \nabla E / k`. No shift at the grid's first time, from which no step is taken.

    Args:
        zeta: :math:`\zeta`, > 0; the paper uses 0.1 to 1 of its own.
        times: the sampler's grid, K + 1 increasing times.
        eta: of the sampler's bridges: 1 for ``Ancestral()``, 0 for deterministic samplers.
        squared_norm: if False, E is :math:`-\log p(y | \hat x_0)`, for observations that are not Normal, and
            at least 1 under the root.

    Raises:
        ValueError: if zeta is not positive, there are fewer than two times, or eta lies outside [0, 1].

    References:
        Chung et al., arXiv 2209.14687, algorithm 1.
    """

    def __init__(
        self, zeta: float, times: Tensor, *, eta: float = 1.0, squared_norm: bool = True
    ) -> None:
        check_number("zeta", zeta, above=0)
        if check_tensor("times", times).dim() != 1 or len(times) < 2:
            raise ValueError(f"times: got {times!r}, expected a vector of two or more times")
        if not bool((times.diff() > 0).all()):
            raise ValueError("times: got times that do not increase, expected the sampler's grid")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
        self.zeta, self.times, self.eta = float(zeta), times, float(eta)
        self.squared_norm = bool(squared_norm)

    def shares(self, process: ForwardProcess, level: Level) -> Tensor:
        """1 / k of the step that starts at each level, times + event; 0 at the grid's first time."""
        grid = process.levels(self.times, level.t.dtype, level.t.device)
        late, early = grid.at(slice(1, None)), grid.at(slice(-1))
        weight = process.coefficients(early, late, self.eta).x0
        shares = torch.cat([torch.zeros_like(weight[:1]), 1 / weight])
        t, middle = level.t, ((grid.t[1:] + grid.t[:-1]) / 2).flatten()
        if t.dim():  # without its singletons for events, which the table's rows have
            t = t.reshape(t.shape[: t.dim() - process.event_dim])
        # The nearest time of the grid: rounding must not choose another step.
        return shares[torch.bucketize(t.contiguous(), middle)]

    def energy(
        self, likelihood: Likelihood, x0: Tensor, log_prob: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """E of every row, and what its gradient is multiplied by: zeta / root of E."""
        if self.squared_norm:
            energy = likelihood.residual(x0).square().sum(-1)
            floor = torch.finfo(energy.dtype).tiny
        else:
            energy = -(likelihood.log_prob(x0) if log_prob is None else log_prob)
            floor = 1.0
        return energy, self.zeta * energy.detach().clamp(min=floor).rsqrt()


class PlugIn(GuidedDenoiser):
    r"""Plug-in guidance: p(y | x_t) is taken for :math:`p(y | \hat x_0(x_t))`, for any likelihood.

    .. math:: E[x_0 | x_t, y] \approx \hat x_0
              + \frac{\sigma^2}{\alpha} \nabla_{x_t} \log p(y | \hat x_0(x_t)),

    the exact gradient of that likelihood, one backward pass through program and denoiser. The uncertainty
    about x_0 is left out of it, so where the observation is more precise than :math:`\hat x_0` the shift d
    overshoots, by factors of thousands at the noise end. Hence the line search: the shift is s d with

    .. math:: s = \arg\max_{0 \le s \le 1} \log p(y | \hat x_0 + s d) - \frac{s^2}{2} q, \qquad
              q = d^T \nabla_{\hat x_0} \log p(y | \hat x_0),

    the posterior's mode on that line: q is :math:`d^T V^{-1} d` for the covariance
    :math:`V = (\sigma^2/\alpha)\, \partial \hat x_0 / \partial x_t` of p(x_0 | x_t), since
    :math:`d = V \nabla`. So no shift makes the observations less likely, and none is taken where V is
    negative along it, as derivatives of networks are at high noise. Exact for a normal prior and one linear
    normal observation (or a :math:`B V B^T` proportional to the identity), one step of conjugate gradients
    for several; where observations say little s = 1. It takes 16 runs of the program in one batch, and one
    more that refines the best by a parabola. :class:`DPSStep` is the paper's own remedy.

    The posterior keeps the denoiser's variance; the log-twist is :math:`\log p(y|\hat x_0)`, whatever the
    scale or step.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula.
        likelihood: any differentiable :class:`~pyro_diffusion.likelihoods.Likelihood`.
        scale: factor of the shift.
        step_size: a :class:`DPSStep` in place of the gradient's own size and the line search.
        line_search: False for the gradient's own size, which may explode.

    Raises:
        ValueError: for a process without Tweedie's formula, a likelihood without a gradient, a scale that is
            not positive, another step size, or one with eta below 1 under a process without free variance.

    References:
        Chung et al., arXiv 2209.14687.
    """

    needs = (Ability.NUMBERS, Ability.TWEEDIE)

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        *,
        scale: float = 1.0,
        step_size: DPSStep | None = None,
        line_search: bool = True,
    ) -> None:
        super().__init__(denoiser)
        self.likelihood = check_likelihood(likelihood)
        self.likelihood.check_gradient()
        check_number("scale", scale, above=0)
        if not (step_size is None or isinstance(step_size, DPSStep)):
            raise ValueError(f"step_size: got {step_size!r}, expected DPSStep(zeta, times)")
        if step_size is not None and step_size.eta != 1:
            require(
                self.process,
                Ability.FREE_VARIANCE,
                argument="step_size",
                by=f"DPSStep(eta={step_size.eta:g})",
                instead="eta=1",
            )
        self.scale, self.step_size = float(scale), step_size
        self.line_search = bool(line_search)

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and log-twist at x_t, detached (one network evaluation)."""
        level = self.process.level(t, xt, state="xt")
        with torch.enable_grad():
            state = xt.detach().requires_grad_()
            prior = self.denoiser(state, level, **context)
            log_twist = self.likelihood.log_prob(prior.mean)
            if self.step_size is None:
                # Rows are independent: the gradient of their sum is that of each.
                to = (state, prior.mean) if self.line_search else (state,)
                gradient, *slope = torch.autograd.grad(log_twist.sum(), to)
                factor = self.scale * level.tweedie
                if self.line_search:
                    shift = (level.tweedie * gradient).detach()
                    share = self._share(prior.mean.detach(), shift, slope[0], log_twist.detach())
                    factor = factor * share
            else:
                energy, zeta = self.step_size.energy(self.likelihood, prior.mean, log_twist)
                (gradient,) = torch.autograd.grad(-(zeta * energy).sum(), state)
                (share,) = level.tabulate(self._shares)
                factor = self.scale * share
        prior = detached(prior)
        return Twisted(prior, shift_mean(prior, factor * gradient), log_twist.detach())

    def _share(self, x0: Tensor, shift: Tensor, slope: Tensor, log_prob: Tensor) -> Tensor:
        """s of the line search, batch + singletons for events (or what broadcasts to it)."""
        event = self.process.event_dim
        q = (shift * slope).flatten(-event).sum(-1) if event else shift * slope
        joint = [i for i, n in enumerate(log_prob.shape) if n != q.shape[i]]
        q = q.sum(joint, keepdim=True) if joint else q

        def rise(s: Tensor) -> Tensor:
            """The gain of each share, s of the shape of q with trials in front."""
            with torch.no_grad(), pyro.validation_enabled(False):
                found = self.likelihood.log_prob(x0 + s.reshape(s.shape + (1,) * event) * shift)
            gain = found - log_prob - s.square() * q / 2
            return gain.nan_to_num(-math.inf, math.inf, -math.inf)

        trial = torch.tensor(SHARES, dtype=x0.dtype, device=x0.device)
        gain, best = rise(trial.reshape(-1, *(1,) * q.dim())).max(0)
        s = trial.flatten()[best]
        # The top of the parabola through 0, of slope q there, and the best trial. Of a true parabola it lies
        # at 5/8 to 5/2 of the best of trials that are a factor of 4 apart.
        bend = 2 * (q * s - gain)
        top = torch.where(bend > 0, q * s.square() / bend, s)
        top = torch.minimum(torch.maximum(top, s / 2), 2.5 * s).clamp(max=1)
        top = torch.where(rise(top.unsqueeze(0)).squeeze(0) > gain, top, s)
        share = torch.where((gain > 0) & (q > 0), top, 0.0)
        return share.to(x0.dtype).reshape(share.shape + (1,) * event)

    def _shares(self, level: Level) -> tuple[Tensor]:
        """1 / k of the step that starts at each level, none at the grid's first time."""
        rule = self.step_size
        return (torch.ones_like(level.t) if rule is None else rule.shares(self.process, level),)
