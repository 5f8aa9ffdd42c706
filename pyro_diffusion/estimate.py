"""What a likelihood figure is: a value, its error, and what kind of number it is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_diffusion.validation import check_tensor

__all__ = [
    "EXACT",
    "IMPORTANCE_WEIGHTED",
    "LOWER_BOUND",
    "UNBIASED",
    "UPPER_BOUND",
    "Estimate",
    "LogLikelihoodEstimate",
    "Terms",
]

LOWER_BOUND = "lower bound"
UPPER_BOUND = "upper bound"
IMPORTANCE_WEIGHTED = "importance-weighted"
EXACT = "exact"
UNBIASED = "unbiased"


@dataclass(frozen=True)
class Estimate:
    """One published number.

    Attributes:
        value: the figure.
        standard_error: its standard error, data sampling and Monte Carlo together; infinite where it is not
            estimated, so that no bound on it holds and no sum hides it.
        kind: ``"lower bound"``, ``"upper bound"``, ``"importance-weighted"``, ``"unbiased"``, ``"exact"``, or
            in words that it is none of these.
        unit: ``"nats"`` or ``"bits/dim"``.
        evaluations: network evaluations per datum that it took.
    """

    value: float
    standard_error: float
    kind: str
    unit: str
    evaluations: float

    def __str__(self) -> str:
        if not math.isfinite(self.standard_error):
            return f"{self.value:.4f} {self.unit} ({self.kind}, error not estimated)"
        return f"{self.value:.4f} +- {self.standard_error:.4f} {self.unit} ({self.kind})"


@dataclass(frozen=True)
class Terms:
    """The bound, term by term, averaged over data (nats, each a cost: smaller is better).

    Attributes:
        prior: KL(q(x_1 | x) || p(x_1)).
        decoder: E[-log p(x | x_{t_0})].
        steps: (K,), the divergence of the step from t_j to t_{j-1}, j = 1 ... K; NaN-free: a step that no
            draw visited takes its nearest visited neighbour's value. In continuous time, the integrals over K
            equal slices of [0, 1].
        steps_standard_error: (K,), standard errors over data and draws; infinite where not visited twice.
        log_snr: (K,), log-SNR at t_j: the schedule's, if coordinates have log-SNRs of their own.
        reverse: the sum of all steps (in continuous time, the diffusion term).
        prior_standard_error: standard error over data (NaN for one datum).
        decoder_standard_error: standard error over data and draws.
        reverse_standard_error: standard error over data and draws.
    """

    prior: float
    decoder: float
    steps: Tensor
    steps_standard_error: Tensor
    log_snr: Tensor
    reverse: float = math.nan
    prior_standard_error: float = math.nan
    decoder_standard_error: float = math.nan
    reverse_standard_error: float = math.nan


@dataclass(frozen=True)
class LogLikelihoodEstimate:
    r"""Log-likelihoods of held-out data, one per datum.

    Attributes:
        value: (n,), log p(x) in nats, or a bound on it.
        standard_error: (n,), Monte-Carlo standard error of each.
        kind: what the values are: ``"lower bound"`` (unbiased estimates of it), ``"importance-weighted"``
            (a tighter bound in expectation), ``"unbiased"`` (estimates of log p(x) itself) or ``"exact"`` (up
            to ``standard_error`` and a solver's tolerance).
        evaluations: network evaluations per datum.
        dimensions: numbers in one datum.
        terms: the bound's parts, where it has them.
        ess: (n,), effective sample size of the importance weights, where there are any.
        khat: (n,), Pareto tail index of the weights; above 0.7 the value is unreliable.

    Raises:
        ValueError: for figures that are not one per datum.
    """

    value: Tensor
    standard_error: Tensor
    kind: str
    evaluations: float
    dimensions: int
    terms: Terms | None = None
    ess: Tensor | None = None
    khat: Tensor | None = None
    unit: str = "nats"

    def __post_init__(self) -> None:
        """Refuse figures that are not one per datum.

        Raises:
            ValueError: naming the figure and its shape.
        """
        for name in ("value", "standard_error", "ess", "khat"):
            figure = getattr(self, name)
            if figure is None and name in ("ess", "khat"):
                continue
            shape = check_tensor(name, figure).shape
            if not figure.is_floating_point():
                raise ValueError(f"{name}: got {figure.dtype}, expected real numbers")
            if len(shape) != 1 or shape != self.value.shape or not shape[0]:
                raise ValueError(
                    f"{name}: got shape {tuple(shape)}, expected (n,), one number per datum, n >= 1"
                )

    def __len__(self) -> int:
        return len(self.value)

    @property
    def mean(self) -> Estimate:
        """Mean log-likelihood in nats (higher is better).

        Its standard error is that of a mean over data drawn from their population; each value's
        Monte-Carlo error is part of the scatter.
        """
        n = len(self.value)
        error = float(self.value.std() / math.sqrt(n)) if n > 1 else float(self.standard_error[0])
        return Estimate(float(self.value.mean()), error, self.kind, "nats", self.evaluations)

    @property
    def bits_per_dim(self) -> Estimate:
        r"""Mean of :math:`-\log_2 p(x) / d` (lower is better)."""
        scale = 1 / (self.dimensions * math.log(2))
        mean = self.mean
        return Estimate(
            -mean.value * scale,
            mean.standard_error * scale,
            self.kind,
            "bits/dim",
            self.evaluations,
        )

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the mean (nats) from the estimator's own draws alone, the data held fixed."""
        return float(self.standard_error.square().sum().sqrt() / len(self.value))

    def __str__(self) -> str:
        return f"Log-likelihood of {len(self)} data: {self.mean}; {self.bits_per_dim}"


def concatenate(parts: list[Tensor]) -> Tensor:
    """Batches of per-datum numbers as one float64 tensor on the host."""
    return torch.cat([p.detach().to("cpu", torch.float64) for p in parts])
