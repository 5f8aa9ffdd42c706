"""Gaussian conditioning by the denoiser's derivative where it is a covariance, else beside an estimate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.calibration import Calibration, calibrated
from pyro_diffusion.guidance.gaussian_conditioning import GaussianConditioning
from pyro_diffusion.guidance.kept import weight_sums
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.guidance.relinearization import Solved
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.schedules import Level

__all__ = ["CalibratedCovariance"]

# Factor by which the derivative may differ from the estimate in the direction of the residual, and its
# shift be longer than the estimate's.
CURVATURE, LENGTH = 5.0, 3.0


class CalibratedCovariance(GaussianConditioning):
    r"""MMPS where the denoiser's derivative is a covariance; elsewhere an estimate bounds it.

    .. math:: V = \frac{\sigma^2}{\alpha} J, \;\text{shift} = V B^T S^{-1} r \quad\text{or}\quad
              V = c\,\Big(C^{-1} + \frac{\alpha^2}{\sigma^2}\Big)^{-1}, \;
              \text{shift} = \frac{\sigma^2}{\alpha} J^T B^T S^{-1} r .

    A trained network may be accurate in its mean and far off in its derivative, which is multiplied by
    :math:`\sigma^2/\alpha`, near a hundred where x_t is noise. So the denoiser is asked once, on 256 draws of
    its own chain and whatever the observations: at each of 16 noise levels, does :math:`(\sigma^2/\alpha) J`
    agree with the mean squared error of :math:`\hat x_0`, and is it symmetric and positive? C is the
    covariance of these draws. An exact denoiser passes at all levels, and this is
    :class:`~pyro_diffusion.guidance.MMPS`, unless its data have far clusters so rare (a few per cent) that
    the draws at a level may miss them.

    Where it fails, V is the linear estimate's covariance, always positive, with c for the realized share of
    its squared error. S is made of it, so that observations count for what they are worth; the residuals so
    weighted are pulled back through the denoiser, as in :class:`~pyro_diffusion.guidance.PiGDM`, one
    backward pass: of all directions the derivative is right first in those that data vary in. Where it is
    not, it shows: a datum whose curvature :math:`z^T (\sigma^2/\alpha) J z` along
    :math:`z = B^T S^{-1} r` is not within a factor of 5 of :math:`z^T V z` is shifted by :math:`V z`, and no
    shift is longer than three times that. Such a shift may pass the observations, as the posterior mean
    given x_t does not; cut where it does, chains drew worse posteriors of images. The posterior's variance
    is that of the denoiser less what observations explain under V.

    The first evaluation makes this calibration, of about 13 000 evaluations of the denoiser for a datum: as
    many as 200 draws of 64 steps. It is kept until the denoiser's parameters change (a
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
        Rozet et al., arXiv 2405.13712, section 4, for both covariances; Song et al., Pseudoinverse-guided
        diffusion models, ICLR 2023, for the pull through the denoiser.
    """

    through = False  # not where a denoiser has no gradient

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood, **options: Any) -> None:
        super().__init__(denoiser, likelihood, **options)
        self._sums = weight_sums(denoiser)

    def _linearized(
        self, xt: Tensor, t: Tensor | Level, context: dict[str, Tensor]
    ) -> tuple[LinearizedDenoiser, Level]:
        level = self.process.level(t, xt, state="xt")
        parts = [
            Part(
                rows,
                known,
                known is not None and known.trusts(level),
                known and known.scale_at(level),
            )
            for rows, known in self._calibrations(xt, context)
        ]
        return Chosen(self.denoiser, self.likelihood, xt, level, context, parts), level

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """Through the denoiser where it is trusted, elsewhere the estimate."""
        assert isinstance(at, Chosen)
        k = self.process.event_dim
        network = level.tweedie * at.back(v) if at.some_trusted else None

        def product(part: Part) -> Tensor:
            if part.trusted is True and network is not None:
                return network
            if part.calibration is None or part.scale is None:
                result = v * level.noise_to_signal.square()
            else:
                result = part.scale * part.calibration.estimate.times(v, level, k, at.keeper)
            if part.trusted is False or network is None:
                return result
            return torch.where(torch.as_tensor(part.trusted), network, result)

        return at.by_part(product)

    def multiplies_by_jacobian(self, at: LinearizedDenoiser) -> bool:
        """Where the derivative is trusted."""
        return isinstance(at, Chosen) and at.some_trusted

    def variances(self, at: LinearizedDenoiser, level: Level) -> Tensor:
        """The denoiser's own where its derivative is trusted, as in MMPS, elsewhere those of the estimate."""
        assert isinstance(at, Chosen)
        k = self.process.event_dim
        event = at.mean.shape[at.mean.dim() - k :]

        def diagonal(part: Part) -> Tensor:
            if part.calibration is None or part.scale is None:
                result = level.noise_to_signal.square()
            else:
                result = part.scale * part.calibration.estimate.diagonal(level, event, at.keeper)
            if at.variance is None or part.trusted is False:
                return result
            trusted = torch.as_tensor(part.trusted, device=result.device)
            return torch.where(trusted, at.variance, result)

        return at.by_part(diagonal)

    def shift(self, at: LinearizedDenoiser, level: Level, solved: Solved) -> Tensor:
        """Through the denoiser, as far as the estimate lets it."""
        assert isinstance(at, Chosen)
        if not at.through or all(part.trusted is True for part in at.parts):
            return solved.image
        followed = bounded(
            solved.pulled,
            solved.image,
            level.tweedie * at.back(solved.pulled),
            self.process.event_dim,
        )

        def shift(part: Part) -> Tensor:
            if part.trusted is True:
                return solved.image
            if part.trusted is False:
                return followed
            return torch.where(part.trusted, solved.image, followed)

        return at.by_part(shift)

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


