"""Models beside each other on the same held-out data."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from pyro_diffusion.estimate import LogLikelihoodEstimate

__all__ = ["compare"]


def compare(likelihoods: Mapping[str, LogLikelihoodEstimate]) -> pd.DataFrame:
    r"""A paired comparison, best model first, in the columns of ``az.compare``.

    =============  ==========================================================================
    ``rank``       0 for the best
    ``elpd``       sum over data of the log-likelihood (nats)
    ``p``          0: held-out data need no penalty for fitting
    ``elpd_diff``  best model's elpd minus this one's
    ``weight``     stacking weight: the mixture of the models that scores the data best
    ``se``         standard error of elpd over data, :math:`\sqrt{n\,Var(l_i)}`
    ``dse``        standard error of elpd_diff, from the *paired* differences
    ``warning``    whether a k-hat exceeds 0.7, or kinds of figures are mixed in the table
    ``scale``      ``"log"``
    ``kind``       what each model's figures are
    =============  ==========================================================================

    Values with a Monte-Carlo error of their own are more scattered than the models they score, and stacking
    then favours the noisier model: let the ``standard_error`` of each value be small beside the scatter.

    Args:
        likelihoods: at least two, of the same data in the same order.

    Raises:
        ValueError: for fewer than two models or unequal numbers of data.

    References:
        Vehtari et al., arXiv 1507.04544 (elpd and its errors); Yao et al., arXiv 1704.02030 (stacking).
    """
    if len(likelihoods) < 2:
        raise ValueError(f"likelihoods: got {len(likelihoods)} model(s), expected at least two")
    sizes = {name: len(likelihood) for name, likelihood in likelihoods.items()}
    if len(set(sizes.values())) > 1 or min(sizes.values()) < 2:
        raise ValueError(f"likelihoods: got {sizes} data, expected the same two or more for each")
    names = sorted(likelihoods, key=lambda name: -float(likelihoods[name].value.sum()))
    values = torch.stack([likelihoods[name].value.double().cpu() for name in names])
    n = values.shape[1]
    difference = values[0] - values
    mixed = len({likelihood.kind for likelihood in likelihoods.values()}) > 1
    rows = {
        "rank": range(len(names)),
        "elpd": values.sum(1).tolist(),
        "p": [0.0] * len(names),
        "elpd_diff": difference.sum(1).tolist(),
        "weight": stacking_weights(values).tolist(),
        "se": (n * values.var(1)).sqrt().tolist(),
        "dse": (n * difference.var(1)).sqrt().tolist(),
        "warning": [mixed or _unreliable(likelihoods[name]) for name in names],
        "scale": ["log"] * len(names),
        "kind": [likelihoods[name].kind for name in names],
    }
    return pd.DataFrame(rows, index=pd.Index(names, name="model"))


def stacking_weights(values: Tensor, iterations: int = 1000) -> Tensor:
    """Weights w that maximize the sum over data of log sum_m w_m p_m(x), by expectation maximization.

    Args:
        values: (models, n) log-likelihoods.
        iterations: steps; each raises the score.
    """
    weights = values.new_full((len(values), 1), 1.0 / len(values))
    for _ in range(iterations):
        weights = (weights.log() + values).softmax(0).mean(1, keepdim=True)
    return weights.squeeze(1)


def _unreliable(likelihood: LogLikelihoodEstimate) -> bool:
    return likelihood.khat is not None and bool((likelihood.khat > 0.7).any())
