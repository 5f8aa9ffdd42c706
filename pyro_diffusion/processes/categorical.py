"""Destruction of symbols by independent replacement: all of the categorical algebra of the package."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import Categorical, TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.base import ForwardProcess
from pyro_diffusion.processes.jumps import jump_divergence
from pyro_diffusion.processes.levels import Rates, check_order
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape, check_finite, check_positive_int, check_tensor

__all__ = ["CategoricalCoefficients", "CategoricalProcess", "RedrawnCoefficients", "Uniform"]


class CategoricalCoefficients(NamedTuple):
    """Survival probabilities that a bridge from t to s needs, each with a dimension for symbols.

    Of a process of another family of matrices, whatever its matrices are made of.

    Attributes:
        early: probability that a symbol survives until s.
        late: probability that it survives until t.
        between: probability that it survives from s to t.
    """

    early: Tensor
    late: Tensor
    between: Tensor


class RedrawnCoefficients(NamedTuple):
    """What a mixture of the Markov bridge and fresh draws of q(x_s | x_0) needs.

    Attributes:
        markov: coefficients of the Markov bridge.
        share: that the Markov bridge has.
    """

    markov: CategoricalCoefficients
    share: Tensor


class CategoricalProcess(ForwardProcess):
    r"""Each symbol survives until t with probability :math:`\alpha_t`, else it is drawn anew from ``noise``.

    .. math::
        q(x_t | x_0) = \alpha_t\,\delta_{x_0} + (1 - \alpha_t)\,\pi, \qquad
        q(x_t | x_s) = \tfrac{\alpha_t}{\alpha_s}\,\delta_{x_s} + (1 - \tfrac{\alpha_t}{\alpha_s})\,\pi .

    Bayes' rule gives the bridge, and for a posterior :math:`p(x_0 = k | x_t) = p_k` per coordinate, with
    :math:`w_k = p_k / q(x_t | x_0 = k)`, the reverse kernel of D3PM

    .. math:: p(x_s = j | x_t) \propto q(x_t | x_s = j)
              \Big(\alpha_s w_j + (1 - \alpha_s)\,\pi_j \textstyle\sum_k w_k\Big),

    exact for any factorized posterior. A symbol that cannot have led to x_t gets no weight.
    Here ``alpha(t)`` of the schedule is a probability; ``Rectified.full()`` is the usual linear one.

    In continuous time a symbol is replaced at rate :math:`\beta = -\alpha'/\alpha`; see
    :meth:`divergence_rate`. Other bridges with the same marginals mix the Markov bridge, of share eta, with
    fresh draws of :math:`q(x_s | x_0)`, see :meth:`coefficients`.

    Implementing another family of transition matrices: :math:`M(a)` with :math:`M(1) = I` and
    :math:`M(a) M(b) = M(ab)`, so that :math:`q(x_t | x_0)` is a row of :math:`M(\alpha_t)` and
    :math:`q(x_t | x_s)` one of :math:`M(\alpha_t / \alpha_s)`. A subclass implements ``_rows``,
    ``_columns``, ``_spread`` and ``_inflow``; every distribution is made of these. Matrices that depend on
    both times have, in place of the survival probability, whatever ``_until`` and ``_between`` return.

    Args:
        schedule: ``alpha(t)`` is the survival probability.
        states: number of symbols that data may take, 0 ... states - 1.
        noise: probabilities over all symbols of x_t, at least ``states`` of them.
        event_dim: number of rightmost dimensions that make one datum.

    Raises:
        ValueError: if ``noise`` is not a probability vector over at least ``states`` symbols.

    References:
        Austin et al. (D3PM), arXiv 2107.03006; Hoogeboom et al., arXiv 2102.05379.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        {
            *(Ability.SYMBOLS, Ability.FACTORIZED, Ability.MARKOV),
            *(Ability.INDEPENDENT, Ability.JUMPS, Ability.REDRAWS),
        }
    )
    noise: Tensor

    def __init__(self, schedule: Schedule, states: int, noise: Tensor, event_dim: int = 1) -> None:
        super().__init__(schedule, event_dim)
        self.states = check_positive_int("states", states, at_least=2)
        if isinstance(noise, Tensor):
            check_tensor("noise", noise)
        noise = torch.as_tensor(noise, dtype=torch.float64)
        check_finite("noise", noise)
        if noise.dim() != 1 or len(noise) < states or bool((noise < 0).any()):
            raise ValueError(
                f"noise: got shape {tuple(noise.shape)}, expected non-negative probabilities over at "
                f"least {states} symbols"
            )
        if abs(float(noise.sum()) - 1) > 1e-5:
            raise ValueError(f"noise: got a sum of {float(noise.sum()):g}, expected 1")
        self.register_buffer("noise", noise)

    @property
    def support(self) -> constraints.Constraint:
        """Integers from 0 to states - 1."""
        return constraints.integer_interval(0, self.states - 1)

    def check_state(self, name: str, x: Tensor, values: bool = True) -> None:
        """Refuse what cannot be a state: as the base does, and anything but symbols of the noise's alphabet.

        Raises:
            ValueError: naming the argument.
        """
        super().check_state(name, x, values)
        self._check_symbols(name, x, values)

    def _check_symbols(self, name: str, x: Tensor, values: bool) -> None:
        count = len(self.noise)
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: got dtype {x.dtype}, expected symbols as torch.int64")
        if values and not bool(((x >= 0) & (x < count)).all()):
            raise ValueError(
                f"{name}: got symbols from {int(x.min())} to {int(x.max())}, expected 0 to {count - 1}"
            )

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0 (exact)."""
        return self._categorical(self._rows(x0, self._until(self.level(t, x0, state="x0"))))

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_s (exact)."""
        early, late = self.level(s, xs, "s", "xs"), self.level(t, xs)
        if not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        return self._categorical(self._rows(xs, self._between(early, late)))

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The marginal at t = 1 of data that is uniform over its symbols; where the process is by default."""
        dtype, device = dtype or torch.get_default_dtype(), device or self.noise.device
        survival = self._until(self._level_at(torch.ones((), dtype=dtype, device=device)))
        uniform = torch.zeros(len(self.noise), dtype=dtype, device=device)
        uniform[: self.states] = 1 / self.states
        probs = self._spread(uniform, survival)
        return self._categorical(probs.expand(*self.check_event(event_shape), -1))

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """Certainty of x_0, symbol by symbol."""
        # On a GPU a check of the symbols would cost a wait.
        self.check_state("x0", x0, values=x0.device.type == "cpu")
        probs = torch.nn.functional.one_hot(x0, len(self.noise)).to(self.noise.dtype)
        return Categorical(probs=probs, validate_args=False).to_event(self.event_dim)

    def coefficients(
        self, s: Level, t: Level, eta: float = 1.0
    ) -> CategoricalCoefficients | RedrawnCoefficients:
        r"""Survival probabilities until s, until t, and between.

        Args:
            s: the earlier level.
            t: the later level.
            eta: the bridge is :math:`\eta\, q(x_s | x_t, x_0) + (1 - \eta)\, q(x_s | x_0)` per symbol, which
                has the process's marginals for every eta. Under masking, a symbol that is visible is masked
                again with probability :math:`\rho = (1 - \eta)(1 - \alpha_s)`: ReMDM's sampler, and the
                discrete DDIM family :math:`\sigma\,\delta_{x_t} + (\alpha_s - \sigma\alpha_t)\,\delta_{x_0}
                + (1 - \alpha_s - \sigma(1 - \alpha_t))\,\pi` with
                :math:`\sigma = \eta (1 - \alpha_s)/(1 - \alpha_t)`. Under other noise the Markov bridge is
                no member of that family, but it is of this one.

        Raises:
            ValueError: if eta lies outside [0, 1].

        References:
            Song et al. (DDIM), arXiv 2010.02502, appendix A; Wang et al. (ReMDM), arXiv 2503.00307.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
        markov = CategoricalCoefficients(self._until(s), self._until(t), self._between(s, t))
        share = torch.full_like(s.alpha.unsqueeze(-1), eta)
        return markov if eta == 1 else RedrawnCoefficients(markov, share)

    def combine(
        self,
        xt: Tensor,
        posterior: TorchDistribution,
        coefficients: CategoricalCoefficients | RedrawnCoefficients,
    ) -> TorchDistribution:
        """Bridge mixed over the posterior of each symbol."""
        if isinstance(coefficients, RedrawnCoefficients):
            c, share = coefficients.markov, coefficients.share
            fresh = self._spread(self._padded(posterior).to(share.dtype), c.early)
            return self._categorical(share * self._reverse(xt, posterior, c) + (1 - share) * fresh)
        return self._categorical(self._reverse(xt, posterior, coefficients))

    def _reverse(
        self, xt: Tensor, posterior: TorchDistribution, c: CategoricalCoefficients
    ) -> Tensor:
        """Probabilities of the reverse kernel of the Markov bridge."""
        # The floor keeps the kernel defined when a posterior denies every symbol that could have led here.
        clean = self._floored(posterior, c.late.dtype)
        weights = clean * _inverse(self._columns(xt, c.late))
        probs = self._columns(xt, c.between) * self._spread(weights, c.early)
        # A state that no data could have reached has no kernel: it gets a uniform one rather than NaN.
        return probs / probs.sum(-1, keepdim=True).clamp(min=_tiny(probs))

    def divergence_rate(
        self, x0: Tensor, xt: Tensor, posterior: TorchDistribution, rates: Rates
    ) -> Tensor:
        r"""The integrand of the continuous-time bound, exact (nats per unit of t).

        .. math:: \sum_{y \ne x} \hat R_y - R_y + R_y \log\frac{R_y}{\hat R_y}, \qquad
                  R_y = \beta\,\pi_x \frac{q(y | x_0)}{q(x | x_0)}, \qquad
                  \hat R_y = \beta\,\pi_x \sum_k p_k \frac{q(y | k)}{q(x | k)},

        with :math:`x = x_t`, per symbol, summed over the event: R is the rate at which the reverse process
        of x_0 jumps from x to y, and :math:`\hat R` the posterior's. It costs O(K) a symbol. The limit of
        KL(bridge || reverse kernel) / (t - s): both jump at most once, with probabilities
        :math:`(t - s) R_y`, up to :math:`O((t - s)^2)`.

        References:
            Campbell et al., arXiv 2205.14987, proposition 2; Lou et al., arXiv 2310.16834.
        """
        survival = self._until(rates.level)
        clean = self._floored(posterior, survival.dtype)
        truth = torch.nn.functional.one_hot(x0, len(self.noise)).to(clean.dtype)
        inverse = _inverse(self._columns(xt, survival))
        # Their difference for itself: towards pure noise the two ratios agree in more and more digits.
        known, found, gap = (
            self._spread(v * inverse, survival) for v in (truth, clean, clean - truth)
        )
        inflow = self._inflow(xt, rates.level).to(known.dtype)
        cost = (inflow * jump_divergence(known, found, gap)).sum(-1)
        return sum_rightmost(-rates.log_alpha * cost, self.event_dim)

    def reverse_rates(self, xt: Tensor, posterior: TorchDistribution, t: Tensor | Level) -> Tensor:
        r"""Rates at which the reverse process jumps from x_t to every symbol, under a posterior over x_0.

        .. math:: \hat R_y = \pi_{x} \sum_k p_k \frac{q(y | k)}{q(x | k)}, \qquad y \ne x = x_t,

        per unit of :math:`-\log\alpha`, shape of x_t + (symbols,), 0 at x_t itself. With the point mass at
        x_0 they are those of the reverse process given x_0; exact, and linear in the posterior.

        Args:
            xt: state.
            posterior: over x_0, of x_t's batch and event shape.
            t: time, or its level.
        """
        level = self.level(t, xt, state="xt")
        survival = self._until(level)
        weights = self._padded(posterior).to(survival.dtype) * _inverse(self._columns(xt, survival))
        return self._inflow(xt, level).to(weights.dtype) * self._spread(weights, survival)

    def kernel_tensors(self, kernel: TorchDistribution) -> dict[str, Tensor]:
        """Log-probabilities of the symbols."""
        return {"logits": per_coordinate(kernel).logits}

    def kernel_from(self, tensors: Mapping[str, Tensor]) -> TorchDistribution:
        """The categorical of such log-probabilities."""
        kernel = Categorical(logits=tensors["logits"], validate_args=False)
        return kernel.to_event(self.event_dim)

    def coordinate_log_likelihood(self, xt: Tensor, values: Tensor, t: Tensor | Level) -> Tensor:
        """Log-probability of every symbol of x_t, had its x_0 been each of the values."""
        if check_tensor("values", values).dim() != 1:
            raise ValueError(f"values: got shape {tuple(values.shape)}, expected a vector")
        # On a GPU a check of the symbols would cost a wait.
        self._check_symbols("values", values, values.device.type == "cpu")
        probs = self._columns(xt, self._until(self.level(t, xt, state="xt")))[..., values]
        return probs.clamp(min=_tiny(probs)).log()

    def _until(self, t: Level) -> Tensor:
        """The survival probability until t, with a dimension for symbols."""
        return t.alpha.unsqueeze(-1)

    def _between(self, s: Level, t: Level) -> Tensor:
        """That from s to t."""
        return (t.alpha / s.alpha).unsqueeze(-1)

    def _rows(self, x: Tensor, survival: Tensor) -> Tensor:
        """Probabilities of all symbols after x, of a survival probability with a dimension for symbols."""
        kept = torch.nn.functional.one_hot(x, len(self.noise)).to(survival.dtype)
        return survival * kept + (1 - survival) * self.noise.to(survival.dtype)

    def _columns(self, x: Tensor, survival: Tensor) -> Tensor:
        """Probabilities of x after all symbols."""
        kept = torch.nn.functional.one_hot(x, len(self.noise)).to(survival.dtype)
        return survival * kept + (1 - survival) * self.noise.to(survival.dtype)[x].unsqueeze(-1)

    def _spread(self, weights: Tensor, survival: Tensor) -> Tensor:
        """Weights on symbols, of any sign, as they are after a survival: a row vector times the matrix."""
        lost = weights.sum(-1, keepdim=True)
        return survival * weights + (1 - survival) * self.noise.to(weights.dtype) * lost

    def _inflow(self, x: Tensor, t: Level) -> Tensor:
        """Rates at which each other symbol jumps to x at unit rate of replacement, and 0 at x itself."""
        del t
        stays = torch.nn.functional.one_hot(x, len(self.noise))
        return self.noise[x].unsqueeze(-1) * (1 - stays)

    def _floored(self, posterior: TorchDistribution, dtype: torch.dtype) -> Tensor:
        """Probabilities of the data's symbols, none of them zero."""
        probs = self._padded(posterior).to(dtype)
        return probs.clamp(min=_tiny(probs) ** 0.5)

    def _padded(self, posterior: TorchDistribution) -> Tensor:
        probs = per_coordinate(posterior).probs
        return torch.nn.functional.pad(probs, (0, len(self.noise) - probs.shape[-1]))

    def _categorical(self, probs: Tensor) -> TorchDistribution:
        # From logits with a floor far below float resolution: a zero probability then costs e^-87 (float32)
        # instead of torch's 1e-7, and no gradient is NaN.
        logits = probs.clamp(min=_tiny(probs)).log()
        return Categorical(logits=logits, validate_args=False).to_event(self.event_dim)


def _inverse(probs: Tensor) -> Tensor:
    """1 / probs, and 0 for what is impossible."""
    return torch.where(probs > 0, 1 / probs.clamp(min=_tiny(probs)), 0.0)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


class Uniform(CategoricalProcess):
    """Destruction by replacement with any symbol, all equally likely (multinomial diffusion).

    Args:
        schedule: ``alpha(t)`` is the probability that a symbol was never replaced.
        states: number of symbols.
        event_dim: number of rightmost dimensions that make one datum.

    References:
        Hoogeboom et al., arXiv 2102.05379; Austin et al., arXiv 2107.03006.
    """

    def __init__(self, schedule: Schedule, states: int, event_dim: int = 1) -> None:
        check_positive_int("states", states, at_least=2)
        super().__init__(
            schedule, states, torch.full((states,), 1.0 / states, dtype=torch.float64), event_dim
        )
