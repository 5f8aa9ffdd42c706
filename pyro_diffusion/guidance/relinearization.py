r"""Observations that are not linear in x_0: averaged over what is uncertain of it, and linearized again."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_diffusion.guidance.linearized_denoiser import LinearizedDenoiser
from pyro_diffusion.guidance.proposal import Readings
from pyro_diffusion.likelihoods.whitening import Whitened

__all__ = ["Solved", "averaged", "relinearized"]

PAIRS = 4  # of points, antithetic, over which residuals are averaged
CURVED = (
    0.05  # standard deviations of the noise by which a residual must bend to count as not linear
)
LEAST = 0.01  # share of a variance that observations leave at least
SHRINKING = 0.25  # of the variance that residuals are averaged over, by pass
SEED = 0


class Solved(NamedTuple):
    """The solved linear system at one state.

    Attributes:
        pulled: B^T S^{-1} r, data space.
        image: V B^T S^{-1} r, data space.
        readings: what was solved, where it was formed.
        log_evidence: the log-twist, rows; None where S was not formed.
    """

    pulled: Tensor
    image: Tensor
    readings: Readings | None = None
    log_evidence: Tensor | None = None


@functools.lru_cache(maxsize=8)
def _directions(event: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Directions, (PAIRS,) + event, the same at every call: kernels are functions of states.

    A Latin hypercube: sizes in every coordinate are the quantiles of a half-normal, in an order of its own
    and with signs at random, of unit variance.
    """
    generator = torch.Generator().manual_seed(SEED)
    share = (torch.arange(PAIRS, dtype=torch.float64, device="cpu") + 0.5) / PAIRS
    sizes = torch.special.ndtri(0.5 + share / 2)
    size = (PAIRS, *event)
    order = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu").argsort(0)
    signs = torch.randint(2, size, generator=generator, device="cpu") * 2 - 1
    z = sizes[order] * signs / sizes.square().mean().sqrt()
    return z.to(device, dtype)


def averaged(
    whitened: Callable[[Tensor], Whitened], variance: Tensor, event_dim: int
) -> Callable[[Tensor], Whitened]:
    r"""Residuals averaged over :math:`x_0 \sim \mathcal N(\cdot, v)`, as a function of the mean.

    .. math:: \bar r(x) = \tfrac{1}{2K} \sum_{k, \pm} r(x \pm \sqrt v z_k), \qquad
              \Omega = \operatorname{Var}_k\big[\tfrac12 r(x + \sqrt v z_k) + \tfrac12 r(x - \sqrt v z_k)\big]

    with K = 4 fixed directions z, stratified in every coordinate; the slope of :math:`\bar r` is the average
    slope, that of the least-squares line through r by Stein's lemma. :math:`\Omega` is variance that no line
    explains: it is added to the noise, residual by residual, :math:`\bar r / \sqrt{1 + \Omega}`. An affine
    residual is left as it is.

    Args:
        whitened: residual and log-normalizer of x_0.
        variance: v, data space or what broadcasts to it.
        event_dim: dimensions of a datum.

    References:
        García-Fernández et al., Posterior linearization filter, IEEE Trans. Signal Process. 63, 2015.
    """

    def average(x0: Tensor) -> Whitened:
        event = x0.shape[x0.dim() - event_dim :]
        z = _directions(event, x0.dtype, x0.device)
        z = z.reshape(PAIRS, *(1,) * (x0.dim() - event_dim), *event)
        away = variance.to(x0).clamp(min=0).sqrt() * z
        with pyro.validation_enabled(False):
            residual, log_normalizer = whitened(torch.cat([x0 + away, x0 - away]))
        even = (residual[:PAIRS] + residual[PAIRS:]) / 2
        mean = even.mean(0)
        scale = (1 + (even - mean).square().sum(0) / (PAIRS - 1)).detach()
        return Whitened(mean * scale.rsqrt(), log_normalizer.mean(0) - 0.5 * scale.log().sum(-1))

    return average


