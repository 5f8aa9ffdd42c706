r"""Conditioning as if p(x_0 | x_t) were a normal, of whatever covariance."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted, shift_mean
from pyro_diffusion.guidance.krylov import conjugate_gradients, gmres
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.guidance.proposal import Readings
from pyro_diffusion.guidance.relinearization import Solved, relinearized, remaining
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.base import check_likelihood
from pyro_diffusion.likelihoods.linearization import SLACK, solve
from pyro_diffusion.precision import matmul
from pyro_diffusion.processes import Ability
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_positive_int

__all__ = ["GaussianConditioning"]

KRYLOV: dict[str, Callable[..., Any]] = {
    "cg": functools.partial(conjugate_gradients, least=1 - SLACK),
    "gmres": gmres,
}
# Residuals in a row up to which S is formed by default: one product each. Eight products of GMRES through a
# trained network left the posterior of 64 readings what it was, at half the time.
MOST_DIRECT, MOST_DIRECT_THROUGH = 64, 32
# Iterations of a Krylov solver by default, and the residual that conjugate gradients may leave, in standard
# deviations of the noise: products through the denoiser cost a backward pass each, others next to nothing.
THROUGH, BESIDE = (8, 0.005), (128, 0.001)


class GaussianConditioning(GuidedDenoiser):
    r"""Guidance that takes p(x_0 | x_t) for a normal of the denoiser's mean and some covariance V.

    For observations whose log-density is :math:`-|r(x_0)|^2/2` plus a log-normalizer, as Normal ones have
    with the whitened residual :math:`r(x_0) = L^{-1}(y - f(x_0))` and others with deviance residuals
    (``likelihood.with_residuals("deviance")``), linearized at :math:`\hat x_0` with
    :math:`B = -\partial r/\partial x_0`,

    .. math::
        S &= I + B V B^T, \qquad E[x_0 | x_t, y] \approx \hat x_0 + G B^T S^{-1} r, \\
        \log p(y | x_t) &\approx -\tfrac12 r^T S^{-1} r - \tfrac12 \log\det S + \text{log-normalizer}.

    G is V, except for PiGDM. The methods are choices of V and G; with
    :math:`J = \partial\hat x_0/\partial x_t`, :math:`(\sigma^2/\alpha) J` is the covariance of
    :math:`p(x_0|x_t)` itself for the exact denoiser:

    ================  ====================================  ==========================  ===================
    method            V                                     G                           exact for
    ================  ====================================  ==========================  ===================
    ``PiGDM``         the denoiser's variance               :math:`(\sigma^2/\alpha)J`  independent normals
    ``MMPS``          :math:`(\sigma^2/\alpha)J`            V                           normals
    ``TMPD``          MMPS's, S the diagonal of row sums    V                           diagonal S
    ``DiffPIR``       :math:`\sigma^2/(\alpha^2\lambda)`    V                           -
    ================  ====================================  ==========================  ===================

    Exact is meant for linear observations and the denoiser's exact mean; else approximate. Of the denoiser's
    variance a posterior keeps, coordinate by coordinate, the share that observations leave,
    :math:`1 - (V B^T S^{-1} B V)_{ii} / V_{ii}`, where S is formed (else, with a full gradient and under
    ``TMPD``, all of it; particles find a covariance for themselves, so :meth:`twisted` keeps all of it).
    Where scales differ by coordinate :math:`\sigma^2/\alpha` is a diagonal matrix D and the covariance is
    :math:`D J^T`, symmetric for the exact denoiser.

    Observations that are not linear in x_0 (clipped, magnitudes, counts) are linearized again: first averaged
    over the uncertainty about x_0, so that a derivative which is zero or wrong at :math:`\hat x_0` itself
    does not decide, then at the shifted mean. Whether they are linear is asked at each state, by one more run
    of the program. The denoiser is evaluated once.

    ``solver="direct"`` forms S: m backward passes through the program (and, for MMPS, as many through the
    denoiser), and eigenvalues of S are kept at 1 or more, where they are for an exact denoiser. ``"cg"`` and
    ``"gmres"`` take products with S instead. By default conjugate gradients go on until the residual of the
    system is small beside the noise, root mean square over a row: a thousandth of it, or 128 products, where
    V does not go through the denoiser; five thousandths, or 8 products, where it does. There
    they want a symmetric derivative, and may diverge for a trained network's; gmres, of 8 products, does not.
    log det S wants S itself, so :meth:`twisted` is always direct.

    :math:`(\sigma^2/\alpha) J` of a network is no covariance: it is neither symmetric nor positive. Where
    :math:`B V B^T` is negative the shift has no part (``cg`` stops there), and where
    :math:`|B V B^T S^{-1} r| > |r|`, which no covariance allows, the shift is shortened to that length. For
    exact denoisers nothing of this acts.

    The shift above takes S for a constant of x_t, as the papers do. For a prior of many modes S changes with
    x_t, and ``full_gradient=True`` follows the whole log-twist,
    :math:`(\sigma^2/\alpha) \nabla_{x_t} \log p(y|x_t)`, at about twice the cost. What that adds is
    cut, datum by datum, at the length of the papers' shift and that of the noise,
    :math:`\sqrt{\textstyle\sum_i \sigma_i^2/\alpha_i^2}`, together:
    between far modes the gradient of S can be steeper than any step.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula.
        likelihood: a :class:`~pyro_diffusion.likelihoods.Likelihood` with residuals: Normal sites have
            them, other distributions deviance residuals.
        solver: ``"direct"``, ``"cg"`` or ``"gmres"``; by default, where V goes through the denoiser, direct
            up to 32 residuals in a row, else gmres; where it does not, direct up to 64, else cg.
        iterations: of a Krylov solver, so many; None for the rule above.
        full_gradient: whether the shift follows the whole log-twist (always direct, linearized once).
        relinearizations: of observations that are not linear, 0 for none.

    Raises:
        ValueError: for a process without Tweedie's formula, an unknown solver, iterations < 1 or
            relinearizations < 0, or a full gradient with a Krylov solver; when called, for observations that
            have neither residuals of the likelihood's kind nor a gradient.
    """

    needs = (Ability.NUMBERS, Ability.TWEEDIE)
    through = True  # whether the method asks for J

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        *,
        solver: str | None = None,
        iterations: int | None = None,
        full_gradient: bool = False,
        relinearizations: int = 2,
    ) -> None:
        super().__init__(denoiser)
        self.likelihood = check_likelihood(likelihood)
        self.likelihood.check_gradient()
        if solver not in (None, "direct", *KRYLOV):
            raise ValueError(f"solver: got {solver!r}, expected 'direct', 'cg' or 'gmres'")
        if full_gradient and (solver in KRYLOV or not self.through):
            raise ValueError(
                f"full_gradient: got True for {type(self).__name__}, solver={solver!r}, expected a method "
                "through the denoiser and solver='direct'"
            )
        if iterations is not None:
            check_positive_int("iterations", iterations)
        self.solver, self.iterations = solver, iterations
        self.full_gradient = bool(full_gradient)
        self.relinearizations = check_positive_int("relinearizations", relinearizations, at_least=0)

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """V v in data space; of further dimensions on the left, unless V goes through the denoiser."""
        raise NotImplementedError

    def multiplies_by_jacobian(self, at: LinearizedDenoiser) -> bool:
        """Whether products with V are backward passes through the denoiser."""
        return at.through

    def solver_at(self, at: LinearizedDenoiser) -> str:
        """The solver asked for, or that of so many residuals and such a V."""
        if self.solver is not None:
            return self.solver
        through = self.multiplies_by_jacobian(at)
        if at.size <= (MOST_DIRECT_THROUGH if through else MOST_DIRECT):
            return "direct"
        return "gmres" if through else "cg"

    def variances(self, at: LinearizedDenoiser, level: Level) -> Tensor | None:
        """About the diagonal of V, data space or what broadcasts to it; None where it is not known.

        Observations that are not linear are averaged over it. By default the denoiser's own variance.
        """
        return at.variance

    def shift(self, at: LinearizedDenoiser, level: Level, solved: Solved) -> Tensor:
        """G B^T S^{-1} r in data space: how far the posterior's mean is from the prior's."""
        return solved.image

    def posterior(self, at: LinearizedDenoiser, level: Level, solved: Solved) -> TorchDistribution:
        """The denoiser's posterior with its mean shifted."""
        return shift_mean(at.prior, self.shift(at, level, solved))

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and log-twist at x_t, detached (one network evaluation; S is formed)."""
        at, level = self._linearized(xt, t, context)
        if self.full_gradient:
            return self._full(at, level)
        solved = self._solved(at, level, "direct")
        assert solved.log_evidence is not None
        with torch.no_grad():
            posterior = self.posterior(at, level, solved)
            return Twisted(at.prior, posterior, solved.log_evidence, solved.readings)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0 given x_t and y, batch and event shape of xt, detached.

        Its variance is what observations leave; under :meth:`twisted` particles find that from the readings.
        """
        if self.full_gradient:
            return self.twisted(xt, t, **context).posterior
        at, level = self._linearized(xt, t, context)
        solved = self._solved(at, level, self.solver_at(at))
        with torch.no_grad():
            variance = self.variances(at, level)
            share = None if variance is None else remaining(variance, solved, at)
            posterior = self.posterior(at, level, solved)
            return posterior if share is None else shift_mean(posterior, 0.0, share)

    def _solved(self, at: LinearizedDenoiser, level: Level, solver: str) -> Solved:
        """The system solved, and solved again for observations that are not linear."""
        return relinearized(
            at,
            self.likelihood.whitened,
            lambda now: self._once(now, level, solver),
            self.variances(at, level),
            self.relinearizations,
            self.process.event_dim,
        )

    def _once(self, at: LinearizedDenoiser, level: Level, solver: str) -> Solved:
        return self._direct(at, level) if solver == "direct" else self._iterated(at, level, solver)

    def _full(self, at: LinearizedDenoiser, level: Level) -> Twisted:
        """The shift by the whole gradient; what it adds to the papers' is limited row by row."""
        with torch.enable_grad():
            solved = self._direct(at, level)
        log_twist = solved.log_evidence
        assert log_twist is not None
        partial = self.shift(at, level, solved).detach()
        shift = level.tweedie * at.score(log_twist)
        with torch.no_grad():
            added, kept = (at.per_row(v) for v in (shift - partial, partial))
            noise = level.noise_to_signal.square().expand_as(shift)
            limit = kept.norm(dim=-1) + at.per_row(noise).sum(-1).sqrt()
            factor = (limit / added.norm(dim=-1).clamp(min=torch.finfo(added.dtype).tiny)).clamp(
                max=1
            )
            limited = (factor.unsqueeze(-1) * added).reshape(shift.shape)
            return Twisted(at.prior, shift_mean(at.prior, partial + limited), log_twist.detach())

    def _linearized(
        self, xt: Tensor, t: Tensor | Level, context: dict[str, Tensor]
    ) -> tuple[LinearizedDenoiser, Level]:
        level = self.process.level(t, xt, state="xt")
        at = LinearizedDenoiser(
            self.denoiser,
            self.likelihood,
            xt,
            level,
            context,
            through=self.through,
            graph=self.full_gradient,
        )
        return at, level

    def _direct(self, at: LinearizedDenoiser, level: Level) -> Solved:
        """The system formed and solved."""
        rows = at.rows()
        if self.multiplies_by_jacobian(at):
            images = torch.stack([self.covariance(at, level, row) for row in rows])
        else:
            images = self.covariance(at, level, rows)
        readings = Readings.of(at.residual, at.flat(rows), at.flat(images))
        u, log_evidence = solve(readings.gap, at.residual)
        pushed = matmul(u.unsqueeze(-2), readings.gap).squeeze(-2)
        image = self._within(at, at.combined(images, u), pushed)
        return Solved(at.combined(rows, u), image, readings, log_evidence + at.log_normalizer)

    def _iterated(self, at: LinearizedDenoiser, level: Level, solver: str) -> Solved:
        def apply(p: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            pulled = at.pull(p)
            image = self.covariance(at, level, pulled)
            pushed, lead = at.push(image), p.shape[:-1]
            return p + pushed, (pulled.reshape(*lead, -1), image.reshape(*lead, -1), pushed)

        options: dict[str, Any] = {}
        iterations = self.iterations
        if iterations is None:
            beside = solver == "cg" and not self.multiplies_by_jacobian(at)
            iterations, tolerance = BESIDE if beside else THROUGH
            if solver == "cg":
                options["tolerance"] = tolerance
        pulled, image, pushed = KRYLOV[solver](apply, at.residual, iterations, **options).images
        image = image.reshape(at.mean.shape)
        return Solved(pulled.reshape(at.mean.shape), self._within(at, image, pushed))

    def _within(self, at: LinearizedDenoiser, image: Tensor, pushed: Tensor) -> Tensor:
        """V B^T S^{-1} r cut, row by row, where its part in residual space is longer than r itself.

        For a covariance V that part is :math:`BVB^T (I + BVB^T)^{-1} r`, which is never longer.
        """
        if not at.through:
            return image
        length, most = (v.detach().norm(dim=-1) for v in (pushed, at.residual))
        factor = torch.where(length > (1 + SLACK) * most, most / length, 1.0)
        return (at.per_row(image) * factor.unsqueeze(-1)).reshape(image.shape)
