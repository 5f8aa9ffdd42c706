"""What the masked diffusion of text.py is compared with: counts of n-grams, and autoregression.

Both score a window as the diffusion does: alone, without the text before it.
"""

from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints


class KneserNey:
    r"""Interpolated modified Kneser-Ney smoothing, exact conditional probabilities of the next symbol.

    p_k(c | h) = (n(h c) - d(n(h c)) + left(h) p_{k-1}(c | h')) / n(h), with left(h) the sum of the discounts
    d(n) of all c that were seen after h, h' the history without its first symbol, and p_0 uniform. The
    highest order counts occurrences, the others the different symbols before. (Chen & Goodman 1999.)
    """

    def __init__(self, text: Tensor, order: int, symbols: int) -> None:
        self.order, self.symbols = order, symbols
        self.tables = []
        for k in range(1, order + 1):
            keys = self._number(text.unfold(0, min(k + 1, order), 1))
            if k < order:  # every (k + 1)-gram once, without its first symbol
                keys = keys.unique() % symbols**k
            found, counts = keys.unique(return_counts=True)
            discount = _discounts(counts)[counts.clamp(max=3)]
            histories, place = torch.unique(found // symbols, return_inverse=True)
            total, left = torch.zeros(2, len(histories), dtype=torch.float64)
            total.index_add_(0, place, counts.double())
            left.index_add_(0, place, discount)
            self.tables.append((found, counts - discount, histories, total, left))

    def log_prob(self, grams: Tensor) -> Tensor:
        """log p(last symbol | those before), (..., order) -> (...)."""
        p = torch.full(grams.shape[:-1], 1 / self.symbols, dtype=torch.float64)
        for k, (found, counts, histories, total, left) in enumerate(self.tables, start=1):
            key = self._number(grams[..., -k:])
            history = key // self.symbols
            n = _look_up(histories, total, history)
            seen, rest = _look_up(found, counts, key), _look_up(histories, left, history)
            interpolated = (seen + rest * p) / n.clamp(min=1)
            p = torch.where(n > 0, interpolated, p)
        return p.log()

    def _number(self, grams: Tensor) -> Tensor:
        """A number for every n-gram, (..., n) -> (...); the last symbol is its last digit."""
        powers = self.symbols ** torch.arange(grams.shape[-1] - 1, -1, -1)
        return (grams * powers).sum(-1)


def _discounts(counts: Tensor) -> Tensor:
    """What is taken from counts of 0, 1, 2, and of 3 and more."""
    n1, n2, n3, n4 = (max(int((counts == n).sum()), 1) for n in (1, 2, 3, 4))
    share = n1 / (n1 + 2 * n2)
    rungs = [0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3]
    return torch.tensor([min(max(d, 0.1 * n), n) for n, d in enumerate(rungs)]).double()


def _look_up(keys: Tensor, values: Tensor, key: Tensor) -> Tensor:
    """The values at sorted keys; 0 for a key that is not among them."""
    place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == key, values[place].double(), 0.0)


def kneser_ney(text: Tensor, windows: Tensor, order: int, symbols: int) -> Tensor:
    """log p of windows (n, length): the first symbols have a shorter past, and a model of that order."""
    log_p = torch.zeros(len(windows), dtype=torch.float64)
    for k in range(1, order + 1):
        # the model of order k predicts the k-th symbol; that of the full order all that follow, too
        grams = windows[:, :k].unsqueeze(1) if k < order else windows.unfold(1, order, 1)
        log_p += KneserNey(text, k, symbols).log_prob(grams).sum(1)
    return log_p


class Autoregressive(TorchDistribution):
    """Each symbol from those before it: p(x) = prod_i p(x_i | x_1 ... x_{i-1}), exact.

    Args:
        network: a causal network, logits (N, length, symbols) of integer sequences.
        length: symbols in a datum.
        start: the symbol that stands before the first.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.nonnegative_integer

    def __init__(self, network: nn.Module, length: int, start: int) -> None:
        self.network, self.start = network, start
        super().__init__(torch.Size(), torch.Size([length]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of windows, (n, length) -> (n,)."""
        before = nn.functional.pad(value[:, :-1], (1, 0), value=self.start)
        unused = torch.zeros(
            len(value), device=value.device
        )  # where a denoiser has its noise level
        logits = self.network(before, unused).float()
        return Categorical(logits=logits, validate_args=False).log_prob(value).sum(-1)
