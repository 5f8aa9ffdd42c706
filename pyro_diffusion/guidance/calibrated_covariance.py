"""Gaussian conditioning by the denoiser's derivative where it is a covariance, else by an estimate."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.calibration import Calibration, calibrated
from pyro_diffusion.guidance.gaussian_conditioning import GaussianConditioning
from pyro_diffusion.guidance.kept import weight_sums
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.guidance.relinearization import Solved
from pyro_diffusion.guidance.secant import Secant, Settings, gains
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.schedules import Level

__all__ = ["CalibratedCovariance"]


class CalibratedCovariance(GaussianConditioning):
    r"""MMPS where the denoiser's derivative is a covariance; elsewhere an estimate that is one.

    .. math:: V = \frac{\sigma^2}{\alpha} J \quad\text{or}\quad
              V_0 = g \Big(C^{-1} + \frac{\alpha^2}{\sigma^2}\Big)^{-1} g, \quad
              V_0 z \to w \frac{\sigma^2}{\alpha} J z + (1 - w) V_0 z, \qquad \text{shift} = V B^T S^{-1} r .

    A trained network may be accurate in its mean and far off in its derivative, which is multiplied by
    :math:`\sigma^2/\alpha`, near a hundred where x_t is noise. So the denoiser is asked once, on 256 draws of
    its own chain and whatever the observations: at each of 16 noise levels, does V agree with the mean
    squared error of :math:`\hat x_0`, and is it symmetric and positive? C is the covariance of these draws.
    An exact denoiser passes at all levels, and this is :class:`~pyro_diffusion.guidance.MMPS`, unless its
    data have far clusters so rare (a few per cent) that the draws at a level may miss them.

    Where it fails, V is the linear estimate's covariance, always positive. Its variances are scaled by g to
    the realized error and, by a power p, to the denoiser's own variance at x_t (a variance head). In the one
    direction z that the residual asks for, :math:`B^T S^{-1} r` under :math:`V_0`, it is updated by a secant
    to a share w of the derivative, one backward pass. Shares and powers are those with which draws of the
    chain are best predicted from x_t and trial observations of them, none where nothing is better beyond
    its error.

    The first evaluation makes this calibration, of about 20 000 evaluations of the denoiser for a datum: as
    many as 310 draws of 64 steps. It is kept until the denoiser's parameters change (a
    change of their ``data`` counts from the next construction), and leaves the seeds of
    the run alone. With labels as context (integers) each label has its own. With real numbers as context
    nothing is calibrated, and V is :math:`\sigma^2/\alpha^2`, as in
    :class:`~pyro_diffusion.guidance.DiffPIR`.

    Other arguments, errors and log-twist: ``GaussianConditioning``; without ``full_gradient``.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula.
        likelihood: as there.
        options: ``solver`` and ``iterations``.

    References:
        Rozet et al., arXiv 2405.13712, section 4, for both covariances; Nocedal & Wright, Numerical
        optimization, chapter 6, for the update.
    """

    through = False  # not at every level

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood, **options: Any) -> None:
        super().__init__(denoiser, likelihood, **options)
        self._sums = weight_sums(denoiser)

    def _linearized(
        self, xt: Tensor, t: Tensor | Level, context: dict[str, Tensor]
    ) -> tuple[LinearizedDenoiser, Level]:
        level = self.process.level(t, xt, state="xt")
        parts = [
            Part(rows, known, known is not None and known.trusts(level), known and known.at(level))
            for rows, known in self._calibrations(xt, context)
        ]
        return Chosen(self.denoiser, self.likelihood, xt, level, context, parts), level

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """Through the denoiser where it is trusted, elsewhere the estimate with its secant."""
        assert isinstance(at, Chosen)
        result = self._base(at, level, v)
        if at.secant is not None:
            result = at.secant.times(v, result, self.process.event_dim)
        if not any(part.trusted is not False for part in at.parts):
            return result
        network = level.tweedie * at.back(v)
        for rows, _, trusted, _ in at.parts:
            part = network if trusted is True else result
            if trusted is not True and trusted is not False:
                part = torch.where(trusted, network, result)
            result = part if rows is None else torch.where(rows, part, result)
        return result

    def multiplies_by_jacobian(self, at: LinearizedDenoiser) -> bool:
        """Where the derivative is trusted; the secant is one product."""
        return isinstance(at, Chosen) and any(part.trusted is not False for part in at.parts)

    def variances(self, at: LinearizedDenoiser, level: Level) -> Tensor:
        """The denoiser's own where its derivative is trusted, as in MMPS, elsewhere those of the estimate."""
        assert isinstance(at, Chosen)
        k = self.process.event_dim
        event = at.mean.shape[at.mean.dim() - k :]
        result: Tensor | None = None
        for rows, calibration, trusted, settings in at.parts:
            if calibration is None or settings is None:
                part = level.noise_to_signal.square()
            else:
                diagonal = calibration.estimate.diagonal(level, event, at.keeper)
                g = gains(diagonal, at.variance, settings.head, settings.scale)
                part = g * diagonal * g
            if at.variance is not None and trusted is not False:
                part = torch.where(torch.as_tensor(trusted, device=part.device), at.variance, part)
            result = part if result is None or rows is None else torch.where(rows, part, result)
        assert result is not None
        return result

    def _solved(self, at: LinearizedDenoiser, level: Level, solver: str) -> Solved:
        assert isinstance(at, Chosen)
        shares = self._shares(at)
        if shares is not None:
            z = self._once(at, level, solver).pulled
            image, base = level.tweedie * at.back(z), self._base(at, level, z)
            at.secant = Secant.of(z, base, image, shares, self.process.event_dim)
        return super()._solved(at, level, solver)

    def _shares(self, at: "Chosen") -> Tensor | float | None:
        """Of the derivative in the direction of the residual; None for none at all."""
        if not any(part.shared for part in at.parts):
            return None
        result: Tensor | float = 0.0
        for part in at.parts:
            share = part.settings.share if part.shared and part.settings else 0.0
            result = share if part.rows is None else torch.where(part.rows, share, result)
        return result

    def _base(self, at: "Chosen", level: Level, v: Tensor) -> Tensor:
        """V_0 v: of the linear estimate, or of no knowledge of the data at all."""
        k = self.process.event_dim
        event = at.mean.shape[at.mean.dim() - k :]
        result = v
        for rows, calibration, _, settings in at.parts:
            if calibration is None or settings is None:
                part = v * level.noise_to_signal.square()
            else:
                estimate = calibration.estimate
                diagonal = estimate.diagonal(level, event, at.keeper)
                g = gains(diagonal, at.variance, settings.head, settings.scale)
                part = g * estimate.times(g * v, level, k, at.keeper)
            result = part if rows is None else torch.where(rows, part, result)
        return result

    def _calibrations(
        self, xt: Tensor, context: dict[str, Tensor]
    ) -> list[tuple[Tensor | None, Calibration | None]]:
        """Which data (all if None) have which calibration."""
        k = self.process.event_dim
        batch, event = xt.shape[: xt.dim() - k], xt.shape[xt.dim() - k :]
        like = xt.new_zeros(event)
        given = {name: value for name, value in context.items() if value is not None}
        if not given:
            return [(None, calibrated(self.denoiser, like, {}, self._sums))]
        if any(value.is_floating_point() for value in given.values()):
            return [(None, None)]
        own = {n: v.shape[v.dim() - self.context_event_dim(n, v) :] for n, v in given.items()}
        codes = [v.expand(batch + own[n]).reshape(batch.numel(), -1) for n, v in given.items()]
        distinct, which = torch.cat(codes, 1).unique(dim=0, return_inverse=True)
        found: list[tuple[Tensor | None, Calibration | None]] = []
        for index, code in enumerate(distinct):
            parts = code.split([shape.numel() for shape in own.values()])
            labels = {
                n: part.reshape(own[n]).to(given[n].dtype)
                for n, part in zip(own, parts, strict=True)
            }
            rows = (which == index).reshape(batch + (1,) * k) if len(distinct) > 1 else None
            found.append((rows, calibrated(self.denoiser, like, labels, self._sums)))
        return found


