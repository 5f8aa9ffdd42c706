r"""A covariance of x_0 given x_t from an estimate and one product with the denoiser's derivative."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pyro_diffusion.guidance.linear_estimate import LinearEstimate
from pyro_diffusion.precision import matmul
from pyro_diffusion.schedules import Level

__all__ = ["Secant", "Settings", "gains", "inner", "settings_by_error"]

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the derivative, tried
HEADS = (0.0, 0.5, 1.0)  # powers of the denoiser's own variance, tried
CURVATURE = 5.0  # factor by which the derivative may differ from the estimate in its direction
RATIO = (1e-4, 10.0)  # of the denoiser's own variance to the estimate's
NOISE = 0.1  # sd of the trial observations, of that of the data
OBSERVED = 64  # numbers in a trial observation at most
AT_ONCE = 2**24  # numbers in the products of one trial
ERRORS = 2.0  # standard errors by which a choice must be better than none


class Settings(NamedTuple):
    """What the covariance at one level is made of; numbers, or tensors that broadcast to the data.

    Attributes:
        share: of the derivative in the direction asked for, in [0, 1].
        head: power of the denoiser's own variance in that of a coordinate, in [0, 1].
        scale: of the linear estimate.
    """

    share: Tensor | float
    head: Tensor | float
    scale: Tensor | float


class Secant(NamedTuple):
    r"""The update of a covariance V_0 to :math:`V z = y` in one direction z.

    .. math:: V = V_0 - \frac{V_0 z z^T V_0}{z^T V_0 z} + \frac{y y^T}{y^T z}

    It is symmetric, and positive where V_0 and :math:`y^T z` are (Broyden, Fletcher, Goldfarb and Shanno).

    Attributes:
        before: V_0 z over the root of z^T V_0 z, data space.
        after: y over the root of y^T z, data space.
    """

    before: Tensor
    after: Tensor

    @classmethod
    def of(
        cls, z: Tensor, before: Tensor, image: Tensor, share: Tensor | float, event_dim: int
    ) -> Self:
        r"""The update to :math:`y = w J z + (1 - w) V_0 z`.

        None (y = V_0 z) where the curvature :math:`z^T J z` differs from :math:`z^T V_0 z` by more than a
        factor of 5, or is negative.

        Args:
            z: direction, data space.
            before: V_0 z.
            image: J z, with J for :math:`(\sigma^2/\alpha)` times the derivative.
            share: w.
            event_dim: of a datum.
        """
        q0, q1 = inner(z, before, event_dim), inner(z, image, event_dim)
        fine = (q0 > 0) & (q1 * CURVATURE > q0) & (q1 < CURVATURE * q0)
        fine = fine & inner(image, image, event_dim).isfinite()
        after = torch.where(fine, share * image + (1 - share) * before, before)
        q = torch.where(fine, share * q1 + (1 - share) * q0, q0)
        tiny = torch.finfo(q.dtype).tiny
        roots = (torch.where(v > tiny, v.clamp(min=tiny).rsqrt(), 0.0) for v in (q0, q))
        first, second = roots
        return cls(before * first, after * second)

    def times(self, v: Tensor, base: Tensor, event_dim: int) -> Tensor:
        """V v from V_0 v."""
        taken, given = (part * inner(part, v, event_dim) for part in self)
        return base - taken + given


def inner(a: Tensor, b: Tensor, event_dim: int) -> Tensor:
    """Inner products datum by datum, with singletons for events."""
    product = a * b
    return product.sum(tuple(range(-event_dim, 0)), keepdim=True) if event_dim else product


def gains(
    diagonal: Tensor, variance: Tensor | None, head: Tensor | float, scale: Tensor | float
) -> Tensor | float:
    r"""Factors g of coordinates: :math:`V_0 = g V_L g` has the variances :math:`(c\,l)^{1-p} v^p`.

    Args:
        diagonal: l, of the linear estimate V_L.
        variance: v, the denoiser's own, or None for none.
        head: p.
        scale: c.
    """
    if variance is None or (isinstance(head, float) and head == 0):
        return scale**0.5
    ratio = (variance / diagonal).clamp(*RATIO)
    # Tensors on the way: either may be a number.
    return (ratio**head * torch.as_tensor(scale).to(ratio) ** (1 - head)).sqrt()


def _trials(estimate: LinearEstimate, n: int, states: int, seed: int) -> list[Tensor]:
    """What is observed in trials, (m, n) each: some coordinates, and the leading principal components."""
    most = max(min(OBSERVED, AT_ONCE // (states * n)), 1)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(n, generator=generator)[: max(min(n // 2, most), 1)]
    order = estimate.values.argsort(descending=True)
    coarse = estimate.vectors[:, order[: max(min(n // 16, most), 1)]].mT
    return [torch.eye(n, dtype=coarse.dtype, device=coarse.device)[some.to(coarse.device)], coarse]


def trial_errors(
    estimate: LinearEstimate,
    level: Level,
    x0: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    pull: Callable[[Tensor], Tensor],
    scale: float,
    seed: int,
) -> Tensor:
    """Squared errors of E[x_0 | x_t, y] for trial observations y, trials + (HEADS, SHARES) + states.

    Args:
        estimate: of the data's covariance.
        level: one.
        x0: data, states + event.
        mean: the denoiser's at x_t.
        variance: its own, or None.
        pull: z -> (sigma^2/alpha) J^T z.
        scale: of the linear estimate.
        seed: of the noise.
    """
    event, k, states = x0.shape[1:], x0.dim() - 1, len(x0)
    diagonal = estimate.diagonal(level, event)
    noise = NOISE * float(estimate.values.mean()) ** 0.5
    found = []
    for a in _trials(estimate, x0[0].numel(), states, seed):
        rows = a.to(x0).reshape(-1, 1, *event)
        generator = torch.Generator().manual_seed(seed)
        away = torch.randn(states, len(a), generator=generator, dtype=torch.float64).to(x0)
        r = matmul((x0 - mean).flatten(1), a.to(x0).mT) + noise * away
        for head in HEADS if variance is not None else HEADS[:1]:
            g = gains(diagonal, variance, head, scale)
            images = g * estimate.times(g * rows.expand(-1, states, *event), level, k)

            def shift(products: Tensor, a: Tensor = a, r: Tensor = r) -> tuple[Tensor, Tensor]:
                """The shift of the mean, and S^{-1} r."""
                flat = products.flatten(2).movedim(0, 1)  # states, m, n
                gap = matmul(flat, a.to(flat).mT)
                gap = gap + noise**2 * torch.eye(len(a), dtype=gap.dtype, device=gap.device)
                u = torch.linalg.solve((gap + gap.mT) / 2, r)
                return matmul(u.unsqueeze(1), flat).reshape(x0.shape), u

            first, u = shift(images)
            z = matmul(u, a.to(u)).reshape(x0.shape)
            image = pull(z)
            for share in SHARES:
                secant = Secant.of(z, first, image, share, k)
                moved, _ = shift(secant.times(rows, images, k)) if share else (first, u)
                found.append((mean + moved - x0).flatten(1).square().sum(-1))
    heads = len(HEADS) if variance is not None else 1
    return torch.stack(found).reshape(-1, heads, len(SHARES), states)


def settings_by_error(errors: Tensor) -> tuple[float, float]:
    """Share and head of the least error over trials and states; none that is not better beyond its error.

    Args:
        errors: of :func:`trial_errors`.
    """
    flat = errors.double().flatten(1, 2)
    flat = torch.where(flat.isfinite(), flat, torch.inf)
    loss = (flat / flat[:, :1].mean(-1, keepdim=True)).mean(0)
    best = int(loss.mean(-1).argmin())
    gain = loss[0] - loss[best]
    if not bool(gain.mean() > ERRORS * gain.std() / len(gain) ** 0.5):
        return 0.0, 0.0
    return SHARES[best % len(SHARES)], HEADS[best // len(SHARES)]
