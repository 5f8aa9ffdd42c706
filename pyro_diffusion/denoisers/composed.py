"""Posteriors of several independent observations from the posterior of each."""

from collections.abc import Mapping

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers.base import Denoiser
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_finite, check_tensor

__all__ = ["ComposedDenoiser", "NormalDenoiser"]

HIGHEST = 1e12  # signal-to-noise ratio: without noise, all means are the state
NEEDS = (Ability.TWEEDIE, Ability.ISOTROPIC)


class NormalDenoiser(Denoiser):
    r"""The posterior of normal data :math:`\mathcal N(m, C)` under a Gaussian process, any covariance.

    .. math:: E[x_0 | x_t] = m + \alpha C (\alpha^2 C + \sigma^2 I)^{-1} (x_t - \alpha m)

    The mean is exact, and the variances of the coordinates; the returned normal has them, without their
    correlations.

    Args:
        process: a Gaussian process of event_dim 1, its noise alike in all coordinates.
        mean: (d,).
        covariance: (d, d), positive definite.

    Raises:
        ValueError: for another process, shapes that do not fit, or a covariance that is none.

    Example:
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> exact = NormalDenoiser(GaussianProcess(Cosine()), torch.zeros(2), torch.eye(2))
        >>> exact(torch.ones(5, 2), 0.5).mean[0]
        tensor([0.7071, 0.7071])
    """

    is_exact = True
    mean: Tensor
    variances: Tensor
    axes: Tensor

    def __init__(self, process: ForwardProcess, mean: Tensor, covariance: Tensor) -> None:
        super().__init__(process)
        _check_process(process)
        check_finite("mean", check_tensor("mean", mean))
        if mean.dim() != 1 or not mean.is_floating_point():
            raise ValueError(
                f"mean: got shape {tuple(mean.shape)} of {mean.dtype}, expected (d,) of real numbers"
            )
        check_covariances("covariance", covariance, (len(mean), len(mean)))
        values, vectors = torch.linalg.eigh(covariance.double())
        self.register_buffer("mean", mean.clone())
        self.register_buffer("variances", values.to(mean))
        self.register_buffer("axes", vectors.to(mean))

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        _check_state(xt, len(self.mean))
        level = self.process.level(t, xt, state="xt")
        centre, variances, axes = (x.to(xt) for x in (self.mean, self.variances, self.axes))
        total = level.alpha.square() * variances + level.sigma.square()
        gap = (xt - level.alpha * centre) @ axes
        mean = centre + (level.alpha * variances / total * gap) @ axes.mT
        kept = level.sigma.square() * variances / total
        variance = (kept.unsqueeze(-2) * axes.square()).sum(-1)
        return Normal(mean, variance.sqrt(), validate_args=False).to_event(1)