def relinearized(
    at: LinearizedDenoiser,
    whitened: Callable[[Tensor], Whitened],
    solver: Callable[[LinearizedDenoiser], Solved],
    variance: Tensor | None,
    passes: int,
    event_dim: int,
) -> Solved:
    r"""The solution at a denoiser's mean, for rows that are not linear after further passes.

    The first pass linearizes the residual averaged over what is uncertain at the mean: statistical
    linearization. The others are taken at the last posterior mean x, averaged over a quarter of the
    variance of the pass before (without one, Gauss-Newton's), for rows in which

    .. math:: \tfrac12 |r(x)|^2 + \tfrac12 (x - \hat x_0)^T V^{-1} (x - \hat x_0)

    falls. Every pass solves for the shift from the denoiser's mean anew.

    Args:
        at: the likelihood linearized at the denoiser's mean.
        whitened: residual and log-normalizer of x_0.
        solver: of the linear system.
        variance: of x_0 given x_t by coordinate, or None: then residuals are not averaged.
        passes: how many.
        event_dim: of the process.
    """
    first = solver(at)
    if not passes:
        return first
    curved = _curved(at, whitened, first, variance, event_dim)
    if not bool(curved.any()):
        return first
    solved = first
    if variance is not None:
        function = averaged(whitened, variance, event_dim)
        solved = _chosen(at, curved, solver(at.linearized_at(function, at.mean)), first)
        passes -= 1
    energy = _energy(at, whitened, solved)
    for _ in range(passes):
        if variance is not None:
            variance = SHRINKING * variance
            function = averaged(whitened, variance, event_dim)
        else:
            function = whitened
        ahead = solver(at.linearized_at(function, at.mean + solved.image))
        there = _energy(at, whitened, ahead)
        lower = curved & (there < energy)
        solved = _chosen(at, lower, ahead, solved)
        energy = torch.where(lower, there, energy)
    return solved


def _energy(
    at: LinearizedDenoiser, whitened: Callable[[Tensor], Whitened], solved: Solved
) -> Tensor:
    """What Gauss-Newton makes smaller, rows, for shifts within the span of V B^T."""
    with torch.no_grad(), pyro.validation_enabled(False):
        residual = whitened(at.mean + solved.image).residual
    quadratic = at.per_row(solved.pulled * solved.image).sum(-1)
    return 0.5 * (residual.square().sum(-1) + quadratic)


def _chosen(at: LinearizedDenoiser, rows: Tensor, new: Solved, old: Solved) -> Solved:
    """Row by row the one or the other."""

    def data(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.unsqueeze(-1), at.per_row(a), at.per_row(b)).reshape(a.shape)

    def row(a: Tensor, b: Tensor) -> Tensor:
        own = rows.reshape(rows.shape + (1,) * (a.dim() - rows.dim()))
        return torch.where(own, a, b)

    readings, evidence = old.readings, old.log_evidence
    if new.readings is not None and old.readings is not None:
        readings = Readings(*(row(a, b) for a, b in zip(new.readings, old.readings, strict=True)))
    if new.log_evidence is not None and old.log_evidence is not None:
        evidence = row(new.log_evidence, old.log_evidence)
    return Solved(data(new.pulled, old.pulled), data(new.image, old.image), readings, evidence)


def _curved(
    at: LinearizedDenoiser,
    whitened: Callable[[Tensor], Whitened],
    first: Solved,
    variance: Tensor | None,
    event_dim: int,
) -> Tensor:
    """Which rows' residuals bend, between the mean and where it is shifted or on either side of it."""
    x0 = at.mean
    away = first.image
    if variance is not None:
        event = x0.shape[x0.dim() - event_dim :]
        away = variance.to(x0).sqrt() * _directions(event, x0.dtype, x0.device)[0]
    with torch.no_grad(), pyro.validation_enabled(False):
        shifted, ahead, behind = whitened(
            torch.stack([x0 + first.image, x0 + away, x0 - away])
        ).residual
    bends = torch.stack(
        [
            shifted - (at.residual - at.push(first.image)),
            (ahead + behind) / 2 - at.residual,
        ]
    ).abs()
    size = torch.stack([at.residual, shifted, ahead, behind]).abs().amax(0)
    rounding = 100 * torch.finfo(size.dtype).eps * size.amax(-1)
    # What is not finite cannot be averaged: such rows stay as they are.
    finite = bends.isfinite().all(0).all(-1)
    return finite & (bends.amax((0, -1)) > CURVED + rounding)


def remaining(variance: Tensor, solved: Solved, at: LinearizedDenoiser) -> Tensor | None:
    """Share of a variance by coordinate that observations leave, by the diagonal of V - V B^T S^{-1} B V.

    None where S was not formed. V need not be a covariance: the share is kept in [LEAST, 1].

    Args:
        variance: the diagonal of V, data space or what broadcasts to it.
        solved: with V B^T and B V B^T.
        at: whose data space it is.
    """
    if solved.readings is None:
        return None
    images, gap = solved.readings.images, solved.readings.gap
    eye = torch.eye(images.shape[-2], dtype=images.dtype, device=images.device)
    factor, info = torch.linalg.cholesky_ex(eye + 0.5 * (gap + gap.mT))
    half = torch.linalg.solve_triangular(factor, images, upper=False)
    explained = half.square().sum(-2).reshape(at.mean.shape)
    share = 1 - explained / variance
    known = share.isfinite() & (info == 0).reshape(info.shape + (1,) * (share.dim() - info.dim()))
    return torch.where(known, share.clamp(LEAST, 1), 1.0)
