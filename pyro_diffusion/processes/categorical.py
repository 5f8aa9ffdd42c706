"""Destruction of symbols by independent replacement: all of the categorical algebra of the package."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.base import ForwardProcess
from pyro_diffusion.processes.levels import check_order
from pyro_diffusion.schedules import Level, Schedule
from pyro_diffusion.unwrapping import per_coordinate
from pyro_diffusion.validation import Shape, check_finite, check_positive_int, check_tensor

__all__ = ["Absorbing", "CategoricalCoefficients", "CategoricalProcess", "Uniform"]


class CategoricalCoefficients(NamedTuple):
    """Survival probabilities that a bridge from t to s needs, each with a dimension for symbols.

    Attributes:
        early: probability that a symbol survives until s.
        late: probability that it survives until t.
        between: probability that it survives from s to t.
    """

    early: Tensor
    late: Tensor
    between: Tensor


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
        {Ability.SYMBOLS, Ability.FACTORIZED, Ability.MARKOV}
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
        count = len(self.noise)
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: got dtype {x.dtype}, expected symbols as torch.int64")
        if values and not bool(((x >= 0) & (x < count)).all()):
            raise ValueError(
                f"{name}: got symbols from {int(x.min())} to {int(x.max())}, expected 0 to {count - 1}"
            )

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_0 (exact)."""
        return self._replace(x0, self.level(t, x0, state="x0").alpha)

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """The distribution of x_t given x_s (exact)."""
        early, late = self.level(s, xs, "s", "xs"), self.level(t, xs)
        if not (isinstance(s, Level) or isinstance(t, Level)):
            check_order(early, late)
        return self._replace(xs, late.alpha / early.alpha)

    def prior(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> TorchDistribution:
        """The marginal at t = 1 of data that is uniform over its symbols."""
        noise = self.noise.to(dtype=dtype or torch.get_default_dtype(), device=device)
        alpha = self._level_at(noise.new_ones(())).alpha.unsqueeze(-1)
        uniform = torch.zeros_like(noise)
        uniform[: self.states] = 1 / self.states
        probs = alpha * uniform + (1 - alpha) * noise
        return self._categorical(probs.expand(*self.check_event(event_shape), -1))

    def point_mass(self, x0: Tensor) -> TorchDistribution:
        """Certainty of x_0, symbol by symbol."""
        # On a GPU a check of the symbols would cost a wait.
        self.check_state("x0", x0, values=x0.device.type == "cpu")
        probs = torch.nn.functional.one_hot(x0, len(self.noise)).to(self.noise.dtype)
        return Categorical(probs=probs, validate_args=False).to_event(self.event_dim)

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> CategoricalCoefficients:
        """Survival probabilities until s, until t, and between.

        Raises:
            ValueError: for ``eta`` other than 1: this bridge has no free variance.
        """
        if eta != 1:
            raise ValueError(f"eta: got {eta}, expected 1 for a categorical process")
        early, late = s.alpha.unsqueeze(-1), t.alpha.unsqueeze(-1)
        return CategoricalCoefficients(early, late, late / early)

    def combine(
        self, xt: Tensor, posterior: TorchDistribution, coefficients: CategoricalCoefficients
    ) -> TorchDistribution:
        """Bridge mixed over the posterior of each symbol."""
        c = coefficients
        clean = self._padded(posterior).to(c.late.dtype)
        here = torch.nn.functional.one_hot(xt, len(self.noise)).to(clean.dtype)
        noise = self.noise.to(clean.dtype)
        noise_here = noise[xt].unsqueeze(-1)
        reached = c.late * here + (1 - c.late) * noise_here  # q(x_t | x_0 = k), over k
        # The floor keeps the kernel defined when a posterior denies every symbol that could have led here.
        clean = clean.clamp(min=_tiny(clean) ** 0.5)
        weights = torch.where(reached > 0, clean / reached.clamp(min=_tiny(clean)), 0.0)
        early = c.early * weights + (1 - c.early) * noise * weights.sum(-1, keepdim=True)
        step = c.between * here + (1 - c.between) * noise_here  # q(x_t | x_s = j), over j
        probs = step * early
        # A state that no data could have reached has no kernel: it gets a uniform one rather than NaN.
        return self._categorical(probs / probs.sum(-1, keepdim=True).clamp(min=_tiny(probs)))

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
        alpha = self.level(t, xt, state="xt").alpha.unsqueeze(-1)
        same = xt.unsqueeze(-1) == values
        probs = alpha * same + (1 - alpha) * self.noise.to(alpha.dtype)[xt].unsqueeze(-1)
        return probs.clamp(min=_tiny(probs)).log()

    def _replace(self, x: Tensor, survival: Tensor) -> TorchDistribution:
        survival = survival.unsqueeze(-1)
        kept = torch.nn.functional.one_hot(x, len(self.noise)).to(survival.dtype)
        return self._categorical(survival * kept + (1 - survival) * self.noise.to(survival.dtype))

    def _padded(self, posterior: TorchDistribution) -> Tensor:
        probs = per_coordinate(posterior).probs
        return torch.nn.functional.pad(probs, (0, len(self.noise) - probs.shape[-1]))

    def _categorical(self, probs: Tensor) -> TorchDistribution:
        # From logits with a floor far below float resolution: a zero probability then costs e^-87 (float32)
        # instead of torch's 1e-7, and no gradient is NaN.
        logits = probs.clamp(min=_tiny(probs)).log()
        return Categorical(logits=logits, validate_args=False).to_event(self.event_dim)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


class Absorbing(CategoricalProcess):
    """Destruction by masking: a lost symbol becomes the extra symbol ``mask`` = states and stays so.

    Args:
        schedule: ``alpha(t)`` is the probability that a symbol is not yet masked.
        states: number of data symbols.
        event_dim: number of rightmost dimensions that make one datum.

    References:
        Austin et al., arXiv 2107.03006; Sahoo et al. (MDLM), arXiv 2406.07524.
    """

    def __init__(self, schedule: Schedule, states: int, event_dim: int = 1) -> None:
        check_positive_int("states", states, at_least=2)
        self.mask = states
        noise = torch.zeros(states + 1, dtype=torch.float64)
        noise[states] = 1.0
        super().__init__(schedule, states, noise, event_dim)


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