class ComposedDenoiser(Denoiser):
    r"""The posterior of n independent observations, of the denoisers given one each and of the prior.

    For observations that are independent given :math:`x_0`,

    .. math:: p(x_0 | x_t, y_{1 \dots n}) \propto p(x_0 | x_t)^{1 - n} \prod_i p(x_0 | x_t, y_i) .

    Each factor is taken for a normal of its denoiser's mean :math:`m_i` and of the covariance
    :math:`P_i^{-1} = (\Sigma_i^{-1} + \tfrac{\alpha^2}{\sigma^2} I)^{-1}` that it would have if
    :math:`p(x_0 | y_i)` were normal of covariance :math:`\Sigma_i` (i = 0 is the prior). Their product has

    .. math:: E[x_0 | x_t, y_{1 \dots n}] \approx
              \Lambda^{-1} \Big(\sum_i P_i m_i - (n - 1) P_0 m_0\Big), \quad
              \Lambda = \sum_i P_i - (n - 1) P_0,

    which is, by Tweedie's formula, GAUSS's sum of scores. *Exact* for normal posteriors and prior of these
    covariances; else *approximate*, the more so the more observations and the less normal. It is a denoiser
    as any other: chains, the probability flow and twisted SMC take it. A posterior precision below the
    prior's, which no posterior has on average, and which the product cannot have often, is raised to it.

    Args:
        denoiser: p(x_0 | x_t, y), y in its context.
        context: of n observations, each tensor (n,) + its shape.
        covariances: :math:`\Sigma_i`, (n, d, d).
        prior: p(x_0 | x_t), a denoiser under the same process that takes no context.
        prior_covariance: :math:`\Sigma_0`, (d, d).

    Raises:
        ValueError: for a process that is not Gaussian with one noise for all coordinates, denoisers under
            several processes, and shapes that do not fit.

    Shapes:
        batch + (d,), n evaluations of the denoiser for each.

    References:
        Geffner, Papamakarios & Mnih, arXiv 2209.14249 (composed scores); Linhart et al., arXiv 2404.07593,
        equations 8 to 12 (their covariances).
    """

    context: dict[str, Tensor]
    precisions: Tensor
    prior_precision: Tensor
    values: Tensor
    axes: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        context: Mapping[str, Tensor],
        covariances: Tensor,
        prior: Denoiser,
        prior_covariance: Tensor,
    ) -> None:
        for name, each in (("denoiser", denoiser), ("prior", prior)):
            if not isinstance(each, Denoiser):
                raise ValueError(f"{name}: got {type(each).__name__}, expected a Denoiser")
        super().__init__(denoiser.process)
        _check_process(denoiser.process)
        _check_alike(denoiser.process, prior.process)
        if check_tensor("covariances", covariances).dim() != 3 or not len(covariances):
            raise ValueError(
                f"covariances: got shape {tuple(covariances.shape)}, expected (n, d, d), n of one or more"
            )
        count, size = covariances.shape[:2]
        check_covariances("covariances", covariances, (count, size, size))
        check_covariances("prior_covariance", prior_covariance, (size, size))
        self.denoiser, self.prior = denoiser, prior
        self.names = list(context)
        for name in self.names:
            value = check_tensor(f"context[{name!r}]", context[name])
            if value.dim() != 1 + denoiser.context_event_dim(name, value) or len(value) != count:
                raise ValueError(
                    f"context: got {name!r} of shape {tuple(value.shape)}, expected ({count},) + that of one "
                    "observation's, as many as covariances"
                )
            self.register_buffer(f"context_{name}", value.detach().clone())
        own, of_prior = _precisions(covariances.double(), prior_covariance.double())
        rest = own.sum(0) - (count - 1) * of_prior
        values, vectors = torch.linalg.eigh(rest)
        found = (("precisions", own), ("prior_precision", of_prior), ("axes", vectors))
        for name, value in (*found, ("values", values)):
            self.register_buffer(name, value.to(covariances))

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt: a normal without correlations."""
        count, size = self.precisions.shape[:2]
        _check_state(xt, size)
        level = self.process.level(t, xt, state="xt")
        batch = xt.dim() - 1
        given = {}
        for name in self.names:
            value: Tensor = getattr(self, f"context_{name}")
            given[name] = value.reshape(count, *(1,) * batch, *value.shape[1:])
        means = self.denoiser(xt.expand(count, *xt.shape), level, **given).mean
        prior = self.prior(xt, level).mean
        ratio = (level.alpha / level.sigma).square().clamp(max=HIGHEST)
        total = torch.einsum("n...d,nde->...e", means, self.precisions.to(xt))
        total = total - (count - 1) * prior @ self.prior_precision.to(xt)
        total = total + ratio * (means.sum(0) - (count - 1) * prior)
        precision, axes = self.values.to(xt) + ratio, self.axes.to(xt)
        mean = (total @ axes / precision) @ axes.mT
        variance = (axes.square() / precision.unsqueeze(-2)).sum(-1)
        return Normal(mean, variance.sqrt(), validate_args=False).to_event(1)


def _precisions(covariances: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse covariances, none below the prior's in any direction."""
    factor = torch.linalg.cholesky(prior)
    inverse = torch.linalg.inv(factor)
    # where the prior is standard normal, precisions are 1 or more
    values, vectors = torch.linalg.eigh(inverse @ covariances @ inverse.mT)
    raised = (vectors / values.clamp(max=1.0).unsqueeze(-2)) @ vectors.mT
    return inverse.mT @ raised @ inverse, inverse.mT @ inverse


def _check_process(process: ForwardProcess) -> None:
    require(process, *NEEDS, argument="process")
    if process.event_dim != 1:
        raise ValueError(f"process: got event_dim={process.event_dim}, expected 1")


def _check_alike(process: ForwardProcess, other: ForwardProcess) -> None:
    t, xt = torch.tensor(0.5), torch.zeros(1)
    one, two = process.level(t, xt), other.level(t, xt)
    pairs = ((one.alpha, two.alpha), (one.sigma, two.sigma))
    if not all(torch.allclose(*pair) for pair in pairs):
        raise ValueError("prior: got a denoiser under another process, expected the denoiser's")


def _check_state(xt: Tensor, size: int) -> None:
    if xt.shape[-1:] != (size,):
        raise ValueError(f"xt: got shape {tuple(xt.shape)}, expected a last dimension of {size}")


def check_covariances(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is not symmetric and positive definite.

    Raises:
        ValueError: naming the argument.
    """
    check_finite(name, check_tensor(name, value))
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
    largest = value.abs().max()
    if bool((value - value.mT).abs().max() > 1e-4 * largest) or not bool(
        (torch.linalg.eigvalsh(value.double()) > 0).all()
    ):
        raise ValueError(
            f"{name}: got {value.flatten()[:3].tolist()} and others, expected a symmetric, positive definite "
            "matrix"
        )
