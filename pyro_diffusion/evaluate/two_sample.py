"""The classifier two-sample test: can a network tell one sample from another?"""

import math
from dataclasses import dataclass

import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from pyro_diffusion.evaluate.classifiers import fit_classifiers, scores
from pyro_diffusion.validation import check_finite, check_number, check_positive_int

__all__ = ["TwoSampleTest", "c2st"]


@dataclass(frozen=True)
class TwoSampleTest:
    """How well two samples are told apart.

    Attributes:
        accuracy: cross-validated, 0.5 if they cannot be told apart and 1 if always.
        standard_error: of the accuracy (widened, see :func:`~pyro_diffusion.evaluate.c2st`).
        p_value: chance of such an accuracy or a higher one if both samples have one distribution
            (approximate).
    """

    accuracy: float
    standard_error: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} +- {self.standard_error:.3f} (p = {self.p_value:.2g})"


def c2st(
    x: Tensor,
    y: Tensor,
    *,
    folds: int = 5,
    hidden: int | None = None,
    iterations: int = 300,
    learning_rate: float = 5e-3,
) -> TwoSampleTest:
    r"""Classifier two-sample test: held-out accuracy of a small network that tells x from y.

    Two hidden layers, trained on all but one of the k folds and asked about that one, for each fold. The
    figure is the mean of both samples' accuracies, so their sizes need not agree. With binomial errors
    widened because the folds' networks share data (Nadeau & Bengio's factor),

    .. math:: z = \frac{\text{accuracy} - 1/2}{\tfrac14 \sqrt{1/n_x + 1/n_y}\,\sqrt{1 + k / (k - 1)}},
              \qquad p = 1 - \Phi(z).

    Assumes independent draws within each sample and between them. The p-value is approximate and errs to the
    safe side: 1.2 to 1.3 times the binomial error was seen where the factor for five folds is 1.5. A low
    accuracy is no proof of likeness: it is what this network could find.

    Args:
        x: (n,) + event.
        y: (m,) + event.
        folds: parts of the cross-validation, >= 2.
        hidden: width of both layers; by default ten per dimension, 32 to 256.
        iterations: full-batch Adam steps.
        learning_rate: of Adam.

    Returns:
        The ``accuracy``, 0.5 if the samples cannot be told apart and 1 if always, its ``standard_error``
        (widened) and the ``p_value``, the chance of such an accuracy or a higher one if both samples have one
        distribution.

    Raises:
        ValueError: for shapes that differ, values that are not finite, or fewer data than twice the folds.

    Example:
        >>> same = c2st(torch.randn(100, 2), torch.randn(100, 2), iterations=50)
        >>> same.p_value > 0.001
        True

    References:
        Lopez-Paz & Oquab, arXiv 1610.06545; Lueckmann et al., arXiv 2101.04653 (as a measure of posteriors);
        Nadeau & Bengio, Inference for the generalization error, Machine Learning 52 (2003), section 4.2.
    """
    check_positive_int("folds", folds, at_least=2)
    check_positive_int("iterations", iterations)
    if hidden is not None:
        check_positive_int("hidden", hidden)
    check_number("learning_rate", learning_rate, above=0, at_most=1e3)
    if x.shape[1:] != y.shape[1:] or x.dim() < 1 or min(len(x), len(y)) < 2 * folds:
        raise ValueError(
            f"x, y: got shapes {tuple(x.shape)}, {tuple(y.shape)}, expected (n,) + event and (m,) + event "
            f"with n, m >= {2 * folds}, twice the folds"
        )
    check_finite("x", x)
    check_finite("y", y)
    rows = torch.cat([x, y]).detach().flatten(1 if x.dim() > 1 else 0).reshape(len(x) + len(y), -1)
    rows = rows.to(torch.get_default_dtype())
    spread = rows.std(0)
    rows = (rows - rows.mean(0)) / torch.where(spread > 0, spread, 1.0)
    label = (torch.arange(len(rows), device=rows.device) >= len(x)).to(rows.dtype)
    # Every fold holds its share of both samples.
    part = torch.cat([torch.randperm(n, device=rows.device) % folds for n in (len(x), len(y))])
    width = hidden or min(256, max(32, 10 * rows.shape[1]))
    held_out = _held_out(rows, label, part, folds, width, iterations, learning_rate)
    right = ((held_out > 0) == (label > 0.5)).double()
    shares = torch.stack([right[: len(x)].mean(), right[len(x) :].mean()]).cpu()
    sizes = shares.new_tensor([len(x), len(y)])
    accuracy = float(shares.mean())
    widened = math.sqrt(1 + folds / (folds - 1))
    error = widened * float((shares * (1 - shares) / sizes).sum().sqrt() / 2)
    z = (accuracy - 0.5) / (widened * 0.25 * math.sqrt(float((1 / sizes).sum())))
    return TwoSampleTest(accuracy, error, float(stats.norm.sf(z)))


def _held_out(
    rows: Tensor,
    label: Tensor,
    part: Tensor,
    folds: int,
    width: int,
    iterations: int,
    learning_rate: float,
) -> Tensor:
    """Every row's score by the network that did not see it; one network a fold."""
    seen = part != torch.arange(folds, device=part.device).unsqueeze(1)  # (folds, n)
    share = label.mean()
    balance = torch.where(label > 0.5, 0.5 / share, 0.5 / (1 - share)) * seen
    balance = balance / balance.sum(1, keepdim=True)
    labels = label.expand(folds, -1)
    layers = fit_classifiers(rows, labels, balance, width, iterations, learning_rate)
    with torch.no_grad():
        return scores(rows, layers).gather(0, part.unsqueeze(0)).squeeze(0)
