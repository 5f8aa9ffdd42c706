"""The log-likelihood of a diffusion site, extracted from a Pyro program, with residuals and derivatives."""

from pyro_diffusion.likelihoods.base import Likelihood
from pyro_diffusion.likelihoods.program import ProgramLikelihood
from pyro_diffusion.likelihoods.whitening import Whitened

__all__ = ["Likelihood", "ProgramLikelihood", "Whitened"]