class Part(NamedTuple):
    """Data of one calibration.

    Attributes:
        rows: which, batch + singletons; None for all.
        calibration: None without any.
        trusted: whether the derivative is their covariance here; for times of their own, row by row.
        settings: what V is made of elsewhere; None without a calibration.
    """

    rows: Tensor | None
    calibration: Calibration | None
    trusted: Tensor | bool
    settings: Settings | None

    @property
    def through(self) -> bool:
        """Whether products with the derivative are asked for."""
        return self.trusted is not False or self.shared

    @property
    def shared(self) -> bool:
        """Whether a share of the derivative is asked for in one direction."""
        if self.trusted is True or self.settings is None:
            return False
        share = self.settings.share
        return bool((share != 0).any()) if isinstance(share, Tensor) else share != 0


class Chosen(LinearizedDenoiser):
    """A linearized denoiser with the calibrations of its data, and the secant once it is known."""

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        xt: Tensor,
        level: Level,
        context: dict[str, Tensor],
        parts: list[Part],
    ) -> None:
        through = any(part.through for part in parts)
        super().__init__(denoiser, likelihood, xt, level, context, through=through)
        self.parts = parts
        self.secant: Secant | None = None

    @property
    def keeper(self) -> "Chosen | None":
        """What keeps V as a matrix, if there is but one."""
        return self if len(self.parts) == 1 else None
