r"""Krylov solvers of many small systems at once: matrix-free, of a fixed number of iterations, row by row."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.precision import matmul
from pyro_diffusion.validation import check_number, check_positive_int, check_tensor

__all__ = ["KrylovSolution", "conjugate_gradients", "gmres"]

Apply = Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]


class KrylovSolution(NamedTuple):
    """What a solver found.

    Attributes:
        u: approximate solution, rows + (m,).
        images: the linear by-products of ``apply`` at u, for no further call of it.
    """

    u: Tensor
    images: tuple[Tensor, ...]


LOOK_EVERY = 4  # iterations between two looks whether all rows are done: each waits for the device


def conjugate_gradients(
    apply: Apply, b: Tensor, iterations: int, least: float = 0.0, tolerance: float = 0.0
) -> KrylovSolution:
    r"""Conjugate gradients for :math:`S u = b`, S symmetric and positive definite.

    Every row has steps of its own and stays put once it has converged: it never depends on its batch-mates.
    Exact after m iterations, or as many as S has distinct eigenvalues. Without a tolerance no wait for a
    device.

    Args:
        apply: p -> (S p, images), the images linear in p and of shapes whose leading dimensions are b's rows.
        b: right-hand sides, rows + (m,).
        iterations: number of iterations, one call of ``apply`` each.
        least: what no eigenvalue of S is below. A row whose direction p denies it, by
            :math:`p^T S p \le \text{least}\,|p|^2`, stops there.
        tolerance: a row stops where the root mean square of :math:`b - S u` is no larger; ``iterations`` is
            then the most that are made, and one the least.

    Raises:
        ValueError: if iterations < 1 or tolerance < 0, or b holds no numbers of single or double precision.

    References:
        Hestenes & Stiefel, 1952.
    """
    check_positive_int("iterations", iterations)
    check_number("tolerance", tolerance, at_least=0)
    _check_sides(b)
    u, residual, direction = torch.zeros_like(b), b, b
    images: tuple[Tensor, ...] = ()
    energy = b.square().sum(-1, keepdim=True)
    # Below rounding, or small enough.
    enough = ((_resolution(b) ** 2) * energy).clamp(min=tolerance**2 * b.shape[-1])
    going = torch.ones_like(energy, dtype=torch.bool)
    for iteration in range(iterations):
        going = going & (energy > enough)
        looks = tolerance > 0 and iteration > 0 and iteration % LOOK_EVERY == 0
        if looks and not bool(going.any()):
            break
        product, found = apply(direction)
        curvature = (direction * product).sum(-1, keepdim=True)
        # A row is done for good, too, where S is not what it should be: further steps would go astray.
        floor = least * direction.square().sum(-1, keepdim=True)
        going = going & (curvature > floor)
        step = torch.where(going, energy / torch.where(going, curvature, 1.0), 0.0)
        u = u + step * direction
        images = _add(images, step, found)
        residual = residual - step * product
        before, energy = energy, residual.square().sum(-1, keepdim=True)
        turn = torch.where(going, energy / torch.where(going, before, 1.0), 0.0)
        direction = residual + turn * direction
    return KrylovSolution(u, images)


def gmres(apply: Apply, b: Tensor, iterations: int) -> KrylovSolution:
    r"""Generalized minimal residuals for :math:`S u = b`, S any regular matrix.

    As :func:`conjugate_gradients`, but S need not be symmetric, as the Jacobian of a network is not. It keeps
    all directions: memory grows with the iterations. A row where S or b overflows is NaN, and that row alone.

    Args:
        apply: p -> (S p, images), the images linear in p and of shapes whose leading dimensions are b's rows.
        b: right-hand sides, rows + (m,).
        iterations: number of iterations, one call of ``apply`` each; at most m are made.

    Raises:
        ValueError: if iterations < 1, or b holds no numbers of single or double precision.

    References:
        Saad & Schultz, 1986.
    """
    _check_sides(b)
    iterations = min(check_positive_int("iterations", iterations), b.shape[-1])
    norm = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    basis = [_unit(b, norm, norm)]
    kept: list[tuple[Tensor, ...]] = []
    table = b.new_zeros((*b.shape[:-1], iterations + 1, iterations))
    for j in range(iterations):
        product, found = apply(basis[j])
        kept.append(found)
        size = torch.linalg.vector_norm(product, dim=-1, keepdim=True)
        for _ in range(2):  # the second pass takes what rounding left
            for i, v in enumerate(basis):
                overlap = (product * v).sum(-1, keepdim=True)
                table[..., i, j] += overlap.squeeze(-1)
                product = product - overlap * v
        rest = torch.linalg.vector_norm(product, dim=-1, keepdim=True)
        table[..., j + 1, j] = rest.squeeze(-1)
        basis.append(_unit(product, rest, size))
    target = torch.cat([norm, b.new_zeros((*b.shape[:-1], iterations))], -1).unsqueeze(-1)
    # A row that overflowed stays so, alone; torch would find no decomposition of the whole batch.
    broken = ~torch.isfinite(table).all(-1, keepdim=True).all(-2, keepdim=True)
    # Directions after a breakdown are zero, and so are their columns: the pseudoinverse leaves them out.
    inverse = torch.linalg.pinv(torch.where(broken, 0.0, table))
    weights = matmul(torch.where(broken, torch.nan, inverse), target).squeeze(-1)
    u = torch.zeros_like(b)
    images: tuple[Tensor, ...] = ()
    for j, found in enumerate(kept):
        weight = weights[..., j : j + 1]
        u = u + weight * basis[j]
        images = _add(images, weight, found)
    return KrylovSolution(u, images)


def _check_sides(b: Tensor) -> None:
    if check_tensor("b", b).dim() == 0 or b.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"b: got shape {tuple(b.shape)} of {b.dtype}, expected rows + (m,) of float32 or float64"
        )


def _unit(v: Tensor, norm: Tensor, size: Tensor) -> Tensor:
    """v / norm, or zero where it is nothing but rounding beside ``size``."""
    there = norm > _resolution(v) * size
    return torch.where(there, v / torch.where(there, norm, 1.0), 0.0)


def _resolution(v: Tensor) -> float:
    return 4 * torch.finfo(v.dtype).eps


def _add(
    total: tuple[Tensor, ...], weight: Tensor, found: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """total + weight * found, the weight of shape rows + (1,)."""
    scaled = []
    for image in found:
        lead = weight.reshape(weight.shape[:-1] + (1,) * (image.dim() - weight.dim() + 1))
        scaled.append(lead * image)
    return tuple(a + b for a, b in zip(total, scaled, strict=True)) if total else tuple(scaled)