def bounded(z: Tensor, image: Tensor, through: Tensor, event_dim: int) -> Tensor:
    """The shift through the denoiser where it is like the estimate's, datum by datum, else the estimate's.

    Args:
        z: :math:`B^T S^{-1} r`.
        image: V z.
        through: :math:`(\\sigma^2/\\alpha) J^T z`.
        event_dim: of a datum.
    """
    q0, q1 = (_inner(z, v, event_dim) for v in (image, through))
    fine = (q0 > 0) & (q1 * CURVATURE > q0) & (q1 < CURVATURE * q0)
    length, most = (_inner(v, v, event_dim).sqrt() for v in (through, image))
    fine = fine & length.isfinite()
    factor = LENGTH * most / length.clamp(min=torch.finfo(length.dtype).tiny)
    return torch.where(fine, through * factor.clamp(max=1), image)


def _inner(a: Tensor, b: Tensor, event_dim: int) -> Tensor:
    """Inner products datum by datum, with singletons for events."""
    product = a * b
    return product.sum(tuple(range(-event_dim, 0)), keepdim=True) if event_dim else product


class Part(NamedTuple):
    """Data of one calibration.

    Attributes:
        rows: which, batch + singletons; None for all.
        calibration: None without any.
        trusted: whether the derivative is their covariance here; for times of their own, row by row.
        scale: of the estimate elsewhere; None without a calibration.
    """

    rows: Tensor | None
    calibration: Calibration | None
    trusted: Tensor | bool
    scale: Tensor | float | None


class Chosen(LinearizedDenoiser):
    """A linearized denoiser with the calibrations of its data."""

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        xt: Tensor,
        level: Level,
        context: dict[str, Tensor],
        parts: list[Part],
    ) -> None:
        known = (part.calibration for part in parts)
        through = any(own is not None and own.differentiable for own in known)
        super().__init__(denoiser, likelihood, xt, level, context, through=through)
        self.parts = parts
        self.some_trusted = any(part.trusted is not False for part in parts)

    @property
    def keeper(self) -> "Chosen | None":
        """What keeps V as a matrix, if there is but one."""
        return self if len(self.parts) == 1 else None

    def by_part(self, function: Callable[[Part], Tensor]) -> Tensor:
        """A function of each datum's own part."""
        first, *others = self.parts
        result = function(first)
        for part in others:
            result = torch.where(torch.as_tensor(part.rows), function(part), result)
        return result
