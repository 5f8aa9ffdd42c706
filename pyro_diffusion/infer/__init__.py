"""Diffusions inside Pyro's inference: the chain as model and guide."""

from pyro_diffusion.infer.auto_posterior import AutoPosterior
from pyro_diffusion.infer.autoguide import AutoGuidance, AutoTwistedSMC
from pyro_diffusion.infer.conditional_filter import ConditionalFilter
from pyro_diffusion.infer.ddpm import DDPM
from pyro_diffusion.infer.particle_filter import ParticleFilter
from pyro_diffusion.infer.particle_gibbs import ParticleGibbs
from pyro_diffusion.infer.reparam import ChainReparam, forward_chain, reverse_chain
from pyro_diffusion.infer.twisted_smc import Particles, TwistedSMC, default_guidance

__all__ = [
    "DDPM",
    "AutoGuidance",
    "AutoPosterior",
    "AutoTwistedSMC",
    "ChainReparam",
    "ConditionalFilter",
    "ParticleFilter",
    "ParticleGibbs",
    "Particles",
    "TwistedSMC",
    "default_guidance",
    "forward_chain",
    "reverse_chain",
]
