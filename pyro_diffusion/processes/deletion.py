"""Destruction of symbols without a trace: strings of variable length."""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.base import ForwardProcess
from pyro_diffusion.processes.jumps import jump_divergence
from pyro_diffusion.processes.levels import Rates, check_order
from pyro_diffusion.processes.string_distributions import Insertions, Subsequence
from pyro_diffusion.processes.strings import LONGEST, compress, insertions
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.validation import Shape, check_positive_int

__all__ = ["Deletion", "DeletionCoefficients"]


class DeletionCoefficients(NamedTuple):
    r"""What a bridge from t to s needs.

    Attributes:
        keep: :math:`\rho = (\alpha_s - \alpha_t) / (1 - \alpha_t)`, the probability that a symbol lost until
            t is there at s.
    """

    keep: Tensor


class Deletion(ForwardProcess):
    r"""Each symbol is deleted by time t with probability :math:`1 - \alpha_t`; the others move together.

    A datum is a string of at most L symbols 0 ... ``symbols`` - 1 in a row of L integers; the places after
    its end hold the pad, the integer ``symbols``. With N(x, y) the number of embeddings of y in x as a
    subsequence, and lengths :math:`|x|`,

    .. math::
        q(x_t | x_0) &= N(x_0, x_t)\; \alpha_t^{|x_t|} (1 - \alpha_t)^{|x_0| - |x_t|}, \\
        q(x_s | x_t, x_0) &= \frac{N(x_0, x_s)\, N(x_s, x_t)}{N(x_0, x_t)}\;
        \rho^{|x_s| - |x_t|} (1 - \rho)^{|x_0| - |x_s|}, \qquad
        \rho = \frac{\alpha_s - \alpha_t}{1 - \alpha_t},

    and :math:`q(x_t | x_s)` likewise with :math:`\alpha_t / \alpha_s`. At t = 1 nothing is left: the
    prior is the empty string. Exact distributions, see
    :class:`~pyro_diffusion.processes.string_distributions.Subsequence`.

    Run backward, symbols are inserted. A denoiser under this process returns
    :class:`~pyro_diffusion.processes.string_distributions.Insertions`, a distribution over x_0 in which
    symbols are inserted into x_t apart from each other; in continuous time its expected counts by gap and
    symbol say everything, and they can be exact (see :meth:`divergence_rate`). The kernel of a step keeps
    each of its insertions with probability rho: a proper reverse kernel, whose bound is valid for any number
    of steps, and which tends to the jump process of these rates as steps grow.

    Args:
        schedule: ``alpha(t)`` is the survival probability, and 0 at t = 1: ``Rectified.full()``.
        symbols: number of symbols.

    Raises:
        ValueError: for a schedule that leaves symbols at t = 1.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        {Ability.STRINGS, Ability.INDEPENDENT, Ability.MARKOV, Ability.JUMPS}
    )

    def __init__(self, schedule: Schedule, symbols: int) -> None:
        super().__init__(schedule, event_dim=1)
        self.symbols = check_positive_int("symbols", symbols)
        last = self.schedule.log_snr_min
        if last != -math.inf:
            raise ValueError(
                f"schedule: got {type(schedule).__name__} with a log-SNR of {last:g} at t = 1, expected one "
                "that leaves no symbol, of log-SNR -inf there, such as Rectified.full()"
            )

    @property
    def pad(self) -> int:
        """What fills the places after a string's end."""
        return self.symbols

    @property
    def support(self) -> constraints.Constraint:
        """Integers from 0 to symbols, the pad."""
        return constraints.integer_interval(0, self.symbols)

    def check_event(self, event_shape: Shape) -> torch.Size:
        """The shape of one datum, or a refusal.

        Raises:
            ValueError: for more than one dimension, or rows longer than counts of embeddings allow.
        """
        sizes = super().check_event(event_shape)
        if sizes[0] > LONGEST:
            raise ValueError(
                f"event_shape: got {tuple(sizes)}, expected at most {LONGEST} symbols (embeddings are "
                "counted in double precision)"
            )
        return sizes

    def check_state(self, name: str, x: Tensor, values: bool = True) -> None:
        """Refuse what is no padded string.

        Raises:
            ValueError: naming the argument: for other dtypes than int64, rows that are too long, integers
                that are neither symbol nor pad, and pads before a symbol.
        """
        super().check_state(name, x, values)
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: got dtype {x.dtype}, expected symbols as torch.int64")
        if x.shape[-1] > LONGEST:
            raise ValueError(
                f"{name}: got rows of {x.shape[-1]} symbols, expected at most {LONGEST}"
            )
        if not values or x.numel() == 0:
            return
        if not bool(((x >= 0) & (x <= self.pad)).all()):
            raise ValueError(
                f"{name}: got integers from {int(x.min())} to {int(x.max())}, expected symbols from 0 to "
                f"{self.symbols - 1} and the pad {self.pad}"
            )
        if bool(((x[..., :-1] == self.pad) & (x[..., 1:] != self.pad)).any()):
            raise ValueError(
                f"{name}: got a pad ({self.pad}) before a symbol, expected all pads at the right end"
            )

    def trial_data(self, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """Strings to try a program on, of any length, the same at every call."""
        x = super().trial_data(shape, dtype)
        return compress(x, x != self.pad, self.pad)

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0 (exact)."""
        return Subsequence(x0, self.level(t, x0, state="x0").alpha, self.symbols)

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_s (exact)."""
        early, late = self.level(s, xs, "s", "xs"), self.level(t, xs)
        if not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        return Subsequence(xs, late.alpha / early.alpha, self.symbols)

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """Certainty of the empty string."""
        empty = torch.full(self.check_event(event_shape), self.pad, device=device)
        keep = torch.ones(1, dtype=dtype or torch.get_default_dtype(), device=device)
        return Subsequence(empty, keep, self.symbols)

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """Certainty of x_0."""
        # On a GPU a check of the symbols would cost a wait.
        self.check_state("x0", x0, values=x0.device.type == "cpu")
        return Delta(x0, event_dim=1, validate_args=False)

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> DeletionCoefficients:
        """Probability that what is lost by t is there at s.

        Raises:
            ValueError: for an eta other than 1: the Markov bridge is the only one.
        """
        if eta != 1:
            raise ValueError(f"eta: got {eta}, expected 1 (the bridge of Deletion is Markov)")
        lost = (1 - t.alpha).clamp(min=torch.finfo(t.alpha.dtype).tiny)
        return DeletionCoefficients(((s.alpha - t.alpha) / lost).clamp(0, 1))

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: DeletionCoefficients
    ) -> TorchDistribution:
        """The bridge to a certain x_0, or insertions of which each is kept.

        Raises:
            ValueError: for another posterior than a point mass or insertions.
        """
        if isinstance(posterior, Delta):
            return Subsequence(posterior.v, coefficients.keep, self.symbols, xt)
        return self._insertions(posterior).thinned(coefficients.keep)

    def divergence_rate(
        self, x0: Tensor, xt: Tensor, posterior: TorchDistribution, rates: Rates
    ) -> Tensor:
        r"""The integrand of the continuous-time bound, exact (nats per unit of t).

        .. math:: \sum_{z} \hat R_z - R_z + R_z \log\frac{R_z}{\hat R_z}, \qquad
                  R_z = \frac{-\alpha'}{1 - \alpha}\; N(z, x_t)\, \frac{N(x_0, z)}{N(x_0, x_t)},

        over the strings z of one symbol more than :math:`x_t`. R is the rate at which the reverse process of
        x_0 jumps there: the forward process, which deletes each symbol at rate :math:`-\alpha'/\alpha`, goes
        from z to :math:`x_t` at :math:`N(z, x_t)` times that, and Bayes' rule turns it around.
        :math:`N(x_0, z) / N(x_0, x_t)` is the expected number of symbols c of x_0 that are lost from gap g,
        where all embeddings of :math:`x_t` are equally likely and z is :math:`x_t` with c in that gap. There
        are :math:`N(z, x_t)` such gaps for one z (those around equal symbols), so :math:`R_z` is the sum of
        the expected counts over them, and so is :math:`\hat R_z`, of the posterior's counts: rates are
        of strings, and how a denoiser spreads a count over gaps that lead to one string makes no difference.
        The sum over alignments is taken inside; conditioning on one of them would be a bound, too, but looser
        (by convexity).
        """
        level = rates.level
        found = self._insertions(posterior).counts
        known = insertions(x0.expand_as(xt), xt, self.symbols).to(found.dtype)
        known, found = (_by_string(v, xt, self.pad) for v in (known, found))
        cost = jump_divergence(known, found, found - known).flatten(-2).sum(-1)
        lost = (1 - level.alpha).clamp(min=torch.finfo(level.alpha.dtype).eps)
        return (-rates.log_alpha * level.alpha / lost).squeeze(-1) * cost

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """The string before, and the log-odds of insertions."""
        own = self._insertions(kernel)
        return {"x": own.x, "log_odds": own.log_odds}

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The insertions of such tensors."""
        return Insertions(tensors["x"], tensors["log_odds"], self.symbols)

    def _insertions(self, posterior: TorchDistribution) -> Insertions:
        if not isinstance(posterior, Insertions):
            raise ValueError(
                f"posterior: got {type(posterior).__name__}, expected Insertions, as of an InsertionDenoiser"
            )
        return posterior


def _by_string(counts: Tensor, y: Tensor, pad: int) -> Tensor:
    """Counts by gap and symbol, with those that lead to the same string added up at the first of their gaps.

    Before and after each of a run of equal symbols, another of them gives one string.
    """
    y = y.expand(*counts.shape[:-2], y.shape[-1])  # one string under several contexts
    own = y[..., :-1]  # the symbol before gap g is y_{g-1}
    place = torch.arange(own.shape[-1], device=y.device)
    begins = torch.nn.functional.pad(own[..., 1:] != own[..., :-1], (1, 0), value=True)
    start = torch.where(begins, place, 0).cummax(-1).values
    symbol = torch.where(own == pad, 0, own)
    same = counts[..., 1:, :].gather(-1, symbol.unsqueeze(-1)).squeeze(-1)
    same = torch.where(own == pad, 0.0, same)
    width = counts.shape[-1]
    flat = counts.flatten(-2)
    flat = flat.scatter_add(-1, (place + 1) * width + symbol, -same)
    # What was subtracted from itself leaves zero exactly.
    return flat.scatter_add(-1, start * width + symbol, same).unflatten(-1, (-1, width))
