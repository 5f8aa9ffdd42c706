"""Noise keyed by row: numbers that do not depend on the rows beside them."""

import contextlib
import functools
import math
from typing import Any

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor

from pyro_diffusion.precision import at_least_single
from pyro_diffusion.processes.noise import (
    FIRST,
    GAMMA,
    SECOND,
    SEEDS,
    NoiseSource,
    SeededNoise,
    fine,
)
from pyro_diffusion.validation import Shape, check_tensor

__all__ = ["RowNoise", "inverted"]


class RowNoise(NoiseSource):
    r"""Numbers that are a function of a seed, of the row they are for, and of how many went before.

    A row's numbers do not depend on which rows it is drawn with, nor on the device. Row i has a splitmix64
    stream of its own, whose j-th word is :math:`h(k_i + j\gamma)`, :math:`k_i = h(h(s) + i\gamma)`.
    Rows are the last batch dimension of what is drawn.

    Normal and categorical distributions, and all with an ``icdf``, are drawn row by row. Others are drawn for
    all rows together, from a seed of the first row's: right, but then dependent on the batch.

    Args:
        seed: an integer from 0 to below 2**63.
        rows: (n,), integers (int64) that name the rows, on the device of the draws.

    Raises:
        ValueError: for another seed, or rows of another shape or dtype.

    References:
        Steele, Lea & Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """

    def __init__(self, seed: int, rows: Tensor) -> None:
        super().__init__(seed)
        self.rows = check_tensor("rows", rows)
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(
                f"rows: got shape {tuple(rows.shape)} of {rows.dtype}, expected (n,) of torch.int64"
            )
        self._keys = _mix(_mix(torch.full_like(rows, seed)) + rows * GAMMA)
        self._used = 0

    def normal(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Standard normal numbers (Box and Muller, one per word)."""
        word, dtype = self._words(shape, event_dim), _real(like)
        radius = (_shift(word, 32).to(dtype) + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = word.bitwise_and_(2**32 - 1).to(dtype).mul_(2 * torch.pi * 2.0**-32)
        return radius.mul_(angle.cos_()).to(like.dtype)

    def uniform(self, shape: Shape, like: Tensor, event_dim: int = 0) -> Tensor:
        """Numbers strictly between 0 and 1."""
        bits = -round(
            math.log2(torch.finfo(like.dtype).eps)
        )  # half a step beside them is not rounded
        word = _shift(self._words(shape, event_dim), 64 - bits)
        return word.to(_real(like)).add_(0.5).mul_(2.0**-bits).to(like.dtype)

    def _other(
        self, distribution: TorchDistribution, base: Any, sample_shape: torch.Size
    ) -> Tensor:
        shape, event_dim = distribution.shape(sample_shape), distribution.event_dim
        row = len(shape) - event_dim - 1
        if base.event_shape == () and row >= 0 and shape[row] == len(self.rows):
            if type(base).sample is Categorical.sample:
                probs = fine(base.probs)
                return inverted(probs, self.uniform(shape, probs, event_dim))
            dtype = _dtype(base)
            like = torch.empty((), dtype=at_least_single(dtype), device=self.rows.device)
            with contextlib.suppress(NotImplementedError):
                out: Tensor = base.icdf(self.uniform(shape, like, event_dim))
                return out.to(dtype) if out.is_floating_point() else out
        return SeededNoise(self.joint_seed()).draw(distribution, sample_shape)

    def joint_seed(self) -> int:
        """A seed of the first row's, for draws that are made for all rows together."""
        return int(self._words((len(self.rows),), 0)[0]) % SEEDS

    def _words(self, shape: Shape, event_dim: int) -> Tensor:
        """The next 64 random bits for every element of a shape, row by row."""
        row = len(shape) - event_dim - 1
        if row < 0 or shape[row] != len(self.rows):
            raise ValueError(
                f"noise: got {len(self.rows)} rows for draws of shape {tuple(shape)} with {event_dim} event "
                "dimension(s), expected as many rows as the last batch dimension has"
            )
        rest = torch.Size((*shape[:row], *shape[row + 1 :]))
        first, self._used = self._used + 1, self._used + rest.numel()
        place = torch.arange(first, self._used + 1, device=self.rows.device) * GAMMA
        words = _mix(self._keys.unsqueeze(-1) + place)
        return words.reshape(-1, *rest).movedim(0, row).contiguous()


def inverted(probs: Tensor, uniform: Tensor) -> Tensor:
    """Categorical draws by inversion of the distribution function.

    Args:
        probs: batch + (k,), non-negative; they need not sum to one.
        uniform: sample + batch, in [0, 1).
    """
    edges = probs.to(uniform.dtype).cumsum(-1)
    edges = edges.expand(*uniform.shape, -1).contiguous()
    # Scaled, no place lies beyond the last symbol that has a probability.
    place = uniform.unsqueeze(-1) * edges[..., -1:]
    index = torch.searchsorted(edges, place, right=True).squeeze(-1)
    return index.clamp(max=probs.shape[-1] - 1)


def _mix(word: Tensor) -> Tensor:
    """splitmix64's finalizer, a bijection of 64 bits, in place."""
    word.bitwise_xor_(_shift(word, 30)).mul_(FIRST)
    word.bitwise_xor_(_shift(word, 27)).mul_(SECOND)
    return word.bitwise_xor_(_shift(word, 31))


def _shift(word: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (word >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _real(like: Tensor) -> torch.dtype:
    return at_least_single(like.dtype)


def _dtype(distribution: Any) -> torch.dtype:
    """The dtype that a distribution's parameters promote to."""
    found = (getattr(distribution, name, None) for name in distribution.arg_constraints)
    kinds = [x.dtype for x in found if isinstance(x, Tensor) and x.is_floating_point()]
    return functools.reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()
