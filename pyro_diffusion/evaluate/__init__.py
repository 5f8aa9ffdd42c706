"""Likelihoods with their error bars, comparisons, and the way to ArviZ."""

from pyro_diffusion.estimate import LogLikelihoodEstimate
from pyro_diffusion.evaluate.bound import log_likelihood
from pyro_diffusion.evaluate.bracket import bracket_evidence
from pyro_diffusion.evaluate.calibration import sbc
from pyro_diffusion.evaluate.chain_costs import chain_costs
from pyro_diffusion.evaluate.comparison import compare
from pyro_diffusion.evaluate.continuity import continuity_residual
from pyro_diffusion.evaluate.coverage import tarp
from pyro_diffusion.evaluate.draws import draw_samples
from pyro_diffusion.evaluate.importance import importance_weighted, log_weights
from pyro_diffusion.evaluate.importance_posterior import importance_posterior
from pyro_diffusion.evaluate.inference_data import to_arviz, to_elpd
from pyro_diffusion.evaluate.jumps import jump_residual
from pyro_diffusion.evaluate.latent import latent_log_likelihood
from pyro_diffusion.evaluate.local_two_sample import local_c2st
from pyro_diffusion.evaluate.ode import flow_log_likelihood
from pyro_diffusion.evaluate.posterior_data import posterior_to_arviz
from pyro_diffusion.evaluate.two_sample import c2st
from pyro_diffusion.evaluate.wasserstein import sliced_wasserstein, wasserstein, wasserstein_bound

__all__ = [
    "LogLikelihoodEstimate",
    "bracket_evidence",
    "c2st",
    "chain_costs",
    "compare",
    "continuity_residual",
    "draw_samples",
    "flow_log_likelihood",
    "importance_posterior",
    "importance_weighted",
    "jump_residual",
    "latent_log_likelihood",
    "local_c2st",
    "log_likelihood",
    "log_weights",
    "posterior_to_arviz",
    "sbc",
    "sliced_wasserstein",
    "tarp",
    "to_arviz",
    "to_elpd",
    "wasserstein",
    "wasserstein_bound",
]
