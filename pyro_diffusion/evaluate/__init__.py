"""Likelihoods with their error bars, comparisons, and the way to ArviZ."""

from pyro_diffusion.evaluate.bound import log_likelihood
from pyro_diffusion.evaluate.comparison import compare
from pyro_diffusion.evaluate.estimate import Estimate, Likelihood, Terms
from pyro_diffusion.evaluate.importance import (
    from_log_weights,
    importance_weighted,
    log_weights,
)
from pyro_diffusion.evaluate.inference_data import to_arviz

__all__ = [
    "Estimate",
    "Likelihood",
    "Terms",
    "compare",
    "from_log_weights",
    "importance_weighted",
    "log_likelihood",
    "log_weights",
    "to_arviz",
]
