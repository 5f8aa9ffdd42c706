"""Divergences between implicit distributions, from draws alone: a classifier's log-odds."""

import math

import torch
from torch import Tensor, nn

from pyro_diffusion.estimate import LOWER_BOUND, Estimate
from pyro_diffusion.validation import check_finite

__all__ = ["DensityRatio"]


class DensityRatio(nn.Module):
    r"""The logarithm of a ratio of densities q / p by a classifier of their draws.

    .. math:: T^* = \arg\min_T\; E_q[\mathrm{softplus}(-T)] + E_p[\mathrm{softplus}(T)]
              = \log \frac{q}{p}

    so that :math:`KL(q \| p) \approx E_q[T]`, with gradients to the draws of q: ``pyro.factor("kl", -T(z))``
    in a program is the term :math:`-KL(q(z) \| p(z))` of its ELBO where q, p or both have draws and no
    density (the aggregate posterior and a diffusion prior, say: an adversarial autoencoder). The estimate is
    approximate: its error is the classifier's. :meth:`lower_bound` is a bound for any T.

    Mind what it leaves out. :math:`E_x KL(q(z|x) \| p(z)) = I_q(x; z) + KL(q(z) \| p(z))`: an objective with
    the aggregate's divergence alone lacks the mutual information, which regularizes the encoder.

    Args:
        network: maps draws, batch + event, to one number each, batch or batch + (1,).

    Example:
        >>> ratio = DensityRatio(nn.Linear(2, 1))
        >>> q, p = torch.randn(100, 2) + 1, torch.randn(100, 2)
        >>> ratio.loss(q, p).backward()
        >>> ratio.lower_bound(q, p).kind
        'lower bound'

    References:
        Goodfellow et al., arXiv 1406.2661; Makhzani et al., arXiv 1511.05644; Mescheder et al.,
        arXiv 1701.04722; Nguyen, Wainwright and Jordan, arXiv 0809.0853 (the bound).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"network: got {type(network).__name__}, expected a module")
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """T(x), the estimate of log q(x) / p(x), one number a draw."""
        try:
            out: Tensor = self.network(x)
        except Exception as error:
            error.add_note(
                f"network: got draws of shape {tuple(x.shape)} ({x.dtype}), expected a module that takes them"
            )
            raise
        return out.squeeze(-1) if out.shape[-1:] == (1,) else out

    def _of_each(self, x: Tensor) -> Tensor:
        out = self(x)
        if out.shape != x.shape[:1]:
            raise ValueError(
                f"network: got {tuple(out.shape)} for draws of shape {tuple(x.shape)}, expected a number for "
                "each draw"
            )
        return out

    def loss(self, q: Tensor, p: Tensor) -> Tensor:
        """The classifier's loss on draws of both, n of each or not; 2 log 2 where they cannot be told."""
        _check(q, p)
        ours = nn.functional.softplus(-self._of_each(q.detach())).mean()
        return ours + nn.functional.softplus(self._of_each(p.detach())).mean()

    @torch.no_grad()
    def lower_bound(self, q: Tensor, p: Tensor) -> Estimate:
        r""":math:`1 + E_q[T] - E_p[e^T] \le KL(q \| p)`, equal for the exact ratio; in nats."""
        _check(q, p)
        ours, theirs = self._of_each(q).double(), self._of_each(p).double().exp()
        error = float(ours.var() / len(ours) + theirs.var() / len(theirs))
        error = math.sqrt(error) if math.isfinite(error) else math.inf  # where e^T overflows
        return Estimate(1 + float(ours.mean() - theirs.mean()), error, LOWER_BOUND, "nats", 1.0)


def _check(q: Tensor, p: Tensor) -> None:
    for name, x in (("q", q), ("p", p)):
        check_finite(name, x)
        if x.dim() < 1 or len(x) < 2:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected two draws or more")
    if q.shape[1:] != p.shape[1:]:
        raise ValueError(
            f"q, p: got shapes {tuple(q.shape)}, {tuple(p.shape)}, expected draws of one shape"
        )
