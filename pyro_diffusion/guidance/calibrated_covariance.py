"""Gaussian conditioning by the denoiser's derivative where it is a covariance, else by that of its data."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.calibration import Calibration, calibrated, weight_sums
from pyro_diffusion.guidance.gaussian_conditioning import GaussianConditioning
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.schedules import Level

__all__ = ["CalibratedCovariance"]


class CalibratedCovariance(GaussianConditioning):
    r"""MMPS where the denoiser's derivative is a covariance, and the linear estimate's covariance elsewhere.

    .. math:: V = \frac{\sigma^2}{\alpha} J \quad\text{or}\quad
              V = \Big(C^{-1} + \frac{\alpha^2}{\sigma^2}\Big)^{-1}, \qquad \text{shift} = V B^T S^{-1} r .

    A trained network may be accurate in its mean and far off in its derivative, which is multiplied by
    :math:`\sigma^2/\alpha`, near a hundred where x_t is noise. So the denoiser is asked once, on 256 draws of
    its own chain and whatever the observations: at each of 16 noise levels, does V agree with the mean
    squared error of :math:`\hat x_0`, and is it symmetric and positive? C is the covariance of these draws.
    An exact denoiser passes at all levels, and this is :class:`~pyro_diffusion.guidance.MMPS`, unless its
    data have far clusters so rare (a few per cent) that the draws at a level may miss them: there the
    linear estimate takes over.

    The first evaluation makes this calibration, of about 17 000 evaluations of the denoiser for a datum: as
    many as 270 draws of 64 steps. It is kept until the denoiser's parameters change (a
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
        Rozet et al., arXiv 2405.13712, section 4, for both covariances.
    """

    through = False  # not at every level

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood, **options: Any) -> None:
        super().__init__(denoiser, likelihood, **options)
        self._sums = weight_sums(denoiser)

    def _linearized(
        self, xt: Tensor, t: Tensor | Level, context: dict[str, Tensor]
    ) -> tuple[LinearizedDenoiser, Level]:
        level = self.process.level(t, xt)
        parts = [
            Part(rows, calibration, calibration is not None and calibration.trusts(level))
            for rows, calibration in self._calibrations(xt, context)
        ]
        through = any(part.trusted is not False for part in parts)
        return Chosen(self.denoiser, self.likelihood, xt, level, context, through, parts), level

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """Through the denoiser or by the linear estimate, datum by datum."""
        assert isinstance(at, Chosen)
        network = level.tweedie * at.back(v) if at.through else v
        result = v
        for rows, calibration, trusted in at.parts:
            if trusted is True:
                part = network
            else:
                part = self._linear(calibration, at, level, v)
                if trusted is not False:
                    part = torch.where(trusted, network, part)
            result = part if rows is None else torch.where(rows, part, result)
        return result

    def _linear(
        self, calibration: Calibration | None, at: "Chosen", level: Level, v: Tensor
    ) -> Tensor:
        """V v of the linear estimate, or of no knowledge of the data at all."""
        if calibration is None:
            return v * level.noise_to_signal.square()
        alone = at if len(at.parts) == 1 else None
        return calibration.estimate.times(v, level, self.process.event_dim, alone)

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
    """

    rows: Tensor | None
    calibration: Calibration | None
    trusted: Tensor | bool


class Chosen(LinearizedDenoiser):
    """A linearized denoiser with the calibrations of its data."""

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        xt: Tensor,
        level: Level,
        context: dict[str, Tensor],
        through: bool,
        parts: list[Part],
    ) -> None:
        super().__init__(denoiser, likelihood, xt, level, context, through=through)
        self.parts = parts
