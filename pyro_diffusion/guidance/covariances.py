r"""Gaussian conditioning with the covariances of four papers."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.gaussian_conditioning import GaussianConditioning
from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.guidance.relinearization import Solved
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.schedules import Level

__all__ = ["MMPS", "TMPD", "DiffPIR", "PiGDM"]


class PiGDM(GaussianConditioning):
    r"""Pseudoinverse guidance: V the denoiser's own variance, the shift pulled back through the denoiser.

    .. math:: \text{shift} = \frac{\sigma^2}{\alpha} J^T B^T S^{-1} r .

    With a ``data_variance`` :math:`s^2` V is that of normal data given x_t instead,
    :math:`s^2\sigma^2/(\alpha^2 s^2 + \sigma^2)`, as it is with the paper's :math:`s^2 = 1` for a denoiser
    that is a point mass. One backward pass through the denoiser, whatever the observations. Other arguments,
    errors and log-twist: :class:`~pyro_diffusion.guidance.gaussian_conditioning.GaussianConditioning`.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula.
        likelihood: as there.
        data_variance: of a coordinate of the data, > 0; None for the denoiser's own variance.
        options: ``solver``, ``iterations`` and ``full_gradient``.

    Raises:
        ValueError: if ``data_variance`` is not positive, and as there.

    References:
        Song et al., Pseudoinverse-guided diffusion models, ICLR 2023, equations 7 to 9.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Likelihood,
        *,
        data_variance: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(denoiser, likelihood, **options)
        if data_variance is not None and not 0 < data_variance < math.inf:
            raise ValueError(
                f"data_variance: got {data_variance}, expected a finite number > 0 or None"
            )
        self.data_variance = data_variance

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """A variance by coordinate: the denoiser's, or that of normal data."""
        if self.data_variance is None and at.variance is not None:
            return v * at.variance
        s2 = 1.0 if self.data_variance is None else self.data_variance
        return v * (s2 * level.sigma**2 / (s2 * level.alpha**2 + level.sigma**2))

    def multiplies_by_jacobian(self, at: LinearizedDenoiser) -> bool:
        """Not V, but the shift."""
        return False

    def shift(self, at: LinearizedDenoiser, level: Level, solved: Solved) -> Tensor:
        """Through the denoiser."""
        return level.tweedie * at.back(solved.pulled)


class MMPS(GaussianConditioning):
    r"""Moment matching posterior sampling: the whole covariance, through the denoiser.

    .. math:: V = \frac{\sigma^2}{\alpha} J, \qquad \text{shift} = V B^T S^{-1} r .

    By Tweedie's formula V is :math:`Cov[x_0|x_t]` of an exact denoiser. Products already made for the
    system give the shift. Arguments, errors and log-twist: ``GaussianConditioning``.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.distributions import Diffusion
        >>> from pyro_diffusion.likelihoods import ProgramLikelihood
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
        >>> def model():
        ...     x = pyro.sample("x", Diffusion(denoiser, event_shape=(2,)))
        ...     pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(3.0))
        >>> guided = MMPS(denoiser, ProgramLikelihood(model))
        >>> Diffusion(guided, event_shape=(2,), steps=20).sample((5,)).shape
        torch.Size([5, 2])

    References:
        Rozet et al., arXiv 2405.13712, section 4.
    """

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """Through the denoiser."""
        return level.tweedie * at.back(v)


class TMPD(MMPS):
    r"""Tweedie moment projection: MMPS with S replaced by the diagonal of its row sums.

    .. math:: S \approx \text{diag}(1 + B V B^T 1) .

    Two backward passes through the denoiser and one product with B, whatever m; no system is solved. Row sums
    below 1, that of no uncertainty, count as 1. Exact where :math:`B V B^T` is diagonal. Where correlations
    are negative row sums are too small, and the shift is cut at :math:`|B\,\text{shift}| = |r|`. Arguments
    as ``GaussianConditioning``; solver and iterations have no effect.

    References:
        Boys et al., arXiv 2310.06721, section 3 (the row sums here are of the whitened system).
    """

    def _direct(self, at: LinearizedDenoiser, level: Level) -> Solved:
        ones = torch.ones_like(at.residual)
        row_sums = 1 + at.push(self.covariance(at, level, at.pull(ones))).clamp(min=0)
        pulled = at.pull(at.residual / row_sums)
        log_evidence = -0.5 * (at.residual.square() / row_sums + row_sums.log()).sum(-1)
        image = self.covariance(at, level, pulled)
        image = self._within(at, image, at.push(image))
        return Solved(pulled, image, None, log_evidence + at.log_normalizer)

    def _iterated(self, at: LinearizedDenoiser, level: Level, solver: str) -> Solved:
        return self._direct(at, level)


class DiffPIR(GaussianConditioning):
    r"""Half-quadratic splitting: a covariance like the noise's, no backward pass through the denoiser.

    .. math:: V = \frac{\sigma^2}{\alpha^2 \lambda} I, \qquad \text{shift} = V B^T S^{-1} r .

    The posterior mean minimizes
    :math:`\tfrac12|r(x_0)|^2 + \tfrac\lambda2 \tfrac{\alpha^2}{\sigma^2} |x_0 - \hat x_0|^2`,
    linearized. The variance of unit-variance data would be lower at the noise end, so this leans to the
    observations there. Approximate even for normals. Other arguments, errors and log-twist:
    :class:`~pyro_diffusion.guidance.gaussian_conditioning.GaussianConditioning`.

    Args:
        denoiser: posterior p(x_0 | x_t) of the prior, under a process with Tweedie's formula; it needs no
            gradient.
        likelihood: as there.
        lam: :math:`\lambda`, weight of the prior, > 0.
        options: ``solver`` and ``iterations``.

    Raises:
        ValueError: if ``lam`` is not positive, and as there.

    References:
        Zhu et al., arXiv 2305.08995, algorithm 1.
    """

    through = False

    def __init__(
        self, denoiser: Denoiser, likelihood: Likelihood, *, lam: float = 1.0, **options: Any
    ) -> None:
        super().__init__(denoiser, likelihood, **options)
        if not lam > 0:
            raise ValueError(f"lam: got {lam}, expected a number > 0")
        self.lam = float(lam)

    def covariance(self, at: LinearizedDenoiser, level: Level, v: Tensor) -> Tensor:
        """A multiple of the noise's variance, coordinate by coordinate."""
        return v * (level.noise_to_signal.square() / self.lam)
