"""Integers as real numbers, for continuous models of discrete data."""

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.global_batch import current_shard, scoring_noise
from pyro_diffusion.processes.noise import fresh_seed
from pyro_diffusion.validation import check_positive_int, check_tensor

__all__ = ["Dequantization"]


class Dequantization(TransformModule):
    r"""Turns integers into real numbers by adding uniform noise: :math:`x = \lfloor y \rfloor`, y = x + u.

    As the last transform of a ``TransformedDistribution`` over real y it turns a density into a
    distribution of integers, :math:`P(x) = \int_0^1 p(x + u)\,du`. Scoring draws one u per value, so that
    ``log_prob`` is an unbiased estimate of the *lower bound*
    :math:`E_u \log p(x + u) \le \log P(x)` (Jensen). The u of an instance are fixed: one instance scores a
    value alike each time. Compose with an affine transform for the model's scale.

    Args:
        event_dim: event dimension of the transformed distribution (the noise has none of its own).

    Example:
        >>> import pyro.distributions as dist
        >>> integers = dist.TransformedDistribution(dist.Normal(3.0, 2.0), [Dequantization()])
        >>> integers.log_prob(torch.tensor([2.0, 3.0])).shape
        torch.Size([2])

    References:
        Theis et al., arXiv 1511.01844, section 3.1; Ho et al., Flow++, arXiv 1902.00275.
    """

    bijective = False
    sign = +1

    def __init__(self, event_dim: int = 0) -> None:
        super().__init__(cache_size=0)
        check_positive_int("event_dim", event_dim, at_least=0)
        self._event_dim = event_dim
        # Integers, too, are held in a float tensor.
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)
        self._seed, self._shard = fresh_seed(), current_shard()

    def _call(self, x: Tensor) -> Tensor:
        return check_tensor("x", x).floor()

    def _inverse(self, y: Tensor) -> Tensor:
        y = y if y.is_floating_point() else y.to(torch.get_default_dtype())
        batch = y.shape[: y.dim() - self._event_dim]
        noise = scoring_noise(self._seed, self._shard, batch, y.device)
        return y + noise.uniform(y.shape, y, self._event_dim)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero: shifting within a unit cell preserves volume."""
        return torch.zeros(x.shape[: x.dim() - self._event_dim], dtype=x.dtype, device=x.device)
