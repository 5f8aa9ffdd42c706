"""The log-likelihood of a diffusion site, extracted from a Pyro program, with residuals and derivatives."""

from pyro_diffusion.likelihoods.deviance import deviance_residual
from pyro_diffusion.likelihoods.linearization import LinearizedProgram
from pyro_diffusion.likelihoods.program import ProgramLikelihood
from pyro_diffusion.likelihoods.whitening import Whitened

__all__ = ["LinearizedProgram", "ProgramLikelihood", "Whitened", "deviance_residual"]
