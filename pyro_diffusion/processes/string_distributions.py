"""Distributions over padded strings: symbols lost from a known string, and symbols put into one."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_diffusion.processes.strings import compress, embeddings, lengths, prefixes
from pyro_diffusion.validation import Shape

__all__ = ["Insertions", "Subsequence"]


class _Strings(TorchDistribution):
    """What both have in common: padded strings of one event dimension, and expansion.

    A subclass names the tensors that have the batch shape, with the number of their event dimensions.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False
    _tensors: ClassVar[dict[str, int]] = {}

    def __init__(self, symbols: int, tensors: dict[str, Tensor | None], length: int) -> None:
        self.symbols = symbols
        given = {k: v for k, v in tensors.items() if v is not None}
        batch = torch.broadcast_shapes(
            *(v.shape[: v.dim() - self._tensors[k]] for k, v in given.items())
        )
        for name in tensors:
            setattr(self, name, None)
        for name, value in given.items():
            event = value.shape[value.dim() - self._tensors[name] :]
            setattr(self, name, value.expand(batch + event))
        super().__init__(batch, torch.Size((length,)), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Symbols from 0, and the pad after the last of them."""
        return constraints.independent(constraints.integer_interval(0, self.symbols), 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """The same distribution at a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        tensors: dict[str, Tensor | None] = {}
        for name, dims in self._tensors.items():
            value = getattr(self, name)
            event = () if value is None else value.shape[value.dim() - dims :]
            tensors[name] = None if value is None else value.expand((*batch_shape, *event))
        _Strings.__init__(new, self.symbols, tensors, self.event_shape[0])
        return new


class Subsequence(_Strings):
    r"""What is left of a string whose symbols are lost one by one, given one that is known to be left.

    An embedding of y in x is drawn, all equally likely, and every other symbol of x is kept with
    probability :math:`\rho`:

    .. math:: p(z) = \frac{N(x, z)\,N(z, y)}{N(x, y)}\,\rho^{|z| - |y|} (1 - \rho)^{|x| - |z|},

    where N counts embeddings; without y, :math:`N(x, z)\,\rho^{|z|} (1 - \rho)^{|x| - |z|}`. Exact.

    Args:
        x: padded strings, batch + (L,).
        keep: probability of keeping a symbol, batch + (1,) or ().
        symbols: number of symbols, and the pad.
        known: y, padded to the same length; nothing by default.
    """

    _tensors: ClassVar[dict[str, int]] = {"x": 1, "keep": 1, "known": 1}
    x: Tensor
    keep: Tensor
    known: Tensor | None

    def __init__(self, x: Tensor, keep: Tensor, symbols: int, known: Tensor | None = None) -> None:
        keep = keep.reshape(1) if keep.dim() == 0 else keep  # the level of a single time
        super().__init__(symbols, {"x": x, "keep": keep, "known": known}, x.shape[-1])

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Strings, sample + batch + (L,)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            x, keep = self.x.expand(shape), self.keep.expand(*shape[:-1], 1)
            kept = torch.rand(shape, dtype=torch.float64, device=x.device) < keep
            if self.known is not None:
                kept = kept | self._embedded(x, self.known.expand(shape))
            return compress(x, kept & (x != self.symbols), self.symbols)

    def _embedded(self, x: Tensor, y: Tensor) -> Tensor:
        """Where y is in x, an embedding drawn among all: from its last symbol to the first."""
        counts = prefixes(x, y, self.symbols)
        left = lengths(y, self.symbols).unsqueeze(-1)
        uniform = torch.rand(x.shape, dtype=torch.float64, device=x.device)
        used = []
        for j in reversed(range(x.shape[-1])):
            before = (left - 1).clamp(min=0)
            match = (x[..., j : j + 1] == y.gather(-1, before)) & (left > 0)
            ways = counts[..., j, :].gather(-1, before)
            every = counts[..., j + 1, :].gather(-1, left)
            here = match & (uniform[..., j : j + 1] * every < ways)
            used.append(here)
            left = left - here.long()
        return torch.cat(used[::-1], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of strings, -inf of those that cannot be."""
        pad, dtype = self.symbols, self.keep.dtype
        size, left = lengths(self.x, pad), lengths(value, pad)
        ways = embeddings(self.x, value, pad)
        log_ways, known = ways.clamp(min=1).log(), torch.zeros_like(size)
        if self.known is not None:
            known = lengths(self.known, pad)
            through = embeddings(value, self.known, pad)
            ways = ways * (through > 0)
            log_ways = log_ways + through.clamp(min=1).log()
            log_ways = log_ways - embeddings(self.x, self.known, pad).clamp(min=1).log()
        keep = self.keep.squeeze(-1)
        out = log_ways.to(dtype) + torch.xlogy((left - known).to(dtype), keep)
        out = out + torch.special.xlog1py((size - left).to(dtype), -keep)
        return torch.where(ways > 0, out, -torch.inf)


class Insertions(_Strings):
    r"""Strings that a known one becomes when symbols are inserted into it, apart from each other.

    A string y of n symbols in a row of L places has L - n empty slots. Each is filled by symbol c in the gap
    before :math:`y_g` with probability :math:`p_{gc} = e^{l_{gc}} / (1 + \sum e^l)`, or stays empty. The
    symbols of one gap come in any order, all equally likely. With k symbols inserted, k_g of them in gap g,

    .. math:: p(z) = \frac{(L-n)!}{(L-n-k)!} \Big(1 - \sum p\Big)^{L-n-k}
              \sum_{\text{embeddings of y in z}} \prod_g \frac{1}{k_g!} \prod_{\text{inserted in g}} p_{gc} .

    As a posterior over x_0 it is known by its expected counts, :math:`(L - n)\,p_{gc}`, which is all that a
    jump process asks for. If every insertion is kept with probability rho, what results is
    :meth:`thinned`, of the same family.

    Args:
        x: the known strings, batch + (L,).
        log_odds: l, batch + (L, symbols). Gaps beyond the end of a string are left out.
        symbols: number of symbols, and the pad.
    """

    _tensors: ClassVar[dict[str, int]] = {"x": 1, "log_odds": 2}
    x: Tensor
    log_odds: Tensor

    def __init__(self, x: Tensor, log_odds: Tensor, symbols: int) -> None:
        place = torch.arange(x.shape[-1], device=x.device)
        gaps = (place <= lengths(x, symbols).unsqueeze(-1)).unsqueeze(-1)
        # What is impossible keeps a probability too small to matter, so that no gradient is NaN.
        least = math.log(torch.finfo(log_odds.dtype).tiny)
        odds = torch.where(gaps, log_odds.clamp(min=least), -torch.inf)
        super().__init__(symbols, {"x": x, "log_odds": odds}, x.shape[-1])

    @lazy_property
    def log_empty(self) -> Tensor:
        """Log-probability that a slot stays empty, batch shape."""
        return -torch.nn.functional.softplus(self.log_odds.flatten(-2).logsumexp(-1))

    @lazy_property
    def counts(self) -> Tensor:
        """Expected insertions by gap and symbol, batch + (L, symbols)."""
        slots = (self.x == self.symbols).sum(-1)[..., None, None]
        return slots * (self.log_odds + self.log_empty[..., None, None]).exp()

    def thinned(self, keep: Tensor) -> "Insertions":
        r"""The distribution if every insertion is kept with a probability, batch + (1,).

        Of probabilities :math:`\rho p` of insertion, and :math:`1 - \rho + \rho p_0` of none.
        """
        rest = torch.logaddexp(torch.log1p(-keep) - self.log_empty.unsqueeze(-1), keep.log())
        shift = keep.log() - rest
        return Insertions(self.x, self.log_odds + shift.unsqueeze(-1), self.symbols)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Strings, sample + batch + (L,)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            x, length = self.x.expand(shape).reshape(-1, shape[-1]), shape[-1]
            odds = self.log_odds.expand(*shape, self.symbols).reshape(len(x), -1)
            probs = torch.nn.functional.pad(odds, (0, 1)).double().softmax(-1)
            drawn = torch.multinomial(probs, length, replacement=True)
            slot = torch.arange(length, device=x.device)
            pads = (x == self.symbols).sum(-1, keepdim=True)
            filled = (slot < pads) & (drawn < odds.shape[-1])
            # In order of gaps, at random within one; y_g comes after gap g and before gap g + 1.
            uniform = torch.rand(x.shape, dtype=torch.float64, device=x.device)
            place = torch.where(filled, drawn // self.symbols + uniform, torch.inf)
            own = torch.where(x == self.symbols, torch.inf, slot + 1.0)
            order = torch.cat([own, place], -1).argsort(dim=-1, stable=True)[..., :length]
            symbols = torch.where(filled, drawn % self.symbols, self.symbols)
            return torch.cat([x, symbols], -1).gather(-1, order).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of strings, -inf of those that do not contain the known one; in O(L^3)."""
        pad, length = self.symbols, self.event_shape[0]
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        x, value = self.x.expand(*batch, length), value.expand(*batch, length)
        log_probs = self.log_odds + self.log_empty[..., None, None]
        log_probs = log_probs.expand(*batch, length, pad).clamp(min=_LEAST)
        # The pad has no probability, and a string that fills its row no gap at its end.
        log_probs = torch.nn.functional.pad(log_probs, (0, 1, 0, 1), value=_LEAST)
        factor = torch.arange(1, length + 1, dtype=log_probs.dtype, device=x.device).log()
        # f[i, r]: the first i known symbols are placed, and r insertions so far in gap i.
        start = torch.full((length + 1, length + 1), _LEAST, dtype=factor.dtype, device=x.device)
        start[0, 0] = 0.0
        f = start.expand(*batch, length + 1, length + 1)
        never = torch.full_like(f[..., :1], _LEAST)
        for j in range(length):
            symbol = value[..., j : j + 1]
            chance = log_probs.gather(-1, symbol.unsqueeze(-1).expand(*batch, length + 1, 1))
            inserted = torch.cat([never, f[..., :-1] + chance - factor], -1)
            matched = torch.where(x == symbol, f.logsumexp(-1)[..., :-1], _LEAST)
            matched = torch.nn.functional.pad(matched, (1, 0), value=_LEAST)
            first = torch.logaddexp(inserted[..., 0], matched)
            after = torch.cat([first.unsqueeze(-1), inserted[..., 1:]], -1)
            f = torch.where((symbol == pad).unsqueeze(-1), f, after)
        size, more = lengths(x, pad), lengths(value, pad)
        ways = f.logsumexp(-1).gather(-1, size.unsqueeze(-1)).squeeze(-1)
        slots, empty = (v.to(ways.dtype) for v in (length - size, (length - more).clamp(min=0)))
        ordered = torch.lgamma(slots + 1) - torch.lgamma(empty + 1)
        out = ways + ordered + empty * self.log_empty
        return torch.where(embeddings(value, x, pad) > 0, out, -torch.inf)


# Logarithm of nothing, finite: sums of it give no NaN.
_LEAST = -1e30
