"""Denoisers of strings: what they say of x_0 is which symbols are to be inserted into x_t."""

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.denoisers.base import Denoiser, NetworkDenoiser, check_outputs
from pyro_diffusion.processes import Ability, Deletion
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.processes.string_distributions import Insertions
from pyro_diffusion.processes.strings import embeddings, lengths
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_finite

__all__ = ["InsertionDenoiser", "StringTableDenoiser"]


class InsertionDenoiser(NetworkDenoiser):
    r"""Expected insertions by gap and symbol, from a network.

    For :math:`x_t` of n symbols in a row of L places, each of the L - n empty places is filled by symbol c in
    the gap before place g with odds

    .. math:: \frac{p_{gc}}{1 - \sum p} = \frac{1 - \alpha_t}{(n + 1) K}\; e^{F_{gc}(x_t, \lambda)},

    K symbols, n + 1 gaps, so that :math:`(L - n)\,p_{gc}` symbols are expected there: never more in all than
    there is room for, and none at :math:`\alpha_t = 1`. The factor is what the level alone says, as each
    symbol of x_0 is lost with probability :math:`1 - \alpha_t`; a network that returns zeros expects a row
    of evenly spread symbols.

    Args:
        network: ``network(x, log_snr)`` on padded strings; returns F, ``symbols`` numbers for each place: of
            insertions before it. The pad after the last symbol is the gap at the end; what is returned for
            later pads is not used. A :class:`~pyro_diffusion.nn.Transformer` with ``states=symbols + 1`` and
            ``outputs=symbols`` fits.
        process: a :class:`~pyro_diffusion.processes.Deletion`.
        context_event_dims: see :class:`NetworkDenoiser`.

    Raises:
        ValueError: if the process is not one of strings, or the network's output has another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Deletion,
        context_event_dims: dict[str, int] | None = None,
    ) -> None:
        super().__init__(network, process, context_event_dims)
        require(process, Ability.STRINGS, argument="process")
        self.symbols = process.symbols

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level = self.process.level(t, xt, state="xt")
        # One symbol: its numbers have no dimension of their own.
        out = check_outputs(self.network_output(xt, level.clock, context), xt, self.symbols)
        gaps = (lengths(xt, self.symbols) + 1).to(out.dtype).unsqueeze(-1)
        factor = (1 - level.alpha).to(out.dtype).log() - (gaps * self.symbols).log()
        return Insertions(xt, out + factor.unsqueeze(-1), self.symbols)


class StringTableDenoiser(Denoiser):
    r"""The exact insertions of short strings whose joint probabilities are a table.

    With :math:`w_\ell(y) = \sum_{|x| = \ell} p(x)\,N(x, y)` over data of :math:`\ell` symbols, and
    :math:`y_{gc}` for y with c inserted before place g, the expected number of such symbols missing is

    .. math:: E[\#_{gc} | x_t = y] = \frac{\sum_\ell (1 - \alpha_t)^\ell\, w_\ell(y_{gc})}
                                          {\sum_\ell (1 - \alpha_t)^\ell\, w_\ell(y)} .

    These are the exact jump rates of the reverse process, for which the continuous-time bound is tight. (The
    distribution returned has them as its expected counts; it is not the posterior over whole strings.)

    Args:
        process: a :class:`~pyro_diffusion.processes.Deletion`.
        joint: probabilities of all rows of L symbols or pads, L dimensions of size ``symbols + 1``,
            normalized here; 0 where a pad comes before a symbol.

    Raises:
        ValueError: if the table does not fit the process.
    """

    ways: Tensor

    def __init__(self, process: Deletion, joint: Tensor) -> None:
        super().__init__(process)
        require(process, Ability.STRINGS, argument="process")
        check_finite("joint", joint)
        self.symbols, length = process.symbols, joint.dim()
        if set(joint.shape) != {self.symbols + 1}:
            raise ValueError(
                f"joint: got shape {tuple(joint.shape)}, expected every dimension to be {self.symbols + 1}, "
                "the symbols and the pad of the process"
            )
        rows = torch.cartesian_prod(*[torch.arange(self.symbols + 1)] * length)
        rows = rows.reshape(-1, length)
        bad = ((rows[:, :-1] == self.symbols) & (rows[:, 1:] != self.symbols)).any(-1)
        flat = joint.flatten().double()
        if bool((flat < 0).any()) or not bool((flat > 0).any()) or bool((flat[bad] > 0).any()):
            raise ValueError(
                "joint: got negative or only zero entries, or a pad before a symbol, expected probabilities "
                "of padded strings"
            )
        data = rows[flat > 0]
        probs = flat[flat > 0] / flat.sum()
        size = torch.nn.functional.one_hot(lengths(data, self.symbols), length + 1)
        by_length = probs.unsqueeze(-1) * size  # (data, L + 1)
        ways = torch.zeros(len(rows), length + 1, dtype=torch.float64)
        good = (~bad).nonzero().squeeze(-1)
        for part in good.split(max(1, 2**18 // len(data))):
            counts = embeddings(data, rows[part].unsqueeze(1), self.symbols)
            ways[part] = counts @ by_length
        self.register_buffer("ways", ways)

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The expected insertions into xt, exact."""
        level = self.process.level(t, xt, state="xt")
        length = self.ways.shape[-1] - 1
        if xt.shape[-1:] != (length,):
            raise ValueError(
                f"xt: got shape {tuple(xt.shape)}, expected a last dimension of {length}, the places of the "
                "table"
            )
        size = lengths(xt, self.symbols).unsqueeze(-1)
        more = torch.arange(length + 1, device=xt.device) - size
        lost = (1 - level.alpha).double()
        weight = torch.where(more >= 0, lost.pow(more.clamp(min=0)), 0.0)
        here = weight * self.ways[self._index(xt)]
        total = here.sum(-1, keepdim=True).clamp(min=torch.finfo(here.dtype).tiny)
        ways = self.ways[self._index(self._inserted(xt))]  # batch + (L, symbols, L + 1)
        counts = (weight[..., None, None, :] * ways).sum(-1) / total.unsqueeze(-1)
        # Of the places left, those that stay empty: by itself, not as a difference.
        left = torch.arange(length, -1, -1, device=xt.device)
        empty = (here * left).sum(-1, keepdim=True) / total
        least = math.sqrt(torch.finfo(level.alpha.dtype).tiny)
        odds = counts / empty.clamp(min=least).unsqueeze(-1)
        # Strings without room, and those that the table makes impossible, get nothing inserted.
        room = (xt == self.symbols).any(-1, keepdim=True) & (here.sum(-1, keepdim=True) > 0)
        odds = torch.where(room.unsqueeze(-1), odds, 0.0)
        log_odds = odds.clamp(min=torch.finfo(odds.dtype).tiny).log().to(level.alpha.dtype)
        return Insertions(xt, log_odds, self.symbols)

    def _inserted(self, x: Tensor) -> Tensor:
        """x with every symbol before every place, batch + (L, symbols, L); the last place falls out."""
        length = x.shape[-1]
        place = torch.arange(length, device=x.device)
        after = (place > place.unsqueeze(-1)).long()  # (gap, place)
        moved = x[..., (place - after)]  # batch + (gap, place)
        out = moved.unsqueeze(-2).repeat(*[1] * (moved.dim() - 1), self.symbols, 1)
        symbols = torch.arange(self.symbols, device=x.device)
        out[..., place, :, place] = symbols.expand(*out.shape[:-3], self.symbols)
        return out

    def _index(self, x: Tensor) -> Tensor:
        """The row of the table that a string is."""
        power = torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
        return (x * (self.symbols + 1) ** power).sum(-1)
